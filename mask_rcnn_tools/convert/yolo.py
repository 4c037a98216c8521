"""YOLO's segmentation labels: a text file for each image, an object a line.

A line is ``CLASS x0 y0 x1 y1 ...``: the class's index and a polygon in fractions of the width and
height of the image as it is seen. ``data.yaml`` has ``names``, and where images lie: ``path``,
``train``, ``val``, ``test``; where it says nothing of them, folders of these names beside or in
``images`` do. The labels lie where the images do, with ``labels`` in the place of the last
``images`` in the path.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert.files import images_below, to_picture
from mask_rcnn_tools.convert.found import Found, Thing, with_bar

# A folder's name, and the split whose images lie in it.
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_FAR = 1.5  # fractions beyond this are pixels, or another format


def read(source: Path, *, classes: Sequence[str] | None = None, progress: bool = True) -> Found:
    """Reads a folder in YOLO's layout.

    An image without a label file, or with an empty one, is one without objects, as in YOLO. Lines
    of a box (four numbers) have no mask and are lost, each counted.

    Args:
        source: the folder of ``data.yaml`` and the images, or the yaml.
        classes: the names of the indices 0, 1, ...; by default those of the yaml.
        progress: shows a bar.

    Raises:
        UserError: there are no names, no images, or nothing but boxes.
    """
    folder, about = _open(source)
    names = list(classes) if classes else _names(about.get("names"), source)
    found = Found(classes=names)
    work = _images(folder, about, found)
    boxes = polygons = 0
    for path, split in with_bar(work, "reading YOLO", progress=progress):
        parts = list(path.relative_to(folder).parts)
        if "images" in parts:
            last = len(parts) - 1 - parts[::-1].index("images")
            labels = folder.joinpath(*parts[:last], "labels", *parts[last + 1 :])
            del parts[last]
        else:
            labels = path
        picture = to_picture(path, "/".join(parts), found)
        if picture is None:
            continue
        picture.split = split
        labels = labels.with_suffix(".txt")
        try:
            lines = labels.read_text(encoding="utf-8-sig").splitlines() if labels.is_file() else []
        except (OSError, ValueError) as error:
            found.skip("images whose labels cannot be read", f"{labels}: {error}")
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{labels}:{number}"
            values = _numbers(line)
            if values is None:
                found.skip("lines are no index and pairs of fractions", where)
            elif not 0 <= values[0] < len(names):
                found.skip("lines have a class without a name", f"{where} (class {values[0]:g})")
            elif len(values) == 5:
                boxes += 1
                found.skip("lines are boxes, which have no mask", where)
            else:
                polygons += 1
                scale = (picture.width, picture.height)
                corners = [value * scale[place % 2] for place, value in enumerate(values[1:])]
                picture.things.append(Thing(names[int(values[0])], [corners]))
        found.pictures.append(picture)
    if boxes and not polygons:
        raise UserError(
            f"all {boxes} lines of '{source}' are boxes: YOLO's detection labels have no masks to "
            "convert"
        )
    return found


def _open(source: Path) -> tuple[Path, dict[str, Any]]:
    """The data's folder and the yaml's content."""
    if source.is_dir():
        yamls = [
            p for n in ("data.yaml", "data.yml", "dataset.yaml") if (p := source / n).is_file()
        ]
        if not yamls:
            return source, {}
        source = yamls[0]
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{source}' is no yaml: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{source}' holds no 'names' and 'train'")
    return source.parent, content


def _names(names: Any, source: Path) -> list[str]:
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(
            f"'{source}' has no data.yaml with 'names' of the classes 0, 1, ...: give --classes "
            "NAME ... in that order"
        )
    return [str(name) for name in names]


def _images(folder: Path, about: dict[str, Any], found: Found) -> list[tuple[Path, str]]:
    """Each image and its split."""
    places: dict[Path, str] = {}
    for split in ("train", "val", "test"):
        entries = about.get(split) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            files = _listed(folder, about.get("path"), str(entry))
            if files is None:
                found.skip(
                    "places of images that data.yaml names are not there", f"{split}: {entry}"
                )
            for path in files or []:
                places.setdefault(path, split)
    if not any(about.get(split) for split in ("train", "val", "test")):
        places = {path: _split_of(path.relative_to(folder)) for path in images_below(folder)}
        # Without both there is nothing to keep apart, and some are drawn for val.
        if not {"train", "val"} <= set(places.values()):
            places = dict.fromkeys(places, "")
    if not places:
        raise UserError(f"there are no images in '{folder}'")
    return sorted(places.items())


def _split_of(path: Path) -> str:
    """By the folder in ``images`` or around it, as ``images/train`` or ``train/images``."""
    folders = path.parent.parts
    if "images" not in folders:
        return ""
    last = len(folders) - 1 - folders[::-1].index("images")
    beside = (*folders[last + 1 : last + 2], *folders[max(0, last - 1) : last])
    return next((_SPLITS[name.lower()] for name in beside if name.lower() in _SPLITS), "")


def _listed(folder: Path, top: Any, entry: str) -> list[Path] | None:
    """The images of a yaml's entry, none outside its folder; None where it leads nowhere.

    The path is often that of the machine where the yaml was written, and Roboflow's ``../`` is one
    too many: what of it is found below the yaml counts.
    """
    parts = [part for part in Path(entry.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    bases = [folder / top.replace("\\", "/")] if isinstance(top, str) else []
    for base in (*bases, folder):
        for start in range(len(parts)):
            place = base.joinpath(*parts[start:])
            if not place.resolve().is_relative_to(folder.resolve()) or not place.exists():
                continue
            if place.is_dir():
                return images_below(place)
            if place.suffix == ".txt":
                lines = place.read_text(encoding="utf-8-sig", errors="replace").splitlines()
                found = [folder / line.strip() for line in lines if line.strip()]
                inside = [p for p in found if p.resolve().is_relative_to(folder.resolve())]
                return [folder / p.resolve().relative_to(folder.resolve()) for p in inside]
    return None


def _numbers(line: str) -> list[float] | None:
    """An index and its fractions; None for anything else."""
    try:
        values = [float(value) for value in line.split()]
    except ValueError:
        return None
    if len(values) < 5 or len(values) % 2 == 0 or not all(map(math.isfinite, values)):
        return None
    if values[0] != int(values[0]) or min(values[1:]) < 1 - _FAR or max(values[1:]) > _FAR:
        return None
    return values
