"""Pascal VOC's instance masks: a picture of objects and a picture of classes for each image.

``JPEGImages/NAME.jpg``, ``SegmentationObject/NAME.png`` (0 background, 1, 2, ... objects, 255 void:
borders that belong to nobody), ``SegmentationClass/NAME.png`` (0 background, 1, 2, ... classes, 255
void), both with a palette, or as colours; ``ImageSets/Segmentation/SPLIT.txt`` (or
``ImageSets/SPLIT.txt``), a name a line.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert.files import (
    Array,
    Unreadable,
    files_below,
    images_below,
    read_pixels,
    to_picture,
    upright,
)
from mask_rcnn_tools.convert.found import Found, Picture, Thing, with_bar
from mask_rcnn_tools.convert.geometry import to_rle

# Of VOC 2007 to 2012, in the order of their indices.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_VOID = 255
_VOID_COLOUR = (224, 224, 192)
_BACKGROUND = ("background", "_background_", "__ignore__")


def read(source: Path, *, classes: Sequence[str] | None = None, progress: bool = True) -> Found:
    """Reads a folder in VOC's layout.

    The class of an object is that of most of its pixels. Images without masks are not part of the
    data; with a ``SegmentationObject`` of background alone they have no objects. Where
    ``ImageSets`` has train and val, they are the splits.

    Args:
        source: the folder that has JPEGImages, SegmentationObject and SegmentationClass.
        classes: the names of the indices 1, 2, ...; by default from ``labelmap.txt`` (CVAT),
            ``class_names.txt`` (labelme) or ``labels.txt``, or VOC's in a folder named VOC20xx.
        progress: shows a bar.

    Raises:
        UserError: a folder is missing, or nothing names the classes.
    """
    folders = [source / n for n in ("JPEGImages", "SegmentationObject", "SegmentationClass")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{source}' has no folder '{folder.name}', which VOC's layout has")
    names, colours = _classes(source, classes)
    found = Found(classes=list(names))
    images = {
        path.relative_to(folders[0]).with_suffix(""): path for path in images_below(folders[0])
    }
    objects = {
        p.relative_to(folders[1]).with_suffix(""): p for p in files_below(folders[1], ".png")
    }
    splits = _splits(source)
    for stem in sorted(objects.keys() - images.keys()):
        found.skip("images are not there", f"{objects[stem]}: no {stem} in '{folders[0]}'")
    if without := len(images.keys() - objects.keys()):
        found.note(
            f"images have no SegmentationObject: left out ({without} of {len(images)})", folders[0]
        )
    both = sorted(objects.keys() & images.keys())
    for stem in with_bar(both, "reading VOC", progress=progress):
        name = images[stem].relative_to(folders[0]).as_posix()
        picture = to_picture(images[stem], name, found)
        if picture is None:
            continue
        picture.split = splits.get(stem.as_posix(), "")
        try:
            instances = upright(read_pixels(objects[stem]), picture)
            kinds = upright(read_pixels((folders[2] / stem).with_suffix(".png")), picture)
        except Unreadable as error:
            found.skip("images whose masks cannot be read", f"{images[stem]}: its mask {error}")
            continue
        _add_things(picture, _to_indices(instances), _to_indices(kinds), names, colours, found)
        found.pictures.append(picture)
    return found


def _add_things(
    picture: Picture,
    instances: Array,
    kinds: Array,
    names: Sequence[str],
    colours: dict[int, int],
    found: Found,
) -> None:
    void = {_VOID, _packed(_VOID_COLOUR)} if colours_used(instances) else {_VOID}
    background = {0, *(colour for colour, index in colours.items() if index == 0)}
    for number in np.unique(instances).tolist():
        if number in background or number in void:
            continue
        mask = instances == number
        values, counts = np.unique(kinds[mask], return_counts=True)
        indices = [colours.get(v, -1) if colours_used(kinds) else v for v in values.tolist()]
        votes = [
            (int(count), index)
            for index, count in zip(indices, counts, strict=True)
            if 0 < index <= len(names) and index != _VOID
        ]
        where = f"{picture.path}: object {number}"
        if not votes:
            found.skip("objects have no class that has a name", f"{where} (class {indices})")
            continue
        if len(votes) > 1:
            found.note("objects have pixels of several classes; the most frequent counts", where)
        label = names[max(votes, key=lambda vote: (vote[0], -vote[1]))[1] - 1]
        picture.things.append(Thing(label, rle=to_rle(mask)))


def colours_used(labels: Array) -> bool:
    """Whether ``_to_indices`` has packed colours."""
    return bool((labels > 65535).any())


def _to_indices(labels: Array) -> Array:
    """(H, W): a palette's index as it is, a colour as one number beyond 65535."""
    if labels.ndim == 2:
        return labels
    packed = labels[..., 0] * 65536 + labels[..., 1] * 256 + labels[..., 2]
    return np.where(packed > 0, packed + 2**24, 0)


def _packed(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red * 65536 + green * 256 + blue + 2**24 if any(colour) else 0


def _colour(index: int) -> tuple[int, int, int]:
    """VOC's palette: the bits of the index, three at a time, from the top of each channel."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def _classes(source: Path, wanted: Sequence[str] | None) -> tuple[list[str], dict[int, int]]:
    """The names of the indices 1, 2, ..., and the index of each colour."""
    if (path := source / "labelmap.txt").is_file():  # NAME:RED,GREEN,BLUE:PARTS:ACTIONS
        names, colours = [], {0: 0}
        for line in _lines(path):
            name, colour, *_ = [*line.split(":"), ""]
            if name in _BACKGROUND:
                colours[_packed(_rgb(colour, path))] = 0
                continue
            names.append(name)
            if colour:
                colours[_packed(_rgb(colour, path))] = len(names)
        return list(wanted or names), colours
    colours = {_packed(_colour(index)): index for index in range(256)}
    for path in (source / "class_names.txt", source / "labels.txt"):
        if wanted is None and path.is_file():
            return [name for name in _lines(path) if name not in _BACKGROUND], colours
    if wanted is None and re.fullmatch(r"VOC20\d\d", source.resolve().name):
        return list(CLASSES), colours
    if not wanted:
        raise UserError(
            f"'{source}' does not say what its classes are called: give --classes NAME ... in the "
            "order of their indices from 1, or a class_names.txt with a name a line"
        )
    return list(wanted), colours


def _rgb(text: str, path: Path) -> list[int]:
    values = text.split(",")
    if len(values) != 3 or not all(v.strip().isdigit() for v in values):
        raise UserError(f"'{path}' has the colour '{text}', not RED,GREEN,BLUE")
    return [int(value) for value in values]


def _splits(source: Path) -> dict[str, str]:
    """The split of each name, where ImageSets has a train and a val."""
    for folder in (source / "ImageSets" / "Segmentation", source / "ImageSets"):
        files = [folder / "train.txt", folder / "val.txt"]
        if all(path.is_file() for path in files):
            return {line.split()[0]: path.stem for path in files for line in _lines(path)}
    return {}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
