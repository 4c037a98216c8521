"""Writes what a reader has found as a data set by folder: images/ and a json for each split."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.cache import write_whole
from mask_rcnn_tools.convert.files import Unreadable
from mask_rcnn_tools.convert.found import Found, Picture, with_bar
from mask_rcnn_tools.convert.geometry import Unfit, to_annotation


@dataclass(frozen=True)
class Plan:
    """How a data set is to be written.

    Attributes:
        output: its folder.
        origin: for the json's description: the format.
        classes: their names in the order of their ids from 1; objects of others are left out. None
            takes all, sorted.
        val: the part of the images for val.json, 0 to 1; None takes the source's own splits, or
            0.2 where it has none.
        split: instead, all images are of this one.
        seed: of the split.
        link: hard links instead of copies.
        overwrite: replaces files that differ.
        progress: shows bars.
    """

    output: Path
    origin: str
    classes: Sequence[str] | None = None
    val: float | None = None
    split: str | None = None
    seed: int = 0
    link: bool = False
    overwrite: bool = False
    progress: bool = True


def write_coco(found: Found, plan: Plan) -> list[Path]:
    """Writes the images, and then a json for each split.

    Args:
        found: the images; what is left out on the way is added to it.
        plan: where and how.

    Returns:
        the jsons, of which each has an image.

    Raises:
        UserError: there is no image or no object, a file is in the way, or writing fails.
    """
    pictures = _named(found)
    if not pictures:
        raise UserError(_nothing("image", found))
    categories = _categories(found, plan.classes)
    objects = _measured(pictures, categories, found, plan)
    if not any(objects.values()):
        raise UserError(_nothing("object", found))
    splits = _split(pictures, {name for name, things in objects.items() if things}, found, plan)
    jsons = {split: plan.output / f"{split}.json" for split in splits}
    for split, path in jsons.items():
        if path.exists() and not plan.overwrite:
            raise UserError(f"'{path}' exists; name another --output, or give --overwrite")
        if (plan.output / split).is_dir():
            raise UserError(
                f"'{plan.output / split}' is a folder: the images of {path.name} would be looked "
                "for in it; name another --output"
            )
    contents = {
        split: _content(members, objects, categories, plan) for split, members in splits.items()
    }
    try:
        for picture in with_bar(pictures, "writing images", progress=plan.progress):
            _place(picture, plan)
        for split, content in contents.items():
            write_whole(jsons[split], json.dumps(content, ensure_ascii=False) + "\n")
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write into '{plan.output}': {reason}") from error
    return list(jsons.values())


def _nothing(what: str, found: Found) -> str:
    reasons = [f"{text} ({len(where)}, as {where[0]})" for text, where in found.skipped.items()]
    return f"there is no {what} to convert" + (f": {'; '.join(reasons)[:600]}" if reasons else "")


def _named(found: Found) -> list[Picture]:
    """The images in the order of their names, no two of which are one on any file system."""
    taken: set[str] = set()
    pictures = sorted(found.pictures, key=lambda p: (p.name, str(p.path)))
    for picture in pictures:
        if picture.name.casefold() in taken:
            path = PurePosixPath(picture.name)
            digest = hashlib.sha256(str(picture.path).encode("utf-8", "surrogateescape"))
            new = str(path.with_name(f"{path.stem}-{digest.hexdigest()[:8]}{path.suffix}"))
            found.note(
                "images have the name of another and get a new one", f"{picture.path}: {new}"
            )
            picture.name = new
        taken.add(picture.name.casefold())
    return pictures


def _categories(found: Found, wanted: Sequence[str] | None) -> dict[str, int]:
    """The id of each class, from 1."""
    there = {thing.label for picture in found.pictures for thing in picture.things}
    names = list(wanted or found.classes or sorted(there))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the class '{twice[0]}' is named twice")
    return {name: number for number, name in enumerate(names, 1)}


def _split(
    pictures: Sequence[Picture], labelled: set[str], found: Found, plan: Plan
) -> dict[str, list[Picture]]:
    """The images of each split; of what is drawn here, train has objects.

    An image's place follows from its name and the seed alone, so that adding images moves none.

    Args:
        pictures: all of them.
        labelled: the names of those with objects, at least one.
        found: is told of a source's own split without objects to train on.
        plan: how to split.
    """
    if plan.split is not None:
        return {plan.split: list(pictures)}
    own = plan.val is None and any(picture.split for picture in pictures)
    val = 0.2 if plan.val is None else plan.val
    sides = {picture.name: picture.split if own else "" for picture in pictures}
    places = {name: place_of(name, plan.seed) for name in sides}
    for name in sides:
        sides[name] = sides[name] or ("val" if places[name] < val else "train")
    if own and not any(sides[name] == "train" for name in labelled):
        found.note("split of the source has no object to train on; --val 0.2 splits anew", "train")
    elif not own:
        # Of few images, all objects may fall on one side, and a set without objects is of no use.
        first_to_val = sorted(sides, key=lambda name: (name not in labelled, places[name]))
        keep = max(labelled, key=lambda name: places[name])
        first_to_val.remove(keep)
        sides[keep] = "train"
        wanted = labelled - {keep} or set(first_to_val)
        if val > 0 and wanted and not any(sides[name] == "val" for name in wanted):
            sides[first_to_val[0]] = "val"
    splits: dict[str, list[Picture]] = {"train": [], "val": []}
    for picture in pictures:
        splits.setdefault(sides[picture.name], []).append(picture)
    return {split: members for split, members in splits.items() if members}


def place_of(name: str, seed: int) -> float:
    """Where an image stands from 0 to 1, as good as at random."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _measured(
    pictures: Sequence[Picture], categories: dict[str, int], found: Found, plan: Plan
) -> dict[str, list[dict[str, Any]]]:
    """COCO's annotations of each image, by its name, without the numbers that splits give."""
    objects: dict[str, list[dict[str, Any]]] = {}
    for picture in with_bar(pictures, "measuring objects", progress=plan.progress):
        things = objects.setdefault(picture.name, [])
        for thing in picture.things:
            if thing.label not in categories:
                found.note(f"objects are of the class '{thing.label}': left out", picture.name)
                continue
            try:
                measured = to_annotation(thing, picture.height, picture.width)
            except Unfit as error:
                found.skip("objects have no mask", f"{picture.name}: {thing.label} {error}")
                continue
            flags = {"flags": thing.flags} if thing.flags else {}
            things.append({"category_id": categories[thing.label], **measured, **flags})
    return objects


