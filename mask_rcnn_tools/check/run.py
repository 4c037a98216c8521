"""Runs the data check of ``check-data``, prints its results, and writes the requested files."""

import argparse
import json
import sys
from pathlib import Path

from detectron2.data import MetadataCatalog

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import coco_files, require_registered
from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.before_run import anchor_settings
from mask_rcnn_tools.check.checking import check_coco, note_differences, note_leaks, repair_coco
from mask_rcnn_tools.check.problems import ERROR
from mask_rcnn_tools.check.result import CheckResult, describe
from mask_rcnn_tools.files import write_file

_MAX_LISTED = 10


def run(arguments: argparse.Namespace) -> int:
    """Checks data sets: returns 1 if one has errors that --repair has not repaired, else 0."""
    cfg = None if arguments.config_file is None else load_config(arguments.config_file)
    limit_pixels(arguments.max_pixels or (cfg.INPUT.MAX_PIXELS if cfg else 0))
    sets = _find_sets(arguments)
    for option in ("repair", "json"):
        path: Path | None = getattr(arguments, option)
        if path is not None and path.exists() and any(path.samefile(s[1]) for s in sets):
            raise UserError(f"--{option} {path} is the json to check; name another file")
    anchors = anchor_settings(cfg) if cfg else None
    results = [
        check_coco(json_file, root, name=name, images=arguments.images, anchors=anchors)
        for name, json_file, root in sets
    ]
    note_leaks(results)
    note_differences(results)
    print("\n\n".join(result.text() for result in results))
    if arguments.json is not None:
        problems = [result.to_dict() for result in results]
        write_file(arguments.json, json.dumps(problems, indent=1) + "\n")
    if arguments.repair is not None:
        return _repair(results[0], arguments.repair)
    return int(any(result.kinds(ERROR) for result in results))


def _find_sets(arguments: argparse.Namespace) -> list[tuple[str, Path, Path]]:
    """Returns (name, json, image folder) of each data set to check."""
    if arguments.json_file is not None:
        json_file, root = arguments.json_file.absolute(), arguments.image_root.absolute()
        return [(str(arguments.json_file), json_file, root)]
    sets = []
    for name in dict.fromkeys(arguments.names):
        require_registered(name)
        files = coco_files(name)
        if files is None:
            json_file = MetadataCatalog.get(name).get("json_file")
            raise UserError(
                f"data set '{name}' is registered, but its json is missing: put it at '{json_file}'"
                if json_file
                else f"data set '{name}' is not in COCO format; check-data supports no other format"
            )
        sets.append((name, *files))
    return sets


def _repair(result: CheckResult, path: Path) -> int:
    if not result.is_coco():
        print(
            f"\nnot written: {path}: the json cannot be repaired; correct it by hand",
            file=sys.stderr,
        )
        return 1
    repaired = repair_coco(result)
    if lost := repaired.lost():
        print(f"\nnot written: {path}: the repair {lost}", file=sys.stderr)
        return 1
    write_file(path, repaired.text())
    print(f"\n{path} {repaired.summary()}")
    for problem in repaired.left[:_MAX_LISTED]:
        print(f"not repaired: {problem.kind}: {describe(problem)}")
    if len(repaired.left) > _MAX_LISTED:
        print(f"not repaired: {len(repaired.left) - _MAX_LISTED} more problems")
    return int(bool(repaired.left))
