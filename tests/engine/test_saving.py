"""At any moment a checkpoint is the old one or the new one, and its digest proves it."""

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.weights import non_finite


class Killed(BaseException):
    """Simulates the end of the process: no handler of the saving code may catch it."""


def state(number: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((3000,), float(number))}, "iteration": number}


def put(folder: Path, number: int, name: str = "model") -> None:
    saving.save(state(number), folder / f"{name}.pth")
    saving.point_to(folder / f"{name}.pth")


def resumed(folder: Path) -> int:
    """The number of the state from which a resumed run would continue."""
    path = next(path for path in saving.candidates(folder) if not saving.damage(path))
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["model"]["weight"], state(loaded["iteration"])["model"]["weight"])
    return loaded["iteration"]


class Saboteur:
    """Counts the operations on files and makes one of them fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self.at = -1
        self.count = 0
        outer = self

        class File:
            def __init__(self, file: Any) -> None:
                self._file = file

            def write(self, data: Any) -> int:
                outer.step(lambda: self._file.write(data[: len(data) // 2]))
                return self._file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def __enter__(self) -> "File":
                return self

            def __exit__(self, *error: object) -> None:
                self._file.close()

        plain_open, plain_replace = Path.open, Path.replace
        plain_sync = os.fsync

        def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = plain_open(path, mode, *args, **options)
            return File(file) if "w" in mode else file

        def replacing(path: Path, target: Path) -> Path:
            outer.step()
            return plain_replace(path, target)

        def syncing(descriptor: int) -> None:
            outer.step()
            plain_sync(descriptor)

        patch.setattr(Path, "open", opening)
        patch.setattr(Path, "replace", replacing)
        patch.setattr(saving.os, "fsync", syncing)

    def step(self, halfway: Any = None) -> None:
        self.count += 1
        if self.count == self.at and self.error is not None:
            if halfway is not None:
                halfway()
            raise self.error


@pytest.mark.parametrize("same_name", [True, False])
@pytest.mark.parametrize("end", ["full", "killed"])
def test_a_whole_checkpoint_survives_each_failing_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_name: bool, end: str
) -> None:
    name = "model" if same_name else "other"
    with monkeypatch.context() as patch:
        counter = Saboteur(patch)
        put(tmp_path, 1, name)
        operations = counter.count
    shutil.rmtree(tmp_path)
    assert operations > 15
    survivors = []
    for at in range(1, operations + 1):
        folder = tmp_path / str(at)
        folder.mkdir(parents=True)
        put(folder, 1)
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch)
            saboteur.at = at
            saboteur.error = OSError(errno.ENOSPC, "No space left on device")
            if end == "killed":
                saboteur.error = Killed()
            # torch's C++ code turns some errors into a RuntimeError.
            with pytest.raises((saving.SaveError, Killed, RuntimeError)) as failure:
                put(folder, 2, name)
        survivors.append(resumed(folder))
        if end == "full":
            assert "No space left on device" in str(failure.value)
            assert "intact" in str(failure.value)
            assert not list(folder.glob("*.part"))
        saving.clean(folder)
        assert not list(folder.glob("*.part"))
        put(folder, 3, name)
        assert resumed(folder) == 3
    assert survivors == sorted(survivors) and set(survivors) == {1, 2}


def test_a_flipped_bit_or_a_cut_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    put(tmp_path, 1)
    assert saving.damage(path) == ""
    assert "SHA-256" in (saving.damage(_flipped(path)))
    put(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    assert "SHA-256" in saving.damage(path)
    path.unlink()
    assert saving.damage(path) == "is missing"
    # Other files have no digest; an unreadable one is detected all the same.
    foreign = tmp_path / "foreign.pth"
    torch.save(state(1), foreign)
    assert saving.damage(foreign) == ""
    foreign.write_bytes(foreign.read_bytes()[:500])
    assert "cannot be read" in saving.damage(foreign)


def _flipped(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_sha256sum_reads_the_digest_file(tmp_path: Path) -> None:
    put(tmp_path, 1)
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    command = ["sha256sum", "-c", "model.pth.sha256"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0


def test_the_newest_periodic_the_final_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    # From an earlier run in the same folder, with a higher number.
    put(tmp_path, 0, "model_0000999")
    for number in (9, 19, 29, 39):
        put(tmp_path, number, f"model_{number:07d}")
        saving.prune(tmp_path, 2)
    for name in ("model_best", "model_final"):
        put(tmp_path, 40, name)
    saving.prune(tmp_path, 2)
    names = {path.name for path in tmp_path.glob("*.pth")}
    expected = {"model_0000029", "model_0000039", "model_best", "model_final"}
    assert names == {f"{name}.pth" for name in expected}
    assert {p.name for p in tmp_path.glob("*.sha256")} == {f"{name}.sha256" for name in names}
    saving.prune(tmp_path, 0)
    assert len(list(tmp_path.glob("*.pth"))) == 4


def test_candidates_begin_with_the_pointer_then_the_newest(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        put(tmp_path, number, f"model_{number:07d}")
    saving.point_to(tmp_path / "model_0000002.pth")
    torch.save(state(9), tmp_path / "download.pth")
    assert [path.stem[-1] for path in saving.candidates(tmp_path)] == ["2", "3", "1"]
    (tmp_path / "last_checkpoint").unlink()
    assert [path.stem[-1] for path in saving.candidates(tmp_path)] == ["3", "2", "1"]
    # A file without a digest counts only if the pointer names it: it may be a download.
    (tmp_path / "last_checkpoint").write_text("download.pth")
    assert [path.stem[-1] for path in saving.candidates(tmp_path)] == ["d", "3", "2", "1"]


def test_a_full_file_system_keeps_the_last_checkpoint(tmpfs: Path) -> None:
    put(tmpfs, 1, "model_0000001")
    put(tmpfs, 2, "model_0000002")
    with pytest.raises(saving.SaveError, match=r"No space left.*model_0000002\.pth, is intact"):
        for number in range(3, 6):
            saving.save(
                {"model": {"weight": torch.zeros(10**6)}, "iteration": number},
                tmpfs / f"model_{number:07d}.pth",
            )
    assert resumed(tmpfs) == 2 and not list(tmpfs.glob("*.part"))


def test_a_read_only_file_system_keeps_the_last_checkpoint(tmpfs: Path) -> None:
    put(tmpfs, 1)
    remount = ["mount", "-o", "remount,ro", str(tmpfs)]
    subprocess.run(remount, check=True)
    with pytest.raises(saving.SaveError, match=r"Read-only file system.*is intact"):
        put(tmpfs, 2)
    assert resumed(tmpfs) == 1


def test_a_folder_that_vanished_or_became_a_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(saving.SaveError, match=r"run/model\.pth': No such file"):
        put(folder, 1)
    folder.write_text("")
    with pytest.raises(saving.SaveError, match=r"run/model\.pth': Not a directory"):
        put(folder, 1)


def test_non_finite_weights_are_named() -> None:
    large = torch.full((10,), 3e38)
    assert list(non_finite({"a": large, "b": torch.arange(3), "c": None})) == []
    assert list(non_finite({"a": large, "b": torch.tensor([1, float("nan")])})) == ["b"]
    assert list(non_finite({"a": torch.tensor([-float("inf")])})) == ["a"]


def test_a_hostile_checkpoint_in_the_folder_of_a_run_is_not_run(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "witness"),)

    torch.save({"trainer": {"data": {"seed": 1, "x": Call()}}}, tmp_path / "a.pth")
    (tmp_path / "last_checkpoint").write_text("a.pth")
    assert "may run code" in saving.damage(tmp_path / "a.pth")
    assert saving.read_seed(tmp_path) is None
    (tmp_path / "a.pth.sha256").write_text("0" * 64)
    assert "SHA-256" in saving.damage(tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("pointer", ["../other/a.pth", b"\xff\x00", b"\n" * 10**6 + b"a.pth", "."])
def test_the_pointer_cannot_leave_the_folder(tmp_path: Path, pointer: Any) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    for where in (folder, other):
        where.mkdir()
    put(other, 1, "a")
    put(folder, 2, "b")
    (folder / "last_checkpoint").write_bytes(
        pointer if isinstance(pointer, bytes) else pointer.encode()
    )
    assert resumed(folder) == 2
    assert all(path.parent == folder for path in saving.candidates(folder))


def test_a_digest_file_that_is_a_pipe_or_endless_does_not_block(tmp_path: Path) -> None:
    put(tmp_path, 1)
    digest = tmp_path / "model.pth.sha256"
    with digest.open("a") as file:
        file.truncate(2**40)
    assert saving.damage(tmp_path / "model.pth") == ""
    digest.unlink()
    os.mkfifo(digest)
    assert saving.damage(tmp_path / "model.pth") == ""


def test_a_disk_that_changes_data_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    sync = saving.to_disk

    def corrupt(file: Any) -> None:
        sync(file)
        if file.name.endswith(".pth.part"):
            with Path(file.name).open("r+b") as again:
                again.seek(100)
                again.write(b"x")

    monkeypatch.setattr(saving, "to_disk", corrupt)
    with pytest.raises(saving.SaveError, match="reads back differently"):
        put(tmp_path, 2)
    assert resumed(tmp_path) == 1 and not list(tmp_path.glob("*.part"))
