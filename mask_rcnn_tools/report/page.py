"""Puts the parts of a report together into one HTML file."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from tqdm import tqdm

from mask_rcnn_tools.report import plots, tables, words
from mask_rcnn_tools.report.analysis.matching import THRESHOLDS
from mask_rcnn_tools.report.comparison import Comparison, require_same_data
from mask_rcnn_tools.report.pictures import Pictures
from mask_rcnn_tools.report.run import Run
from mask_rcnn_tools.report.views import View

# By which a page that may be written over is known.
MARK = '<meta name="generator" content="mask-rcnn-plus report">'
_TEMPLATES = Path(__file__).parent / "templates"


def render(runs: Sequence[Run], *, count: int) -> str:
    """The page of one run, or of two side by side.

    Args:
        runs: one, or two that were evaluated on the same data.
        count: of the images each section shows.

    Raises:
        UserError: two runs were evaluated on different data.
    """
    if len(runs) == 2:
        require_same_data(*runs)
    pictures = Pictures()
    with tqdm(total=4 * len(runs) + 3, desc="page", unit="part", leave=False) as bar:

        def step(part: str) -> None:
            bar.set_postfix_str(part, refresh=False)
            bar.update()

        views = [View(run, pictures, count=count, step=step) for run in runs]
        comparison = None
        step("plots")
        context: dict[str, Any] = _plots(views)
        step("images")
        if len(runs) == 2:
            comparison = Comparison(*views, pictures, count=count)
            context["groups"] = comparison.groups()
        context["examples"] = []
        for view in views:
            images = [] if comparison else view.worst_and_best()
            step("images")
            context["examples"].append(
                {"images": images, "mistakes": view.mistakes(), "missed": view.missed()}
            )
            step("images")
        context |= {
            "views": views,
            "comparison": comparison,
            "overall": tables.overall(runs),
            "errors": {
                words.KINDS[name]: tables.errors([view.splits[name] for view in views])
                for name in ("bbox", "segm")
                if all(name in view.splits for view in views)
            },
            "explained": words.explain_errors(),
            "picture_notes": words.no_pictures(
                pictures.missing, pictures.full, runs[-1].image_root
            ),
            "version": metadata.version("mask-rcnn-plus"),
            "style": (_TEMPLATES / "style.css").read_text(encoding="utf-8"),
            "mark": MARK,
        }
        text = _environment().get_template("page.html.j2").render(context)
        step("done")
    # Lone surrogates of a json's names would have no bytes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _plots(views: Sequence[View]) -> dict[str, Any]:
    shared = [n for n in ("bbox", "segm") if all(n in view.splits for view in views)]
    labels = [view.run.label for view in views]

    def by_run(what: str, name: str) -> dict[str, Any]:
        return {label: getattr(view, what)[name] for label, view in zip(labels, views, strict=True)}

    return {
        "curves": [
            (words.KINDS[n], plots.precision_recall(by_run("curves", n), THRESHOLDS.tolist()))
            for n in shared
        ],
        "class_curves": [
            (view.run.label, words.KINDS[n], plots.class_precision_recall(view.class_curves[n]))
            for view in views
            for n in shared
            if view.class_curves[n]
        ],
        "error_bars": [
            (
                words.KINDS[n],
                plots.error_bars({k: s.parts for k, s in by_run("splits", n).items()}),
            )
            for n in shared
        ],
        "calibrations": [
            (words.KINDS[n], plots.calibration(by_run("calibrations", n))) for n in shared
        ],
    }


def _environment() -> jinja2.Environment:
    # Names of classes and files are whatever a stranger wrote into a json.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        # A run of another version may lack what a newer one notes.
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = tables.number
    return environment
