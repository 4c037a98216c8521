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


def _describe(module: nn.Module, *names: str) -> str:
    """Settings as in torchvision's modules; since those lack a mode, the average is not shown."""
    text = ", ".join(f"{name}={getattr(module, name)}" for name in names)
    return text if module.mode == "avg" else f"{text}, mode={module.mode!r}"


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
        """Arguments as for :func:`mask_rcnn_plus.ops.roi_align`."""
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
        return _describe(self, "output_size", "spatial_scale", "sampling_ratio", "aligned")


class RoIPool(nn.Module):
    """:func:`mask_rcnn_plus.ops.roi_pool` as a module with fixed settings."""

    def __init__(self, output_size: int | Sequence[int], spatial_scale: float) -> None:
        """Arguments as for :func:`mask_rcnn_plus.ops.roi_pool`."""
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
        """Arguments as for :func:`mask_rcnn_plus.ops.roi_warp`."""
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
        return _describe(self, "output_size", "spatial_scale", "sampling_ratio")
