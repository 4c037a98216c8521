"""Reads labelme: a json next to each image.

The json is written by labelme's ``LabelFile``: ``shapes``, ``imagePath``, ``imageData`` (a copy of
the image in base64), ``imageHeight`` and ``imageWidth``. labelme shows an image upright (after its
EXIF orientation), so the coordinates are those of the upright image.
"""

import io
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mask_rcnn_plus.data.file_names import ImageFiles
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.classes import clean_name
from mask_rcnn_tools.convert.folders import report_unread
from mask_rcnn_tools.convert.geometry import (
    InvalidShape,
    ellipse,
    polygon,
    rectangle,
    to_number,
    to_rle,
)
from mask_rcnn_tools.convert.labels import (
    SUFFIXES,
    LabelledImage,
    LabelledObject,
    Labels,
    files_below,
    from_base64,
    images_below,
    keep_splits,
    measure,
    read_each,
    read_json,
    read_pixels,
    split_of,
    suffix_of,
)
from mask_rcnn_tools.progress import progress_bar

_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def read(source: Path, *, images: Path | None = None) -> Labels:
    """Reads one of labelme's json files, or all in a folder and its subfolders.

    Shapes of an image with the same ``label`` and ``group_id`` are one object. A json without
    shapes is an image without objects. An image without a json is left out. Folders such as
    ``train`` and ``val`` are the splits.

    Args:
        source: the folder or file.
        images: the folder of the images, if it is not that of the json files.
    """
    labels = Labels()
    folder = source if source.is_dir() else source.parent
    jsons = files_below(source, ".json")
    files = ImageFiles(folder) if images is None else ImageFiles(images, folder)
    seen: set[Path | str] = set()
    bar = progress_bar("reading labelme", "file", jsons)
    for path, content in read_each(read_json, bar, source, labels):
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            labels.skip("files are not labelme's", f"{path} has no list 'shapes'")
            continue
        image = _read_image(path, content, files, labels)
        if image is None:
            continue
        key = image.path or image.name
        if key in seen:
            labels.skip("files label the same image as an earlier file", f"{path}: {image.name}")
            continue
        seen.add(key)
        image.split = split_of(*path.relative_to(folder).parts[-2::-1])
        image.flags = _set_flags(content.get("flags"))
        image.objects = _read_objects(path, content["shapes"], image, labels)
        labels.images.append(image)
    keep_splits(labels)
    labels.note_names(files)
    if source.is_dir():
        for path in sorted({*images_below(source), *(images_below(images) if images else ())}):
            if path.resolve() not in seen and not path.with_suffix(".json").is_file():
                labels.note("images have no json and are left out", path)
        report_unread(labels, set(files_below(source)) - set(jsons))
    return labels


def _read_image(
    path: Path, content: dict[str, Any], files: ImageFiles, labels: Labels
) -> LabelledImage | None:
    """The image of a json, from its file or else from ``imageData``."""
    name = content["imagePath"] if isinstance(content.get("imagePath"), str) else ""
    found = files.find_exact(name, path.parent)
    # The image may have been renamed together with its json.
    for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)):
        found = found or files.find_exact(path.stem + suffix, path.parent)
    if found is None and content.get("imageData"):
        image = _embedded_image(path, content, name, labels)
    else:
        found = found or labels.find_file(files, name, path, path.parent)
        image = labels.open_image(found, files.name_of(found)) if found else None
    if image is None:
        return None
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if type(height) is type(width) is int and (height, width) != (image.height, image.width):
        labels.skip(
            "images have a different size than when they were labelled",
            f"{path}: {width} x {height}, now {image.width} x {image.height}",
        )
        return None
    return image


