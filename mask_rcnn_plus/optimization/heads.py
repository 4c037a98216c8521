"""The heads on RoIs in channels_last memory, and masks of the predicted class only."""

from itertools import pairwise

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.optimization.layers import constant


class PermutedBoxHead(nn.Module):
    """``FastRCNNConvFCHead`` whose first linear layer reads a RoI cell by cell.

    That is the order in channels_last memory, so nothing is copied in between.
    """

    def __init__(self, head: FastRCNNConvFCHead, *, cells: int) -> None:
        """
        Args:
            head: with converted layers, which this head uses.
            cells: bins of a RoI, P * P.
        """
        super().__init__()
        self.conv_norm_relus, self.fcs = head.conv_norm_relus, head.fcs
        self.output_shape: ShapeSpec = head.output_shape
        for name, layer in head.named_children():
            if layer in self.conv_norm_relus or layer in self.fcs:
                self.add_module(name, layer)
        for fc in self.fcs:
            fc.relu = True
        if self.fcs:
            first = self.fcs[0]
            # From columns over (C, P, P) to columns over (P, P, C).
            columns = first.weight.unflatten(1, (-1, cells)).transpose(1, 2).flatten(1)
            first.weight = constant(columns, first.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, P, P) to (R, width of the last layer), or to a map if there is no linear layer."""
        for conv in self.conv_norm_relus:
            x = conv(x)
        if self.fcs:
            x = x.permute(0, 2, 3, 1).flatten(1)
        for fc in self.fcs:
            x = fc(x)
        return x


class LeanMaskHead(nn.Module):
    """``MaskRCNNConvUpsampleHead`` that predicts only the mask of each RoI's predicted class."""

    def __init__(self, head: MaskRCNNConvUpsampleHead) -> None:
        """Uses the converted layers of ``head``, which must fit (:meth:`fits`)."""
        super().__init__()
        self.conv_norm_relus = head.conv_norm_relus
        for name, layer in head.named_children():
            if name != "deconv_relu":
                self.add_module(name, layer)
        self.deconv.relu = True

    @staticmethod
    def fits(head: MaskRCNNConvUpsampleHead) -> bool:
        """Whether a ReLU follows the deconvolution, and the predictor is without a norm."""
        return type(head.deconv_relu) is nn.ReLU and getattr(head.predictor, "norm", None) is None

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            x: features (R, C, P, P) of the RoIs of all images, one image after the other.
            instances: one per image, R boxes in all, with ``pred_classes``.

        Returns:
            the instances with ``pred_masks`` (R_i, 1, 2 P, 2 P), probabilities in fp32.
        """
        for conv in self.conv_norm_relus:
            x = conv(x)
        x = self.deconv(x)
        weight, bias = self.predictor.weight.flatten(1), self.predictor.bias
        if len(weight) == 1:
            rows, shift = weight.expand(len(x), -1), bias
        else:
            classes = torch.cat([i.pred_classes for i in instances])
            rows, shift = weight[classes], bias[classes, None, None]
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)
        logits = torch.bmm(cells, rows[:, :, None].to(cells.dtype)).view(len(x), *x.shape[2:])
        mask_rcnn_inference((logits.float() + shift.float())[:, None], instances)
        return instances


class FloatKeypointHead(nn.Sequential):
    """``KRCNNConvDeconvUpsampleHead`` with fused ReLUs, in fp32 from the upsampling on."""

    def __init__(self, head: KRCNNConvDeconvUpsampleHead) -> None:
        """Uses the converted layers of ``head``."""
        layers = dict(head.named_children())
        for (_, layer), (name, following) in pairwise(list(layers.items())):
            if type(following) is nn.ReLU and hasattr(layer, "relu"):
                layer.relu = True
                del layers[name]
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.up_scale = head.up_scale

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            x: features (R, C, P, P) of the RoIs of all images, one image after the other.
            instances: one per image, R boxes in all, with ``pred_boxes``.

        Returns:
            the instances with ``pred_keypoints`` and ``pred_keypoint_heatmaps``, as in detectron2.
        """
        x = super().forward(x).float()
        heatmaps = F.interpolate(
            x, scale_factor=self.up_scale, mode="bilinear", align_corners=False
        )
        keypoint_rcnn_inference(heatmaps, instances)
        return instances
