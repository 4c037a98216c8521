"""Reads the folder of an evaluated run."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mask_rcnn_plus.data.coco_json import read_coco_json
from mask_rcnn_plus.data.mask_rules import is_number
from mask_rcnn_plus.engine.curves import read_metrics
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.report import files
from mask_rcnn_tools.report.detections import EVALUATE_AGAIN, checked_results
from mask_rcnn_tools.report.folders import results_folder
from mask_rcnn_tools.report.matching import Analysis, analyse


@dataclass(frozen=True)
class Run:
    """One evaluation, and the training before it. Contents of missing files are empty."""

    folder: Path  # the OUTPUT_DIR
    label: str  # the run's name on the page
    data_set: str  # the folder's name, because a name in a file could lead out of the folder
    analysis: Analysis  # compares the detections with the ground truth
    image_root: Path
    json_file: Path  # the ground truth
    metrics: files.Metrics
    summary: list[dict[str, Any]]  # the rows of summary.csv
    evaluation: files.Evaluation
    config: str  # YAML
    settings: Mapping[str, Any]  # the config's full keys and their values
    training: list[dict[str, float]]  # one mapping per logged iteration, in order
    limit: int  # of detections per image; negative means no limit


def read_run(
    folder: Path,
    *,
    label: str,
    data_set: str | None = None,
    json_file: Path | None = None,
    image_root: Path | None = None,
) -> Run:
    """Reads a run and compares its detections with the ground truth.

    Args:
        folder: the OUTPUT_DIR.
        label: the run's name on the page.
        data_set: one of its test sets; None if it has only one.
        json_file, image_root: replace the paths that the evaluation has noted.

    Raises:
        UserError: the folder has no evaluation, or its data is missing.
    """
    results = results_folder(folder, data_set)
    evaluation = files.read_json(results / "evaluation.json", files.Evaluation)
    if json_file is None and not evaluation.json_file:
        raise UserError(
            f"{results} does not say which data it was evaluated on: {EVALUATE_AGAIN}, or give "
            "--json-file and --image-root"
        )
    json_file = json_file or Path(evaluation.json_file)
    if not json_file.is_file():
        raise UserError(
            f"the ground truth '{json_file}' of {folder} is missing: give --json-file and "
            "--image-root"
        )
    config = evaluation.config or files.read_text(folder / "config.yaml")
    settings = files.read_settings(config, f"the config of {folder}")
    limit = evaluation.detections_per_image
    if limit is None:
        default = settings.get("TEST.DETECTIONS_PER_IMAGE")
        limit = int(default) if is_number(default) else 100
    summary = files.read_summary(results / "summary.csv")
    max_dets = max([100, limit, *(row["max_dets"] for row in summary if row["task"] == "bbox")])
    ground_truth = read_coco_json(json_file)
    for annotation in ground_truth["annotations"]:
        if not files.is_box(annotation["bbox"]):
            where = f"{json_file}: the bbox of annotation {annotation['id']!r}"
            raise UserError(f"{where} is {reprlib.repr(annotation['bbox'])}: out of range")
    analysis = analyse(
        ground_truth,
        checked_results(results / "coco_instances_results.json", ground_truth),
        max_dets=10**9 if limit < 0 else max_dets,
        label=label,
    )
    return Run(
        folder=folder,
        label=label,
        data_set=results.name,
        analysis=analysis,
        image_root=image_root or Path(evaluation.image_root or json_file.parent),
        json_file=json_file,
        metrics=files.read_json(results / "metrics.json", files.Metrics),
        summary=summary,
        evaluation=evaluation,
        config=config,
        settings=settings,
        training=read_metrics(files.read_text(folder / "metrics.json")),
        limit=limit,
    )
