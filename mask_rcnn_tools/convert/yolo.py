"""Reads YOLO's segmentation labels: a text file for each image, one object per line.

A line is ``CLASS x0 y0 x1 y1 ...``: the index of the class, and a polygon in fractions of the width
and height of the upright image. ``data.yaml`` has the ``names`` of the classes and the folders of
the images: ``path``, ``train``, ``val``, ``test``. If it names no folders, folders with these names
inside or next to ``images`` are the splits. The path of a label file is that of its image, with
``labels`` instead of the last ``images``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mask_rcnn_plus.data.file_names import ImageFiles
from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.folders import Stems, report_unread
from mask_rcnn_tools.convert.labels import (
    LabelledObject,
    Labels,
    files_below,
    images_below,
    keep_splits,
    read_text,
    split_of,
)
from mask_rcnn_tools.progress import progress_bar

_KEYS = ("train", "val", "test")  # of the image folders in the yaml
_OTHER_FILES = (".txt", ".yaml", ".yml", ".cache")  # of a data set in YOLO's layout
_MAX_FRACTION = 1.5  # larger numbers are pixels or another format


def read(source: Path, *, classes: Sequence[str] | None = None) -> Labels:
    """Reads a folder in YOLO's layout.

    An image without a label file, or with an empty one, is an image without objects. A line with a
    box (four numbers) has no mask and is skipped.

    Args:
        source: the folder of ``data.yaml`` and the images, or the yaml file.
        classes: names of the classes 0, 1, ...; by default those in the yaml.

    Raises:
        UserError: there are no names, no images, or only boxes.
    """
    folder, config = _read_yaml(source)
    names = list(classes) if classes else _class_names(config.get("names"), source)
    labels = Labels(classes=names)
    images = _find_images(folder, config, labels)
    texts = Stems(folder, files_below(folder, ".txt"), labels)
    used: set[str | None] = set()
    boxes = polygons = 0
    for path, splits in progress_bar("reading YOLO", "image", images.items()):
        stem, name = _label_and_name(path.relative_to(folder))
        found = texts.find(stem)
        used.add(found)
        image = labels.open_image(path, name)
        if image is None:
            continue
        image.split, *image.more_splits = splits
        try:
            label_file = texts.paths[found] if found else None
            text = read_text(label_file) if label_file else ""
        except UnreadableFile as error:
            labels.skip("images have unreadable labels", f"{label_file} {error}")
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{label_file}:{number}"
            values = _parse_line(line)
            if values is None:
                labels.skip("lines are not a class index and pairs of fractions", where)
            elif not 0 <= values[0] < len(names):
                labels.skip("lines have a class without a name", f"{where} (class {values[0]:g})")
            elif len(values) == 5:
                boxes += 1
                labels.skip("lines are boxes without a mask", where)
            else:
                polygons += 1
                scale = (image.width, image.height)
                corners = [value * scale[place % 2] for place, value in enumerate(values[1:])]
                image.objects.append(LabelledObject(names[int(values[0])], [corners]))
        labels.images.append(image)
    for path in sorted(set(images_below(folder)) - images.keys()):
        labels.note("images are in no split of data.yaml and are left out", path)
        used.add(_label_and_name(path.relative_to(folder))[0])
    for stem, path in texts.paths.items():
        if stem not in used and _is_label_file(path):
            labels.skip("label files have no image", path)
    others = (path for path in files_below(folder) if path.suffix.lower() not in _OTHER_FILES)
    report_unread(labels, others)
    if not _split_keys(config):
        keep_splits(labels)
    if boxes and not polygons:
        raise UserError(
            f"all {boxes} lines in '{source}' are boxes; YOLO's detection labels have no masks, "
            "only segmentation labels can be converted"
        )
    return labels


def _read_yaml(source: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the data set, and the content of its yaml, or {} without one."""
    if source.is_dir():
        names = ("data.yaml", "data.yml", "dataset.yaml")
        path = next((source / name for name in names if (source / name).is_file()), None)
        if path is None:
            return source, {}
        source = path
    try:
        # Only text: "no" and "010" may be the names of classes.
        content = yaml.load(read_text(source), _TextLoader)
    except UnreadableFile as error:
        raise UserError(f"'{source}' {error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{source}' is not valid YAML: {reason(error, 160)}") from error
    if not isinstance(content, dict):
        raise UserError(f"'{source}' has no 'names' and 'train'")
    return source.parent, content


