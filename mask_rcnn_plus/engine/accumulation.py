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

from mask_rcnn_plus.engine.freezing import draws_or_counts

Part = Sequence[int]
"""The images of a part, as indices into the batch."""


@dataclass(frozen=True)
class Plan:
    """What a whole batch draws and counts, by its images."""

    side: tuple[int, int]
    """Height and width of the padded images, in pixels."""
    proposals: list[Instances]
    """The RoIs that train the heads, with what they are to learn but for masks, of which
    ``gt_object`` says whose each learns: copied for each RoI, those of a batch would be its memory.
    """
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
            drawn = [self.proposals[i] for i in part]

            def draw_rois(_: list[Instances], targets: list[Instances]) -> list[Instances]:
                return [_with_masks(*pair) for pair in zip(drawn, targets, strict=True)]

            stack.enter_context(_replaced(model.roi_heads, "label_and_sample_proposals", draw_rois))
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
    for name, module in draws_or_counts(model):
        if module.training and max(getattr(module, k, 0) or 0 for k in ("p", "drop_prob")) > 0:
            return f"{name} drops at random what another pass keeps"
    return ""


@torch.no_grad()
def make_plan(model: GeneralizedRCNN, batch: list[dict[str, Any]], parts: Sequence[Part]) -> Plan:
    """Draws for a whole batch as ``model`` of it would, in the memory of a part.

    It costs the forward pass of backbone and RPN once more. The maps of all images are kept
    meanwhile where the box head says what is counted: Cascade's later stages have as many RoIs as
    boxes stay in the image, and TRAIN_ON_PRED_BOXES as many keypoints as are in predicted boxes.

    Args:
        model: in training mode, without an :func:`obstacle`.
        batch: samples with "image", "instances", and "proposals" where there is no RPN.
        parts: of the batch, in which it will be computed; every image is in one.
    """
    shards = [[batch[i] for i in part] for part in parts]
    sides = [tuple(model.preprocess_image(shard).tensor.shape[-2:]) for shard in shards]
    side = max(height for height, _ in sides), max(width for _, width in sides)
    targets = [_without_masks(sample["instances"]).to(model.device) for sample in batch]
    heads = model.roi_heads
    cascade = isinstance(heads, CascadeROIHeads)
    moved = _keypoints_counted(heads) and getattr(heads, "train_on_pred_boxes", False)

    anchors, proposals, maps = None, [None] * len(batch), []
    if model.proposal_generator is None:
        proposals = [sample["proposals"].to(model.device) for sample in batch]
    if model.proposal_generator is not None or cascade or moved:
        drawing = _AnchorDraws(model.proposal_generator, targets)
        preprocess = _padding(model.preprocess_image, side)
        for part, shard in zip(parts, shards, strict=True):
            images = preprocess(shard)
            features = model.backbone(images.tensor)
            if cascade or moved:
                maps.append(features)
            if model.proposal_generator is not None:
                for i, found in zip(part, drawing.proposals(images, features), strict=True):
                    proposals[i] = found
        anchors = drawing.drawn
    sampled = heads.label_and_sample_proposals(proposals, targets)
    counts = _counts(heads, sampled)
    if moved:
        counts["loss_keypoint"] = _counts(heads, _moved(heads, maps, parts, sampled))[
            "loss_keypoint"
        ]
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
    if _keypoints_counted(heads):
        counts["loss_keypoint"] = [_visible(one) for one in positives]
    return counts


def _keypoints_counted(heads: ROIHeads) -> bool:
    """Whether the keypoint loss is a mean over visible keypoints."""
    return getattr(getattr(heads, "keypoint_head", None), "loss_normalizer", None) == "visible"


def _moved(
    heads: ROIHeads,
    maps: list[dict[str, Tensor]],
    parts: Sequence[Part],
    sampled: list[Instances],
) -> list[Instances]:
    """The RoIs with the boxes that the box head predicts for them."""
    result = [Instances(one.image_size, **one.get_fields()) for one in sampled]
    for part, features in zip(parts, maps, strict=True):
        heads._forward_box(features, [result[i] for i in part])  # puts them in place
    return result


def _without_masks(objects: Instances) -> Instances:
    """The objects without masks, which no draw asks for, but with their numbers."""
    fields = {name: of for name, of in objects.get_fields().items() if name != "gt_masks"}
    return Instances(objects.image_size, **fields, gt_object=torch.arange(len(objects)))


def _with_masks(rois: Instances, objects: Instances) -> Instances:
    """RoIs with the masks that each is to learn."""
    fields = rois.get_fields()
    of = fields.get("gt_object")
    if of is None or not objects.has("gt_masks"):
        return rois
    fields = {name: value for name, value in fields.items() if name != "gt_object"}
    return Instances(rois.image_size, **fields, gt_masks=objects.gt_masks[of])


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
