"""Tests every operator, forward and backward, on every device, against a reference in fp64.

The reference computes each operator from its definition and shares no code with ``ops``. Bilinear
sampling is separable: a weight for each cell of a row times one for each cell of a column, so all
samples of a box are one product of matrices. Autograd computes the derivatives.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mask_rcnn_plus import ops

TOLERANCE = 1e-4  # of values from 0 to 1, in fp32; a wrong cell or weight is off by hundredths

_SCALES = [1 / 4, 1 / 8, 1 / 16]
# (x0, y0, x1, y1) in pixels: small, large, thin, across the border. Rounding errors do not change
# their level or their rounded corners.
_BOXES = (
    (9.3, 5.1, 60.7, 40.9),
    (3.4, 2.2, 250.9, 190.3),
    (70.1, 11.3, 76.8, 150.2),
    (200.3, 150.7, 290.1, 230.6),
)
_HEIGHT, _WIDTH, _BINS = 192, 256, 3


def devices() -> list[str]:
    """The CPU and every CUDA device that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def run(device: str) -> list[dict[str, Any]]:
    """Tests every operator on one device.

    Returns:
        per operator: "operator", "device", "ok", "seconds", and the largest "forward" and
        "backward" difference, or the "error".
    """
    results = []
    for name, test in _tests(device).items():
        start = time.perf_counter()
        result: dict[str, Any] = {"operator": name, "device": device}
        try:
            result |= test()
            errors = [result[key] for key in ("forward", "backward") if result[key] is not None]
            result["ok"] = all(error <= TOLERANCE for error in errors)
        except Exception as error:
            result |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        results.append({**result, "seconds": round(time.perf_counter() - start, 3)})
    return results


def _tests(device: str) -> dict[str, Callable[[], dict[str, float | None]]]:
    """Operator name -> a function that tests it."""
    tests: dict[str, Callable[[], dict[str, float | None]]] = {}

    def add(name: str, *case: Any) -> None:
        tests[name] = partial(_test_pooling, device, *case)

    one = _SCALES[1:2]
    align, align_all, warp = ops.roi_align, ops.fpn_roi_align, ops.roi_warp
    for mode in ("avg", "max"):
        adaptive = f"roi_align {mode}, adaptive, not aligned"
        add(f"roi_align {mode}", align, one, (2, True, mode), (2, "align_half", mode))
        add(adaptive, align, one, (0, False, mode), (0, "align", mode))
        add(f"fpn_roi_align {mode}", align_all, _SCALES, (2, True, mode), (2, "align_half", mode))
        add(f"roi_warp {mode}", warp, one, (2, mode), (2, "warp", mode))
    add("roi_pool", ops.roi_pool, one, (), (0, "pool", "max"))
    tests["paste_masks_rle"] = partial(_test_paste, device)
    return tests


def _test_pooling(
    device: str,
    operator: Callable[..., Tensor],
    scales: list[float],
    arguments: tuple[Any, ...],
    reference: tuple[int, str, str],
) -> dict[str, float | None]:
    """Compares operator(maps, rois, bins, scales, *arguments) with pool(..., *reference)."""
    generator = torch.Generator().manual_seed(0)
    maps64 = [
        torch.rand(
            (1, 4, round(_HEIGHT * s), round(_WIDTH * s)), generator=generator, dtype=torch.float64
        ).requires_grad_()
        for s in scales
    ]
    maps32 = [m.detach().float().to(device).requires_grad_() for m in maps64]
    rois = torch.tensor([(0.0, *box) for box in _BOXES], device=device)
    expected = pool(maps64, _BOXES, _BINS, scales, *reference)
    pyramid = len(scales) > 1
    features, scale = (maps32, scales) if pyramid else (maps32[0], scales[0])
    actual = operator(features, rois, _BINS, scale, *arguments)
    grad = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, maps64, grad, allow_unused=True)
    actual_grads = torch.autograd.grad(actual, maps32, grad.float().to(device))
    return {
        "forward": _difference(actual, expected),
        "backward": max(
            _difference(a, torch.zeros_like(a) if e is None else e)
            for a, e in zip(actual_grads, expected_grads, strict=True)
        ),
    }


def _test_paste(device: str) -> dict[str, float | None]:
    """The share of pixels that differ. This operator has no backward."""
    from pycocotools.mask import decode

    masks = torch.rand((2, 7, 7), generator=torch.Generator().manual_seed(1))
    boxes = ((3.3, -4.1, 40.6, 33.7), (20.2, 10.4, 29.9, 60.8))
    rles = ops.paste_masks_rle(masks.to(device), torch.tensor(boxes, device=device), (50, 60))
    wrong = 0
    for rle, mask, box in zip(rles, masks, boxes, strict=True):
        pixels = torch.from_numpy(decode(rle)).bool()
        wrong += int((pixels != paste(mask, box, 50, 60)).sum())
    return {"forward": wrong / 6000, "backward": None}


