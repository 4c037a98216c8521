"""Makes one HTML page of an evaluation, or of two: metrics, errors, images, training, settings."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_tools.arguments import (
    Parser,
    UsageError,
    any_path,
    existing_file,
    existing_folder,
    positive,
)
from mask_rcnn_tools.files import require_new, write_atomically, writing
from mask_rcnn_tools.report.folders import results_folder

PROGRAM = "mask-rcnn-plus report"
# Identifies a page that may be overwritten.
MARK = '<meta name="generator" content="mask-rcnn-plus report">'

_EPILOG = f"""
examples:
  report on a run that train_net.py has trained or evaluated (--eval-only):
    {PROGRAM} output/balloons
  show what improved and what got worse from one run to another:
    {PROGRAM} output/balloons output/balloons_longer

The page is one file that loads nothing and runs no script, so you can open it from disk. It stays
below 20 MB; --images sets the number of pictures per section.
"""


def main(argv: Sequence[str]) -> int:
    """Writes the page and prints its path."""
    arguments = _parse(argv)
    folders = [folder for folder in (arguments.run, arguments.run2) if folder]
    labels = _labels(folders)
    if arguments.output:
        _require_replaceable(arguments.output)
    for folder in folders:
        results_folder(folder, arguments.data)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.data.formats import limit_pixels
    from mask_rcnn_tools.report.page import render
    from mask_rcnn_tools.report.run import read_run

    limit_pixels(arguments.max_pixels)
    runs = [
        read_run(
            folder,
            label=label,
            data_set=arguments.data,
            json_file=arguments.json_file,
            image_root=arguments.image_root,
        )
        for folder, label in zip(folders, labels, strict=True)
    ]
    against = f"_against_{labels[0]}" if len(runs) == 2 else ""
    path = arguments.output or folders[-1] / f"report_{runs[0].data_set}{against}.html"
    _require_replaceable(path)
    with writing(path):
        write_atomically(path, render(runs, count=arguments.images))
    print(path)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("run", type=existing_folder, metavar="RUN", help="the OUTPUT_DIR of a run")
    parser.add_argument(
        "run2",
        type=existing_folder,
        nargs="?",
        metavar="RUN2",
        help="a second run, compared with the first",
    )
    parser.add_argument("--data", metavar="NAME", help="the test set, if RUN has several")
    parser.add_argument(
        "--output",
        type=any_path,
        metavar="FILE",
        help="the page (default: report_NAME.html in the folder of the last run)",
    )
    parser.add_argument(
        "--images", type=positive, default=8, metavar="N", help="pictures per section (default: 8)"
    )
    parser.add_argument(
        "--json-file", type=existing_file, metavar="FILE", help="the ground truth, if it was moved"
    )
    parser.add_argument(
        "--image-root",
        type=existing_folder,
        metavar="FOLDER",
        help="the images, if they were moved",
    )
    parser.add_max_pixels()
    arguments = parser.parse_args(argv)
    if arguments.images > 100:
        parser.error("--images must be at most 100, to keep the page below 20 MB")
    return arguments


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of their paths as needed to distinguish them."""
    if len(folders) == 1:
        return [folders[0].absolute().name]
    parts = [folder.resolve().parts for folder in folders]
    if parts[0] == parts[1]:
        raise UsageError(f"RUN and RUN2 are the same folder, '{folders[0]}'")
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(part[-depth:]) for part in parts]
        if labels[0] != labels[1]:
            break
    return [label.replace("/", "") for label in labels]


def _require_replaceable(path: Path) -> None:
    require_new(path, overwrite=True)
    if path.is_file():
        with writing(path, "read"), path.open(encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(4096):
                raise UsageError(f"{path} exists and is not a report: choose another --output")
