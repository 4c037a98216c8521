"""Reads the files that an evaluated run has left in its folder."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from mask_rcnn_plus.data.coco_json import read_coco_json
from mask_rcnn_plus.data.mask_rules import mask_fault
from mask_rcnn_plus.errors import UserError, did_you_mean, reason
from mask_rcnn_plus.evaluation.metrics import read_summary
from mask_rcnn_tools.report.matching import Analysis, analyse

_AGAIN = "evaluate again with train_net.py --eval-only"
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
# Far more than a mask of the largest image needs.
_MAX_DETECTION = 1 << 28


@dataclass(frozen=True)
class Run:
    """One evaluation, and the training before it. Contents of missing files are empty."""

    folder: Path  # the OUTPUT_DIR
    label: str  # the run's name on the page
    data_set: str  # of the evaluation
    analysis: Analysis  # compares the detections with the ground truth
    image_root: Path
    json_file: Path  # the ground truth
    metrics: Mapping[str, Any]  # metrics.json: task -> metric -> value; also "speed"
    summary: list[dict[str, Any]]  # the rows of summary.csv
    facts: Mapping[str, Any]  # evaluation.json
    config: str  # YAML
    settings: Mapping[str, Any]  # the config's full keys and their values
    training: list[dict[str, Any]]  # one mapping per logged iteration, in order
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
    results = _results_folder(folder, data_set)
    facts = _read_json(results / "evaluation.json")
    json_file = json_file or _noted_path(facts, "json_file")
    if json_file is None:
        raise UserError(
            f"{results} does not say which data it was evaluated on: {_AGAIN}, or give --json-file "
            "and --image-root"
        )
    if not json_file.is_file():
        raise UserError(
            f"the ground truth '{json_file}' of {folder} is missing: give --json-file and "
            "--image-root"
        )
    config = facts.get("config") or _read_text(folder / "config.yaml")
    settings = _settings(config)
    limit = facts.get("detections_per_image", settings.get("TEST.DETECTIONS_PER_IMAGE"))
    limit = limit if isinstance(limit, int) else 100
    summary = _summary(results / "summary.csv")
    max_dets = max([100, limit, *(row["max_dets"] for row in summary if row["task"] == "bbox")])
    ground_truth = read_coco_json(json_file)
    analysis = analyse(
        ground_truth,
        _checked_results(results / "coco_instances_results.json", ground_truth),
        max_dets=10**9 if limit < 0 else max_dets,
        label=label,
    )
    return Run(
        folder=folder,
        label=label,
        data_set=str(facts.get("data_set") or data_set or results.name),
        analysis=analysis,
        image_root=image_root or _noted_path(facts, "image_root") or json_file.parent,
        json_file=json_file,
        metrics=_read_json(results / "metrics.json"),
        summary=summary,
        facts=facts,
        config=config,
        settings=settings,
        training=_training(folder / "metrics.json"),
        limit=limit,
    )


def _results_folder(folder: Path, data_set: str | None) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no run '{folder}'")
    inference = folder / "inference"
    names = sorted(path.parent.name for path in inference.glob("*/coco_instances_results.json"))
    if data_set is not None and names and data_set not in names:
        hint = did_you_mean(data_set, names) or f"; known test sets: {', '.join(names)}"
        raise UserError(f"'{folder}' was not evaluated on '{data_set}'{hint}")
    if len(names) > 1 and data_set is None:
        raise UserError(f"'{folder}' was evaluated on {', '.join(names)}: choose one with --data")
    if names:
        return inference / (data_set or names[0])
    if (inference / "coco_instances_results.json").is_file():  # as detectron2's tools write it
        return inference
    raise UserError(
        f"'{folder}' has no inference/*/coco_instances_results.json: name the OUTPUT_DIR of a run "
        "that train_net.py has evaluated"
    )


def _checked_results(path: Path, ground_truth: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The detections of a file, after a check that pycocotools can process them."""
    sizes = {i["id"]: [i["height"], i["width"]] for i in ground_truth["images"]}
    for entry in read_results(path):
        if fault := _fault(entry, sizes):
            raise UserError(f"{path}: a detection {fault}; {_AGAIN}")
        yield entry


def _fault(entry: Mapping[str, Any], sizes: Mapping[Any, list[int]]) -> str:
    try:
        size = sizes.get(entry["image_id"])
        numbers = [entry["score"], *(entry.get("bbox") or [0.0] * 4)]
        hash(entry["category_id"])
    except (KeyError, TypeError):
        return "lacks image_id, category_id or score"
    if len(numbers) != 5 or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        return "has a score or bbox that is not a finite number"
    mask = entry.get("segmentation")
    if mask is not None and not isinstance(mask, dict):
        return "has a segmentation that is not a run-length encoding"
    return mask_fault(mask, size) if mask and size else ""


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Reads detections in COCO's result format, with only a few MiB in memory at a time.

    Raises:
        UserError: the file is missing, or is not a json list of objects.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _objects(file, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the detections in {path}: {reason(error)}") from error


def _objects(file: IO[str], size: int) -> Iterator[dict[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    text, position = "", 0

    def fill() -> bool:
        nonlocal text, position
        chunk = file.read(_CHUNK)
        bar.update(len(chunk))
        text, position = text[position:] + chunk, 0
        return bool(chunk)

    def next_character() -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        nonlocal position
        while True:
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            if position < len(text):
                return text[position]
            if not fill():
                return ""

    def consume(expected: str) -> None:
        nonlocal position
        if next_character() != expected:
            raise ValueError(f"expected '{expected}' in a list of detections")
        position += 1

    with tqdm(
        total=size, desc="reading", unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        consume("[")
        if next_character() == "]":
            return
        while True:
            if next_character() != "{":
                raise ValueError("expected a json object for each detection")
            while True:
                try:
                    entry, position = decode(text, position)
                    break
                except json.JSONDecodeError:
                    # Double the text each time, so that a long entry is not decoded too often.
                    length = len(text) - position
                    while len(text) - position < 2 * length and length < _MAX_DETECTION and fill():
                        pass
                    if len(text) - position == length:
                        raise
            yield entry
            if next_character() == "]":
                return
            consume(",")


def _noted_path(facts: Mapping[str, Any], key: str) -> Path | None:
    return Path(facts[key]) if isinstance(facts.get(key), str) else None


def _summary(path: Path) -> list[dict[str, Any]]:
    try:
        return read_summary(path)
    except (OSError, ValueError, TypeError):
        return []


def _settings(config: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    return dict(_flat(tree)) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _training(path: Path) -> list[dict[str, Any]]:
    """The logged iterations; if a resumed run repeated an iteration, its last line counts."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _read_text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            rows.setdefault(row["iteration"], {}).update(row)
    return [rows[iteration] for iteration in sorted(rows)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
