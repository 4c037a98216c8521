"""Reads folders of binary masks: one image file per object, with 0 outside the object.

There are three layouts; the folder CLASS may be left out:

- ``images/NAME.jpg`` and ``masks/NAME/[CLASS/]ANYTHING.png``
- ``images/NAME.jpg`` and ``masks/[CLASS/]NAME.png`` or ``masks/[CLASS/]NAME_ANYTHING.png``
- ``NAME/images/ANYTHING.png`` and ``NAME/masks/[CLASS/]ANYTHING.png``
"""

from pathlib import Path

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.geometry import to_rle
from mask_rcnn_tools.convert.labels import (
    Array,
    LabelledObject,
    Labels,
    images_below,
    read_pixels,
    upright,
)
from mask_rcnn_tools.progress import progress_bar

_SEPARATORS = ("_", "-", ".")

# Each image -> its new name, and (file, class or "") of each mask.
_Masks = dict[Path, tuple[str, list[tuple[Path, str]]]]


def read(source: Path, *, class_name: str = "object") -> Labels:
    """Reads a folder in one of the layouts. An image without masks is an image without objects.

    Args:
        source: the folder.
        class_name: the class of masks that are not in a folder CLASS.

    Raises:
        UserError: the folder fits no layout.
    """
    labels = Labels()
    if (source / "images").is_dir() and (source / "masks").is_dir():
        found = _two_folders(source / "images", source / "masks", labels)
    else:
        found = _folder_per_image(source, labels)
    if not found:
        raise UserError(
            f"'{source}' has no images in images/ (with masks/) or NAME/images/ (with "
            "NAME/masks/); see mask-rcnn-plus convert masks --help"
        )
    images = found.items()
    for path, (name, masks) in progress_bar("reading masks", "image", images):
        image = labels.open_image(path, name)
        if image is None:
            continue
        if not masks:
            labels.note("images have no masks, so they have no objects", path)
        for file, label in masks:
            try:
                mask = upright(_binary(read_pixels(file)), image)
            except UnreadableFile as error:
                labels.skip("masks cannot be read", f"{file} {error}")
                continue
            if mask.any():
                image.objects.append(LabelledObject(label or class_name, rle=to_rle(mask)))
            else:
                labels.skip("masks are empty", file)
        labels.images.append(image)
    return labels


def _folder_per_image(source: Path, labels: Labels) -> _Masks:
    """Layout ``NAME/images`` and ``NAME/masks``."""
    result: _Masks = {}
    for folder in sorted(source.iterdir()):
        if folder.name.startswith(".") or not (folder / "images").is_dir():
            continue
        images = images_below(folder / "images")
        if len(images) != 1:
            labels.skip("folders do not have exactly one image", folder / "images")
            continue
        masks = folder / "masks"
        files = images_below(masks) if masks.is_dir() else []
        folders = [file.relative_to(masks).parts[:-1] for file in files]
        classes = [parts[0] if parts else "" for parts in folders]
        name = folder.name + images[0].suffix
        result[images[0]] = (name, list(zip(files, classes, strict=True)))
    return result


def _two_folders(images: Path, masks: Path, labels: Labels) -> _Masks:
    """Layout ``images`` and ``masks``."""
    by_stem = {
        path.relative_to(images).with_suffix("").as_posix(): path for path in images_below(images)
    }
    result: _Masks = {path: (path.relative_to(images).as_posix(), []) for path in by_stem.values()}
    for file in images_below(masks):
        folders = file.relative_to(masks).parent.parts
        # The name of the folder comes first: masks/NAME/ANYTHING.png.
        for depth in range(len(folders), 0, -1):
            if (stem := "/".join(folders[:depth])) in by_stem:
                label = folders[depth] if depth < len(folders) else ""
                break
        else:
            label = folders[0] if folders else ""
            stem = _longest_prefix(file.stem, by_stem)
        if stem:
            result[by_stem[stem]][1].append((file, label))
        else:
            labels.skip("masks belong to no image in images/", file)
    return result


def _longest_prefix(stem: str, by_stem: dict[str, Path]) -> str:
    """The longest image name with which the name of a mask begins, or ""."""
    for end in range(len(stem), 0, -1):
        if stem[:end] in by_stem and (end == len(stem) or stem[end] in _SEPARATORS):
            return stem[:end]
    return ""


def _binary(pixels: Array) -> Array:
    """(H, W) bool.

    Raises:
        UnreadableFile: the pixels have more values than 0 and one other.
    """
    if pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    values = np.unique(pixels)
    if (values != 0).sum() > 1:
        raise UnreadableFile(
            f"has {len(values)} values, but a binary mask has only 0 and one other value; save one "
            "PNG per object"
        )
    return pixels != 0
