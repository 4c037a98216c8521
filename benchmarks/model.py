"""Times a whole model beside stock detectron2 and torchvision, on the same weights and images."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import model_setup, model_sweep
from benchmarks.model_case import find_threshold
from benchmarks.model_data import average_precision
from benchmarks.model_inference import measure
from benchmarks.model_setup import Setup
from benchmarks.model_sides import BASELINES, DTYPES, set_limits
from benchmarks.model_table import (
    agreement_table,
    loss_table,
    markdown,
    times_table,
)
from benchmarks.model_training import measure_training
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import (
    Parser,
    choices,
    image_size,
    positive,
    prepare_output,
    require_device,
    run_command,
)
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.model"
MARKDOWN, JSON, PLOT = "model.md", "model.json", "model_sweep.png"
MODES = ("inference", "training")

_EPILOG = f"""
The sides take turns in one process. A baseline is the config's model as detectron2 (its own heads,
poolers, paste and pycocotools, NCHW) or torchvision (for R50-FPN) runs it, in fp32; ours has the
same weights. A figure is the median; "2.0x" says that ours is twice as fast. Stages are measured by
hooks and add up to the total. Memory: at the peak, beyond what was in use. With --output,
{MARKDOWN}, {JSON} and, with --sweep, {PLOT} hold it all with the hardware, versions and command.
Without --weights they are random, and made such that --detections objects are found in each image.

example:
  {PROGRAM} --config-file configs/torchvision_R_50_FPN.yaml --threads 2 \\
      --dtype fp32,bf16 --against stock,torchvision --output output/benchmark
"""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints its tables as Markdown.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument does not fit, or the output cannot be written.
    """
    arguments = _parse(argv)
    require_device(arguments.device)
    if arguments.device == "cpu" and "fp16" in arguments.dtype:
        raise UserError("--dtype fp16 needs CUDA; CPUs compute it slower than fp32: give bf16")
    cfg = model_setup.read_config(arguments)
    files = [MARKDOWN, JSON] + [PLOT] * bool(arguments.sweep)
    if arguments.output is not None:
        prepare_output(arguments.output, files, overwrite=arguments.overwrite)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    setup = model_setup.build(arguments, cfg)
    report = _run(arguments, setup, shlex.join([*PROGRAM.split(), *argv]))
    if arguments.output is not None:
        lines = report.pop("markdown")
        try:
            (arguments.output / MARKDOWN).write_text("\n".join(lines) + "\n")
            (arguments.output / JSON).write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write into {arguments.output}: {error.strerror}") from error
        print(f"written: {arguments.output}: {', '.join(files)}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML")
    add("--weights", default="", metavar="FILE", help="by default random ones")
    add("--data", metavar="NAME", help="data set for images, and for AP; by default own pictures")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", type=choices(DTYPES), default=["fp32", "bf16"], help="ours; default fp32,bf16")
    add("--against", type=choices(BASELINES), default=["stock"], help="default stock")
    add("--mode", type=choices(MODES), default=list(MODES), help="default inference,training")
    add("--sweep", type=choices(model_sweep.KINDS), default=[], help="batch,detections")
    add("--batch", type=positive, default=1, help="images at once (default 1)")
    add("--train-batch", type=positive, default=2, help="images of a step (default 2)")
    add("--detections", type=positive, default=100, help="of an image, at most (default 100)")
    add("--image-size", type=image_size, default=(800, 1216), help="HxW (default 800x1216)")
    add("--train-image-size", type=image_size, default=(512, 512), help="HxW (default 512x512)")
    add("--repeats", type=positive, default=7, help="timed turns of each side (default 7)")
    add("--threads", type=positive, help="CPU threads; by default torch's choice")
    add("--output", type=Path, metavar="FOLDER", help=f"write {MARKDOWN} and {JSON} there as well")
    add("--overwrite", action="store_true", help="replace files of an earlier run")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys, as for train_net.py")
    arguments = parser.parse_args(argv)
    if "stock" not in arguments.against:
        # What agreement and ratios are stated against.
        arguments.against = ["stock", *arguments.against]
    return arguments


