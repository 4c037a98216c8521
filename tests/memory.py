"""The memory of a process of its own, measured from inside it; for Linux."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# glibc otherwise keeps what is freed, in amounts that depend on the order of the calls.
RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

linux_only = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="/proc does not tell of memory here"
)


def resident(name: str = "VmRSS") -> float:
    """MiB in memory now, or with "VmHWM" at most since the process began or ``forget_peak()``."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0]) / 1024


def forget_peak() -> None:
    """Makes the peak begin anew at what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def extra(function: Callable[[], object]) -> float:
    """MiB that a call takes at its peak, with its result, beyond what was in memory."""
    forget_peak()
    before = resident()
    result = function()
    peak = resident("VmHWM")
    del result
    return peak - before


def run_alone(script: str, *arguments: str) -> str:
    """What a Python script prints in a process of its own, which may import ``tests.memory``."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=os.environ | RETURN_WHAT_IS_FREED | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
