"""The heads on RoIs as they lie in channels_last memory, and the predicted class's mask alone."""

from itertools import pairwise

import torch
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.optimization.layers import constant


class PermutedBoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` whose first linear layer takes a RoI's values cell by cell.

    That is how they lie in channels_last, so nothing is copied on the way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, P, P) to (R, width of the last layer), or without linear layers a map."""
        for conv in self.conv_norm_relus:
            x = conv(x)
        if self.fcs:
            x = x.permute(0, 2, 3, 1).flatten(1)
        for fc in self.fcs:
            x = fc(x)
        return x


def permute_box_head(head: nn.Module, cells: int) -> None:
    """Turns a ``FastRCNNConvFCHead`` with converted layers, in place, into the permuted kind.

    Args:
        head: of a model's ROI heads.
        cells: bins of a RoI, P * P.
    """
    if head.fcs:
        first = head.fcs[0]
        # From columns over (C, P, P) to columns over (P, P, C).
        columns = first.weight.unflatten(1, (-1, cells)).transpose(1, 2).flatten(1)
        first.weight = constant(columns, first.weight.dtype)
        for fc in head.fcs:
            fc.relu = True
    head.__class__ = PermutedBoxHead


class LeanMaskHead(MaskRCNNConvUpsampleHead):
    """``MaskRCNNConvUpsampleHead`` that predicts the mask of each RoI's predicted class alone."""

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            x: features (R, C, P, P) of the RoIs of all images, one image after the other.
            instances: one an image, R boxes in all, with ``pred_classes``.

        Returns:
            the instances, whose ``pred_masks`` (R_i, 1, 2 P, 2 P) is a probability, fp32.
        """
        for conv in self.conv_norm_relus:
            x = conv(x)
        x = self.deconv(x)
        weight, bias = self.predictor.weight.flatten(1), self.predictor.bias
        if len(weight) == 1:
            rows, shift = weight.expand(len(x), -1), bias
        else:
            classes = torch.cat([one.pred_classes for one in instances])
            rows, shift = weight[classes], bias[classes, None, None]
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)
        logits = torch.bmm(cells, rows[:, :, None].to(cells.dtype)).view(len(x), *x.shape[2:])
        masks = (logits.float() + shift.float()).sigmoid()[:, None]
        for one, mask in zip(instances, masks.split([len(i) for i in instances]), strict=True):
            one.pred_masks = mask
        return instances


def slim_mask_head(head: nn.Module) -> None:
    """Turns a ``MaskRCNNConvUpsampleHead`` with converted layers, in place, into the lean kind."""
    head.deconv.relu = True
    head.__class__ = LeanMaskHead


class FloatKeypointHead(KRCNNConvDeconvUpsampleHead):
    """``KRCNNConvDeconvUpsampleHead`` whose heatmaps are fp32 from the upsampling on."""

    def layers(self, x: Tensor) -> Tensor:
        """(R, C, P, P) to heatmaps (R, keypoints, 4 P, 4 P), logits."""
        for layer in self:
            x = layer(x)
        return F.interpolate(
            x.float(), scale_factor=self.up_scale, mode="bilinear", align_corners=False
        )


def fuse_keypoint_head(head: nn.Module) -> None:
    """Turns a ``KRCNNConvDeconvUpsampleHead``, in place, into the fp32 kind, its ReLUs fused."""
    layers = list(head.named_children())
    for (_, layer), (name, following) in pairwise(layers):
        if type(following) is nn.ReLU and hasattr(layer, "relu"):
            layer.relu = True
            setattr(head, name, nn.Identity())
    head.__class__ = FloatKeypointHead
