"""Loads the compiled operators, and tells torch their shapes and derivatives."""

import importlib.machinery
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "mask_rcnn_plus"

_FIX = "install a C++ compiler (g++ 11 or newer, or clang) and reinstall mask-rcnn-plus"


def _path(name: str) -> Path | None:
    folder = Path(__file__).parent
    paths = (folder / (name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next(filter(Path.exists, paths), None)


def _load(name: str) -> str | None:
    """Loads a library beside this file; returns None, or why that failed."""
    if path := _path(name):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            return f"{path} does not load: {error}"
        return None
    folder = Path(__file__).parent
    return f"{folder} contains no {name} library; this installation was built without one"


# Its operators for CUDA ask kernels.py for their kernels.
_failures: dict[str, str | None] = {"cpu": _load("_roi_cpu")}
_failures["meta"] = _failures["cpu"]  # meta tensors only need the fake kernels

_warned: set[str] = set()


def connect_kernels() -> str | None:
    """Lets the operators for CUDA ask for their kernels; returns None, or why that failed."""
    # Here, because the doctor loads this file without the package.
    from mask_rcnn_plus.ops import kernels

    if _failures["cpu"] is None and (path := _path("_roi_cpu")):
        try:
            kernels.connect(path)
        except (OSError, AttributeError) as error:
            return f"the operators' library is not this version's: {error}"
    return _failures["cpu"]


@torch.compiler.assume_constant_result
def _why_missing_on_cuda(index: int | None) -> str | None:
    """Tries one kernel on each device, once."""
    from mask_rcnn_plus.ops import kernels

    device = "cuda" if index is None else f"cuda:{index}"
    if device not in _failures:
        _failures[device] = connect_kernels() or kernels.why_missing(index)
    return _failures[device]


def why_missing(device: torch.device | str) -> str | None:
    """The reason why a device lacks compiled operators; None if they run on it."""
    device = torch.device(device)
    if device.type == "cuda":
        index = device.index
        if index is None and torch.cuda.is_available():
            index = torch.cuda.current_device()
        return _why_missing_on_cuda(index)
    return _failures.get(device.type, f"the operators are not compiled for {device.type}")


def has_native(device: torch.device | str) -> bool:
    """Whether compiled operators run on a device."""
    return why_missing(device) is None


def how_to_fix(device: torch.device | str) -> str:
    """How to get the missing operators; "" if that is impossible."""
    kind = torch.device(device).type
    if kind == "cuda" and _failures["cpu"] is None:
        from mask_rcnn_plus.ops import kernels

        return kernels.how_to_fix()
    return _FIX if kind in ("cpu", "cuda") else ""


def warn_of_fallback(device: torch.device | str) -> None:
    """Warns once per device that torchvision's operators are used, and how to fix it."""
    device = torch.device(device)
    if str(device) not in _warned:
        _warned.add(str(device))
        fix = how_to_fix(device)
        warnings.warn(
            f"RoI operators on {device} run through torchvision, more slowly and one level at a "
            f"time: {why_missing(device)}." + (f" To fix this, {fix}." if fix else ""),
            stacklevel=3,
        )
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        name = f"deterministic {device}"
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"torch.use_deterministic_algorithms(True) on {device}: torchvision's RoI "
                "operators are deterministic only in a path that takes seconds a call and may run "
                f"out of memory. Turn it off, or get the compiled operators: {how_to_fix(device)}",
                stacklevel=3,
            )


def backend(device: torch.device | str = "cpu") -> str:
    """``"native"`` if this project's compiled operators run on a device, else ``"torchvision"``.

    Each CUDA device is tried once: one kernel is compiled, unless it is cached, and loaded.
    """
    return "native" if has_native(device) else "torchvision"


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
