"""What is broken, and what to do better, from the facts of an examination."""

import sys
from typing import Any

_GIB = 2**30
_LITTLE_DISK = 2 * _GIB  # a few checkpoints of a ResNet-50
_LITTLE_MEMORY = 2 * _GIB
_LITTLE_SHM = _GIB // 2  # what loader workers hand over; Docker gives 64 MiB
_PROBES = {
    "libraries": "a library",
    "torch": "torch",
    "operators": "loading the operators",
    "self_test": "the self-test of the operators",
    "detectron2": "detectron2",
    "package": "mask_rcnn_plus",
    "datasets": "listing the data sets",
}


def findings(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences about what is broken, and advice.

    Args:
        report: "python", "machine", and the facts of every probe.
    """
    broken: list[str] = []
    advice: list[str] = []
    reasons: set[str] = set()
    for name, title in _PROBES.items():
        facts = report.get(name, {})
        # What fails for the same reason is no finding of its own.
        if (why := facts.get("error")) and why not in reasons:
            reasons.add(why)
            broken.append(f"{title}: {why}{_remedy(name, why)}")
        broken += facts.get("broken", [])
        advice += facts.get("advice", [])
    return broken, advice + _of_machine(report)


def _remedy(name: str, why: str) -> str:
    if "No module named 'torch'" in why:
        return "; install torch (README, section Start)"
    if "detectron2" in why and ("No module named" in why or "not installed" in why):
        return "; install detectron2 (README, section Compatibility)"
    if name in ("operators", "self_test") and "ends the process" in why:
        return "; the compiled library does not fit: reinstall mask-rcnn-plus"
    return ""


def _of_machine(report: dict[str, Any]) -> list[str]:
    machine, advice = report["machine"], []
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        advice.append(f"Python {report['python']['version']} is not among 3.10 to 3.13: untested")
    torch = report.get("torch", {})
    if machine["driver"] and "version" in torch and not torch["devices"]:
        advice.append(
            f"there is an NVIDIA driver ({machine['driver']}), but torch {torch['version']} "
            + (
                f"sees no GPU: CUDA {torch['CUDA']} may need a newer driver, or "
                "CUDA_VISIBLE_DEVICES hides them"
                if torch["CUDA"]
                else "was built without CUDA: install one with it"
            )
        )
    advice += _of_threads(machine, torch)
    memory = machine["memory"].get("available")
    if memory is not None and memory < _LITTLE_MEMORY:
        advice.append(
            f"{size(memory)} of memory are left: lower SOLVER.IMS_PER_BATCH, "
            "DATALOADER.NUM_WORKERS or INPUT.MIN_SIZE_TRAIN"
        )
    if machine["shm"] is not None and machine["shm"] < _LITTLE_SHM:
        advice.append(
            f"/dev/shm has {size(machine['shm'])} free, and loader workers hand over images "
            "through it: set DATALOADER.NUM_WORKERS 0, or start the container with --shm-size=2g"
        )
    return advice + _of_folders(machine, report.get("datasets", {}))


def _of_threads(machine: dict[str, Any], torch: dict[str, Any]) -> list[str]:
    advice = []
    cores = min(machine["cores"], machine["quota"] or machine["cores"])
    threads, load = torch.get("threads", 1), machine["load"] or 0.0
    if threads > cores:
        advice.append(
            f"torch uses {threads} threads on {cores:g} cores: set "
            f"OMP_NUM_THREADS={max(int(cores), 1)}"
        )
    if threads > 1 and load > 0.75 * cores:
        passive = machine["environment"].get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
        advice.append(
            f"other work keeps the cores busy (load {load:.1f} on {cores:g}), and OpenMP's threads "
            "spin while they wait for each other: "
            + ("" if passive else "set OMP_WAIT_POLICY=PASSIVE, or ")
            + "OMP_NUM_THREADS=1"
        )
    return advice


def _of_folders(machine: dict[str, Any], datasets: dict[str, Any]) -> list[str]:
    advice = []
    output, root = machine["output"], machine["datasets"]
    if not output["writable"]:
        advice.append(f"'{output['folder']}' cannot be written into: set another OUTPUT_DIR")
    elif output["free"] is not None and output["free"] < _LITTLE_DISK:
        advice.append(
            f"{size(output['free'])} are free for '{output['folder']}': set SOLVER.KEEP_CHECKPOINTS"
        )
    if not root["exists"]:
        advice.append(
            f"there is no folder '{root['folder']}' for data sets: make it, or name another in "
            "DETECTRON2_DATASETS"
        )
    elif datasets.get("by folder") == {} and not datasets.get("builtin"):
        advice.append(
            f"there is no data set in '{root['folder']}': datasets/README.md says how to put one "
            "there, configs/quickstart.yaml draws one, and mask-rcnn-plus convert makes one"
        )
    return advice


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return "unknown"
    if count >= _GIB:
        return f"{count / _GIB:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
