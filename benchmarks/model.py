"""Times a whole model: stock detectron2, torchvision and ours, with the same weights and images."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from benchmarks.harness import Report, add_arguments, apply_arguments, markdown_table, number
from benchmarks.model_implementations import (
    BASELINES,
    DTYPES,
    Implementation,
    Inputs,
    build_implementations,
    set_limits,
    stock_config,
)
from benchmarks.model_inputs import (
    find_threshold,
    inference_images,
    set_random_weights,
    training_batches,
)
from benchmarks.model_measure import (
    DATA,
    SWEEPS,
    InferenceRow,
    Line,
    TrainingRow,
    average_precision,
    measure_inference,
    measure_training,
    sweep,
)
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import class_names
from mask_rcnn_plus.engine.checkpoint import Checkpointer, local_weights
from mask_rcnn_plus.engine.checks import check_components
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, choices, image_size, positive, run_command
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.model"
MARKDOWN, JSON, PLOT = "model.md", "model.json", "model_sweep.png"
MODES = ("inference", "training")

_SWEEP_LABELS = {"batch": "images per batch", "detections": "detections per image"}
_STAGES = (
    *("forward", "backward", "optimiser"),
    *("backbone", "FPN", "RPN head", "proposals", "box pooler", "box head", "detections"),
    *("mask pooler", "mask head", "keypoint pooler", "keypoint head", "paste, RLE", "other"),
)
_COLORS = ("#c8553d", "#5b8db8", "#2a7f62", "#8a6fb0", "#1b1b1b")

_EPILOG = f"""
The implementations run alternately in one process. A baseline is the config's model in fp32, as
detectron2 (its own heads, poolers, pasting and pycocotools, NCHW) or torchvision (only R50-FPN)
runs it; ours has the same weights. Times are medians; "2.0x" means that ours is twice as fast.
Hooks time the stages, which add up to the total. Memory is the peak beyond what was in use. With
--output, {MARKDOWN}, {JSON} and, with --sweep, {PLOT} contain the results with the hardware,
versions and command. Without --weights the weights are random, and set so that each image has
--detections objects.

example:
  {PROGRAM} --config-file configs/torchvision_R_50_FPN.yaml --threads 2 \\
      --dtype fp32,bf16 --against stock,torchvision --output output/benchmark
"""


@dataclass
class Setup:
    """What is measured; built before anything is printed, so that mistakes end here.

    Attributes:
        cfg: detectron2's own config of the model.
        model: detectron2's, in evaluation mode, with the weights of all implementations.
        weights: a description of those.
        images: two batches, for inference.
        implementations: of inference; empty if it is not measured.
        batches: of training; empty if it is not measured.
        data_ms: milliseconds of loading one training batch, by detectron2's mapper and by ours.
    """

    cfg: CfgNode
    model: nn.Module
    weights: str
    images: Inputs
    implementations: list[Implementation] = field(default_factory=list)
    batches: list[Inputs] = field(default_factory=list)
    data_ms: tuple[float, float] = (0.0, 0.0)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints its tables as Markdown.

    Returns:
        the exit code, 0.

    Raises:
        UserError: the config, weights or data are invalid, or the output cannot be written.
        UsageError: invalid arguments.
    """
    arguments = _parse(argv)
    cfg = _read_config(arguments)
    apply_arguments(arguments, [MARKDOWN, JSON] + [PLOT] * bool(arguments.sweep))
    setup = _build(arguments, cfg)
    report = Report(shlex.join([*PROGRAM.split(), *argv]), describe_environment(arguments.device))
    report.add(f"Weights: {setup.weights}", "")
    if "inference" in arguments.mode:
        _inference(arguments, setup, report)
    if arguments.sweep:
        _sweep(arguments, setup, report)
    if setup.batches:
        _training(arguments, setup, report)
    if arguments.output is not None:
        report.write(arguments.output / MARKDOWN, arguments.output / JSON)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add_arguments(parser, "--config-file")
    add("--weights", default="", metavar="FILE", help="default: random weights")
    add("--data", metavar="NAME", help="data set for images and AP (default: generated images)")
    add("--dtype", type=choices(DTYPES), default=["fp32", "bf16"], help="of ours: fp32,bf16,fp16")
    add("--against", type=choices(BASELINES), default=["stock"], help="stock,torchvision")
    add("--mode", type=choices(MODES), default=list(MODES), help="default: inference,training")
    add("--sweep", type=choices(SWEEPS), default=[], help="batch,detections")
    add("--batch", type=positive, default=1, help="images per batch (default: 1)")
    add("--train-batch", type=positive, default=2, help="images per step (default: 2)")
    add("--detections", type=positive, default=100, help="most per image (default: 100)")
    add("--image-size", type=image_size, default=(800, 1216), help="HxW (default: 800x1216)")
    add("--train-image-size", type=image_size, default=(512, 512), help="HxW (default: 512x512)")
    add_arguments(parser, "--device", "--repeats", "--threads", "--output", "--overwrite", "opts")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.device == "cpu" and "fp16" in arguments.dtype:
        parser.error("--dtype fp16 needs CUDA; CPUs compute it slower than fp32; use bf16")
    if "stock" not in arguments.against:
        # Agreement and ratios always refer to stock.
        arguments.against = ["stock", *arguments.against]
    return arguments


