"""Reads folders of binary masks: one image file per object, with 0 outside the object.

There are three layouts; the folder CLASS may be left out:

- ``images/NAME.jpg`` and ``masks/NAME/[CLASS/]ANYTHING.png``
- ``images/NAME.jpg`` and ``masks/[CLASS/]NAME.png`` or ``masks/[CLASS/]NAME_ANYTHING.png``
- ``NAME/images/ANYTHING.png`` and ``NAME/masks/[CLASS/]ANYTHING.png``

The first two may also be in folders ``train``, ``val`` and ``test``, which are the splits then.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.folders import Stems, report_unread
from mask_rcnn_tools.convert.geometry import to_rle
from mask_rcnn_tools.convert.labels import (
    Array,
    LabelledObject,
    Labels,
    files_below,
    images_below,
    keep_splits,
    read_pixels,
    split_of,
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
    if _has_both(source):
        found = _two_folders(source, "", labels)
    elif any(map(_is_split, _folders(source))):
        found = {}
        for folder in filter(_has_both, _folders(source)):
            found |= _two_folders(folder, f"{folder.name}/", labels)
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
        image.split = split_of(*Path(name).parts[-2::-1])
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
    keep_splits(labels)
    for path in images_below(source):
        if not {"images", "masks"} & {*path.relative_to(source).parts}:
            labels.skip("images are in no folder images/ or masks/", path)
    report_unread(labels, files_below(source))
    return labels


def _folders(source: Path) -> list[Path]:
    """The folders in a folder, except hidden ones."""
    return sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))


def _has_both(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _is_split(folder: Path) -> bool:
    """Whether a folder is a split, ``train/images`` and ``train/masks``, not a single image."""
    is_split = bool(split_of(folder.name)) and _has_both(folder)
    return is_split and len(images_below(folder / "images")) > 1


def _folder_per_image(source: Path, labels: Labels) -> _Masks:
    """Layout ``NAME/images`` and ``NAME/masks``."""
    result: _Masks = {}
    for folder in _folders(source):
        if not (folder / "images").is_dir():
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


def _two_folders(source: Path, prefix: str, labels: Labels) -> _Masks:
    """Layout ``images`` and ``masks``; the prefix begins the new names of the images."""
    images, masks = source / "images", source / "masks"
    stems = Stems(images, images_below(images), labels)
    result: _Masks = {
        path: (prefix + path.relative_to(images).as_posix(), []) for path in stems.paths.values()
    }
    # The name of the folder comes first: masks/NAME/[CLASS/]ANYTHING.png.
    others: list[Path] = []
    by_folder = False
    for file in images_below(masks):
        folders = file.relative_to(masks).parent.parts
        for depth in range(len(folders), 0, -1):
            if stem := stems.find("/".join(folders[:depth])):
                label = folders[depth] if depth < len(folders) else ""
                result[stems.paths[stem]][1].append((file, label))
                by_folder = True
                break
        else:
            others.append(file)
    parts: dict[Path, int] = {}  # of the name of each mask, after the name of its image
    for file in others:
        folders = file.relative_to(masks).parent.parts
        if by_folder and folders:  # Do not take masks/NAME/1.png for masks/CLASS/1.png.
            labels.skip("masks are in a folder without an image of its name", file)
            continue
        stem, label, ending = _by_name(folders, file.stem, stems)
        if not stem:
            labels.skip("masks belong to no image in images/", file)
            continue
        result[stems.paths[stem]][1].append((file, label))
        parts[file] = sum(map(ending.count, _SEPARATORS))
    for file, count in parts.items():
        if count > min(parts.values()):
            what = "masks have longer names than others; check that their own image is not missing"
            labels.note(what, file)
    return result


def _by_name(folders: Sequence[str], name: str, stems: Stems) -> tuple[str, str, str]:
    """The longest image name with which a mask's name begins, its class, and the rest of its name.

    All are "" if no image fits. Folders of the mask are those of the image, after a folder CLASS.
    """
    for start in range(min(len(folders), 1) + 1):
        for end in range(len(name), 0, -1):
            if end == len(name) or name[end] in _SEPARATORS:
                stem = stems.find("/".join((*folders[start:], name[:end])))
                if stem:
                    return stem, folders[0] if start else "", name[end:]
    return "", "", ""


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
