"""Examines each part of the installation in a child process, because a broken part may crash it.

Each probe returns facts; "broken" and "advice" among them are lists of sentences. Probes import
what they examine: a failed import is a fact about the installation, not a failure of the doctor.
"""

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TIMEOUT = 180.0  # seconds for one probe, on a slow disk and busy cores

# Module to import -> the distributions that may contain it.
_LIBRARIES = {
    "numpy": ("numpy",),
    "cv2": ("opencv-python", "opencv-python-headless", "opencv-contrib-python"),
    "pycocotools.mask": ("pycocotools",),
    "PIL.Image": ("pillow",),
    "fvcore": ("fvcore",),
    "iopath": ("iopath",),
    "faster_coco_eval": ("faster-coco-eval",),
    "shapely.geometry": ("shapely",),
}


def run_probes(announce: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Runs every probe. After a crash, a new child process runs the rest.

    Args:
        announce: called with the name of each probe before it runs.

    Returns:
        probe name -> its facts, or {"error": reason, "traceback": text} if it failed.
    """
    facts: dict[str, dict[str, Any]] = {}
    rest = list(PROBES)
    context = multiprocessing.get_context("spawn")
    while rest:
        with tempfile.NamedTemporaryFile() as log:
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_run, args=(rest, sender, log.name), daemon=True)
            child.start()
            sender.close()
            error = ""
            while rest and not error:
                announce(rest[0])
                try:
                    if receiver.poll(_TIMEOUT):
                        facts[rest[0]] = receiver.recv()
                        rest.pop(0)
                    else:
                        child.kill()
                        error = f"does not end within {_TIMEOUT:g} seconds"
                except EOFError:
                    child.join()
                    error = _exit_reason(child.exitcode or 0)
            child.join()
            if error:
                last = log.read()[-2000:].decode(errors="replace")
                facts[rest.pop(0)] = {"error": error, "traceback": last}
    return facts


def _run(names: list[str], results: Connection, log: str) -> None:
    """Runs probes in the child process. What libraries print goes to the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in names:
        try:
            facts = PROBES[name]()
        except Exception as error:
            facts = {"error": _reason(error, 400), "traceback": traceback.format_exc(limit=-8)}
        results.send(facts)


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"ends the process with exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"ends the process by {known.get(-code, f'signal {-code}')}"


def _reason(error: Exception, limit: int = 200) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def version(distribution: str) -> str:
    """The version of an installed distribution, or ""."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def plugin_folder() -> Path:
    """The folder of the package mask_rcnn_plus, which is not imported."""
    spec = importlib.util.find_spec("mask_rcnn_plus")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'mask_rcnn_plus'")
    return Path(spec.origin).parent


def load_file(name: str) -> Any:
    """Imports one file of the plugin without the package, which would import detectron2."""
    path = plugin_folder() / name
    spec = importlib.util.spec_from_file_location(f"_doctor_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def probe_libraries() -> dict[str, Any]:
    """Imports each library and reads its version."""
    facts: dict[str, Any] = {"versions": {}, "broken": []}
    for module, names in _LIBRARIES.items():
        installed = ", ".join(f"{n} {v}" for n in names if (v := version(n))) or names[0]
        try:
            importlib.import_module(module)
        except Exception as error:
            facts["broken"].append(
                f"{installed} does not import ({_reason(error)}): reinstall {names[0]}"
            )
        facts["versions"][names[0]] = installed.removeprefix(names[0]).strip() or "missing"
    return facts


def probe_torch() -> dict[str, Any]:
    """torch, torchvision, and the devices that torch sees."""
    torch = importlib.import_module("torch")
    facts: dict[str, Any] = {
        "version": str(torch.__version__),
        "CUDA": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": [],
        "broken": [],
    }
    try:
        importlib.import_module("torchvision.ops")
        facts["torchvision"] = importlib.import_module("torchvision").__version__
    except Exception as error:
        facts["broken"].append(
            f"torchvision {version('torchvision')} does not import ({_reason(error)}): install the "
            f"version for torch {torch.__version__}"
        )
    if torch.version.cuda is None:
        return facts
    facts["compiled for"] = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        facts["devices"].append(
            {"name": device.name, "capability": capability, "memory": device.total_memory}
        )
        if not supports(facts["compiled for"], device.major, device.minor):
            facts["broken"].append(
                f"CUDA device {index} ({device.name}) has compute capability {capability}, but "
                f"this torch is compiled for {', '.join(facts['compiled for'])}: install a torch "
                "that supports the device"
            )
    return facts


def supports(compiled: list[str], major: int, minor: int) -> bool:
    """Whether a torch compiled for these architectures runs on a GPU.

    Code for sm_XY runs on capability X.Z with Z >= Y; code for compute_XY on any later one.
    """
    for name in compiled:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name):
            target = (int(match[2]), int(match[3]))
            if target <= (major, minor) and (match[1] == "compute" or target[0] == major):
                return True
    return False


def probe_operators() -> dict[str, Any]:
    """Finds which implementation of the operators runs on each device, and why."""
    torch = importlib.import_module("torch")
    library, kernels = load_file("ops/library.py"), load_file("ops/kernels.py")
    facts: dict[str, Any] = {"backend": {}, "reason": {}, "NVRTC": "", "broken": [], "advice": []}
    if torch.version.cuda:
        with contextlib.suppress(kernels.Unavailable):
            facts["NVRTC"] = ".".join(map(str, kernels.nvrtc_version()))
        facts["cache"] = str(kernels.cache_folder())
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_cpu = library.why_missing("cpu")
    reasons = {"cpu": on_cpu}
    for index in range(gpus):
        reasons[f"cuda:{index}"] = on_cpu or kernels.why_missing(index)
    if not gpus:
        reasons["cuda"] = kernels.why_missing()
    for device, reason in reasons.items():
        facts["backend"][device] = "torchvision" if reason else "native"
        if reason is None:
            continue
        facts["reason"][device] = reason
        fix = library.how_to_fix("cpu") if on_cpu else kernels.how_to_fix()
        if "does not load" in reason and reason == on_cpu:
            facts["broken"].append(f"operators on {device}: {reason}. To fix it, {fix}")
        elif device != "cuda":  # no GPU
            facts["advice"].append(
                f"operators on {device} run through torchvision, several times slower: {reason}. "
                f"To fix it, {fix}"
            )
    if on_cpu is None:
        facts["instruction set"] = torch.ops.mask_rcnn_plus.cpu_isa()
    if wanted := os.environ.get("MASK_RCNN_PLUS_CPU_ISA"):
        used = facts.get("instruction set", "torchvision")
        facts["advice"].append(
            f"MASK_RCNN_PLUS_CPU_ISA limits the operators to {wanted}: unset it for the fastest"
            if wanted == used
            else f"MASK_RCNN_PLUS_CPU_ISA is '{wanted}', but the operators use {used}: unset it"
        )
    return facts


def probe_detectron2() -> dict[str, Any]:
    """Finds which detectron2 is installed, and which patches the plugin applies to it."""
    origin = load_file("compat/origin.py").detectron2_origin()
    facts: dict[str, Any] = {
        "origin": origin.kind,
        "distribution": origin.distribution,
        "differing": list(origin.differing),
        "advice": [],
    }
    if origin.kind == "redistribution" and origin.differing:
        facts["advice"].append(
            f"{origin.distribution} is not upstream's v0.6: {len(origin.differing)} files differ, "
            f"such as {', '.join(origin.differing[:3])}"
        )
    try:
        facts["version"] = importlib.import_module("detectron2").__version__
    except Exception as error:
        facts["traceback"] = traceback.format_exc(limit=-8)
        name = origin.distribution or "a source tree"
        facts["broken"] = [f"detectron2 ({name}): {_reason(error, 300)}"]
        return facts
    try:
        compat = importlib.import_module("mask_rcnn_plus.compat")
    except Exception:  # probe_package reports it
        return facts
    facts["patches"] = compat.apply()
    tools = importlib.import_module("mask_rcnn_plus.compat.tools")
    facts["compiled operators"] = tools.has_extension()
    return facts


def probe_package() -> dict[str, Any]:
    """The plugin as a whole."""
    importlib.import_module("mask_rcnn_plus")
    return {"folder": str(plugin_folder())}


def probe_self_test() -> dict[str, Any]:
    """Every operator on every device."""
    self_test = importlib.import_module("mask_rcnn_tools.doctor.self_test")
    facts: dict[str, Any] = {"results": [], "broken": []}
    for device in self_test.devices():
        facts["results"] += self_test.run(device)
    for result in facts["results"]:
        if result["ok"]:
            continue
        what = result.get("error") or f"forward off by {result['forward']:.2g}"
        if result.get("backward"):
            what += f", backward by {result['backward']:.2g}"
        facts["broken"].append(
            f"{result['operator']} on {result['device']} is wrong: {what}; reinstall "
            "mask-rcnn-plus, and report a bug if that does not help"
        )
    return facts


def probe_datasets() -> dict[str, Any]:
    """The data sets registered by folder, and those of detectron2's own that exist."""
    folders = importlib.import_module("mask_rcnn_plus.data.folders")
    loading = importlib.import_module("mask_rcnn_plus.data.loading")
    catalog = importlib.import_module("detectron2.data").DatasetCatalog
    facts: dict[str, Any] = {"by folder": {}, "builtin": [], "advice": []}
    for name in folders.register_folder_datasets():
        json_file, images = loading.coco_files(name)
        count = sum(1 for _ in images.iterdir()) if images.is_dir() else None
        facts["by folder"][name] = {
            "json": str(json_file),
            "bytes": json_file.stat().st_size,
            "images": str(images),
            "entries": count,
        }
        if count is None:
            facts["advice"].append(f"data set '{name}': its image folder '{images}' is missing")
    others = [name for name in catalog.list() if name not in facts["by folder"]]
    facts["builtin"] = [name for name in others if loading.coco_files(name)]
    return facts


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "libraries": probe_libraries,
    "torch": probe_torch,
    "operators": probe_operators,
    "detectron2": probe_detectron2,
    "package": probe_package,
    "self_test": probe_self_test,
    "datasets": probe_datasets,
}
