"""Reads "CVAT for images 1.1": ``annotations.xml``, with the images in ``images`` beside it.

An XML with a document type is refused, because it could define entities. CVAT never writes one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from mask_rcnn_plus.errors import reason
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.classes import clean_name
from mask_rcnn_tools.convert.geometry import (
    InvalidShape,
    ellipse,
    polygon,
    rectangle,
    to_rle,
    turned,
)
from mask_rcnn_tools.convert.images import NamedImages
from mask_rcnn_tools.convert.labels import (
    Array,
    LabelledImage,
    LabelledObject,
    Labels,
    files_below,
    keep_splits,
    read_each,
    read_text,
    split_of,
    unknown_layout,
)
from mask_rcnn_tools.progress import progress_bar

_WITHOUT_AREA = ("polyline", "points", "skeleton", "cuboid", "tag")


def read(source: Path, *, images: Path | None = None) -> Labels:
    """Reads an XML file, or all XML files in a folder and its subfolders.

    Shapes of an image with the same label and ``group_id`` are one object. If there are
    several subsets, the ``subset`` of an image is its split. Images without shapes are kept.

    Args:
        source: the XML or the folder.
        images: the folder of the images, by default the source.

    Raises:
        UserError: there is no XML of CVAT.
    """
    labels = Labels()
    classes: list[str] = []
    paths = files_below(source, ".xml")
    named = NamedImages(source, images, labels)
    found = 0
    for path, root in read_each(_read_xml, paths, source, labels):
        found += 1
        for label in root.iterfind("meta//labels/label"):
            name = label.findtext("name") or ""
            # The parts of a skeleton have a parent.
            if name.strip() and label.find("parent") is None:
                classes.append(name)
        for entry in progress_bar("reading CVAT", "image", root.findall("image")):
            image = _open(entry, path, named)
            if image is not None:
                _add_objects(entry, image, path, labels)
                labels.images.append(image)
    if not found:
        wanted = 'an .xml in the format "CVAT for images 1.1", usually annotations.xml'
        raise unknown_layout(source, wanted)
    classes += (labelled.label for image in labels.images for labelled in image.objects)
    labels.classes = list(dict.fromkeys(map(clean_name, classes)))
    named.report_rest(paths)
    keep_splits(labels)
    return labels


def _read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML in the format CVAT for images 1.1.

    Raises:
        UnreadableFile: the file has another format.
    """
    text = read_text(path)
    if "<!DOCTYPE" in text:
        raise UnreadableFile("has a document type (DTD), which CVAT never writes")
    try:
        root = ElementTree.fromstring(text)
    except (ValueError, ElementTree.ParseError) as error:
        raise UnreadableFile(f"is not valid XML: {reason(error, 120)}") from error
    if root.tag != "annotations" or root.find("track") is not None or root.find("image") is None:
        is_video = root.tag == "annotations" and root.find("track") is not None
        fault = "is CVAT for video" if is_video else f"has no images (its root is <{root.tag}>)"
        raise UnreadableFile(f'{fault}; in CVAT, export the task as "CVAT for images 1.1"')
    return root


def _open(entry: ElementTree.Element, path: Path, images: NamedImages) -> LabelledImage | None:
    """An image without objects; None if it is skipped."""
    near = path.parent.resolve() / "images"
    size = (_size(entry.get("width")), _size(entry.get("height")))
    image = images.open_named(
        entry.get("name", ""), path, near if near.is_dir() else near.parent, size=size
    )
    if image is not None:
        image.split = split_of(entry.get("subset", ""))
    return image


def _size(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) < 10 else None


def _add_objects(
    entry: ElementTree.Element, image: LabelledImage, path: Path, labels: Labels
) -> None:
    objects: dict[Any, LabelledObject] = {}
    masks: dict[Any, Array] = {}
    for index, shape in enumerate(entry):
        where = f"{path}: '{entry.get('name')}' {shape.tag} {index}"
        label = shape.get("label", "")
        if shape.tag in _WITHOUT_AREA:
            labels.note(f"shapes of the type {shape.tag} have no area and are left out", where)
            continue
        if not label.strip():
            labels.skip("shapes have no label", where)
            continue
        group = shape.get("group_id", "0")
        key = index if group == "0" else (label, group)
        try:
            outline = None if shape.tag == "mask" else _outline(shape.tag, shape.attrib)
            mask = _read_mask(shape.attrib, image) if shape.tag == "mask" else None
        except InvalidShape as error:
            labels.skip("shapes are invalid", f"{where} {error}")
            continue
        labelled = objects.setdefault(key, LabelledObject(label))
        if outline is not None:
            labelled.polygons.append(outline)
        if mask is not None:
            masks[key] = masks[key] | mask if key in masks else mask
    for key, mask in masks.items():
        objects[key].rle = to_rle(mask)
    image.objects = list(objects.values())


def _outline(kind: str, values: Mapping[str, str]) -> list[float]:
    """The polygon of a shape."""
    if kind == "polygon":
        corners = (corner.split(",") for corner in values.get("points", "").split(";"))
        return polygon([[_number(value) for value in corner] for corner in corners])
    rotation = _number(values.get("rotation", "0"))
    if kind == "box":
        x0, y0, x1, y1 = (_number(values.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
        box = rectangle(x0, y0, x1, y1)
        return turned(box, rotation, (x0 + x1) / 2, (y0 + y1) / 2) if rotation else box
    if kind == "ellipse":
        cx, cy, rx, ry = (_number(values.get(key)) for key in ("cx", "cy", "rx", "ry"))
        return turned(ellipse(cx, cy, rx, ry), rotation, cx, cy)
    raise InvalidShape("has an unknown type")


def _read_mask(values: Mapping[str, str], image: LabelledImage) -> Array:
    """The mask (H, W) of a brush. ``rle`` has run lengths in its box, row by row, outside first."""
    try:
        left, top, width, height = (int(values[key]) for key in ("left", "top", "width", "height"))
        counts = [int(count) for count in values["rle"].split(",")]
    except (KeyError, ValueError) as error:
        raise InvalidShape("needs left, top, width, height and rle as whole numbers") from error
    inside = 0 <= left <= left + width <= image.width and 0 <= top <= top + height <= image.height
    if not inside or min(counts) < 0 or sum(counts) != width * height:
        raise InvalidShape("has run lengths that do not fit its box, or a box outside the image")
    mask = np.zeros((image.height, image.width), bool)
    runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    mask[top : top + height, left : left + width] = runs.reshape(height, width)
    return mask


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError as error:
        raise InvalidShape(f"has the coordinate {text!r:.40}, which is not a number") from error
