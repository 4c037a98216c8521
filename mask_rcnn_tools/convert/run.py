"""Converts labels, checks the new data set, and prints the results."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data import dataset_root
from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_tools.check.checking import check_coco, note_leaks
from mask_rcnn_tools.check.problems import ERROR
from mask_rcnn_tools.convert.labels import Labels
from mask_rcnn_tools.convert.writing import Plan, write_coco
from mask_rcnn_tools.terminal import quote, shell_command


def run(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Converts labels: returns 1 if something was skipped or the data check finds an error.

    Args:
        arguments: of the command line.
        options: the names of those that the format's ``read`` accepts.
    """
    limit_pixels(arguments.max_pixels)
    name = arguments.format.replace("-", "_")
    reader = importlib.import_module(f"mask_rcnn_tools.convert.{name}")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in options}
    labels: Labels = reader.read(arguments.source, **given)
    plan = Plan(
        arguments.output,
        arguments.format,
        classes=arguments.classes,
        val=arguments.val,
        split=arguments.split,
        seed=arguments.seed,
        link=arguments.link,
        overwrite=arguments.overwrite,
    )
    jsons = write_coco(labels, plan)
    name = arguments.output.resolve().name
    results = [
        check_coco(path, arguments.output / "images", name=f"{name}_{path.stem}", images="decode")
        for path in jsons
    ]
    note_leaks(results)
    if lines := labels.lines():
        print("\n".join(lines), end="\n\n")
    print("\n\n".join(result.text() for result in results))
    usable = [path.stem for path, result in zip(jsons, results, strict=True) if result.annotations]
    print(f"\n{_next_step(arguments.output, usable, arguments.split)}")
    return int(bool(labels.skipped) or any(result.kinds(ERROR) for result in results))


def _next_step(output: Path, splits: list[str], chosen: str | None) -> str:
    """The command that trains on the new data set; ``splits`` are those with objects."""
    output = output.resolve()
    name = output.name
    environment = ""
    if output.parent != dataset_root().resolve():
        environment = f"DETECTRON2_DATASETS={quote(str(output.parent))} "
    train = next((split for split in ("train", chosen) if split in splits), None)
    if train is None:
        return f"written: {output}; it has no objects to train on"
    test = f"('{name}_val',)" if train == "train" and "val" in splits else "()"
    keys = ["DATASETS.TRAIN", f"('{name}_{train}',)", "DATASETS.TEST", test]
    command = shell_command("train_net.py", "--config-file", "configs/small_data.yaml", *keys)
    return f"written: {output}; to train on it:\n  {environment}{command}"