class _TextLoader(yaml.SafeLoader):
    """Reads all plain values as text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def _class_names(names: Any, source: Path) -> list[str]:
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise UserError(
                f"'{source}': the 'names' in data.yaml must be numbered 0 to {len(names) - 1}, "
                f"without gaps; they are {', '.join(map(str, names))}"[:400]
            )
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not names:
        raise UserError(
            f"'{source}' has no data.yaml with the 'names' of the classes 0, 1, ...; give "
            "--classes NAME ... in this order"
        )
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"'{source}': the class {index} in 'names' has no name")
    return names


def _find_images(folder: Path, config: dict[str, Any], labels: Labels) -> dict[Path, list[str]]:
    """Each image and its splits; [""] without splits."""
    splits: dict[Path, list[str]] = {}
    files = ImageFiles(folder)
    for split in _split_keys(config):
        entries = config[split] if isinstance(config[split], list) else [config[split]]
        for entry in entries:
            if not isinstance(entry, str):
                raise UserError(f"data.yaml: '{split}' must be a path or a list of paths")
            path = _path_of_entry(folder, config.get("path"), entry)
            if path is None:
                labels.skip("image folders in data.yaml are missing", f"{split}: {entry}")
                continue
            for image in _images_at(path, folder, files, labels):
                if split not in splits.setdefault(image, []):
                    splits[image].append(split)
    labels.note_names(files)
    if not _split_keys(config):
        splits = {path: [_split_of(path.relative_to(folder))] for path in images_below(folder)}
    if not splits:
        raise UserError(f"there are no images in '{folder}'")
    return dict(sorted(splits.items()))


def _split_keys(config: dict[str, Any]) -> list[str]:
    """The splits that the yaml names."""
    return [key for key in _KEYS if config.get(key, "") not in ("", "~", "null", [])]


def _label_and_name(path: Path) -> tuple[str, str]:
    """For an image in the folder: its label file without ".txt", and its name without "images"."""
    parts = list(path.parts)
    label = path.with_suffix("")
    if "images" in parts[:-1]:
        last = _last_images(parts[:-1])
        label = Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix("")
        del parts[last]
    return label.as_posix(), "/".join(parts)


def _is_label_file(path: Path) -> bool:
    """Whether the first line of a text file is a label."""
    try:
        return _parse_line(read_text(path).strip().partition("\n")[0]) is not None
    except UnreadableFile:
        return False


def _last_images(parts: Sequence[str]) -> int:
    """Index of the last part that is "images"."""
    return len(parts) - 1 - parts[::-1].index("images")


def _split_of(path: Path) -> str:
    """The split by the folder inside or around ``images``: ``images/train``, ``train/images``."""
    folders = path.parent.parts
    if "images" not in folders:
        return ""
    last = _last_images(folders)
    candidates = (*folders[last + 1 : last + 2], *folders[max(0, last - 1) : last])
    return split_of(*candidates)


def _path_of_entry(folder: Path, top: Any, entry: str) -> Path | None:
    """The folder or list of images that an entry in the yaml names, only inside the yaml's folder.

    The paths in a yaml are often those of another machine, and Roboflow writes one ``../`` too
    many. So this looks for the longest end of the path that exists in the folder.
    """
    root = folder.resolve()
    parts = [part for part in Path(entry.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    bases = [folder / top.replace("\\", "/")] if isinstance(top, str) else []
    for base in (*bases, folder):
        for start in range(len(parts)):
            path = base.joinpath(*parts[start:])
            try:
                is_inside = path.resolve().is_relative_to(root)
                if is_inside and (path.is_dir() or (path.suffix == ".txt" and path.is_file())):
                    return path
            except (OSError, ValueError):  # too long, a NUL
                continue
    return None


def _images_at(path: Path, folder: Path, files: ImageFiles, labels: Labels) -> list[Path]:
    """The images in a folder or in a list, in the folder of the yaml."""
    if path.is_dir():
        if not (images := images_below(path)):
            labels.skip("image folders in data.yaml have no images", path)
        return images
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except UnreadableFile as error:
        labels.skip("lists of images cannot be read", f"{path} {error}")
        return []
    remedy = "put them into SOURCE"
    listed = (labels.find_file(files, name, path, path.parent, remedy) for name in names)
    return [folder / files.name_of(image) for image in listed if image]


def _parse_line(line: str) -> list[float] | None:
    """A class index and the fractions; None if the line is invalid."""
    try:
        values = [float(value) for value in line.split()]
    except ValueError:
        return None
    is_valid = (
        len(values) >= 5
        and len(values) % 2 == 1
        and all(map(math.isfinite, values))
        and values[0].is_integer()
        and 1 - _MAX_FRACTION <= min(values[1:]) <= max(values[1:]) <= _MAX_FRACTION
    )
    return values if is_valid else None
