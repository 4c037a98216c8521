"""The files that ``predict`` writes: drawings, COCO results, a table of objects, and cutouts.

Each appears under its name when it is complete.
"""

import csv
import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path, PurePath
from typing import IO, Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.evaluation.coco_json import encoded_masks, instances_to_coco_json
from mask_rcnn_plus.evaluation.drawing import FONT_SCALE, DrawnObjects, Style, draw_styled
from mask_rcnn_plus.ops.run_lengths import crop, window_of
from mask_rcnn_plus.prediction.images import BGR
from mask_rcnn_tools.files import complete_file
from mask_rcnn_tools.predict.frames import Frame
from mask_rcnn_tools.predict.layout import (
    CUTOUTS,
    IMAGES,
    RESULTS,
    TABLE,
    drawing_path,
    fitting,
)
from mask_rcnn_tools.predict.sources import Skip, Source
from mask_rcnn_tools.predict.video import video_file

_COLUMNS = (
    *("image", "frame", "object", "class", "score", "x0", "y0", "x1", "y1"),
    *("area", "centroid_x", "centroid_y"),
)
_JPEG_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]
# With more objects than this, boxes and labels would hide the image.
_CROWDED = 30
# Up to this side (the root of width times height) in pixels, text has its smallest size.
_SMALL_SIDE = 800
# Images are drawn enlarged, by the largest whole number that leaves their longer side at most this.
_ENLARGED_SIDE = 480


class Output(ABC):
    """Writes frames with their objects to a folder, one after the other.

    Args:
        folder: where to write.
        class_names: in the order of class ids.
        files: completes the files when it is closed; an error removes them.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], files: ExitStack) -> None:
        self._folder, self._class_names, self._files = folder, class_names, files

    @abstractmethod
    def add(self, frame: Frame, instances: Instances) -> None:
        """Writes the objects of the next frame."""

    def _open(self, name: str) -> IO[str]:
        """A text file that stays open until the end."""
        part = self._files.enter_context(complete_file(self._folder / name))
        # Names of files may contain bytes that are not text.
        return self._files.enter_context(
            part.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        )


def class_label(class_names: Sequence[str], index: int) -> str:
    """The name of a class, or "class 3" if the names do not contain it."""
    return class_names[index] if index < len(class_names) else f"class {index}"


def plain(name: str) -> str:
    """A class name as it is compared: accents in one form, no spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


