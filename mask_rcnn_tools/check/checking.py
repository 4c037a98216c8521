"""Checks data sets: a json and its images, with the results of earlier checks."""

import gc
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.coco_json import file_stamp, mark_vetted, parse
from mask_rcnn_plus.data.mask_rules import max_pixels
from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_tools.check import cache
from mask_rcnn_tools.check.images import ImageEntry, check_images, shared_images
from mask_rcnn_tools.check.json_checks import Inspection, inspect
from mask_rcnn_tools.check.problems import Problem, by_kind, is_error
from mask_rcnn_tools.check.repair import Repaired, repair_content
from mask_rcnn_tools.check.result import CheckResult
from mask_rcnn_tools.check.statistics import AnchorSettings, box_lines

_MAX_CACHED = 100_000  # a json with more problems is checked again each time


def check_coco(
    json_file: Path,
    image_root: Path,
    *,
    name: str = "",
    images: str = "headers",
    anchors: AnchorSettings | None = None,
) -> CheckResult:
    """Checks a json and its images.

    Results are cached in ``cache.cache_folder()``: that of the json by its SHA-256, those of image
    files by their path, size and time. A json without an error is not checked again when it is
    loaded.

    Args:
        json_file: a file that should be in COCO format.
        image_root: the image folder; no file outside is opened.
        name: the name of the data set.
        images: "none", "headers" or "decode", as in ``check_images``.
        anchors: the training config's anchors, to compare with the boxes.

    Raises:
        UserError: the json does not exist or cannot be read.
    """
    stamp = file_stamp(json_file)
    try:
        digest = cache.hash_file(json_file)
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{json_file}'") from error
    except OSError as error:
        raise UserError(f"cannot read '{json_file}': {reason(error)}") from error
    inspection = _inspect(json_file, digest)
    if stamp and not any(map(is_error, inspection.problems)):
        mark_vetted(stamp, inspection.categories)
    image_problems, sizes = check_images(inspection.images, image_root, mode=images)
    return CheckResult(
        name=name or str(json_file),
        json_file=json_file,
        image_root=image_root,
        sha256=digest,
        images=len(inspection.images),
        annotations=inspection.annotations,
        classes=inspection.classes,
        problems=sorted(inspection.problems + image_problems, key=by_kind),
        statistics=box_lines(inspection.shapes, anchors),
        sizes=sizes,
        shapes=inspection.shapes,
        entries=inspection.images,
    )


def note_leaks(results: Sequence[CheckResult]) -> None:
    """Adds a problem for each image that two data sets share, to the first of the two results."""
    for first, second in combinations(results, 2):
        if first.json_file == second.json_file:
            continue
        folders = (first.image_root, first.entries), (second.image_root, second.entries)
        first.problems += [
            image.problem("leak", f"is also {other.file_name!r} of {second.name}")
            for image, other in shared_images(*folders)
        ]


def repair_coco(result: CheckResult) -> Repaired:
    """Repairs a json.

    Args:
        result: the result of ``check_coco``, for a json in COCO format.

    Raises:
        UserError: the json cannot be read, or has changed since it was checked.
    """
    if cache.hash_file(result.json_file) != result.sha256:
        raise UserError(f"'{result.json_file}' has changed since it was checked; start again")
    return repair_content(parse(result.json_file), result.problems, result.sizes)


def _inspect(json_file: Path, digest: str) -> Inspection:
    key = f"json-{digest}-{max_pixels()}.json"  # the limit decides which sizes are valid
    if (cached := _restore(cache.load(key))) is not None:
        return cached
    collect = gc.isenabled()
    gc.disable()  # else Python searches millions of new objects for cycles, again and again
    try:
        inspection = inspect(parse(json_file))
    except UserError as error:
        if not isinstance(error.__cause__, (ValueError, RecursionError)):
            raise
        detail = f"the file is not valid JSON: {error.__cause__}"
        return Inspection([Problem("no-json", detail=detail)], 0, [], [], [], [])
    finally:
        if collect:
            gc.enable()
    if len(inspection.problems) <= _MAX_CACHED:
        cache.save(key, inspection)
    return inspection


def _restore(saved: Any) -> Inspection | None:
    """An inspection from its JSON form; None if that is invalid."""
    try:
        problems, annotations, images, categories, classes, shapes = saved
        return Inspection(
            [Problem(*problem) for problem in problems],
            annotations,
            [ImageEntry(*image) for image in images],
            categories,
            [tuple(line) for line in classes],
            [tuple(shape) for shape in shapes],
        )
    except (TypeError, ValueError):
        return None
