"""Keeps the memory of a training process from growing."""

import ctypes
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase

_PERIOD = 5
_VALUES = 10_000


class FreedMemory(HookBase):
    """Every 5 iterations, returns freed memory to the operating system, and forgets old metrics.

    Features and RoIs of changing sizes leave gaps in the heap. glibc keeps them, and they grow to
    hundreds of MiB. detectron2 also keeps every value of every metric, 2 KB per iteration; the last
    10,000 of each are enough for its means and medians, and metrics.json has them all.
    """

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % _PERIOD == 0:
            for history in self.trainer.storage.histories().values():
                del history.values()[:-_VALUES]
            _trim(0)


def _find_trim() -> Callable[[int], Any]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; no such library; Windows
        return lambda keep: None


_trim = _find_trim()
