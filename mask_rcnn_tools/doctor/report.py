"""The doctor's report for people."""

import textwrap
from collections.abc import Iterator
from typing import Any

from mask_rcnn_tools.doctor.findings import size

_WIDTH = 100
_LISTED = 20  # data sets


def text(report: dict[str, Any]) -> str:
    """The report in lines of at most 100 characters, but for paths."""
    lines: list[str] = []
    for title, pairs in (
        ("versions", _versions(report)),
        ("machine", _machine(report)),
        ("operators", _operators(report)),
        ("self-test: greatest difference from fp64", _self_test(report)),
        ("data sets", _datasets(report)),
    ):
        rows = list(pairs)
        width = max((len(name) for name, _ in rows), default=0)
        lines += [title, *(f"  {name:{width}}  {value}" for name, value in rows), ""]
    for title in ("broken", "advice"):
        if report[title]:
            lines += [title, *(_item(sentence) for sentence in report[title]), ""]
    count = len(report["broken"])
    verdict = f"{count} thing{'s are' if count > 1 else ' is'} broken" if count else "healthy"
    if report["advice"] and not count:
        verdict += ": nothing is broken, and the advice above would improve something"
    return "\n".join([*lines, verdict])


def _item(sentence: str) -> str:
    # Paths stay whole, so that they can be copied.
    return textwrap.fill(
        sentence,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _versions(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    python, torch = report["python"], report.get("torch", {})
    yield "mask-rcnn-plus", f"{python['mask-rcnn-plus']} ({python['folder']})"
    yield "Python", f"{python['version']} ({python['executable']})"
    cuda = f"CUDA {torch['CUDA']}" if torch.get("CUDA") else "without CUDA"
    yield "torch", f"{torch['version']} ({cuda})" if "version" in torch else "does not import"
    yield "torchvision", torch.get("torchvision") or "does not import"
    about = report.get("detectron2", {})
    if "origin" in about:
        differing = len(about["differing"])
        differs = f", {differing} files differ from upstream's v0.6" if differing else ""
        came = about["distribution"] or "a source tree"
        yield "detectron2", f"{about['origin']} ({came}){differs}"
    else:
        yield "detectron2", "does not import"
    if "patches" in about:
        compiled = "with" if about.get("compiled operators") else "without"
        yield "", f"{compiled} its compiled operators"
        patches = textwrap.wrap(", ".join(about["patches"]) or "none needed", 78)
        yield "patches", patches[0]
        yield from (("", line) for line in patches[1:])
    yield from report.get("libraries", {}).get("versions", {}).items()


def _machine(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    machine, torch = report["machine"], report.get("torch", {})
    sets = f" ({', '.join(machine['instruction sets'])})" if machine["instruction sets"] else ""
    yield "system", machine["system"]
    yield "CPU", machine["CPU"] + sets
    quota = f", a container's limit of {machine['quota']:g}" if machine["quota"] else ""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    threads = f", {torch['threads']} threads in torch" if "threads" in torch else ""
    yield "cores", f"{machine['cores']}{quota}{load}{threads}"
    for index, device in enumerate(torch.get("devices", [])):
        yield (
            f"CUDA {index}",
            f"{device['name']}, compute capability {device['capability']}, "
            f"{size(device['memory'])}; torch is compiled for {', '.join(torch['compiled for'])}",
        )
    driver = f"driver {machine['driver']}" if machine["driver"] else "no driver"
    if not torch.get("devices"):
        yield "CUDA", f"no device ({driver})"
    else:
        yield "driver", machine["driver"] or "unknown"
    memory = machine["memory"]
    if memory:
        yield "memory", f"{size(memory['available'])} of {size(memory['total'])} left"
    if machine["shm"] is not None:
        yield "/dev/shm", f"{size(machine['shm'])} free"
    output = machine["output"]
    writable = "" if output["writable"] else ", not writable"
    yield "OUTPUT_DIR", f"{output['folder']}: {size(output['free'])} free{writable}"
    yield from machine["environment"].items()


def _operators(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    facts = report.get("operators", {})
    if "backend" not in facts:
        yield "operators", "do not load"
        return
    for device, backend in facts["backend"].items():
        why = facts["reason"].get(device, "")
        if device == "cpu" and "instruction set" in facts:
            why = f"instruction set {facts['instruction set']}"
        if device == "cuda" and not why and facts["built"]:
            built = facts["built"]
            why = f"built with CUDA {built['CUDA']} for {', '.join(built['capabilities'])}"
        yield device, f"{backend} ({why})" if why else backend


def _self_test(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for result in report.get("self_test", {}).get("results", []):
        numbers = ", ".join(
            f"{way} {result[way]:.1e}"
            for way in ("forward", "backward")
            if result.get(way) is not None
        )
        verdict = "ok   " if result["ok"] else "WRONG"
        detail = result.get("error") or numbers
        yield f"{result['device']}  {result['operator']}", f"{verdict}  {detail}"
    results = report.get("self_test", {}).get("results")
    if results:
        yield "time", f"{sum(result['seconds'] for result in results):.1f} s"
    else:
        yield "not run", report.get("self_test", {}).get("error", "")


def _datasets(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    root, facts = report["machine"]["datasets"], report.get("datasets", {})
    why = "DETECTRON2_DATASETS" if root["variable"] else "the default"
    state = f"{size(root['free'])} free" if root["exists"] else "does not exist"
    yield "root", f"{root['folder']} ({why}): {state}"
    if "by folder" not in facts:
        yield "registered", "unknown: mask_rcnn_plus does not import"
        return
    names = list(facts["by folder"].items())
    for name, about in names[:_LISTED]:
        images = (
            f"{about['entries']:,} entries in {about['images']}"
            if about["entries"] is not None
            else f"no folder {about['images']}"
        )
        yield name, f"{about['json']} ({size(about['bytes'])}), {images}"
    if len(names) > _LISTED:
        yield "...", f"{len(names) - _LISTED} more"
    if not names:
        yield "by folder", "none"
    if facts["builtin"]:
        yield "detectron2's", ", ".join(facts["builtin"])
