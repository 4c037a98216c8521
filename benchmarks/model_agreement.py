"""How far the detections of two models agree."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import pycocotools.mask as mask_util
import torch
from detectron2.structures import Instances, pairwise_iou

# Detections of one class whose boxes overlap less are not the same object.
_SAME = 0.5


@dataclass
class Agreement:
    """Detections of one model beside a reference's, over images.

    Attributes:
        expected: detections of the reference.
        found: of the other.
        scores: absolute differences of matched detections.
        boxes: the largest absolute difference of a coordinate, in pixels, of each match.
        masks: IoU of each match's masks.
    """

    expected: int = 0
    found: int = 0
    scores: list[float] = field(default_factory=list)
    boxes: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | None]:
        """Figures for a table; None where nothing matched."""

        def of(values: Sequence[float], what: object) -> float | None:
            return what(values) if values else None  # type: ignore[operator]

        return {
            "expected": self.expected,
            "found": self.found,
            "matched": len(self.scores),
            "score_difference_median": of(self.scores, statistics.median),
            "score_difference_largest": of(self.scores, max),
            "box_difference_median": of(self.boxes, statistics.median),
            "box_difference_largest": of(self.boxes, max),
            "mask_iou_mean": of(self.masks, statistics.fmean),
            "mask_iou_least": of(self.masks, min),
        }

    def add(self, expected: Instances, found: Instances) -> None:
        """Compares the detections of an image.

        A detection is matched, the reference's best first, with the one of its class that overlaps
        it most among those that are left, from an IoU of 0.5 on.
        """
        expected, found = expected.to("cpu"), found.to("cpu")
        self.expected += len(expected)
        self.found += len(found)
        if not len(expected) or not len(found):
            return
        overlaps = pairwise_iou(expected.pred_boxes, found.pred_boxes)
        overlaps[expected.pred_classes[:, None] != found.pred_classes[None]] = 0
        for index in expected.scores.float().argsort(descending=True).tolist():
            overlap, other = (one.item() for one in overlaps[index].max(0))
            if overlap < _SAME:
                continue
            other = int(other)
            overlaps[:, other] = 0
            self.scores.append(abs(expected.scores[index] - found.scores[other]).item())
            pair = expected.pred_boxes.tensor[index], found.pred_boxes.tensor[other]
            self.boxes.append(torch.sub(*pair).abs().max().item())
            if expected.has("rle") and found.has("rle"):
                iou = mask_util.iou([found.rle[other]], [expected.rle[index]], [0])
                empty = not mask_util.area(expected.rle[index]) + mask_util.area(found.rle[other])
                self.masks.append(1.0 if empty else float(iou[0, 0]))
