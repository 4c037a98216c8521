"""A picture of some test images: the ground truth on the left, the prediction on the right."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from mask_rcnn_plus.evaluation.drawing import (
    Color,
    DrawnObjects,
    Image,
    class_color,
    draw_objects,
)
from mask_rcnn_plus.evaluation.journal import Journal
from mask_rcnn_plus.evaluation.text import (
    class_name,
    drawable,
    shortened,
    text_size,
    write_text,
)

_logger = logging.getLogger(__name__)

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (40, 40, 40), (120, 120, 120)
_MARGIN, _GAP = 16, 6
_TITLE_SCALE = 0.6
# Boxes and labels of more objects than this would hide the image.
_CROWDED = 30


@dataclass(frozen=True)
class PreviewSample:
    """One image of the preview.

    Attributes:
        image: (H, W, 3), BGR.
        name: the text above it, such as the file name.
        truth, prediction: the annotated and the detected objects, in pixels of the image.
    """

    image: Image
    name: str
    truth: DrawnObjects
    prediction: DrawnObjects


def draw_preview(
    samples: Sequence[PreviewSample],
    *,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    max_side: int = 480,
    title: str = "",
) -> Image:
    """Draws the ground truth and the prediction of some images side by side.

    Args:
        samples: at least one.
        class_names: names of the classes 0, 1, ...
        score_threshold: the lowest score of a prediction that is drawn.
        max_side: the longer side of every drawn image in pixels. Smaller images are enlarged, so
            that outlines and labels stay distinct.
        title: the text at the top.

    Returns:
        (height, width, 3), BGR: pairs in a grid that is a little wider than high.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("a preview needs at least one sample")
    cells = [_draw_cell(sample, class_names, score_threshold, max_side) for sample in samples]
    width = max(cell.shape[1] for cell in cells)

    def distortion(columns: int) -> float:
        height = math.ceil(len(cells) / columns) * cells[0].shape[0]
        return abs(math.log(columns * width / height / 1.4))

    columns = min(range(1, len(cells) + 1), key=distortion)
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        row += [_blank(1, 1)] * (columns - len(row))
        height = max(cell.shape[0] for cell in row)
        rows.append(_stack([_pad(cell, height, width) for cell in row], axis=1, gap=_MARGIN))
    drawn = [o for s in samples for o in (s.truth, s.prediction.above(score_threshold))]
    shown = sorted({int(index) for objects in drawn for index in objects.classes})
    header = _draw_header(title, shown, class_names, rows[0].shape[1])
    page = _stack([header, *rows], axis=0, gap=_MARGIN)
    edges = (_MARGIN,) * 4
    return cv2.copyMakeBorder(page, *edges, cv2.BORDER_CONSTANT, value=_BACKGROUND)


