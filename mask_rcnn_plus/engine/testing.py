"""Evaluation on the test sets: metrics, speed, and everything that a report needs.

An interrupted evaluation continues where it stopped if everything that its results depend on is
unchanged.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, print_csv_format
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mask_rcnn_plus.data.build import leave_out
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.console import LOG_ONLY
from mask_rcnn_plus.evaluation import InferenceSpeed, Journal, run_inference
from mask_rcnn_plus.optimization import OptimizedModel, optimize

logger = logging.getLogger(__name__)

# Keys of TEST that do not change a model's results on an image.
_NOT_IN_RESULTS = (
    "BEST_METRIC",
    "BOUNDARY_AP",
    "EVAL_PERIOD",
    "EXPECTED_RESULTS",
    "PREVIEW_IMAGES",
    "RESUME",
)


def evaluation_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The given model, or an optimized copy if TEST.OPTIMIZE is enabled.

    The model may be wrapped for distributed training.

    Raises:
        UserError: the model's device does not support TEST.OPTIMIZE.DTYPE.
    """
    options = cfg.TEST.OPTIMIZE
    if not options.ENABLED or isinstance(model, OptimizedModel):
        return model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return optimize(model, options.DTYPE, compile=options.COMPILE, cuda_graphs=options.CUDA_GRAPHS)


def inference_folder(cfg: CfgNode, dataset_name: str) -> Path:
    """The folder of the results on a test set."""
    return Path(cfg.OUTPUT_DIR) / "inference" / dataset_name


def evaluate_all(
    cfg: CfgNode,
    model: nn.Module,
    evaluators: Sequence[DatasetEvaluator],
    build_loader: Callable[[CfgNode, str], DataLoader],
) -> dict[str, Any]:
    """Evaluates on every data set of DATASETS.TEST and logs the metrics and the speed.

    Writes into ``OUTPUT_DIR/inference/<data set>``: metrics.json (metrics and speed),
    evaluation.json (the config, the data set and the versions), and the evaluators' files.

    Returns:
        as ``Trainer.test``.
    """
    names = cfg.DATASETS.TEST
    results: dict[str, Any] = {}
    for name, evaluator in zip(names, evaluators, strict=True):
        loader, journal = _resume(cfg, model, name, build_loader(cfg, name), evaluator)
        results[name], speed = run_inference(model, loader, evaluator, dataset_name=name)
        if comm.is_main_process():
            logger.info(f"Evaluation results for {name} in csv format:", extra=LOG_ONLY)
            print_csv_format(results[name])
            logger.info(f"Speed on {name}:\n{speed.table()}")
            _write(inference_folder(cfg, name), cfg, name, results[name], speed)
        if journal is not None:
            journal.remove()
    return results[names[0]] if len(names) == 1 else results


def _resume(
    cfg: CfgNode,
    model: nn.Module,
    name: str,
    loader: DataLoader,
    evaluator: DatasetEvaluator,
) -> tuple[DataLoader, Journal | None]:
    """A loader of the images that are left, and the journal of the others, if it can be used."""
    parts = evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]
    # An evaluator that does not read the journal would miss its images.
    if not cfg.TEST.RESUME or not all(hasattr(part, "journal") for part in parts):
        return loader, None
    fingerprint = evaluation_fingerprint(cfg, model, name)
    journal = Journal(inference_folder(cfg, name) / "journal", fingerprint)
    rest = leave_out(loader, name, journal.done)
    if rest is None:
        return loader, None
    if journal.done:
        logger.info(
            f"Continuing the interrupted evaluation on {name}: {len(journal.done)} images are done "
            "(TEST.RESUME False starts again)"
        )
    for part in parts:
        part.journal = journal
    return rest if journal.done else loader, journal


def _write(
    folder: Path, cfg: CfgNode, name: str, results: dict[str, Any], speed: InferenceSpeed
) -> None:
    metrics = {**results, "speed": speed.to_dict()}
    saving.write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    meta = MetadataCatalog.get(name)
    ids = meta.get("thing_dataset_id_to_contiguous_id") or {}
    evaluation = {
        "data_set": name,
        "json_file": _absolute(meta.get("json_file")),
        "image_root": _absolute(meta.get("image_root")),
        "class_names": list(meta.get("thing_classes") or []),
        "category_ids": sorted(ids, key=ids.__getitem__),
        "weights": cfg.MODEL.WEIGHTS,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": cfg.dump(),
    }
    saving.write_text(folder / "evaluation.json", json.dumps(evaluation, indent=1))


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path else None


def _versions() -> dict[str, str]:
    packages = ("mask-rcnn-plus", "torch", "torchvision", "numpy", "faster-coco-eval")
    return {
        "Python": platform.python_version(),
        "detectron2": detectron2.__version__,
        **{package: _version(package) or "not installed as a package" for package in packages},
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def evaluation_fingerprint(cfg: CfgNode, model: nn.Module, name: str) -> str:
    """A SHA-256 of everything that a model's results on the images of a data set depend on.

    These are the weights, the relevant parts of the config, the json file, the name, size and
    modification time of each image file, and the versions of torch, detectron2 and this package.
    It does not read the images.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(json.dumps(value).encode())

    for key, tensor in sorted(model.state_dict().items()):
        add([key, str(tensor.dtype), list(tensor.shape)])
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    add(_relevant_settings(cfg))
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file and Path(json_file).is_file():
        digest.update(Path(json_file).read_bytes())
    for record in DatasetCatalog.get(name):
        path = record.get("file_name")
        add([record.get("image_id"), path, _file_stamp(path)])
    packages = ("pb1-detectron2", "detectron2", "mask-rcnn-plus")
    add([torch.__version__, *map(_version, packages)])
    return digest.hexdigest()


def _relevant_settings(cfg: CfgNode) -> list[str]:
    """The parts of a config that determine what a model detects in an image."""
    model = {key: value for key, value in cfg.MODEL.items() if key != "WEIGHTS"}
    test = {key: value for key, value in cfg.TEST.items() if key not in _NOT_IN_RESULTS}
    return [CfgNode(group).dump() for group in (model, test, cfg.INPUT, cfg.DATASETS)]


def _file_stamp(path: str | None) -> list[int]:
    try:
        status = Path(path or "").stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
