"""Times RoIAlign over a feature pyramid: ours, detectron2's ROIPooler and torchvision's."""

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align
from tqdm import tqdm

from benchmarks.harness import (
    Report,
    add_arguments,
    alternate,
    apply_arguments,
    clock,
    markdown_row,
    markdown_table,
    number,
    peak_memory,
)
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.modeling import FusedROIPooler
from mask_rcnn_plus.ops.fallback import assign_levels
from mask_rcnn_tools.arguments import Parser, positive, run_command
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.roi_align"
MARKDOWN, JSON = "roi_align.md", "roi_align.json"

BINS = {1000: 7, 100: 14}  # RoIs per image -> bins: of the box head and of the mask head
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
IMPLEMENTATIONS = ("ours", "detectron2", "torchvision")
# The project's targets are stated against this, whatever a row's dtype and layout are.
BASELINE = "detectron2 NCHW fp32"
MAX_INPUT_SETS = 4

HEIGHT, WIDTH = 800, 1333  # of the image, whose maps are padded to a multiple of 32
STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]
SMALLEST, LARGEST = 16, 800  # square root of a box's area, in pixels

# Reading a GPU's clock waits for its queue, which takes longer than a small kernel; over several
# calls this hardly counts.
CALLS = {"cpu": 1, "cuda": 12}
# Timings of an implementation per turn. A virtual machine may return freed memory to its host
# within seconds, so the first call after a slow implementation also pays for getting it back; the
# median of three does not.
TIMINGS_PER_TURN = {"cpu": 3, "cuda": 1}
WARM_UPS = {"cpu": 1, "cuda": 3}
# torchvision's fp16 on a CPU takes half a minute where ours takes less than a second, so turns end
# after this many seconds.
PATIENCE_SECONDS = 20
FEWEST_REPEATS = 3

Pooler = Callable[[list[Tensor], list[Boxes]], Tensor]
Run = Callable[[], Any]

