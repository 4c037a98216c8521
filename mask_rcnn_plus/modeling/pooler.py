"""RoI pooling over a feature pyramid, all levels in one operator call."""

from collections.abc import Sequence

from detectron2.structures import Boxes
from torch import Tensor, nn

from mask_rcnn_plus.ops.arguments import Grid, check_canonical, first_level, to_pair
from mask_rcnn_plus.ops.roi_ops import pool_pyramid

# Mask R-CNN, table 2c: what a box's bins are, and what is taken of each.
POOLER_TYPES = {
    "ROIAlign": (Grid.ALIGN, "avg"),
    "ROIAlignV2": (Grid.ALIGN_HALF, "avg"),
    "ROIAlignMax": (Grid.ALIGN, "max"),
    "ROIAlignV2Max": (Grid.ALIGN_HALF, "max"),
    "ROIPool": (Grid.POOL, "max"),
    "ROIWarp": (Grid.WARP, "avg"),
    "ROIWarpMax": (Grid.WARP, "max"),
}


class FusedROIPooler(nn.Module):
    """Takes the place of ``detectron2.modeling.poolers.ROIPooler``: same arguments, same results.

    Every type runs as one operator call whatever the number of levels and images, without waiting
    for the device.
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
            scales: 1 / stride of each map, finest first; each is 1 / 2^k and half of the one
                before.
            sampling_ratio: samples a bin and axis; zero or less adapts to the box.
            pooler_type: ``"ROIAlignV2"`` (aligned), ``"ROIAlign"`` (not aligned), ``"ROIWarp"``,
                each also with ``Max`` at its end for the maximum of a bin's samples instead of
                their average; or ``"ROIPool"``.
            canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
            canonical_level: that level's number; a map of stride 2^k has number k.

        Raises:
            ValueError: an unknown type, or scales that are no pyramid.
        """
        super().__init__()
        if pooler_type not in POOLER_TYPES:
            raise ValueError(
                f"pooler_type is '{pooler_type}'; FusedROIPooler knows {', '.join(POOLER_TYPES)}"
                + (
                    " (rotated boxes need detectron2's ROIPooler)"
                    if pooler_type == "ROIAlignRotated"
                    else ""
                )
            )
        check_canonical(canonical_box_size, canonical_level)
        self.output_size = to_pair(output_size)
        self.scales = tuple(scales)
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.min_level = first_level(self.scales)
        self.max_level = self.min_level + len(self.scales) - 1

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """
        Args:
            x: L maps (N, C, Hl, Wl), in the order of ``scales``.
            box_lists: N ``Boxes``, in input-image pixels.

        Returns:
            (R, C, height, width), the boxes of all images one after the other.

        Raises:
            ValueError: not as many maps as scales, or not as many box lists as images.
        """
        if len(x) != len(self.scales):
            raise ValueError(f"got {len(x)} maps for the {len(self.scales)} scales {self.scales}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(
                f"got {len(box_lists)} lists of boxes for maps of {x[0].shape[0]} images"
            )
        grid, mode = POOLER_TYPES[self.pooler_type]
        return pool_pyramid(
            x,
            [one.tensor for one in box_lists],
            self.output_size,
            self.scales,
            self.sampling_ratio,
            grid,
            mode,
            self.canonical_box_size,
            self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}, pooler_type={self.pooler_type!r}"
        )
