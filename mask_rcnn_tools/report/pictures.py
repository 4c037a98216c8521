"""Images of the report, with what was there and what was found, as WebP inside the page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import detection_utils

from mask_rcnn_plus.evaluation.drawing import Color, DrawnObjects, Image, draw_objects, plain_text
from mask_rcnn_tools.check.paths import Finder
from mask_rcnn_tools.report.analysis import ERRORS, Findings
from mask_rcnn_tools.report.analysis import Objects as Found
from mask_rcnn_tools.report.run import Run

# Blue, green, red. Colours that those who see no red or green tell apart.
RIGHT: Color = (178, 114, 0)
WRONG: Color = (0, 94, 213)
MISSED: Color = (0, 159, 230)
ERROR_NAMES = {code: name for name, code in ERRORS.items()}
_SIDE = 300
_CROP_SIDE = 220
_CROWDED = 20
# All pictures of a page together: in base64 a third more, and the rest of the page is 2 MB at most.
MOST_BYTES = 12_000_000


@dataclass(frozen=True)
class Picture:
    """An image inside the page.

    Attributes:
        source: a data URI.
        width, height: in pixels.
        text: what it shows, for those who cannot see it.
    """

    source: str
    width: int
    height: int
    text: str


class Pictures:
    """Draws images until the page has enough of them.

    Attributes:
        missing: the file names of images that could not be read, or are of another size than the
            json says.
        full: whether a picture was left out because the page would grow too large.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.full = False
        self._bytes = 0
        self._finders: dict[str, Finder] = {}
        self._last: tuple[tuple[str, str], Image | None] = (("", ""), None)

    def truth(self, run: Run, image: int, threshold: float) -> Picture | None:
        """An image with its objects: found ones blue, missed ones orange."""
        findings, task = run.findings, run.findings.tasks[run.findings.main_task]
        chosen = np.arange(findings.truth.of(image).start, findings.truth.of(image).stop)
        chosen = chosen[~findings.truth.crowd[chosen]]
        by = task.found_by[chosen]
        found = by >= 0
        # Of objects that nothing finds, by is no index.
        found[found] = findings.detections.score[by[found]] >= threshold
        colors = [RIGHT if one else MISSED for one in found]
        several = len(findings.class_names) > 1
        names = [_name(findings, k) if several else "" for k in findings.truth.category[chosen]]
        objects = _objects(findings.truth, chosen)
        text = f"{len(chosen)} objects, {len(chosen) - int(found.sum())} missed"
        return self._whole(run, image, objects, colors, names, text)

    def found(self, run: Run, image: int, threshold: float) -> Picture | None:
        """An image with its detections: right ones blue, wrong ones red with their error."""
        findings, task = run.findings, run.findings.tasks[run.findings.main_task]
        span = findings.detections.of(image)
        chosen = np.arange(span.start, span.stop)
        chosen = chosen[findings.detections.score[chosen] >= threshold]
        chosen = chosen[task.error[chosen] >= 0]
        right = task.error[chosen] == 0
        colors = [RIGHT if one else WRONG for one in right]
        # What is right has the class that the picture of the objects shows.
        names = ["" if task.error[d] == 0 else _mistake(findings, d, task.error[d]) for d in chosen]
        objects = _objects(findings.detections, chosen)
        text = f"{len(chosen)} found, {len(chosen) - int(right.sum())} wrong"
        return self._whole(run, image, objects, colors, names, text)

    def detection(self, run: Run, index: int) -> Picture | None:
        """The surroundings of a detection: it red, the objects that are there blue."""
        findings = run.findings
        image = int(findings.detections.image[index])
        span = findings.truth.of(image)
        return self._crop(
            run,
            image,
            findings.detections.box[index],
            [
                (_objects(findings.truth, np.arange(span.start, span.stop)), RIGHT),
                (_objects(findings.detections, np.array([index])), WRONG),
            ],
            "the detection, among the objects that are there",
        )

    def missed(self, run: Run, index: int, threshold: float) -> Picture | None:
        """The surroundings of a missed object: it orange, what was found blue."""
        findings = run.findings
        image = int(findings.truth.image[index])
        span = findings.detections.of(image)
        near = np.arange(span.start, span.stop)
        near = near[findings.detections.score[near] >= threshold]
        return self._crop(
            run,
            image,
            findings.truth.box[index],
            [
                (_objects(findings.detections, near), RIGHT),
                (_objects(findings.truth, np.array([index])), MISSED),
            ],
            "the missed object, among what was found",
        )

    def _whole(
        self,
        run: Run,
        image: int,
        objects: DrawnObjects,
        colors: Sequence[Color],
        names: Sequence[str],
        text: str,
    ) -> Picture | None:
        pixels = self._read(run, image)
        if pixels is None:
            return None
        height, width = pixels.shape[:2]
        scale = min(_SIDE / max(height, width), 4.0)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        crowded = len(objects) > _CROWDED
        canvas = draw_objects(
            pixels, objects, (), size, crowded=crowded, colors=colors, labels=names
        )
        return self._encode(canvas, text)

    def _crop(
        self,
        run: Run,
        image: int,
        box: np.ndarray,
        layers: Sequence[tuple[DrawnObjects, Color]],
        text: str,
    ) -> Picture | None:
        """The surroundings of a box, the last layer over all others."""
        pixels = self._read(run, image)
        if pixels is None:
            return None
        x0, y0, x1, y1 = _window(box, *pixels.shape[:2])
        part = np.ascontiguousarray(pixels[y0:y1, x0:x1])
        scale = _CROP_SIDE / max(part.shape[:2])
        size = max(1, round(part.shape[0] * scale)), max(1, round(part.shape[1] * scale))
        cuts = [(_cut(objects, x0, y0, x1, y1), color) for objects, color in layers]
        together, colors = _joined(cuts)
        part = draw_objects(
            part, together, (), size, crowded=True, colors=colors, on_top=len(cuts[-1][0])
        )
        return self._encode(part, text)

    def _read(self, run: Run, image: int) -> Image | None:
        record = run.findings.images[image]
        name = str(record.get("file_name", ""))
        key = (str(run.image_root), name)
        if self._last[0] == key:
            return self._last[1]
        pixels = None
        if self._bytes >= MOST_BYTES:
            self.full = True
            return None
        finder = self._finders.setdefault(key[0], Finder(run.image_root))
        place = finder.find(name)
        if place.path:
            try:
                pixels = detection_utils.read_image(place.path, "BGR")
            except Exception:  # Pillow raises whatever its decoders raise
                pixels = None
        if pixels is not None and pixels.shape[:2] != (record["height"], record["width"]):
            pixels = None
        if pixels is None:
            self.missing.add(name)
        self._last = key, pixels
        return pixels

    def _encode(self, canvas: Image, text: str) -> Picture:
        data = cv2.imencode(".webp", canvas, [cv2.IMWRITE_WEBP_QUALITY, 78])[1].tobytes()
        self._bytes += len(data)
        source = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
        return Picture(source, canvas.shape[1], canvas.shape[0], text)


