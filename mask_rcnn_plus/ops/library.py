"""Loads the compiled operators and tells which implementation is in use."""

import importlib.machinery
import os
import warnings
from pathlib import Path

import torch

NAMESPACE = "mask_rcnn_plus"

_HOW_TO_MEND = {
    "cpu": "install a C++ compiler (g++ 11 or newer, or clang) and reinstall mask-rcnn-plus",
    "cuda": "install a C++ compiler and the CUDA toolkit of torch's version "
    f"({torch.version.cuda}), and reinstall mask-rcnn-plus",
}


def _load(name: str) -> str | None:
    """Loads a library that lies beside this file; returns None, or why it did not load."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / (name + suffix)
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return f"{path} does not load: {error}"
            return None
    return f"{folder} holds no {name} library; this installation was made without one"


def _load_for_cuda(cpu_failure: str | None) -> str | None:
    """Loads the CUDA library, which needs torch's, and the CPU one for what operators there are."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if cpu_failure is not None:
        return f"the library that declares the operators is missing: {cpu_failure}"
    return _load("_roi_cuda")


_failures: dict[str, str | None] = {"cpu": _load("_roi_cpu")}
_failures["cuda"] = _load_for_cuda(_failures["cpu"])
_failures["meta"] = _failures["cpu"]  # shapes alone, which the operators' fake kernels give

_warned: set[str] = set()


def _warn_of_instruction_set() -> None:
    """Says when MASK_RCNN_PLUS_CPU_ISA asks for what is not there."""
    wanted = os.environ.get("MASK_RCNN_PLUS_CPU_ISA")
    if wanted and (used := torch.ops.mask_rcnn_plus.cpu_isa()) != wanted:
        warnings.warn(
            f"MASK_RCNN_PLUS_CPU_ISA is '{wanted}', which is none of avx512, avx2 and baseline or "
            f"not in this processor; the RoI operators use {used}",
            stacklevel=2,
        )


if _failures["cpu"] is None:
    _warn_of_instruction_set()


def has_native(device_type: str) -> bool:
    """Whether the compiled operators serve tensors of a device type.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, or any other ``torch.device.type``.
    """
    return _failures.get(device_type, "unsupported") is None


def why_missing(device_type: str) -> str | None:
    """Why a device type has no compiled operators; None if it has.

    Args:
        device_type: as in :func:`has_native`.
    """
    return _failures.get(device_type, f"there are no compiled operators for {device_type}")


def how_to_fix(device_type: str) -> str:
    """What to do about that; "" if nothing can be done."""
    return _HOW_TO_MEND.get(device_type, "")


def warn_of_fallback(device_type: str) -> None:
    """Says once a device type that torchvision's operators stand in, why, and what to do."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    reason = why_missing(device_type)
    mend = how_to_fix(device_type)
    warnings.warn(
        f"RoI operators on {device_type} run through torchvision, more slowly and one level at a "
        f"time: {reason}." + (f" To mend it, {mend}." if mend else ""),
        stacklevel=3,
    )


def backend(device: torch.device | str = "cpu") -> str:
    """Which implementation serves a device.

    Args:
        device: a device, or the name of one.

    Returns:
        ``"native"`` for this project's compiled operators, ``"torchvision"`` where those are
        missing.
    """
    return "native" if has_native(torch.device(device).type) else "torchvision"
