"""The data check of a json and its images, with what was found before."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.coco_json import file_stamp, mark_vetted, parse
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check import cache
from mask_rcnn_tools.check.images import Entry, check_images
from mask_rcnn_tools.check.inspection import Inspection, inspect
from mask_rcnn_tools.check.problems import ERROR, KINDS, Problem
from mask_rcnn_tools.check.repair import Repaired, repair
from mask_rcnn_tools.check.report import Report
from mask_rcnn_tools.check.statistics import AnchorSettings, box_lines, shared_images

_KEPT = 100_000  # problems in the cache, at most; a json with more is inspected each time


def check_coco(
    json_file: Path,
    image_root: Path,
    *,
    name: str = "",
    images: str = "headers",
    anchors: AnchorSettings | None = None,
    progress: bool = True,
) -> Report:
    """Checks a json and its images.

    The json's result is kept by its SHA-256, an image's by its path, size and time, in
    ``cache.cache_folder()``. A json without an error is not checked again when it is loaded.

    Args:
        json_file: in COCO format, or what should be.
        image_root: the folder of the images; nothing outside is opened.
        name: of the data set, for the report.
        images: "none", "headers" or "decode", as in ``check_images``.
        anchors: of the config that will train.
        progress: shows bars on standard error where something takes longer than two seconds.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    stamp = file_stamp(json_file)
    try:
        digest = cache.hash_file(json_file)
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{json_file}'") from error
    except OSError as error:
        raise UserError(f"'{json_file}' cannot be read: {error.strerror or error}") from error
    inspection = _inspect(json_file, digest, progress)
    problems = list(inspection.problems)
    if stamp and not any(KINDS[problem.kind].severity == ERROR for problem in problems):
        mark_vetted(stamp, inspection.categories)
    found, sizes = check_images(
        inspection.images,
        image_root,
        mode=images,
        cache=cache.ImageCache(image_root),
        progress=progress,
    )
    order = list(KINDS)
    problems += sorted(found, key=lambda problem: order.index(problem.kind))
    return Report(
        name or str(json_file),
        json_file,
        image_root,
        digest,
        len(inspection.images),
        inspection.annotations,
        inspection.classes,
        problems,
        box_lines(inspection.shapes, anchors),
        sizes,
        inspection.shapes,
        inspection.images,
    )


def note_leaks(reports: Sequence[Report]) -> None:
    """Adds to the reports of several data sets which images they share, each pair once."""
    for place, one in enumerate(reports):
        for other in reports[place + 1 :]:
            if one.json_file == other.json_file:
                continue
            pairs = shared_images((one.image_root, one.entries), (other.image_root, other.entries))
            for mine, theirs in pairs:
                detail = f"is also {theirs.file_name!r} of {other.name}"
                one.problems.append(
                    Problem(
                        "leak", "images", mine.position, mine.id, mine.id, mine.file_name, detail
                    )
                )


def mend(report: Report) -> Repaired:
    """Mends the json that a report is about.

    Args:
        report: of ``check_coco``, on a json in COCO's outline.

    Raises:
        UserError: the json cannot be read, or has changed since.
    """
    if cache.hash_file(report.json_file) != report.sha256:
        raise UserError(f"'{report.json_file}' has changed while it was checked; start again")
    return repair(parse(report.json_file), report.problems, report.sizes)


def _inspect(json_file: Path, digest: str, progress: bool) -> Inspection:
    key = f"json-{digest}.json"
    if (found := _restore(cache.load(key))) is not None:
        return found
    try:
        with _no_collection():
            inspection = inspect(parse(json_file), progress=progress)
    except UserError as error:
        if not isinstance(error.__cause__, (ValueError, RecursionError)):
            raise
        detail = f"is no json: {error.__cause__}"
        return Inspection([Problem("no-json", detail=detail)], 0, [], [], [], [])
    if len(inspection.problems) <= _KEPT:
        cache.save(key, inspection)
    return inspection


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from searching millions of new objects for cycles, over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _restore(saved: Any) -> Inspection | None:
    """What json has made of an inspection."""
    try:
        problems, annotations, images, categories, classes, shapes = saved
        return Inspection(
            [Problem(*problem) for problem in problems],
            annotations,
            [Entry(*entry) for entry in images],
            categories,
            [tuple(line) for line in classes],
            [tuple(shape) for shape in shapes],
        )
    except (TypeError, ValueError):
        return None
