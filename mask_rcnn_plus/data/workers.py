"""What loader processes do with signals, and when this one hears of their death."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Deaths:
    """torch's error about a dead worker, put off until somebody waits for a batch.

    torch raises it from a signal handler wherever this process happens to be: halfway through an
    optimiser's step, for instance, where no state is left that could be saved.
    """

    def __init__(self) -> None:
        self._raise: Callable[[int, Any], Any] | None = None
        self._waiting = False
        self._noted = False

    def take_over(self) -> None:
        """Takes the place of torch's handler; to be called when a loader has started workers."""
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and getattr(handler, "__module__", "").startswith("torch.utils.data"):
            self._raise = handler
            signal.signal(signal.SIGCHLD, self._note)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within, the death of a worker, also one from before, is a RuntimeError."""
        self._waiting = True
        try:
            if self._noted:
                self._noted = False
                if self._raise is not None:
                    self._raise(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    def _note(self, signum: int, frame: Any) -> None:
        self._noted = True
        if self._waiting and self._raise is not None:
            self._raise(signum, frame)


deaths = _Deaths()


def ignore_interrupts(worker: int) -> None:
    """Makes a worker outlive Ctrl-C, which a terminal sends to it as well as to the run.

    Args:
        worker: its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
