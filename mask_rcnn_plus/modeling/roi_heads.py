"""detectron2's ROI heads over the fused pooler."""

from typing import Any

from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from mask_rcnn_plus.modeling.pooler import FusedROIPooler


@ROI_HEADS_REGISTRY.register()
class FusedROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose box, mask and keypoint poolers are one operator call each.

    Nothing else differs: the same config keys, losses, parameters and their names, so weights of
    either load into the other.
    """

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        for name in ("box_pooler", "mask_pooler", "keypoint_pooler"):
            # Absent where the head is off, None where it works on the features themselves.
            if isinstance(arguments.get(name), ROIPooler):
                arguments[name] = _fused(arguments[name])
        return arguments


def _fused(pooler: ROIPooler) -> nn.Module:
    """The fused pooler that gives what detectron2's gives."""
    levels = list(pooler.level_poolers)
    kind = type(levels[0]).__name__
    if kind == "RoIPool":
        pooler_type = "ROIPool"
    elif kind == "ROIAlign":
        pooler_type = "ROIAlignV2" if levels[0].aligned else "ROIAlign"
    else:
        return pooler  # rotated boxes stay detectron2's
    return FusedROIPooler(
        output_size=pooler.output_size,
        scales=[level.spatial_scale for level in levels],
        sampling_ratio=getattr(levels[0], "sampling_ratio", 0),
        pooler_type=pooler_type,
        canonical_box_size=pooler.canonical_box_size,
        canonical_level=pooler.canonical_level,
    )
