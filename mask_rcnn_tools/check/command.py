"""Finds what is wrong with data sets in COCO format, and writes a mended json."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import coco_files, require_registered
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, require_new
from mask_rcnn_tools.check import (
    ERROR,
    MODES,
    Report,
    check_coco,
    describe,
    mend,
    note_leaks,
    write_json,
    write_whole,
)
from mask_rcnn_tools.check.before_run import anchor_settings

PROGRAM = "mask-rcnn-plus check-data"

_EPILOG = f"""
examples:
  a training and a validation set, images that are in both included:
    {PROGRAM} balloons_train balloons_val
  box sizes beside the anchors of the config that will train:
    {PROGRAM} balloons_train --config-file configs/small_data.yaml
  a json anywhere, and a mended copy of it:
    {PROGRAM} --json-file annotations.json --image-root photos --repair mended.json

An error is what training or evaluation would fail on, get wrong, or lose an object by without a
word; train_net.py refuses it unless DATA_CHECK says otherwise. A warning is handled, though perhaps
not as you mean; a note is worth knowing. What was found is remembered in $MASK_RCNN_PLUS_CACHE, by
default ~/.cache/mask_rcnn_plus, until a file changes.

exit code: 0 without errors, or all of them mended by --repair; 1 with errors; 2 for a command line
that cannot be followed
"""


def main(argv: Sequence[str]) -> int:
    """Checks, prints a report for each data set, and writes what was asked for.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if there are errors that --repair has not mended.

    Raises:
        UserError: an argument does not fit, or a file cannot be read or written.
    """
    arguments = _parse(argv)
    sets = _sets(arguments)
    for path, option in ((arguments.repair, "--repair"), (arguments.json, "--json")):
        if path is not None:
            _require_writable(path, option, arguments.overwrite, [files[0] for _, *files in sets])
    anchors = None
    if arguments.config_file is not None:
        anchors = anchor_settings(load_config(arguments.config_file))
    reports = [
        check_coco(json_file, root, name=name, images=arguments.images, anchors=anchors)
        for name, json_file, root in sets
    ]
    note_leaks(reports)
    print("\n\n".join(report.text() for report in reports))
    if arguments.json is not None:
        _write(arguments.json, lambda path: write_json(reports, path))
    if arguments.repair is not None:
        return _repair(reports[0], arguments.repair)
    return int(any(report.kinds(ERROR) for report in reports))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a data set, as in DATASETS.TRAIN")
    parser.add_argument("--json-file", type=Path, metavar="FILE", help="a json instead of a name")
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="where its images lie")
    parser.add_argument(
        "--images",
        choices=MODES,
        default="decode",
        help="read nothing of the images, their headers, or all of them (the default)",
    )
    parser.add_argument("--config-file", metavar="YAML", help="compare box sizes with its anchors")
    parser.add_argument("--repair", type=Path, metavar="OUT.json", help="write a mended json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all problems as json")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.json and FILE")
    arguments = parser.parse_args(argv)
    if (arguments.json_file is None) != (arguments.image_root is None):
        parser.error("--json-file and --image-root belong together")
    if bool(arguments.names) == (arguments.json_file is not None):
        parser.error("give the names of data sets, or --json-file and --image-root")
    if arguments.repair is not None and len(arguments.names) > 1:
        parser.error("--repair mends one data set at a time")
    return arguments


def _sets(arguments: argparse.Namespace) -> list[tuple[str, Path, Path]]:
    """(name, json, image folder) of each data set to check."""
    if arguments.json_file is not None:
        json_file, root = arguments.json_file.absolute(), arguments.image_root.absolute()
        if not json_file.is_file():
            raise UserError(f"there is no file '{arguments.json_file}' (--json-file)")
        if not root.is_dir():
            raise UserError(f"there is no folder '{arguments.image_root}' (--image-root)")
        return [(str(arguments.json_file), json_file, root)]
    sets = []
    for name in dict.fromkeys(arguments.names):
        require_registered(name)
        files = coco_files(name)
        if files is None:
            json_file = MetadataCatalog.get(name).get("json_file")
            raise UserError(
                f"data set '{name}' is registered, but its json '{json_file}' is not there"
                if json_file
                else f"data set '{name}' has no json in COCO format to check"
            )
        sets.append((name, *files))
    return sets


def _require_writable(path: Path, option: str, overwrite: bool, sources: list[Path]) -> None:
    if any(path.exists() and path.samefile(source) for source in sources):
        raise UserError(f"{option} {path} is the json to check; name another file")
    require_new(path, overwrite=overwrite, option=option)
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"cannot write {option} {path}: {error.strerror or error}") from error
    if not existed:
        path.unlink()


def _repair(report: Report, path: Path) -> int:
    if not report.is_coco():
        print(f"\n{path} is not written: there is nothing to mend in it", file=sys.stderr)
        return 1
    repaired = mend(report)
    _write(path, lambda path: write_whole(path, repaired.text()))
    print(f"\n{path} {repaired.summary()}")
    for problem in repaired.left[:10]:
        print(f"not mended: {problem.kind}: {describe(problem)}")
    return int(bool(repaired.left))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        write(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"written: {path}", file=sys.stderr)