def _run(arguments: argparse.Namespace, setup: Setup, command: str) -> dict[str, Any]:
    """Measures and prints; returns what is to be written."""
    environment = describe_environment(arguments.device)
    report: dict[str, Any] = {"command": command, "environment": environment, "markdown": []}
    lines = report["markdown"]

    def say(*more: str) -> None:
        lines.extend(more)
        # The bar is on standard error, which may be the same terminal.
        tqdm.write("\n".join(more), file=sys.stdout)
        sys.stdout.flush()

    facts = "; ".join(f"{name} {value}" for name, value in environment.items())
    say(f"`{command}`", "", facts, "", f"Weights: {setup.weights}", "")
    with tqdm(unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        if "inference" in arguments.mode:
            _infer(arguments, setup, report, say, bar)
        if arguments.sweep:
            _sweep(arguments, setup, report, say, bar)
        if setup.batches:
            _train(arguments, setup, report, say, bar)
    return report


def _infer(
    arguments: argparse.Namespace, setup: Setup, report: dict[str, Any], say: Any, bar: Any
) -> None:
    images = setup.images
    batches = [images[: arguments.batch], images[arguments.batch :]]
    rows = measure(
        setup.sides,
        batches,
        repeats=arguments.repeats,
        device=torch.device(arguments.device),
        step=bar.update,
    )
    shape = "x".join(map(str, images[0]["image"].shape[1:]))
    count = f"{rows[0].detections:.0f} detections"
    say(f"## Inference: batches of {arguments.batch}, images of {shape}, {count} each", "")
    say(*times_table(rows, "batch"), "", *agreement_table(rows), "")
    report["inference"] = [asdict(row) for row in rows]
    if arguments.data:
        report["AP"] = average_precision(setup.cfg, setup.sides, arguments.data)
        say(*_precision_table(report["AP"]), "")


def _train(
    arguments: argparse.Namespace, setup: Setup, report: dict[str, Any], say: Any, bar: Any
) -> None:
    rows = measure_training(
        setup.cfg,
        setup.model,
        setup.batches,
        dtypes=arguments.dtype,
        repeats=arguments.repeats,
        device=torch.device(arguments.device),
        data_ms=setup.data_ms,
        step=bar.update,
    )
    shape = "x".join(map(str, setup.batches[0][0]["image"].shape[1:]))
    say(f"## Training: batches of {arguments.train_batch} images of {shape}", "")
    say(*times_table(rows, "step"), "", *loss_table(rows), "")
    report["training"] = [asdict(row) for row in rows]


def _sweep(
    arguments: argparse.Namespace, setup: Setup, report: dict[str, Any], say: Any, bar: Any
) -> None:
    lines = []
    image = setup.images[0]
    for kind in arguments.sweep:
        values = model_sweep.BATCHES if kind == "batch" else model_sweep.DETECTIONS
        images = [image] * max(model_sweep.BATCHES)
        if kind == "detections" and not arguments.weights:
            lowered = find_threshold(setup.model, [image], max(values))
            for side in setup.sides:
                set_limits(side.model, threshold=lowered, detections=arguments.detections)
        lines += model_sweep.sweep(
            kind,
            setup.sides,
            images,
            values=values,
            detections=arguments.detections,
            step=bar.update,
        )
    say("## Growth", "")
    head = ["", "side", "ms of each more", "ms at none", "R²", "counts", "ms"]
    rows = [
        [
            *(model_sweep.KINDS[line.kind], line.side, f"{line.slope:.3g}"),
            *(f"{line.intercept:.1f}", f"{line.determination:.4f}"),
            ", ".join(f"{count:g}" for count in line.counts),
            ", ".join(f"{time:.0f}" for time in line.times),
        ]
        for line in lines
    ]
    say(*markdown(head, rows), "")
    report["sweep"] = [asdict(line) for line in lines]
    if arguments.output is not None:
        model_sweep.plot(lines, arguments.output / PLOT)


def _precision_table(results: dict[str, dict[str, float]]) -> list[str]:
    tasks = list(next(iter(results.values())))
    first = next(iter(results.values()))
    rows = [
        [side, *(f"{found[t]:.2f} ({found[t] - first[t]:+.2f})" for t in tasks)]
        for side, found in results.items()
    ]
    return markdown(["AP (difference)", *tasks], rows)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
