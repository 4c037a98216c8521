"""Two runs do not share an OUTPUT_DIR, and a run that has ended does not block it."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus.engine import lock, main
from mask_rcnn_plus.errors import UserError

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="no file locks here")


@pytest.fixture(autouse=True)
def _unlocked() -> Iterator[None]:
    yield
    lock.release()


def other_process(folder: Path) -> tuple[int, int]:
    """Starts a process that locks a folder; returns its id, and a pipe that ends it when closed."""
    ready, told = os.pipe()
    end, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        lock.acquire(str(folder))
        os.write(told, b".")
        os.read(end, 1)
        os._exit(0)
    os.read(ready, 1)
    return pid, hold


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    pid, hold = other_process(tmp_path)
    with pytest.raises(UserError, match=rf"OUTPUT_DIR '{tmp_path}' is in use by process {pid} on"):
        lock.acquire(str(tmp_path))
    os.close(hold)
    os.waitpid(pid, 0)
    lock.acquire(str(tmp_path))
    lock.release()
    pid, hold = other_process(tmp_path)  # fails if the folder is still locked
    os.close(hold)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_a_killed_process_holds_no_lock_even_if_its_workers_live_on(tmp_path: Path) -> None:
    ready, told = os.pipe()
    end, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock.acquire(str(tmp_path))
        if os.fork() == 0:  # as a loader worker, which inherits all open files
            os.close(hold)
            os.write(told, b".")
            os.read(end, 1)
            os._exit(0)
        signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock.acquire(str(tmp_path))
    os.close(hold)


def test_a_second_thread_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    lock.acquire(str(tmp_path))
    lock.acquire(str(tmp_path))  # again in the same thread
    assert "the thread 'MainThread'" in in_thread(lambda: lock.acquire(str(tmp_path)))
    lock.release()
    assert in_thread(lambda: lock.acquire(str(tmp_path))) == ""
    lock.acquire(str(tmp_path))  # that thread has ended


def in_thread(act: Callable[[], Any]) -> str:
    errors = []

    def run() -> None:
        try:
            act()
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return "".join(errors)


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    lock.acquire(str(tmp_path))
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("option", ["--eval-only", "--resume"])
def test_a_run_beside_another_is_refused_before_it_writes(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    pid, hold = other_process(folder)
    assert main(["--config-file", str(tiny_config), option]) == 2
    assert f"is in use by process {pid}" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"]
    os.close(hold)
    os.waitpid(pid, 0)
