"""Times a whole model: stock detectron2, torchvision and ours, with the same weights and images."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
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
    Row,
    average_precision,
    measure_inference,
    measure_training,
    sweep,
)
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import check_components
from mask_rcnn_plus.data import class_names
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import local_weights
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, choices, image_size, positive, run_command
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.model"
MARKDOWN, JSON, PLOT = "model.md", "model.json", "model_sweep.png"
MODES = ("inference", "training")

_SWEEP_LABELS = {"batch": "images per batch", "detections": "detections per image"}
# The rows of the table of times, in order.
_STAGES = (
    *("forward", "backward", "optimiser"),
    *("backbone", "FPN", "RPN head", "proposals", "box pooler", "box head", "detections"),
    *("mask pooler", "mask head", "keypoint pooler", "keypoint head", "paste, RLE", "other"),
    *("total", DATA),
)
_STAGE_LABELS = {"total": "**total**", DATA: "loading (not in total)"}
_COLORS = ("#c8553d", "#5b8db8", "#2a7f62", "#8a6fb0", "#1b1b1b")

_EPILOG = f"""
The implementations run alternately in one process, with the same weights. The baselines run in
fp32: stock is detectron2 with its own heads, poolers, mask pasting and pycocotools, in NCHW;
torchvision has only R50-FPN. Times are medians; "2.0x" means that ours is twice as fast. The stages
add up to the total. Memory is the peak beyond what was in use. Without --weights the weights are
random, and adjusted so that each image has --detections objects. --output writes the results with
hardware, versions and command to {MARKDOWN}, {JSON} and, with --sweep, {PLOT}.

example:
  {PROGRAM} --config-file configs/torchvision_R_50_FPN.yaml --threads 2 \\
      --dtype fp32,bf16 --against stock,torchvision --output output/benchmark
"""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints its tables as Markdown."""
    arguments = _parse(argv)
    cfg = _read_config(arguments)
    apply_arguments(arguments, [MARKDOWN, JSON] + [PLOT] * bool(arguments.sweep))
    # An error in the input must end in one line, so print nothing before everything is built.
    images = inference_images(cfg, arguments.data, arguments.batch * 2, arguments.image_size)
    model, weights = _build_model(cfg, arguments, images[:1])
    implementations: list[Implementation] = []
    if "inference" in arguments.mode or arguments.sweep:
        implementations = build_implementations(
            cfg,
            model,
            against=arguments.against,
            dtypes=arguments.dtype,
            image_size=tuple(images[0]["image"].shape[1:]),
        )
    if "training" in arguments.mode:
        batch, size = arguments.train_batch, arguments.train_image_size
        batches, data_ms = training_batches(cfg, arguments.data, batch=batch, batches=2, size=size)
    report = Report(shlex.join([*PROGRAM.split(), *argv]), describe_environment(arguments.device))
    report.add(f"Weights: {weights}", "")
    run = {"repeats": arguments.repeats, "device": arguments.device}
    if "inference" in arguments.mode:
        parts = [images[: arguments.batch], images[arguments.batch :]]
        rows = report.data["inference"] = measure_inference(implementations, parts, **run)
        shape, count = _shape(images[0]), f"{rows[0]['detections']:.0f} detections"
        report.add(f"## Inference: batches of {arguments.batch}, images of {shape}, {count} each")
        report.add("", *_times_table(rows, "batch"), "", *_agreement_table(rows), "")
        if arguments.data:
            precisions = average_precision(cfg, implementations, arguments.data)
            report.data["AP"] = precisions
            report.add(*_precision_table(precisions), "")
    if arguments.sweep:
        _sweep(arguments, model, implementations, images[0], report)
    if "training" in arguments.mode:
        rows = measure_training(cfg, model, batches, dtypes=arguments.dtype, data_ms=data_ms, **run)
        report.data["training"] = rows
        shape = _shape(batches[0][0])
        report.add(f"## Training: batches of {arguments.train_batch} images of {shape}", "")
        report.add(*_times_table(rows, "step"), "", *_loss_table(rows), "")
    if arguments.output is not None:
        report.write(arguments.output / MARKDOWN, arguments.output / JSON)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add_arguments(parser, "--config-file")
    add("--weights", default="", metavar="FILE", help="default: random weights")
    add("--data", metavar="NAME", help="data set for images and AP (default: generated images)")
    add("--dtype", type=choices(DTYPES), default=["fp32", "bf16"], help="ours (default: fp32,bf16)")
    add(
        "--against",
        type=choices(BASELINES),
        default=["stock"],
        help="stock,torchvision (default: stock)",
    )
    add("--mode", type=choices(MODES), default=list(MODES), help="inference,training (the default)")
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
    return arguments


def _read_config(arguments: argparse.Namespace) -> CfgNode:
    """The config for detectron2's own model, after a check of the config, weights and data set."""
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


