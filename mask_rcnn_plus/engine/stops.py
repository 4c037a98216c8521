"""Ends a run between two steps: on a signal, or because one of its processes must end."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

# The exit code of a diverged run. A signal's exit code is 128 + its number: 129, 130 or 143.
DIVERGED = 3
# The terminal is gone. Windows does not have it.
_HANGUP = getattr(signal, "SIGHUP", None)


class Interrupt(SystemExit):
    """Ends this process with an exit code, while its state is consistent."""


class StopSignals:
    """Records SIGINT, SIGTERM and SIGHUP, and lets all processes of a run stop at the same step.

    The first signal requests a stop, the second ends the process at once. SIGHUP does not count as
    a second one, because a closing terminal may send it twice, and a logout SIGTERM as well.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        """The exit code that the received signal requests; 0 without a signal."""
        self._at_once = False
        self._requests = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records signals inside; afterwards restores the previous handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:  # as nohup sets it
            numbers.append(_HANGUP)
        handlers = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupt instead of waiting for the end of a step.

        With several processes it waits, because the others would wait for this one.
        """
        if comm.get_world_size() > 1:
            yield
            return
        self._at_once = True
        try:
            if self.exit_code:
                raise Interrupt(self.exit_code)
            yield
        finally:
            self._at_once = False

    def agree(self, exit_code: int) -> int:
        """The largest exit code of all processes, 0 to continue; every process must call it."""
        if comm.get_world_size() == 1:
            return exit_code
        largest = torch.tensor([exit_code])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        return int(largest)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._requests += number != _HANGUP
        if self._requests > 1:
            os._exit(128 + number)
        if self.exit_code:
            return
        self.exit_code = 128 + number
        if comm.get_local_rank() == 0:
            # Not print(): the signal may have interrupted a print(). The terminal may be gone.
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: stopping after this step; repeat it to stop now\n".encode())
        if self._at_once:
            raise Interrupt(self.exit_code)
