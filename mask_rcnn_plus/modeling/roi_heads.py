"""detectron2's ROI heads (FPN and DC5, C4, cascade) over the fused pooler."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    BaseMaskRCNNHead,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.structures import Instances
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.modeling.box_losses import with_box_loss
from mask_rcnn_plus.modeling.mask_loss import mask_loss
from mask_rcnn_plus.modeling.pooler import POOLER_TYPES, FusedROIPooler
from mask_rcnn_plus.modeling.roi_labels import LabelledStages, SampledRoIs

# A constructor's argument -> the section of MODEL that has its POOLER_TYPE. C4 has one pooler for
# boxes and masks, and reads the box head's section.
_POOLERS = {
    "box_pooler": "ROI_BOX_HEAD",
    "pooler": "ROI_BOX_HEAD",
    "mask_pooler": "ROI_MASK_HEAD",
    "keypoint_pooler": "ROI_KEYPOINT_HEAD",
}
_STOCK_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool")
_ROTATED = "ROIAlignRotated"


@ROI_HEADS_REGISTRY.register()
class FusedROIHeads(SampledRoIs, StandardROIHeads):
    """``StandardROIHeads`` whose box, mask and keypoint poolers are one operator call each.

    Nothing else differs: the same config keys, losses, parameters and their names, so weights of
    either load into the other. ``POOLER_TYPE`` takes every key of ``POOLER_TYPES`` as well;
    ``ROIAlignRotated`` leaves detectron2's pooler in place.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        return _with_fused_poolers(super().from_config, cfg, input_shape)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        losses = _lean_mask_loss(self, features, instances)
        return super()._forward_mask(features, instances) if losses is None else losses


@ROI_HEADS_REGISTRY.register()
class FusedRes5ROIHeads(SampledRoIs, Res5ROIHeads):
    """``Res5ROIHeads`` (C4) over the fused pooler; as :class:`FusedROIHeads` otherwise.

    Boxes and masks share one pooler, whose type is ``MODEL.ROI_BOX_HEAD.POOLER_TYPE``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        return _with_fused_poolers(super().from_config, cfg, input_shape)

    def forward(
        self,
        images: Any,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``Res5ROIHeads``; in training, its masks' loss is :func:`mask_loss`."""
        if not self.training or not self.mask_on or not _has_the_plain_loss(self.mask_head):
            return super().forward(images, features, proposals, targets)
        rois = self.label_and_sample_proposals(proposals, targets)
        boxes = [one.proposal_boxes for one in rois]
        pooled = self._shared_roi_transform([features[name] for name in self.in_features], boxes)
        losses = self.box_predictor.losses(self.box_predictor(pooled.mean(dim=(2, 3))), rois)
        # Boxes and masks share res5: the positives' maps are there.
        positives, chosen = select_foreground_proposals(rois, self.num_classes)
        losses |= _mask_losses(self.mask_head, pooled[torch.cat(chosen)], positives)
        return [], losses


@ROI_HEADS_REGISTRY.register()
class FusedCascadeROIHeads(SampledRoIs, LabelledStages, CascadeROIHeads):
    """``CascadeROIHeads`` over the fused pooler; as :class:`FusedROIHeads` otherwise."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        return _with_fused_poolers(super().from_config, cfg, input_shape)

    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]) -> Any:
        losses = _lean_mask_loss(self, features, instances)
        return super()._forward_mask(features, instances) if losses is None else losses


def _lean_mask_loss(
    heads: StandardROIHeads, features: dict[str, Tensor], instances: list[Instances]
) -> dict[str, Tensor] | None:
    """The mask head's losses in training; None where detectron2's code has to see to it."""
    if not heads.training or not heads.mask_on or heads.mask_pooler is None:
        return None
    if not _has_the_plain_loss(heads.mask_head):
        return None
    positives, _ = select_foreground_proposals(instances, heads.num_classes)
    boxes = [one.proposal_boxes for one in positives]
    pooled = heads.mask_pooler([features[name] for name in heads.mask_in_features], boxes)
    return _mask_losses(heads.mask_head, pooled, positives)


def _has_the_plain_loss(head: nn.Module) -> bool:
    """Whether a mask head has no loss of its own, and nobody waits for it to be called.

    Another loss has a forward of its own, which may be the object's; hooks see calls alone.
    """
    own = type(head).forward is not BaseMaskRCNNHead.forward or "forward" in vars(head)
    return not (own or head._forward_pre_hooks or head._forward_hooks)


def _mask_losses(
    head: BaseMaskRCNNHead, pooled: Tensor, positives: list[Instances]
) -> dict[str, Tensor]:
    loss = mask_loss(head.layers(pooled), positives, vis_period=head.vis_period)
    return {"loss_mask": loss * head.loss_weight}


def _with_fused_poolers(
    from_config: Callable[[CfgNode, Any], dict[str, Any]], cfg: CfgNode, input_shape: Any
) -> dict[str, Any]:
    """The arguments that detectron2's ``from_config`` makes of a config, with our poolers in them.

    Raises:
        UserError: a ``POOLER_TYPE`` does not exist.
    """
    readable = CfgNode(cfg)  # a copy, which is not frozen
    for section in sorted(set(_POOLERS.values())):
        _check_type(section, cfg.MODEL[section].POOLER_TYPE)
        if cfg.MODEL[section].POOLER_TYPE not in ("", *_STOCK_TYPES, _ROTATED):
            # detectron2's pooler, which refuses what only ours knows, is built to be read alone.
            readable.MODEL[section].POOLER_TYPE = "ROIAlignV2"
    arguments = from_config(readable, input_shape)
    for name, section in _POOLERS.items():
        # Absent where the head is off, None where it works on the features themselves.
        if isinstance(arguments.get(name), ROIPooler):
            arguments[name] = fused_pooler(arguments[name], cfg.MODEL[section].POOLER_TYPE)
    predictors = "box_predictors" if "box_predictors" in arguments else "box_predictor"
    arguments[predictors] = with_box_loss(arguments[predictors], cfg)
    return arguments


def _check_type(section: str, pooler_type: str) -> None:
    known = [*POOLER_TYPES, _ROTATED]
    # A mask or keypoint head may take the maps as they are; then there is no pooler.
    if pooler_type in known or (pooler_type == "" and section != "ROI_BOX_HEAD"):
        return
    raise UserError(
        f"MODEL.{section}.POOLER_TYPE '{pooler_type}' is none of {', '.join(known)}"
        f"{did_you_mean(pooler_type, known)}"
    )


def fused_pooler(pooler: ROIPooler, pooler_type: str) -> FusedROIPooler | ROIPooler:
    """Our pooler with the sizes, scales and levels of detectron2's."""
    if pooler_type == _ROTATED:
        return pooler
    levels = list(pooler.level_poolers)
    return FusedROIPooler(
        output_size=pooler.output_size,
        scales=[level.spatial_scale for level in levels],
        # RoIPool has none.
        sampling_ratio=getattr(levels[0], "sampling_ratio", 0),
        pooler_type=pooler_type,
        canonical_box_size=pooler.canonical_box_size,
        canonical_level=pooler.canonical_level,
    )
