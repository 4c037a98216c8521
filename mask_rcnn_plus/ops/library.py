"""Loads the compiled operators, and tells torch their shapes and derivatives."""

import importlib.machinery
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "mask_rcnn_plus"

_FIXES = {
    "cpu": "install a C++ compiler (g++ 11 or newer, or clang) and reinstall mask-rcnn-plus",
    "cuda": "install a C++ compiler and the CUDA toolkit of torch's version "
    f"({torch.version.cuda}), and reinstall mask-rcnn-plus",
}


def _load(name: str) -> str | None:
    """Loads a library beside this file; returns None, or why that failed."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / (name + suffix)
        if path.exists():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                return f"{path} does not load: {error}"
            return None
    return f"{folder} contains no {name} library; this installation was built without one"


def _load_for_cuda(cpu_failure: str | None) -> str | None:
    """Loads the CUDA library, which needs torch's, and the CPU one, which declares operators."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if cpu_failure is not None:
        return f"the library that declares the operators is missing: {cpu_failure}"
    return _load("_roi_cuda")


_failures: dict[str, str | None] = {"cpu": _load("_roi_cpu")}
_failures["cuda"] = _load_for_cuda(_failures["cpu"])
_failures["meta"] = _failures["cpu"]  # meta tensors only need the fake kernels

_warned: set[str] = set()


def why_missing(device_type: str) -> str | None:
    """The reason why a ``torch.device.type`` lacks compiled operators; None if they exist."""
    return _failures.get(device_type, f"there are no compiled operators for {device_type}")


def has_native(device_type: str) -> bool:
    """Whether compiled operators exist for a ``torch.device.type``."""
    return why_missing(device_type) is None


def how_to_fix(device_type: str) -> str:
    """How to get the missing operators; "" if that is impossible."""
    return _FIXES.get(device_type, "")


def warn_of_fallback(device_type: str) -> None:
    """Warns once per device type that torchvision's operators are used, and how to fix it."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    fix = how_to_fix(device_type)
    warnings.warn(
        f"RoI operators on {device_type} run through torchvision, more slowly and one level at a "
        f"time: {why_missing(device_type)}." + (f" To fix this, {fix}." if fix else ""),
        stacklevel=3,
    )


def backend(device: torch.device | str = "cpu") -> str:
    """``"native"`` if a device has this project's compiled operators, else ``"torchvision"``."""
    return "native" if has_native(torch.device(device).type) else "torchvision"


def _warn_of_instruction_set() -> None:
    name = os.environ.get("MASK_RCNN_PLUS_CPU_ISA")
    if name and (used := torch.ops.mask_rcnn_plus.cpu_isa()) != name:
        warnings.warn(
            f"MASK_RCNN_PLUS_CPU_ISA: '{name}' is unknown (choose avx512, avx2 or baseline) or "
            f"unsupported by this processor; the RoI operators use {used}",
            stacklevel=2,
        )


def _empty(sizes: Any, like: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _register_pooling(name: str, *, with_index: bool) -> None:
    """Registers the fake kernels and the derivative of a pooling operator.

    ``with_index``: it also returns, as int32, which sample each output is, for its backward.
    """
    operator = f"{NAMESPACE}::{name}"

    @torch.library.register_fake(operator)
    def fake(features, boxes, pooled_height, pooled_width, *rest):  # type: ignore[no-untyped-def]
        sizes = (boxes.shape[0], features[0].shape[1], pooled_height, pooled_width)
        out = _empty(sizes, features[0], rest[-1])
        return (out, torch.empty_like(out, dtype=torch.int32)) if with_index else out

    @torch.library.register_fake(f"{operator}_backward")
    def fake_backward(grad, *rest):  # type: ignore[no-untyped-def]
        sizes, channels_last = rest[2 if with_index else 1], rest[-1]
        return [_empty(sizes[i : i + 4], grad, channels_last) for i in range(0, len(sizes), 4)]

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        features, boxes, _, _, *ctx.settings = inputs
        ctx.save_for_backward(*((output[1], boxes) if with_index else (boxes,)))
        ctx.sizes = [size for feature in features for size in feature.shape]

    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        run = getattr(torch.ops.mask_rcnn_plus, f"{name}_backward")
        return run(grad, *ctx.saved_tensors, ctx.sizes, *ctx.settings), *(None,) * 10

    def backward_of_backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{name} cannot be differentiated twice: its gradient has no derivative; call "
            "backward() or torch.autograd.grad() without create_graph=True"
        )

    torch.library.register_autograd(operator, backward, setup_context=setup_context)
    torch.library.register_autograd(f"{operator}_backward", backward_of_backward)


def _register_paste_masks_rle() -> None:
    @torch.library.register_fake(f"{NAMESPACE}::paste_masks_rle")
    def fake(masks, boxes, height, width, threshold, fused):  # type: ignore[no-untyped-def]
        size = torch.library.get_ctx().new_dynamic_size()
        ends = masks.new_empty(masks.shape[0], dtype=torch.int64)
        return masks.new_empty(size, dtype=torch.uint8), ends


if has_native("cpu"):
    _register_pooling("fpn_roi_align", with_index=False)
    _register_pooling("fpn_roi_max", with_index=True)
    _register_paste_masks_rle()
    _warn_of_instruction_set()
