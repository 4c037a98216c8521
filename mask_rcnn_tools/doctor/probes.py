"""What the doctor looks at in a process of its own, since any of it may end the process.

Each probe returns facts; ``broken`` and ``advice`` among them are lists of sentences. Imports are
within the probes: whatever does not import is a finding, not a failure of the doctor.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

# Module -> the distributions that bring it.
_LIBRARIES = {
    "numpy": ("numpy",),
    "cv2": ("opencv-python", "opencv-python-headless", "opencv-contrib-python"),
    "pycocotools": ("pycocotools",),
    "PIL": ("pillow",),
    "fvcore": ("fvcore",),
    "iopath": ("iopath",),
    "faster_coco_eval": ("faster-coco-eval",),
    "shapely": ("shapely",),
}
# What is imported of them: the part that is compiled.
_PARTS = {"pycocotools": "pycocotools.mask", "PIL": "PIL.Image", "shapely": "shapely.geometry"}


def run(names: list[str]) -> None:
    """Runs probes, and writes a line of json on standard output before and after each.

    Args:
        names: of functions here, in the order of ``ORDER``.
    """
    # Whatever else a library prints goes to standard error.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for name in names:
            _say(out, {"start": name})
            try:
                facts = globals()[name]()
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                facts = {"error": reason, "traceback": traceback.format_exc(limit=-8)}
            _say(out, {"done": name, "facts": facts})


def _say(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def libraries() -> dict[str, Any]:
    """The version of each library, and why it does not import."""
    facts: dict[str, Any] = {"versions": {}, "broken": []}
    for module, names in _LIBRARIES.items():
        versions = [f"{n} {v}" for n in names if (v := version(n))]
        shown = ", ".join(versions) or names[0]
        try:
            importlib.import_module(_PARTS.get(module, module))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            facts["broken"].append(f"{shown} does not import ({reason}): reinstall {names[0]}")
        facts["versions"][names[0]] = shown.removeprefix(names[0]).strip() or "missing"
    return facts


def torch_() -> dict[str, Any]:
    """torch, torchvision, and the devices that torch sees."""
    torch = importlib.import_module("torch")
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "CUDA": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": [],
        "broken": [],
    }
    try:
        torchvision = importlib.import_module("torchvision")
        importlib.import_module("torchvision.ops")
        facts["torchvision"] = torchvision.__version__
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        facts["broken"].append(
            f"torchvision {version('torchvision') or ''} does not import ({reason}): install the "
            f"one that belongs to torch {torch.__version__}"
        )
    if torch.version.cuda is None:
        return facts
    facts["compiled for"] = torch.cuda.get_arch_list()
    if not torch.cuda.is_available():
        return facts
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        facts["devices"].append(
            {"name": about.name, "capability": capability, "memory": about.total_memory}
        )
        if not covers(torch.cuda.get_arch_list(), about.major, about.minor):
            facts["broken"].append(
                f"CUDA device {index} ({about.name}) has compute capability {capability}, and this "
                f"torch is compiled for {', '.join(torch.cuda.get_arch_list())}: install a torch "
                "for it"
            )
    return facts


def covers(compiled: list[str], major: int, minor: int) -> bool:
    """Code for sm_XY runs on X.Z from Y on, and what is for compute_XY on all that came later."""
    for name in compiled:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name):
            there = (int(match[2]), int(match[3]))
            if there <= (major, minor) and (match[1] == "compute" or there[0] == major):
                return True
    return False


def operators() -> dict[str, Any]:
    """Which implementation serves each device, and why."""
    torch = importlib.import_module("torch")
    library = importlib.import_module("mask_rcnn_plus.ops.library")
    facts: dict[str, Any] = {"backend": {}, "reason": {}, "built": {}, "broken": [], "advice": []}
    for device in ("cpu", "cuda"):
        facts["backend"][device] = library.backend(device)
        path = next(Path(library.__file__).parent.glob(f"_roi_{device}.*"), None)
        reason = library.why_missing(device)
        if path is not None and device == "cuda":
            facts["built"] = _built_for(path)
        there = device == "cpu" or torch.cuda.is_available()
        if reason is None:
            continue
        facts["reason"][device] = reason
        mend = library.how_to_fix(device)
        if path is not None and there and "does not load" in reason:
            facts["broken"].append(f"operators on {device}: {reason}. To mend it, {mend}")
        elif there:
            facts["advice"].append(
                f"operators on {device} run through torchvision, several times slower: {reason}. "
                f"To mend it, {mend}"
            )
    if facts["backend"]["cpu"] == "native":
        facts["instruction set"] = torch.ops.mask_rcnn_plus.cpu_isa()
    wanted = os.environ.get("MASK_RCNN_PLUS_CPU_ISA")
    if wanted and wanted != facts.get("instruction set"):
        facts["advice"].append(
            f"MASK_RCNN_PLUS_CPU_ISA is '{wanted}', which is not what is used "
            f"({facts.get('instruction set', 'torchvision')}): unset it"
        )
    elif wanted:
        facts["advice"].append(
            f"MASK_RCNN_PLUS_CPU_ISA holds the operators to {wanted}: unset it for the fastest"
        )
    if fault := mismatch(facts["built"].get("CUDA", ""), torch.version.cuda):
        facts["broken" if torch.cuda.is_available() else "advice"].append(fault)
    built = facts["built"].get("capabilities", [])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if fault := older(built, *torch.cuda.get_device_capability(index)):
            facts["broken"].append(f"operators on CUDA device {index}: {fault}")
    return facts


def older(built: list[str], major: int, minor: int) -> str:
    """What is wrong where a GPU came before all that a library was built for, or ""."""
    if not built or (major, minor) >= min(tuple(map(int, one.split("."))) for one in built):
        return ""
    return (
        f"it has compute capability {major}.{minor}, and they were built for {', '.join(built)}: "
        f"reinstall mask-rcnn-plus with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def mismatch(built: str, used: str | None) -> str:
    """What is wrong with a library of one CUDA version under a torch of another, or ""."""
    if not built or used is None or built.split(".")[0] == used.split(".")[0]:
        return ""
    return (
        f"the operators for CUDA were built with CUDA {built}, and torch with {used}: reinstall "
        f"mask-rcnn-plus with an nvcc of CUDA {used.split('.')[0]}"
    )


def _built_for(path: Path) -> dict[str, Any]:
    """With which CUDA, and for which GPUs, a library was compiled: nvcc notes both in it."""
    content = path.read_bytes()
    versions = sorted(set(re.findall(rb"Build cuda_(\d+\.\d+)\.", content)))
    capabilities = sorted({int(code) for code in re.findall(rb"-arch sm_(\d+)", content)})
    return {
        "CUDA": versions[-1].decode() if versions else "",
        "capabilities": [f"{code // 10}.{code % 10}" for code in capabilities],
    }


def detectron2() -> dict[str, Any]:
    """Which detectron2 it is, and the patches in force."""
    origin = _load_alone("compat/origin.py").detectron2_origin()
    facts: dict[str, Any] = {
        "origin": origin.kind,
        "distribution": origin.distribution,
        "differing": list(origin.differing),
        "advice": [],
    }
    if origin.kind == "redistribution" and origin.differing:
        facts["advice"].append(
            f"{origin.distribution} is not upstream's v0.6: {len(origin.differing)} files differ, "
            f"as {', '.join(origin.differing[:3])}"
        )
    try:
        patches = importlib.import_module("mask_rcnn_plus.compat.patches")
        facts["patches"] = patches.apply()
        facts["version"] = importlib.import_module("detectron2").__version__
        tools = importlib.import_module("mask_rcnn_plus.compat.tools")
        facts["compiled operators"] = tools.has_extension()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        facts["traceback"] = traceback.format_exc(limit=-8)
        facts["broken"] = [f"detectron2 ({origin.distribution or 'a source tree'}): {reason}"]
    return facts


def _load_alone(name: str) -> Any:
    """A file of this package without the package that it is in, which imports detectron2."""
    path = Path(__file__).parents[2] / "mask_rcnn_plus" / name
    spec = importlib.util.spec_from_file_location(f"_doctor_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which a dataclass looks itself up in
    spec.loader.exec_module(module)
    return module


def package() -> dict[str, Any]:
    """This package as a whole."""
    # What stood in its place so far imports nothing.
    sys.modules.pop("mask_rcnn_plus", None)
    module = importlib.import_module("mask_rcnn_plus")
    return {"folder": str(Path(module.__file__ or "").parent)}


def datasets() -> dict[str, Any]:
    """What is registered by folder, whether it exists, and which of detectron2's own sets do."""
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
            facts["advice"].append(f"data set '{name}' has no folder of images '{images}'")
    others = [name for name in catalog.list() if name not in facts["by folder"]]
    facts["builtin"] = [name for name in others if loading.coco_files(name)]
    return facts


def self_test() -> dict[str, Any]:
    """Every operator on every device."""
    tests = importlib.import_module("mask_rcnn_tools.doctor.self_test")
    facts: dict[str, Any] = {"results": [], "broken": []}
    for device in tests.devices():
        facts["results"] += tests.run(device)
    for result in facts["results"]:
        if not result["ok"]:
            what = result.get("error") or (
                f"forward off by {result['forward']:.2g}"
                + (f", backward by {result['backward']:.2g}" if result["backward"] else "")
            )
            facts["broken"].append(
                f"{result['operator']} on {result['device']} is wrong: {what}; "
                "reinstall mask-rcnn-plus, and report it if that does not help"
            )
    return facts


def version(distribution: str) -> str:
    """Of what is installed, or ""."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


ORDER = ("libraries", "torch_", "operators", "self_test", "detectron2", "package", "datasets")