def _embedded_image(
    path: Path, content: dict[str, Any], name: str, labels: Labels
) -> LabelledImage | None:
    """The image in a json's ``imageData``."""
    try:
        file = from_base64(content["imageData"])
        height, width, orientation = measure(io.BytesIO(file))
        suffix = suffix_of(file)
    except UnreadableFile as error:
        labels.skip("images cannot be read", f"{path}: its imageData {error}")
        return None
    stem = PurePosixPath(name.replace("\\", "/")).stem or path.stem
    labels.note("images are missing; their json contains a copy (imageData)", f"{path}: '{name}'")
    return LabelledImage(
        stem + suffix,
        height,
        width,
        # Reads the json again, because all images might not fit into memory.
        content=lambda: from_base64(read_json(path)["imageData"]),
        orientation=orientation,
    )


def _read_objects(
    path: Path, shapes: list[Any], image: LabelledImage, labels: Labels
) -> list[LabelledObject]:
    objects: dict[Any, LabelledObject] = {}
    masks: dict[Any, np.ndarray] = {}
    for index, shape in enumerate(shapes):
        where = f"{path} shapes[{index}]"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            labels.skip("shapes have no label", where)
            continue
        kind = shape.get("shape_type") or "polygon"  # labelme 3 did not write it
        if kind in _WITHOUT_AREA:
            labels.note(f"shapes of the type {kind} have no area and are left out", where)
            continue
        group = shape.get("group_id")
        key = (clean_name(label), group) if type(group) in (int, str) else index
        try:
            mask = _read_mask(shape, image) if kind == "mask" else None
            outline = _outline(kind, shape.get("points")) if kind != "mask" else None
        except (InvalidShape, UnreadableFile) as error:
            labels.skip("shapes are invalid", f"{where} ({kind}) {error}")
            continue
        labelled = objects.setdefault(key, LabelledObject(label))
        labelled.flags += [f for f in _set_flags(shape.get("flags")) if f not in labelled.flags]
        if outline is not None:
            labelled.polygons.append(outline)
        if mask is not None:
            masks[key] = masks[key] | mask if key in masks else mask
    for key, mask in masks.items():
        objects[key].rle = to_rle(mask)
    return list(objects.values())


def _outline(kind: str, points: Any) -> list[float]:
    """The polygon of a shape."""
    has_four_corners = isinstance(points, list) and len(points) == 4
    if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and has_four_corners):
        return polygon(points)
    if kind not in ("rectangle", "circle"):
        raise InvalidShape("has an unknown type")
    (x0, y0), (x1, y1) = _two_points(points)
    if kind == "rectangle":
        return rectangle(x0, y0, x1, y1)
    radius = math.hypot(x1 - x0, y1 - y0)  # from the centre to a point on the circle
    return ellipse(x0, y0, radius, radius)


def _read_mask(shape: dict[str, Any], image: LabelledImage) -> np.ndarray:
    """The mask (H, W) of a shape from labelme's AI tools.

    It is stored as a small image; the two points are its first and last pixel.
    """
    (left, top), (right, bottom) = (map(int, p) for p in _two_points(shape.get("points")))
    small = read_pixels(io.BytesIO(from_base64(shape.get("mask"))))
    if small.shape != (expected := (bottom - top + 1, right - left + 1)):
        raise InvalidShape(f"has a mask of the shape {small.shape}, but its box is {expected}")
    y, x = np.nonzero(small > 0)
    y, x = y + top, x + left
    inside = (y >= 0) & (y < image.height) & (x >= 0) & (x < image.width)
    mask = np.zeros((image.height, image.width), bool)
    mask[y[inside], x[inside]] = True
    return mask


def _two_points(points: Any) -> list[tuple[float, float]]:
    try:
        (x0, y0), (x1, y1) = points
    except (TypeError, ValueError) as error:
        raise InvalidShape("does not have two points [x, y]") from error
    return [(to_number(x0), to_number(y0)), (to_number(x1), to_number(y1))]


def _set_flags(flags: Any) -> list[str]:
    """The names of the flags that are set."""
    if not isinstance(flags, dict):
        return []
    return [str(name) for name, value in flags.items() if value is True]
