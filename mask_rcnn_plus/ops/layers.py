"""The RoI functions as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mask_rcnn_plus.ops.arguments import check_mode
from mask_rcnn_plus.ops.roi_ops import roi_align, roi_pool, roi_warp

# So that torch.fx records one call and does not trace into checks, which need real shapes.
torch.fx.wrap("roi_align")
torch.fx.wrap("roi_pool")
torch.fx.wrap("roi_warp")


def _format_mode(mode: str) -> str:
    """As in torchvision's modules, the average is not shown."""
    return "" if mode == "avg" else f", mode={mode!r}"


class RoIAlign(nn.Module):
    """:func:`mask_rcnn_plus.ops.roi_align` as a module with fixed settings."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        mode: str = "avg",
    ) -> None:
        """The arguments are those of :func:`mask_rcnn_plus.ops.roi_align`."""
        super().__init__()
        check_mode(mode)
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.mode = mode

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """Pools ``boxes`` from ``input`` (N, C, H, W) into (R, C, height, width)."""
        return roi_align(
            input,
            boxes,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            self.mode,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        ) + _format_mode(self.mode)


class RoIPool(nn.Module):
    """:func:`mask_rcnn_plus.ops.roi_pool` as a module with fixed settings."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        """The arguments are those of :func:`mask_rcnn_plus.ops.roi_pool`."""
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """Pools ``boxes`` from ``input`` (N, C, H, W) into (R, C, height, width)."""
        return roi_pool(input, boxes, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class RoIWarp(nn.Module):
    """:func:`mask_rcnn_plus.ops.roi_warp` as a module with fixed settings."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        mode: str = "avg",
    ) -> None:
        """The arguments are those of :func:`mask_rcnn_plus.ops.roi_warp`."""
        super().__init__()
        check_mode(mode)
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.mode = mode

    def forward(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """Pools ``boxes`` from ``input`` (N, C, H, W) into (R, C, height, width)."""
        return roi_warp(
            input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, self.mode
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        ) + _format_mode(self.mode)
