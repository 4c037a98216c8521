"""Signals in and from the worker processes of a data loader."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _WorkerDeaths:
    """Delays torch's error about a dead worker until this process waits for a batch.

    torch raises it from a signal handler, for example in the middle of an optimizer step, and the
    half-updated state could not be saved. Signals only reach the main thread: a loader of another
    thread reports the death of a worker when its timeout has passed.
    """

    def __init__(self) -> None:
        self._torch_handler: Callable[[int, Any], Any] | None = None
        self._waiting = False
        self._pending = False

    def install(self) -> None:
        """Replaces torch's signal handler, which exists once a loader has started its workers."""
        if not _in_main_thread():  # Python sets and runs signal handlers only there
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and getattr(handler, "__module__", "").startswith("torch.utils.data"):
            self._torch_handler = handler
            signal.signal(signal.SIGCHLD, self._on_signal)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block, a worker's death raises a RuntimeError, even if it died earlier."""
        if not _in_main_thread():
            yield
            return
        self._waiting = True
        try:
            if self._pending:
                self._pending = False
                self._raise(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._pending = True
        if self._waiting:
            self._raise(signum, frame)

    def _raise(self, signum: int, frame: Any) -> None:
        if self._torch_handler is not None:
            self._torch_handler(signum, frame)


worker_deaths = _WorkerDeaths()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def ignore_interrupts(worker: int) -> None:
    """Makes a worker ignore the signals that a terminal also sends to the workers of a run."""
    for name in ("SIGINT", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
