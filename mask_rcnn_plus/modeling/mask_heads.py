"""The mask heads of Mask R-CNN's tables 2b (softmax) and 2e (fully connected), and mask losses."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.config import complete
from mask_rcnn_plus.errors import UserError


@ROI_MASK_HEAD_REGISTRY.register()
class MLPMaskHead(BaseMaskRCNNHead):
    """Fully connected layers from a RoI's features to its masks.

    Losses and inference are detectron2's: a sigmoid per pixel, and the mask of the RoI's class.
    Mask R-CNN, table 2e, compares 1024-1024-80*28^2 and 1024-1024-1024-80*28^2.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        fc_dims: Sequence[int],
        output_resolution: int,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: channels, height and width of a RoI's features.
            num_classes: masks per RoI, K; 1 for class-agnostic masks.
            fc_dims: the width of each layer before the last.
            output_resolution: side of a mask, M.
            kwargs: as for detectron2's ``BaseMaskRCNNHead``.
        """
        super().__init__(**kwargs)
        self._input = (input_shape.channels, input_shape.height, input_shape.width)
        self._output = (num_classes, output_resolution, output_resolution)
        width = math.prod(self._input)
        self.fcs = []
        for number, dim in enumerate(fc_dims, 1):
            layer = nn.Linear(width, dim)
            weight_init.c2_xavier_fill(layer)
            self.add_module(f"mask_fc{number}", layer)
            self.fcs.append(layer)
            width = dim
        self.predictor = nn.Linear(width, math.prod(self._output))
        # As in detectron2's convolutional head, the first masks are close to 0.5 everywhere.
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = complete(cfg).MODEL.ROI_MASK_HEAD
        for key, minimum in (("NUM_FC", 0), ("FC_DIM", 1), ("OUTPUT_RESOLUTION", 1)):
            if head.MLP[key] < minimum:
                raise UserError(
                    f"MODEL.ROI_MASK_HEAD.MLP.{key} must be at least {minimum}, got {head.MLP[key]}"
                )
        if not isinstance(input_shape, ShapeSpec):
            raise UserError("MLPMaskHead needs RoIs: set a MODEL.ROI_MASK_HEAD.POOLER_TYPE")
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "fc_dims": [head.MLP.FC_DIM] * head.MLP.NUM_FC,
            "output_resolution": head.MLP.OUTPUT_RESOLUTION,
        }

    def layers(self, x: Tensor) -> Tensor:
        """
        Args:
            x: features (R, C, height, width) of the shape that the head was built for.

        Returns:
            mask logits (R, K, M, M).

        Raises:
            UserError: the features have another shape.
        """
        if x.shape[1:] != self._input:
            expected, got = (" x ".join(map(str, s)) for s in (self._input, x.shape[1:]))
            raise UserError(
                f"MLPMaskHead was built for RoIs of {expected}, got {got}: C4's res5 halves them "
                "after pooling; use FusedROIHeads or a convolutional mask head"
            )
        x = x.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return self.predictor(x).view(len(x), *self._output)


@ROI_MASK_HEAD_REGISTRY.register()
class SoftmaxMaskHead(MaskRCNNConvUpsampleHead):
    """detectron2's convolutional mask head with a softmax over the classes of each pixel.

    The layers and their names are those of ``MaskRCNNConvUpsampleHead``. The predictor has one more
    channel, the last, for the background. With ``CLS_AGNOSTIC_MASK`` there are two: object and
    background.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        arguments["num_classes"] += 1
        return arguments

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """
        Args:
            x: features (R, C, P, P) of the RoIs of all images, one image after the other.
            instances: one per image, R boxes in all. In training, positives with
                ``proposal_boxes``, ``gt_classes`` and ``gt_masks``; else with ``pred_classes``.

        Returns:
            in training ``{"loss_mask": loss}``; else the instances with ``pred_masks``
            (R_i, 1, M, M), from 0 to 1: p / (p + q), with p the probability of the predicted class
            and q the largest other one. It is above 0.5, detectron2's threshold for masks, where
            the predicted class is the pixel's most probable class.
        """
        logits = self.layers(x)
        if self.training:
            loss = softmax_mask_loss(logits, instances, vis_period=self.vis_period)
            return {"loss_mask": loss * self.loss_weight}
        classes = torch.cat([i.pred_classes for i in instances])
        mask_rcnn_inference(_margin_to_rival(logits, classes), instances)
        return instances


