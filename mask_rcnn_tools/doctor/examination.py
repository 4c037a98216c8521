"""Runs the probes in processes that may end, and gathers what they and the machine say."""

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mask_rcnn_tools import machine
from mask_rcnn_tools.doctor.probes import ORDER, version

_ROOT = Path(__file__).parents[2]
_PATIENCE = 180.0  # seconds for a probe, on a machine whose disk is slow and whose cores are taken
_VARIABLES = (
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "DETECTRON2_DATASETS", "KMP_BLOCKTIME", "LD_PRELOAD"),
    *("MASK_RCNN_PLUS_CACHE", "MASK_RCNN_PLUS_CPU_ISA", "MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "TORCH_CUDA_ARCH_LIST",
)
# The package's real import is a probe; till then one that imports nothing stands in its place.
_CHILD = """
import json, sys, types
path, folder, names = json.loads(sys.argv[1])
sys.path[:] = path
package = types.ModuleType("mask_rcnn_plus")
package.__path__ = [folder]
sys.modules["mask_rcnn_plus"] = package
from mask_rcnn_tools.doctor import probes
probes.run(names)
"""


def look_at_machine(output: Path) -> dict[str, Any]:
    """Hardware, memory, disks and environment, by the standard library alone.

    Args:
        output: OUTPUT_DIR of a run.
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": machine.cpu_model(),
        "cores": machine.usable_cpus(),
        "quota": machine.cpu_quota(),
        "load": machine.load(),
        "instruction sets": machine.instruction_sets(),
        "memory": machine.memory(),
        "shm": machine.free_space(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        "driver": machine.nvidia_driver(),
        "output": {
            "folder": str(output.absolute()),
            "free": machine.free_space(output),
            "writable": _takes_files(output),
        },
        "datasets": {
            "folder": str(root.absolute()),
            "exists": root.is_dir(),
            "free": machine.free_space(root),
            "variable": "DETECTRON2_DATASETS" in os.environ,
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _takes_files(folder: Path) -> bool:
    """Whether files could be made in a folder, or it itself; permissions alone do not tell root."""
    path = folder.absolute()
    try:
        there = next(one for one in (path, *path.parents) if one.exists())
        # Which has no name where the file system can do so, and none for long where it cannot.
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        return False
    return True


def look_at_python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "mask-rcnn-plus": version("mask-rcnn-plus") or "not installed, a source tree",
        "folder": str(_ROOT / "mask_rcnn_plus"),
    }


def probe_all(
    tell: Callable[[str], None], *, names: tuple[str, ...] = ORDER, patience: float = _PATIENCE
) -> dict[str, dict[str, Any]]:
    """Runs every probe, those after one that ended its process in another.

    Args:
        tell: takes the name of each probe as it starts.
        names: the probes.
        patience: seconds that one may take.

    Returns:
        the facts of each; {"error": why} of one that failed.
    """
    facts: dict[str, dict[str, Any]] = {}
    rest = list(names)
    while rest:
        before = len(rest)
        _probe(rest, facts, tell, patience)
        if len(rest) == before:  # the process did not get as far as its first probe
            facts[rest.pop(0)] = {"error": "the process that looks at it does not start"}
    return facts


def _probe(
    rest: list[str],
    facts: dict[str, dict[str, Any]],
    tell: Callable[[str], None],
    patience: float,
) -> None:
    """One process, until it ends; takes off ``rest`` what was looked at."""
    task = json.dumps([sys.path, str(_ROOT / "mask_rcnn_plus"), rest])
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, task], stdout=subprocess.PIPE, stderr=noise
        )
        lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
        running, why = "", ""
        try:
            while line := lines.get(timeout=patience):
                message = json.loads(line)
                if "start" in message:
                    running = message["start"]
                    tell(running)
                else:
                    facts[message["done"]] = message["facts"]
                    rest.remove(message["done"])
                    running = ""
        except queue.Empty:
            why = f"does not end within {patience:g} seconds"
            child.kill()
        code = child.wait()
        if running:
            noise.seek(0)
            last = noise.read()[-2000:].decode(errors="replace")
            facts[running] = {"error": why or _ending(code), "traceback": last}
            rest.remove(running)


def _read(child: subprocess.Popen[bytes], lines: "queue.Queue[bytes]") -> None:
    """Hands on a process's lines, at the end an empty one."""
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(b"")


def _ending(code: int) -> str:
    if code < 0:
        try:
            return f"ends the process by {signal.Signals(-code).name}"
        except ValueError:
            return f"ends the process by signal {-code}"
    return f"ends the process with exit code {code}"
