"""Concludes from the facts what is broken and what to improve."""

import sys
from collections.abc import Iterator
from typing import Any

_GIB = 2**30
_MIN_DISK = 2 * _GIB  # a few checkpoints of a ResNet-50
_MIN_MEMORY = 2 * _GIB
_MIN_SHM = _GIB // 2  # loader workers pass images through it; Docker's default is 64 MiB
_TITLES = {
    "libraries": "a library",
    "torch": "torch",
    "operators": "loading the operators",
    "detectron2": "detectron2",
    "package": "mask_rcnn_plus",
    "self_test": "the self-test of the operators",
    "datasets": "listing the data sets",
}


def diagnose(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences about what is broken, and advice.

    Args:
        report: "python", "machine", and the facts of every probe.
    """
    broken: list[str] = []
    advice: list[str] = []
    reasons: set[str] = set()
    for name, title in _TITLES.items():
        facts = report.get(name, {})
        reason = facts.get("error")
        if reason and reason not in reasons:  # one line per reason
            reasons.add(reason)
            broken.append(f"{title}: {reason}{_remedy(name, reason)}")
        broken += facts.get("broken", [])
        advice += facts.get("advice", [])
    machine, torch = report["machine"], report.get("torch", {})
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        advice.append(f"Python {report['python']['version']} is untested: use 3.10 to 3.13")
    if machine["driver"] and "version" in torch and not torch["devices"]:
        advice.append(_advise_driver(machine["driver"], torch))
    advice += _advise_threads(machine, torch)
    advice += _advise_memory(machine)
    advice += _advise_folders(machine, report.get("datasets", {}))
    return broken, advice


def _remedy(name: str, reason: str) -> str:
    if "No module named 'torch'" in reason:
        return "; install torch (README, section Start)"
    if "detectron2" in reason and ("No module named" in reason or "not installed" in reason):
        return "; install detectron2 (docs/installation.md)"
    if name in ("operators", "self_test") and "ends the process" in reason:
        return "; the compiled library does not match: reinstall mask-rcnn-plus"
    return ""


def _advise_driver(driver: str, torch: dict[str, Any]) -> str:
    why = "was built without CUDA: install a torch with CUDA"
    if torch["CUDA"]:
        why = (
            f"sees no GPU: CUDA {torch['CUDA']} may need a newer driver, or CUDA_VISIBLE_DEVICES "
            "hides the GPUs"
        )
    return f"there is an NVIDIA driver ({driver}), but torch {torch['version']} {why}"


def _advise_threads(machine: dict[str, Any], torch: dict[str, Any]) -> Iterator[str]:
    cores = min(machine["cores"], machine["quota"] or machine["cores"])
    threads, load = torch.get("threads", 1), machine["load"] or 0.0
    if threads > cores:
        yield (
            f"torch uses {threads} threads on {cores:g} cores: set "
            f"OMP_NUM_THREADS={max(int(cores), 1)}"
        )
    if threads > 1 and load > 0.75 * cores:
        passive = machine["environment"].get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
        yield (
            f"other programs keep the cores busy (load {load:.1f} on {cores:g}), and OpenMP's "
            "threads spin while they wait for each other: set "
            + ("" if passive else "OMP_WAIT_POLICY=PASSIVE or ")
            + "OMP_NUM_THREADS=1"
        )


def _advise_memory(machine: dict[str, Any]) -> Iterator[str]:
    memory, shm = machine["memory"].get("available"), machine["shm"]
    if memory is not None and memory < _MIN_MEMORY:
        yield (
            f"only {format_size(memory)} of memory are free: lower SOLVER.IMS_PER_BATCH, "
            "DATALOADER.NUM_WORKERS or INPUT.MIN_SIZE_TRAIN"
        )
    if shm is not None and shm < _MIN_SHM:
        yield (
            f"/dev/shm has only {format_size(shm)} free, and loader workers pass images through "
            "it: set DATALOADER.NUM_WORKERS 0, or start the container with --shm-size=2g"
        )


def _advise_folders(machine: dict[str, Any], datasets: dict[str, Any]) -> Iterator[str]:
    output, root = machine["output"], machine["datasets"]
    if not output["writable"]:
        yield f"cannot write into '{output['folder']}': set another OUTPUT_DIR"
    elif output["free"] is not None and output["free"] < _MIN_DISK:
        yield (
            f"only {format_size(output['free'])} are free for '{output['folder']}': set "
            "SOLVER.KEEP_CHECKPOINTS"
        )
    if not root["exists"]:
        yield (
            f"the data set folder '{root['folder']}' does not exist: create it, or set "
            "DETECTRON2_DATASETS to another one"
        )
    elif datasets.get("by folder") == {} and not datasets.get("builtin"):
        yield (
            f"'{root['folder']}' contains no data set: datasets/README.md explains how to add one, "
            "configs/quickstart.yaml draws one, and mask-rcnn-plus convert converts one"
        )


def format_size(count: int | None) -> str:
    """A number of bytes in readable units."""
    if count is None:
        return "unknown"
    if count >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
