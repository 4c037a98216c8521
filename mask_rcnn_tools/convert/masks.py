"""Folders of binary masks: an image file for each object, 0 where it is not.

Three layouts are read, and CLASS, a folder, may be left out:

- ``images/NAME.jpg`` and ``masks/NAME/[CLASS/]ANYTHING.png``
- ``images/NAME.jpg`` and ``masks/[CLASS/]NAME.png`` or ``masks/[CLASS/]NAME_ANYTHING.png``
- ``NAME/images/ANYTHING.png`` and ``NAME/masks/[CLASS/]ANYTHING.png``
"""

from pathlib import Path

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert.files import (
    Array,
    Unreadable,
    images_below,
    read_pixels,
    to_picture,
    upright,
)
from mask_rcnn_tools.convert.found import Found, Thing, with_bar
from mask_rcnn_tools.convert.geometry import to_rle

_SEPARATORS = ("_", "-", ".")


def read(source: Path, *, class_name: str = "object", progress: bool = True) -> Found:
    """Reads a folder in one of the layouts. An image without masks is one without objects.

    Args:
        source: the folder.
        class_name: the class of masks that lie in no folder CLASS.
        progress: shows a bar.

    Raises:
        UserError: it has none of the layouts.
    """
    found = Found()
    images: dict[Path, tuple[str, list[tuple[Path, str]]]] = {}
    if (source / "images").is_dir() and (source / "masks").is_dir():
        images = _side_by_side(source / "images", source / "masks", found)
    else:
        folders = (path for path in source.iterdir() if not path.name.startswith("."))
        for folder in sorted(path for path in folders if (path / "images").is_dir()):
            pictures = images_below(folder / "images")
            if len(pictures) != 1:
                found.skip("folders have not exactly one image", f"{folder / 'images'}")
                continue
            files = images_below(folder / "masks") if (folder / "masks").is_dir() else []
            name = folder.name + pictures[0].suffix
            images[pictures[0]] = (name, [(m, _class(m, folder / "masks")) for m in files])
    if not images:
        raise UserError(
            f"'{source}' has neither images/ and masks/ nor NAME/images/ and NAME/masks/ with "
            "images in them; see mask-rcnn-plus convert masks --help"
        )
    for path, (name, masks) in with_bar(images.items(), "reading masks", progress=progress):
        picture = to_picture(path, name, found)
        if picture is None:
            continue
        if not masks:
            found.note("images have no mask: they are without objects", path)
        for file, label in masks:
            try:
                mask = upright(_binary(read_pixels(file)), picture)
            except Unreadable as error:
                found.skip("masks cannot be read", f"{file} {error}")
                continue
            if mask.any():
                picture.things.append(Thing(label or class_name, rle=to_rle(mask)))
            else:
                found.skip("masks are empty", file)
        found.pictures.append(picture)
    return found


def _side_by_side(
    images: Path, masks: Path, found: Found
) -> dict[Path, tuple[str, list[tuple[Path, str]]]]:
    """Each image's name and masks, by the masks' names."""
    pictures = {
        path.relative_to(images).with_suffix("").as_posix(): path for path in images_below(images)
    }
    result: dict[Path, tuple[str, list[tuple[Path, str]]]] = {
        path: (path.relative_to(images).as_posix(), []) for path in pictures.values()
    }
    for file in images_below(masks):
        folders = file.relative_to(masks).parent.parts
        # The folder's name first: masks/NAME/ANYTHING.png.
        for depth in range(len(folders), 0, -1):
            if (stem := "/".join(folders[:depth])) in pictures:
                label = folders[depth] if depth < len(folders) else ""
                break
        else:
            label = folders[0] if folders else ""
            stem = _owner(file.stem, pictures)
        if stem:
            result[pictures[stem]][1].append((file, label))
        else:
            found.skip("masks of no image in images/", file)
    return result


def _owner(stem: str, pictures: dict[str, Path]) -> str:
    """The image that a mask's name begins with, the longest; "" if there is none."""
    for end in range(len(stem), 0, -1):
        if stem[:end] in pictures and (end == len(stem) or stem[end] in _SEPARATORS):
            return stem[:end]
    return ""


def _class(mask: Path, folder: Path) -> str:
    parts = mask.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def _binary(pixels: Array) -> Array:
    """(H, W) bool.

    Raises:
        Unreadable: there are more values than 0 and one other.
    """
    if pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    values = np.unique(pixels)
    if (values != 0).sum() > 1:
        raise Unreadable(
            f"has {len(values)} values: a binary mask has 0 and one other (save it as PNG, one "
            "object a file)"
        )
    return pixels != 0