_EPILOG = f"""\
example:
  {PROGRAM} --dtypes fp32 --threads 2 --output output/benchmark

The inputs are P2 to P5 of an 800 x 1333 image, with 1000 RoIs into 7 x 7 bins and 100 into 14 x 14,
of boxes of 16 to 800 pixels. The implementations run alternately on several input sets. Times are
medians in milliseconds; "2.0x" means that ours is twice as fast. Error: the largest difference
from fp64, relative to the largest value. Floor: the time in which the device's memory moves the
data that must be moved once. At most --repeats turns are timed, fewer where they take long. With
--output, {MARKDOWN} and {JSON} contain the same and more.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints a Markdown table.

    Returns:
        the exit code, 0.

    Raises:
        UserError: the output cannot be written, or memory runs out.
        UsageError: invalid arguments.
    """
    arguments = _parse(argv)
    apply_arguments(arguments, (MARKDOWN, JSON))
    try:
        report = _run(arguments, shlex.join([*PROGRAM.split(), *argv]))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"--device {arguments.device} has too little memory for --channels "
            f"{arguments.channels}; use fewer channels"
        ) from error
    if arguments.output is not None:
        report.write(arguments.output / MARKDOWN, arguments.output / JSON)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("--rois", type=int, nargs="+", choices=BINS, default=list(BINS), help="per image")
    add(
        "--sampling",
        type=int,
        nargs="+",
        choices=(2, 0),
        default=[2, 0],
        help="samples per bin and axis; 0 adapts to the box",
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--channels", type=positive, default=256, help="of the maps (default: 256)")
    add_arguments(parser, "--device", "--repeats", "--threads", "--output", "--overwrite")
    return parser.parse_args(argv)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(arguments: argparse.Namespace, command: str) -> Report:
    device = arguments.device
    environment = describe_environment(device)
    bandwidth = copy_bandwidth(device)
    environment["memory"] = f"{bandwidth / 1e6:.1f} GB/s by copying"
    report = Report(command, environment)
    rows: list[dict[str, Any]] = []
    report.data |= {
        "channels": arguments.channels,
        "repeats": arguments.repeats,
        "bandwidth_bytes_per_second": bandwidth * 1e3,
        "baseline": BASELINE,
        "rows": rows,
    }
    settings = list(product(arguments.rois, arguments.sampling, arguments.dtypes))
    pyramids = [make_pyramid(arguments.channels, seed, device) for seed in range(MAX_INPUT_SETS)]
    report.add(*markdown_table(_columns(device), []))
    total = len(settings) * len(LAYOUTS) * 2
    with tqdm(total=total, unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
        for setting in settings:
            for row in measure(
                *setting, pyramids, repeats=arguments.repeats, bandwidth=bandwidth, device=device
            ):
                rows.append(row)
                report.add(markdown_row(_cells(row, device)))
                bar.update()
    return report


def _columns(device: str) -> list[str]:
    return [
        *("case", "sampling", "dtype", "layout", "direction"),
        *(f"{name} ms" for name in (*IMPLEMENTATIONS, BASELINE)),
        *(f"against {name}" for name in (*IMPLEMENTATIONS[1:], BASELINE)),
        *("floor ms", *(f"error {name}" for name in IMPLEMENTATIONS[:2])),
        *(f"extra MiB {name}" for name in IMPLEMENTATIONS if device == "cuda"),
    ]


def _cells(row: dict[str, Any], device: str) -> list[str]:
    # On a GPU, times of tenths of a millisecond need three decimals.
    form = "{:.3f}" if device == "cuda" else "{:.2f}"
    times, ratios, errors = row["milliseconds"], row["speedup"], row["error"]
    return [
        f"{row['rois']} x {row['bins']}x{row['bins']}",
        str(row["sampling_ratio"] or "adaptive"),
        *(row["dtype"], row["layout"], row["direction"]),
        *(number(times.get(name), form) for name in (*IMPLEMENTATIONS, BASELINE)),
        *(number(ratios.get(name), "{:.2f}x") for name in (*IMPLEMENTATIONS[1:], BASELINE)),
        form.format(row["floor"]),
        *(number(errors.get(name), "{:.1e}") for name in IMPLEMENTATIONS[:2]),
        *(number(row["extra_mib"].get(name)) for name in IMPLEMENTATIONS if device == "cuda"),
    ]


# --- Inputs and implementations ---


def make_pyramid(channels: int, seed: int, device: str) -> list[Tensor]:
    """Normally distributed maps P2 to P5 of one image, fp32 (1, channels, Hl, Wl)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, channels, -(-HEIGHT // 32) * 32 // s, -(-WIDTH // 32) * 32 // s) for s in STRIDES]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def make_boxes(count: int, seed: int, device: str) -> Boxes:
    """Random boxes within the image.

    The square root of the area is log-uniform from 16 to 800 pixels, and width / height is
    log-uniform from 1:2 to 2:1; boxes larger than the image are cut to it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    size = SMALLEST * (LARGEST / SMALLEST) ** uniform()
    stretch = 2 ** (uniform() - 0.5)  # the square root of width / height
    width = (size * stretch).clamp(max=WIDTH - 1)
    height = (size / stretch).clamp(max=HEIGHT - 1)
    x, y = uniform() * (WIDTH - width), uniform() * (HEIGHT - height)
    return Boxes(torch.stack([x, y, x + width, y + height], dim=1).to(device))


def make_poolers(bins: int, sampling_ratio: int) -> dict[str, Pooler]:
    """The three implementations, each from maps and boxes to (R, C, bins, bins).

    Args:
        bins: of the output, along each axis.
        sampling_ratio: samples per bin and axis; 0 adapts to the box.
    """
    settings = (bins, SCALES, sampling_ratio, "ROIAlignV2")
    return {
        "ours": FusedROIPooler(*settings),
        "detectron2": ROIPooler(*settings),
        "torchvision": _torchvision_pooler(bins, sampling_ratio),
    }


def _torchvision_pooler(bins: int, sampling_ratio: int) -> Pooler:
    """torchvision's operator level by level, with as little overhead as possible."""

    def pool(maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        rois = torch.nn.functional.pad(boxes[0].tensor, (1, 0))
        levels = assign_levels(rois, len(maps), 2, 224, 4)
        out = maps[0].new_empty((len(rois), maps[0].shape[1], bins, bins))
        for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
            chosen = (levels == level).nonzero()[:, 0]
            part = rois[chosen].to(feature.dtype)
            pooled = torchvision_roi_align(feature, part, bins, scale, sampling_ratio, True)
            out = out.index_put((chosen,), pooled)
        return out

    return pool


def _reference(
    maps: Sequence[Tensor], boxes: Boxes, grad: Tensor, bins: int, sampling_ratio: int
) -> dict[str, list[Tensor]]:
    """Output and the maps' gradients in fp64, by torchvision, which shares no code with ours."""
    wide = [m.detach().double().contiguous().requires_grad_() for m in maps]
    out = _torchvision_pooler(bins, sampling_ratio)(wide, [boxes])
    grads = torch.autograd.grad(out, wide, grad.double())
    return {"forward": [out.detach()], "backward": list(grads)}


def touched_cells(boxes: Boxes, bins: int, sampling_ratio: int) -> int:
    """The number of map cells, over all levels, that the output depends on."""
    device = boxes.tensor.device.type
    maps = [torch.ones_like(m).requires_grad_() for m in make_pyramid(1, 0, device)]
    out = FusedROIPooler(bins, SCALES, sampling_ratio, "ROIAlignV2")(maps, [boxes])
    return sum(int(g.count_nonzero()) for g in torch.autograd.grad(out.sum(), maps))


class _Implementation:
    """A pooler with its inputs: maps, boxes, output and the output's gradient per input set."""

    def __init__(
        self,
        pooler: Pooler,
        maps: list[list[Tensor]],
        boxes: list[Boxes],
        grads: list[Tensor],
        layout: torch.memory_format,
    ) -> None:
        self._pooler = pooler
        self._boxes = boxes
        self._maps = [
            [m.detach().contiguous(memory_format=layout).requires_grad_() for m in pyramid]
            for pyramid in maps
        ]
        self._outputs = [pooler(m, [b]) for m, b in zip(self._maps, boxes, strict=True)]
        # The next layer's backward returns the gradient in the output's layout.
        outputs = zip(self._outputs, grads, strict=True)
        self._grads = [torch.empty_like(out).copy_(grad) for out, grad in outputs]

    def runs(self, direction: str) -> list[Run]:
        """One function per input set, which returns the output or the maps' gradients."""
        run = self._forward if direction == "forward" else self._backward
        return [partial(run, index) for index in range(len(self._maps))]

    def _forward(self, index: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return [self._pooler(self._maps[index], [self._boxes[index]])]

    def _backward(self, index: int) -> Sequence[Tensor]:
        out, maps, grad = self._outputs[index], self._maps[index], self._grads[index]
        return torch.autograd.grad(out, maps, grad, retain_graph=True)


# --- Measuring ---


def measure(
    rois: int,
    sampling_ratio: int,
    dtype_name: str,
    pyramids: list[list[Tensor]],
    *,
    repeats: int,
    bandwidth: float,
    device: str,
) -> Iterator[dict[str, Any]]:
    """Measures one setting in both layouts, forward and backward.

    Args:
        rois: how many, a key of ``BINS``.
        sampling_ratio: samples per bin and axis; 0 adapts to the box.
        dtype_name: a key of ``DTYPES``.
        pyramids: ``MAX_INPUT_SETS`` lists of fp32 maps (1, C, Hl, Wl).
        repeats: timed turns of each implementation.
        bandwidth: of the device's memory, in bytes per millisecond.
        device: "cpu" or "cuda".

    Yields:
        a row of the table: the setting; "milliseconds", the median per implementation that supports
        the dtype, and of the baseline; "speedup", these times divided by ours; "error" per
        implementation, the largest difference from fp64 relative to the largest value; "floor", the
        milliseconds in which the device's memory moves the least data possible; "extra_mib" per
        implementation, the peak memory beyond the inputs, None on the CPU.
    """
    dtype, bins, ratio = DTYPES[dtype_name], BINS[rois], sampling_ratio
    channels = pyramids[0][0].shape[1]
    boxes = [make_boxes(rois, seed, device) for seed in range(len(pyramids))]
    shape = (rois, channels, bins, bins)
    generators = [torch.Generator().manual_seed(100 + index) for index in range(len(pyramids))]
    grads = [torch.randn(shape, generator=g).to(device, dtype) for g in generators]
    rounded = [[m.to(dtype) for m in maps] for maps in pyramids]
    expected = _reference(rounded[0], boxes[0], grads[0], bins, ratio)
    poolers = make_poolers(bins, ratio)
    names = [name for name in IMPLEMENTATIONS if _supports(poolers[name], rounded[0], boxes[0])]
    # The least traffic: forward reads the cells that the output depends on and writes the output;
    # backward reads the output's gradient and writes the gradient of every cell, zeros too.
    cells = {
        "forward": touched_cells(boxes[0], bins, ratio) * channels,
        "backward": sum(m.numel() for m in pyramids[0]),
    }

    for layout, memory_format in LAYOUTS.items():
        is_baseline = dtype_name == "fp32" and layout == "NCHW"
        sets = input_sets(len(names) + (not is_baseline))
        own = (boxes[:sets], grads[:sets])
        implementations = {
            name: _Implementation(poolers[name], rounded[:sets], *own, memory_format)
            for name in names
        }
        if not is_baseline:
            implementations[BASELINE] = _Implementation(
                poolers["detectron2"], pyramids[:sets], *own, LAYOUTS["NCHW"]
            )
        for direction in ("forward", "backward"):
            runs = {name: i.runs(direction) for name, i in implementations.items()}
            error = {name: _relative_error(runs[name][0](), expected[direction]) for name in names}
            # Only CUDA counts the memory of so short a run.
            extra_mib = {
                name: peak_memory(runs[name][0], device) if device == "cuda" else None
                for name in names
            }
            times = median_times(runs, repeats, device)
            if is_baseline:
                times[BASELINE] = times["detectron2"]
            moved = (expected["forward"][0].numel() + cells[direction]) * dtype.itemsize
            yield {
                "rois": rois,
                "bins": bins,
                "sampling_ratio": ratio,
                "dtype": dtype_name,
                "layout": layout,
                "direction": direction,
                "milliseconds": times,
                "speedup": {name: t / times["ours"] for name, t in times.items() if name != "ours"},
                "error": error,
                "floor": moved / bandwidth,
                "extra_mib": extra_mib,
            }


def _supports(pooler: Pooler, maps: list[Tensor], boxes: Boxes) -> bool:
    """Whether an implementation supports the maps' dtype."""
    try:
        with torch.no_grad():
            pooler(maps, [boxes])
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        return False
    return True


def _relative_error(actual: Sequence[Tensor], expected: list[Tensor]) -> float:
    largest = max(e.abs().max().item() for e in expected)
    differences = [a.double() - e for a, e in zip(actual, expected, strict=True)]
    return max(d.abs().max().item() for d in differences) / (largest or 1.0)


def input_sets(implementations: int) -> int:
    """How many input sets to use in turns.

    At least three, so that a set has left the caches when its turn comes, and coprime with the
    number of implementations, so that each of them meets every set.
    """
    return 3 if implementations % 3 else 4


def median_times(runs: Mapping[str, Sequence[Run]], repeats: int, device: str) -> dict[str, float]:
    """Times implementations alternately.

    Args:
        runs: implementation -> functions that do the same on one input set each; equally many.
        repeats: turns of each implementation after warming up; fewer, but at least
            ``FEWEST_REPEATS``, where they take more than ``PATIENCE_SECONDS``.
        device: "cpu" or "cuda".

    Returns:
        the median milliseconds of one run, per implementation.
    """
    calls = itertools.count()

    def measure_turn(functions: Sequence[Run], turn: int) -> list[float]:
        times = []
        for _ in range(TIMINGS_PER_TURN[device]):
            start = clock(device)
            for _ in range(CALLS[device]):
                functions[next(calls) % len(functions)]()
            times.append((clock(device) - start) / CALLS[device])
        return times

    start = time.perf_counter()
    times = alternate(
        {name: partial(measure_turn, functions) for name, functions in runs.items()},
        turns=repeats,
        warm_ups=WARM_UPS[device],
        enough=lambda turns: (
            turns >= FEWEST_REPEATS and time.perf_counter() - start > PATIENCE_SECONDS
        ),
    )
    return {name: statistics.median(itertools.chain(*turns)) for name, turns in times.items()}


def copy_bandwidth(device: str) -> float:
    """The memory's bandwidth, read and write, in bytes per millisecond of a large copy."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    milliseconds = median_times({"copy": [lambda: target.copy_(source)]}, 5, device)["copy"]
    return 2 * source.nbytes / milliseconds


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
