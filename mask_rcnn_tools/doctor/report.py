"""Formats the doctor's report as text."""

import textwrap
from collections.abc import Iterable
from typing import Any

from mask_rcnn_tools.doctor.diagnosis import format_size

_WIDTH = 100
_MAX_DATASETS = 20

Rows = Iterable[tuple[str, str]]  # (name, value)


def format_report(report: dict[str, Any]) -> str:
    """The report in lines of at most 100 characters; only paths may be longer."""
    lines: list[str] = []
    for title, section in (
        ("versions", _versions(report)),
        ("machine", _machine(report)),
        ("operators", _operators(report)),
        ("self-test: largest difference from fp64", _self_test(report)),
        ("data sets", _datasets(report)),
    ):
        rows = list(section)
        width = max((len(name) for name, _ in rows), default=0)
        lines += [title, *(f"  {name:{width}}  {value}" for name, value in rows), ""]
    for title in ("broken", "advice"):
        if report[title]:
            lines += [title, *(_item(sentence) for sentence in report[title]), ""]
    count = len(report["broken"])
    if count:
        verdict = f"{count} part{'s are' if count > 1 else ' is'} broken"
    elif report["advice"]:
        verdict = "healthy: nothing is broken; the advice above would improve something"
    else:
        verdict = "healthy"
    return "\n".join([*lines, verdict])


def _item(sentence: str) -> str:
    return textwrap.fill(
        sentence,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,  # paths stay whole, to be copied
        break_on_hyphens=False,
    )


def _versions(report: dict[str, Any]) -> Rows:
    python, torch = report["python"], report.get("torch", {})
    yield "mask-rcnn-plus", f"{python['mask-rcnn-plus']} ({python['folder']})"
    yield "Python", f"{python['version']} ({python['executable']})"
    cuda = f"CUDA {torch['CUDA']}" if torch.get("CUDA") else "without CUDA"
    yield "torch", f"{torch['version']} ({cuda})" if "version" in torch else "does not import"
    yield "torchvision", torch.get("torchvision") or "does not import"
    detectron2 = report.get("detectron2", {})
    if "origin" in detectron2:
        count = len(detectron2["differing"])
        differs = f", {count} files differ from upstream's v0.6" if count else ""
        source = detectron2["distribution"] or "a source tree"
        yield "detectron2", f"{detectron2['origin']} ({source}){differs}"
    else:
        yield "detectron2", "does not import"
    if "patches" in detectron2:
        compiled = "with" if detectron2["compiled operators"] else "without"
        yield "", f"{compiled} its compiled operators"
        patches = textwrap.wrap(", ".join(detectron2["patches"]) or "none needed", 78)
        yield "patches", patches[0]
        yield from (("", line) for line in patches[1:])
    yield from report.get("libraries", {}).get("versions", {}).items()


def _machine(report: dict[str, Any]) -> Rows:
    machine, torch = report["machine"], report.get("torch", {})
    sets = f" ({', '.join(machine['instruction sets'])})" if machine["instruction sets"] else ""
    yield "system", machine["system"]
    yield "CPU", machine["CPU"] + sets
    quota = f", limited to {machine['quota']:g} by the container" if machine["quota"] else ""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    threads = torch.get("threads")
    used = f", torch uses {threads} thread{'s' * (threads != 1)}" if threads else ""
    yield "cores", f"{machine['cores']}{quota}{load}{used}"
    for index, device in enumerate(torch.get("devices", [])):
        yield (
            f"CUDA {index}",
            f"{device['name']}, compute capability {device['capability']}, "
            f"{format_size(device['memory'])}; torch is compiled for "
            f"{', '.join(torch['compiled for'])}",
        )
    if torch.get("devices"):
        yield "driver", machine["driver"] or "unknown"
    else:
        driver = f"driver {machine['driver']}" if machine["driver"] else "no driver"
        yield "CUDA", f"no device ({driver})"
    memory = machine["memory"]
    if memory:
        yield "memory", f"{format_size(memory['available'])} of {format_size(memory['total'])} free"
    if machine["shm"] is not None:
        yield "/dev/shm", f"{format_size(machine['shm'])} free"
    output = machine["output"]
    writable = "" if output["writable"] else ", not writable"
    yield "OUTPUT_DIR", f"{output['folder']}: {format_size(output['free'])} free{writable}"
    yield from machine["environment"].items()


def _operators(report: dict[str, Any]) -> Rows:
    operators = report.get("operators", {})
    if "backend" not in operators:
        yield "operators", "do not load"
        return
    for device, backend in operators["backend"].items():
        detail = operators["reason"].get(device, "")
        if device == "cpu" and "instruction set" in operators:
            detail = f"instruction set {operators['instruction set']}"
        yield device, f"{backend} ({detail})" if detail else backend
    if operators.get("NVRTC"):
        yield "NVRTC", f"{operators['NVRTC']}, compiles CUDA kernels into {operators['cache']}"


def _self_test(report: dict[str, Any]) -> Rows:
    self_test = report.get("self_test", {})
    if not self_test.get("results"):
        yield "not run", self_test.get("error", "")
        return
    for result in self_test["results"]:
        differences = ", ".join(
            f"{direction} {result[direction]:.1e}"
            for direction in ("forward", "backward")
            if result.get(direction) is not None
        )
        verdict = "ok   " if result["ok"] else "WRONG"
        detail = result.get("error") or differences
        yield f"{result['device']}  {result['operator']}", f"{verdict}  {detail}"
    yield "time", f"{sum(result['seconds'] for result in self_test['results']):.1f} s"


def _datasets(report: dict[str, Any]) -> Rows:
    root, datasets = report["machine"]["datasets"], report.get("datasets", {})
    source = "DETECTRON2_DATASETS" if root["variable"] else "the default"
    state = f"{format_size(root['free'])} free" if root["exists"] else "does not exist"
    yield "root", f"{root['folder']} ({source}): {state}"
    if "by folder" not in datasets:
        yield "registered", "unknown: mask_rcnn_plus does not import"
        return
    names = list(datasets["by folder"].items())
    for name, files in names[:_MAX_DATASETS]:
        images = f"{files['entries']:,} files in {files['images']}"
        if files["entries"] is None:
            images = f"image folder {files['images']} is missing"
        yield name, f"{files['json']} ({format_size(files['bytes'])}), {images}"
    if len(names) > _MAX_DATASETS:
        yield "...", f"{len(names) - _MAX_DATASETS} more"
    if not names:
        yield "by folder", "none"
    if datasets["builtin"]:
        yield "detectron2's", ", ".join(datasets["builtin"])
