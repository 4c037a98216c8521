"""Reads the VGG Image Annotator (VIA) 2: a project, or annotations exported as JSON or CSV.

Coordinates refer to the image as a browser shows it; browsers since 2020 show it upright.
"""

import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.file_names import ImageFiles
from mask_rcnn_plus.errors import UserError, did_you_mean, reason
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.folders import report_unread
from mask_rcnn_tools.convert.geometry import InvalidShape, ellipse, polygon, rectangle, to_number
from mask_rcnn_tools.convert.labels import (
    LabelledObject,
    Labels,
    files_below,
    images_below,
    keep_splits,
    read_each,
    read_json,
    read_text,
    split_of,
)
from mask_rcnn_tools.progress import progress_bar

_WITHOUT_AREA = ("point", "polyline", "line")
_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


def read(
    source: Path,
    *,
    images: Path | None = None,
    class_attribute: str | None = None,
    class_name: str | None = None,
) -> Labels:
    """Reads a VIA file, or all VIA files in a folder.

    An image without regions is an image without objects. An image that no file names is left out.
    Folders such as ``train`` and ``val`` are the splits.

    Args:
        source: the .json or .csv file, or the folder.
        images: the folder of the images, by default that of the file.
        class_attribute: the region attribute that names the class; None if there is only one.
        class_name: the class of all regions, instead of an attribute.

    Raises:
        UserError: the attribute does not exist, or must be chosen from several.
    """
    labels = Labels()
    top = source if source.is_dir() else source.parent
    files = files_below(source, ".json", ".csv")
    image_files = ImageFiles(images or top)
    entries: list[tuple[Path, dict[str, Any]]] = []
    for path, content in read_each(_read_file, files, source, labels):
        entries += [(path, entry) for entry in content]
    if class_name is None:
        class_attribute = _choose_attribute(class_attribute, [entry for _, entry in entries])
    seen: set[Path] = set()
    for path, entry in progress_bar("reading VIA", "image", entries):
        name, folder = entry["filename"], path.parent.relative_to(top)
        found = labels.find_file(image_files, name, path, (images or top) / folder)
        if found is None:
            continue
        if found in seen:
            labels.skip("images are labelled twice; the first labels count", f"{path}: '{name}'")
            continue
        seen.add(found)
        image = labels.open_image(found, image_files.name_of(found))
        if image is None:
            continue
        image.split = split_of(*folder.parts[::-1])
        for index, (shape, attributes) in enumerate(entry["regions"]):
            where = f"{path}: '{name}' regions[{index}]"
            kind = shape.get("name") if isinstance(shape, dict) else None
            if kind in _WITHOUT_AREA:
                labels.note(f"regions of the type {kind} have no area and are left out", where)
                continue
            label = class_name or _class_of(attributes, class_attribute)
            if not label:
                labels.skip(f"regions have no class, or several, in '{class_attribute}'", where)
                continue
            try:
                image.objects.append(LabelledObject(label, [_outline(kind, shape)]))
            except InvalidShape as error:
                labels.skip("regions are invalid", f"{where} ({kind}) {error}")
        labels.images.append(image)
    keep_splits(labels)
    labels.note_names(image_files)
    for path in images_below(images or top):
        if path.resolve() not in seen:
            labels.note("images are in no VIA file and are left out", path)
    if source.is_dir():
        report_unread(labels, set(files_below(source)) - set(files))
    return labels


def _read_file(path: Path) -> list[dict[str, Any]]:
    """The entries of a file: filename, and regions as (shape, attributes)."""
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    content = read_json(path)
    if isinstance(content, dict) and "_via_img_metadata" in content:  # a project
        content = content["_via_img_metadata"]
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("filename"), str) and "regions" in e
        for e in entries
    ):
        raise UnreadableFile("is not a VIA file: its entries have no 'filename' and 'regions'")
    for entry in entries:
        regions = entry["regions"]
        if isinstance(regions, dict):  # VIA 1 wrote an object with numbers as keys
            regions = list(regions.values())
        entry["regions"] = [
            (region.get("shape_attributes"), region.get("region_attributes"))
            if isinstance(region, dict)
            else (None, None)
            for region in (regions if isinstance(regions, list) else [None])
        ]
    return entries


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """The entries of a CSV file, as ``_read_file`` returns them."""
    entries: dict[str, dict[str, Any]] = {}
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # polygons are long
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""))
        # An empty file has no regions.
        header = [name.strip().lstrip("#").strip() for name in next(lines, _COLUMNS)]
        if missing := [name for name in _COLUMNS if name not in header]:
            raise ValueError(f"it has no column '{missing[0]}'")
        for line in filter(None, lines):
            if len(line) != len(header):
                raise ValueError(f"a row has {len(line)} fields, expected {len(header)}")
            row = dict(zip(header, line, strict=True))
            key = f"{row['filename']}{row.get('file_size', '')}"
            entry = entries.setdefault(key, {"filename": row["filename"], "regions": []})
            shape, attributes = (json.loads(row[column] or "{}") for column in _COLUMNS[1:])
            if shape:
                entry["regions"].append((shape, attributes))
    except (ValueError, RecursionError, csv.Error) as error:
        raise UnreadableFile(f"is not a VIA CSV file: {reason(error, 120)}") from error
    return list(entries.values())


def _choose_attribute(wanted: str | None, entries: list[dict[str, Any]]) -> str:
    """The region attribute that names the classes."""
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
    if not counts:
        raise UserError("no region has an attribute; name the class with --class-name NAME")
    names = ", ".join(f"'{name}' ({count} regions)" for name, count in counts.most_common(8))
    if wanted is None:
        raise UserError(f"choose the attribute of the class with --class-attribute: {names}")
    hint = did_you_mean(wanted, counts) or f"; the attributes are {names}"
    raise UserError(f"--class-attribute: no region has the attribute '{wanted}'{hint}")


def _class_of(attributes: Any, name: str | None) -> str:
    """The class of a region; "" if it has none or several."""
    value = attributes.get(name) if isinstance(attributes, dict) else None
    if isinstance(value, dict):  # checkboxes
        ticked = [key for key, on in value.items() if on]
        value = ticked[0] if len(ticked) == 1 else ""
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _outline(kind: Any, shape: Any) -> list[float]:
    """The polygon of a region."""
    if not isinstance(shape, dict):
        raise InvalidShape("has no shape_attributes")
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise InvalidShape("has different numbers of all_points_x and all_points_y")
        return polygon([list(pair) for pair in zip(xs, ys, strict=True)])
    if kind == "rect":
        x, y, width, height = (to_number(shape.get(key)) for key in ("x", "y", "width", "height"))
        return rectangle(x, y, x + width, y + height)
    if kind == "circle":
        return ellipse(*map(shape.get, ("cx", "cy", "r", "r")))
    if kind == "ellipse":
        cx, cy, rx, ry = map(shape.get, ("cx", "cy", "rx", "ry"))
        return ellipse(cx, cy, rx, ry, shape.get("theta", 0.0))
    raise InvalidShape("has an unknown type")
