"""Two runs on the same images: what improved and what broke, image by image."""

from typing import Any

import numpy as np

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.report import tables
from mask_rcnn_tools.report.analysis import Findings
from mask_rcnn_tools.report.pictures import Pictures
from mask_rcnn_tools.report.run import Run
from mask_rcnn_tools.report.views import View

_MOST_ROWS = 400


def require_same_data(before: Run, after: Run) -> None:
    """Refuses two runs that were not evaluated on the same objects.

    Raises:
        UserError: they were not.
    """
    first, second = before.findings, after.findings
    same = (
        [i["id"] for i in first.images] == [i["id"] for i in second.images]
        and list(first.class_names) == list(second.class_names)
        and len(first.truth) == len(second.truth)
        and bool((first.truth.box == second.truth.box).all())
        and bool((first.truth.category == second.truth.category).all())
    )
    if not same:
        raise UserError(
            f"'{before.folder}' was evaluated on {before.json_file} and '{after.folder}' on "
            f"{after.json_file}, whose images, classes or objects differ: evaluate both on one"
        )


class Comparison:
    """What changed from one run to the other; names are those that the template reads.

    Args:
        before, after: the runs; qualities are at each one's own threshold.
        pictures: draws what it shows.
        count: of the images each section shows.
    """

    def __init__(self, before: View, after: View, pictures: Pictures, *, count: int) -> None:
        self._before, self._after = before, after
        self._pictures, self._count = pictures, count
        # An image where nothing is, and nothing is found, is as it should be.
        quality = [np.nan_to_num(view.quality, nan=1.0) for view in (before, after)]
        self._quality = quality
        self._change = quality[1] - quality[0]
        gained = _found(after.run.findings, after) & ~_found(before.run.findings, before)
        lost = _found(before.run.findings, before) & ~_found(after.run.findings, after)
        truth, images = before.run.findings.truth, len(before.run.findings.images)
        self._gained = np.bincount(truth.image[gained], minlength=images)
        self._lost = np.bincount(truth.image[lost], minlength=images)
        better, worse = (self._change > 1e-9).sum(), (self._change < -1e-9).sum()
        new = "1 object" if gained.sum() == 1 else f"{gained.sum()} objects"
        self.sentences = [
            f"{after.run.label} is better on {better} images, worse on {worse}, and as good on "
            f"{images - better - worse}.",
            f"It finds {new} that {before.run.label} does not, and no longer finds {lost.sum()}.",
        ]
        self.config = tables.config_changes(before.run, after.run)
        self.classes = tables.per_class_changes(before.run, after.run)

    def groups(self) -> list[dict[str, Any]]:
        """The images that improved most, and those that broke most, each with three pictures."""
        order = np.argsort(-self._change, kind="stable")
        improved = [i for i in order[: self._count] if self._change[i] > 1e-9]
        broke = [i for i in order[::-1][: self._count] if self._change[i] < -1e-9]
        return [
            {"title": title, "none": none, "images": [self._card(int(i)) for i in images]}
            for title, none, images in (
                ("What improved", "No image improved.", improved),
                ("What broke", "No image got worse.", broke),
            )
        ]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Image by image, the largest change first: quality before, after, change, objects."""
        order = np.argsort(-np.abs(self._change), kind="stable")
        changed = [int(i) for i in order if abs(self._change[i]) > 1e-9][:_MOST_ROWS]
        return [
            (
                self._before.file_name(i),
                [
                    f"{self._quality[0][i]:.2f}",
                    f"{self._quality[1][i]:.2f}",
                    f"{self._change[i]:+.2f}",
                    str(self._gained[i]),
                    str(self._lost[i]),
                ],
            )
            for i in changed
        ]

    def left_out(self) -> int:
        """How many images that changed have no row."""
        return max(0, int((np.abs(self._change) > 1e-9).sum()) - _MOST_ROWS)

    def _card(self, image: int) -> dict[str, Any]:
        before, after = self._before, self._after
        panels = [
            ("there", self._pictures.truth(after.run, image, after.threshold)),
            (before.run.label, self._pictures.found(before.run, image, before.threshold)),
            (after.run.label, self._pictures.found(after.run, image, after.threshold)),
        ]
        return {
            "name": before.file_name(image),
            "note": f"quality {self._quality[0][image]:.2f} to {self._quality[1][image]:.2f}; "
            f"{self._gained[image]} newly found, {self._lost[image]} no longer",
            "panels": [(title, picture) for title, picture in panels if picture is not None],
        }


def _found(findings: Findings, view: View) -> np.ndarray:
    by = findings.tasks[view.main].found_by
    if not len(findings.detections):
        return np.zeros(len(by), bool)
    return (by >= 0) & (findings.detections.score[by] >= view.threshold)
