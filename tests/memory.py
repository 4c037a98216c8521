"""Measures the memory of a separate process from inside it, on Linux."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Otherwise glibc keeps freed memory, in amounts that depend on the order of the calls.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

linux_only = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)


def resident(name: str = "VmRSS") -> float:
    """Resident memory in MiB; with "VmHWM" the peak since the start or ``forget_peak()``."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0]) / 1024


def forget_peak() -> None:
    """Resets the peak to the current memory."""
    Path("/proc/self/clear_refs").write_text("5")


def extra(function: Callable[[], object]) -> float:
    """The peak of a call's additional memory in MiB, including its result."""
    forget_peak()
    before = resident()
    result = function()
    peak = resident("VmHWM")
    del result
    return peak - before


def run_alone(script: str, *arguments: str) -> str:
    """Runs a Python script in a separate process; returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=os.environ | RETURN_FREED_MEMORY | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
