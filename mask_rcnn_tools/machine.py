"""The machine's hardware and free resources, using only the standard library."""

import os
import platform
import shutil
from pathlib import Path


def cpu_model() -> str:
    """The processor's name."""
    # On most Linux systems platform.processor() returns only the architecture.
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The number of cores that a container's limit allows; None without a limit."""
    fields = " ".join(_lines("/sys/fs/cgroup/cpu.max")).split()  # "<quota or max> <period>"
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[0]) / int(fields[1])
    return None


def instruction_sets() -> list[str]:
    """The x86 extensions of this processor that the operators have code for."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            flags = line.split()
            return [name for name in ("avx2", "fma", "avx512f", "avx512bw") if name in flags]
    return []


def load() -> float | None:
    """The load average of the last minute; None if unknown."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def memory() -> dict[str, int]:
    """ "total" and "available" memory in bytes, within a container's limit; {} if unknown."""
    sizes = {}
    for line in _lines("/proc/meminfo"):
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            sizes[name.removeprefix("Mem").lower()] = int(value.split()[0]) * 1024
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")).strip()
    used = "".join(_lines("/sys/fs/cgroup/memory.current")).strip()
    if sizes.keys() == {"total", "available"} and limit.isdigit() and used.isdigit():
        sizes["total"] = min(sizes["total"], int(limit))
        sizes["available"] = min(sizes["available"], max(int(limit) - int(used), 0))
    return sizes


def free_space(folder: Path) -> int | None:
    """Free bytes on the disk of a folder that may not exist yet; None if unknown."""
    path = folder.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def nvidia_driver() -> str:
    """The version of the NVIDIA driver; "" without one."""
    for line in _lines("/proc/driver/nvidia/version"):
        if line.startswith("NVRM"):
            fields = line.split("Kernel Module", 1)[-1].replace("for x86_64", "").split()
            return fields[0] if fields else "unknown"
    return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
