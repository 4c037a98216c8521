"""VGG Image Annotator (VIA) 2: a project, or annotations exported as json or csv.

Regions are in pixels of the image as the browser shows it: upright, in every browser since 2020.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_tools.convert.files import (
    Unreadable,
    files_below,
    find_image,
    read_json,
    to_picture,
)
from mask_rcnn_tools.convert.found import Found, Thing, with_bar
from mask_rcnn_tools.convert.geometry import (
    Unfit,
    ellipse,
    polygon,
    rectangle,
    to_number,
)

_WITHOUT_AREA = ("point", "polyline", "line")
_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


def read(
    source: Path,
    *,
    images: Path | None = None,
    class_attribute: str | None = None,
    class_name: str | None = None,
    progress: bool = True,
) -> Found:
    """Reads a file of VIA, or all of them in a folder.

    An image without regions is one without objects.

    Args:
        source: the .json or .csv, or the folder.
        images: where the images lie, by default beside the file.
        class_attribute: the region attribute that names the class; None takes the only one.
        class_name: instead, the class of every region.
        progress: shows a bar.

    Raises:
        UserError: the attribute is not there, or it is not said which one to take.
    """
    found = Found()
    files = [source]
    if source.is_dir():
        files = [p for p in files_below(source) if p.suffix.lower() in (".json", ".csv")]
    work: list[tuple[Path, dict[str, Any]]] = []
    for path in files:
        try:
            entries = _csv(path) if path.suffix.lower() == ".csv" else _json(path)
        except Unreadable as error:
            found.skip("files cannot be read", f"{path} {error}")
            continue
        work += [(path, entry) for entry in entries]
    if class_name is None:
        class_attribute = _choose(class_attribute, [entry for _, entry in work])
    seen: set[Path] = set()
    for path, entry in with_bar(work, "reading VIA", progress=progress):
        name = entry["filename"]
        roots = [path.parent] if images is None else [images]
        place = find_image(name, roots, roots)
        if place is None:
            found.skip("images are not there", f"{path}: '{name}' (--images FOLDER says where)")
            continue
        if place[0] in seen:
            found.skip("images are labelled twice; the first counts", f"{path}: '{name}'")
            continue
        seen.add(place[0])
        picture = to_picture(*place, found)
        if picture is None:
            continue
        for index, (shape, attributes) in enumerate(entry["regions"]):
            where = f"{path}: '{name}' regions[{index}]"
            kind = shape.get("name") if isinstance(shape, dict) else None
            if kind in _WITHOUT_AREA:
                found.note(f"regions are a {kind}, which has no area: left out", where)
                continue
            label = class_name or _label(attributes, class_attribute)
            if not label:
                found.skip(f"regions have no single class in '{class_attribute}'", where)
                continue
            try:
                picture.things.append(Thing(label, [_outline(kind, shape)]))
            except Unfit as error:
                found.skip("regions are no shape that can be read", f"{where} ({kind}) {error}")
        found.pictures.append(picture)
    return found


def _json(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if isinstance(content, dict) and "_via_img_metadata" in content:  # a project
        content = content["_via_img_metadata"]
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("filename"), str) and "regions" in e
        for e in entries
    ):
        raise Unreadable("is not VIA's: its entries have no 'filename' and 'regions'")
    for entry in entries:
        regions = entry["regions"] or []
        # VIA 1 numbered them in an object.
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        entry["regions"] = [
            (r.get("shape_attributes"), r.get("region_attributes"))
            if isinstance(r, dict)
            else (None, None)
            for r in (regions if isinstance(regions, list) else [])
        ]
    return entries


def _csv(path: Path) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # polygons are long
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in _rows(csv.reader(file)):
                size = row.get("file_size", "")
                entry = entries.setdefault(
                    f"{row['filename']}{size}", {"filename": row["filename"], "regions": []}
                )
                shape, attributes = (json.loads(row[key] or "{}") for key in _COLUMNS[1:])
                if shape:
                    entry["regions"].append((shape, attributes))
    except (OSError, ValueError, csv.Error) as error:
        raise Unreadable(f"is not VIA's csv: {' '.join(str(error).split())[:120]}") from error
    return list(entries.values())


def _rows(lines: Iterator[list[str]]) -> Iterator[dict[str, str]]:
    header: list[str] = []
    for line in lines:
        if not header:
            header = [name.strip().lstrip("#").strip() for name in line]
            if missing := [name for name in _COLUMNS if name not in header]:
                raise ValueError(f"it has no column '{missing[0]}'")
        elif line:
            if len(line) != len(header):
                raise ValueError(f"a row has {len(line)} fields, not {len(header)}")
            yield dict(zip(header, line, strict=True))


def _choose(wanted: str | None, entries: list[dict[str, Any]]) -> str:
    """The attribute that names classes."""
    counts = Counter(
        name
        for entry in entries
        for _, attributes in entry["regions"]
        if isinstance(attributes, dict)
        for name in attributes
    )
    if wanted is None and len(counts) == 1:
        return next(iter(counts))
    if wanted in counts or not any(entry["regions"] for entry in entries):
        return wanted or ""
    listed = ", ".join(f"'{name}' ({count} regions)" for name, count in counts.most_common(8))
    if not counts:
        raise UserError("no region has an attribute: name the class of all with --class-name NAME")
    if wanted is None:
        raise UserError(f"say with --class-attribute which of these names the class: {listed}")
    hint = did_you_mean(wanted, counts) or f"; there are {listed}"
    raise UserError(f"no region has the attribute '{wanted}' (--class-attribute){hint}")


def _label(attributes: Any, name: str | None) -> str:
    """The class of a region; "" where there is none, or more than one."""
    value = attributes.get(name) if isinstance(attributes, dict) else None
    if isinstance(value, dict):  # of a checkbox: what is ticked
        ticked = [key for key, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else ""
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _outline(kind: Any, shape: Any) -> list[float]:
    if not isinstance(shape, dict):
        raise Unfit("has no shape_attributes")
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise Unfit("has not as many all_points_x as all_points_y")
        return polygon([list(pair) for pair in zip(xs, ys, strict=True)])
    numbers = [shape.get(key) for key in _NUMBERS.get(str(kind), ())]
    if kind == "rect":
        x, y, width, height = map(to_number, numbers)
        return rectangle(x, y, x + width, y + height)
    if kind == "circle":
        return ellipse(numbers[0], numbers[1], numbers[2], numbers[2])
    if kind == "ellipse":
        cx, cy, rx, ry = numbers
        return ellipse(cx, cy, rx, ry, shape.get("theta", 0.0))
    raise Unfit("is of a kind that is not known")


_NUMBERS = {
    "rect": ("x", "y", "width", "height"),
    "circle": ("cx", "cy", "r"),
    "ellipse": ("cx", "cy", "rx", "ry"),
}
