"""Times FusedROIPooler beside detectron2's ROIPooler and torchvision level by level."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from mask_rcnn_plus.modeling import FusedROIPooler
from mask_rcnn_plus.ops import backend
from mask_rcnn_plus.ops.levels import assign_levels

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = ("ours", "detectron2", "torchvision")


@dataclass
class Case:
    """One row of the table: milliseconds of each side, and how far ours is from fp64."""

    rois: int
    bins: int
    ratio: int
    dtype: str
    memory_format: str
    direction: str
    ours: float
    detectron2: float | None
    torchvision: float | None
    floor: float
    error: float


def make_pyramid(channels: int, device: str) -> list[Tensor]:
    """P2 to P5 of an 800 x 1344 image."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, channels, 800 // s, 1344 // s) for s in (4, 8, 16, 32)]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def make_boxes(count: int, device: str) -> Tensor:
    """Boxes of 16 to 800 pixels, evenly spread in the logarithm, aspect ratios 1:2 to 2:1."""
    generator = torch.Generator().manual_seed(0)
    side = 16 * 50 ** torch.rand(count, generator=generator)
    aspect = 2 ** (torch.rand(count, generator=generator) - 0.5)
    width, height = (side * aspect).clamp(max=1332), (side / aspect).clamp(max=799)
    x = torch.rand(count, generator=generator) * (1333 - width)
    y = torch.rand(count, generator=generator) * (800 - height)
    return torch.stack([x, y, x + width, y + height], dim=1).to(device)


def _torchvision_pooler(bins: int, ratio: int) -> Callable[[list[Tensor], list[Boxes]], Tensor]:
    def pool(maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        rows = torch.nn.functional.pad(boxes[0].tensor, (1, 0))
        levels = assign_levels(rows, len(maps), 2, 224, 4)
        out = maps[0].new_empty((len(rows), maps[0].shape[1], bins, bins))
        for level, (feature, scale) in enumerate(zip(maps, SCALES, strict=True)):
            chosen = (levels == level).nonzero()[:, 0]
            part = rows[chosen].to(feature.dtype)
            pooled = torchvision_roi_align(feature, part, bins, scale, ratio, True)
            out = out.index_put((chosen,), pooled)
        return out

    return pool


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3


def _alternate(sides: dict[str, Callable[[], object]], repeats: int, device: str) -> dict:
    """Median milliseconds of each side, taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = _clock(device)
            run()
            if turn > 0:  # the first one warms up
                times[name].append(_clock(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _bandwidth(device: str) -> float:
    """Bytes a millisecond of a large copy: what the device's memory gives."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = _alternate({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * source.nbytes / seconds


def _cases(
    rois: int, bins: int, ratio: int, dtype: str, memory_format: str, arguments: argparse.Namespace
) -> Iterator[Case]:
    device, kind = arguments.device, DTYPES[dtype]
    exact = make_pyramid(arguments.channels, device)
    maps = [m.to(kind).contiguous(memory_format=FORMATS[memory_format]) for m in exact]
    maps = [m.requires_grad_() for m in maps]
    boxes = [Boxes(make_boxes(rois, device))]
    settings = (bins, SCALES, ratio, "ROIAlignV2")
    poolers: dict[str, Callable] = {
        "ours": FusedROIPooler(*settings),
        "detectron2": ROIPooler(*settings),
        "torchvision": _torchvision_pooler(bins, ratio),
    }
    outputs: dict[str, Tensor] = {}
    for name, pooler in poolers.items():
        try:
            outputs[name] = pooler(maps, boxes)
        except (RuntimeError, NotImplementedError):
            continue  # torchvision knows no bf16
    grad = torch.randn_like(outputs["ours"])
    wide = [m.detach().double().requires_grad_() for m in maps]
    expected = FusedROIPooler(*settings)(wide, boxes)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    grads = torch.autograd.grad(outputs["ours"], maps, grad, retain_graph=True)

    def forward(pooler: Callable) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                pooler(maps, boxes)

        return run

    def backward(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, maps, grad, retain_graph=True)

    size = outputs["ours"].element_size()
    cells = sum(m.numel() for m in maps) * size
    # The least traffic: forward reads the maps at most once and writes the output, backward reads
    # the output's gradient and writes the maps'.
    floor = (outputs["ours"].numel() * size + cells) / arguments.bandwidth
    for direction, runs, error in (
        ("forward", {n: forward(poolers[n]) for n in outputs}, outputs["ours"] - expected),
        ("backward", {n: backward(outputs[n]) for n in outputs}, None),
    ):
        times = _alternate(runs, arguments.repeats, device)
        if error is None:
            distance = max(
                (a.double() - b).abs().max().item()
                for a, b in zip(grads, expected_grads, strict=True)
            )
        else:
            distance = error.abs().max().item()
        yield Case(
            rois,
            bins,
            ratio,
            dtype,
            memory_format,
            direction,
            *(times.get(side) for side in SIDES),
            floor,
            distance,
        )


def _environment(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
        where += f", {torch.get_num_threads()} threads"
        if backend() == "native":
            where += f", {torch.ops.mask_rcnn_plus.cpu_isa()}"
    return (
        f"{where}; torch {torch.__version__}; operators: {backend(arguments.device)}; memory "
        f"{arguments.bandwidth / 1e6:.1f} GB/s by copying"
    )


def _row(case: Case) -> str:
    def against(milliseconds: float | None) -> str:
        if milliseconds is None:
            return "- | -"
        return f"{milliseconds:.2f} | {milliseconds / case.ours:.1f}x"

    ratio = "adaptive" if case.ratio == 0 else case.ratio
    return (
        f"| {case.rois} x {case.bins}x{case.bins} | {ratio} | {case.dtype} | {case.memory_format} "
        f"| {case.direction} | {case.ours:.2f} | {against(case.detectron2)} "
        f"| {against(case.torchvision)} | {case.floor:.2f} | {case.error:.1e} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a Markdown table.

    Args:
        argv: ``--device``, ``--repeats``, ``--channels``, ``--dtypes``, ``--json``; see ``--help``.

    Returns:
        the exit code, 0.
    """
    parser = argparse.ArgumentParser(prog="benchmark roi-align", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args(argv)
    arguments.bandwidth = _bandwidth(arguments.device)

    print(_environment(arguments), end="\n\n")
    print("Milliseconds, medians; floor: traffic of maps and output once at the memory's speed.\n")
    print(
        "| case | sampling | dtype | format | direction | ours | detectron2 | ratio | torchvision "
        "| ratio | floor | error |"
    )
    print("| --- " * 12 + "|")
    cases = []
    for rois, bins in ((1000, 7), (100, 14)):
        for ratio in (2, 0):
            for dtype in arguments.dtypes:
                for memory_format in FORMATS:
                    for case in _cases(rois, bins, ratio, dtype, memory_format, arguments):
                        print(_row(case), flush=True)
                        cases.append(case)
    if arguments.json is not None:
        report = {"environment": _environment(arguments), "cases": [asdict(c) for c in cases]}
        arguments.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
