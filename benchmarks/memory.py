"""The most memory that a call takes."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call takes at its peak beyond what was in use.

    On CUDA what PyTorch allocates; on the CPU resident memory, after what was freed before has gone
    back to the system. None where the system does not tell (it is Linux that does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except (OSError, AttributeError, IndexError):
        return None


def _resident(name: str) -> float:
    found = re.findall(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[0]) / 1024
