"""What ``predict`` writes: pictures and videos, COCO results, a table of objects, cut-outs."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from detectron2.structures import Instances

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import encoded_masks, instances_to_coco_json
from mask_rcnn_plus.ops.run_lengths import crop, window_of
from mask_rcnn_plus.prediction.images import BGR
from mask_rcnn_tools.predict.inputs import Shot, Source
from mask_rcnn_tools.predict.video import VIDEO_SUFFIX, VideoFile

RESULTS, IMAGES, TABLE, CUTOUTS = "predictions.json", "images.json", "objects.csv", "cutouts"
_COLUMNS = (
    *("image", "frame", "object", "class", "score", "x0", "y0", "x1", "y1"),
    *("area", "centroid_x", "centroid_y"),
)
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 95]


class Sink(Protocol):
    """What takes one shot with its objects after the other."""

    def add(self, shot: Shot, instances: Instances) -> None: ...

    def close(self) -> None: ...


def drawn_path(source: Source, folder: Path) -> Path:
    """Where the drawing of a source goes: JPEG and PNG as they are, other images as PNG."""
    if source.kind != "image":
        return folder / f"{source.name}{VIDEO_SUFFIX}"
    ending = Path(source.path).suffix.lower()
    return folder / f"{source.name}{ending if ending in ('.jpg', '.jpeg', '.png') else '.png'}"


class Drawings:
    """A picture of each image, and a video of each video: its frames, rate and size.

    Args:
        folder: where they go.
        draw: from a picture and its objects to a drawing of its size.
        say: prints a line for the user.
    """

    def __init__(
        self, folder: Path, draw: Callable[[BGR, Instances], BGR], say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._draw = draw
        self._say = say
        self._video: VideoFile | None = None
        self._source: Source | None = None

    def add(self, shot: Shot, instances: Instances) -> None:
        drawing = self._draw(shot.image, instances)
        path = drawn_path(shot.source, self._folder)
        if shot.frame is None:
            write_image(path, drawing)
            return
        if self._video is None or shot.source is not self._source:
            self.close()
            height, width = drawing.shape[:2]
            self._video = VideoFile(path, shot.rate, (height, width), self._say)
            self._source = shot.source
        self._video.add(drawing)

    def close(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            video.close()


class CocoResults:
    """COCO's results, and the images and categories that they are about, written as they come.

    Args:
        folder: where the two files go.
        class_names: in the order of class ids.
        category_ids: of the classes, in their order.
        image_ids: of the images, by path; None numbers all shots from 1.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        image_ids: dict[str, int] | None,
    ) -> None:
        self._ids, self._image_ids = category_ids, image_ids
        self._categories = [
            {"id": number, "name": name}
            for number, name in zip(category_ids, class_names, strict=True)
        ]
        self._files = ExitStack()
        self._results = _JsonList(self._files.enter_context(_open(folder / RESULTS)), "[", "]")
        end = f'], "annotations": [], "categories": {json.dumps(self._categories)}}}'
        self._images = _JsonList(
            self._files.enter_context(_open(folder / IMAGES)), '{"images": [', end
        )
        self._count = 0

    def add(self, shot: Shot, instances: Instances) -> None:
        self._count += 1
        path, frame = shot.source.path, shot.frame
        number = self._count if self._image_ids is None else self._image_ids[path]
        height, width = shot.image.shape[:2]
        name = path if frame is None else f"{path}#{frame}"
        entry = {"id": number, "file_name": name, "height": height, "width": width}
        self._images.add(entry)
        for found in instances_to_coco_json(instances, number):
            self._results.add({**found, "category_id": self._ids[found["category_id"]]})

    def close(self) -> None:
        with self._files:  # closed on a full disk too
            self._results.close()
            self._images.close()


class _JsonList:
    def __init__(self, file: Any, begin: str, end: str) -> None:
        self._file, self._end, self._before = file, end, f"{begin}\n"

    def add(self, entry: dict[str, Any]) -> None:
        self._file.write(self._before + json.dumps(entry))
        self._before = ",\n"

    def close(self) -> None:
        self._file.write((self._before if self._before != ",\n" else "\n") + self._end + "\n")


class ObjectTable:
    """A line of CSV an object.

    Args:
        folder: where the file goes.
        label: from a class id to its name.
    """

    def __init__(self, folder: Path, label: Callable[[int], str]) -> None:
        self._file = _open(folder / TABLE)
        self._rows = csv.writer(self._file)
        self._rows.writerow(_COLUMNS)
        self._label = label

    def add(self, shot: Shot, instances: Instances) -> None:
        rles = encoded_masks(instances.pred_masks) if instances.has("pred_masks") else None
        frame = "" if shot.frame is None else shot.frame
        for i in range(len(instances)):
            box = instances.pred_boxes.tensor[i].tolist()
            area, centre = _measured(box) if rles is None else _measured_mask(rles[i])
            label, score = self._label(int(instances.pred_classes[i])), float(instances.scores[i])
            row = [shot.source.path, frame, i + 1, label, f"{score:.4f}"]
            row += [*(f"{value:.2f}" for value in box), area, *(f"{value:.2f}" for value in centre)]
            self._rows.writerow(row)

    def close(self) -> None:
        self._file.close()


def _measured(box: Sequence[float]) -> tuple[str, Sequence[float]]:
    x0, y0, x1, y1 = box
    return f"{(x1 - x0) * (y1 - y0):.2f}", ((x0 + x1) / 2, (y0 + y1) / 2)


def _measured_mask(rle: dict[str, Any]) -> tuple[int, Sequence[float]]:
    """Its pixels, and the mean of their centres; nothing where it is empty."""
    x0, y0, x1, y1 = window_of(rle)
    rows, columns = np.nonzero(crop(rle, (x0, y0, x1, y1)))
    if len(rows) == 0:
        return 0, ()
    return len(rows), (x0 + columns.mean() + 0.5, y0 + rows.mean() + 0.5)


class Cutouts:
    """A PNG an object, as large as its mask, transparent around it.

    Args:
        folder: where a folder of them goes.
        label: from a class id to its name.
    """

    def __init__(self, folder: Path, label: Callable[[int], str]) -> None:
        self._folder = folder / CUTOUTS
        self._label = label

    def add(self, shot: Shot, instances: Instances) -> None:
        if not instances.has("pred_masks"):
            raise UserError("--cutouts needs masks, and this model predicts none")
        frame = "" if shot.frame is None else f"_{shot.frame:06}"
        for i, rle in enumerate(encoded_masks(instances.pred_masks)):
            x0, y0, x1, y1 = window_of(rle)
            if x1 == x0:
                continue
            alpha = crop(rle, (x0, y0, x1, y1)) * np.uint8(255)
            label = re.sub(r"[^\w-]+", "_", self._label(int(instances.pred_classes[i])))[:40]
            path = self._folder / f"{shot.source.name}{frame}_{i + 1:03}_{label}.png"
            write_image(path, np.dstack([shot.image[y0:y1, x0:x1], alpha]))

    def close(self) -> None:
        pass


def write_image(path: Path, image: BGR) -> None:
    """Writes a picture, by the ending of its path.

    Raises:
        UserError: the disk or the folder refuses it.
    """
    _, data = cv2.imencode(path.suffix, image, _QUALITY if path.suffix != ".png" else [])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _open(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
