"""Ending a run between two steps: on a signal, or because one of its processes has to."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

# The exit codes of a run beside 0 and UserError's; a signal's is 128 + its number: 130 and 143.
DIVERGED = 3


class Leave(SystemExit):
    """Ends this process with an exit code when its weights are those of a whole step."""


class Stops:
    """Notes SIGINT and SIGTERM, and lets all processes of a run stop at the same step.

    The first signal asks for a stop, the second ends the process at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The number of the signal that came, 0 as long as none did."""
        self._at_once = False

    @property
    def code(self) -> int:
        """The exit code that a signal asks for, 0 for none."""
        return 128 + self.signal if self.signal else 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the signals are noted; afterwards they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal leaves without waiting for the next step: between steps, that is.

        With several processes it waits after all, since the others would wait for this one.
        """
        if comm.get_world_size() > 1:
            yield
            return
        self._at_once = True
        try:
            if self.code:
                raise Leave(self.code)
            yield
        finally:
            self._at_once = False

    def agree(self, code: int) -> int:
        """The largest exit code that any process has; every process must call it.

        Args:
            code: this process's own, 0 to go on.
        """
        if comm.get_world_size() == 1:
            return code
        largest = torch.tensor([code])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return int(largest)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if comm.get_local_rank() == 0:
            # print() might be what the signal interrupted.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: ending after this step; once more to end at once\n".encode())
        if self._at_once:
            raise Leave(self.code)
