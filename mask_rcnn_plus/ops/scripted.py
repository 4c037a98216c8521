"""The RoI functions as TorchScript compiles them, which knows few of Python's types."""

import torch
from torch import Tensor


def pool_one(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    grid: int,
    mode: str,
) -> Tensor:
    """A RoI function of one map on the compiled operators, which say what does not fit.

    Args:
        input: (N, C, H, W), fp32, fp64, fp16 or bf16.
        boxes: (R, 5), or (Ri, 4) for each image.
        output_size: [height, width].
        spatial_scale: 1 / stride.
        sampling_ratio: samples a bin along each axis; zero or less adapts to the box.
        grid: a :class:`mask_rcnn_plus.ops.arguments.Grid`.
        mode: "avg" or "max".

    Returns:
        (R, C, height, width).
    """
    if isinstance(boxes, Tensor):
        rows = boxes.float()
    else:
        parts: list[Tensor] = []
        for image, part in enumerate(boxes):
            index = torch.full_like(part[:, :1], image).float()
            parts.append(torch.cat([index, part.float()], dim=1))
        rows = torch.cat(parts) if parts else torch.zeros((0, 5), device=input.device)
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    height, width = output_size[0], output_size[1]
    if mode == "max":
        pooled, _ = torch.ops.mask_rcnn_plus.fpn_roi_max(
            [input], rows, height, width, [spatial_scale], sampling_ratio, grid, 0, 1.0, 0, last
        )
        return pooled
    assert mode == "avg", "mode must be 'avg' or 'max'"
    return torch.ops.mask_rcnn_plus.fpn_roi_align(
        [input], rows, height, width, [spatial_scale], sampling_ratio, grid, 0, 1.0, 0, last
    )
