"""Images of the report with objects and detections drawn on them, as WebP inside the page."""

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from mask_rcnn_plus.data.pixels import read_image
from mask_rcnn_plus.evaluation.drawing import Color, DrawnObjects, Image, class_name, draw_objects
from mask_rcnn_plus.ops.run_lengths import crop
from mask_rcnn_tools.check.images import Finder
from mask_rcnn_tools.report.matching import IGNORED, RIGHT, Array, ObjectTable
from mask_rcnn_tools.report.metrics import ERRORS
from mask_rcnn_tools.report.run import Run

# Blue, green, red. People who cannot tell red from green can distinguish these colours.
RIGHT_COLOR: Color = (178, 114, 0)
WRONG_COLOR: Color = (0, 94, 213)
MISSED_COLOR: Color = (0, 159, 230)
ERROR_NAMES = {code: name for name, code in ERRORS.items()}
_SIDE = 300
_CROP_SIDE = 220
_CROWDED = 20
# For all pictures of a page. base64 adds a third, and the rest of the page is below 2 MB.
MAX_BYTES = 12_000_000


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    source: str  # a data URI
    width: int  # in pixels
    height: int
    text: str  # a description, for people who cannot see the picture


class Pictures:
    """Draws images until the page has reached its size limit.

    Attributes:
        missing: the file names of images that could not be read, or that have another size than
            the json says.
        full: whether a picture was left out because the page would exceed its size limit.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.full = False
        self._bytes = 0
        self._finders: dict[str, Finder] = {}
        self._last: tuple[tuple[str, str], Image | None] = (("", ""), None)

    def truth(self, run: Run, image: int, threshold: float) -> Picture | None:
        """An image with its objects: blue if detected, orange if missed."""
        truth = run.analysis.truth
        indices = truth.in_image(image)
        indices = indices[~truth.crowd[indices]]
        detected = detected_objects(run, threshold)[indices]
        return self._whole(
            run,
            image,
            _drawn(truth, indices),
            [RIGHT_COLOR if found else MISSED_COLOR for found in detected],
            [_class_label(run, k) for k in truth.category[indices]],
            f"{len(indices)} objects, {int((~detected).sum())} missed",
        )

    def detections(self, run: Run, image: int, threshold: float) -> Picture | None:
        """An image with its detections: blue if right, red with their error if wrong."""
        detections, errors = run.analysis.detections, run.analysis.main_matches.errors
        indices = detections.in_image(image)
        indices = indices[(detections.score[indices] >= threshold) & (errors[indices] != IGNORED)]
        right = errors[indices] == RIGHT
        # The picture of the objects shows the class of each right detection.
        labels = [
            ""
            if errors[d] == RIGHT
            else f"{_class_label(run, detections.category[d])} "
            f"{detections.score[d]:.2f} {ERROR_NAMES[int(errors[d])]}".lstrip()
            for d in indices
        ]
        return self._whole(
            run,
            image,
            _drawn(detections, indices),
            [RIGHT_COLOR if matched else WRONG_COLOR for matched in right],
            labels,
            f"{len(indices)} detections, {int((~right).sum())} wrong",
        )

    def mistake(self, run: Run, detection: int) -> Picture | None:
        """The surroundings of a detection: the detection red, objects blue."""
        truth, detections = run.analysis.truth, run.analysis.detections
        image = int(detections.image[detection])
        return self._crop(
            run,
            image,
            (_drawn(truth, truth.in_image(image)), RIGHT_COLOR),
            (_drawn(detections, np.array([detection])), WRONG_COLOR),
            "the detection and the objects around it",
        )

    def missed(self, run: Run, index: int, threshold: float) -> Picture | None:
        """The surroundings of a missed object: the object orange, detections blue."""
        truth, detections = run.analysis.truth, run.analysis.detections
        image = int(truth.image[index])
        near = detections.in_image(image)
        near = near[detections.score[near] >= threshold]
        return self._crop(
            run,
            image,
            (_drawn(detections, near), RIGHT_COLOR),
            (_drawn(truth, np.array([index])), MISSED_COLOR),
            "the missed object and the detections around it",
        )

    def _whole(
        self,
        run: Run,
        image: int,
        objects: DrawnObjects,
        colors: Sequence[Color],
        labels: Sequence[str],
        text: str,
    ) -> Picture | None:
        pixels = self._read(run, image)
        if pixels is None:
            return None
        scale, crowded = min(_SIDE / max(pixels.shape[:2]), 4.0), len(objects) > _CROWDED
        return self._draw(
            pixels, objects, scale, text, crowded=crowded, colors=colors, labels=labels
        )

    def _crop(
        self,
        run: Run,
        image: int,
        around: tuple[DrawnObjects, Color],
        subject: tuple[DrawnObjects, Color],
        text: str,
    ) -> Picture | None:
        """The surroundings of the subject, which is drawn over all others."""
        pixels = self._read(run, image)
        if pixels is None:
            return None
        window = _window(subject[0].boxes[0], *pixels.shape[:2])
        x0, y0, x1, y1 = window
        part = np.ascontiguousarray(pixels[y0:y1, x0:x1])
        first, second = _cut(around[0], window), _cut(subject[0], window)
        masks = None
        if first.masks is not None and second.masks is not None:
            masks = [*first.masks, *second.masks]
        together = DrawnObjects(
            boxes=np.concatenate([first.boxes, second.boxes]),
            classes=np.concatenate([first.classes, second.classes]),
            masks=masks,
        )
        return self._draw(
            part,
            together,
            _CROP_SIDE / max(part.shape[:2]),
            text,
            crowded=True,
            colors=[around[1]] * len(first) + [subject[1]] * len(second),
            on_top=len(second),
        )

    def _read(self, run: Run, image: int) -> Image | None:
        record = run.analysis.images[image]
        name = str(record.get("file_name", ""))
        key = (str(run.image_root), name)
        if self._last[0] == key:
            return self._last[1]
        if self._bytes >= MAX_BYTES:
            self.full = True
            return None
        pixels = None
        if path := self._finders.setdefault(key[0], Finder(run.image_root)).find(name).path:
            with suppress(Exception):  # Pillow's decoders raise many types of errors
                rule = str(run.settings.get("INPUT.SIXTEEN_BIT", "image"))
                pixels = read_image(path, sixteen_bit=rule)
        if pixels is None or pixels.shape[:2] != (record["height"], record["width"]):
            pixels = None
            self.missing.add(name)
        self._last = key, pixels
        return pixels

    def _draw(
        self, image: Image, objects: DrawnObjects, scale: float, text: str, **options: Any
    ) -> Picture:
        height, width = (max(1, round(scale * side)) for side in image.shape[:2])
        canvas = draw_objects(image, objects, (), (height, width), **options)
        data = cv2.imencode(".webp", canvas, [cv2.IMWRITE_WEBP_QUALITY, 78])[1].tobytes()
        self._bytes += len(data)
        source = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
        return Picture(source, width, height, text)


def detected_objects(run: Run, threshold: float) -> Array:
    """(R,) bool: whether a detection with at least this score matches each object."""
    matched_by = run.analysis.main_matches.matched_by
    detected = matched_by >= 0
    detected[detected] = run.analysis.detections.score[matched_by[detected]] >= threshold
    return detected


def _class_label(run: Run, category: int) -> str:
    """The name of a class; "" if there is only one."""
    names = run.analysis.class_names
    return class_name(names, category) if len(names) > 1 else ""


def _drawn(table: ObjectTable, indices: Array) -> DrawnObjects:
    masks = [mask for i in indices if (mask := table.mask[i]) is not None]
    return DrawnObjects(
        boxes=table.box[indices],
        classes=table.category[indices].astype(np.int64),
        masks=masks if len(masks) == len(indices) else None,
    )


def _window(box: Array, height: int, width: int) -> tuple[int, int, int, int]:
    """A square around a box, with some surroundings, within the image."""
    side = float(max(box[2] - box[0], box[3] - box[1], 16)) * 2.2
    side = min(side, max(height, width))
    edges = []
    for low, high, end in ((box[0], box[2], width), (box[1], box[3], height)):
        middle = float(low + high) / 2
        start = int(np.clip(middle - side / 2, 0, max(0, end - side)))
        edges.append((start, min(end, start + max(1, int(side)))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


def _cut(objects: DrawnObjects, window: tuple[int, int, int, int]) -> DrawnObjects:
    """The objects that reach into a window, in its pixels."""
    x0, y0, x1, y1 = window
    boxes = objects.boxes
    inside = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    kept = objects.select(np.flatnonzero(inside))
    masks = None
    if kept.masks is not None:
        masks = [mask_util.encode(np.asfortranarray(crop(mask, window))) for mask in kept.masks]
    shifted = np.clip(kept.boxes - [x0, y0, x0, y0], 0, [x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    return DrawnObjects(boxes=shifted, classes=kept.classes, masks=masks)