class Drawings(Output):
    """Draws the objects into each image, and into each video with its frame rate and size.

    Args:
        show: whether to draw "masks", "boxes", "labels" and "scores"; None draws masks and scores,
            and boxes and labels of up to 30 objects.
        log: prints a line for the user.
        skip: called with the reason if a video cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        files: ExitStack,
        show: dict[str, bool | None],
        log: Callable[[str], None],
        skip: Skip,
    ) -> None:
        super().__init__(folder, class_names, files.enter_context(ExitStack()))
        self._show, self._log, self._skip = show, log, skip
        self._source: Source | None = None  # of the video that is being written
        self._add_to_video: Callable[[BGR], None] | None = None

    def add(self, frame: Frame, instances: Instances) -> None:
        path = drawing_path(frame.source, self._folder)
        try:
            drawing = self._draw(frame, instances)
        except (cv2.error, MemoryError) as error:
            self._skip(f"the objects in {frame.path} cannot be drawn: {reason(error)}", 1)
            drawing = frame.image
        if frame.index is None:
            write_image(path, drawing)
            return
        if frame.source is not self._source:
            self._files.close()  # the previous video is complete
            self._source, self._add_to_video = frame.source, None
            video = video_file(path, frame.rate, frame.image.shape[:2], self._log)
            try:
                self._add_to_video = self._files.enter_context(video)
            except UserError as error:
                self._skip(str(error), 1)
        if self._add_to_video is not None:
            self._add_to_video(drawing)

    def _draw(self, frame: Frame, instances: Instances) -> BGR:
        objects = DrawnObjects.from_instances(instances)
        crowded = len(objects) > _CROWDED
        height, width = frame.image.shape[:2]
        if frame.index is None:  # videos keep their size
            factor = max(1, _ENLARGED_SIDE // max(height, width))
            height, width = factor * height, factor * width
        # Lines and text grow with the image, but less than in proportion, because people look at
        # parts of large images too.
        growth = max(0.8, math.sqrt(height * width) / _SMALL_SIDE)
        default = {"masks": True, "boxes": not crowded, "labels": not crowded, "scores": True}
        chosen = {part: value for part, value in self._show.items() if value is not None}
        style = Style(
            **{**default, **chosen},
            line=max(1, round((1 if crowded else 2) * growth**0.6)),
            text=FONT_SCALE * growth**0.75,
            small=True,
            edged=True,
        )
        return draw_styled(frame.image, objects, self._class_names, style, (height, width))


class CocoResults(Output):
    """Writes COCO results, and the images and categories that they refer to, as they come.

    Args:
        category_ids: one per class.
        image_ids: path -> id; None numbers all frames from 1.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        files: ExitStack,
        category_ids: Sequence[int],
        image_ids: dict[str, int] | None,
    ) -> None:
        super().__init__(folder, class_names, files)
        self._category_ids, self._image_ids = category_ids, image_ids
        categories = json.dumps(
            [{"id": i, "name": name} for i, name in zip(category_ids, class_names, strict=True)]
        )
        end = f'], "annotations": [], "categories": {categories}}}'
        self._results = self._list(RESULTS, "[", "]")
        self._images = self._list(IMAGES, '{"images": [', end)
        self._count = 0

    def add(self, frame: Frame, instances: Instances) -> None:
        self._count += 1
        image_id = self._count if self._image_ids is None else self._image_ids[frame.path]
        height, width = frame.image.shape[:2]
        image = {"id": image_id, "file_name": frame.path, "height": height, "width": width}
        self._images(image)
        for result in instances_to_coco_json(instances, image_id):
            category_id = self._category_ids[result["category_id"]]
            self._results({**result, "category_id": category_id})

    def _list(self, name: str, begin: str, end: str) -> Callable[[dict[str, Any]], None]:
        """A function that adds an entry to a list in a new file."""
        file = self._open(name)
        file.write(begin)
        self._files.callback(file.write, f"\n{end}\n")
        separators = chain(["\n"], repeat(",\n"))

        def add(entry: dict[str, Any]) -> None:
            file.write(next(separators) + json.dumps(entry))

        return add


def category_ids(cfg: CfgNode, class_names: Sequence[str]) -> list[int]:
    """The category ids of the first data set in the config that is registered with these classes.

    They are 1, 2, ... if no data set matches.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in MetadataCatalog.list():  # MetadataCatalog.get would register it
            metadata = MetadataCatalog.get(name)
            known = metadata.get("thing_dataset_id_to_contiguous_id") or {}
            if list(metadata.get("thing_classes") or []) == list(class_names) and known:
                return [number for number, _ in sorted(known.items(), key=lambda item: item[1])]
    return list(range(1, len(class_names) + 1))


def read_ids(
    path: Path, class_names: Sequence[str], sources: Sequence[Source]
) -> tuple[list[int], dict[str, int]]:
    """Reads category and image ids from a COCO json, such as the ground truth of an evaluation.

    Args:
        path: the json.
        class_names: the model's classes; each must be the name of a category.
        sources: images; each path must end with exactly one file_name.

    Returns:
        category ids in the order of the classes, and path -> image id.

    Raises:
        UserError: the file is not a COCO json, or a class or image is not in it.
    """
    try:
        content = json.loads(path.read_bytes())  # UTF-8 or UTF-16, with or without a BOM
        categories = {
            plain(str(entry["name"])): int(entry["id"]) for entry in content["categories"]
        }
        images = {_posix(str(entry["file_name"])): int(entry["id"]) for entry in content["images"]}
    except OSError as error:
        raise UserError(f"--like {path}: {reason(error)}") from error
    except KeyError as error:
        raise UserError(f"--like {path} is not a COCO json: {error} is missing") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"--like {path} is not a COCO json: {reason(error, 100)}") from error
    for name in class_names:
        if plain(name) not in categories:
            raise UserError(f"--like {path} has no category '{name}', which the model predicts")
    file_names = defaultdict(list)
    for file_name in images:
        file_names[PurePath(file_name).name].append(file_name)
    image_ids = {}
    for source in sources:
        absolute = "/" + _posix(str(Path(source.path).absolute())).lstrip("/")
        candidates = file_names[PurePath(absolute).name]
        matches = [name for name in candidates if absolute.endswith("/" + name.lstrip("/"))]
        if source.kind != "image" or len(matches) != 1:
            where = "in it more than once" if matches else "not in it"
            raise UserError(f"--like {path}: {source.path} is {where}")
        image_ids[source.path] = images[matches[0]]
    return [categories[plain(name)] for name in class_names], image_ids


def _posix(path: str) -> str:
    """A path as it is compared: with slashes, and accents in one form."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


