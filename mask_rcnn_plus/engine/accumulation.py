"""What the parts of a batch have to know of each other for their gradients to add up to its own.

Two things tie the images of a batch together. Random draws come from one stream, first the anchors
of all images and then their proposals, so that parts which draw one after the other draw otherwise.
And losses are means over RoIs, whose number differs between parts. Both are known once every image
has its proposals: a pass without gradients draws for the whole batch and counts, and the parts
then compute with that.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, ROIHeads, select_foreground_proposals
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Part = Sequence[int]
"""The images of a part, as indices into the batch."""


@dataclass(frozen=True)
class Plan:
    """What a whole batch draws and counts, by its images."""

    side: tuple[int, int]
    """Height and width of the padded images, in pixels."""
    proposals: list[Instances]
    """The RoIs that train the heads, with what they are to learn."""
    anchors: tuple[list[Tensor], list[Tensor]] | None = None
    """``RPN.label_and_sample_anchors`` of all images; None without an RPN."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Over how many RoIs, or keypoints, a loss is a mean; a loss that is not here is one over
    images."""

    def weight(self, loss: str, part: Part) -> float:
        """What a part's loss counts for in the loss of the batch."""
        counts = self.counts.get(loss)
        if counts is None or not sum(counts):
            return len(part) / len(self.proposals)
        return sum(counts[i] for i in part) / sum(counts)

    @contextmanager
    def followed(self, model: GeneralizedRCNN, part: Part) -> Iterator[None]:
        """In it, ``model`` of a part's samples computes what ``model`` of the batch would."""
        with ExitStack() as stack:
            preprocess = _padding(model.preprocess_image, self.side)
            stack.enter_context(_replaced(model, "preprocess_image", preprocess))
            if self.anchors is not None:
                labels, boxes = ([of[i] for i in part] for of in self.anchors)
                rpn = model.proposal_generator
                draw = _returning((labels, boxes))
                stack.enter_context(_replaced(rpn, "label_and_sample_anchors", draw))
            draw = _returning([self.proposals[i] for i in part])
            stack.enter_context(_replaced(model.roi_heads, "label_and_sample_proposals", draw))
            yield


def obstacle(model: nn.Module) -> str:
    """Why the parts of a batch cannot add up to it; "" where they can."""
    if not isinstance(model, GeneralizedRCNN) or type(model).forward is not GeneralizedRCNN.forward:
        return f"{type(model).__name__} is not detectron2's GeneralizedRCNN"
    rpn = model.proposal_generator
    if rpn is not None and (not isinstance(rpn, RPN) or type(rpn).forward is not RPN.forward):
        return f"{type(rpn).__name__} is not detectron2's RPN"
    if not isinstance(model.roi_heads, ROIHeads):
        return f"{type(model.roi_heads).__name__} are not detectron2's ROIHeads"
    if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        return "batch norm takes the statistics of one part"
    return ""


@torch.no_grad()
def make_plan(model: GeneralizedRCNN, batch: list[dict[str, Any]], parts: Sequence[Part]) -> Plan:
    """Draws for a whole batch as ``model`` of it would, in the memory of a part.

    It costs the forward pass of backbone and RPN once more; the maps of Cascade's images are kept
    meanwhile, whose later stages have as many RoIs as their boxes leave.

    Args:
        model: in training mode, without an :func:`obstacle`.
        batch: samples with "image", "instances", and "proposals" where there is no RPN.
        parts: of the batch, in which it will be computed; every image is in one.
    """
    shards = [[batch[i] for i in part] for part in parts]
    sides = [tuple(model.preprocess_image(shard).tensor.shape[-2:]) for shard in shards]
    side = max(height for height, _ in sides), max(width for _, width in sides)
    targets = [sample["instances"].to(model.device) for sample in batch]
    heads = model.roi_heads
    cascade = isinstance(heads, CascadeROIHeads)

    anchors, proposals, maps = None, [None] * len(batch), []
    if model.proposal_generator is None:
        proposals = [sample["proposals"].to(model.device) for sample in batch]
    if model.proposal_generator is not None or cascade:
        drawing = _AnchorDraws(model.proposal_generator, targets)
        preprocess = _padding(model.preprocess_image, side)
        for part, shard in zip(parts, shards, strict=True):
            images = preprocess(shard)
            features = model.backbone(images.tensor)
            if cascade:
                maps.append(features)
            if model.proposal_generator is not None:
                for i, found in zip(part, drawing.proposals(images, features), strict=True):
                    proposals[i] = found
        anchors = drawing.drawn
    sampled = heads.label_and_sample_proposals(proposals, targets)
    counts = _counts(heads, sampled)
    if cascade:
        counts |= _stage_counts(heads, maps, parts, sampled, targets)
    return Plan(side=side, proposals=sampled, anchors=anchors, counts=counts)


