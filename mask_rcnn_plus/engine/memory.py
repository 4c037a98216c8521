"""Returns freed memory to the operating system during a training."""

import ctypes
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase

_PERIOD = 20


class FreedMemory(HookBase):
    """Returns the memory that a step has freed, every 20 iterations.

    Features and RoIs of changing sizes leave gaps in the heap. glibc keeps them, and they grow to
    hundreds of MiB. Elsewhere this does nothing.
    """

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % _PERIOD == 0:
            _trim(0)


def _find_trim() -> Callable[[int], Any]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; no such library; Windows
        return lambda keep: None


_trim = _find_trim()
