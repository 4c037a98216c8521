"""Times RoIAlign over a feature pyramid: ours, detectron2's ROIPooler and torchvision's."""

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
# Every row is also compared with this, whatever the row's dtype and layout.
BASELINE = "detectron2 NCHW fp32"
MAX_INPUT_SETS = 4

HEIGHT, WIDTH = 800, 1333  # of the image, whose maps are padded to a multiple of 32
STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]
SMALLEST, LARGEST = 16, 800  # square root of a box's area, in pixels

# Reading a GPU's clock waits for its queue, which takes longer than a small kernel. Several calls
# per reading make this negligible.
CALLS = {"cpu": 1, "cuda": 12}
# A virtual machine may return freed memory to its host within seconds, so the first call after a
# slow implementation is slower; the median of three timings is not.
TIMINGS_PER_TURN = {"cpu": 3, "cuda": 1}
WARM_UPS = {"cpu": 1, "cuda": 3}
# Turns end after this time, since torchvision's fp16 on a CPU takes half a minute where ours takes
# less than a second.
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
least possible data. Slow implementations get fewer turns than --repeats. --output writes the table
to {MARKDOWN} and, with more details, to {JSON}.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints a Markdown table."""
    arguments = _parse(argv)
    apply_arguments(arguments, (MARKDOWN, JSON))
    try:
        report = _run(arguments, shlex.join([*PROGRAM.split(), *argv]))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
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
    samples = "samples per bin and axis; 0 adapts to the box"
    add("--sampling", type=int, nargs="+", choices=(2, 0), default=[2, 0], help=samples)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--channels", type=positive, default=256, help="of the maps (default: 256)")
    add_arguments(parser, "--device", "--repeats", "--threads", "--output", "--overwrite")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace, command: str) -> Report:
    device, channels, repeats = arguments.device, arguments.channels, arguments.repeats
    environment = describe_environment(device)
    bandwidth = copy_bandwidth(device)
    environment["memory"] = f"{bandwidth / 1e6:.1f} GB/s by copying"
    report = Report(command, environment)
    rows: list[dict[str, Any]] = []
    report.data |= {"channels": channels, "repeats": repeats}
    report.data |= {"bandwidth_bytes_per_second": bandwidth * 1e3, "baseline": BASELINE}
    report.data["rows"] = rows
    settings = list(itertools.product(arguments.rois, arguments.sampling, arguments.dtypes))
    pyramids = [make_pyramid(channels, seed, device) for seed in range(MAX_INPUT_SETS)]
    options = {"repeats": repeats, "bandwidth": bandwidth, "device": device}
    total = len(settings) * len(LAYOUTS) * 2
    with tqdm(total=total, unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
        for setting in settings:
            for row in measure(*setting, pyramids, **options):
                cells = _cells(row, device)
                if not rows:
                    report.add(*markdown_table(list(cells), []))
                rows.append(row)
                report.add(markdown_row(cells.values()))
                bar.update()
    return report


def _cells(row: dict[str, Any], device: str) -> dict[str, str]:
    """Column of the table -> cell."""
    # On a GPU, times of tenths of a millisecond need three decimals.
    form = "{:.3f}" if device == "cuda" else "{:.2f}"
    cells = {"case": f"{row['rois']} x {row['bins']}x{row['bins']}"}
    cells["sampling"] = str(row["sampling_ratio"] or "adaptive")
    cells |= {name: row[name] for name in ("dtype", "layout", "direction")}
    for name in (*IMPLEMENTATIONS, BASELINE):
        cells[f"{name} ms"] = number(row["milliseconds"].get(name), form)
    for name in (*IMPLEMENTATIONS[1:], BASELINE):
        cells[f"against {name}"] = number(row["speedup"].get(name), "{:.2f}x")
    cells["floor ms"] = form.format(row["floor"])
    for name in IMPLEMENTATIONS[:2]:
        cells[f"error {name}"] = number(row["error"].get(name), "{:.1e}")
    if device == "cuda":
        cells |= {
            f"extra MiB {name}": number(row["extra_mib"].get(name)) for name in IMPLEMENTATIONS
        }
    return cells


# --- Inputs and implementations ---


def make_pyramid(channels: int, seed: int, device: str) -> list[Tensor]:
    """Normally distributed maps P2 to P5 of one image, fp32 (1, channels, Hl, Wl)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, channels, -(-HEIGHT // 32) * 32 // s, -(-WIDTH // 32) * 32 // s) for s in STRIDES]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def make_boxes(count: int, seed: int, device: str) -> Boxes:
    """Random boxes, clipped to the image.

    The square root of the area (16 to 800 pixels) and width / height (1:2 to 2:1) are log-uniform.
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
    """The three implementations, each from maps and boxes to (R, C, bins, bins)."""
    settings = (bins, SCALES, sampling_ratio, "ROIAlignV2")
    return {
        "ours": FusedROIPooler(*settings),
        "detectron2": ROIPooler(*settings),
        "torchvision": _torchvision_pooler(bins, sampling_ratio),
    }


def _torchvision_pooler(bins: int, sampling_ratio: int) -> Pooler:
    """torchvision's operator, called once per level, with as little overhead as possible."""

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
    """Output and gradients of the maps in fp64, by torchvision, which shares no code with ours."""
    wide = [m.detach().double().contiguous().requires_grad_() for m in maps]
    out = _torchvision_pooler(bins, sampling_ratio)(wide, [boxes])
    grads = torch.autograd.grad(out, wide, grad.double())
    return {"forward": [out.detach()], "backward": list(grads)}


def touched_cells(boxes: Boxes, bins: int, sampling_ratio: int) -> int:
    """The number of cells, in the maps of all levels, that the output depends on."""
    device = boxes.tensor.device.type
    maps = [torch.ones_like(m).requires_grad_() for m in make_pyramid(1, 0, device)]
    out = FusedROIPooler(bins, SCALES, sampling_ratio, "ROIAlignV2")(maps, [boxes])
    return sum(int(g.count_nonzero()) for g in torch.autograd.grad(out.sum(), maps))


def _make_runs(
    pooler: Pooler,
    pyramids: list[list[Tensor]],
    boxes: list[Boxes],
    grads: list[Tensor],
    layout: torch.memory_format,
) -> dict[str, list[Run]]:
    """Per direction, a function for each input set that returns the output or the gradients."""
    runs: dict[str, list[Run]] = {"forward": [], "backward": []}
    for pyramid, rois, grad in zip(pyramids, boxes, grads, strict=True):
        maps = [m.detach().contiguous(memory_format=layout).requires_grad_() for m in pyramid]
        out = pooler(maps, [rois])
        # The next layer's backward returns the gradient in the output's layout.
        grad = torch.empty_like(out).copy_(grad)
        runs["forward"].append(partial(_forward, pooler, maps, rois))
        runs["backward"].append(partial(torch.autograd.grad, out, maps, grad, retain_graph=True))
    return runs


def _forward(pooler: Pooler, maps: list[Tensor], boxes: Boxes) -> list[Tensor]:
    with torch.no_grad():
        return [pooler(maps, [boxes])]


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
        rois: the number of RoIs, a key of ``BINS``.
        sampling_ratio: samples per bin and axis; 0 adapts to the box.
        dtype_name: a key of ``DTYPES``.
        pyramids: ``MAX_INPUT_SETS`` lists of fp32 maps (1, C, Hl, Wl).
        repeats: timed turns of each implementation.
        bandwidth: the device's, in bytes per millisecond.
        device: "cpu" or "cuda".

    Yields:
        a row of the table: the setting, and, per implementation that supports the dtype,
        "milliseconds", the median, also of the baseline; "speedup", these times divided by ours;
        "error", the largest difference from fp64 relative to the largest value; "extra_mib", the
        peak memory beyond the inputs, None on the CPU. "floor": the milliseconds in which the
        device's memory moves the least possible data.
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
        all_runs = {
            name: _make_runs(poolers[name], rounded[:sets], *own, memory_format) for name in names
        }
        if not is_baseline:
            stock = poolers["detectron2"]
            all_runs[BASELINE] = _make_runs(stock, pyramids[:sets], *own, LAYOUTS["NCHW"])
        for direction in ("forward", "backward"):
            runs = {name: directions[direction] for name, directions in all_runs.items()}
            error = {name: _relative_error(runs[name][0](), expected[direction]) for name in names}
            # On the CPU, the run is too short for measuring its memory.
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
        _forward(pooler, maps, boxes)
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
    """The number of input sets that are used in turn.

    With at least three, a set has left the caches when its turn comes. A number that is coprime
    with the number of implementations lets each of them use every set.
    """
    return 3 if implementations % 3 else 4


def median_times(runs: Mapping[str, Sequence[Run]], repeats: int, device: str) -> dict[str, float]:
    """Times implementations alternately.

    Args:
        runs: implementation -> one function per input set.
        repeats: turns after the warm-up; fewer, but at least ``FEWEST_REPEATS``, if they take more
            than ``PATIENCE_SECONDS``.
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
    """The memory's bandwidth in a large copy: bytes read and written per millisecond."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    milliseconds = median_times({"copy": [lambda: target.copy_(source)]}, 5, device)["copy"]
    return 2 * source.nbytes / milliseconds


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
