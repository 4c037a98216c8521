"""The generated data set: images of circles, squares and triangles with a COCO json."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock
from tqdm import tqdm

from mask_rcnn_plus.data.drawing import KEYPOINTS, SHAPE_KINDS, Drawn, draw_image
from mask_rcnn_plus.data.outlines import mask_to_polygons
from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val")
_MASK_FORMATS = ("polygon", "rle")
_MIN_SIDE = 32
_GENERATOR = "mask_rcnn_plus.data.shapes"
# Increase it with every change to what is drawn or written, so that old folders are replaced.
_VERSION = 1
# The json starts with its info, so that the rest need not be read.
_HEAD = '{"info":'
_IMAGE_NAME = re.compile(rf"({'|'.join(_SPLITS)})_\d{{6,}}\.png")
# The sides of the square, then of the triangle; COCO counts keypoints from 1.
_SKELETON = [
    [1 + KEYPOINTS.index(name) for name in link.split()]
    for link in (
        *("top_left top_right", "top_right bottom_right"),
        *("bottom_right bottom_left", "bottom_left top_left"),
        *("top bottom_right", "top bottom_left"),
    )
]


def generate_shapes(
    root: Path,
    *,
    name: str = "shapes",
    num_train: int = 400,
    num_val: int = 100,
    image_size: tuple[int, int] = (192, 192),
    mask_format: str = "polygon",
    seed: int = 0,
    frequencies: Sequence[float] = (1, 1, 1),
    progress: bool = True,
) -> list[str]:
    """Writes ``root/name/{train,val}.json`` and ``root/name/images/*.png``, unless they exist.

    Image i of a split depends only on the seed, the split, i, the image size and the frequencies.
    A generated folder with other arguments is replaced: the new one is written beside it and
    renamed when complete. If several processes start at once, the first one writes and the others
    wait.

    All categories have the same keypoints (``drawing.KEYPOINTS``), as COCO's evaluation requires; a
    point that a category lacks has v = 0. Boxes are tight around the visible mask, and areas count
    its pixels. Polygons follow pixel edges and rasterise to exactly the same mask.

    Args:
        root: the folder of the data sets, created if missing.
        name: the folder below it; the data sets are NAME_train and NAME_val.
        num_train, num_val: images per split, at least 1.
        image_size: (H, W) in pixels, each at least 32.
        mask_format: "polygon" or "rle" (COCO's compressed run lengths).
        seed: 0 or more.
        frequencies: relative frequencies of circles, squares and triangles, each above 0.
            (1, 1, 0.1) draws about ten circles and ten squares per triangle.
        progress: shows a progress bar if standard error is a terminal.

    Returns:
        the names of the two data sets, for ``register_folder_datasets``.

    Raises:
        UserError: an argument is invalid, the folder cannot be written, or a folder of that name
            contains other files.
    """
    shares = _shares(frequencies)
    sides = image_size if isinstance(image_size, Sequence) else ()
    for argument, value, valid, expected in (
        ("name", name, re.fullmatch(r"[A-Za-z0-9][\w.-]*", name), "letters, digits, _ and -"),
        ("num_train", num_train, _is_integer(num_train, 1), "an integer from 1 up"),
        ("num_val", num_val, _is_integer(num_val, 1), "an integer from 1 up"),
        (
            "image_size",
            image_size,
            len(sides) == 2 and all(_is_integer(side, _MIN_SIDE) for side in sides),
            f"(height, width), each an integer from {_MIN_SIDE} up",
        ),
        ("mask_format", mask_format, mask_format in _MASK_FORMATS, "'polygon' or 'rle'"),
        ("seed", seed, _is_integer(seed, 0), "an integer from 0 up"),
        ("frequencies", frequencies, shares, f"a number above 0 for each of {SHAPE_KINDS}"),
    ):
        if not valid:
            raise UserError(f"generate_shapes: {argument} is {value!r}, expected {expected}")
    target = Path(root, name).resolve()
    counts = {"train": num_train, "val": num_val}
    info = {
        "description": "Circles, squares and triangles drawn by mask_rcnn_plus",
        "generator": _GENERATOR,
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": list(image_size),
        "mask_format": mask_format,
        "seed": seed,
    }
    if len(set(shares)) > 1:  # folders with equal shares are older than this argument
        info["frequencies"] = shares
    try:
        if not _is_current(target, info):
            target.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(str(target.with_name(f".{target.name}"))):
                if not _is_current(target, info):  # another process may have been faster
                    _replace(target, info, counts, progress)
    except OSError as error:
        raise UserError(
            f"cannot write the generated data set '{target}': {reason(error)}; "
            "set DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return [f"{name}_{split}" for split in _SPLITS]


def _shares(frequencies: Sequence[float]) -> list[float]:
    """The frequencies, scaled to a sum of 1; empty if they are invalid."""
    try:
        given = [float(value) for value in frequencies]
    except (TypeError, ValueError):
        return []
    if len(given) != len(SHAPE_KINDS) or not all(0 < value < math.inf for value in given):
        return []
    if len(set(given)) == 1:
        return [1.0] * len(given)  # the sum of thirds would round
    return [value / sum(given) for value in given]


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_current(target: Path, info: dict[str, Any]) -> bool:
    """Whether the folder contains exactly what would be written; False if it may be replaced."""
    if not os.path.lexists(target):
        return False
    refusal = f"'{target}' was not written by the shapes generator, which will not replace it"
    advice = "move it away or choose another name (DATASETS.SHAPES.NAME)"
    if not target.is_dir():
        raise UserError(f"{refusal}: it is not a folder; {advice}")
    files = _names(target)
    if not files:
        return False
    jsons = {f"{split}.json" for split in _SPLITS}
    infos = [_read_info(target / file) for file in sorted(files & jsons)]
    foreign = files - jsons - {"images"}
    if not foreign and infos and all(i.get("generator") == _GENERATOR for i in infos):
        images = _names(target / "images")
        foreign = {file for file in images if not _IMAGE_NAME.fullmatch(file)}
        if not foreign:
            complete = len(images) == info["num_train"] + info["num_val"]
            return complete and infos == [info] * len(_SPLITS)
    cause = f"it contains '{min(foreign)}'" if foreign else "its json files are not the generator's"
    raise UserError(f"{refusal}: {cause}; {advice}")


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".DS_Store"} if folder.is_dir() else set()


def _read_info(path: Path) -> dict[str, Any]:
    """The info of a generated json; empty for any other file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    try:
        info = json.JSONDecoder().raw_decode(head, len(_HEAD))[0]
    except ValueError:
        return {}
    return info if head.startswith(_HEAD) and isinstance(info, dict) else {}


def _replace(target: Path, info: dict[str, Any], counts: dict[str, int], progress: bool) -> None:
    """Draws into a hidden sibling folder, then renames it. The caller holds the lock."""
    work, aside = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    # An interrupted process may have left them. Nobody else writes here while we hold the lock.
    for leftover in (work, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        (work / "images").mkdir(parents=True)
        total, desc = sum(counts.values()), f"drawing {target.name}"
        disable = None if progress else True  # None: show it on a terminal only
        with tqdm(total=total, desc=desc, unit="image", disable=disable) as bar:
            for split, count in counts.items():
                _write_split(work, info, split, count, bar)
        if target.exists():
            target.rename(aside)
        work.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        for leftover in (work, aside):
            shutil.rmtree(leftover, ignore_errors=True)
    logger.info(f"drew {total} images into '{target}'")


def _write_split(folder: Path, info: dict[str, Any], split: str, count: int, bar: tqdm) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    height, width = info["image_size"]
    for index in range(count):
        chance = np.random.SeedSequence(info["seed"], spawn_key=(_SPLITS.index(split), index))
        rng = np.random.Generator(np.random.PCG64(chance))
        image, objects = draw_image(rng, (height, width), info.get("frequencies", (1, 1, 1)))
        file_name = f"{split}_{index:06d}.png"
        # imwrite would not say why a file cannot be written.
        encoded = cv2.imencode(".png", image[:, :, ::-1])[1]
        (folder / "images" / file_name).write_bytes(encoded.tobytes())
        image_id = index + 1
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for drawn in objects:
            identity = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**identity, **_annotation(drawn, info["mask_format"])})
        bar.update()
    categories = [
        {"id": number, "name": kind, "keypoints": list(KEYPOINTS), "skeleton": _SKELETON}
        for number, kind in enumerate(SHAPE_KINDS, start=1)
    ]
    lists = {"images": images, "annotations": annotations, "categories": categories}
    text = json.dumps({"info": info, **lists}, separators=(",", ":"))
    (folder / f"{split}.json").write_text(text, encoding="utf-8")


def _annotation(drawn: Drawn, mask_format: str) -> dict[str, Any]:
    """The object as a COCO annotation. All coordinates are float, see ``mask_to_polygons``."""
    rows, columns = np.nonzero(drawn.mask)
    left, top = int(columns.min()), int(rows.min())
    width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
    segmentation: Any
    if mask_format == "polygon":
        segmentation = mask_to_polygons(drawn.mask)
    else:
        segmentation = mask_util.encode(np.asfortranarray(drawn.mask, dtype=np.uint8))
        segmentation["counts"] = segmentation["counts"].decode("ascii")
    keypoints: list[float] = []
    for x, y, visibility in drawn.keypoints.tolist():
        # COCO measures keypoints from the first pixel's centre, everything else from its corner.
        place = [round(x - 0.5, 2), round(y - 0.5, 2)] if visibility else [0.0, 0.0]
        keypoints += [*place, int(visibility)]
    return {
        "category_id": 1 + SHAPE_KINDS.index(drawn.kind),
        "segmentation": segmentation,
        "bbox": [float(value) for value in (left, top, width, height)],
        "area": float(len(rows)),
        "iscrowd": 0,
        "keypoints": keypoints,
        "num_keypoints": int((drawn.keypoints[:, 2] > 0).sum()),
    }
