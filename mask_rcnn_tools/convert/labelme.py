"""labelme: a json beside each image.

Written by labelme's ``LabelFile``: ``shapes``, ``imagePath``, ``imageData`` (the image once more,
as base64), ``imageHeight`` and ``imageWidth``. labelme turns an image by its EXIF orientation
before it is drawn on, so that shapes count in the image as it is seen.
"""

import io
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mask_rcnn_tools.convert.files import (
    SUFFIXES,
    Unreadable,
    files_below,
    find_image,
    from_base64,
    images_below,
    measure,
    read_json,
    read_pixels,
    suffix_of,
    to_picture,
)
from mask_rcnn_tools.convert.found import Found, Picture, Thing, with_bar
from mask_rcnn_tools.convert.geometry import (
    Unfit,
    ellipse,
    polygon,
    rectangle,
    to_number,
    to_rle,
)

_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def read(source: Path, *, images: Path | None = None, progress: bool = True) -> Found:
    """Reads a folder of labelme's json files, folders within included, or one file.

    Shapes of one image that have the same ``label`` and ``group_id`` are one object. A json without
    shapes is an image without objects; an image without json is not part of the data.

    Args:
        source: the folder or file.
        images: where the images lie if not there.
        progress: shows a bar.
    """
    found = Found()
    folder = source if source.is_dir() else source.parent
    jsons = files_below(source, ".json") if source.is_dir() else [source]
    roots = [folder] if images is None else [images, folder]
    seen: set[Path | str] = set()
    for path in with_bar(jsons, "reading labelme", progress=progress):
        try:
            content = read_json(path)
        except Unreadable as error:
            found.skip("files cannot be read", f"{path} {error}")
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            found.skip("files are not labelme's", f"{path} has no list 'shapes'")
            continue
        picture = _picture(path, content, roots, found)
        if picture is None:
            continue
        key = picture.path or picture.name
        if key in seen:
            found.skip("files label an image that an earlier one labels", f"{path}: {picture.name}")
            continue
        seen.add(key)
        picture.flags = _ticked(content.get("flags"))
        picture.things = _things(path, content["shapes"], picture, found)
        found.pictures.append(picture)
    if source.is_dir():
        for path in images_below(source):
            if Path(path).resolve() not in seen and not path.with_suffix(".json").is_file():
                found.note("images have no json: not labelled, left out", path)
    return found


def _picture(
    path: Path, content: dict[str, Any], roots: list[Path], found: Found
) -> Picture | None:
    """The image of a json, from its file or else from the json."""
    name = content.get("imagePath")
    name = name if isinstance(name, str) else ""
    bases = [path.parent, *roots]
    place = find_image(name, bases, roots)
    for suffix in SUFFIXES:  # renamed together with its json
        place = place or find_image(path.stem + suffix, [path.parent], roots)
    if place is not None:
        picture = to_picture(*place, found)
    elif content.get("imageData"):
        picture = _embedded(path, content, name, found)
    else:
        found.skip(
            "images are not there", f"{path}: '{name}' (--images FOLDER says where they are)"
        )
        return None
    if picture is None:
        return None
    said = (content.get("imageHeight"), content.get("imageWidth"))
    if all(type(side) is int for side in said) and said != (picture.height, picture.width):
        found.skip(
            "images have another size than when they were labelled",
            f"{path}: {said[1]} x {said[0]}, now {picture.width} x {picture.height}",
        )
        return None
    return picture


def _embedded(path: Path, content: dict[str, Any], name: str, found: Found) -> Picture | None:
    def data() -> bytes:
        return from_base64(read_json(path)["imageData"])

    try:
        image = from_base64(content["imageData"])
        height, width, orientation = measure(io.BytesIO(image))
        suffix = suffix_of(image)
    except Unreadable as error:
        found.skip("images cannot be read", f"{path}: its imageData {error}")
        return None
    last = PurePosixPath(name.replace("\\", "/")).stem or path.stem
    found.note("images are missing and taken from their json (imageData)", f"{path}: '{name}'")
    return Picture(last + suffix, height, width, content=data, orientation=orientation)


def _things(path: Path, shapes: list[Any], picture: Picture, found: Found) -> list[Thing]:
    things: dict[Any, Thing] = {}
    masks: dict[Any, np.ndarray] = {}
    for index, shape in enumerate(shapes):
        where = f"{path} shapes[{index}]"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label.strip():
            found.skip("shapes have no label", where)
            continue
        kind = shape.get("shape_type") or "polygon"  # labelme 3 wrote none
        if kind in _WITHOUT_AREA:
            found.note(f"shapes are a {kind}, which has no area: left out", where)
            continue
        group = shape.get("group_id")
        key = (shape["label"], group) if type(group) in (int, str) else index
        try:
            drawn = None if kind == "mask" else _outline(kind, shape.get("points"))
            pasted = _pasted(shape, picture) if kind == "mask" else None
        except (Unfit, Unreadable) as error:
            found.skip("shapes are no shape that can be read", f"{where} ({kind}) {error}")
            continue
        thing = things.setdefault(key, Thing(shape["label"]))
        thing.flags += [flag for flag in _ticked(shape.get("flags")) if flag not in thing.flags]
        if drawn is not None:
            thing.polygons.append(drawn)
        if pasted is not None:
            masks[key] = masks[key] | pasted if key in masks else pasted
    for key, mask in masks.items():
        things[key].rle = to_rle(mask)
    return list(things.values())


def _outline(kind: str, points: Any) -> list[float]:
    if kind in ("polygon", "oriented_rectangle"):
        return polygon(points)
    if kind == "rectangle" and isinstance(points, list) and len(points) == 4:
        return polygon(points)
    if kind not in ("rectangle", "circle"):
        raise Unfit("is of a kind that is not known")
    (x0, y0), (x1, y1) = _two(points)
    if kind == "rectangle":
        return rectangle(x0, y0, x1, y1)
    radius = math.hypot(x1 - x0, y1 - y0)  # from the centre to a point of the border
    return ellipse(x0, y0, radius, radius)


def _pasted(shape: dict[str, Any], picture: Picture) -> np.ndarray:
    """A shape of labelme's AI tools: a small mask, whose box has both corners' pixels."""
    (x0, y0), (x1, y1) = _two(shape.get("points"))
    left, top, right, bottom = (int(v) for v in (x0, y0, x1, y1))
    small = read_pixels(io.BytesIO(from_base64(shape.get("mask"))))
    if small.shape != (bottom - top + 1, right - left + 1):
        raise Unfit(f"has a mask of {small.shape[::-1]}, and a box of other sides")
    mask = np.zeros((picture.height, picture.width), bool)
    rows = slice(max(top, 0), max(min(bottom + 1, picture.height), 0))
    columns = slice(max(left, 0), max(min(right + 1, picture.width), 0))
    inner = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if rows.start < rows.stop and columns.start < columns.stop:
        mask[rows, columns] = inner > 0
    return mask


def _two(points: Any) -> list[tuple[float, float]]:
    if not isinstance(points, list) or len(points) != 2:
        raise Unfit("has not two points")
    try:
        return [(to_number(x), to_number(y)) for x, y in points]
    except (TypeError, ValueError) as error:
        raise Unfit("has not two points [x, y]") from error


def _ticked(flags: Any) -> list[str]:
    if not isinstance(flags, dict):
        return []
    return [str(name) for name, value in flags.items() if value is True]
