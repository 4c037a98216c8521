"""What torch must know of the compiled operators besides their kernels: shapes and derivatives."""

from typing import Any

import torch
from torch import Tensor

from mask_rcnn_plus.ops.library import NAMESPACE


def _empty(sizes: Any, like: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _sizes(features: list[Tensor]) -> list[int]:
    return [size for feature in features for size in feature.shape]


def _gradients_like(sizes: list[int], grad: Tensor, channels_last: bool) -> list[Tensor]:
    return [_empty(sizes[i : i + 4], grad, channels_last) for i in range(0, len(sizes), 4)]


def _refuse_second_derivative(name: str) -> None:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{name} cannot be differentiated twice: its gradient has no derivative of its own; "
            "call backward() or torch.autograd.grad() without create_graph=True"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", backward)


def register() -> None:
    """Registers fake kernels and derivatives; call once, after the library is loaded."""
    _register_fpn_roi_align()
    _register_fpn_roi_max()
    _register_paste_masks_rle()


def _register_fpn_roi_align() -> None:
    name = f"{NAMESPACE}::fpn_roi_align"

    @torch.library.register_fake(name)
    def fake(features, boxes, pooled_height, pooled_width, *rest):  # type: ignore[no-untyped-def]
        sizes = (boxes.shape[0], features[0].shape[1], pooled_height, pooled_width)
        return _empty(sizes, features[0], rest[-1])

    @torch.library.register_fake(name + "_backward")
    def fake_backward(grad, boxes, sizes, *rest):  # type: ignore[no-untyped-def]
        return _gradients_like(sizes, grad, rest[-1])

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        features, boxes, _, _, *ctx.settings = inputs
        ctx.save_for_backward(boxes)
        ctx.sizes = _sizes(features)

    def backward(ctx: Any, grad: Tensor) -> Any:
        (boxes,) = ctx.saved_tensors
        operator = torch.ops.mask_rcnn_plus.fpn_roi_align_backward
        return operator(grad, boxes, ctx.sizes, *ctx.settings), *(None,) * 10

    torch.library.register_autograd(name, backward, setup_context=setup_context)
    _refuse_second_derivative("fpn_roi_align")


def _register_fpn_roi_max() -> None:
    name = f"{NAMESPACE}::fpn_roi_max"

    @torch.library.register_fake(name)
    def fake(features, boxes, pooled_height, pooled_width, *rest):  # type: ignore[no-untyped-def]
        sizes = (boxes.shape[0], features[0].shape[1], pooled_height, pooled_width)
        out = _empty(sizes, features[0], rest[-1])
        return out, torch.empty_like(out, dtype=torch.int32)

    @torch.library.register_fake(name + "_backward")
    def fake_backward(grad, index, boxes, sizes, *rest):  # type: ignore[no-untyped-def]
        return _gradients_like(sizes, grad, rest[-1])

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        features, boxes, _, _, *ctx.settings = inputs
        ctx.save_for_backward(boxes, output[1])
        ctx.sizes = _sizes(features)

    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        boxes, index = ctx.saved_tensors
        operator = torch.ops.mask_rcnn_plus.fpn_roi_max_backward
        return operator(grad, index, boxes, ctx.sizes, *ctx.settings), *(None,) * 10

    torch.library.register_autograd(name, backward, setup_context=setup_context)
    _refuse_second_derivative("fpn_roi_max")


def _register_paste_masks_rle() -> None:
    @torch.library.register_fake(f"{NAMESPACE}::paste_masks_rle")
    def fake(masks, boxes, height, width, threshold, fused):  # type: ignore[no-untyped-def]
        size = torch.library.get_ctx().new_dynamic_size()
        ends = masks.new_empty(masks.shape[0], dtype=torch.int64)
        return masks.new_empty(size, dtype=torch.uint8), ends
