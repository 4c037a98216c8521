"""Reads Pascal VOC's instance masks: for each image, one picture of objects and one of classes.

``JPEGImages/NAME.jpg``; ``SegmentationObject/NAME.png`` (0 background, 1, 2, ... objects, 255 void,
the borders that belong to no object); ``SegmentationClass/NAME.png`` (0 background, 1, 2, ...
classes, 255 void); both with a palette or with colours; ``ImageSets/Segmentation/SPLIT.txt`` (or
``ImageSets/SPLIT.txt``), one name per line.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.folders import Stems, report_unread
from mask_rcnn_tools.convert.geometry import to_rle
from mask_rcnn_tools.convert.labels import (
    Array,
    LabelledImage,
    LabelledObject,
    Labels,
    files_below,
    images_below,
    keep_splits,
    read_pixels,
    read_text,
    upright,
)
from mask_rcnn_tools.progress import progress_bar

# The classes of VOC 2007 to 2012, in the order of their indices.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_VOID = 255
_VOID_COLOUR = (224, 224, 192)
_BACKGROUND = ("background", "_background_", "__ignore__")


def read(source: Path, *, classes: Sequence[str] | None = None) -> Labels:
    """Reads a folder in VOC's layout.

    The class of an object is that of most of its pixels. An image without a SegmentationObject is
    left out; one whose SegmentationObject has only background is an image without objects. Train,
    val and test in ``ImageSets`` are the splits, if there are several.

    Args:
        source: the folder with JPEGImages, SegmentationObject and SegmentationClass.
        classes: names of the classes 1, 2, ...; by default from ``labelmap.txt`` (CVAT),
            ``class_names.txt`` (labelme) or ``labels.txt``, or those of VOC if the folder is named
            VOC20xx.

    Raises:
        UserError: a folder is missing, or there are no class names.
    """
    folders = [source / name for name in ("JPEGImages", "SegmentationObject", "SegmentationClass")]
    image_folder, _, class_folder = folders
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise UserError(f"'{source}' has no folder '{missing.name}', which VOC's layout needs")
    names, colours = _read_classes(source, classes)
    labels = Labels(classes=list(names))
    images, objects, kinds = (Stems(folder, images_below(folder), labels) for folder in folders)
    splits = _read_splits(source)
    unused = dict(images.paths)
    for stem, object_file in progress_bar("reading VOC", "image", objects.paths.items()):
        path = unused.pop(images.find(stem) or "", None)
        if path is None:
            labels.skip("images are missing", f"{object_file}: no {stem} in '{image_folder}'")
            continue
        image = labels.open_image(path, path.relative_to(image_folder).as_posix())
        if image is None:
            continue
        image.split, *image.more_splits = splits.get(stem, [""])
        try:
            if (kind := kinds.find(stem)) is None:
                raise UnreadableFile(f"is missing in '{class_folder}'")
            instances = upright(read_pixels(object_file), image)
            classes_of = upright(read_pixels(kinds.paths[kind]), image)
        except UnreadableFile as error:
            labels.skip("images have unreadable masks", f"{path}: its mask {error}")
            continue
        _add_objects(image, _to_indices(instances), _to_indices(classes_of), names, colours, labels)
        labels.images.append(image)
    if unused:
        what = f"images without SegmentationObject are left out ({len(unused)} of "
        labels.note(f"{what}{len(images.paths)})", image_folder)
    for stem in sorted(splits.keys() - images.paths.keys()):
        labels.skip("images in ImageSets are missing", stem)
    keep_splits(labels)
    report_unread(labels, [file for folder in folders for file in files_below(folder)])
    return labels


def _add_objects(
    image: LabelledImage,
    instances: Array,
    kinds: Array,
    names: Sequence[str],
    colours: dict[int, int],
    labels: Labels,
) -> None:
    """Adds the objects of an image.

    Args:
        image: gets the objects.
        instances, kinds: (H, W) from ``_to_indices``: the objects and the classes.
        names, colours: from ``_read_classes``.
        labels: counts what is left out.
    """
    ignored = {0, _VOID, *(colour for colour, index in colours.items() if index == 0)}
    if _has_colours(instances):
        ignored.add(_pack(_VOID_COLOUR))
    for number in np.unique(instances).tolist():
        if number in ignored:
            continue
        mask = instances == number
        values, counts = np.unique(kinds[mask], return_counts=True)
        indices = [colours.get(v, -1) if _has_colours(kinds) else v for v in values.tolist()]
        votes = [
            (int(count), -index)
            for index, count in zip(indices, counts, strict=True)
            if 0 < index <= len(names) and index != _VOID
        ]
        where = f"{image.path}: object {number}"
        if not votes:
            labels.skip("objects have no class with a name", f"{where} (class {indices})")
            continue
        if len(votes) > 1:
            labels.note("objects have pixels of several classes; the most frequent counts", where)
        _, index = max(votes)
        image.objects.append(LabelledObject(names[-index - 1], rle=to_rle(mask)))


def _to_indices(pixels: Array) -> Array:
    """(H, W): indices of a palette unchanged; colours packed into numbers above 65535."""
    if pixels.ndim == 2:
        return pixels
    packed = pixels[..., 0] * 65536 + pixels[..., 1] * 256 + pixels[..., 2]
    return np.where(packed > 0, packed + 2**24, 0)


def _has_colours(indices: Array) -> bool:
    """Whether ``_to_indices`` has packed colours."""
    return bool((indices > 65535).any())


def _pack(colour: Sequence[int]) -> int:
    """A colour as in ``_to_indices``."""
    return int(_to_indices(np.array([[colour]])).item())


def _colour(index: int) -> tuple[int, int, int]:
    """A colour of VOC's palette: three bits of the index at a time, from the channels' top bit."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def _read_classes(source: Path, wanted: Sequence[str] | None) -> tuple[list[str], dict[int, int]]:
    """The names of the classes 1, 2, ..., and the class of each packed colour."""
    if background := set(wanted or ()) & set(_BACKGROUND):
        raise UserError(
            f"--classes: leave out '{min(background)}'; its index is 0, others count from 1"
        )
    if (path := source / "labelmap.txt").is_file():  # NAME:RED,GREEN,BLUE:PARTS:ACTIONS
        names, colours = [], {0: 0}
        for line in _lines(path):
            name, colour, *_ = [*line.split(":"), ""]
            is_background = name in _BACKGROUND
            if not is_background:
                names.append(name)
            if is_background or colour:
                colours[_pack(_parse_colour(colour, path))] = 0 if is_background else len(names)
        return list(wanted or names), colours
    colours = {_pack(_colour(index)): index for index in range(256)}
    if wanted:
        return list(wanted), colours
    for path in (source / "class_names.txt", source / "labels.txt"):
        if path.is_file():
            return [name for name in _lines(path) if name not in _BACKGROUND], colours
    if re.fullmatch(r"VOC20\d\d", source.resolve().name):
        return list(CLASSES), colours
    raise UserError(
        f"'{source}' has no class names: give --classes NAME ... in the order of their indices "
        "from 1, or write a class_names.txt with one name per line"
    )


def _parse_colour(text: str, path: Path) -> list[int]:
    values = text.split(",")
    if len(values) != 3 or not all(v.strip().isdigit() for v in values):
        raise UserError(f"'{path}': expected a colour RED,GREEN,BLUE, got '{text}'")
    return [int(value) for value in values]


def _read_splits(source: Path) -> dict[str, list[str]]:
    """The splits of each image name, from the files train, val and test in ImageSets."""
    splits: dict[str, list[str]] = {}
    for folder in (source / "ImageSets" / "Segmentation", source / "ImageSets"):
        files = [folder / f"{split}.txt" for split in ("train", "val", "test")]
        for path in files if not splits else []:
            for line in _lines(path) if path.is_file() else []:
                splits.setdefault(line.split()[0], []).append(path.stem)
    return splits


def _lines(path: Path) -> list[str]:
    """The lines of a text file, except empty ones and comments."""
    try:
        lines = (line.strip() for line in read_text(path).splitlines())
    except UnreadableFile as error:
        raise UserError(f"'{path}' {error}") from error
    return [line for line in lines if line and not line.startswith("#")]
