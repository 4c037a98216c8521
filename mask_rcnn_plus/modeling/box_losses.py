"""A box predictor with one wait for the device, and losses that weight classes or hard RoIs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from mask_rcnn_plus.errors import UserError


class LeanOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that waits for the device once instead of six times.

    Parameters, predictions, losses and logged metrics are the same, unless ``loss_cls`` is to
    weight classes or RoIs.
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
            input_shape: as ``FastRCNNOutputLayers``.
            focal_gamma: 0 or more; 0 is the cross entropy.
            class_weights: one per class in the order of their ids, or K + 1 with the background;
                empty for 1 each.
            arguments: as ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **arguments)
        self._gamma = focal_gamma
        self._is_weighted = bool(focal_gamma) or len(class_weights) > 0
        weights = list(class_weights) or [1.0] * self.num_classes
        weights += [1.0] * (self.num_classes + 1 - len(weights))
        # Not in checkpoints, since the config sets it.
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
        losses = {
            "loss_cls": self._classification_loss(scores, labels),
            "loss_box_reg": self.box_reg_loss(boxes, target_boxes, deltas, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _classification_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self._is_weighted or not labels.numel():
            return weighted_loss(scores, labels, self._weights, gamma=self._gamma)
        return F.cross_entropy(scores, labels)


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
        # Clamped, since at p = 1 a power below 1 has an infinite gradient.
        loss = loss * (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps) ** gamma
    return loss.mean()


def with_box_loss(predictors: Any, cfg: CfgNode) -> Any:
    """Box predictors with the loss from a config.

    Args:
        predictors: detectron2's ``FastRCNNOutputLayers``, or a list of them (Cascade).
        cfg: the keys LOSS_CLS, FOCAL_GAMMA and CLASS_WEIGHTS of MODEL.ROI_BOX_HEAD are read.

    Returns:
        new predictors with the same weights; the same objects if the config keeps the default loss
        and they are of another class, or use another loss of detectron2's main branch.

    Raises:
        UserError: the numbers of weights and classes differ, fewer than two weights are above 0, or
            a loss of detectron2's main branch is chosen too.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    plain = head.LOSS_CLS == "cross_entropy" and not head.CLASS_WEIGHTS
    several = isinstance(predictors, list | nn.ModuleList)
    custom = any(
        type(p) is not FastRCNNOutputLayers for p in (predictors if several else [predictors])
    )
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
    # The random first weights of the new predictors are overwritten, and must not change the draws
    # of later layers.
    with torch.random.fork_rng(devices=[]):
        if several:
            return [_lean(p, gamma, head.CLASS_WEIGHTS) for p in predictors]
        return _lean(predictors, gamma, head.CLASS_WEIGHTS)


def _lean(
    predictor: FastRCNNOutputLayers, gamma: float, weights: Sequence[float]
) -> LeanOutputLayers:
    new = LeanOutputLayers(
        predictor.cls_score.in_features,
        focal_gamma=gamma,
        class_weights=weights,
        box2box_transform=predictor.box2box_transform,
        num_classes=predictor.num_classes,
        test_score_thresh=predictor.test_score_thresh,
        test_nms_thresh=predictor.test_nms_thresh,
        test_topk_per_image=predictor.test_topk_per_image,
        cls_agnostic_bbox_reg=(
            predictor.bbox_pred.out_features == len(predictor.box2box_transform.weights)
        ),
        smooth_l1_beta=predictor.smooth_l1_beta,
        box_reg_loss_type=predictor.box_reg_loss_type,
        loss_weight=predictor.loss_weight,
    )
    new.load_state_dict(predictor.state_dict())
    return new
