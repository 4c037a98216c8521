"""Builds the config, the model and the class names from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo, modeling
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.model_zoo.model_zoo import _ModelZooUrls

from mask_rcnn_plus.config import complete, load_config, parse_config, with_values
from mask_rcnn_plus.config.values import check_components
from mask_rcnn_plus.engine.auto import resolve_from_checkpoint
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import (
    local_weights,
    read_class_names,
    read_metadata,
    read_weights_file,
)
from mask_rcnn_plus.errors import UserError, reason


def read_config(
    weights: str,
    config_file: str | Path | None = None,
    opts: Sequence[str] = (),
    *,
    trusted: bool = False,
) -> CfgNode:
    """Reads the config to predict with.

    Args:
        weights: a file, a URL or a ``detectron2://`` name.
        config_file: read instead of the config in the checkpoint. Needed for checkpoints of other
            programs, which contain no config, except for those of detectron2's model zoo.
        opts: config keys and values in turn, e.g. ``["TEST.AUG.ENABLED", "True"]``.
        trusted: read the weights as a full pickle, which may run any code.

    Returns:
        an unfrozen config. MODEL.WEIGHTS is ``weights``; MODEL.DEVICE is "auto" unless ``opts`` set
        it.

    Raises:
        UserError: the weights are missing or not a checkpoint, or the config is missing or invalid.
    """
    opts = ["MODEL.DEVICE", "auto", *opts]
    config_file = config_file or _zoo_config(weights)
    if config_file:
        local_weights(weights)
        cfg = load_config(config_file, opts)
    else:
        text = read_metadata(weights, trusted=trusted).get("config")
        if not isinstance(text, str) or not text:
            # If the file is not a checkpoint at all, this reports that instead.
            read_weights_file(local_weights(weights), name=weights, trusted=trusted)
            raise UserError(
                f"weights '{weights}' contain no config, as the checkpoints of train_net.py do: "
                "give the config of their training (--config-file, in Python config_file)"
            )
        cfg = parse_config(text, f"the config in weights '{weights}'", opts)
    cfg.MODEL.WEIGHTS = weights
    return cfg


def resolve_classes(cfg: CfgNode, *, trusted: bool = False) -> tuple[CfgNode, list[str]]:
    """Completes a config from its checkpoint, and finds the class names.

    Args:
        cfg: MODEL.WEIGHTS must name weights. Not modified.
        trusted: read the weights as a full pickle, which may run any code.

    Returns:
        a frozen copy, in which the number of classes replaces a MODEL.ROI_HEADS.NUM_CLASSES of -1,
        and the checkpoint's config other values of -1; and the class names in the order of class
        ids: from the checkpoint, else from a registered data set in DATASETS, else an empty list.

    Raises:
        UserError: MODEL.WEIGHTS is empty, missing or not a checkpoint; or NUM_CLASSES is -1 and the
            checkpoint contains no class names; or its config lacks other values of -1.
    """
    cfg = complete(cfg).clone()
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to predict with")
    names = read_class_names(weights, trusted=trusted)
    values: dict[str, Any] = {}
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if count < 1:
        if not names:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {count}, and weights '{weights}' contain no class "
                "names to count: set the number of classes, or use the config.yaml in the run's "
                "OUTPUT_DIR"
            )
        values["MODEL.ROI_HEADS.NUM_CLASSES"] = count = len(names)
    resolve_from_checkpoint(cfg, weights, trusted=trusted)
    values["MODEL.TIMM.PRETRAINED"] = False  # do not download weights that the checkpoint replaces
    cfg = with_values(cfg, values)
    cfg.freeze()
    return cfg, (names if len(names) == count else _registered_names(cfg, count))


def build_model(cfg: CfgNode, *, trusted: bool = False) -> torch.nn.Module:
    """Builds a model in evaluation mode and loads its weights.

    Args:
        cfg: from :func:`resolve_classes`.
        trusted: read the weights as a full pickle, which may run any code.

    Raises:
        UserError: the model cannot be built, or the weights do not match it.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError("MODEL.LOAD_PROPOSALS is True, but images come without proposals")
    check_components(cfg)
    try:
        model = modeling.build_model(cfg)
    except UserError:
        raise
    except Exception as error:  # inconsistent settings can fail in any way
        kind = type(error).__name__
        raise UserError(
            f"the model of this config cannot be built: {kind}: {reason(error, 300)}"
        ) from error
    checkpointer = Checkpointer(model, strict=True)
    checkpointer.trusted = cfg.MODEL.WEIGHTS if trusted else ""
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return model.eval()


def _zoo_config(weights: str) -> str:
    """The config of a checkpoint of detectron2's model zoo, by its file name; else ""."""
    for name, file in _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.items():
        if Path(file).name == Path(weights).name:
            try:
                return model_zoo.get_config_file(f"{name}.yaml")
            except RuntimeError as error:
                raise UserError(f"no config for weights '{weights}': {error}") from error
    return ""


def _registered_names(cfg: CfgNode, count: int) -> list[str]:
    """The class names of the first registered data set that has this number of classes."""
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name in MetadataCatalog.list():  # MetadataCatalog.get would register it
            names = MetadataCatalog.get(name).get("thing_classes") or []
            if len(names) == count:
                return list(map(str, names))
    return []
