"""One run as the page shows it: figures, plots and the images worth a look."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mask_rcnn_tools.report import plots, tables, words
from mask_rcnn_tools.report.analysis import (
    average_precisions,
    best_threshold,
    calibrate,
    class_curves,
    confusion_matrix,
    image_quality,
    mean_curves,
    split_errors,
)
from mask_rcnn_tools.report.pictures import ERROR_NAMES, Pictures
from mask_rcnn_tools.report.run import Run

# A matrix of more classes would be wider than any screen.
_MOST_COLUMNS = 12
_CURVES_OF_CLASSES = 6


class View:
    """The parts of the page that one run fills; names are those that the template reads.

    Args:
        run: the run.
        pictures: draws what it shows.
        count: of the images a section shows.
        step: called before each part of the work.
    """

    def __init__(
        self, run: Run, pictures: Pictures, *, count: int, step: Callable[[str], None]
    ) -> None:
        self.run, self._pictures, self._count = run, pictures, count
        findings = run.findings
        self.main = findings.main_task
        self.main_kind = words.KINDS[self.main]
        self.threshold, self.precision, self.recall, self.f1 = best_threshold(findings, self.main)
        self.found_any, self.any_there = (not np.isnan(p) for p in (self.precision, self.recall))
        step("precision")
        self.curves = {}
        self.class_curves = {}
        for name in findings.tasks:
            table = class_curves(findings, name)
            self.curves[name] = mean_curves(table)
            self.class_curves[name] = self._of_classes(table)
        step("errors")
        self.splits = {name: split_errors(findings, name) for name in findings.tasks}
        self.calibrations = {}
        for name, task in findings.tasks.items():
            counts = task.error >= 0
            scores, right = findings.detections.score[counts], task.error[counts] == 0
            self.calibrations[name] = calibrate(scores, right)
        matrix = confusion_matrix(findings, self.main, self.threshold)
        self.confusion = tables.confusions(matrix, findings.class_names)
        small = len(findings.class_names) <= _MOST_COLUMNS
        self.confusion_map = None if small else plots.confusion_map(matrix)
        self.quality = image_quality(findings, findings.tasks[self.main], self.threshold)
        self.notes = [
            *words.missing_figures(run),
            *words.found_nothing(run),
            *words.detection_limit(run),
            *words.habits(
                self.splits[self.main], self.calibrations[self.main], words.KINDS[self.main]
            ),
        ]
        self.per_class = tables.per_class(run)
        self.training = _training_plots(run)
        self.data = _data_rows(run)
        self.sizes = plots.histogram(
            np.sqrt(findings.truth.area[~findings.truth.crowd]), "root of the area in pixels"
        )

    def _of_classes(self, table: np.ndarray) -> dict[str, np.ndarray]:
        """The first classes by name, or of many the best and the worst three."""
        names = self.run.findings.class_names
        known = np.flatnonzero(~np.isnan(table[:, 0, 0]))
        if len(known) < 2:
            return {}
        order = known[np.argsort(-table[known, 0].mean(axis=1), kind="stable")]
        if len(order) > _CURVES_OF_CLASSES:
            half = _CURVES_OF_CLASSES // 2
            order = np.concatenate([order[:half], order[-half:]])
        return {names[k]: table[k, 0] for k in order}

    def class_ap50(self) -> float:
        """The mean AP50 of the main task, from 0 to 100; for tests and the title."""
        values = average_precisions(self.run.findings, self.main)[:, 0]
        return float(100 * np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def worst_and_best(self) -> list[dict[str, Any]]:
        """The images of the lowest quality, then those of the highest above 0; none twice."""
        known = np.flatnonzero(~np.isnan(self.quality))
        truth, quality = self.run.findings.truth, self.quality[known]
        there = np.bincount(truth.image[~truth.crowd], minlength=len(self.quality))[known]
        # Of images as good, those that show more.
        worst = known[np.lexsort((-there, quality))]
        best = known[np.lexsort((-there, -quality))][: int((quality > 0).sum())]
        half = min(self._count, (len(known) + 1) // 2)
        worst = worst[:half]
        groups = [
            {"title": "Worst images", "images": worst},
            {"title": "Best images", "images": best[~np.isin(best, worst)][:half]},
        ]
        return [{**g, "images": self._cards(g["images"])} for g in groups if len(g["images"])]

    def _cards(self, images: Sequence[int]) -> list[dict[str, Any]]:
        cards = []
        for image in map(int, images):
            panels = [
                ("there", self._pictures.truth(self.run, image, self.threshold)),
                ("found", self._pictures.found(self.run, image, self.threshold)),
            ]
            cards.append(
                {
                    "name": self.file_name(image),
                    "note": f"quality {self.quality[image]:.2f}",
                    "panels": [(title, p) for title, p in panels if p is not None],
                }
            )
        return cards

    def file_name(self, image: int) -> str:
        """Of an image, as the json says."""
        record = self.run.findings.images[image]
        return str(record.get("file_name", record["id"]))

    def mistakes(self) -> list[dict[str, Any]]:
        """The wrong detections of the highest scores."""
        findings, task = self.run.findings, self.run.findings.tasks[self.main]
        wrong = np.flatnonzero(task.error > 0)
        order = wrong[np.argsort(-findings.detections.score[wrong], kind="stable")][: self._count]
        cards = []
        for index in map(int, order):
            kind = ERROR_NAMES[int(task.error[index])]
            called = findings.class_names[findings.detections.category[index]]
            target = int(task.target[index])
            really = findings.class_names[findings.truth.category[target]] if target >= 0 else ""
            note = {
                "class": f"{called}, and there is {really}",
                "location": f"{called}, badly placed",
                "both": f"{called}, near an object of another class",
                "duplicate": f"{called}, found twice",
                "background": f"{called}, and there is nothing",
            }[kind]
            score = findings.detections.score[index]
            cards.append(
                {
                    "name": self.file_name(int(findings.detections.image[index])),
                    "note": f"{note} (score {score:.2f}, {kind} error)",
                    "picture": self._pictures.detection(self.run, index),
                }
            )
        return cards

    def missed(self) -> list[dict[str, Any]]:
        """The largest objects that no detection above the threshold has found."""
        findings, task = self.run.findings, self.run.findings.tasks[self.main]
        truth, detections = findings.truth, findings.detections
        by = task.found_by
        scores = np.where(by >= 0, detections.score[by] if len(detections) else 0.0, -1.0)
        lost = np.flatnonzero((scores < self.threshold) & ~truth.crowd)
        order = lost[np.argsort(-truth.area[lost], kind="stable")][: self._count]
        wrongly: dict[int, int] = {}
        for index in np.flatnonzero(task.target >= 0):
            wrongly.setdefault(int(task.target[index]), int(index))
        cards = []
        for index in map(int, order):
            if scores[index] >= 0:
                why = f"found with a score of {scores[index]:.2f} alone"
            elif index in wrongly:
                other = wrongly[index]
                error = ERROR_NAMES[int(task.error[other])]
                called = findings.class_names[detections.category[other]]
                why = f"taken for {called}" if error == "class" else "found, but badly placed"
            else:
                why = "nothing was found there"
            cards.append(
                {
                    "name": self.file_name(int(truth.image[index])),
                    "note": f"{findings.class_names[truth.category[index]]}, "
                    f"{truth.area[index]:.0f} pixels: {why}",
                    "picture": self._pictures.missed(self.run, index, self.threshold),
                }
            )
        return cards


def _training_plots(run: Run) -> list[tuple[str, str]]:
    """(title, plot) of what the training has logged."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in run.training:
        for key, value in row.items():
            if isinstance(value, int | float) and np.isfinite(value):
                x, y = series.setdefault(key, ([], []))
                x.append(row["iteration"])
                y.append(value)
    losses = [k for k in series if "loss" in k.lower()]
    training = sorted(
        (k for k in losses if "val" not in k.lower()), key=lambda k: k != "total_loss"
    )
    figures = [k for k in series if k.endswith("/AP") and len(series[k][0]) > 1]
    groups = {
        "Training losses": ("loss", training),
        "Validation losses": ("loss", [k for k in losses if "val" in k.lower()]),
        "AP in the course of the training": ("AP", figures),
        "Learning rate": ("learning rate", [k for k in ("lr",) if k in series]),
    }
    return [
        (title, plots.curves({k: series[k] for k in keys}, ylabel))
        for title, (ylabel, keys) in groups.items()
        if keys
    ]


