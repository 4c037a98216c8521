"""Box predictors with one wait for the device, and losses that weigh classes or hard RoIs."""

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
    """``FastRCNNOutputLayers`` that asks the device for its figures once instead of six times.

    Parameters, predictions, losses and figures are the same, apart from a ``loss_cls`` that is to
    weigh classes or RoIs.
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
            class_weights: of K classes in the order of their ids, or of those and the background;
                none for 1 each.
            arguments: as ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **arguments)
        self._gamma = focal_gamma
        self._weighs = bool(focal_gamma) or len(class_weights) > 0
        weights = list(class_weights) or [1.0] * self.num_classes
        weights += [1.0] * (self.num_classes + 1 - len(weights))
        # Not in checkpoints: it is the config's.
        self.register_buffer("_weights", torch.tensor(weights), persistent=False)

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Any]) -> dict[str, Tensor]:
        """
        Args:
            predictions: logits (R, K + 1), the background last, and box deltas (R, 4 K) or (R, 4).
            proposals: R in all, with ``proposal_boxes``, ``gt_classes`` and, where an image has
                objects, ``gt_boxes``, in input-image pixels.

        Returns:
            "loss_cls", as :func:`weighed_loss`, and "loss_box_reg", a sum over positives divided
            by R.
        """
        scores, deltas = predictions
        labels = _joined([one.gt_classes for one in proposals], scores.new_zeros(0).long())
        boxes = _joined([one.proposal_boxes.tensor for one in proposals], deltas.new_zeros(0, 4))
        # An image without objects has no boxes to reach, and negatives alone, which reach for none.
        truth = [one.gt_boxes if one.has("gt_boxes") else one.proposal_boxes for one in proposals]
        reached = _joined([of.tensor for of in truth], boxes)
        _log_accuracy(scores.detach(), labels)
        losses = {
            "loss_cls": self._classification_loss(scores, labels),
            "loss_box_reg": self.box_reg_loss(boxes, reached, deltas, labels),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _classification_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self._weighs or not labels.numel():
            return weighed_loss(scores, labels, self._weights, gamma=self._gamma)
        return F.cross_entropy(scores, labels)


def _joined(tensors: list[Tensor], none: Tensor) -> Tensor:
    return torch.cat(tensors) if tensors else none


def _log_accuracy(scores: Tensor, labels: Tensor) -> None:
    """detectron2's figures of a classification, of one transfer to the host."""
    if not labels.numel():
        return
    background = scores.shape[1] - 1
    predicted = scores.argmax(dim=1)
    positive = (labels >= 0) & (labels < background)
    right = predicted == labels
    counts = [positive, right, positive & right, positive & (predicted == background)]
    positives, rights, found, missed = torch.stack(counts).sum(dim=1).tolist()
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", rights / labels.numel())
    if positives:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", found / positives)
        storage.put_scalar("fast_rcnn/false_negative", missed / positives)


def weighed_loss(scores: Tensor, labels: Tensor, weights: Tensor, *, gamma: float) -> Tensor:
    """The mean over RoIs of w_c (1 - p_c)^gamma (-log p_c), c the RoI's class.

    The mean is over all RoIs, whatever their weights: with weights of 1 and gamma 0 it is the cross
    entropy, and a class of weight 2 counts as if each of its RoIs were there twice.

    Args:
        scores: (R, K + 1) logits, the background last.
        labels: (R,) class ids, K for the background.
        weights: (K + 1,), 0 or more.
        gamma: 0 or more (arXiv:1708.02002, equation 4, with a softmax for the sigmoid).

    Returns:
        a scalar; 0 with a graph where there is no RoI.
    """
    if labels.numel() == 0:
        return scores.sum() * 0
    log_p = F.log_softmax(scores.float(), dim=1).gather(1, labels[:, None])[:, 0]
    loss = -weights[labels] * log_p
    if gamma:
        # Away from p = 1, where a power below 1 has no slope.
        loss = loss * (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps) ** gamma
    return loss.mean()


def with_box_loss(predictors: Any, cfg: CfgNode) -> Any:
    """Box predictors with the loss that a config asks for.

    Args:
        predictors: detectron2's ``FastRCNNOutputLayers``, or a list of them (Cascade).
        cfg: its LOSS_CLS, FOCAL_GAMMA and CLASS_WEIGHTS of MODEL.ROI_BOX_HEAD count.

    Returns:
        new ones with the same weights; the same objects where they have a loss of their own and
        the config asks for none.

    Raises:
        UserError: the number of weights is not that of the classes, all but one are 0, or
            detectron2's main branch is to use another loss.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    plain = head.LOSS_CLS == "cross_entropy" and not head.CLASS_WEIGHTS
    several = isinstance(predictors, list | nn.ModuleList)
    own = any(
        type(one) is not FastRCNNOutputLayers for one in (predictors if several else [predictors])
    )
    other_losses = [key for key in ("USE_FED_LOSS", "USE_SIGMOID_CE") if head.get(key)]
    if plain and (own or other_losses):
        return predictors
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(head.CLASS_WEIGHTS) not in (0, classes, classes + 1):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS has {len(head.CLASS_WEIGHTS)} values, and there are "
            f"{classes} classes: give one a class, or one more for the background"
        )
    background = 1 if len(head.CLASS_WEIGHTS) == classes else 0
    if head.CLASS_WEIGHTS and sum(w > 0 for w in head.CLASS_WEIGHTS) + background < 2:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS {list(head.CLASS_WEIGHTS)} leaves fewer than two "
            "classes, the background being one, to tell apart: give two or more a weight above 0"
        )
    if other_losses:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.{other_losses[0]} and LOSS_CLS or CLASS_WEIGHTS are different "
            "losses: set one of them"
        )
    gamma = head.FOCAL_GAMMA if head.LOSS_CLS == "focal" else 0.0
    # Its first weights are those of the one that it replaces: no draw is to be missing for others.
    with torch.random.fork_rng(devices=[]):
        if several:
            return [_lean(one, gamma, head.CLASS_WEIGHTS) for one in predictors]
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
