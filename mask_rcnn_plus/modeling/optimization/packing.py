"""Whether oneDNN's operators over weights that lie as it wants them can be used here."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the operators that torch's own compiler emits for CPUs exist and compute right.

    They belong to torch's inside and carry no promise, so one small case of each is computed and
    compared; where one is missing, takes other arguments, or differs, nothing is packed.

    Args:
        dtype: of weights and maps.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    maps = numbers(2, 8, 6, 7).to(memory_format=torch.channels_last)
    weight, bias, other = numbers(16, 8, 3, 3), numbers(16), numbers(2, 16, 6, 7)
    other = other.to(memory_format=torch.channels_last)
    transposed, rows, matrix = numbers(8, 16, 2, 2), numbers(5, 8), numbers(16, 8)
    one, two, none = (1, 1), (2, 2), (0, 0)
    try:
        packed = pack_convolution(weight, one, one, one, 1)
        matrix_packed = pack_linear(matrix)
        transposed_packed = pack_transposed(transposed, none, none, two, one, 1)
        pairs = [
            (
                convolution(maps, packed, bias, one, one, one, 1, relu=True),
                F.relu(F.conv2d(maps, weight, bias, padding=1)),
            ),
            (
                convolution_plus(other.clone(), maps, packed, bias, one, one, one, 1, relu=True),
                F.relu(F.conv2d(maps, weight, bias, padding=1) + other),
            ),
            (linear(rows, matrix_packed, bias, relu=True), F.relu(F.linear(rows, matrix, bias))),
            (
                transposed_convolution(
                    maps, transposed_packed, bias, none, none, two, one, 1, relu=True
                ),
                F.relu(F.conv_transpose2d(maps, transposed, bias, stride=2)),
            ),
        ]
    except (RuntimeError, TypeError, AttributeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)
        for a, b in pairs
    )


Pair = tuple[int, int]


def pack_convolution(
    weight: Tensor, padding: Pair, stride: Pair, dilation: Pair, groups: int
) -> Tensor:
    """A convolution's weight (O, I / groups, h, w) as oneDNN wants it, opaque to the rest."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, None
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
    """``F.conv2d`` with a packed weight, and a ReLU in the same pass."""
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


def pack_transposed(
    weight: Tensor,
    padding: Pair,
    output_padding: Pair,
    stride: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """A transposed convolution's weight (I, O / groups, h, w) as oneDNN wants it."""
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, padding, output_padding, stride, dilation, groups, None
    )


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    output_padding: Pair,
    stride: Pair,
    dilation: Pair,
    groups: int,
    *,
    relu: bool,
) -> Tensor:
    """``F.conv_transpose2d`` with a packed weight, and a ReLU in the same pass."""
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        x, weight, bias, padding, output_padding, stride, dilation, groups, after, [], ""
    )


def pack_linear(weight: Tensor) -> Tensor:
    """A linear layer's weight (O, I) as oneDNN wants it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """``F.linear`` with a packed weight, and a ReLU in the same pass."""
    after = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], "")