def _data_rows(run: Run) -> list[tuple[str, str]]:
    findings = run.findings
    truth, images = findings.truth, findings.images
    counted = ~truth.crowd
    per_image = np.bincount(truth.image[counted], minlength=len(images))
    area = truth.area[counted]
    sides = [(int(i["width"]), int(i["height"])) for i in images]
    rows = [
        ("data set", run.data_set),
        ("images", str(len(images))),
        ("objects", str(int(counted.sum()))),
        ("classes", str(len(findings.class_names))),
        ("crowds (not counted)", str(int(truth.crowd.sum()))),
        ("images without objects", str(int((per_image == 0).sum()))),
    ]
    if len(images):
        most = f"{per_image.mean():.1f} on average, {int(per_image.max())} at most"
        rows.append(("objects an image", most))
        low, high = min(sides, key=np.prod), max(sides, key=np.prod)
        size = f"{low[0]} x {low[1]}"
        rows.append(("image size", size if low == high else f"{size} to {high[0]} x {high[1]}"))
    if len(area):
        shares = [
            100 * float(part.mean())
            for part in (area < 32**2, (area >= 32**2) & (area < 96**2), area >= 96**2)
        ]
        rows.append(("small, medium, large", ", ".join(f"{share:.0f} %" for share in shares)))
    train = run.settings.get("DATASETS.TRAIN")
    if train:
        names = train if isinstance(train, list | tuple) else [train]
        rows.append(("trained on", ", ".join(map(str, names))))
    return rows