def _build_model(
    cfg: CfgNode, arguments: argparse.Namespace, inputs: Inputs
) -> tuple[nn.Module, str]:
    """detectron2's model, in evaluation mode, and a description of its weights.

    With random weights, sets the config's score threshold, in place.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if arguments.weights:
        Checkpointer(model, strict=True).load(arguments.weights)
        return model, f"{arguments.weights}."
    threshold = set_random_weights(model, inputs, arguments.detections)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    return model, f"random; the score threshold, {threshold:.3g}, lets enough candidates pass."


def _sweep(
    arguments: argparse.Namespace,
    model: nn.Module,
    implementations: Sequence[Implementation],
    image: dict[str, Any],
    report: Report,
) -> None:
    rows = []
    for kind in arguments.sweep:
        if kind == "detections" and not arguments.weights:
            threshold = find_threshold(model, [image], max(SWEEPS[kind]))
            for item in implementations:
                set_limits(item.model, threshold=threshold, detections=arguments.detections)
        images = [image] * max(SWEEPS["batch"])
        rows += sweep(kind, implementations, images, detections=arguments.detections)
    report.data["sweep"] = rows
    report.add("## Time over images and detections", "", *_sweep_table(rows), "")
    if arguments.output is not None:
        plot(rows, arguments.output / PLOT)


def _shape(sample: dict[str, Any]) -> str:
    return "x".join(map(str, sample["image"].shape[1:]))


def _times_table(rows: Sequence[Row], unit: str) -> list[str]:
    """Stages per implementation, then the ratios of the baselines' times to ours."""
    baselines = [row for row in rows if not row["side"].startswith("ours")]
    ours = [row for row in rows if row["side"].startswith("ours")]
    pairs = [(baseline["side"], our["side"]) for our in ours for baseline in baselines]
    times = {row["side"]: {**row["stages"], "total": row["total"]} for row in rows}
    head = [f"ms per {unit}", *times]
    head += [f"{our} against {baseline.split()[0]}" for baseline, our in pairs]
    lines = []
    for stage in _STAGES:
        cells = {name: stages.get(stage) for name, stages in times.items()}
        if any(cell is not None for cell in cells.values()):
            ratios = [_ratio(cells[baseline], cells[our]) for baseline, our in pairs]
            label = _STAGE_LABELS.get(stage, stage)
            lines.append([label, *map(number, cells.values()), *ratios])
    for label, key, form in (
        ("images/s", "images_per_second", "{:.2f}"),
        ("peak memory, MiB", "peak_mib", "{:.0f}"),
    ):
        lines.append([label, *(number(row[key], form) for row in rows), *[""] * len(pairs)])
    return markdown_table(head, lines, align_right=True)


def _ratio(baseline: float | None, ours: float | None) -> str:
    return f"{baseline / ours:.2f}x" if baseline and ours else "-"


def _agreement_table(rows: Sequence[Row]) -> list[str]:
    """The agreement of each implementation's detections with those of the first."""
    head = [
        f"against {rows[0]['side']}",
        *("detections", "matched", "score difference: median, largest"),
        *("box difference, px: median, largest", "mask IoU: mean, lowest"),
    ]
    lines = []
    for row in rows[1:]:
        values = row["agreement"]
        line = [row["side"], f"{values['found']} of {values['expected']}", str(values["matched"])]
        for name, kinds, form in (
            ("score_difference", ("median", "largest"), "{:.2g}"),
            ("box_difference", ("median", "largest"), "{:.2g}"),
            ("mask_iou", ("mean", "least"), "{:.4f}"),
        ):
            line.append(", ".join(number(values[f"{name}_{kind}"], form) for kind in kinds))
        lines.append(line)
    return markdown_table(head, lines, align_right=True)


def _loss_table(rows: Sequence[Row]) -> list[str]:
    steps = [f"step {n + 1}" for n in range(len(rows[0]["losses"]))]
    lines = []
    for row in rows:
        losses = [f"{loss:.4f}" for loss in row["losses"]]
        lines.append([row["side"], *losses, f"{100 * row['loss_difference']:.2f} %"])
    return markdown_table(["loss", *steps, "mean difference"], lines, align_right=True)


def _precision_table(precisions: dict[str, dict[str, float]]) -> list[str]:
    first = next(iter(precisions.values()))
    lines = [
        [name, *(f"{aps[task]:.2f} ({aps[task] - first[task]:+.2f})" for task in first)]
        for name, aps in precisions.items()
    ]
    return markdown_table(["AP (difference)", *first], lines, align_right=True)


def _sweep_table(lines: Sequence[Row]) -> list[str]:
    head = ["varied", "implementation", "ms per additional one", "intercept, ms", "R²", "counts"]
    rows = [
        [
            *(_SWEEP_LABELS[line["kind"]], line["side"], f"{line['slope']:.3g}"),
            *(f"{line['intercept']:.1f}", f"{line['determination']:.4f}"),
            ", ".join(f"{count:g}" for count in line["counts"]),
            ", ".join(f"{time:.0f}" for time in line["times"]),
        ]
        for line in lines
    ]
    return markdown_table([*head, "ms"], rows, align_right=True)


def plot(lines: Sequence[Row], path: Path) -> None:
    """Draws times and their least-squares lines, one panel per kind of sweep."""
    kinds = list(dict.fromkeys(line["kind"] for line in lines))
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        shown = [line for line in lines if line["kind"] == kind]
        for color, line in zip(_COLORS, shown, strict=False):
            label = f"{line['side']}: {line['slope']:.3g} ms each, R² {line['determination']:.4f}"
            axes.plot(line["counts"], line["times"], "o", color=color, markersize=5)
            ends = np.array([0, max(line["counts"])])
            axes.plot(ends, line["intercept"] + line["slope"] * ends, color=color, label=label)
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
