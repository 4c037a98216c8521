"""Writes labels as a data set folder: the images, and a COCO json for each split."""

import filecmp
import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_tools.check.images import UnreadableFile
from mask_rcnn_tools.convert.classes import clean_classes
from mask_rcnn_tools.convert.geometry import InvalidShape, to_annotation
from mask_rcnn_tools.convert.labels import LabelledImage, Labels
from mask_rcnn_tools.files import write_atomically
from mask_rcnn_tools.progress import progress_bar


@dataclass(frozen=True)
class Plan:
    """How to write a data set.

    Attributes:
        output: the folder of the data set.
        origin: the name of the label format, for the description in the json.
        classes: names of the classes in the order of their ids from 1; objects of other classes are
            left out. None uses all classes, in the source's order or sorted.
        val: the fraction of the images for val.json, 0 to 1; None uses the splits of the source, or
            0.2 if it has no splits.
        split: puts all images into this split instead.
        seed: the seed of the random split.
        link: makes hard links instead of copies.
        overwrite: replaces existing files.
    """

    output: Path
    origin: str
    classes: Sequence[str] | None = None
    val: float | None = None
    split: str | None = None
    seed: int = 0
    link: bool = False
    overwrite: bool = False


def write_coco(labels: Labels, plan: Plan) -> list[Path]:
    """Writes the images, and then the json of each split.

    Args:
        labels: the labels; objects that are left out are added to ``skipped`` and ``noted``.
        plan: where and how to write.

    Returns:
        the jsons; each has at least one image.

    Raises:
        UserError: there are no images or no objects, a file already exists, or writing fails.
    """
    clean_classes(labels, plan.classes)
    images = _unique_names(labels)
    if not images:
        raise UserError(_nothing("images", labels))
    categories = _categories(labels, plan.classes)
    annotations = _annotations(images, categories, labels, plan)
    if not any(annotations.values()):
        raise UserError(_nothing("objects", labels))
    splits = _split(images, {name for name in annotations if annotations[name]}, labels, plan)
    jsons = {split: plan.output / f"{split}.json" for split in splits}
    for split, path in jsons.items():
        if path.exists() and not plan.overwrite:
            raise UserError(
                f"'{path}' exists; name another --output, add a split with --split NAME, or give "
                "--overwrite"
            )
        if (plan.output / split).is_dir():
            raise UserError(
                f"the folder '{plan.output / split}' exists, so the images of {path.name} would be "
                "expected in it; name another --output"
            )
    try:
        for image in progress_bar("writing images", "image", images):
            _write_image(image, plan)
        for split, members in splits.items():
            content = _content(labels, members, annotations, categories, plan)
            # Only ASCII, because pycocotools reads the file with the encoding of the locale.
            write_atomically(jsons[split], json.dumps(content) + "\n")
    except (OSError, UnreadableFile) as error:
        raise UserError(f"cannot write into '{plan.output}': {reason(error)}") from error
    return list(jsons.values())


def _nothing(what: str, labels: Labels) -> str:
    causes = [*labels.skipped.items(), *labels.noted.items()]
    causes.sort(key=lambda cause: "--classes" not in cause[0])  # first, since the rest is cut off
    reasons = [f"{text} ({len(places)}, such as {places[0]})" for text, places in causes]
    return f"there are no {what} to convert" + (f": {'; '.join(reasons)[:600]}" if reasons else "")


def _unique_names(labels: Labels) -> list[LabelledImage]:
    """The images sorted by name, with names that differ on every file system."""
    taken: set[str] = set()
    images = sorted(labels.images, key=lambda image: (image.name, str(image.path)))
    for image in images:
        name = image.name.encode("utf-8", "replace").decode()  # surrogates become question marks
        if name != image.name:
            what = "images have a name that is not UTF-8 (or PYTHONUTF8=1 is not set): a new name"
        elif _folded(name) in taken:
            what = "images have the same name as another image and get a new name"
        else:
            what = ""
        if what:
            path = PurePosixPath(name.replace("?", "_"))
            digest = hashlib.sha256(str(image.path).encode("utf-8", "surrogateescape"))
            image.name = str(path.with_name(f"{path.stem}-{digest.hexdigest()[:8]}{path.suffix}"))
            labels.note(what, f"{image.path}: {image.name}")
        taken.add(_folded(image.name))
    return images


def _folded(name: str) -> str:
    """Equal for names that are the same file on some file systems."""
    return unicodedata.normalize("NFC", name).casefold()


def _categories(labels: Labels, classes: Sequence[str] | None) -> dict[str, int]:
    """The id of each class: that of the source's COCO json, or from 1."""
    used = {labelled.label for image in labels.images for labelled in image.objects}
    names = list(classes or labels.classes or sorted(used))
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the class '{repeated[0]}' is named twice; rename one, or give --classes")
    given = [None if classes else labels.categories.get(name, {}).get("id") for name in names]
    return dict(zip(names, _ids(given, 0), strict=True))


def _ids(given: Sequence[Any], lowest: int) -> list[int]:
    """The given ids if they are distinct whole numbers from ``lowest`` on, else 1, 2, ..."""
    if all(type(i) is int and lowest <= i < 2**53 for i in given) and len({*given}) == len(given):
        return list(given)
    return list(range(1, len(given) + 1))


