"""Convolutions and linear layers for inference: norms folded in, ReLUs fused, weights cast."""

from contextlib import nullcontext
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.optimization import onednn

INFERENCE_ONLY = "an optimized model is for inference only: train the original model"

# With running statistics, these scale and shift each channel by constants.
_FOLDABLE = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


class InferenceLayer(nn.Module):
    """Base of the layers below; their parameters are constants of their own.

    Attributes:
        fused: whether oneDNN is called directly, on a CPU.
        relu: whether the layer ends with a ReLU.
    """

    fused: bool
    relu: bool

    def _set_constants(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = constant(weight, dtype)
        self.bias = None if bias is None else constant(bias, dtype)

    def _uses_onednn(self, x: Tensor) -> bool:
        if self.training:
            raise UserError(INFERENCE_ONLY)
        # oneDNN's operators refuse empty tensors (an image without RoIs).
        usable = self.fused and x.numel() > 0 and x.device.type == "cpu"
        return usable and not onednn.is_disabled.get()


class FusedConv2d(InferenceLayer, nn.Conv2d):
    """A convolution of torch or detectron2, in one pass with what follows it.

    Norms with constant statistics are folded into the weights. Other norms (group norm) and
    activations other than ReLU stay behind the convolution.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        dtype: torch.dtype,
        fused: bool,
        norm: nn.Module | None,
        activation: object,
    ) -> None:
        """
        Args:
            conv: left unchanged.
            dtype: the dtype of the weights and the result.
            fused: use oneDNN's fused operators.
            norm, activation: what follows the convolution; this layer owns it.
        """
        super().__init__(**_settings(conv), device="meta")
        weight, bias = conv.weight, conv.bias
        if is_foldable(norm):
            weight, bias = _fold(conv, norm)
            norm = None
        self._set_constants(weight, bias, dtype)
        self.relu = norm is None and _is_relu(activation)
        self.norm, self.activation = norm, None if self.relu else activation
        # Neither a norm nor an activation follows, apart from a fused ReLU.
        self.is_bare = self.norm is None and self.activation is None
        self.fused = fused and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H', W')."""
        x = self.run(x, relu=self.relu)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def run(self, x: Tensor, *, relu: bool, plus: Tensor | None = None) -> Tensor:
        """The convolution, then ``plus`` added, then a ReLU; without norm and activation.

        Args:
            x: (N, C, H, W), best in channels_last; it is cast to the weight's dtype.
            relu: whether to end with a ReLU.
            plus: has the result's shape and is overwritten; None adds nothing.
        """
        x = x.to(self.weight.dtype)
        if not self._uses_onednn(x) or not (plus is None or onednn.can_add(x, plus)):
            x = self._conv_forward(x, self.weight, self.bias)
            if plus is not None:
                x = plus.add_(x)
            return F.relu_(x) if relu else x
        settings = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return onednn.convolution(x, *settings, relu=relu, plus=plus)


class CastConvTranspose2d(InferenceLayer, nn.ConvTranspose2d):
    """A transposed convolution; oneDNN's fused one was no faster."""

    def __init__(self, conv: nn.ConvTranspose2d, *, dtype: torch.dtype, fused: bool) -> None:
        """Arguments as for :class:`FusedConv2d`."""
        super().__init__(**_settings(conv), output_padding=conv.output_padding, device="meta")
        self._set_constants(conv.weight, conv.bias, dtype)
        self.fused, self.relu = fused, False

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H', W')."""
        x = super().forward(x.to(self.weight.dtype), output_size)
        return F.relu_(x) if self.relu else x


class FusedLinear(InferenceLayer, nn.Linear):
    """A linear layer in one pass with the ReLU that follows it.

    Attributes:
        exact: whether it keeps its dtype under autocast, which oneDNN's operators always do.
    """

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype, fused: bool, exact: bool) -> None:
        """Arguments as for :class:`FusedConv2d`; ``exact`` is the attribute."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self._set_constants(linear.weight, linear.bias, dtype)
        self.fused, self.relu, self.exact = fused, False, exact

    def forward(self, x: Tensor) -> Tensor:
        """(R, in_features) to (R, out_features)."""
        x = x.to(self.weight.dtype)
        if self._uses_onednn(x):
            return onednn.linear(x, self.weight, self.bias, relu=self.relu)
        with torch.autocast(x.device.type, enabled=False) if self.exact else nullcontext():
            x = F.linear(x, self.weight, self.bias)
        return F.relu_(x) if self.relu else x


def disable_onednn_if_not_finite(model: nn.Module) -> list[str]:
    """Lets torch compute the converted layers of a model that has NaN or infinite values.

    oneDNN's ReLU turns NaN into 0, so the model would detect objects in noise. Only the values
    after folding count: an infinite variance becomes a finite scale, a negative one becomes NaN.

    Args:
        model: converted; changed in place.

    Returns:
        the names of the tensors with such values; empty if there are none.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in named if not torch.isfinite(tensor).all()]
    for layer in model.modules() if bad else ():
        if isinstance(layer, InferenceLayer):
            layer.fused = False
    return bad


def constant(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A copy of ``values`` without gradient; filters (O, I, h, w) are stored as channels_last."""
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    values = values.detach().to(dtype, copy=True, memory_format=layout)
    return nn.Parameter(values, requires_grad=False)


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether a norm, in evaluation mode, scales and shifts each channel by constants."""
    return isinstance(norm, _FOLDABLE) and norm.running_mean is not None


def _settings(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    """The arguments that ``conv`` was built with; weights are set afterwards."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(conv, name) for name in (*names, "groups", "padding_mode")}


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with a norm's scale and shift in them, computed in fp64.

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
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def _is_relu(activation: object) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_, torch.relu)
