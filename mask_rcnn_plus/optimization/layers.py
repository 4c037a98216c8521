"""Convolutions and linear layers for inference: norms folded, ReLUs fused, weights cast."""

from contextlib import nullcontext
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.optimization import onednn

# These scale and shift each channel by constants, if they keep statistics.
_FOLDABLE = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class InferenceLayer(nn.Module):
    """What the layers here have in common: their weights are constants.

    A layer becomes one where it stands (:func:`convert`), for detectron2's modules hold their
    layers in lists as well as by name.

    Attributes:
        fused: whether oneDNN is called directly, on a CPU.
        relu: whether a ReLU is part of the layer.
    """

    fused: bool
    relu: bool

    def _takes_onednn(self, x: Tensor) -> bool:
        if self.training:
            raise UserError(
                "an optimised model is for inference alone: train the model that it was made of"
            )
        # oneDNN's operators refuse maps without RoIs.
        usable = self.fused and x.numel() > 0 and x.device.type == "cpu"
        return usable and not onednn.is_left_out()


def convert(layer: nn.Module, kind: type[InferenceLayer], dtype: torch.dtype, fused: bool) -> None:
    """Turns a layer, in place, into one of these; its parameters become constants of ``dtype``."""
    layer.__class__ = kind
    layer.fused, layer.relu = fused, False
    layer.weight = constant(layer.weight, dtype)
    if layer.bias is not None:
        layer.bias = constant(layer.bias, dtype)


def leave_out_onednn_if_not_finite(model: nn.Module) -> list[str]:
    """Lets torch compute the converted layers of a model that has NaN or infinite values.

    oneDNN's ReLU would make 0 of NaN, and objects of nothing. What counts is what is computed with:
    folded, an infinite variance is a constant, and a negative one is NaN.

    Args:
        model: converted, in place.

    Returns:
        the names of what is not finite; none where the model is sound, and left as it is.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in named if not torch.isfinite(tensor).all()]
    for layer in model.modules() if bad else ():
        if isinstance(layer, InferenceLayer):
            layer.fused = False
    return bad


def constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Values that no optimiser asks for; filters (O, I, h, w) lie in channels_last."""
    values = values.detach().to(dtype)
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    return nn.Parameter(values.contiguous(memory_format=layout), requires_grad=False)


class FusedConv2d(InferenceLayer, Conv2d):
    """A convolution of torch or detectron2 in one pass with what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(x, relu=self.relu)
        norm, activation = getattr(self, "norm", None), getattr(self, "activation", None)
        if norm is not None:
            x = norm(x)
        return x if activation is None else activation(x)

    def run(self, x: Tensor, *, relu: bool, plus: Tensor | None = None) -> Tensor:
        """The convolution, then ``plus`` added, then a ReLU, without norm and activation.

        Args:
            x: (N, C, H, W), best in channels_last; it is cast to the weight's dtype.
            relu: whether there is a ReLU.
            plus: of the result's shape, and overwritten; None for nothing.
        """
        x = x.to(self.weight.dtype)
        if not self._takes_onednn(x) or not (plus is None or onednn.takes_plus(x, plus)):
            x = self._conv_forward(x, self.weight, self.bias)
            if plus is not None:
                x = plus.add_(x)
            return F.relu_(x) if relu else x
        place = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        if plus is None:
            return onednn.convolution(x, *place, relu=relu)
        return onednn.convolution_plus(plus, x, *place, relu=relu)


class CastConvTranspose2d(InferenceLayer, nn.ConvTranspose2d):
    """A transposed convolution; oneDNN's fused one was no faster."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = super().forward(x.to(self.weight.dtype), output_size)
        return F.relu_(x) if self.relu else x


class FusedLinear(InferenceLayer, nn.Linear):
    """A linear layer in one pass with the ReLU that follows it.

    Attributes:
        exact: whether it keeps its dtype where autocast is on, which oneDNN's operators always do.
    """

    exact = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self._takes_onednn(x):
            return onednn.linear(x, self.weight, self.bias, relu=self.relu)
        with torch.autocast(x.device.type, enabled=False) if self.exact else nullcontext():
            x = F.linear(x, self.weight, self.bias)
        return F.relu_(x) if self.relu else x


def convert_convolution(conv: nn.Conv2d, dtype: torch.dtype, fused: bool) -> None:
    """A convolution of torch or detectron2, in place: its norm folded, its ReLU fused.

    Norms that depend on the map (group norm) and other activations stay behind it.
    """
    norm = getattr(conv, "norm", None)
    if is_foldable(norm):
        fold(conv, norm)
        conv.norm = norm = None
    activation = getattr(conv, "activation", None)
    fused = fused and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    convert(conv, FusedConv2d, dtype, fused)
    if norm is None and _is_relu(activation):
        conv.activation, conv.relu = None, True


def _is_relu(activation: Any) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_, torch.relu)


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a norm, in evaluation, scales and shifts each channel by constants."""
    return isinstance(norm, _FOLDABLE) and norm.running_mean is not None


def fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Multiplies a norm's scale into a convolution's weight and bias, in place, in fp64.

    norm(w * x + b) = (w s) * x + (b - mean) s + shift, with s = scale / sqrt(variance + eps).
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
