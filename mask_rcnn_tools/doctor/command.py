"""Examines the installation and the machine, tests every operator, and says what to fix."""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_tools import machine
from mask_rcnn_tools.arguments import Parser, UsageError, any_path
from mask_rcnn_tools.doctor.diagnosis import diagnose
from mask_rcnn_tools.doctor.probes import load_file, plugin_folder, run_probes, version
from mask_rcnn_tools.doctor.report import format_report
from mask_rcnn_tools.files import require_new, write_file

PROGRAM = "mask-rcnn-plus doctor"

_EPILOG = f"""\
examples:
  {PROGRAM}
  {PROGRAM} --output output/balloons --json doctor.json
  {PROGRAM} --compile 8.0 9.0

The doctor also runs if torch, detectron2 or the operators cannot be imported or crash, and reports
it. It changes nothing but the cache of CUDA kernels, and needs no network. The report contains
paths and names of data sets: read it before you publish it.

exit code: 0 if nothing is broken, even if there is advice; 1 if something is broken; 2 if the
command line is wrong
"""
# Environment variables that change how training runs.
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "DETECTRON2_DATASETS", "KMP_BLOCKTIME", "LD_PRELOAD"),
    *("MASK_RCNN_PLUS_CACHE", "MASK_RCNN_PLUS_CPU_ISA", "MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 1 if something is broken, else 0."""
    arguments = _parse(argv)
    if arguments.compile is not None:
        return _compile_kernels(arguments.compile)
    facts = {
        "python": python_facts(),
        "machine": machine_facts(arguments.output),
        **run_probes(_announce),
    }
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    broken, advice = diagnose(facts)
    report = {"healthy": not broken, "broken": broken, "advice": advice, **facts}
    as_json = json.dumps(report, indent=1)
    print(as_json if arguments.json == "-" else format_report(report))
    if arguments.json not in (None, "-"):
        write_file(Path(arguments.json), as_json + "\n")
    return int(bool(broken))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--output",
        type=any_path,
        default=Path("output"),
        metavar="FOLDER",
        help="OUTPUT_DIR of your runs, to examine its disk (default: output)",
    )
    parser.add_argument(
        "--json",
        type=lambda text: text if text == "-" else str(any_path(text)),
        metavar="FILE",
        help="also write the report as json; - prints only json",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--compile",
        nargs="*",
        type=_capability,
        metavar="CAPABILITY",
        help="only compile all CUDA kernels into the cache, for GPUs of these compute "
        "capabilities, such as 8.0 9.0 (default: those of this machine's GPUs)",
    )
    arguments = parser.parse_args(argv)
    if arguments.json not in (None, "-"):
        require_new(Path(arguments.json), overwrite=arguments.overwrite, option="--json")
    return arguments


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal() and len(minor) == 1):
        raise argparse.ArgumentTypeError(f"expected a compute capability such as 9.0, got {text!r}")
    return int(major), int(minor)


def _compile_kernels(capabilities: Sequence[tuple[int, int]]) -> int:
    try:
        kernels = load_file("ops/kernels.py")
    except ImportError as error:
        raise UsageError(f"--compile needs torch: {error}") from error
    found = sorted(set(capabilities) or set(kernels.present_capabilities()))
    if not found:
        raise UsageError("--compile: torch sees no GPU; name compute capabilities, such as 8.0 9.0")
    kernels.cache_folder().mkdir(parents=True, exist_ok=True)  # an error if it is not writable
    for capability in found:
        try:
            for kernel in kernels.KERNELS:
                kernels.compiled(kernel, capability)
        except kernels.Unavailable as reason:
            raise UsageError(f"--compile: {reason}") from reason
        version = ".".join(map(str, capability))
        count, folder = len(kernels.KERNELS), kernels.cache_folder()
        print(f"{count} kernels for compute capability {version} are in {folder}")
    return 0


def _announce(probe: str) -> None:
    """Shows progress on a terminal, without tqdm, which may be missing."""
    if sys.stderr.isatty():
        name = probe.replace("_", " ")
        print(f"\r\033[Kexamining {name} ...", end="", file=sys.stderr, flush=True)


def python_facts() -> dict[str, Any]:
    """The Python interpreter and the installed plugin."""
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "mask-rcnn-plus": version("mask-rcnn-plus") or "not installed, a source tree",
        "folder": str(plugin_folder()),
    }


def machine_facts(output: Path) -> dict[str, Any]:
    """Hardware, memory, disks and environment variables; ``output`` is the OUTPUT_DIR of runs."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    shm = Path("/dev/shm")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": machine.cpu_model(),
        "cores": machine.usable_cpus(),
        "quota": machine.cpu_quota(),
        "load": machine.load(),
        "instruction sets": machine.instruction_sets(),
        "memory": machine.memory(),
        "shm": machine.free_space(shm) if shm.is_dir() else None,
        "driver": machine.nvidia_driver(),
        "output": {
            "folder": str(output.absolute()),
            "free": machine.free_space(output),
            "writable": _is_writable(output),
        },
        "datasets": {
            "folder": str(root.absolute()),
            "exists": root.is_dir(),
            "free": machine.free_space(root),
            "variable": "DETECTRON2_DATASETS" in os.environ,
        },
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _is_writable(folder: Path) -> bool:
    """Whether the folder, or its nearest existing parent, accepts files."""
    path = folder.absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        # Permissions do not restrict root, so create a file; it has no name.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError:
        return False
    return True
