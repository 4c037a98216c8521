"""Converts labels, checks the new data set, and prints the results."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.checking import check_coco, note_leaks
from mask_rcnn_tools.check.problems import ERROR
from mask_rcnn_tools.convert.labels import Labels, report_irregular
from mask_rcnn_tools.convert.next_step import next_step
from mask_rcnn_tools.convert.writing import Plan, write_coco


def run(arguments: argparse.Namespace, options: Sequence[str]) -> int:
    """Converts labels: returns 1 if something was skipped or the data check finds an error.

    Args:
        arguments: the parsed command line.
        options: names of the arguments that the format's ``read`` accepts.
    """
    limit_pixels(arguments.max_pixels)
    name = arguments.format.replace("-", "_")
    reader = importlib.import_module(f"mask_rcnn_tools.convert.{name}")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in options}
    try:
        labels: Labels = reader.read(arguments.source, **given)
    except UserError as error:
        # The files that are missing may be there, but as a link that leads nowhere or a pipe.
        odd = Labels()
        report_irregular(odd, arguments.source)
        places = [place for group in odd.skipped.values() for place in group]
        raise UserError("; ".join([str(error), *places[:2]])) from error
    report_irregular(labels, arguments.source)  # nothing, if the source is a file
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
    print(f"\n{next_step(arguments.output.resolve(), results)}")
    return int(bool(labels.skipped) or any(result.kinds(ERROR) for result in results))
