"""The files of the generated shapes: reproducible bytes, and when a folder is replaced."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus.data import (
    generate_shapes,
    register_folder_datasets,
    shapes,
)
from mask_rcnn_plus.errors import UserError

TINY: dict[str, Any] = {"num_train": 3, "num_val": 2, "image_size": (48, 64), "progress": False}


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The same seed, the same bytes.


def test_an_image_depends_only_on_seed_split_and_index(tmp_path: Path) -> None:
    few, many, other = tmp_path / "few", tmp_path / "many", tmp_path / "other"
    generate_shapes(few, **TINY)
    generate_shapes(many, **{**TINY, "num_train": 6, "num_val": 4})
    generate_shapes(other, **TINY, seed=1)
    images = {root: digest(root / "shapes" / "images") for root in (few, many, other)}
    assert images[few].items() <= images[many].items()
    assert len(set(images[many].values())) == 10
    assert not set(images[few].values()) & set(images[other].values())
    first = json.loads((few / "shapes" / "train.json").read_text())["annotations"]
    assert (
        first
        == json.loads((many / "shapes" / "train.json").read_text())["annotations"][: len(first)]
    )


def test_processes_that_start_at_once_write_one_set(tmp_path: Path) -> None:
    # Only this module, because importing detectron2 would take most of the time.
    program = """if True:
        import pathlib, sys, types
        for name, path in (("mask_rcnn_plus", sys.argv[1]), ("mask_rcnn_plus.data", sys.argv[2])):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
        from mask_rcnn_plus.data.shapes import generate_shapes
        generate_shapes(pathlib.Path(sys.argv[3]), num_train=30, num_val=10)
    """
    data = Path(shapes.__file__).parent
    together = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, (data.parent, data, tmp_path / "together"))],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE,
        )
        for seed in (1, 2)
    ]
    generate_shapes(tmp_path / "alone", num_train=30, num_val=10, progress=False)
    for process in together:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert b"drawing" not in errors
    expected = digest(tmp_path / "alone" / "shapes")
    assert len(expected) == 42
    assert digest(tmp_path / "together" / "shapes") == expected
    assert visible(tmp_path / "together") == ["shapes"]


def test_a_process_that_waited_uses_the_existing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wait_for_another(path: str) -> Iterator[None]:
        monkeypatch.undo()
        generate_shapes(tmp_path, **TINY)
        monkeypatch.setattr(shapes, "draw_image", None)  # drawing again would fail
        yield

    monkeypatch.setattr(shapes, "file_lock", wait_for_another)
    generate_shapes(tmp_path, **TINY)
    assert visible(tmp_path) == ["shapes"]


# The folder.


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".shapes.lock")


def test_existing_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_shapes(tmp_path, **TINY)
    monkeypatch.setattr(shapes, "draw_image", None)  # drawing would fail
    assert generate_shapes(tmp_path, **TINY) == ["shapes_train", "shapes_val"]


@pytest.mark.parametrize(
    "change",
    [
        {"num_val": 3},
        {"mask_format": "rle"},
        {"seed": 5},
        {"image_size": (48, 48)},
        {"frequencies": (1, 1, 0.1)},
    ],
)
def test_other_arguments_replace_the_files(tmp_path: Path, change: dict[str, Any]) -> None:
    generate_shapes(tmp_path / "changed", **TINY)
    (tmp_path / "changed" / "shapes" / ".DS_Store").touch()
    generate_shapes(tmp_path / "changed", **{**TINY, **change})
    generate_shapes(tmp_path / "fresh", **{**TINY, **change})
    assert digest(tmp_path / "changed") == digest(tmp_path / "fresh")
    assert visible(tmp_path / "changed") == ["shapes"]


def test_frequencies_make_a_class_rare(tmp_path: Path) -> None:
    generate_shapes(tmp_path, **{**TINY, "num_train": 100}, frequencies=(2, 6, 0.4))
    annotations = json.loads((tmp_path / "shapes" / "train.json").read_text())["annotations"]
    counts = [sum(a["category_id"] == kind for a in annotations) for kind in (1, 2, 3)]
    expected = [share * len(annotations) for share in (2 / 8.4, 6 / 8.4, 0.4 / 8.4)]
    # Within four standard deviations of independent draws.
    for count, mean in zip(counts, expected, strict=True):
        assert abs(count - mean) < 4 * mean**0.5, counts


def test_equal_frequencies_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_shapes(tmp_path, **TINY)
    monkeypatch.setattr(shapes, "draw_image", None)  # drawing again would fail
    generate_shapes(tmp_path, **TINY, frequencies=(3.0, 3.0, 3.0))


@pytest.mark.parametrize("lost", ["images/train_000001.png", "val.json"])
def test_an_incomplete_folder_is_replaced(tmp_path: Path, lost: str) -> None:
    generate_shapes(tmp_path, **TINY)
    before = digest(tmp_path)
    (tmp_path / "shapes" / lost).unlink()
    generate_shapes(tmp_path, **TINY)
    assert digest(tmp_path) == before


def test_a_folder_of_an_older_generator_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "_VERSION", 0)
    generate_shapes(tmp_path, **TINY)
    before = digest(tmp_path)
    monkeypatch.undo()
    generate_shapes(tmp_path, **TINY)
    assert digest(tmp_path) != before


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    generate_shapes(tmp_path, **TINY)
    assert len(digest(tmp_path / "shapes")) == 7


@pytest.mark.parametrize(
    ("foreign", "content", "says"),
    [
        ("train.json", '{"images": []}', "not the generator's"),
        ("train.json", '{"info":{"generator":"x"},"images":[]}', "not the generator's"),
        ("train.json", '{"info":3}', "not the generator's"),
        ("train.json", "\udcff\udcfe", "not the generator's"),
        ("holiday.jpg", "", "it contains 'holiday.jpg'"),
        ("images/train_000000.png", "", "not the generator's"),
    ],
)
def test_a_folder_with_other_files_is_not_changed(
    tmp_path: Path, foreign: str, content: str, says: str
) -> None:
    path = tmp_path / "shapes" / foreign
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode(errors="surrogateescape"))
    before = digest(tmp_path)
    message = message_of(lambda: generate_shapes(tmp_path, **TINY))
    assert str(tmp_path / "shapes") in message
    assert says in message
    assert digest(tmp_path) == before


@pytest.mark.parametrize("added", ["test.json", "images/mine.png"])
def test_files_added_by_the_user_are_not_deleted(tmp_path: Path, added: str) -> None:
    generate_shapes(tmp_path, **TINY)
    (tmp_path / "shapes" / added).write_text("{}")
    before = digest(tmp_path)
    message = message_of(lambda: generate_shapes(tmp_path, **TINY, seed=1))
    assert f"it contains '{Path(added).name}'" in message
    assert digest(tmp_path) == before


@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_run_leaves_no_partial_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        generate_shapes(tmp_path, **TINY)
    before = digest(tmp_path)
    real, calls = shapes.draw_image, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path, **TINY, seed=1)
    assert len(calls) == 4
    assert visible(tmp_path) == (["shapes"] if existing else [])
    assert {k: v for k, v in digest(tmp_path).items() if k != ".shapes.lock"} == {
        k: v for k, v in before.items() if k != ".shapes.lock"
    }


def test_the_old_files_survive_a_failed_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_shapes(tmp_path, **TINY)
    before = digest(tmp_path)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".shapes.new":
            raise OSError(16, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert "busy" in message_of(lambda: generate_shapes(tmp_path, **TINY, seed=1))
    assert digest(tmp_path) == before


def test_the_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".shapes.new", ".shapes.old"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "train_000000.png").touch()
    assert not [name for name in register_folder_datasets(tmp_path) if "shapes" in name]
    generate_shapes(tmp_path, **TINY)
    assert visible(tmp_path) == ["shapes"]
    assert len(digest(tmp_path / "shapes")) == 7


def test_a_root_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = message_of(lambda: generate_shapes(tmp_path / "file" / "root", **TINY))
    assert "cannot write the generated data set" in message
    assert "DETECTRON2_DATASETS" in message


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in message_of(lambda: generate_shapes(tmp_path, **TINY))
    assert visible(tmp_path) == []


def test_the_progress_bar_is_shown_only_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    options = {key: value for key, value in TINY.items() if key != "progress"}
    for seed, (stream, progress, shows) in enumerate(
        [(Terminal(), True, True), (io.StringIO(), True, False), (Terminal(), False, False)]
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        generate_shapes(tmp_path, **options, seed=seed, progress=progress)
        assert ("drawing shapes" in stream.getvalue()) == shows


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mask_format": "polygons"}, "mask_format is 'polygons'"),
        ({"mask_format": 3}, "expected 'polygon' or 'rle'"),
        ({"image_size": (31, 64)}, "image_size is (31, 64)"),
        ({"image_size": (64,)}, "image_size is (64,)"),
        ({"image_size": 64}, "image_size is 64"),
        ({"image_size": (64.0, 64.0)}, "image_size is (64.0, 64.0)"),
        ({"num_train": -1}, "num_train is -1"),
        ({"num_val": 0}, "num_val is 0"),
        ({"num_val": "7"}, "num_val is '7'"),
        ({"seed": -3}, "seed is -3"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"frequencies": (1, 1)}, "frequencies is (1, 1)"),
        ({"frequencies": (1, 1, 0)}, "above 0 for each of ('circle', 'square', 'triangle')"),
        ({"frequencies": (1, 1, "x")}, "frequencies is"),
        ({"frequencies": 1}, "frequencies is 1"),
        ({"name": "../up"}, "name is '../up'"),
        ({"name": ""}, "name is ''"),
        ({"name": ".hidden"}, "name is '.hidden'"),
    ],
)
def test_invalid_arguments(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    assert says in message_of(lambda: generate_shapes(tmp_path, **{**TINY, **wrong}))
    assert visible(tmp_path) == []