def _read_config(arguments: argparse.Namespace) -> CfgNode:
    """detectron2's own config of the model, after a check of the config, weights and data set.

    Raises:
        UserError: one of them is missing, or they do not fit together.
    """
    cfg = load_config(arguments.config_file, arguments.opts)
    check_components(cfg)
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        raise UserError(
            f"MODEL.META_ARCHITECTURE: the benchmark supports only GeneralizedRCNN, got "
            f"'{cfg.MODEL.META_ARCHITECTURE}'"
        )
    if arguments.weights:
        local_weights(arguments.weights)
    names = class_names(arguments.data) if arguments.data else []
    heads = cfg.MODEL.ROI_HEADS
    if heads.NUM_CLASSES == -1:
        heads.NUM_CLASSES = len(names) or 80
    if names and len(names) != heads.NUM_CLASSES:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {heads.NUM_CLASSES}, but --data {arguments.data} has "
            f"{len(names)} classes: set it to {len(names)}, or name another data set"
        )
    cfg.MODEL.DEVICE = arguments.device
    cfg.TEST.DETECTIONS_PER_IMAGE = arguments.detections
    cfg.DATALOADER.NUM_WORKERS = 0
    return stock_config(cfg)


def _build(arguments: argparse.Namespace, cfg: CfgNode) -> Setup:
    """The model with its weights, the images and the implementations.

    Args:
        arguments: of the command line.
        cfg: from ``_read_config``; for random weights its score threshold is set, in place.

    Raises:
        UserError: the weights do not fit the model, an implementation cannot run it, or the data
            set has no objects to train on.
    """
    images = inference_images(cfg, arguments.data, arguments.batch * 2, arguments.image_size)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if arguments.weights:
        Checkpointer(model, strict=True).load(arguments.weights)
        weights = f"{arguments.weights}."
    else:
        threshold = set_random_weights(model, images[:1], arguments.detections)
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
        weights = f"random; the score threshold, {threshold:.3g}, lets enough candidates pass."
    setup = Setup(cfg, model, weights, images)
    if "inference" in arguments.mode or arguments.sweep:
        setup.implementations = build_implementations(
            cfg,
            model,
            against=arguments.against,
            dtypes=arguments.dtype,
            image_size=tuple(images[0]["image"].shape[1:]),
        )
    if "training" in arguments.mode:
        setup.batches, setup.data_ms = training_batches(
            cfg,
            arguments.data,
            batch=arguments.train_batch,
            batches=2,
            size=arguments.train_image_size,
        )
    return setup


def _inference(arguments: argparse.Namespace, setup: Setup, report: Report) -> None:
    rows = measure_inference(
        setup.implementations,
        [setup.images[: arguments.batch], setup.images[arguments.batch :]],
        repeats=arguments.repeats,
        device=arguments.device,
    )
    report.data["inference"] = [asdict(row) for row in rows]
    shape = _shape(setup.images[0])
    count = f"{rows[0].detections:.0f} detections"
    report.add(f"## Inference: batches of {arguments.batch}, images of {shape}, {count} each", "")
    report.add(*_times_table(rows, "batch"), "", *_agreement_table(rows), "")
    if arguments.data:
        precisions = average_precision(setup.cfg, setup.implementations, arguments.data)
        report.data["AP"] = precisions
        report.add(*_precision_table(precisions), "")


def _training(arguments: argparse.Namespace, setup: Setup, report: Report) -> None:
    rows = measure_training(
        setup.cfg,
        setup.model,
        setup.batches,
        dtypes=arguments.dtype,
        repeats=arguments.repeats,
        device=arguments.device,
        data_ms=setup.data_ms,
    )
    report.data["training"] = [asdict(row) for row in rows]
    shape = _shape(setup.batches[0][0])
    report.add(f"## Training: batches of {arguments.train_batch} images of {shape}", "")
    report.add(*_times_table(rows, "step"), "", *_loss_table(rows), "")


def _sweep(arguments: argparse.Namespace, setup: Setup, report: Report) -> None:
    lines = []
    image = setup.images[0]
    for kind in arguments.sweep:
        if kind == "detections" and not arguments.weights:
            threshold = find_threshold(setup.model, [image], max(SWEEPS[kind]))
            for one in setup.implementations:
                set_limits(one.model, threshold=threshold, detections=arguments.detections)
        images = [image] * max(SWEEPS["batch"])
        lines += sweep(kind, setup.implementations, images, detections=arguments.detections)
    report.data["sweep"] = [asdict(line) for line in lines]
    report.add("## Time over images and detections", "", *_sweep_table(lines), "")
    if arguments.output is not None:
        plot(lines, arguments.output / PLOT)


