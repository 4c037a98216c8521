"""What tells one evaluation from another."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

_BLOCK = 1 << 20
# They change what is done with an image's result, or when; not the result.
_LATER = ("BEST_METRIC", "BOUNDARY_AP", "EVAL_PERIOD", "EXPECTED_RESULTS", "PREVIEW_IMAGES")


def evaluation_fingerprint(cfg: CfgNode, model: torch.nn.Module, name: str) -> str:
    """The SHA-256 of all that a model's results on the images of a data set depend on.

    That is the weights, the config as far as it matters in evaluation, the json file, each image
    file's name, size and time of change, and the versions of torch, detectron2 and this package.
    Images are not read.

    Args:
        cfg: the config.
        model: with the weights to evaluate.
        name: a registered data set.
    """
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        _add(total, [key, str(value.dtype), list(value.shape)])
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    _add(total, _settings(cfg))
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file and Path(json_file).is_file():
        with Path(json_file).open("rb") as file:
            while block := file.read(_BLOCK):
                total.update(block)
    for record in DatasetCatalog.get(name):
        path = record.get("file_name")
        _add(total, [record.get("image_id"), path, _stamp(path)])
    _add(total, [torch.__version__, *map(_version, ("pb1-detectron2", "detectron2"))])
    _add(total, _version("mask-rcnn-plus"))
    return total.hexdigest()


def _settings(cfg: CfgNode) -> list[str]:
    """The parts of a config that decide what a model finds in an image."""
    model, test = cfg.MODEL.clone(), cfg.TEST.clone()
    for node, unimportant in ((model, ("WEIGHTS",)), (test, (*_LATER, "RESUME"))):
        node.defrost()
        for key in unimportant:
            node.pop(key, None)
    return [model.dump(), test.dump(), cfg.INPUT.dump(), cfg.DATASETS.dump()]


def _stamp(path: str | None) -> list[int]:
    try:
        found = Path(path or "").stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _add(total: Any, facts: Any) -> None:
    total.update(json.dumps(facts).encode())
