"""Convolutions and linear layers for inference: norms folded, weights packed, ReLU fused."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.modeling.optimization import packing

# These scale and shift each channel by constants, if they keep statistics.
_FOLDABLE = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class InferenceLayer(nn.Module):
    """What the layers here have in common: constant weights, kept a second time as oneDNN likes it.

    A layer becomes one where it stands (:func:`convert`), for detectron2's modules hold their
    layers in lists as well as by name. The packed copy is made by the first call on a CPU, and
    again after the module was moved, copied or unpickled.
    """

    packs: bool
    _packed: Tensor | None

    def _may_use_packed(self, x: Tensor) -> bool:
        if self.training:
            raise UserError(
                "an optimised model is for inference alone: train the model that it was made of"
            )
        # oneDNN's operators refuse maps without RoIs.
        return self.packs and x.numel() > 0 and x.device.type == "cpu"

    def packed(self, pack: Callable[[], Tensor]) -> Tensor:
        """The packed weight, made by ``pack`` where there is none yet."""
        if self._packed is None:
            self._packed = pack()
        return self._packed

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def packed_bytes(self) -> int:
        """Memory that the second copy of the weight takes once it is there."""
        return self.weight.nbytes if self.packs else 0


def convert(layer: nn.Module, kind: type[InferenceLayer], dtype: torch.dtype, packs: bool) -> None:
    """Turns a layer, in place, into one of these; its parameters become constants of ``dtype``."""
    layer.__class__ = kind
    layer.packs = packs
    layer._packed = None
    layer.relu = False
    layer.weight = constant(layer.weight, dtype)
    if layer.bias is not None:
        layer.bias = constant(layer.bias, dtype)


def constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Values that no optimiser asks for; filters (O, I, h, w) lie in channels_last."""
    values = values.detach().to(dtype)
    if values.dim() == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(values, requires_grad=False)


class PackedConv2d(InferenceLayer, Conv2d):
    """A convolution of torch or detectron2; ``relu`` says whether a ReLU is part of it."""

    relu: bool

    def forward(self, x: Tensor) -> Tensor:
        norm = getattr(self, "norm", None)
        activation = getattr(self, "activation", None)
        x = self.run(x, relu=self.relu)
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
        if not self._may_use_packed(x):
            x = self._conv_forward(x, self.weight, self.bias)
            if plus is not None:
                x = plus.add_(x)
            return F.relu_(x) if relu else x
        place = (self.padding, self.stride, self.dilation, self.groups)
        weight = self.packed(lambda: packing.pack_convolution(self.weight, *place))
        if plus is None:
            return packing.convolution(x, weight, self.bias, *place, relu=relu)
        return packing.convolution_plus(plus, x, weight, self.bias, *place, relu=relu)


class PackedConvTranspose2d(InferenceLayer, nn.ConvTranspose2d):
    """A transposed convolution; ``relu`` says whether a ReLU is part of it."""

    relu: bool

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if output_size is not None or not self._may_use_packed(x):
            x = super().forward(x, output_size)
            return F.relu_(x) if self.relu else x
        place = (self.padding, self.output_padding, self.stride, self.dilation, self.groups)
        weight = self.packed(lambda: packing.pack_transposed(self.weight, *place))
        return packing.transposed_convolution(x, weight, self.bias, *place, relu=self.relu)


class PackedLinear(InferenceLayer, nn.Linear):
    """A linear layer; ``relu`` says whether a ReLU is part of it."""

    relu: bool

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if not self._may_use_packed(x):
            x = F.linear(x, self.weight, self.bias)
            return F.relu_(x) if self.relu else x
        weight = self.packed(lambda: packing.pack_linear(self.weight))
        return packing.linear(x, weight, self.bias, relu=self.relu)


def convert_convolution(conv: nn.Conv2d, dtype: torch.dtype, packs: bool) -> None:
    """A convolution of torch or detectron2, in place: its norm folded, its ReLU fused.

    Norms that depend on the map (group norm) and other activations stay behind it.
    """
    norm = getattr(conv, "norm", None)
    if is_foldable(norm):
        fold(conv, norm)
        conv.norm = norm = None
    activation = getattr(conv, "activation", None)
    packs = packs and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    convert(conv, PackedConv2d, dtype, packs)
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
