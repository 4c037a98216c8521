"""Measures the sides of the RoIAlign benchmark on one setting: time, error, memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes
from torch import Tensor

from benchmarks.roi_case import Pooler, exact, make_poolers, touched_cells
from benchmarks.timing import Run, alternate, extra_memory, input_sets

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = ("ours", "detectron2", "torchvision")
# What the project's targets are stated against, whatever the dtype and layout of a row.
BASELINE = "detectron2 NCHW fp32"
MAX_INPUT_SETS = 4


@dataclass(frozen=True)
class Setting:
    """What the rows of one forward and one backward have in common, in both layouts."""

    rois: int
    bins: int
    ratio: int
    dtype: str


@dataclass
class Row:
    """One row of the table.

    Attributes:
        rois, bins, sampling_ratio, dtype, layout, direction: what was run.
        milliseconds: median by side, and of the baseline; without the sides that refuse the dtype.
        speedup: how many times as fast ours is, by side, and against the baseline.
        error: by side, the largest difference from fp64 as a share of the largest value.
        floor: milliseconds in which the device's memory moves what must be moved at least once.
        extra_mib: by side, the peak of memory beyond the inputs; None where no one counts it.
    """

    rois: int
    bins: int
    sampling_ratio: int
    dtype: str
    layout: str
    direction: str
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    error: dict[str, float]
    floor: float
    extra_mib: dict[str, float | None]


@dataclass
class _Side:
    """A pooler with its inputs: one list of maps, boxes, output and its gradient an input set."""

    pooler: Pooler
    maps: list[list[Tensor]]
    boxes: list[Boxes]
    grads: list[Tensor]

    def __post_init__(self) -> None:
        self.outputs = [self.pooler(m, [b]) for m, b in zip(self.maps, self.boxes, strict=True)]

    def forwards(self) -> list[Run]:
        return [self._forward(*both) for both in zip(self.maps, self.boxes, strict=True)]

    def backwards(self) -> list[Run]:
        every = zip(self.outputs, self.maps, self.grads, strict=True)
        return [self._backward(out, maps, _laid_out_as(out, grad)) for out, maps, grad in every]

    def _forward(self, maps: list[Tensor], boxes: Boxes) -> Run:
        def run() -> Tensor:
            with torch.no_grad():
                return self.pooler(maps, [boxes])

        return run

    def _backward(self, out: Tensor, maps: list[Tensor], grad: Tensor) -> Run:
        return lambda: torch.autograd.grad(out, maps, grad, retain_graph=True)


def measure(
    setting: Setting,
    pyramids: list[list[Tensor]],
    boxes: list[Boxes],
    *,
    repeats: int,
    bandwidth: float,
    device: str,
) -> Iterator[Row]:
    """Runs one setting in both layouts.

    Args:
        setting: what to run.
        pyramids: ``MAX_INPUT_SETS`` lists of fp32 maps (1, C, Hl, Wl).
        boxes: as many lists of ``setting.rois`` boxes.
        repeats: timed runs of each side.
        bandwidth: bytes a millisecond of the device's memory.
        device: "cpu" or "cuda".

    Returns:
        a row for forward and one for backward, for each layout.
    """
    dtype, (count, bins, ratio) = DTYPES[setting.dtype], (setting.rois, setting.bins, setting.ratio)
    channels = pyramids[0][0].shape[1]
    grads = [
        torch.randn(
            (count, channels, bins, bins), generator=torch.Generator().manual_seed(100 + i)
        ).to(device, dtype)
        for i in range(len(pyramids))
    ]
    rounded = [[m.to(dtype) for m in maps] for maps in pyramids]
    expected, expected_grads = exact(rounded[0], boxes[0], grads[0], bins, ratio)
    touched = touched_cells(boxes[0], bins, ratio) * channels
    cells = sum(m.numel() for m in pyramids[0])
    poolers = make_poolers(bins, ratio)

    for layout, memory_format in LAYOUTS.items():
        is_baseline = setting.dtype == "fp32" and layout == "NCHW"
        chosen = [name for name in SIDES if _serves(poolers[name], rounded[0], boxes[0])]
        sets = input_sets(len(chosen) + (not is_baseline))
        sides = {
            name: _Side(
                poolers[name], _leaves(rounded[:sets], memory_format), boxes[:sets], grads[:sets]
            )
            for name in chosen
        }
        if not is_baseline:
            maps = _leaves(pyramids[:sets], torch.contiguous_format)
            sides[BASELINE] = _Side(poolers["detectron2"], maps, boxes[:sets], grads[:sets])
        numel, size = expected.numel(), rounded[0][0].element_size()
        # The least traffic: forward reads the cells that have a part and writes the output;
        # backward reads the output's gradient and writes every cell's, the zeros too.
        for direction, least in (("forward", touched), ("backward", cells)):
            forward = direction == "forward"
            runs = {n: s.forwards() if forward else s.backwards() for n, s in sides.items()}
            results = {n: runs[n][0]() for n in chosen}
            error = {
                n: _distance([result], [expected]) if forward else _distance(result, expected_grads)
                for n, result in results.items()
            }
            del results
            memory = {n: extra_memory(runs[n][0], device) for n in chosen}
            times = alternate(runs, repeats, device)
            if is_baseline:
                times[BASELINE] = times["detectron2"]
            yield Row(
                rois=count,
                bins=bins,
                sampling_ratio=ratio,
                dtype=setting.dtype,
                layout=layout,
                direction=direction,
                milliseconds=times,
                speedup={n: t / times["ours"] for n, t in times.items() if n != "ours"},
                error=error,
                floor=(numel + least) * size / bandwidth,
                extra_mib=memory,
            )


def _laid_out_as(out: Tensor, grad: Tensor) -> Tensor:
    """The gradient of an output as the layer behind it hands it back: in the output's layout."""
    return torch.empty_like(out).copy_(grad)


def _serves(pooler: Pooler, maps: list[Tensor], boxes: Boxes) -> bool:
    """Whether a side knows the maps' dtype."""
    try:
        with torch.no_grad():
            pooler(maps, [boxes])
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        return False
    return True


def _leaves(sets: list[list[Tensor]], memory_format: torch.memory_format) -> list[list[Tensor]]:
    return [
        [m.detach().contiguous(memory_format=memory_format).requires_grad_() for m in maps]
        for maps in sets
    ]


def _distance(found: object, expected: list[Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))  # type: ignore[call-overload]
    largest = max(e.abs().max().item() for _, e in pairs)
    return max((f.double() - e).abs().max().item() for f, e in pairs) / (largest or 1.0)
