"""What RoIs are to learn, with one wait for the device an image fewer than in detectron2.

Matching and sampling are detectron2's, with its draws, RoIs and figures: only the figures for the
log are asked of the device together, instead of image by image. What is left are the waits for how
many RoIs there are.
"""

from collections.abc import Iterable

import torch
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import CascadeROIHeads, ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor


class SampledRoIs(ROIHeads):
    """``ROIHeads`` whose ``label_and_sample_proposals`` waits for its figures once."""

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        Args:
            proposals: N, with ``proposal_boxes`` in input-image pixels and ``objectness_logits``.
            targets: N, with ``gt_boxes``, ``gt_classes`` and whatever else begins with "gt_".

        Returns:
            N, each ``MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE`` proposals or fewer, positives first,
            with ``gt_classes`` (K for the background) and, where the image has objects, the
            fields of the object that each overlaps most.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled = []
        for found, truth in zip(proposals, targets, strict=True):
            overlaps = pairwise_iou(truth.gt_boxes, found.proposal_boxes)
            nearest, labels = self.proposal_matcher(overlaps)
            chosen, classes = self._sample_proposals(nearest, labels, truth.gt_classes)
            rois = found[chosen]
            rois.gt_classes = classes
            if len(truth):
                of = nearest[chosen]
                for name, value in truth.get_fields().items():
                    if name.startswith("gt_") and not rois.has(name):
                        rois.set(name, value[of])
            sampled.append(rois)
        _log_sizes(sampled, self.num_classes, "roi_head")
        return sampled


class LabelledStages(CascadeROIHeads):
    """``CascadeROIHeads`` whose later stages wait for their figures once."""

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        for boxes, truth in zip(proposals, targets, strict=True):
            overlaps = pairwise_iou(truth.gt_boxes, boxes.proposal_boxes)
            nearest, labels = self.proposal_matchers[stage](overlaps)
            if len(truth):
                background = torch.full_like(nearest, self.num_classes)
                boxes.gt_classes = torch.where(labels == 0, background, truth.gt_classes[nearest])
                boxes.gt_boxes = truth.gt_boxes[nearest]
            else:
                boxes.gt_classes = torch.full_like(nearest, self.num_classes)
                boxes.gt_boxes = Boxes(torch.zeros_like(boxes.proposal_boxes.tensor))
        _log_sizes(proposals, self.num_classes, f"stage{stage}/roi_head")
        return proposals


def _log_sizes(rois: Iterable[Instances], num_classes: int, prefix: str) -> None:
    """Puts down how many positives and negatives an image has on average."""
    labels: list[Tensor] = [one.gt_classes for one in rois]
    images = max(len(labels), 1)
    negatives = int(sum((of == num_classes).sum() for of in labels))
    positives = sum(len(of) for of in labels) - negatives
    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/num_fg_samples", positives / images)
    storage.put_scalar(f"{prefix}/num_bg_samples", negatives / images)
