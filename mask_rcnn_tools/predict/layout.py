"""The names of the files that ``predict`` writes, and a check before they are written."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.files import prepare_output
from mask_rcnn_tools.predict.sources import Source

RESULTS, IMAGES, TABLE, CUTOUTS = "predictions.json", "images.json", "objects.csv", "cutouts"
VIDEO_SUFFIX = ".mp4"
_LONGEST_NAME = 255  # bytes


def drawing_path(source: Source, folder: Path) -> Path:
    """The file of a source's drawing: JPEG and PNG keep their format, other images become PNG."""
    if source.kind != "image":
        return fitting(folder / f"{source.name}{VIDEO_SUFFIX}")
    suffix = Path(source.path).suffix.lower()
    suffix = suffix if suffix in (".jpg", ".jpeg", ".png") else ".png"
    return fitting(folder / f"{source.name}{suffix}")


def fitting(path: Path) -> Path:
    """The path. If its name is too long for a file system, a digest replaces its end."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_NAME:
        return path
    end = f"~{hashlib.sha256(name).hexdigest()[:8]}{path.suffix}"
    begin = name[: _LONGEST_NAME - len(end.encode())].decode("utf-8", "ignore")
    return path.with_name(begin + end)


def check_output(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Checks that the output replaces no input, and existing files only with --overwrite.

    Raises:
        UsageError: a file or folder would be replaced.
    """
    folder = arguments.output
    names = []
    if arguments.pictures:
        names += [str(drawing_path(source, folder).relative_to(folder)) for source in sources]
    names += [RESULTS, IMAGES] if arguments.json else []
    names += [TABLE] if arguments.csv else []
    inputs = [source.path for source in sources if source.kind != "camera"]
    inputs += [f for f in (arguments.like, arguments.weights) if f is not None]
    resolved = set(map(os.path.realpath, inputs))
    for path in (folder / name for name in names):
        if os.path.realpath(path) in resolved:
            raise UsageError(f"{path} is an input and would be replaced; name another --output")
    prepare_output(folder, names, overwrite=arguments.overwrite)
    cutouts = folder / CUTOUTS
    if arguments.cutouts and cutouts.exists() and not arguments.overwrite:
        raise UsageError(f"{cutouts} exists; name another --output, or give --overwrite")
