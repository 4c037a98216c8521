"""Every operator, forward and backward, on every device, beside its definition in fp64."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mask_rcnn_plus import ops
from mask_rcnn_tools.doctor import reference

TOLERANCE = 1e-4  # of values from 0 to 1, in fp32; a wrong cell or weight is off by hundredths

_SCALES = [1 / 4, 1 / 8, 1 / 16]
# Pixels: small, large, thin, over the edge; none whose level or rounding is a matter of rounding.
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
    """The results of one device.

    Returns:
        for each operator "operator", "device", "ok", "seconds", and the greatest "forward" and
        "backward" difference, or what went wrong, "error".
    """
    results = []
    for name, test in _tests().items():
        start = time.perf_counter()
        result: dict[str, Any] = {"operator": name, "device": device}
        try:
            result |= test(device)
            errors = [result[key] for key in ("forward", "backward") if result.get(key) is not None]
            result["ok"] = all(error <= TOLERANCE for error in errors)
        except Exception as error:
            result |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        results.append({**result, "seconds": round(time.perf_counter() - start, 3)})
    return results


def _tests() -> dict[str, Callable[[str], dict[str, Any]]]:
    one = _SCALES[1:2]
    tests: dict[str, Callable[[str], dict[str, Any]]] = {}

    def add(name: str, call: Callable[..., Tensor], scales: list[float], *rest: Any) -> None:
        tests[name] = lambda device: _compare(device, call, scales, *rest)

    for mode in ("avg", "max"):
        add(
            f"roi_align {mode}",
            lambda maps, rows, mode=mode: ops.roi_align(
                maps[0], rows, _BINS, one[0], 2, True, mode
            ),
            *(one, 2, "align_half", mode),
        )
        add(
            f"roi_align {mode}, adaptive, not aligned",
            lambda maps, rows, mode=mode: ops.roi_align(
                maps[0], rows, _BINS, one[0], 0, False, mode
            ),
            *(one, 0, "align", mode),
        )
        add(
            f"fpn_roi_align {mode}",
            lambda maps, rows, mode=mode: ops.fpn_roi_align(
                maps, rows, _BINS, _SCALES, 2, True, mode
            ),
            *(_SCALES, 2, "align_half", mode),
        )
        add(
            f"roi_warp {mode}",
            lambda maps, rows, mode=mode: ops.roi_warp(maps[0], rows, _BINS, one[0], 2, mode),
            *(one, 2, "warp", mode),
        )
    add(
        "roi_pool",
        lambda maps, rows: ops.roi_pool(maps[0], rows, _BINS, one[0]),
        *(one, 0, "pool", "max"),
    )
    tests["paste_masks_rle"] = _compare_paste
    return tests


def _compare(
    device: str,
    call: Callable[..., Tensor],
    scales: list[float],
    ratio: int,
    grid: str,
    mode: str,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    wide = [
        torch.rand(
            (1, 4, round(_HEIGHT * s), round(_WIDTH * s)), generator=generator, dtype=torch.float64
        ).requires_grad_()
        for s in scales
    ]
    narrow = [m.detach().float().to(device).requires_grad_() for m in wide]
    rows = torch.tensor([(0.0, *box) for box in _BOXES], device=device)
    expected = reference.pool(wide, _BOXES, _BINS, scales, ratio, grid, mode)
    actual = call(narrow, rows)
    grad = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, wide, grad, allow_unused=True)
    found = torch.autograd.grad(actual, narrow, grad.float().to(device))
    return {
        "forward": _difference(actual, expected),
        "backward": max(
            _difference(f, torch.zeros_like(f) if w is None else w)
            for f, w in zip(found, wanted, strict=True)
        ),
    }


def _compare_paste(device: str) -> dict[str, float | None]:
    """The part of the pixels that differ; there is nothing to differentiate."""
    from pycocotools.mask import decode

    masks = torch.rand((2, 7, 7), generator=torch.Generator().manual_seed(1))
    boxes = ((3.3, -4.1, 40.6, 33.7), (20.2, 10.4, 29.9, 60.8))
    rles = ops.paste_masks_rle(masks.to(device), torch.tensor(boxes, device=device), (50, 60))
    wrong = 0
    for rle, mask, box in zip(rles, masks, boxes, strict=True):
        pixels = torch.from_numpy(decode(rle)).bool()
        wrong += int((pixels != reference.paste(mask, box, 50, 60)).sum())
    return {"forward": wrong / 6000, "backward": None}


def _difference(actual: Tensor, expected: Tensor) -> float:
    # NaN is not within any tolerance, and json has none.
    worst = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs().max()
    return float(worst.nan_to_num(1e9))
