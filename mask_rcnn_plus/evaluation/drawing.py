"""Objects drawn on an image with OpenCV: masks, boxes and labels that stay legible at any size."""

import colorsys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode, Instances

from mask_rcnn_plus.evaluation.coco_json import encoded_masks

Image = npt.NDArray[Any]  # (H, W, 3), BGR, 0 to 255
Color = tuple[int, int, int]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_SCALE = 0.45
_MASK_OPACITY = 0.4
# An object whose box, as drawn, has a side shorter than this gets a thin outline.
_SMALL = 40
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Objects:
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

    def above(self, score_threshold: float) -> "Objects":
        """Those that score at least so much; all of the ground truth."""
        if self.scores is None:
            return self
        kept = np.flatnonzero(self.scores >= score_threshold)
        masks = None if self.masks is None else [self.masks[i] for i in kept]
        return Objects(self.boxes[kept], self.classes[kept], self.scores[kept], masks)

    @classmethod
    def from_instances(cls, instances: Instances) -> "Objects":
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
    def from_coco(cls, detections: Sequence[Mapping[str, Any]]) -> "Objects":
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
    ) -> "Objects":
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


def class_color(index: int) -> Color:
    """The colour (blue, green, red), each 0 to 255, of a class: always the same."""
    # Steps of the golden ratio around the colour wheel keep neighbouring classes far apart.
    hue = (0.4 + index * 0.618034) % 1.0
    lightness = (0.55, 0.72, 0.38)[index // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(255 * blue), round(255 * green), round(255 * red)


def text_color(background: Color) -> Color:
    """Black or white, whichever reads better on the colour (blue, green, red)."""
    blue, green, red = background
    return _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else _WHITE


def class_name(class_names: Sequence[str], index: int) -> str:
    """The name of a class, as far as it can be written."""
    name = class_names[index] if index < len(class_names) else ""
    return plain_text(name, otherwise="") or f"class {index}"


def plain_text(text: str, otherwise: str) -> str:
    """The text without accents, or the other one where OpenCV's font would show question marks."""
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return text if text.isascii() else otherwise


def text_size(text: str, scale: float = _FONT_SCALE) -> tuple[int, int]:
    """Width and height of a line of text in pixels, with a margin of a few pixels around it."""
    (width, height), baseline = cv2.getTextSize(text, _FONT, scale, 1)
    # OpenCV 5 draws with another font than 4, whose descenders pass the baseline it returns.
    return width + 6, height + max(baseline, height // 2) + 4


def write_text(
    image: Image, text: str, corner: tuple[int, int], color: Color, scale: float = _FONT_SCALE
) -> None:
    """Writes a line into the image, in place; ``corner`` is the top left (x, y) of its margin."""
    (_, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
    origin = (corner[0] + 3, corner[1] + height + 3)
    cv2.putText(image, text, origin, _FONT, scale, color, 1, cv2.LINE_AA)


def draw_objects(
    image: Image,
    objects: Objects,
    class_names: Sequence[str],
    size: tuple[int, int],
    *,
    crowded: bool,
    colors: Sequence[Color] | None = None,
    labels: Sequence[str] | None = None,
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

    Returns:
        (size[0], size[1], 3), BGR. A label is left out where it would hide the object or another
        label.
    """
    height, width = size
    method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    canvas = cv2.resize(image, (width, height), interpolation=method)
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    boxes = objects.boxes * scale
    if colors is None:
        colors = [class_color(int(index)) for index in objects.classes]

    # Large objects first: a small one in front of them stays visible.
    sides = boxes[:, 2:] - boxes[:, :2]
    order = np.argsort(-sides.prod(axis=1), kind="stable")
    if objects.masks is not None:
        contours = {}
        tinted = canvas.copy()
        for i in order:
            mask = _resized(mask_util.decode(objects.masks[i]), width, height)
            tinted[mask > 0] = colors[i]
            contours[i], _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        canvas = cv2.addWeighted(tinted, _MASK_OPACITY, canvas, 1 - _MASK_OPACITY, 0)
        for i in order:
            thickness = 2 if sides[i].min() >= _SMALL and not crowded else 1
            cv2.drawContours(canvas, contours[i], -1, colors[i], thickness, cv2.LINE_AA)
    if objects.masks is None or (labels is None and not crowded):
        for i in order:
            first, last = boxes[i, :2].round().astype(int), boxes[i, 2:].round().astype(int)
            cv2.rectangle(canvas, first.tolist(), (last - 1).tolist(), colors[i], 1)
    if not crowded:
        if labels is None:
            labels = [_label(objects, i, class_names) for i in range(len(objects))]
        _draw_labels(canvas, objects, boxes, labels, colors)
    return canvas


def _label(objects: Objects, i: int, class_names: Sequence[str]) -> str:
    text = class_name(class_names, int(objects.classes[i]))
    return text if objects.scores is None else f"{text} {objects.scores[i]:.2f}"


def _resized(mask: Image, width: int, height: int) -> Image:
    """A 0/1 mask at another size; where it grows, its steps of a pixel become a smooth outline."""
    growth = width / mask.shape[1]
    method = cv2.INTER_AREA if growth < 1 else cv2.INTER_LINEAR
    grey = cv2.resize(mask * np.uint8(255), (width, height), interpolation=method)
    if growth > 1:
        grey = cv2.GaussianBlur(grey, (0, 0), 0.5 * growth)
    return (grey > 127).astype(np.uint8)


def _draw_labels(
    canvas: Image,
    objects: Objects,
    boxes: npt.NDArray[np.float64],
    labels: Sequence[str],
    colors: Sequence[Color],
) -> None:
    """Writes the labels at the boxes, best scores first, where there is room."""
    order = np.arange(len(objects))
    if objects.scores is not None:
        order = np.argsort(-objects.scores, kind="stable")
    taken: list[tuple[int, int, int, int]] = []
    for i in order:
        x0, y0, x1, y1 = boxes[i].round().astype(int).tolist()
        text = labels[i]
        width, height = text_size(text)
        room = (x1 - x0) * (y1 - y0) / (width * height)
        if room < 1 or not text:
            continue
        left = max(0, min(x0, canvas.shape[1] - width))
        # Above the box, below it, or inside where that leaves most of the object to be seen.
        for top in (y0 - height, y1, *((y0, y1 - height) if room > 3 else ())):
            place = (left, top, left + width, top + height)
            if top < 0 or place[3] > canvas.shape[0] or any(_overlap(place, t) for t in taken):
                continue
            taken.append(place)
            cv2.rectangle(canvas, place[:2], (place[2] - 1, place[3] - 1), colors[i], cv2.FILLED)
            write_text(canvas, text, place[:2], text_color(colors[i]))
            break


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