def _difference(actual: Tensor, expected: Tensor) -> float:
    worst = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs().max()
    return float(worst.nan_to_num(1e9))  # NaN would pass no comparison, and json lacks it


def pool(
    features: Sequence[Tensor],
    boxes: Sequence[tuple[float, ...]],
    bins: int,
    scales: Sequence[float],
    samples: int,
    grid: str,
    mode: str,
) -> Tensor:
    """Any of the RoI operators, computed from its definition.

    Args:
        features: maps (1, C, Hl, Wl), fp64.
        boxes: R boxes (x0, y0, x1, y1) in input-image pixels.
        bins: output side.
        scales: 1 / stride of each map.
        samples: per bin and axis; 0 adapts to the box.
        grid: "align", "align_half", "warp" or "pool".
        mode: "avg" or "max".

    Returns:
        (R, C, bins, bins).
    """
    results = []
    for box in boxes:
        level = _level(box, scales)
        cells, corners = features[level][0], [value * scales[level] for value in box]
        if grid in ("warp", "pool"):
            corners = [float(math.floor(value + 0.5)) for value in corners]
            corners[2:] = [max(v, w) + 1 for v, w in zip(corners[2:], corners[:2], strict=True)]
        if grid == "pool":
            results.append(_max_of_cells(cells, corners, bins))
            continue
        if grid != "align":
            corners = [value - 0.5 for value in corners]
        weights = []
        for start, end, size in zip(corners[1::-1], corners[:1:-1], cells.shape[1:], strict=True):
            length = max(end - start, 1.0) if grid == "align" else end - start
            count = bins * (samples or math.ceil(length / bins))
            points = start + (torch.arange(count).double() + 0.5) * length / count
            weights.append(_weights(points, size))
        values = torch.einsum("ih,chw,jw->cij", weights[0], cells, weights[1])
        values = values.unflatten(2, (bins, -1)).unflatten(1, (bins, -1))
        results.append(values.mean((2, 4)) if mode == "avg" else values.amax((2, 4)))
    return torch.stack(results)


def paste(mask: Tensor, box: tuple[float, ...], height: int, width: int) -> Tensor:
    """A mask (M, M) pasted into a box: bool (height, width).

    A pixel is set if the bilinear sample of the mask at the pixel's centre is at least 0.5.
    """
    sides = []
    for start, end, pixels, cells in (
        (box[1], box[3], height, mask.shape[0]),
        (box[0], box[2], width, mask.shape[1]),
    ):
        points = (torch.arange(pixels).double() + 0.5 - start) / (end - start) * cells - 0.5
        sides.append((1 - (points[:, None] - torch.arange(cells)).abs()).clamp(min=0))
    return sides[0] @ mask.double() @ sides[1].T >= 0.5


def _level(box: tuple[float, ...], scales: Sequence[float]) -> int:
    """FPN, equation 1."""
    if len(scales) == 1:
        return 0
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = math.floor(4 + math.log2(side / 224 + 1e-8)) + round(math.log2(scales[0]))
    return min(max(level, 0), len(scales) - 1)


def _weights(points: Tensor, cells: int) -> Tensor:
    """Bilinear weights (points, cells); 0 for points more than one cell outside the map."""
    inside = (points >= -1) & (points <= cells)
    clamped = points.clamp(0, cells - 1)
    weights = (1 - (clamped[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return weights * inside[:, None]


def _max_of_cells(cells: Tensor, corners: Sequence[float], bins: int) -> Tensor:
    """RoIPool: the largest cell of each bin, 0 for an empty bin."""
    spans = []
    for start, end, size in zip(corners[1::-1], corners[:1:-1], cells.shape[1:], strict=True):
        edges = [(n * (end - start) / bins, (n + 1) * (end - start) / bins) for n in range(bins)]
        first = [min(max(int(start + math.floor(low)), 0), size) for low, _ in edges]
        last = [min(max(int(start + math.ceil(high)), 0), size) for _, high in edges]
        spans.append([slice(a, b) for a, b in zip(first, last, strict=True)])
    zero = cells.new_zeros(len(cells))
    rows = []
    for row in spans[0]:
        parts = [cells[:, row, column] for column in spans[1]]
        rows.append(torch.stack([p.amax((1, 2)) if p[0].numel() else zero for p in parts], 1))
    return torch.stack(rows, 1)
