"""Reads Label Studio's own JSON: a list of tasks with their annotations.

Coordinates are percentages of the width and height of the image, as a browser shows it.
"""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.geometry import (
    InvalidShape,
    ellipse,
    polygon,
    rectangle,
    to_number,
    to_rle,
    turned,
)
from mask_rcnn_tools.convert.images import NamedImages
from mask_rcnn_tools.convert.labels import (
    SUFFIXES,
    Array,
    LabelledImage,
    LabelledObject,
    Labels,
    files_below,
    read_each,
    read_json,
    unknown_layout,
)
from mask_rcnn_tools.progress import progress_bar

# Fields that tell the shape of a region: polygon, brush, ellipse, rectangle, bitmask.
_SHAPES = ("points", "rle", "radiusX", "height", "imageDataURL")


def read(source: Path, *, images: Path | None = None) -> Labels:
    """Reads a JSON export, or all exports in a folder and its subfolders.

    If a task has several annotations, the ground truth is used, or else the latest. A task whose
    annotation is empty is an image without objects; a task without an annotation is left out.

    Args:
        source: the json or the folder.
        images: the folder of the images, by default the source.

    Raises:
        UserError: there is no json of Label Studio.
    """
    labels = Labels()
    # Exports to cloud storage have no file ending.
    paths = files_below(source, ".json", "")
    named = NamedImages(source, images, labels)
    tasks: list[tuple[str, dict[str, Any]]] = []
    found = 0
    for path, content in read_each(_read_tasks, paths, source, labels):
        found += 1
        for index, task in enumerate(content):
            where = f"{path}[{index}]"
            if _is_task(task):
                tasks.append((where, task))
            else:
                labels.skip("entries are not tasks with 'data'", where)
    if not found:
        raise unknown_layout(source, "a .json that Label Studio exported as JSON (a list of tasks)")
    for where, task in progress_bar("reading Label Studio", "task", tasks):
        annotation = _choose_annotation(task, where, labels)
        if annotation is None:
            continue
        results = [result for result in annotation["result"] if isinstance(result, dict)]
        image = _open(task, results, where, named)
        if image is None:
            continue
        _add_objects(results, image, where, labels)
        labels.images.append(image)
    named.report_rest(paths)
    return labels


def _is_task(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("data"), dict)


def _read_tasks(path: Path) -> list[Any]:
    """The entries of a json, at least one of them a task.

    Cloud storage gets one file per task, or per annotation.
    """
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("task"), dict):
        content = {**content["task"], "annotations": [content]}
    entries = content if isinstance(content, list) else [content]
    if entries and not any(map(_is_task, entries)):
        is_coco = isinstance(content, dict) and "categories" in content
        hint = "; for COCO, use mask-rcnn-plus convert coco" if is_coco else ""
        raise UnreadableFile(f"is not Label Studio's: no task has 'data'{hint}")
    return entries


def _choose_annotation(task: dict[str, Any], where: str, labels: Labels) -> dict[str, Any] | None:
    """The annotation of a task to convert; None if the task has no valid annotation."""
    entries = task.get("annotations", task.get("completions"))  # the name before version 1
    valid = [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("result"), list)
        and not entry.get("was_cancelled")
    ]
    if not valid:
        labels.note("tasks without an annotation, or skipped by the annotator, are left out", where)
        return None
    if len(valid) > 1:
        labels.note(
            "tasks have several annotations; the ground truth is used, or else the latest", where
        )
    numbered = enumerate(valid)
    return max(numbered, key=lambda e: (e[1].get("ground_truth") is True, _date(e[1]), e[0]))[1]


def _date(annotation: dict[str, Any]) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _open(
    task: dict[str, Any], results: list[Any], where: str, images: NamedImages
) -> LabelledImage | None:
    """The image of a task, still without objects; None if it is skipped."""
    values = [task["data"].get("image"), *task["data"].values()]
    names = [value for value in values if isinstance(value, str)]
    name = next(
        (n for n in names if _path(n).lower().endswith(SUFFIXES)), names[0] if names else ""
    )
    remedy = "--images FOLDER names their folder"
    if "://" in name:
        remedy = f"they are URLs: download them first; {remedy}"
    sizes = ((result.get("original_width"), result.get("original_height")) for result in results)
    size = next((size for size in sizes if None not in size), (None, None))
    return images.open_named(_path(name), where, size=size, remedy=remedy)