class ObjectTable(Output):
    """Writes a CSV file with one line per object."""

    def __init__(self, folder: Path, class_names: Sequence[str], files: ExitStack) -> None:
        super().__init__(folder, class_names, files)
        self._rows = csv.writer(self._open(TABLE))
        self._rows.writerow(_COLUMNS)

    def add(self, frame: Frame, instances: Instances) -> None:
        rles = encoded_masks(instances.pred_masks) if instances.has("pred_masks") else None
        index = "" if frame.index is None else frame.index
        for i in range(len(instances)):
            box = instances.pred_boxes.tensor[i].tolist()
            area, centroid = _measure_box(box) if rles is None else _measure_mask(rles[i])
            label = class_label(self._class_names, int(instances.pred_classes[i]))
            row = [frame.source.path, index, i + 1, label, f"{float(instances.scores[i]):.4f}"]
            row += [*(f"{v:.2f}" for v in box), area, *(f"{v:.2f}" for v in centroid)]
            self._rows.writerow(row)


def _measure_box(box: Sequence[float]) -> tuple[str, Sequence[float]]:
    """Area and center."""
    x0, y0, x1, y1 = box
    return f"{(x1 - x0) * (y1 - y0):.2f}", ((x0 + x1) / 2, (y0 + y1) / 2)


def _measure_mask(rle: dict[str, Any]) -> tuple[int, Sequence[float]]:
    """The number of pixels, and the mean of their centers; () for an empty mask."""
    x0, y0, x1, y1 = window_of(rle)
    rows, columns = np.nonzero(crop(rle, (x0, y0, x1, y1)))
    if len(rows) == 0:
        return 0, ()
    return len(rows), (x0 + columns.mean() + 0.5, y0 + rows.mean() + 0.5)


class Cutouts(Output):
    """Writes a PNG per object, cropped to its mask and transparent around it."""

    def add(self, frame: Frame, instances: Instances) -> None:
        index = "" if frame.index is None else f"_{frame.index:06}"
        for i, rle in enumerate(encoded_masks(instances.pred_masks)):
            x0, y0, x1, y1 = window_of(rle)
            if x1 == x0:
                continue
            alpha = crop(rle, (x0, y0, x1, y1)) * np.uint8(255)
            label = class_label(self._class_names, int(instances.pred_classes[i]))
            label = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", label))[:40]
            name = f"{frame.source.name}{index}_{i + 1:03}_{label}.png"
            image = np.dstack([frame.image[y0:y1, x0:x1], alpha])
            write_image(fitting(self._folder / CUTOUTS / name), image)


def write_image(path: Path, image: BGR) -> None:
    """Writes an image in the format of the path's suffix."""
    _, data = cv2.imencode(path.suffix, image, _JPEG_QUALITY if path.suffix != ".png" else [])
    with complete_file(path) as part:
        part.write_bytes(data)