class PreviewWriter(DatasetEvaluator):
    """Draws predictions beside the ground truth into ``preview_<data set>.png``.

    Attributes:
        path: the picture that the last ``evaluate`` of this process wrote, or None.
        journal: has the results of an interrupted evaluation that is resumed; or None.
    """

    path: Path | None = None
    journal: Journal | None = None

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        num_images: int = 6,
        score_threshold: float = 0.5,
        read_image: Callable[[str, str], np.ndarray] = read_image,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set.
            output_dir: the folder of the picture; created if missing.
            num_images: how many images to draw, evenly spaced over those with objects, so that
                every evaluation draws the same ones. 0 draws no picture.
            score_threshold: the lowest score of a prediction that is drawn.
            read_image: called with a path and "BGR"; returns (H, W, 3).
        """
        self._dataset_name = dataset_name
        self._output_dir = output_dir
        self._num_images = num_images
        self._score_threshold = score_threshold
        self._read_image = read_image
        self._records = {_key(record): record for record in self._choose()}
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions."""
        self.path = None
        self._predictions: dict[Any, DrawnObjects] = {}
        for entry in self.journal.kept if self.journal else ():
            if entry["image_id"] in self._records:
                self._predictions[entry["image_id"]] = DrawnObjects.from_coco(entry["instances"])

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keeps the predictions on the chosen images; skips outputs without "instances"."""
        for image, output in zip(inputs, outputs, strict=True):
            if _key(image) in self._records and "instances" in output:
                self._predictions[_key(image)] = DrawnObjects.from_instances(output["instances"])

    def evaluate(self) -> dict[str, Any]:
        """Writes the picture and returns no metrics; every process must call it."""
        comm.synchronize()
        gathered = comm.gather(self._predictions, dst=0)
        predictions = {key: objects for part in gathered for key, objects in part.items()}
        if not comm.is_main_process() or not predictions:
            return {}
        try:
            self.path = self._write(predictions)
        except Exception:
            # A failed picture must not lose the metrics of hours of inference.
            _logger.warning("Could not draw the preview:", exc_info=True)
        return {}

    def _choose(self) -> list[Mapping[str, Any]]:
        if self._num_images <= 0:
            return []
        records = DatasetCatalog.get(self._dataset_name)
        records = [r for r in records if r.get("annotations")] or list(records)
        count = min(self._num_images, len(records))
        # The middle record of each of `count` equal parts.
        return [records[(2 * i + 1) * len(records) // (2 * count)] for i in range(count)]

    def _write(self, predictions: Mapping[Any, DrawnObjects]) -> Path:
        samples = []
        for key, record in self._records.items():
            if key not in predictions:
                continue
            image = self._read_image(record["file_name"], "BGR")
            truth = DrawnObjects.from_annotations(record.get("annotations", ()), *image.shape[:2])
            name = Path(record["file_name"]).name
            samples.append(PreviewSample(image, name, truth, predictions[key]))
        picture = draw_preview(
            samples,
            class_names=MetadataCatalog.get(self._dataset_name).get("thing_classes") or (),
            score_threshold=self._score_threshold,
            title=self._dataset_name,
        )
        PathManager.mkdirs(self._output_dir)
        path = Path(self._output_dir) / f"preview_{self._dataset_name}.png"
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        _logger.info("Predictions beside the ground truth: %s", path)
        return path


def _key(record: Mapping[str, Any]) -> Any:
    return record.get("image_id", record.get("file_name"))


def _draw_cell(
    sample: PreviewSample, class_names: Sequence[str], score_threshold: float, max_side: int
) -> Image:
    """The image's name above two panels, each with a caption."""
    scale = max_side / max(sample.image.shape[:2])
    height, width = (max(1, round(scale * side)) for side in sample.image.shape[:2])
    detections = sample.prediction.above(score_threshold)
    caption = f"prediction: {len(detections)} with score >= {score_threshold:.2f}"
    scores = sample.prediction.scores
    if len(detections) == 0 and scores is not None and len(scores):
        caption += f", best {scores.max():.2f}"
    captions = {f"ground truth: {len(sample.truth)}": sample.truth, caption: detections}
    crowded = max(map(len, captions.values())) > _CROWDED
    panels = []
    for caption, objects in captions.items():
        size = (height, width)
        panel = draw_objects(sample.image, objects, class_names, size, crowded=crowded)
        line = _line(caption, width, _FAINT)
        panels.append(_stack([line, _pad(panel, height, line.shape[1])], axis=0, gap=0))
    pair = _stack(panels, axis=1, gap=_GAP)
    name = shortened(drawable(sample.name, otherwise="image"), pair.shape[1])
    return _stack([_line(name, pair.shape[1], _INK), pair], axis=0, gap=0)


def _line(text: str, width: int, color: Color) -> Image:
    line = _blank(text_size(text)[1], max(width, text_size(text)[0]))
    write_text(line, text, (-3, 0), color)
    return line


def _draw_header(title: str, shown: Sequence[int], class_names: Sequence[str], width: int) -> Image:
    """The title, and a legend of the classes in the picture."""
    title_height = text_size(title, _TITLE_SCALE)[1] if title else 0
    side = text_size("X")[1]
    # The legend's entries; one that would pass the right edge starts a new line.
    positions: list[tuple[int, int]] = []
    x, y = 0, title_height
    for index in shown:
        entry = side + text_size(class_name(class_names, index))[0] + _MARGIN
        if x and x + entry > width:
            x, y = 0, y + side
        positions.append((x, y))
        x += entry
    header = _blank(y + side if shown else max(y, 1), width)
    if title:
        write_text(header, drawable(title, otherwise=""), (-3, 0), _INK, _TITLE_SCALE)
    for index, (x, y) in zip(shown, positions, strict=True):
        color = class_color(index)
        cv2.rectangle(header, (x, y + 4), (x + side - 8, y + side - 4), color, cv2.FILLED)
        write_text(header, class_name(class_names, index), (x + side - 6, y), _INK)
    return header


def _blank(height: int, width: int) -> Image:
    return np.full((height, width, 3), _BACKGROUND, np.uint8)


def _pad(image: Image, height: int, width: int) -> Image:
    padded = _blank(height, width)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _stack(images: Sequence[Image], *, axis: int, gap: int) -> Image:
    """Joins images of equal height (axis 1) or width (axis 0), with a gap between them."""
    height, width = images[0].shape[:2]
    space = _blank(gap, width) if axis == 0 else _blank(height, gap)
    return np.concatenate([p for image in images for p in (space, image)][1:], axis=axis)
