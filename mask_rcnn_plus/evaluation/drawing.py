"""Objects drawn on an image with OpenCV: masks, boxes and labels that stay legible at any size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode, Instances

from mask_rcnn_plus.evaluation.coco_json import encoded_masks
from mask_rcnn_plus.evaluation.labels import (
    FONT_SCALE,
    Color,
    Image,
    class_color,
    class_name,
    draw_labels,
)
from mask_rcnn_plus.ops.run_lengths import crop, window_of

_MASK_OPACITY = 0.4
# An object whose box, as drawn, has a side shorter than this many lines gets a thin outline; where
# most objects are so small, also one that is up to twice as large, lest it look picked out.
_SMALL = 20
_EDGE = (24, 24, 24)


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
    masks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score_threshold: float) -> "DrawnObjects":
        """Those that score at least so much; all of the ground truth."""
        if self.scores is None:
            return self
        kept = np.flatnonzero(self.scores >= score_threshold)
        masks = None if self.masks is None else [self.masks[i] for i in kept]
        return DrawnObjects(self.boxes[kept], self.classes[kept], self.scores[kept], masks)

    @classmethod
    def from_instances(cls, instances: Instances) -> "DrawnObjects":
        """From a model's output after post-processing."""
        instances = instances.to("cpu")
        masks = None
        if instances.has("pred_masks"):
            masks = encoded_masks(instances.pred_masks)
        return cls(
            boxes=instances.pred_boxes.tensor.double().numpy(),
            classes=instances.pred_classes.numpy(),
            scores=instances.scores.double().numpy(),
            masks=masks,
        )

    @classmethod
    def from_coco(cls, detections: Sequence[Mapping[str, Any]]) -> "DrawnObjects":
        """From detections in COCO's form, their "category_id" a class from 0.

        Args:
            detections: each with "bbox" (x, y, width, height) and "score"; all with
                "segmentation", a run-length encoding, or none.
        """
        boxes = np.array([d["bbox"] for d in detections], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if all("segmentation" in d for d in detections):
            masks = [d["segmentation"] for d in detections]
        return cls(
            boxes=boxes,
            classes=np.array([d["category_id"] for d in detections], dtype=np.int64),
            scores=np.array([d["score"] for d in detections], dtype=np.float64),
            masks=masks,
        )

    @classmethod
    def from_annotations(
        cls, annotations: Sequence[Mapping[str, Any]], height: int, width: int
    ) -> "DrawnObjects":
        """From the "annotations" of a detectron2 data set; crowds are left out.

        Args:
            annotations: each with "bbox", "bbox_mode", "category_id"; the "segmentation" of each
                may be polygons, a run-length encoding or a bitmap; where one has none, none is
                drawn with a mask.
            height, width: of the image, in pixels.
        """
        kept = [annotation for annotation in annotations if not annotation.get("iscrowd")]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
        masks = None
        if all(len(annotation.get("segmentation", ())) for annotation in kept):
            masks = [_rle(annotation["segmentation"], height, width) for annotation in kept]
        return cls(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            classes=np.array([a["category_id"] for a in kept], dtype=np.int64),
            masks=masks,
        )


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, np.ndarray):
        return mask_util.encode(np.asfortranarray(segmentation, dtype=np.uint8))
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    rles = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.merge(rles) if isinstance(rles, list) else rles