def _name(findings: Findings, category: int) -> str:
    return plain_text(findings.class_names[category], otherwise="") or f"class {category}"


def _mistake(findings: Findings, index: int, error: int) -> str:
    name = f"{_name(findings, findings.detections.category[index])} "
    if len(findings.class_names) == 1:
        name = ""
    return f"{name}{findings.detections.score[index]:.2f} {ERROR_NAMES[int(error)]}"


def _objects(found: Found, chosen: np.ndarray) -> DrawnObjects:
    masks = [found.mask[i] for i in chosen]
    return DrawnObjects(
        boxes=found.box[chosen],
        classes=found.category[chosen].astype(np.int64),
        masks=None if any(mask is None for mask in masks) else masks,
    )


def _joined(layers: Sequence[tuple[DrawnObjects, Color]]) -> tuple[DrawnObjects, list[Color]]:
    every = [objects for objects, _ in layers]
    masks = None
    if all(objects.masks is not None for objects in every):
        masks = [mask for objects in every for mask in objects.masks or ()]
    joined = DrawnObjects(
        boxes=np.concatenate([objects.boxes for objects in every]),
        classes=np.concatenate([objects.classes for objects in every]),
        masks=masks,
    )
    return joined, [color for objects, color in layers for _ in range(len(objects))]


def _window(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """A square around a box, with as much around it as the image has."""
    side = float(max(box[2] - box[0], box[3] - box[1], 16)) * 2.2
    side = min(side, max(height, width))
    edges = []
    for low, high, end in ((box[0], box[2], width), (box[1], box[3], height)):
        middle = float(low + high) / 2
        start = int(np.clip(middle - side / 2, 0, max(0, end - side)))
        edges.append((start, min(end, start + max(1, int(side)))))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


def _cut(objects: DrawnObjects, x0: int, y0: int, x1: int, y1: int) -> DrawnObjects:
    """The objects that reach into a window, in its pixels."""
    boxes = objects.boxes
    inside = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    kept = np.flatnonzero(inside)
    masks = None
    if objects.masks is not None:
        parts = [mask_util.decode(objects.masks[i])[y0:y1, x0:x1] for i in kept]
        masks = [mask_util.encode(np.asfortranarray(part)) for part in parts]
    shifted = np.clip(boxes[kept] - [x0, y0, x0, y0], 0, [x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    return DrawnObjects(boxes=shifted, classes=objects.classes[kept], masks=masks)
