"""Describes the environment of a measurement: hardware, versions, settings."""

import platform
from importlib import metadata

import detectron2
import torch
import torchvision

from mask_rcnn_plus.ops import backend
from mask_rcnn_tools.machine import cpu_model, usable_cpus


def describe_environment(device: str) -> dict[str, str | int]:
    """Describes the environment of a measurement: versions and hardware.

    Args:
        device: "cpu", "cuda" or "cuda:1"; where the benchmark runs.

    Returns:
        readable names -> strings and numbers, ready for JSON.
    """
    facts: dict[str, str | int] = {"device": device}
    if device.startswith("cuda"):
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = torch.version.cuda or "none"
    facts["CPU"] = cpu_model()
    facts["CPUs usable"] = usable_cpus()
    facts["threads"] = torch.get_num_threads()
    facts["operators"] = backend(device)
    if facts["operators"] == "native" and device == "cpu":
        facts["instruction set"] = torch.ops.mask_rcnn_plus.cpu_isa()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["Python"] = platform.python_version()
    facts["torch"] = torch.__version__
    facts["torchvision"] = torchvision.__version__
    facts["detectron2"] = f"{detectron2.__version__} ({_origin('detectron2')})"
    facts["mask_rcnn_plus"] = metadata.version("mask-rcnn-plus")
    return facts


def _origin(package: str) -> str:
    """The distribution that installed a package."""
    names = metadata.packages_distributions().get(package)
    return ", ".join(sorted(set(names))) if names else "a source tree"