def _shape(sample: dict[str, Any]) -> str:
    return "x".join(map(str, sample["image"].shape[1:]))


def _times_table(rows: Sequence[InferenceRow] | Sequence[TrainingRow], unit: str) -> list[str]:
    """Stages per implementation, then the ratios of the baselines' times to ours."""
    baselines = [row for row in rows if not row.side.startswith("ours")]
    ours = [row for row in rows if row.side.startswith("ours")]
    pairs = [(baseline, our) for our in ours for baseline in baselines]
    head = [f"ms per {unit}", *(row.side for row in rows)]
    head += [f"{our.side} against {baseline.side.split()[0]}" for baseline, our in pairs]

    def line(name: str, value: Callable[[Any], float | None]) -> list[str]:
        ratios = [_ratio(value(baseline), value(our)) for baseline, our in pairs]
        return [name, *(number(value(row)) for row in rows), *ratios]

    stages = {stage for row in rows for stage in row.stages}
    lines = [
        line(stage, lambda row, stage=stage: row.stages.get(stage))
        for stage in _STAGES
        if stage in stages
    ]
    lines.append(line("**total**", lambda row: row.total))
    if DATA in stages:
        lines.append(line("loading (not in total)", lambda row: row.stages.get(DATA)))
    blank = [""] * len(pairs)
    lines.append(["images/s", *(number(row.images_per_second, "{:.2f}") for row in rows), *blank])
    lines.append(["peak memory, MiB", *(number(row.peak_mib, "{:.0f}") for row in rows), *blank])
    return markdown_table(head, lines, align_right=True)


def _ratio(baseline: float | None, ours: float | None) -> str:
    return f"{baseline / ours:.2f}x" if baseline and ours else "-"


def _agreement_table(rows: Sequence[InferenceRow]) -> list[str]:
    """How the other implementations' detections agree with the first's."""
    head = [
        f"against {rows[0].side}",
        *("detections", "matched", "score difference: median, largest"),
        *("box difference, px: median, largest", "mask IoU: mean, lowest"),
    ]
    lines = []
    for row in rows[1:]:
        a = row.agreement
        scores = [number(a[f"score_difference_{x}"], "{:.2g}") for x in ("median", "largest")]
        boxes = [number(a[f"box_difference_{x}"], "{:.2g}") for x in ("median", "largest")]
        masks = [number(a[f"mask_iou_{x}"], "{:.4f}") for x in ("mean", "least")]
        counts = [f"{a['found']} of {a['expected']}", str(a["matched"])]
        lines.append([row.side, *counts, *(", ".join(pair) for pair in (scores, boxes, masks))])
    return markdown_table(head, lines, align_right=True)


def _loss_table(rows: Sequence[TrainingRow]) -> list[str]:
    steps = [f"step {n + 1}" for n in range(len(rows[0].losses))]
    lines = [
        [row.side, *(f"{loss:.4f}" for loss in row.losses), f"{100 * row.loss_difference:.2f} %"]
        for row in rows
    ]
    return markdown_table(["loss", *steps, "mean difference"], lines, align_right=True)


def _precision_table(precisions: dict[str, dict[str, float]]) -> list[str]:
    first = next(iter(precisions.values()))
    lines = [
        [name, *(f"{aps[task]:.2f} ({aps[task] - first[task]:+.2f})" for task in first)]
        for name, aps in precisions.items()
    ]
    return markdown_table(["AP (difference)", *first], lines, align_right=True)


def _sweep_table(lines: Sequence[Line]) -> list[str]:
    head = ["varied", "implementation", "ms per additional one", "intercept, ms"]
    rows = [
        [
            *(_SWEEP_LABELS[line.kind], line.side, f"{line.slope:.3g}"),
            *(f"{line.intercept:.1f}", f"{line.determination:.4f}"),
            ", ".join(f"{count:g}" for count in line.counts),
            ", ".join(f"{time:.0f}" for time in line.times),
        ]
        for line in lines
    ]
    return markdown_table([*head, "R²", "counts", "ms"], rows, align_right=True)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draws times and their least-squares lines, one panel per kind of sweep."""
    kinds = list(dict.fromkeys(line.kind for line in lines))
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        shown = [line for line in lines if line.kind == kind]
        for color, line in zip(_COLORS, shown, strict=False):
            label = f"{line.side}: {line.slope:.3g} ms each, R² {line.determination:.4f}"
            axes.plot(line.counts, line.times, "o", color=color, markersize=5)
            ends = np.array([0, max(line.counts)])
            axes.plot(ends, line.intercept + line.slope * ends, color=color, label=label)
        axes.set_xlabel(_SWEEP_LABELS[kind])
        axes.set_ylabel("ms per batch")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
