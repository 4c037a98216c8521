"""The report as one HTML page: what one run contributes, what changed between two, the template."""

from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tqdm import tqdm

from mask_rcnn_plus.engine.curves import panels
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.report import plots, text
from mask_rcnn_tools.report.command import MARK
from mask_rcnn_tools.report.matching import IGNORED, RIGHT, Array
from mask_rcnn_tools.report.metrics import (
    best_threshold,
    by_score,
    calibrate,
    class_curves,
    confusion_matrix,
    image_quality,
    mean_curves,
    split_errors,
)
from mask_rcnn_tools.report.pictures import ERROR_NAMES, Picture, Pictures, detected_objects
from mask_rcnn_tools.report.run import Run

_TEMPLATES = Path(__file__).parent / "templates"
# A matrix of more classes would be wider than any screen.
_MAX_COLUMNS = 12
_MAX_CURVES = 6
_MAX_ROWS = 400
# Smaller changes of an image's quality are rounding errors.
_EPSILON = 1e-9


def render(runs: Sequence[Run], *, count: int) -> str:
    """The page of one run, or of two side by side.

    Args:
        runs: one, or two that were evaluated on the same data.
        count: the number of images in each section.

    Raises:
        UserError: two runs were evaluated on different data.
    """
    if len(runs) == 2:
        _require_same_data(*runs)
    pictures = Pictures()
    reports = [
        RunReport(run, count=count)
        for run in tqdm(runs, "page", unit="run", leave=False, disable=None)
    ]
    # The page's size is limited, so pictures are drawn in the order of the page.
    comparison = None
    if len(runs) == 2:
        comparison = Comparison(reports[0], reports[1], pictures, count=count)
    examples = [] if comparison else reports[0].worst_and_best(pictures)
    mistakes = [(report.mistakes(pictures), report.missed(pictures)) for report in reports]
    # Boxes and masks, as far as all runs have them.
    tasks = [task for task in ("bbox", "segm") if all(task in run.analysis.tasks for run in runs)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        # Names of classes and files come from an untrusted json.
        autoescape=True,
        # The evaluation may be older than some of the facts that the page shows.
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = text.number
    environment.globals["listed"] = text.listed
    page = environment.get_template("page.html.j2").render(
        reports=reports,
        comparison=comparison,
        examples=examples,
        mistakes=mistakes,
        overall=text.overall(runs),
        tasks=[_task_plots(task, reports) for task in tasks],
        class_curves=[
            (report.run.label, text.KINDS[task], plots.class_precision_recall(curves))
            for report in reports
            for task in tasks
            if (curves := report.class_curves[task])
        ],
        error_texts=text.ERROR_TEXTS,
        picture_notes=list(
            text.missing_pictures(pictures.missing, pictures.full, runs[-1].image_root)
        ),
        version=metadata.version("mask-rcnn-plus"),
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        mark=MARK,
    )
    # Names in a json may have lone surrogates, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace").decode("utf-8")


def _task_plots(task: str, reports: Sequence["RunReport"]) -> dict[str, Any]:
    splits = {report.run.label: report.splits[task] for report in reports}
    return {
        "kind": text.KINDS[task],
        "splits": list(splits.values()),
        "curves": plots.precision_recall({r.run.label: r.curves[task] for r in reports}),
        "errors": plots.error_bars({label: split.parts for label, split in splits.items()}),
        "calibration": plots.calibration({r.run.label: r.calibrations[task] for r in reports}),
    }


class RunReport:
    """The page's content about one run; the template reads the attributes."""

    def __init__(self, run: Run, *, count: int) -> None:
        self.run, self._count = run, count
        analysis = run.analysis
        main = analysis.main_task
        self.main_kind = text.KINDS[main]
        self.threshold, self.precision, self.recall, _ = best_threshold(analysis, main)
        self.has_detections = not np.isnan(self.precision)
        self.has_objects = not np.isnan(self.recall)
        self.curves, self.class_curves, self.splits, self.calibrations = {}, {}, {}, {}
        for task, matches in analysis.tasks.items():
            curves = class_curves(analysis, task)
            self.curves[task] = mean_curves(curves)
            self.class_curves[task] = self._some_classes(curves)
            self.splits[task] = split_errors(analysis, task)
            counted = matches.errors != IGNORED
            self.calibrations[task] = calibrate(
                analysis.detections.score[counted], matches.errors[counted] == RIGHT
            )
        matrix = confusion_matrix(analysis, main, self.threshold)
        self.confusion = text.confusions(matrix, analysis.class_names)
        small = len(self.confusion["columns"]) <= _MAX_COLUMNS + 1  # with "nothing"
        self.confusion_map = None if small else plots.confusion_map(matrix)
        self.quality = image_quality(analysis, main, self.threshold)
        self.notes = list(text.notes(run, self.splits[main], self.calibrations[main]))
        self.per_class = text.per_class(run)
        self.training = [
            (panel.title, plots.curves(panel.lines, panel.ylabel)) for panel in panels(run.training)
        ]
        self.data = text.data_rows(run)
        self.sizes = plots.histogram(
            np.sqrt(analysis.truth.area[~analysis.truth.crowd]), "square root of the area in pixels"
        )

    def _some_classes(self, curves: Array) -> dict[str, Array]:
        """Curves at IoU 0.5 of all classes, or of many the best three and the worst three."""
        known = np.flatnonzero(~np.isnan(curves[:, 0, 0]))
        if len(known) < 2:
            return {}
        order = known[np.argsort(-curves[known, 0].mean(axis=1), kind="stable")]
        if len(order) > _MAX_CURVES:
            order = np.concatenate([order[: _MAX_CURVES // 2], order[-_MAX_CURVES // 2 :]])
        return {self.run.analysis.class_names[k]: curves[k, 0] for k in order}

    def file_name(self, image: int) -> str:
        """The name of an image, as in the json."""
        record = self.run.analysis.images[image]
        return str(record.get("file_name", record["id"]))

    def worst_and_best(self, pictures: Pictures) -> list[dict[str, Any]]:
        """The images with the lowest quality, and those with the highest (above 0)."""
        known = np.flatnonzero(~np.isnan(self.quality))
        quality = self.quality[known]
        # If several images have the same quality, those with more objects come first.
        objects = self.run.analysis.truth.per_image(len(self.quality))[known]
        half = min(self._count, (len(known) + 1) // 2)
        worst = known[np.lexsort((-objects, quality))][:half]
        best = known[np.lexsort((-objects, -quality))][: int((quality > 0).sum())]
        best = best[~np.isin(best, worst)][:half]
        groups = {"Worst images": worst, "Best images": best}

        def card(i: int) -> dict[str, Any]:
            panels = [
                ("ground truth", pictures.truth(self.run, i, self.threshold)),
                ("prediction", pictures.detections(self.run, i, self.threshold)),
            ]
            return _card(self.file_name(i), f"quality {self.quality[i]:.2f}", panels)

        return [
            {"title": title, "cards": [card(int(i)) for i in images]}
            for title, images in groups.items()
            if len(images)
        ]

    def mistakes(self, pictures: Pictures) -> list[dict[str, Any]]:
        """The wrong detections with the highest scores."""
        analysis, matches = self.run.analysis, self.run.analysis.main_matches
        names, detections = analysis.class_names, analysis.detections
        cards = []
        for index in map(int, by_score(analysis, matches.errors > RIGHT)[: self._count]):
            error = ERROR_NAMES[int(matches.errors[index])]
            target = int(matches.targets[index])
            name = names[detections.category[index]]
            true_name = names[analysis.truth.category[target]] if target >= 0 else ""
            note = {
                "class": f"{name}, but the object is {true_name}",
                "location": f"{name}, badly placed",
                "both": f"{name}, near an object of another class",
                "duplicate": f"{name}, detected twice",
                "background": f"{name}, but there is no object",
            }[error]
            cards.append(
                {
                    "name": self.file_name(int(detections.image[index])),
                    "note": f"{note} (score {detections.score[index]:.2f}, {error} error)",
                    "picture": pictures.mistake(self.run, index),
                }
            )
        return cards

    def missed(self, pictures: Pictures) -> list[dict[str, Any]]:
        """The largest objects that no detection above the threshold matches."""
        analysis, matches = self.run.analysis, self.run.analysis.main_matches
        truth, detections, names = analysis.truth, analysis.detections, analysis.class_names
        missed = np.flatnonzero(~detected_objects(self.run, self.threshold) & ~truth.crowd)
        order = missed[np.argsort(-truth.area[missed], kind="stable")]
        cards = []
        for index in map(int, order[: self._count]):
            match, wrong = matches.matched_by[index], np.flatnonzero(matches.targets == index)
            if match >= 0:
                why = f"its detection has a score of only {detections.score[match]:.2f}"
            elif not len(wrong):
                why = "no detection there"
            elif ERROR_NAMES[int(matches.errors[wrong[0]])] == "class":
                why = f"detected as {names[detections.category[wrong[0]]]}"
            else:
                why = "detected, but badly placed"
            name, area = names[truth.category[index]], truth.area[index]
            cards.append(
                {
                    "name": self.file_name(int(truth.image[index])),
                    "note": f"{name}, {area:.0f} pixels: {why}",
                    "picture": pictures.missed(self.run, index, self.threshold),
                }
            )
        return cards


class Comparison:
    """The changes from one run to the other; the template reads the attributes."""

    def __init__(
        self, before: RunReport, after: RunReport, pictures: Pictures, *, count: int
    ) -> None:
        # An image without objects and detections is perfect.
        quality = [np.nan_to_num(report.quality, nan=1.0) for report in (before, after)]
        change = quality[1] - quality[0]
        first, second = (detected_objects(r.run, r.threshold) for r in (before, after))
        image = before.run.analysis.truth.image
        gained = np.bincount(image[second & ~first], minlength=len(change))
        lost = np.bincount(image[first & ~second], minlength=len(change))
        better, worse = int((change > _EPSILON).sum()), int((change < -_EPSILON).sum())
        new = "1 object" if gained.sum() == 1 else f"{gained.sum()} objects"
        self.sentences = [
            f"Of {len(change)} images, {after.run.label} is better on {better}, worse on {worse}, "
            f"and equal on {len(change) - better - worse}.",
            f"It finds {new} that {before.run.label} misses, and misses {lost.sum()} that "
            f"{before.run.label} finds.",
        ]
        self.config = text.config_changes(before.run, after.run)
        self.classes = text.per_class_changes(before.run, after.run)
        # The images with their changes, the largest change first.
        order = np.argsort(-np.abs(change), kind="stable")
        changed = [int(i) for i in order if abs(change[i]) > _EPSILON]
        self.left_out = max(0, len(changed) - _MAX_ROWS)
        self.rows = []
        for i in changed[:_MAX_ROWS]:
            values = f"{quality[0][i]:.2f}", f"{quality[1][i]:.2f}", f"{change[i]:+.2f}"
            self.rows.append((before.file_name(i), [*values, str(gained[i]), str(lost[i])]))

        def card(i: int) -> dict[str, Any]:
            panels = [("ground truth", pictures.truth(after.run, i, after.threshold))]
            for report in (before, after):
                picture = pictures.detections(report.run, i, report.threshold)
                panels.append((report.run.label, picture))
            note = (
                f"quality {quality[0][i]:.2f} to {quality[1][i]:.2f}; "
                f"{gained[i]} newly found, {lost[i]} no longer found"
            )
            return _card(before.file_name(i), note, panels)

        order = np.argsort(-change, kind="stable")
        improved = [card(int(i)) for i in order[:count] if change[i] > _EPSILON]
        worsened = [card(int(i)) for i in order[::-1][:count] if change[i] < -_EPSILON]
        self.groups = [
            {"title": "Improved images", "cards": improved, "none": "No image improved."},
            {"title": "Worsened images", "cards": worsened, "none": "No image got worse."},
        ]


def _card(name: str, note: str, panels: Iterable[tuple[str, Picture | None]]) -> dict[str, Any]:
    return {
        "name": name,
        "note": note,
        "panels": [(title, picture) for title, picture in panels if picture is not None],
    }


def _require_same_data(before: Run, after: Run) -> None:
    first, second = before.analysis, after.analysis
    same = (
        [i["id"] for i in first.images] == [i["id"] for i in second.images]
        and first.class_names == second.class_names
        and np.array_equal(first.truth.box, second.truth.box)
        and np.array_equal(first.truth.category, second.truth.category)
    )
    if not same:
        raise UserError(
            f"'{before.folder}' was evaluated on {before.json_file} and '{after.folder}' on "
            f"{after.json_file}; these differ in images, classes or objects: evaluate both runs "
            "on the same data"
        )