def _path(name: str) -> str:
    """The file name in an upload or URL, or the path in /data/local-files/?d=PATH."""
    try:
        url = urlsplit(name)
    except ValueError:
        return name
    path = url.path if "://" in name else parse_qs(url.query).get("d", [name])[0]
    # Folders of uploads and URLs are not those of the user.
    return path.rsplit("/", 1)[-1] if "://" in name or "/upload/" in name else path


def _add_objects(results: list[Any], image: LabelledImage, where: str, labels: Labels) -> None:
    """Adds the regions. A region has two results if its label is a result of its own."""
    regions: dict[Any, dict[str, Any]] = {}
    for index, result in enumerate(results):
        value = result.get("value")
        region = regions.setdefault(str(result.get("id", index)), {})
        region |= value if isinstance(value, dict) else {}
        region |= {"type": result.get("type"), "turned": result.get("image_rotation")}
    for key, region in regions.items():
        place = f"{where}: region {key} ({region['type']})"
        names = [
            name
            for field, value in region.items()
            if field.endswith("labels") and isinstance(value, list)
            for name in value
        ]
        if not any(field in region for field in _SHAPES):
            labels.note("results without an area (choices, points, relations) are left out", place)
            continue
        label = names[0] if len(names) == 1 and isinstance(names[0], str) else ""
        if not label.strip():
            labels.skip("regions do not have exactly one label", place)
            continue
        labelled = LabelledObject(label)
        try:
            if "rle" in region:
                labelled.rle = to_rle(_read_brush(region["rle"], image))
            else:
                labelled.polygons.append(_outline(region, image))
        except InvalidShape as error:
            labels.skip("regions are invalid", f"{place} {error}")
            continue
        image.objects.append(labelled)


def _outline(region: dict[str, Any], image: LabelledImage) -> list[float]:
    """The polygon of a region."""
    if region["turned"]:
        raise InvalidShape(
            f"was drawn on the image rotated by {region['turned']} degrees; rotate the file instead"
        )
    if "imageDataURL" in region:
        raise InvalidShape("is a bitmask, which is not supported; draw it with a brush")
    across, down = image.width / 100, image.height / 100
    if "points" in region:
        corners = polygon(region["points"])
        return [value * (down if place % 2 else across) for place, value in enumerate(corners)]
    x, y = to_number(region.get("x")) * across, to_number(region.get("y")) * down
    if "radiusX" in region:
        rx, ry = to_number(region["radiusX"]) * across, to_number(region.get("radiusY")) * down
        return turned(ellipse(x, y, rx, ry), region.get("rotation") or 0, x, y)
    width, height = to_number(region.get("width")) * across, to_number(region["height"]) * down
    return turned(rectangle(x, y, x + width, y + height), region.get("rotation") or 0, x, y)


def _read_brush(rle: Any, image: LabelledImage) -> Array:
    """The mask (H, W) of a brush.

    Label Studio packs the RGBA values of the image into bits: their number (32 bits), the bits per
    value less 1 (5), and four widths of a length less 1 (4 each). Then follow blocks: 1 for a run
    or 0 for single values (1), which width its length has (2), the length less 1, and the value or
    values; in brackets, the bits of each. The mask is where alpha is not 0.
    """
    try:
        packed = bytes(rle if isinstance(rle, list) else ())
    except (TypeError, ValueError) as error:
        raise InvalidShape("has an rle that is not a list of bytes") from error
    bits = "".join(f"{byte:08b}" for byte in packed)
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        if position > len(bits):
            raise InvalidShape("has an rle that ends too early")
        return int(bits[position - count : position], 2)

    count = take(32)
    if count != image.height * image.width * 4:
        raise InvalidShape(f"has an rle of {count} values, not 4 for each pixel of its image")
    depth = take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(count, bool)
    start = 0
    while start < count:
        is_run = take(1)
        end = min(start + 1 + take(widths[take(2)]), count)
        values[start:end] = take(depth) if is_run else [take(depth) for _ in range(start, end)]
        start = end
    return values.reshape(image.height, image.width, 4)[..., 3]
