"""The mask head of Mask R-CNN, table 2b: classes compete for every pixel."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F


@ROI_MASK_HEAD_REGISTRY.register()
class SoftmaxMaskHead(MaskRCNNConvUpsampleHead):
    """detectron2's convolutional mask head with a softmax over the classes of a pixel.

    The layers and their names are ``MaskRCNNConvUpsampleHead``'s; the predictor has one channel
    more, the last, for the background. With ``CLS_AGNOSTIC_MASK`` there are two: object and
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
            instances: one an image, R boxes in all. In training, positives with
                ``proposal_boxes``, ``gt_classes`` and ``gt_masks``; else ``pred_classes``.

        Returns:
            in training ``{"loss_mask": loss}``; else the instances, whose ``pred_masks``
            (R_i, 1, M, M) is, 0 to 1, how the predicted class stands against its strongest rival:
            above 0.5, detectron2's threshold for a mask, where it is the pixel's likeliest.
        """
        logits = self.layers(x)
        if self.training:
            loss = softmax_mask_loss(logits, instances, vis_period=self.vis_period)
            return {"loss_mask": loss * self.loss_weight}
        classes = torch.cat([one.pred_classes for one in instances])
        masks = _against_the_rest(logits, classes)[:, None]
        for one, mask in zip(instances, masks.split([len(i) for i in instances]), strict=True):
            one.pred_masks = mask
        return instances


def softmax_mask_loss(logits: Tensor, instances: list[Instances], *, vis_period: int = 0) -> Tensor:
    """Cross-entropy a pixel, on average (Mask R-CNN, section 4.2 "Multinomial vs. Independent").

    A pixel's class is the RoI's inside the ground-truth mask (cropped to the RoI), and background
    elsewhere. Writes detectron2's ``mask_rcnn/`` scalars, where a pixel counts as predicted when
    its class is the likeliest.

    Args:
        logits: (R, K + 1, M, M), background last; K is 1 for class-agnostic masks.
        instances: positives, one ``Instances`` an image, R in all, with ``proposal_boxes`` in
            input-image pixels, ``gt_classes`` and ``gt_masks``.
        vis_period: iterations between two sets of pictures, prediction beside target; 0 for none.

    Returns:
        the loss; 0, with its graph, without RoIs.
    """
    filled = [one for one in instances if len(one)]
    if not filled:
        return logits.sum() * 0
    inside = torch.cat(
        [
            one.gt_masks.crop_and_resize(one.proposal_boxes.tensor, logits.shape[-1])
            for one in filled
        ]
    ).to(logits.device)
    inside = inside > 0.5 if inside.is_floating_point() else inside.bool()
    classes = torch.cat([one.gt_classes for one in filled]).long()
    if logits.shape[1] == 2:
        classes = torch.zeros_like(classes)
    target = torch.where(inside, classes[:, None, None], logits.shape[1] - 1)
    _log(_against_the_rest(logits.detach(), classes), inside, vis_period)
    # Pixels as rows: of maps, torch has no deterministic loss on CUDA, and channels_last is rows.
    return F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), target.flatten())


def _against_the_rest(logits: Tensor, classes: Tensor) -> Tensor:
    """Of each RoI's class k, p_k / (p_k + the largest other p): (R, M, M) of (R, K + 1, M, M).

    An FCN decodes a softmax by its largest class, and p_k alone may be that and far below one half.
    """
    if logits.shape[1] == 2:
        classes = torch.zeros_like(classes)
    index = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    own = logits.gather(1, index)
    rival = logits.scatter(1, index, float("-inf")).amax(dim=1, keepdim=True)
    return (own - rival).sigmoid()[:, 0]


def _log(masks: Tensor, inside: Tensor, vis_period: int) -> None:
    storage = get_event_storage()
    predicted = masks > 0.5
    wrong = predicted != inside
    rates = {
        "accuracy": (~wrong).sum() / wrong.numel(),
        "false_positive": (wrong & ~inside).sum() / (~inside).sum().clamp(min=1),
        "false_negative": (wrong & inside).sum() / inside.sum().clamp(min=1),
    }
    # One wait for the device instead of one a figure.
    values = torch.stack([rate.float() for rate in rates.values()]).tolist()
    for name, value in zip(rates, values, strict=True):
        storage.put_scalar(f"mask_rcnn/{name}", value)
    if vis_period > 0 and storage.iter % vis_period == 0:
        pairs = torch.cat([masks.float(), inside.float()], dim=2)
        for number, pair in enumerate(pairs):
            name = f"Left: mask prediction;   Right: mask GT ({number})"
            storage.put_image(name, pair.expand(3, -1, -1))
