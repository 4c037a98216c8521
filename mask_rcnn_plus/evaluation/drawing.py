"""Objects drawn on an image with OpenCV: masks, boxes and labels that stay legible at any size."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode, Instances

from mask_rcnn_plus.evaluation.coco_json import encoded_masks, segmentation_to_rle
from mask_rcnn_plus.evaluation.text import (
    FONT_SCALE,
    Color,
    Image,
    class_name,
    shortened,
    text_size,
    write_text,
)
from mask_rcnn_plus.ops.run_lengths import crop, window_of

Rectangle = tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels, x1 and y1 not included

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_MASK_OPACITY = 0.4
# An object with a side shorter than this many line widths gets a thin outline. If most objects do,
# the limit doubles, so that slightly larger objects do not look highlighted.
_SMALL = 20
_EDGE = (24, 24, 24)
# The smallest object that gets a label, as a fraction of the label's area.
_MIN_LABEL_FRACTION = 0.25
# A label takes the first place where it covers at most this part of any box, else the place where
# it covers least, but not more than _MAX_COVERED.
_HARDLY_COVERED, _MAX_COVERED = 0.1, 0.3
_MIN_ROOM = 160  # pixels for a label


@dataclass(frozen=True)
class DrawnObjects:
    """The objects of one image.

    Attributes:
        boxes: (R, 4), (x0, y0, x1, y1) in pixels of the image.
        classes: (R,), from 0.
        scores: (R,), from 0 to 1; None for the ground truth.
        masks: R masks in COCO's run-length encoding, of the size of the image; None without masks.
    """

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64] | None = None
    masks: Sequence[Mapping[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score_threshold: float) -> "DrawnObjects":
        """The objects with at least this score; all objects if scores are missing."""
        if self.scores is None:
            return self
        return self.select(np.flatnonzero(self.scores >= score_threshold))

    def select(self, indices: npt.NDArray[np.intp]) -> "DrawnObjects":
        """The objects with these indices, in this order."""
        return DrawnObjects(
            self.boxes[indices],
            self.classes[indices],
            None if self.scores is None else self.scores[indices],
            None if self.masks is None else [self.masks[i] for i in indices],
        )

    @classmethod
    def from_instances(cls, instances: Instances) -> "DrawnObjects":
        """From a model's output after post-processing."""
        instances = instances.to("cpu")
        return cls(
            boxes=instances.pred_boxes.tensor.double().numpy(),
            classes=instances.pred_classes.numpy(),
            scores=instances.scores.double().numpy(),
            masks=encoded_masks(instances.pred_masks) if instances.has("pred_masks") else None,
        )

    @classmethod
    def from_coco(cls, detections: Sequence[Mapping[str, Any]]) -> "DrawnObjects":
        """From detections in COCO's format, with class indices as "category_id".

        Args:
            detections: each with "bbox" (x, y, width, height) and "score". If all have a
                "segmentation", a run-length encoding, the objects have masks.
        """
        boxes = np.array([d["bbox"] for d in detections], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [d["segmentation"] for d in detections if "segmentation" in d]
        return cls(
            boxes=boxes,
            classes=np.array([d["category_id"] for d in detections], dtype=np.int64),
            scores=np.array([d["score"] for d in detections], dtype=np.float64),
            masks=masks if len(masks) == len(detections) else None,
        )

    @classmethod
    def from_annotations(
        cls, annotations: Sequence[Mapping[str, Any]], height: int, width: int
    ) -> "DrawnObjects":
        """From the "annotations" of a detectron2 data set, without crowds.

        Args:
            annotations: each with "bbox", "bbox_mode", "category_id". If all have a "segmentation"
                (polygons, a run-length encoding or a bitmap), the objects have masks.
            height, width: the size of the image in pixels.
        """
        kept = [a for a in annotations if not a.get("iscrowd")]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
        masks = None
        if all(len(a.get("segmentation", ())) for a in kept):
            masks = [segmentation_to_rle(a["segmentation"], height, width) for a in kept]
        return cls(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            classes=np.array([a["category_id"] for a in kept], dtype=np.int64),
            masks=masks,
        )


@dataclass(frozen=True)
class Style:
    """Selects what is drawn, and its size.

    Attributes:
        masks, boxes, labels, scores: what is drawn; a score is part of its label. Objects without
            masks always have boxes.
        line: the width of an outline in pixels.
        text: the size of text; 1 is OpenCV's size of about 22 pixels.
        small: also label objects smaller than their label, if that covers no other object.
        edged: outlines get a dark edge, which separates them from a background of their colour.
    """

    masks: bool = True
    boxes: bool = True
    labels: bool = True
    scores: bool = True
    line: int = 2
    text: float = FONT_SCALE
    small: bool = False
    edged: bool = False


def draw_objects(
    image: Image,
    objects: DrawnObjects,
    class_names: Sequence[str],
    size: tuple[int, int],
    *,
    crowded: bool,
    colors: Sequence[Color] | None = None,
    labels: Sequence[str] | None = None,
    on_top: int = 0,
) -> Image:
    """Resizes an image and draws objects on it, in a style that suits their number.

    Args:
        crowded: draw thin outlines, no labels, and boxes only for objects without masks.

    Other arguments and the result are those of :func:`draw_styled`, but masks have no boxes if
    ``labels`` are given.
    """
    boxes = not crowded and labels is None
    style = Style(boxes=boxes, labels=not crowded, line=1 if crowded else 2)
    return draw_styled(
        image, objects, class_names, style, size, colors=colors, labels=labels, on_top=on_top
    )


def draw_styled(
    image: Image,
    objects: DrawnObjects,
    class_names: Sequence[str],
    style: Style,
    size: tuple[int, int] | None = None,
    *,
    colors: Sequence[Color] | None = None,
    labels: Sequence[str] | None = None,
    on_top: int = 0,
) -> Image:
    """Draws objects on a copy of an image. At the image's size, time grows with their pixels.

    Args:
        image: (H, W, 3), BGR.
        objects: in pixels of the image.
        class_names: names of the classes 0, 1, ...
        style: what is drawn.
        size: height and width of the drawing in pixels; None for those of the image.
        colors: one per object; None uses the colours of the classes.
        labels: one per object, "" for no label; None uses the class and the score.
        on_top: how many of the last objects are drawn over all others, with wider outlines.

    Returns:
        (size[0], size[1], 3), BGR. A label is missing if it would hide its object or another label.
    """
    height, width = size or image.shape[:2]
    if (height, width) == image.shape[:2]:
        canvas = image.copy()
    else:
        method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
        canvas = cv2.resize(image, (width, height), interpolation=method)
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    boxes = objects.boxes * scale
    if colors is None:
        colors = [class_color(int(index)) for index in objects.classes]

    # Large objects first, so that small objects in front of them stay visible.
    sides = boxes[:, 2:] - boxes[:, :2]
    topmost = np.arange(len(objects)) >= len(objects) - on_top
    order = np.lexsort((-sides.prod(axis=1), topmost))
    shorter = sides.min(axis=1)
    small = _SMALL * style.line
    if 2 * (shorter < small).sum() > len(objects):
        small *= 2
    lines = (np.where(shorter >= small, style.line, 1) + topmost).tolist()
    masks = objects.masks if style.masks else None
    if masks is not None:
        outlines = {}
        plain = image if image.shape == canvas.shape else canvas.copy()
        for i in order:
            (x, y), mask = _mask_at(masks[i], width, height)
            window = slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1])
            if mask.size:
                tinted = _tinted(plain[window], colors[i])
                np.copyto(canvas[window], tinted, where=mask[:, :, None] > 0)
            modes = cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
            outlines[i], _ = cv2.findContours(mask, *modes, offset=(x, y))
        for i in order:
            if style.edged and lines[i] > 1:
                cv2.drawContours(canvas, outlines[i], -1, _EDGE, lines[i] + 2, cv2.LINE_AA)
            cv2.drawContours(canvas, outlines[i], -1, colors[i], lines[i], cv2.LINE_AA)
    if style.boxes or masks is None:
        thin = max(1, style.line // 2)
        for i in order:
            x0, y0, x1, y1 = boxes[i].round().astype(int).tolist()
            corners = (x0, y0), (x1 - 1, y1 - 1)
            if style.edged and masks is None and lines[i] > 1:
                cv2.rectangle(canvas, *corners, _EDGE, thin + 2)
            cv2.rectangle(canvas, *corners, colors[i], thin)
    if style.labels:
        if labels is None:
            labels = [_label(objects, i, class_names, style.scores) for i in range(len(objects))]
        scores = np.zeros(len(objects)) if objects.scores is None else objects.scores
        by_score = np.argsort(-scores, kind="stable")
        _draw_labels(canvas, boxes, labels, colors, by_score, style.text, style.small)
    return canvas


def _tinted(image: Image, color: Color) -> Image:
    """Blends an image with a colour."""
    levels = np.arange(256)[:, None] * (1 - _MASK_OPACITY) + np.array(color) * _MASK_OPACITY
    return cv2.LUT(image, np.rint(levels).astype(np.uint8)[None])


def _label(objects: DrawnObjects, i: int, class_names: Sequence[str], score: bool) -> str:
    text = class_name(class_names, int(objects.classes[i]))
    return f"{text} {objects.scores[i]:.2f}" if score and objects.scores is not None else text


def _mask_at(rle: Mapping[str, Any], width: int, height: int) -> tuple[tuple[int, int], Image]:
    """The position (x, y) of a drawn mask's top left pixel, and its pixels, 0 or 1."""
    if tuple(rle["size"]) == (height, width):
        window = window_of(rle)
        return window[:2], crop(rle, window)
    return (0, 0), _resized(mask_util.decode(rle), width, height)


def _resized(mask: Image, width: int, height: int) -> Image:
    """A 0/1 mask at another size; an enlarged mask gets a smooth outline instead of steps."""
    growth = width / mask.shape[1]
    method = cv2.INTER_AREA if growth < 1 else cv2.INTER_LINEAR
    grey = cv2.resize(mask * np.uint8(255), (width, height), interpolation=method)
    if growth > 1:
        grey = cv2.GaussianBlur(grey, (0, 0), 0.5 * growth)
    return (grey > 127).astype(np.uint8)


def class_color(index: int) -> Color:
    """The colour (blue, green, red), each 0 to 255, of a class; the same in all drawings."""
    # Steps of the golden ratio around the colour wheel keep neighbouring classes far apart.
    hue = (0.4 + index * 0.618034) % 1.0
    lightness = (0.55, 0.72, 0.38)[index // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * blue), round(255 * green), round(255 * red)


def text_color(background: Color) -> Color:
    """Black or white, whichever is more legible on the colour (blue, green, red)."""
    blue, green, red = background
    return _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else _WHITE


def _draw_labels(
    canvas: Image,
    boxes: npt.NDArray[np.float64],
    labels: Sequence[str],
    colors: Sequence[Color],
    order: npt.NDArray[np.int64],
    scale: float,
    small: bool,
) -> None:
    """Writes labels at their boxes, in place; leaves out those that would hide objects or labels.

    Objects earlier in the order get their labels first. With ``small``, objects smaller than their
    label get one too.
    """
    placed: list[Rectangle] = []
    for i in order:
        x0, y0, x1, y1 = boxes[i].round().astype(int).tolist()
        # Half of the canvas; of a tiny one, all.
        room = max(canvas.shape[1] // 2, min(canvas.shape[1], _MIN_ROOM))
        text = shortened(labels[i], room, scale)
        width, height = text_size(text, scale)
        least = _MIN_LABEL_FRACTION if small else 1
        if not text or (x1 - x0) * (y1 - y0) < least * width * height:
            continue
        best, lowest = None, _MAX_COVERED
        for left, top in (
            *((x0, y0 - height), (x1 - width, y0 - height)),  # above the box
            *((x0, y1), (x1 - width, y1)),  # below
            *((x1, y0), (x0 - width, y0)),  # beside
            *((x0, y0), (x0, y1 - height)),  # inside
        ):
            left = max(0, min(left, canvas.shape[1] - width))
            area = (left, top, left + width, top + height)
            if top < 0 or area[3] > canvas.shape[0] or _covered(area, placed) > 0:
                continue
            covered = _covered(area, boxes)
            if covered < lowest:
                best, lowest = area, covered
            if covered <= _HARDLY_COVERED:
                break
        if best is not None:
            placed.append(best)
            cv2.rectangle(canvas, best[:2], (best[2] - 1, best[3] - 1), colors[i], cv2.FILLED)
            write_text(canvas, text, best[:2], text_color(colors[i]), scale)


def _covered(area: Rectangle, boxes: npt.ArrayLike) -> float:
    """The part of a box that an area covers, from 0 to 1; of the box that it covers most."""
    x0, y0, x1, y1 = np.reshape(boxes, (-1, 4)).T
    width = np.minimum(x1, area[2]) - np.maximum(x0, area[0])
    height = np.minimum(y1, area[3]) - np.maximum(y0, area[1])
    pixels = width.clip(0) * height.clip(0)
    return float((pixels / np.maximum((x1 - x0) * (y1 - y0), 1)).max(initial=0))
