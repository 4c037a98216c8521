"""Reads YOLO's segmentation labels: a text file for each image, one object per line.

A line is ``CLASS x0 y0 x1 y1 ...``: the index of the class, and a polygon in fractions of the width
and height of the upright image. ``data.yaml`` has the ``names`` of the classes and the folders of
the images: ``path``, ``train``, ``val``, ``test``. If it names no folders, folders with these names
inside or next to ``images`` are the splits. The path of a label file is that of its image, with
``labels`` instead of the last ``images``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_tools.convert.labels import LabelledObject, Labels, images_below
from mask_rcnn_tools.progress import progress_bar

_KEYS = ("train", "val", "test")  # of the image folders in the yaml
# Name of a folder -> its split.
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_FRACTION = 1.5  # larger numbers are pixels or another format


def read(source: Path, *, classes: Sequence[str] | None = None) -> Labels:
    """Reads a folder in YOLO's layout.

    An image without a label file, or with an empty one, is an image without objects. A line with a
    box (four numbers) has no mask and is skipped.

    Args:
        source: the folder of ``data.yaml`` and the images, or the yaml file.
        classes: names of the classes 0, 1, ...; by default those in the yaml.

    Raises:
        UserError: there are no names, no images, or only boxes.
    """
    folder, config = _read_yaml(source)
    names = list(classes) if classes else _class_names(config.get("names"), source)
    labels = Labels(classes=names)
    images = _find_images(folder, config, labels)
    boxes = polygons = 0
    for path, split in progress_bar("reading YOLO", "image", images):
        parts = list(path.relative_to(folder).parts)
        label_file = path
        if "images" in parts:
            last = _last_images(parts)
            label_file = folder.joinpath(*parts[:last], "labels", *parts[last + 1 :])
            del parts[last]
        label_file = label_file.with_suffix(".txt")
        image = labels.open_image(path, "/".join(parts))
        if image is None:
            continue
        image.split = split
        try:
            text = label_file.read_text(encoding="utf-8-sig") if label_file.is_file() else ""
        except (OSError, ValueError) as error:
            labels.skip("images have unreadable labels", f"{label_file}: {reason(error)}")
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{label_file}:{number}"
            values = _parse_line(line)
            if values is None:
                labels.skip("lines are not a class index and pairs of fractions", where)
            elif not 0 <= values[0] < len(names):
                labels.skip("lines have a class without a name", f"{where} (class {values[0]:g})")
            elif len(values) == 5:
                boxes += 1
                labels.skip("lines are boxes without a mask", where)
            else:
                polygons += 1
                scale = (image.width, image.height)
                corners = [value * scale[place % 2] for place, value in enumerate(values[1:])]
                image.objects.append(LabelledObject(names[int(values[0])], [corners]))
        labels.images.append(image)
    if boxes and not polygons:
        raise UserError(
            f"all {boxes} lines in '{source}' are boxes; YOLO's detection labels have no masks, "
            "only segmentation labels can be converted"
        )
    return labels


def _read_yaml(source: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the data set, and the content of its yaml, or {} without one."""
    if source.is_dir():
        names = ("data.yaml", "data.yml", "dataset.yaml")
        path = next((source / name for name in names if (source / name).is_file()), None)
        if path is None:
            return source, {}
        source = path
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{source}' is not valid YAML: {reason(error, 160)}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{source}' has no 'names' and 'train'")
    return source.parent, content


def _class_names(names: Any, source: Path) -> list[str]:
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(
            f"'{source}' has no data.yaml with the 'names' of the classes 0, 1, ...; give "
            "--classes NAME ... in this order"
        )
    return [str(name) for name in names]


def _find_images(folder: Path, config: dict[str, Any], labels: Labels) -> list[tuple[Path, str]]:
    """Each image and its split."""
    splits: dict[Path, str] = {}
    for split in _KEYS:
        entries = config.get(split) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            files = _images_of_entry(folder, config.get("path"), str(entry))
            if files is None:
                labels.skip("image folders in data.yaml are missing", f"{split}: {entry}")
            for path in files or []:
                splits.setdefault(path, split)
    if not any(map(config.get, _KEYS)):
        splits = {path: _split_of(path.relative_to(folder)) for path in images_below(folder)}
        # If one of the two is missing, the images are split at random.
        if not {"train", "val"} <= set(splits.values()):
            splits = dict.fromkeys(splits, "")
    if not splits:
        raise UserError(f"there are no images in '{folder}'")
    return sorted(splits.items())


def _last_images(parts: Sequence[str]) -> int:
    """Index of the last part that is "images"."""
    return len(parts) - 1 - parts[::-1].index("images")


def _split_of(path: Path) -> str:
    """The split by the folder inside or around ``images``: ``images/train``, ``train/images``."""
    folders = path.parent.parts
    if "images" not in folders:
        return ""
    last = _last_images(folders)
    candidates = (*folders[last + 1 : last + 2], *folders[max(0, last - 1) : last])
    return next((_SPLITS[name.lower()] for name in candidates if name.lower() in _SPLITS), "")


def _images_of_entry(folder: Path, top: Any, entry: str) -> list[Path] | None:
    """The images of an entry in the yaml, only inside its folder; None if it does not exist.

    The paths in a yaml are often those of another machine, and Roboflow writes one ``../`` too
    many. So this looks for the longest end of the path that exists in the folder.
    """
    root = folder.resolve()
    parts = [part for part in Path(entry.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    bases = [folder / top.replace("\\", "/")] if isinstance(top, str) else []
    for base in (*bases, folder):
        for start in range(len(parts)):
            path = base.joinpath(*parts[start:])
            if not path.resolve().is_relative_to(root) or not path.exists():
                continue
            if path.is_dir():
                return images_below(path)
            if path.suffix == ".txt":
                lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                listed = [(folder / line.strip()).resolve() for line in lines if line.strip()]
                return [folder / p.relative_to(root) for p in listed if p.is_relative_to(root)]
    return None


def _parse_line(line: str) -> list[float] | None:
    """A class index and the fractions; None if the line is invalid."""
    try:
        values = [float(value) for value in line.split()]
    except ValueError:
        return None
    is_valid = (
        len(values) >= 5
        and len(values) % 2 == 1
        and all(map(math.isfinite, values))
        and values[0].is_integer()
        and 1 - _MAX_FRACTION <= min(values[1:]) <= max(values[1:]) <= _MAX_FRACTION
    )
    return values if is_valid else None
