"""RoI pooling over a feature pyramid, all levels in one operator call."""

from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from mask_rcnn_plus.ops import fpn_roi_align, roi_pool, roi_warp
from mask_rcnn_plus.ops.arguments import first_level, to_pair, to_rows
from mask_rcnn_plus.ops.levels import assign_levels

POOLER_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIWarp")


class FusedROIPooler(nn.Module):
    """Takes the place of ``detectron2.modeling.poolers.ROIPooler``: same arguments, same results.

    ``ROIAlign`` and ``ROIAlignV2`` run as one operator call whatever the number of levels and
    images, without waiting for the device. ``ROIPool`` and ``ROIWarp``, which are there for
    ablations, take one call a level.
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
            pooler_type: ``"ROIAlignV2"`` (aligned), ``"ROIAlign"`` (not aligned), ``"ROIPool"`` or
                ``"ROIWarp"``.
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
        if not canonical_box_size > 0:
            raise ValueError(f"canonical_box_size must be positive, got {canonical_box_size}")
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
        boxes = [one.tensor for one in box_lists]
        if self.pooler_type.startswith("ROIAlign"):
            return fpn_roi_align(
                x,
                boxes,
                self.output_size,
                self.scales,
                self.sampling_ratio,
                self.pooler_type == "ROIAlignV2",
                self.canonical_box_size,
                self.canonical_level,
            )
        if self.pooler_type == "ROIPool":
            return self._each_level(
                x,
                boxes,
                lambda feature, rows, scale: roi_pool(feature, rows, self.output_size, scale),
            )
        return self._each_level(
            x,
            boxes,
            lambda feature, rows, scale: roi_warp(
                feature, rows, self.output_size, scale, self.sampling_ratio
            ),
        )

    def _each_level(
        self,
        x: list[Tensor],
        boxes: list[Tensor],
        pool: Callable[[Tensor, Tensor, float], Tensor],
    ) -> Tensor:
        rows = to_rows(boxes, x[0])
        if len(x) == 1:
            return pool(x[0], rows, self.scales[0])
        levels = assign_levels(
            rows, len(x), self.min_level, self.canonical_box_size, self.canonical_level
        )
        chosen = [(levels == level).nonzero()[:, 0] for level in range(len(x))]
        # Every level takes part, boxes or not, so that every map gets a gradient.
        parts = [
            pool(feature, rows[index], scale)
            for feature, index, scale in zip(x, chosen, self.scales, strict=True)
        ]
        out = parts[0].new_empty((len(rows), *parts[0].shape[1:]))
        return out.index_put((torch.cat(chosen),), torch.cat(parts))

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, "
            f"sampling_ratio={self.sampling_ratio}, pooler_type={self.pooler_type!r}"
        )