def _split(
    images: Sequence[LabelledImage], with_objects: set[str], labels: Labels, plan: Plan
) -> dict[str, list[LabelledImage]]:
    """The images of each split.

    The split of an image depends only on its name and the seed, so that it stays the same when
    images are added. A random split gives train at least one object, and val too if there are two
    images with objects.

    Args:
        images: all images.
        with_objects: names of the images with objects, at least one.
        labels: gets a note if the source's own train split has no objects.
        plan: how to split.
    """
    if plan.split is not None:
        return {plan.split: list(images)}
    use_source = plan.val is None and any(image.split for image in images)
    fraction = 0.2 if plan.val is None else plan.val
    chosen = {image.name: image.split if use_source else "" for image in images}
    draws = {name: draw(name, plan.seed) for name in chosen}
    for name in chosen:
        chosen[name] = chosen[name] or ("val" if draws[name] < fraction else "train")
    if use_source and not any(chosen[name] == "train" for name in with_objects):
        labels.note(
            "splits of the source have no objects to train on; --val 0.2 makes new splits", "train"
        )
    elif use_source and "val" not in chosen.values():
        labels.note("splits of the source have no val; --val 0.2 makes new splits", "val")
    elif not use_source:
        kept = max(with_objects, key=lambda name: draws[name])
        chosen[kept] = "train"
        others = sorted(
            (name for name in chosen if name != kept),
            key=lambda name: (name not in with_objects, draws[name]),
        )
        needed = with_objects - {kept} or set(others)
        if fraction > 0 and needed and not any(chosen[name] == "val" for name in needed):
            chosen[others[0]] = "val"
    splits: dict[str, list[LabelledImage]] = {"train": [], "val": []}
    for image in images:
        for split in (chosen[image.name], *(image.more_splits if use_source else ())):
            splits.setdefault(split, []).append(image)
        if use_source and image.more_splits:
            what = (
                "images are in several splits of the source and stay so; --val 0.2 makes new splits"
            )
            labels.note(what, f"{image.name}: {', '.join([image.split, *image.more_splits])}")
        if use_source and not image.split:
            labels.note("images in no split of the source are split at random", image.name)
    return {split: members for split, members in splits.items() if members}


def draw(name: str, seed: int) -> float:
    """A pseudorandom number from 0 to 1 for an image name."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _annotations(
    images: Sequence[LabelledImage], categories: dict[str, int], labels: Labels, plan: Plan
) -> dict[str, list[dict[str, Any]]]:
    """The COCO annotations of each image by its name, still without id and image_id."""
    annotations: dict[str, list[dict[str, Any]]] = {image.name: [] for image in images}
    for image in progress_bar("measuring objects", "image", images):
        for labelled in image.objects:
            label, fields = labelled.label, labelled.fields
            if label not in categories:
                labels.note(f"objects of the class '{label}' are left out (--classes)", image.name)
                continue
            try:
                measured = (
                    {} if "bbox" in fields else to_annotation(labelled, image.height, image.width)
                )
            except InvalidShape as error:
                labels.skip("objects have no mask", f"{image.name}: {label} {error}")
                continue
            flags = {"flags": labelled.flags} if labelled.flags else {}
            annotations[image.name].append(
                {"category_id": categories[label], **measured, **flags, **fields}
            )
    return annotations


def _content(
    labels: Labels,
    images: Sequence[LabelledImage],
    annotations: dict[str, list[dict[str, Any]]],
    categories: dict[str, int],
    plan: Plan,
) -> dict[str, Any]:
    """The content of a split's json."""
    image_entries: list[dict[str, Any]] = []
    numbered: list[dict[str, Any]] = []
    for number, image in zip(_ids([image.id for image in images], 0), images, strict=True):
        size = {"height": image.height, "width": image.width}
        flags = {"flags": image.flags} if image.flags else {}
        image_entries.append({"id": number, "file_name": image.name, **size, **flags})
        for annotation in annotations[image.name]:
            numbered.append({"id": None, "image_id": number, **annotation})
    for annotation, number in zip(numbered, _ids([a["id"] for a in numbered], 1), strict=True):
        annotation["id"] = number
    return {
        "info": {"description": f"{plan.output.name}, converted from {plan.origin}"},
        "images": image_entries,
        "categories": [
            {**labels.categories.get(name, {}), "id": number, "name": name}
            for name, number in categories.items()
        ],
        "annotations": numbered,
    }


def _write_image(image: LabelledImage, plan: Plan) -> None:
    """Copies or links an image's file into the image folder, without changing its bytes."""
    target = plan.output / "images" / image.name
    if target.exists():
        if _is_same(image, target):
            return
        if not plan.overwrite:
            raise UserError(
                f"'{target}' exists and is a different image; name another --output, or give "
                "--overwrite"
            )
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if image.path is None:
        target.write_bytes(image.content() if image.content else b"")
    elif plan.link:
        try:
            os.link(image.path, target)
        except OSError as error:
            raise UserError(
                f"cannot link '{image.path}' to '{target}' ({reason(error)}); hard links need one "
                "file system, give --copy"
            ) from error
    else:
        shutil.copyfile(image.path, target)


def _is_same(image: LabelledImage, target: Path) -> bool:
    if image.path is None:
        return image.content is not None and target.read_bytes() == image.content()
    return target.samefile(image.path) or filecmp.cmp(image.path, target, shallow=False)
