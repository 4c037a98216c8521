"""detectron2's ROI heads (FPN and DC5, C4, cascade) with the fused pooler.

In training they wait for the device less often than detectron2's, since they read the metrics of
all images together. RoIs, random draws, losses and logged metrics are the same.
"""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import (
    BaseMaskRCNNHead,
    CascadeROIHeads,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from mask_rcnn_plus.config import complete
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.modeling.box_losses import with_box_loss
from mask_rcnn_plus.modeling.mask_heads import mask_loss
from mask_rcnn_plus.modeling.pooler import POOLER_TYPES, ROTATED, fused_pooler

# Constructor argument -> the section of MODEL with its POOLER_TYPE. C4 has one pooler for boxes and
# masks, and reads the box head's section.
_POOLERS = {
    "box_pooler": "ROI_BOX_HEAD",
    "pooler": "ROI_BOX_HEAD",
    "mask_pooler": "ROI_MASK_HEAD",
    "keypoint_pooler": "ROI_KEYPOINT_HEAD",
}
_STOCK_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool")


class _FusedHeads(ROIHeads):
    """Overrides the methods of detectron2's heads that all three heads change."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        return _with_fused_poolers(super().from_config, cfg, input_shape)

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """``ROIHeads.label_and_sample_proposals`` with one wait for the device less per image.

        Args:
            proposals: N, with ``proposal_boxes`` in input-image pixels and ``objectness_logits``.
            targets: N, with ``gt_boxes``, ``gt_classes`` and other fields that begin with "gt_".

        Returns:
            N, each with ``MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE`` proposals or fewer, positives
            first, with ``gt_classes`` (K for the background) and, if the image has objects, the
            fields of the object that each overlaps most.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled = []
        for image, target in zip(proposals, targets, strict=True):
            overlaps = pairwise_iou(target.gt_boxes, image.proposal_boxes)
            nearest, labels = self.proposal_matcher(overlaps)
            chosen, classes = self._sample_proposals(nearest, labels, target.gt_classes)
            rois = image[chosen]
            rois.gt_classes = classes
            if len(target):
                objects = nearest[chosen]
                for name, value in target.get_fields().items():
                    if name.startswith("gt_") and not rois.has(name):
                        rois.set(name, value[objects])
            sampled.append(rois)
        _log_sizes(sampled, self.num_classes, "roi_head")
        return sampled

    # TorchScript knows no super(), and compiles a method by its own name.
    _stock_forward_mask = FunctionType(
        StandardROIHeads._forward_mask.__code__,
        StandardROIHeads._forward_mask.__globals__,
        "_stock_forward_mask",
    )

    # As in detectron2, without a return type: TorchScript infers that of inference.
    def _forward_mask(self, features: dict[str, Tensor], instances: list[Instances]):
        if self.training:  # noqa: SIM102  (TorchScript leaves out the block only in this form)
            if self.mask_on and self.mask_pooler is not None and _uses_stock_loss(self.mask_head):
                positives, _ = select_foreground_proposals(instances, self.num_classes)
                boxes = [i.proposal_boxes for i in positives]
                pooled = self.mask_pooler([features[name] for name in self.mask_in_features], boxes)
                return _mask_losses(self.mask_head, pooled, positives)
        return self._stock_forward_mask(features, instances)


@ROI_HEADS_REGISTRY.register()
class FusedROIHeads(_FusedHeads, StandardROIHeads):
    """``StandardROIHeads`` whose box, mask and keypoint poolers are one operator call each.

    Config keys, losses, parameters and their names are the same, so each can load the other's
    weights. ``POOLER_TYPE`` may be any key of ``POOLER_TYPES`` as well; with ``ROIAlignRotated``,
    detectron2's pooler stays. ``scripting_with_instances`` of detectron2 compiles it.
    """

    # detectron2 declares them for its own class when it compiles it.
    mask_on: torch.jit.Final[bool]  # type: ignore[misc]
    keypoint_on: torch.jit.Final[bool]  # type: ignore[misc]


@ROI_HEADS_REGISTRY.register()
class FusedRes5ROIHeads(_FusedHeads, Res5ROIHeads):
    """``Res5ROIHeads`` (C4) with the fused pooler; otherwise like :class:`FusedROIHeads`.

    Boxes and masks share one pooler, whose type is ``MODEL.ROI_BOX_HEAD.POOLER_TYPE``.
    """

    def forward(
        self,
        images: Any,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``Res5ROIHeads``; in training, the masks' loss is :func:`mask_loss`."""
        if not self.training or not self.mask_on or not _uses_stock_loss(self.mask_head):
            return super().forward(images, features, proposals, targets)
        rois = self.label_and_sample_proposals(proposals, targets)
        boxes = [i.proposal_boxes for i in rois]
        pooled = self._shared_roi_transform([features[name] for name in self.in_features], boxes)
        losses = self.box_predictor.losses(self.box_predictor(pooled.mean(dim=(2, 3))), rois)
        # Boxes and masks share res5, so the features of the positives exist already.
        positives, is_positive = select_foreground_proposals(rois, self.num_classes)
        losses |= _mask_losses(self.mask_head, pooled[torch.cat(is_positive)], positives)
        return [], losses


@ROI_HEADS_REGISTRY.register()
class FusedCascadeROIHeads(_FusedHeads, CascadeROIHeads):
    """``CascadeROIHeads`` with the fused pooler; otherwise like :class:`FusedROIHeads`."""

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        for image, target in zip(proposals, targets, strict=True):
            overlaps = pairwise_iou(target.gt_boxes, image.proposal_boxes)
            nearest, labels = self.proposal_matchers[stage](overlaps)
            background = torch.full_like(nearest, self.num_classes)
            if len(target):
                image.gt_classes = torch.where(labels == 0, background, target.gt_classes[nearest])
                image.gt_boxes = target.gt_boxes[nearest]
            else:
                image.gt_classes = background
                image.gt_boxes = Boxes(torch.zeros_like(image.proposal_boxes.tensor))
        _log_sizes(proposals, self.num_classes, f"stage{stage}/roi_head")
        return proposals


def _log_sizes(rois: Iterable[Instances], num_classes: int, prefix: str) -> None:
    """Logs the mean numbers of positives and negatives per image."""
    labels = [i.gt_classes for i in rois]
    images = max(len(labels), 1)
    negatives = int(sum((classes == num_classes).sum() for classes in labels))
    positives = sum(len(classes) for classes in labels) - negatives
    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/num_fg_samples", positives / images)
    storage.put_scalar(f"{prefix}/num_bg_samples", negatives / images)


def _uses_stock_loss(head: nn.Module) -> bool:
    """Whether a mask head has detectron2's forward and no hooks, so that it can be bypassed.

    A forward may also be set on the object.
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
    """The arguments from detectron2's ``from_config``, with our poolers and box predictors."""
    cfg = complete(cfg)
    readable = CfgNode(cfg)  # a copy, which is not frozen
    for section in sorted(set(_POOLERS.values())):
        _check_type(section, cfg.MODEL[section].POOLER_TYPE)
        if cfg.MODEL[section].POOLER_TYPE not in ("", *_STOCK_TYPES, ROTATED):
            # detectron2 refuses types that only our pooler supports. Its pooler is replaced below.
            readable.MODEL[section].POOLER_TYPE = "ROIAlignV2"
    arguments = from_config(readable, input_shape)
    for name, section in _POOLERS.items():
        # Absent if the head is off, None if it works on the feature maps themselves.
        if isinstance(arguments.get(name), ROIPooler):
            arguments[name] = fused_pooler(arguments[name], cfg.MODEL[section].POOLER_TYPE)
    predictors = "box_predictors" if "box_predictors" in arguments else "box_predictor"
    arguments[predictors] = with_box_loss(arguments[predictors], cfg)
    return arguments


def _check_type(section: str, pooler_type: str) -> None:
    known = [*POOLER_TYPES, ROTATED]
    # Without a pooler, a mask or keypoint head works on the feature maps.
    if pooler_type in known or (pooler_type == "" and section != "ROI_BOX_HEAD"):
        return
    raise UserError(
        f"MODEL.{section}.POOLER_TYPE: unknown '{pooler_type}'; choose one of {', '.join(known)}"
        f"{did_you_mean(pooler_type, known)}"
    )