def _content(
    pictures: Sequence[Picture],
    objects: dict[str, list[dict[str, Any]]],
    categories: dict[str, int],
    plan: Plan,
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        image: dict[str, Any] = {
            "id": number,
            "file_name": picture.name,
            "height": picture.height,
            "width": picture.width,
        }
        if picture.flags:
            image["flags"] = picture.flags
        images.append(image)
        for thing in objects[picture.name]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **thing})
    return {
        "info": {"description": f"{plan.output.name}, converted from {plan.origin}"},
        "images": images,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
        "annotations": annotations,
    }


def _place(picture: Picture, plan: Plan) -> None:
    """Puts an image's file where it belongs, with the bytes it has."""
    target = plan.output / "images" / picture.name
    if target.exists():
        if _is_same(picture, target):
            return
        if not plan.overwrite:
            raise UserError(
                f"'{target}' exists and is another image; name another --output, or give "
                "--overwrite"
            )
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if picture.path is None:
        target.write_bytes(picture.content() if picture.content else b"")
    elif plan.link:
        try:
            os.link(picture.path, target)
        except OSError as error:
            raise UserError(
                f"cannot link '{picture.path}' to '{target}' ({error.strerror or error}): links "
                "are within one file system; give --copy"
            ) from error
    else:
        shutil.copyfile(picture.path, target)


def _is_same(picture: Picture, target: Path) -> bool:
    if picture.path is None:
        return picture.content is not None and target.read_bytes() == picture.content()
    if target.samefile(picture.path):
        return True
    same_size = target.stat().st_size == picture.path.stat().st_size
    return same_size and target.read_bytes() == picture.path.read_bytes()
