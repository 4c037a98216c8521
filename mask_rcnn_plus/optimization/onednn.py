"""oneDNN's convolution and linear layer, fused with what follows them.

torch's own functions cannot fuse, and compute fp32 1x1 convolutions and linear layers with another
library, at half the speed on CPUs from other makers than Intel. These are the operators that
torch's compiler emits. Weights are not packed beforehand: that saved less than 1 % of an image's
time, only for the image size they were packed for, and was up to 10 times slower for others.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]
is_disabled = ContextVar("is_disabled", default=False)


@contextmanager
def disabled(value: bool) -> Iterator[None]:
    """A context in which layers do not use these operators, if ``value`` is True."""
    token = is_disabled.set(value)
    try:
        yield
    finally:
        is_disabled.reset(token)


@functools.cache
def is_usable(dtype: torch.dtype) -> bool:
    """Whether the operators exist and compute correctly for weights and maps of a dtype.

    They are internal to torch and may change, so a small case of each is compared with torch's own
    function. If one is missing, has other arguments or differs, torch's own functions run instead.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values

    maps, weight, bias = numbers(2, 8, 6, 7), numbers(16, 8, 3, 3), numbers(16)
    other, rows, matrix = numbers(2, 16, 6, 7), numbers(5, 8), numbers(16, 8)
    settings = ((1, 1), (1, 1), (1, 1), 1)
    plain = F.conv2d(maps, weight, bias, padding=1)
    try:
        pairs = [
            (convolution(maps, weight, bias, *settings, relu=True), F.relu(plain)),
            (
                convolution(maps, weight, bias, *settings, relu=True, plus=other.clone()),
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
    plus: Tensor | None = None,
) -> Tensor:
    """``relu(F.conv2d(x) + plus)`` in one pass; overwrites ``plus`` with it; refuses empty maps."""
    settings = (weight, bias, padding, stride, dilation, groups)
    if plus is None:
        after = "relu" if relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(x, *settings, after, [], "")
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        plus, x, *settings, "add", 1.0, "relu" if relu else None, [], ""
    )


def can_add(x: Tensor, plus: Tensor) -> bool:
    """Whether :func:`convolution` can add ``plus`` to its result.

    For maps of one cell, or in another layout, torch's bf16 implementation lacks the sum.
    """
    return x.shape[-2:].numel() > 1 and plus.is_contiguous(memory_format=torch.channels_last)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """``F.linear`` and a ReLU in the same pass; refuses zero rows."""
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "")
