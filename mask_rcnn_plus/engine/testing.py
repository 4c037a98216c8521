"""The evaluation of a run's test sets: figures, speed, and all that a report of them needs."""

import json
import logging
import platform
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, print_csv_format
from detectron2.utils import comm
from torch.utils.data import DataLoader

from mask_rcnn_plus.data.build import leave_out
from mask_rcnn_plus.engine.fingerprint import evaluation_fingerprint
from mask_rcnn_plus.evaluation import InferenceSpeed, Journal, run_inference

logger = logging.getLogger(__name__)


def inference_folder(cfg: CfgNode, dataset_name: str) -> Path:
    """Where the results on a test set lie."""
    return Path(cfg.OUTPUT_DIR) / "inference" / dataset_name


def evaluate_all(
    cfg: CfgNode,
    model: torch.nn.Module,
    evaluators: Sequence[DatasetEvaluator],
    build_loader: Callable[[CfgNode, str], DataLoader],
) -> dict[str, Any]:
    """Evaluates on every data set of DATASETS.TEST and logs the figures and the speed.

    Into ``OUTPUT_DIR/inference/<data set>`` go metrics.json (the figures and the speed),
    evaluation.json (what was evaluated, on what, by which versions) and what the evaluators write.

    Args:
        cfg: the config.
        model: a model that holds the weights to evaluate.
        evaluators: one for each data set.
        build_loader: of the batches of a data set.

    Returns:
        of the main process: task -> metric -> value for a single data set, else the same below
        each data set's name. Of others: empty dicts.
    """
    names = cfg.DATASETS.TEST
    results: OrderedDict[str, Any] = OrderedDict()
    for name, evaluator in zip(names, evaluators, strict=True):
        folder = inference_folder(cfg, name)
        loader = build_loader(cfg, name)
        loader, journal = _go_on(cfg, model, name, loader, evaluator)
        results[name], speed = run_inference(model, loader, evaluator, dataset_name=name)
        if comm.is_main_process():
            logger.info(f"Evaluation results for {name} in csv format:")
            print_csv_format(results[name])
            logger.info(f"Speed on {name}:\n{speed.table()}")
            _write(folder, cfg, name, results[name], speed)
        if journal is not None:
            journal.remove()
    return results[names[0]] if len(names) == 1 else results


def _go_on(
    cfg: CfgNode,
    model: torch.nn.Module,
    name: str,
    loader: DataLoader,
    evaluator: DatasetEvaluator,
) -> tuple[DataLoader, Journal | None]:
    """The loader of what is still to do, and the journal of what is done; None without one."""
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    # An evaluator that does not read the journal would judge a part of the images alone.
    if not cfg.TEST.RESUME or not all(hasattr(part, "journal") for part in parts):
        return loader, None
    fingerprint = evaluation_fingerprint(cfg, model, name)
    journal = Journal(inference_folder(cfg, name) / "journal", fingerprint)
    rest = leave_out(loader, name, journal.done)
    if rest is None:
        return loader, None
    if journal.done:
        logger.info(
            f"Going on with the evaluation on {name} that was interrupted: "
            f"{len(journal.done)} images are done (TEST.RESUME False starts anew)"
        )
    for part in parts:
        part.journal = journal
    return rest if journal.done else loader, journal


def _write(
    folder: Path, cfg: CfgNode, name: str, results: dict[str, Any], speed: InferenceSpeed
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {**results, "speed": speed.to_dict()}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1))
    about = MetadataCatalog.get(name)
    ids = about.get("thing_dataset_id_to_contiguous_id") or {}
    facts = {
        "data_set": name,
        "json_file": _absolute(about.get("json_file")),
        "image_root": _absolute(about.get("image_root")),
        "class_names": list(about.get("thing_classes") or []),
        "category_ids": sorted(ids, key=ids.__getitem__),
        "weights": cfg.MODEL.WEIGHTS,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": cfg.dump(),
    }
    (folder / "evaluation.json").write_text(json.dumps(facts, indent=1))


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "detectron2": detectron2.__version__}
    for package in ("mask-rcnn-plus", "torch", "torchvision", "numpy", "faster-coco-eval"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return {**found, "system": f"{platform.system()} {platform.machine()}"}