@dataclass(frozen=True)
class Style:
    """What is drawn of objects, and how large.

    Attributes:
        masks, boxes, labels, scores: what is drawn; a score stands in its label. Without masks in
            the objects, boxes are drawn always.
        line: the width of an outline in pixels.
        text: the size of text, 1 being OpenCV's of about 22 pixels.
        small: objects smaller than their label get one where that covers no other object.
        edged: outlines get a dark edge, so that they stand out from a background of their colour.
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
    """An image, resized, with its objects.

    Args:
        image: (H, W, 3), BGR.
        objects: in pixels of the image.
        class_names: names of the classes 0, 1, ...
        size: height and width of the drawing in pixels.
        crowded: draw thin outlines alone, without labels, and boxes only where there are no masks.
        colors: one an object; None takes those of the classes.
        labels: one an object, "" for none, and no boxes around masks; None takes the class and
            the score.
        on_top: how many of the last objects are drawn over all others, with wider outlines.

    Returns:
        (size[0], size[1], 3), BGR. A label is left out where it would hide the object or another
        label.
    """
    style = Style(
        boxes=not crowded and labels is None, labels=not crowded, line=1 if crowded else 2
    )
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
    """:func:`draw_objects` in a style; at the size of the image where none is given.

    At that size each mask is worked on within its box, so time and memory grow with the objects'
    pixels.
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

    # Large objects first: a small one in front of them stays visible.
    sides = boxes[:, 2:] - boxes[:, :2]
    topmost = np.arange(len(objects)) >= len(objects) - on_top
    order = np.lexsort((-sides.prod(axis=1), topmost))
    shorter = sides.min(axis=1)
    small = _SMALL * style.line
    if 2 * (shorter < small).sum() > len(objects):
        small *= 2
    lines = [style.line if side >= small else 1 for side in shorter]
    lines = [line + int(top) for line, top in zip(lines, topmost, strict=True)]
    masks = objects.masks if style.masks else None
    if masks is not None:
        outlines = {}
        tinted = canvas.copy()
        for i in order:
            (x, y), mask = _mask_at(masks[i], width, height)
            part = tinted[y : y + mask.shape[0], x : x + mask.shape[1]]
            part[mask > 0] = colors[i]
            outlines[i], _ = cv2.findContours(
                mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(x, y)
            )
        canvas = cv2.addWeighted(tinted, _MASK_OPACITY, canvas, 1 - _MASK_OPACITY, 0)
        for i in order:
            if style.edged and lines[i] > 1:
                cv2.drawContours(canvas, outlines[i], -1, _EDGE, lines[i] + 2, cv2.LINE_AA)
            cv2.drawContours(canvas, outlines[i], -1, colors[i], lines[i], cv2.LINE_AA)
    if style.boxes or masks is None:
        thin = max(1, style.line // 2)
        for i in order:
            first, last = boxes[i, :2].round().astype(int), boxes[i, 2:].round().astype(int)
            corners = first.tolist(), (last - 1).tolist()
            if style.edged and masks is None and lines[i] > 1:
                cv2.rectangle(canvas, *corners, _EDGE, thin + 2)
            cv2.rectangle(canvas, *corners, colors[i], thin)
    if style.labels:
        if labels is None:
            labels = [_label(objects, i, class_names, style.scores) for i in range(len(objects))]
        by_score = np.arange(len(objects))
        if objects.scores is not None:
            by_score = np.argsort(-objects.scores, kind="stable")
        draw_labels(canvas, boxes, labels, colors, by_score, style.text, style.small)
    return canvas


def _label(objects: DrawnObjects, i: int, class_names: Sequence[str], score: bool) -> str:
    text = class_name(class_names, int(objects.classes[i]))
    return f"{text} {objects.scores[i]:.2f}" if score and objects.scores is not None else text


def _mask_at(rle: Mapping[str, Any], width: int, height: int) -> tuple[tuple[int, int], Image]:
    """A mask as it is drawn: where its top left pixel goes, and its pixels, 0 or 1."""
    if tuple(rle["size"]) == (height, width):
        window = window_of(rle)
        return window[:2], crop(rle, window)
    return (0, 0), _resized(mask_util.decode(rle), width, height)


def _resized(mask: Image, width: int, height: int) -> Image:
    """A 0/1 mask at another size; where it grows, its steps of a pixel become a smooth outline."""
    growth = width / mask.shape[1]
    method = cv2.INTER_AREA if growth < 1 else cv2.INTER_LINEAR
    grey = cv2.resize(mask * np.uint8(255), (width, height), interpolation=method)
    if growth > 1:
        grey = cv2.GaussianBlur(grey, (0, 0), 0.5 * growth)
    return (grey > 127).astype(np.uint8)
