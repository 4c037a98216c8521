"""Weights files: formats that are read, and untrusted files that are refused."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mask_rcnn_plus import UserError, read_class_names
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import read_weights_file


def read(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    return read_weights_file(path, name=path.name, trusted=trusted)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


def pickled(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_the_model_zoo_are_read(tmp_path: Path, protocol: int) -> None:
    arrays = collections.OrderedDict(
        plain=np.arange(6, dtype=np.float32).reshape(2, 3),
        columns=np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        swapped=np.arange(3, dtype=">f4"),
        half=np.ones(2, np.float16),
        flags=np.array([True, False]),
        none=np.zeros((0, 4), np.int64),
        number=np.array(3.5),
    )
    zoo = {"model": arrays, "__author__": "somebody", "score": np.float64(2.5)}
    checkpoint = read(pickled(tmp_path / "zoo.pkl", zoo, protocol))
    assert checkpoint["model"].keys() == arrays.keys() and checkpoint["score"] == 2.5
    for name, array in arrays.items():
        found = checkpoint["model"][name]
        assert found.shape == array.shape and (found == array).all()
        assert found.flags.writeable and found.dtype == array.dtype.newbyteorder("=")
        torch.from_numpy(found)


def test_python_2s_pickles_are_read(tmp_path: Path) -> None:
    # As Python 2 wrote {"blobs": {"w": numpy.array([1, -2], dtype='<f4')}} with protocol 2.
    data = np.array([1, -2], "<f4").tobytes()
    (tmp_path / "old.pkl").write_bytes(
        b"\x80\x02}U\x05blobs}(U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tb"
        b"U\x0aw_momentumK\x01us."
    )
    checkpoint = read(tmp_path / "old.pkl")
    assert checkpoint["model"]["w"].tolist() == [1, -2] and len(checkpoint["model"]) == 1
    assert (checkpoint["__author__"], checkpoint["matching_heuristics"]) == ("Caffe2", True)


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.txt", "a.pt"])
def test_files_mistaken_for_a_checkpoint_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("<!DOCTYPE html>\n<title>404: Not Found</title>\n" + "über " * 100)
    assert "cannot be loaded: the file is text that begins with" in refusal(path)
    assert "'<!DOCTYPE html> <title>404" in refusal(path)
    path.write_bytes(b"")
    assert refusal(path).endswith("the file is empty")
    path.write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF" * 40)
    assert "cannot be loaded: " in refusal(path)
    assert "is text" not in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save_are_read(tmp_path: Path, legacy: bool) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "model": layer.state_dict(),
        "trainer": {"optimizer": optimizer.state_dict(), "steps": collections.Counter({3: 1})},
        "best": np.float64(0.5),
        "array": np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]),
        "class_names": ["a", "b"],
        "parameter": torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)),
    }
    path = tmp_path / "model.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read(path)
    assert all(torch.equal(checkpoint["model"][k], v) for k, v in layer.state_dict().items())
    momenta = checkpoint["trainer"]["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momenta, torch.ones(2, 3)) and checkpoint["best"] == 0.5
    assert checkpoint["trainer"]["steps"] == {3: 1}
    assert checkpoint["array"].tolist() == [[1, 2], [3, 4]] and checkpoint["array"].flags.writeable
    assert type(checkpoint["best"]) is np.float64
    assert read_class_names(str(path)) == ["a", "b"]


def test_bare_weights_and_those_of_pycls_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pth")
    assert read(tmp_path / "bare.pth")["model"]["w"].tolist() == [1, 1]
    state = {"w": torch.ones(2), "bn.num_batches_tracked": torch.ones(1)}
    torch.save({"model_state": state}, tmp_path / "one.pyth")
    checkpoint = read(tmp_path / "one.pyth")
    assert list(checkpoint["model"]) == ["w"] and checkpoint["matching_heuristics"]
    torch.save({"w": torch.ones(2)}, tmp_path / "two.pyth")
    assert "model_state" in refusal(tmp_path / "two.pyth")


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, ending: str) -> None:
    broken = {"fine": [1.0], "nan": [float("nan"), 1.0], "inf": [float("-inf")]}
    path = tmp_path / f"broken.{ending}"
    if ending == "pkl":
        arrays = {name: np.array(values, np.float32) for name, values in broken.items()}
        pickled(path, {"model": arrays, "__author__": "x"})
    else:
        torch.save({"model": {n: torch.tensor(v) for n, v in broken.items()}}, path)
    assert "in 2 of 3 tensors: nan, inf" in refusal(path)


class Reduces:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def ndarray(shape: bytes, data: bytes, dtype: bytes = b"f4") -> bytes:
    """The pickle of {"model": {"w": array}, "__author__": "x"}, with this array."""
    return (
        b"\x80\x02}(X\x05\x00\x00\x00model}X\x01\x00\x00\x00wcnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nX"
        + len(dtype).to_bytes(4, "little")
        + dtype
        + b"\x89\x88\x87R\x89"
        + data
        + b"tbs"
        b"X\x0a\x00\x00\x00__author__X\x01\x00\x00\x00xu."
    )


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"
PICKLES = {
    "a call": (pickle.dumps({"model": Reduces(print, "x")}), "may run code"),
    "a class": (pickle.dumps({"model": Path}), "may run code"),
    "eval, by stack": (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "may run code"),
    "a call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "not callable"),
    "a changed class": (b"\x80\x02cnumpy\ndtype\n}b.", "cannot be loaded"),
    "objects": (ndarray(b"K\x01\x85", b"]K\x01a", b"O8"), "only arrays of numbers"),
    "text": (ndarray(b"K\x01\x85", b"C\x01a", b"S1"), "only arrays of numbers"),
    "a list of dtypes": (ndarray(b"K\x01\x85", b"C\x01a", b"f4,f4"), "only arrays of numbers"),
    "a huge shape": (ndarray(HUGE + b"\x85", b"C\x04aaaa"), "size"),
    "a negative shape": (ndarray(b"J\xff\xff\xff\xff\x85", b"C\x04aaaa"), "TypeError"),
    "a nested shape": (ndarray(b")" + b"2\x86" * 60 + b"\x85", b"C\x04aaaa"), "TypeError"),
    "a long claim": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "cannot be loaded"),
    "a long frame": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f.", "cannot be loaded"),
    "a long bytearray": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.", "cannot be loaded"),
    "a set": (b"\x80\x04\x8f(K\x01\x90.", "expected a dict, got set"),
    "many steps": (b"\x80\x02" + b"N0" * 600_000 + b".", "cannot be loaded"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b".", "cannot be loaded"),
    "a persistent id": (b"\x80\x02K\x01Q.", "persistent"),
    "an extension": (b"\x80\x02\x82\x01.", "unregistered extension"),
    "a list": (b"\x80\x02].", "expected a dict, got list"),
    "nothing": (b"", "the file is empty"),
    "noise": (np.random.default_rng(0).bytes(3000), "cannot be loaded"),
    "a number as weights": (pickle.dumps({"w": 3.0, "v": np.ones(1)}), "'w' is a float"),
}


@pytest.mark.parametrize(("content", "expected"), PICKLES.values(), ids=PICKLES)
def test_a_hostile_pkl_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    assert expected in refusal(path)


def test_an_array_is_restored_only_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.pkl"
    # Then again with the state that the pickle has stored as number 20.
    path.write_bytes(pickle.dumps(np.ones(9), protocol=2)[:-1] + b"h\x14b.")
    assert "restores an array twice" in refusal(path)


class Flagged:
    """Pickled as a dtype whose flags say that it holds references to Python objects."""

    def __reduce__(self) -> Any:
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


def test_a_dtype_cannot_turn_numbers_into_references(tmp_path: Path) -> None:
    class Forged:
        def __reduce__(self) -> Any:
            function, arguments, _ = np.ones(1).__reduce__()
            return function, arguments, (1, (1,), Flagged(), False, np.ones(1).tobytes())

    content = {"model": {"w": Forged()}, "__author__": "x"}
    path = pickled(tmp_path / "forged.pkl", content)
    torch.save(content, tmp_path / "forged.pth")
    for file in (path, tmp_path / "forged.pth"):
        weights = read(file)["model"]["w"]
        assert weights.tolist() == [1.0] and not weights.dtype.hasobject
        assert weights.dtype.flags == np.dtype("f8").flags


def test_arrays_of_the_same_bytes_are_harmless(tmp_path: Path) -> None:
    array = np.zeros(10_000, np.float32)
    function, arguments, state = array.__reduce__()

    class Again:
        def __reduce__(self) -> Any:
            return function, arguments, state  # the pickle holds the bytes once

    content = {"model": {str(number): Again() for number in range(1000)}, "__author__": "x"}
    assert len(read(pickled(tmp_path / "bomb.pkl", content))["model"]) == 1000


def rezipped(path: Path, edit: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """A checkpoint, its data.pkl edited."""
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)
    return path


def test_a_hostile_archive_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pth"
    compressed = read(rezipped(path, lambda c: c, zipfile.ZIP_DEFLATED))
    assert compressed["model"]["w"].shape == (1000,)
    claims = b"builtins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    assert "cannot be loaded" in refusal(rezipped(path, lambda c: b"\x80\x02c" + claims))
    larger = rezipped(path, lambda c: c.replace(b"M\xe8\x03tq", b"J\xe8\x03\x00\x7ftq"))
    assert "cannot be loaded" in refusal(larger)
    torch.save({"model": {"w": torch.zeros(1)}}, path)
    path.write_bytes(path.read_bytes() + b"x")
    assert read(path)["model"]["w"].tolist() == [0]
    torch.save({"model": Reduces(print, "x")}, path)
    assert "may run code" in refusal(path) and "--trust-checkpoint" in refusal(path)
    assert "trust_checkpoint=True" in refusal(path)
    torch.save({"model": Reduces(print, "x")}, path, _use_new_zipfile_serialization=False)
    assert "may run code" in refusal(path)
    path.write_bytes(path.read_bytes()[:40])
    assert "cannot be loaded" in refusal(path)


def test_invalid_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    for state, expected in (
        ({"w": torch.zeros(1), "v": [1.0]}, "'v' is a list"),
        ({"w": torch.zeros(1), "v": None}, "'v' is a NoneType"),
        ({"w": torch.zeros(1), 3: torch.zeros(1)}, "3 is not the name of a tensor"),
        ({"a\nb": torch.zeros(1)}, "is not the name of a tensor"),
        ([torch.zeros(1)], "no tensors"),
        ({}, "no tensors"),
    ):
        torch.save({"model": state}, path)
        assert expected in refusal(path)
    # Views that claim more than the file has take time, but no memory.
    torch.save({"model": {"w": torch.zeros(1).expand(10**9)}}, path)
    assert read(path)["model"]["w"].untyped_storage().nbytes() == 4
    large = torch.zeros(500_000)
    torch.save({"model": {str(number): large for number in range(100)}}, path)
    assert len({value.data_ptr() for value in read(path)["model"].values()}) == 1
    with path.open("wb") as file:
        file.truncate(17 * 2**30)
    assert "cannot be loaded" in refusal(path)


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_a_trusted_file_may_run_code(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"own.{ending}"
    state = Reduces(dict, [("w", torch.ones(1) if ending == "pth" else np.ones(1))])
    content = {"model": state, "__author__": "x"}
    torch.save(content, path) if ending == "pth" else pickled(path, content)
    assert "--trust-checkpoint" in refusal(path)
    assert list(read(path, trusted=True)["model"]) == ["w"]


def nest(kind: type) -> Any:
    """A few nested objects that expand to 2**60."""
    value = kind()
    for _ in range(60):
        value = kind([value, value])
    return value


def test_other_entries_are_not_expanded(tmp_path: Path) -> None:
    path = pickled(tmp_path / "a.pkl", {"model": {"w": np.ones(1)}, "__author__": nest(tuple)})
    assert len(read(path)["__author__"]) == 2
    path = tmp_path / "a.pth"
    for beside in (nest(list), {"a": nest(tuple)}):
        torch.save({"model": {"w": torch.ones(1)}, "trainer": beside}, path)
        assert len(read(path)["trainer"]) == len(beside)
    expanded = torch.zeros(1, dtype=torch.int8).expand(10**11)
    torch.save({"model": {"w": torch.ones(1)}, "trainer": [{"m": expanded}]}, path)
    assert read(path)["trainer"][0]["m"].untyped_storage().nbytes() == 1


def test_class_names_are_strings_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for names, expected in ((["a", "b"], ["a", "b"]), (("a",), ["a"]), (None, []), ([], [])):
        torch.save({"model": {"w": torch.ones(1)}, "class_names": names}, path)
        assert read_class_names(str(path)) == expected
        assert "w" in read(path)["model"]
    wrong = (nest(list), [nest(list)], "ab", {"a": 0}, ["a", 1], torch.ones(2))
    for names in (*wrong, ["x" * 2000], ["a"] * 200_000):
        torch.save({"model": {"w": torch.ones(1)}, "class_names": names}, path)
        assert len(refusal(path)) < 300
        with pytest.raises(UserError, match=path.name):
            read_class_names(str(path))


def test_a_changed_byte_is_found_without_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.full((100,), 3.0), "v": torch.ones(3)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((100,), 3.0).numpy().tobytes()) + 42] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path)


def test_a_second_record_of_the_same_name_is_harmless(tmp_path: Path) -> None:
    path = rezipped(tmp_path / "a.pth", lambda c: c)
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0].replace("data.pkl", "DATA.PKL")
        archive.writestr(name, pickle.dumps({"model": Reduces(print, "x")}, protocol=2))
    try:
        assert read(path)["model"]["w"].shape == (1000,)
    except UserError as error:
        assert "may run code" in str(error)


def test_a_script_is_refused_in_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = rezipped(tmp_path / "a.pth", lambda c: c)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", b"")
    assert "TorchScript" in refusal(path)
    assert not recwarn.list


def test_unexpected_parameters_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(2, 2)
    extra = {f"mask_head.{number}.weight": torch.ones(1) for number in range(9)}
    torch.save({"model": {**model.state_dict(), **extra}}, tmp_path / "more.pth")
    Checkpointer(model, strict=True).load(str(tmp_path / "more.pth"))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.message.endswith(
        "more.pth' have 9 parameters that this model does not have: mask_head.0.weight, "
        "mask_head.1.weight, mask_head.2.weight and 6 more"
    )
