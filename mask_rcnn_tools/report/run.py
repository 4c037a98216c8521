"""What an evaluated run has left in its folder."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mask_rcnn_plus.data.coco_json import read_coco_json, refuse_harmful_masks
from mask_rcnn_plus.data.mask_rules import segmentation_fault
from mask_rcnn_plus.errors import UserError, did_you_mean
from mask_rcnn_plus.evaluation.metrics import read_summary
from mask_rcnn_tools.report.analysis import Findings, analyse, read_results

_AGAIN = "evaluate again with train_net.py --eval-only"


@dataclass(frozen=True)
class Run:
    """One evaluation, and the training before it as far as it is known.

    Attributes:
        folder: the run's OUTPUT_DIR.
        label: what it is called on the page.
        data_set: that it was evaluated on.
        findings: from its detections and the ground truth.
        image_root: the folder of the images.
        json_file: of the ground truth.
        figures: metrics.json: task -> figure -> value; "speed" as well.
        summary: the rows of summary.csv; empty where there is none.
        facts: evaluation.json; empty where there is none.
        config: YAML text; "" where there is none.
        training: one mapping a logged iteration, by iteration; empty where there is none.
        limit: how many detections an image may have, negative for no limit.
    """

    folder: Path
    label: str
    data_set: str
    findings: Findings
    image_root: Path
    json_file: Path
    figures: Mapping[str, Any]
    summary: list[dict[str, Any]]
    facts: Mapping[str, Any]
    config: str
    training: list[dict[str, Any]]
    limit: int

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config's keys and values; empty where it cannot be read."""
        try:
            tree = yaml.safe_load(self.config) or {}
        except yaml.YAMLError:
            return {}
        return dict(_flat(tree)) if isinstance(tree, dict) else {}


def read_run(
    folder: Path,
    *,
    label: str,
    data_set: str | None,
    json_file: Path | None,
    image_root: Path | None,
) -> Run:
    """Reads a run and compares its detections with the ground truth.

    Args:
        folder: the run's OUTPUT_DIR.
        label: what it is called on the page.
        data_set: which of its test sets; None where it has one alone.
        json_file, image_root: instead of what the evaluation has noted.

    Raises:
        UserError: it is no run, was not evaluated, or its data are gone.
    """
    results = _results_folder(folder, data_set)
    facts = _read_json(results / "evaluation.json") or {}
    json_file = json_file or _noted(facts, "json_file")
    if json_file is None:
        raise UserError(
            f"{results} does not say what it was evaluated on: {_AGAIN}, or give --json-file and "
            "--image-root"
        )
    if not json_file.is_file():
        raise UserError(
            f"the ground truth '{json_file}' of {folder} is not there: give --json-file and "
            "--image-root"
        )
    image_root = image_root or _noted(facts, "image_root") or json_file.parent
    figures = _read_json(results / "metrics.json") or {}
    config = facts.get("config") or _read_text(folder / "config.yaml")
    summary = _summary(results / "summary.csv")
    limit = facts.get("detections_per_image", _from_config(config))
    max_dets = max([100, limit, *(row["max_dets"] for row in summary if row["task"] == "bbox")])
    ground_truth = read_coco_json(json_file)
    refuse_harmful_masks(json_file)
    name = str(facts.get("data_set") or data_set or results.name)
    with tqdm(total=len(ground_truth["images"]), desc=label, unit="image", leave=False) as bar:
        findings = analyse(
            ground_truth,
            _detections(results / "coco_instances_results.json", ground_truth),
            max_dets=10**9 if limit < 0 else max_dets,
            progress=bar.update,
        )
    return Run(
        folder=folder,
        label=label,
        data_set=name,
        findings=findings,
        image_root=image_root,
        json_file=json_file,
        figures=figures,
        summary=summary,
        facts=facts,
        config=config,
        training=_training(folder / "metrics.json"),
        limit=limit,
    )


def _results_folder(folder: Path, data_set: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no run '{folder}'")
    inference = folder / "inference"
    names = sorted(path.parent.name for path in inference.glob("*/coco_instances_results.json"))
    if data_set is not None and data_set not in names and names:
        hint = did_you_mean(data_set, names) or f"; there is {', '.join(names)}"
        raise UserError(f"'{folder}' was not evaluated on '{data_set}'{hint}")
    if names and data_set is None and len(names) > 1:
        raise UserError(f"'{folder}' was evaluated on {', '.join(names)}: give one as --data")
    if names:
        return inference / (data_set or names[0])
    if (inference / "coco_instances_results.json").is_file():  # where detectron2's tools write it
        return inference
    raise UserError(
        f"'{folder}' has no inference/*/coco_instances_results.json: name the OUTPUT_DIR of a run "
        "that train_net.py has evaluated"
    )


def _detections(path: Path, ground_truth: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that pycocotools can be given."""
    sizes = {i["id"]: [i["height"], i["width"]] for i in ground_truth["images"]}
    with tqdm(total=100, desc="reading", unit="%", leave=False) as bar:
        for entry, share in read_results(path):
            bar.update(int(100 * share) - bar.n)
            fault = _fault(entry, sizes)
            if fault:
                raise UserError(f"{path}: a detection {fault}; {_AGAIN}")
            yield entry


def _fault(entry: Mapping[str, Any], sizes: Mapping[Any, list[int]]) -> str:
    try:
        size = sizes.get(entry["image_id"])
        numbers = [entry["score"], *(entry.get("bbox") or [0.0] * 4)]
        _ = hash(entry["category_id"])
    except (KeyError, TypeError):
        return "lacks image_id, category_id or score"
    if len(numbers) != 5 or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        return "has a score or box that is no finite number"
    mask = entry.get("segmentation")
    if mask is not None and not isinstance(mask, dict):
        return "has a mask that is no run length encoding"
    return segmentation_fault(mask, size) if mask and size else ""


def _noted(facts: Mapping[str, Any], key: str) -> Path | None:
    return Path(facts[key]) if isinstance(facts.get(key), str) else None


def _summary(path: Path) -> list[dict[str, Any]]:
    try:
        return read_summary(path)
    except (OSError, ValueError, TypeError):
        return []


def _from_config(config: str) -> int:
    try:
        return int(yaml.safe_load(config)["TEST"]["DETECTIONS_PER_IMAGE"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return 100


def _training(path: Path) -> list[dict[str, Any]]:
    """The logged iterations; of one that a resumed run did again, the last."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _read_text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            rows.setdefault(row["iteration"], {}).update(row)
    return [rows[iteration] for iteration in sorted(rows)]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(_read_text(path))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
