"""RoI pooling over a feature pyramid, all levels in one operator call."""

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from mask_rcnn_plus.ops.arguments import Grid, check_canonical, check_sampling, first_level, to_pair
from mask_rcnn_plus.ops.roi_ops import pool_pyramid, pool_scripted

# Mask R-CNN, table 2c: how a box is divided into bins, and how each bin is reduced.
POOLER_TYPES = {
    "ROIAlign": (Grid.ALIGN, "avg"),
    "ROIAlignV2": (Grid.ALIGN_HALF, "avg"),
    "ROIAlignMax": (Grid.ALIGN, "max"),
    "ROIAlignV2Max": (Grid.ALIGN_HALF, "max"),
    "ROIPool": (Grid.POOL, "max"),
    "ROIWarp": (Grid.WARP, "avg"),
    "ROIWarpMax": (Grid.WARP, "max"),
}
ROTATED = "ROIAlignRotated"  # rotated boxes, which only detectron2's pooler supports


class FusedROIPooler(nn.Module):
    """A ``detectron2.modeling.poolers.ROIPooler`` with the same arguments and results.

    Every type runs as one operator call for all levels and images, without waiting for the device.
    ``torch.jit.script`` compiles it.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: float = 224,
        canonical_level: int = 4,
    ) -> None:
        """
        Args:
            output_size: P, or (height, width), in bins.
            scales: 1 / stride of each map, finest first: 1 / 2^k, each half of the previous one.
            sampling_ratio: samples per bin and axis, a whole number; zero or less adapts to the
                box.
            pooler_type: ``"ROIAlignV2"`` (aligned), ``"ROIAlign"`` (not aligned) or ``"ROIWarp"``
                for the average of a bin's samples, or with the suffix ``Max`` for their maximum; or
                ``"ROIPool"``.
            canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
            canonical_level: that level's number; a map of stride 2^k has number k.

        Raises:
            ValueError: an unknown type, or scales that do not form a pyramid.
        """
        super().__init__()
        if pooler_type not in POOLER_TYPES:
            hint = " (use detectron2's ROIPooler)" if pooler_type == ROTATED else ""
            raise ValueError(
                f"unsupported pooler_type '{pooler_type}'{hint}; choose one of "
                f"{', '.join(POOLER_TYPES)}"
            )
        check_canonical(canonical_box_size, canonical_level)
        grid, self.mode = POOLER_TYPES[pooler_type]
        self.grid = int(grid)
        self.output_size = to_pair(output_size)
        self.scales = list(scales)
        check_sampling(sampling_ratio, scales)
        self.sampling_ratio = int(sampling_ratio)
        self.pooler_type = pooler_type
        self.canonical_box_size = float(canonical_box_size)
        self.canonical_level = int(canonical_level)
        self.min_level = first_level(self.scales)
        self.max_level = self.min_level + len(self.scales) - 1

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """
        Args:
            x: L maps (N, C, Hl, Wl), in the order of ``scales``.
            box_lists: N ``Boxes``, in input-image pixels.

        Returns:
            (R, C, height, width), one image's boxes after the other's.

        Raises:
            ValueError: the numbers of maps and scales, or of box lists and images, differ.
        """
        if len(x) != len(self.scales):
            raise ValueError(f"expected {len(self.scales)} maps, one per scale, got {len(x)}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"expected {x[0].shape[0]} lists of boxes, one per image, got {len(box_lists)}"
            )
        boxes = [image_boxes.tensor for image_boxes in box_lists]
        if torch.jit.is_scripting():
            return pool_scripted(
                x,
                boxes,
                [self.output_size[0], self.output_size[1]],
                self.scales,
                self.sampling_ratio,
                self.grid,
                self.mode,
                self.min_level,
                self.canonical_box_size,
                self.canonical_level,
            )
        else:  # noqa: RET505 (without an else, TorchScript would compile this part too)
            return pool_pyramid(
                x,
                boxes,
                self.output_size,
                self.scales,
                self.sampling_ratio,
                Grid(self.grid),
                self.mode,
                self.canonical_box_size,
                self.canonical_level,
            )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}, pooler_type={self.pooler_type!r}"
        )


def fused_pooler(pooler: ROIPooler, pooler_type: str) -> FusedROIPooler | ROIPooler:
    """Our pooler with the sizes, scales and levels of detectron2's; if rotated, detectron2's."""
    if pooler_type == ROTATED:
        return pooler
    levels = pooler.level_poolers
    return FusedROIPooler(
        output_size=pooler.output_size,
        scales=[level.spatial_scale for level in levels],
        sampling_ratio=getattr(levels[0], "sampling_ratio", 0),  # RoIPool has no ratio
        pooler_type=pooler_type,
        canonical_box_size=pooler.canonical_box_size,
        canonical_level=pooler.canonical_level,
    )
