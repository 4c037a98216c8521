"""What the machine is and has left, by the standard library alone."""

import os
import platform
import shutil
from pathlib import Path


def cpu_model() -> str:
    """The processor's name."""
    # platform.processor() knows no more than the architecture on most Linux systems.
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """How many cores' time a container allows; None without a limit."""
    words = " ".join(_lines("/sys/fs/cgroup/cpu.max")).split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        return int(words[0]) / int(words[1])
    return None


def instruction_sets() -> list[str]:
    """Those of x86 that the operators are compiled for."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            flags = line.split()
            return [name for name in ("avx2", "fma", "avx512f", "avx512bw") if name in flags]
    return []


def load() -> float | None:
    """How many processes wanted to run in the last minute; None where it is not told."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def memory() -> dict[str, int]:
    """ "total" and "available" in bytes, less where a container allows less; {} if unknown."""
    sizes = {}
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            sizes[{"MemTotal": "total", "MemAvailable": "available"}[name]] = (
                int(rest.split()[0]) * 1024
            )
    limit = "".join(_lines("/sys/fs/cgroup/memory.max")).strip()
    used = "".join(_lines("/sys/fs/cgroup/memory.current")).strip()
    if sizes.keys() == {"total", "available"} and limit.isdigit() and used.isdigit():
        sizes["total"] = min(sizes["total"], int(limit))
        sizes["available"] = min(sizes["available"], max(int(limit) - int(used), 0))
    return sizes


def nearest_folder(path: Path) -> Path:
    """The folder itself, or what there is of the way to it."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def free_space(path: Path) -> int | None:
    """Bytes that may be written where a folder is or would be; None where it cannot be told."""
    try:
        return shutil.disk_usage(nearest_folder(path)).free
    except OSError:
        return None


def nvidia_driver() -> str:
    """The version of the kernel's driver for NVIDIA GPUs; "" without one."""
    for line in _lines("/proc/driver/nvidia/version"):
        if line.startswith("NVRM"):
            words = line.split("Kernel Module", 1)[-1].replace("for x86_64", "").split()
            return words[0] if words else "unknown"
    return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
