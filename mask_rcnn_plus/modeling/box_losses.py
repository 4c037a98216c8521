"""A box predictor with one wait for the device, and losses that weight classes or hard RoIs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from mask_rcnn_plus.config import complete
from mask_rcnn_plus.errors import UserError

# Constructor arguments of FastRCNNOutputLayers that are also its attributes.
_SETTINGS = (
    "box2box_transform",
    "num_classes",
    "test_score_thresh",
    "test_nms_thresh",
    "test_topk_per_image",
    "smooth_l1_beta",
    "box_reg_loss_type",
    "loss_weight",
)


class LeanOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that waits for the device once instead of six times.

    Parameters, predictions, losses and logged metrics are the same, unless the arguments weight
    classes or RoIs.
    """

    def __init__(
        self,
        input_shape: Any,
        *,
        focal_gamma: float = 0.0,
        class_weights: Sequence[float] = (),
        **arguments: Any,
    ) -> None:
        """
        Args:
            focal_gamma: 0 or more; 0 is the cross-entropy.
            class_weights: K in the order of class ids, or K + 1 with the background; empty for 1
                each.
            input_shape, arguments: as for ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **arguments)
        self._gamma = focal_gamma
        self._is_weighted = bool(focal_gamma) or len(class_weights) > 0
        weights = list(class_weights) or [1.0] * self.num_classes
        weights += [1.0] * (self.num_classes + 1 - len(weights))
        # Not saved in checkpoints, since the config sets it.
        self.register_buffer("_weights", torch.tensor(weights), persistent=False)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Any]) -> dict[str, Tensor]:
        """
        Args:
            predictions: logits (R, K + 1), the background last, and box deltas (R, 4 K) or (R, 4).
            proposals: R in all, with ``proposal_boxes``, ``gt_classes`` and, where an image has
                objects, ``gt_boxes``, in input-image pixels.

        Returns:
            "loss_cls", as :func:`weighted_loss`, and "loss_box_reg", a sum over positives divided
            by R.
        """
        scores, deltas = predictions
        labels = _cat([i.gt_classes for i in proposals], scores.new_zeros(0).long())
        boxes = _cat([i.proposal_boxes.tensor for i in proposals], deltas.new_zeros(0, 4))
        # An image without objects has no gt_boxes, but it has no positives that would need them.
        target = [i.gt_boxes if i.has("gt_boxes") else i.proposal_boxes for i in proposals]
        target_boxes = _cat([i.tensor for i in target], boxes)
        _log_accuracy(scores.detach(), labels)
        if self._is_weighted or not labels.numel():
            classification = weighted_loss(scores, labels, self._weights, gamma=self._gamma)
        else:
            classification = F.cross_entropy(scores, labels)
        losses = {
            "loss_cls": classification,
            "loss_box_reg": self.box_reg_loss(boxes, target_boxes, deltas, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}


def _cat(tensors: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(tensors) if tensors else empty


def _log_accuracy(scores: Tensor, labels: Tensor) -> None:
    """Logs detectron2's metrics of the classification, with one transfer from the device."""
    if not labels.numel():
        return
    background = scores.shape[1] - 1
    predicted = scores.argmax(dim=1)
    positive = (labels >= 0) & (labels < background)
    correct = predicted == labels
    counts = [positive, correct, positive & correct, positive & (predicted == background)]
    num_positive, num_correct, detected, missed = torch.stack(counts).sum(dim=1).tolist()
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", num_correct / labels.numel())
    if num_positive:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", detected / num_positive)
        storage.put_scalar("fast_rcnn/false_negative", missed / num_positive)


def weighted_loss(scores: Tensor, labels: Tensor, weights: Tensor, *, gamma: float) -> Tensor:
    """The mean over RoIs of w_c (1 - p_c)^gamma (-log p_c), where c is the RoI's class.

    The mean is over the number of RoIs, not the sum of weights: with weights of 1 and gamma 0 it is
    the cross-entropy, and a class of weight 2 contributes twice as much.

    Args:
        scores: (R, K + 1) logits, the background last.
        labels: (R,) class ids, K for the background.
        weights: (K + 1,), 0 or more.
        gamma: 0 or more (arXiv:1708.02002, equation 4, with softmax instead of sigmoid).

    Returns:
        a scalar; without RoIs 0, connected to the graph.
    """
    if labels.numel() == 0:
        return scores.sum() * 0
    log_p = F.log_softmax(scores.float(), dim=1).gather(1, labels[:, None])[:, 0]
    loss = -weights[labels] * log_p
    if gamma:
        # The clamp is needed because at p = 1 a power below 1 has an infinite gradient.
        loss = loss * (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps) ** gamma
    return loss.mean()


def with_box_loss(predictors: Any, cfg: CfgNode) -> Any:
    """Box predictors with the loss from a config.

    Args:
        predictors: detectron2's ``FastRCNNOutputLayers``, or a list of them (Cascade).
        cfg: the keys LOSS_CLS, FOCAL_GAMMA and CLASS_WEIGHTS of MODEL.ROI_BOX_HEAD are read.

    Returns:
        new predictors with the same weights; or the same objects if the config keeps the default
        loss, and they have another class or use another loss of detectron2's main branch.

    Raises:
        UserError: the numbers of weights and classes differ, fewer than two weights are above 0, or
            a loss of detectron2's main branch is chosen too.
    """
    head = complete(cfg).MODEL.ROI_BOX_HEAD
    plain = head.LOSS_CLS == "cross_entropy" and not head.CLASS_WEIGHTS
    is_cascade = isinstance(predictors, list | nn.ModuleList)
    stock = list(predictors) if is_cascade else [predictors]
    custom = any(type(p) is not FastRCNNOutputLayers for p in stock)
    other_losses = [key for key in ("USE_FED_LOSS", "USE_SIGMOID_CE") if head.get(key)]
    if plain and (custom or other_losses):
        return predictors
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(head.CLASS_WEIGHTS) not in (0, classes, classes + 1):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS has {len(head.CLASS_WEIGHTS)} values for {classes} "
            "classes: expected one per class, and optionally one for the background"
        )
    background = 1 if len(head.CLASS_WEIGHTS) == classes else 0
    if head.CLASS_WEIGHTS and sum(w > 0 for w in head.CLASS_WEIGHTS) + background < 2:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS {list(head.CLASS_WEIGHTS)}: at least two classes, "
            "counting the background, need a weight above 0"
        )
    if other_losses:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.{other_losses[0]} excludes LOSS_CLS and CLASS_WEIGHTS: set only "
            "one of them"
        )
    gamma = head.FOCAL_GAMMA if head.LOSS_CLS == "focal" else 0.0
    # The initial weights are overwritten, so their draws must not change those of later layers.
    with torch.random.fork_rng(devices=[]):
        lean = [_lean(p, gamma, head.CLASS_WEIGHTS) for p in stock]
    return lean if is_cascade else lean[0]


def _lean(
    predictor: FastRCNNOutputLayers, gamma: float, weights: Sequence[float]
) -> LeanOutputLayers:
    box_size = len(predictor.box2box_transform.weights)
    new = LeanOutputLayers(
        predictor.cls_score.in_features,
        focal_gamma=gamma,
        class_weights=weights,
        cls_agnostic_bbox_reg=predictor.bbox_pred.out_features == box_size,
        **{name: getattr(predictor, name) for name in _SETTINGS},
    )
    new.load_state_dict(predictor.state_dict())
    return new
