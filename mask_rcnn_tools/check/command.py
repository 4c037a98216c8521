"""Finds problems in data sets in COCO format, and writes a repaired json."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import coco_files, require_registered
from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, require_new, writing
from mask_rcnn_tools.check.before_run import anchor_settings
from mask_rcnn_tools.check.cache import write_atomically
from mask_rcnn_tools.check.checking import check_coco, note_leaks, repair_coco
from mask_rcnn_tools.check.images import MODES
from mask_rcnn_tools.check.problems import ERROR
from mask_rcnn_tools.check.result import CheckResult, describe, write_json

PROGRAM = "mask-rcnn-plus check-data"

_EPILOG = f"""
examples:
  check a training and a validation set, and find images that are in both:
    {PROGRAM} balloons_train balloons_val
  compare box sizes with the anchors of the training config:
    {PROGRAM} balloons_train --config-file configs/small_data.yaml
  check a json that is not in the data set folder, and write a repaired copy:
    {PROGRAM} --json-file annotations.json --image-root photos --repair repaired.json

error: training or evaluation fails, is wrong, or silently loses an object. train_net.py refuses
such a data set, unless DATA_CHECK is repair or off.
warning: training and evaluation work, but perhaps not as you intend.
note: good to know.

Results are cached in $MASK_RCNN_PLUS_CACHE (default: ~/.cache/mask_rcnn_plus) until a file changes.

exit code: 0 without errors, or if --repair has repaired all of them; 1 with errors; 2 for invalid
arguments
"""


def main(argv: Sequence[str]) -> int:
    """Checks data sets, prints the results, and writes the requested files."""
    arguments = _parse(argv)
    cfg = load_config(arguments.config_file) if arguments.config_file is not None else None
    limit_pixels(arguments.max_pixels or (cfg.INPUT.MAX_PIXELS if cfg else 0))
    sets = _find_sets(arguments)
    for path, option in ((arguments.repair, "--repair"), (arguments.json, "--json")):
        if path is not None:
            _require_writable(path, option, arguments.overwrite, [files[0] for _, *files in sets])
    anchors = anchor_settings(cfg) if cfg else None
    results = [
        check_coco(json_file, root, name=name, images=arguments.images, anchors=anchors)
        for name, json_file, root in sets
    ]
    note_leaks(results)
    print("\n\n".join(result.text() for result in results))
    if arguments.json is not None:
        with writing(arguments.json):
            write_json(results, arguments.json)
        print(f"written: {arguments.json}", file=sys.stderr)
    if arguments.repair is not None:
        with writing(arguments.repair):
            return _repair(results[0], arguments.repair)
    return int(any(result.kinds(ERROR) for result in results))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a data set, as in DATASETS.TRAIN")
    parser.add_argument("--json-file", type=Path, metavar="FILE", help="a json instead of NAME")
    parser.add_argument(
        "--image-root", type=Path, metavar="FOLDER", help="the image folder of --json-file"
    )
    parser.add_argument(
        "--images",
        choices=MODES,
        default="decode",
        help="how much to read of the image files: nothing, the headers, or everything (default)",
    )
    parser.add_argument(
        "--config-file", metavar="YAML", help="compare box sizes with the anchors of this config"
    )
    parser.add_max_pixels()
    parser.add_argument("--repair", type=Path, metavar="OUT.json", help="write a repaired json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all problems as JSON")
    parser.add_overwrite()
    arguments = parser.parse_args(argv)
    if (arguments.json_file is None) != (arguments.image_root is None):
        parser.error("--json-file and --image-root need each other")
    if bool(arguments.names) == (arguments.json_file is not None):
        parser.error("give either names of data sets, or --json-file and --image-root")
    if arguments.repair is not None and len(arguments.names) > 1:
        parser.error("--repair repairs only one data set at a time")
    return arguments


def _find_sets(arguments: argparse.Namespace) -> list[tuple[str, Path, Path]]:
    """(name, json, image folder) of each data set to check."""
    if arguments.json_file is not None:
        json_file, root = arguments.json_file.absolute(), arguments.image_root.absolute()
        if not json_file.is_file():
            raise UserError(f"--json-file: there is no file '{arguments.json_file}'")
        if not root.is_dir():
            raise UserError(f"--image-root: there is no folder '{arguments.image_root}'")
        return [(str(arguments.json_file), json_file, root)]
    sets = []
    for name in dict.fromkeys(arguments.names):
        require_registered(name)
        files = coco_files(name)
        if files is None:
            json_file = MetadataCatalog.get(name).get("json_file")
            raise UserError(
                f"data set '{name}' is registered, but its json '{json_file}' is missing"
                if json_file
                else f"data set '{name}' is not in COCO format; check-data supports no other format"
            )
        sets.append((name, *files))
    return sets


def _require_writable(path: Path, option: str, overwrite: bool, sources: list[Path]) -> None:
    """Makes sure, before the check, that a file can be written after it."""
    if any(path.exists() and path.samefile(source) for source in sources):
        raise UserError(f"{option} {path} is the json to check; name another file")
    require_new(path, overwrite=overwrite, option=option)
    existed = path.exists()
    with writing(path, f"write {option}"):
        path.open("a").close()
    if not existed:
        path.unlink()


def _repair(result: CheckResult, path: Path) -> int:
    if not result.is_coco():
        print(f"\nnot written: {path}, since the json cannot be repaired", file=sys.stderr)
        return 1
    repaired = repair_coco(result)
    write_atomically(path, repaired.text())
    print(f"written: {path}", file=sys.stderr)
    print(f"\n{path} {repaired.summary()}")
    for problem in repaired.left[:10]:
        print(f"not repaired: {problem.kind}: {describe(problem)}")
    return int(bool(repaired.left))
