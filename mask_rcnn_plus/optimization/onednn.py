"""oneDNN's convolution and linear layer with what follows them in the same pass.

torch's own functions have no fused ones, and compute fp32 1x1 convolutions and linear layers with
another library, at half the speed on CPUs that are not Intel's. These are the operators that
torch's compiler emits. They take weights as they are: weights packed beforehand were faster by less
than 1 % of an image, for the size of image they were packed for alone, and up to 10 times slower
for others.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
_left_out = ContextVar("_left_out", default=False)


@contextmanager
def left_out(wanted: bool) -> Iterator[None]:
    """Within, if wanted, no layer takes these operators: oneDNN's ReLU turns NaN into 0."""
    token = _left_out.set(wanted)
    try:
        yield
    finally:
        _left_out.reset(token)


def is_left_out() -> bool:
    """Whether this is within :func:`left_out`."""
    return _left_out.get()


@functools.cache
def is_usable(dtype: torch.dtype) -> bool:
    """Whether the operators exist and compute right.

    They belong to torch's inside and carry no promise, so one small case of each is computed and
    compared; where one is missing, takes other arguments, or differs, none is used.

    Args:
        dtype: of weights and maps.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values

    maps, weight, bias, other = numbers(2, 8, 6, 7), numbers(16, 8, 3, 3), numbers(16), None
    other, rows, matrix = numbers(2, 16, 6, 7), numbers(5, 8), numbers(16, 8)
    place = ((1, 1), (1, 1), (1, 1), 1)
    plain = F.conv2d(maps, weight, bias, padding=1)
    try:
        pairs = [
            (convolution(maps, weight, bias, *place, relu=True), F.relu(plain)),
            (
                convolution_plus(other.clone(), maps, weight, bias, *place, relu=True),
                F.relu(plain + other),
            ),
            (linear(rows, matrix, bias, relu=True), F.relu(F.linear(rows, matrix, bias))),
        ]
    except (RuntimeError, TypeError, AttributeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in pairs
    )


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    stride: Pair,
    dilation: Pair,
    groups: int,
    *,
    relu: bool,
) -> Tensor:
    """``F.conv2d``, and a ReLU in the same pass; not of empty maps."""
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, after, [], ""
    )


def convolution_plus(
    other: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    stride: Pair,
    dilation: Pair,
    groups: int,
    *,
    relu: bool,
) -> Tensor:
    """The same added to ``other`` before the ReLU, in the same pass, in place of ``other``."""
    after = "relu" if relu else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, after, [], ""
    )


def takes_plus(x: Tensor, other: Tensor) -> bool:
    """Whether :func:`convolution_plus` takes these maps.

    Of maps of one cell, or in another layout, torch leaves the bf16 sum to an operator without it.
    """
    return x.shape[-2:].numel() > 1 and other.is_contiguous(memory_format=torch.channels_last)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """``F.linear``, and a ReLU in the same pass; not of no rows."""
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "")