def mask_loss(logits: Tensor, instances: list[Instances], *, vis_period: int = 0) -> Tensor:
    """Binary cross-entropy per pixel of the ground-truth class's mask (Mask R-CNN, section 3).

    It has the value and the logged metrics of detectron2's ``mask_rcnn_loss``, but waits once for
    the device instead of four times.

    Args:
        logits: (R, K, M, M), or (R, 1, M, M) for class-agnostic masks.
        instances: positives, one ``Instances`` per image, R in all, with ``proposal_boxes`` in
            input-image pixels, ``gt_classes`` and ``gt_masks``.
        vis_period: iterations between two sets of images, prediction beside target; 0 for none.

    Returns:
        the loss; without RoIs 0, connected to the graph.
    """
    with_objects = [i for i in instances if len(i)]
    if not with_objects:
        return logits.sum() * 0
    target = _crop_masks(with_objects, logits)
    if logits.shape[1] == 1:
        chosen = logits[:, 0]
    else:
        classes = torch.cat([i.gt_classes for i in with_objects]).long()
        chosen = logits[torch.arange(len(classes), device=logits.device), classes]
    inside = _to_bool(target)
    wrong = (chosen.detach() > 0) != inside
    counts = [wrong.sum(), inside.sum(), (wrong & ~inside).sum(), (wrong & inside).sum()]
    num_wrong, positive, false_positive, false_negative = torch.stack(counts).tolist()
    pixels = wrong.numel()
    metrics = {
        "accuracy": 1 - num_wrong / max(pixels, 1.0),
        "false_positive": false_positive / max(pixels - positive, 1.0),
        "false_negative": false_negative / max(positive, 1.0),
    }
    if _log(metrics, vis_period):
        _draw(chosen.detach().sigmoid(), inside)
    return F.binary_cross_entropy_with_logits(chosen, target.to(torch.float32))


def softmax_mask_loss(logits: Tensor, instances: list[Instances], *, vis_period: int = 0) -> Tensor:
    """Mean cross-entropy per pixel (Mask R-CNN, section 4.2, "Multinomial vs. Independent Masks").

    The target is the RoI's class inside the ground-truth mask (cropped to the RoI) and background
    elsewhere. It logs detectron2's ``mask_rcnn/`` metrics; a pixel counts as predicted where the
    RoI's class is its most probable class.

    Args:
        logits: (R, K + 1, M, M), background last; K is 1 for class-agnostic masks.
        instances, vis_period: as in :func:`mask_loss`.

    Returns:
        the loss; without RoIs 0, connected to the graph.
    """
    with_objects = [i for i in instances if len(i)]
    if not with_objects:
        return logits.sum() * 0
    inside = _to_bool(_crop_masks(with_objects, logits))
    classes = torch.cat([i.gt_classes for i in with_objects]).long()
    if logits.shape[1] == 2:
        classes = torch.zeros_like(classes)
    target = torch.where(inside, classes[:, None, None], logits.shape[1] - 1)
    masks = _margin_to_rival(logits.detach(), classes)[:, 0].sigmoid()
    wrong = (masks > 0.5) != inside
    rates = {
        "accuracy": (~wrong).sum() / wrong.numel(),
        "false_positive": (wrong & ~inside).sum() / (~inside).sum().clamp(min=1),
        "false_negative": (wrong & inside).sum() / inside.sum().clamp(min=1),
    }
    # One transfer from the device instead of one per metric.
    values = torch.stack([rate.float() for rate in rates.values()]).tolist()
    if _log(dict(zip(rates, values, strict=True)), vis_period):
        _draw(masks, inside)
    # Pixels as rows: for maps, torch's loss is not deterministic on CUDA. In channels_last, maps
    # already are rows.
    return F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), target.flatten())


def _crop_masks(instances: list[Instances], logits: Tensor) -> Tensor:
    """The ground-truth masks inside the RoIs: (R, M, M), on the device of the logits.

    Polygons are drawn on the CPU, which waits for the boxes.
    """
    side = logits.shape[-1]
    masks = [i.gt_masks.crop_and_resize(i.proposal_boxes.tensor, side) for i in instances]
    return torch.cat([mask.to(logits.device) for mask in masks])


def _to_bool(masks: Tensor) -> Tensor:
    return masks > 0.5 if masks.is_floating_point() else masks.bool()


def _margin_to_rival(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of p_k / (p_k + q), for each RoI's class k and the largest other probability q.

    A softmax assigns a pixel to its most probable class, whose p_k may be far below 0.5.
    (R, K + 1, M, M) to (R, 1, M, M).
    """
    if logits.shape[1] == 2:
        classes = torch.zeros_like(classes)
    index = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    own = logits.gather(1, index)
    rival = logits.scatter(1, index, float("-inf")).amax(dim=1, keepdim=True)
    return own - rival


def _log(metrics: dict[str, float], vis_period: int) -> bool:
    """Logs the metrics; returns whether this iteration shows images."""
    storage = get_event_storage()
    for name, value in metrics.items():
        storage.put_scalar(f"mask_rcnn/{name}", value)
    return vis_period > 0 and storage.iter % vis_period == 0


def _draw(masks: Tensor, inside: Tensor) -> None:
    """Logs an image per RoI: predicted mask (0 to 1) and target, both (R, M, M)."""
    pairs = torch.cat([masks.float(), inside.float()], dim=2)
    for number, pair in enumerate(pairs):
        name = f"Left: mask prediction;   Right: mask GT ({number})"
        get_event_storage().put_image(name, pair.expand(3, -1, -1))