class _AnchorDraws:
    """An RPN's proposals part by part, and the anchors that the whole batch draws.

    Anchors are drawn by the ground truth and the sizes of maps alone, of which all parts have the
    same: so the first part draws for all.
    """

    def __init__(self, rpn: RPN | None, targets: list[Instances]) -> None:
        self._rpn = rpn
        self._targets = targets
        self.drawn: tuple[list[Tensor], list[Tensor]] | None = None

    def proposals(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        rpn = self._rpn
        draw = rpn.label_and_sample_anchors

        def draw_once(anchors: list[Any], targets: list[Instances]) -> tuple[list, list]:
            if self.drawn is None:
                self.drawn = draw(anchors, self._targets)
            return [], []

        with (
            _replaced(rpn, "label_and_sample_anchors", draw_once),
            _replaced(rpn, "losses", _returning({})),
        ):
            return rpn(images, features, self._targets)[0]


def _counts(heads: ROIHeads, sampled: list[Instances]) -> dict[str, list[int]]:
    rois = [len(one) for one in sampled]
    positives, _ = select_foreground_proposals(sampled, heads.num_classes)
    counts = {
        "loss_cls": rois,
        "loss_box_reg": rois,
        "loss_mask": [len(one) for one in positives],
    }
    keypoint_head = getattr(heads, "keypoint_head", None)
    if getattr(keypoint_head, "loss_normalizer", None) == "visible":
        counts["loss_keypoint"] = [_visible(one) for one in positives]
    return counts


def _visible(positives: Instances) -> int:
    """How many keypoints of an image's positives are marked and inside their RoI."""
    if not len(positives):
        return 0
    # Of any side: inside is inside.
    _, valid = positives.gt_keypoints.to_heatmap(positives.proposal_boxes.tensor, 56)
    return int(valid.sum())


def _stage_counts(
    heads: CascadeROIHeads,
    maps: list[dict[str, Tensor]],
    parts: Sequence[Part],
    sampled: list[Instances],
    targets: list[Instances],
) -> dict[str, list[int]]:
    """How many RoIs each stage has: boxes that a stage moves out of the image leave the next."""
    rois = [[0] * len(sampled) for _ in range(heads.num_cascade_stages)]
    match = heads._match_and_label_boxes
    for part, features in zip(parts, maps, strict=True):

        def match_and_count(
            proposals: list[Instances], stage: int, of: list[Instances], part: Part = part
        ) -> list[Instances]:
            for i, one in zip(part, proposals, strict=True):
                rois[stage][i] = len(one)
            return match(proposals, stage, of)

        with _replaced(heads, "_match_and_label_boxes", match_and_count):
            heads._forward_box(features, [sampled[i] for i in part], [targets[i] for i in part])
    rois[0] = [len(one) for one in sampled]
    return {
        f"{loss}_stage{stage}": counts
        for stage, counts in enumerate(rois)
        for loss in ("loss_cls", "loss_box_reg")
    }


def _padding(preprocess: Any, side: tuple[int, int]) -> Any:
    """The same ``preprocess_image``, whose batches are padded to a side."""

    def padded(samples: list[dict[str, Any]]) -> ImageList:
        images = preprocess(samples)
        height, width = images.tensor.shape[-2:]
        if (height, width) == side:
            return images
        missing = (0, side[1] - width, 0, side[0] - height)
        return ImageList(nn.functional.pad(images.tensor, missing), images.image_sizes)

    return padded


def _returning(value: Any) -> Any:
    return lambda *_: value


@contextmanager
def _replaced(module: nn.Module, name: str, method: Any) -> Iterator[None]:
    """In it, an instance has another method than its class."""
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
