"""The config, the model and the class names that a checkpoint stands for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from mask_rcnn_plus.config import load_config, parse_config
from mask_rcnn_plus.config.values import check_components
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import (
    local_weights,
    read_class_names,
    read_metadata,
    read_weights_file,
)
from mask_rcnn_plus.errors import UserError


def read_config(
    weights: str,
    config_file: str | Path | None = None,
    opts: Sequence[str] = (),
    *,
    trusted: bool = False,
) -> CfgNode:
    """The config of a checkpoint, to predict with it on this machine.

    Args:
        weights: a file, a URL or a ``detectron2://`` name.
        config_file: what to read instead of the config that a checkpoint from training carries; a
            ``.pkl`` and other people's checkpoints carry none.
        opts: keys and values in turn, e.g. ``["TEST.AUG.ENABLED", "True"]``.
        trusted: read the weights as a full pickle, and run what they say.

    Returns:
        a new, unfrozen config; MODEL.WEIGHTS is ``weights``, MODEL.DEVICE "auto" unless ``opts``
        say otherwise.

    Raises:
        UserError: the weights are missing or no checkpoint, there is no config, or it is no good.
    """
    here = ["MODEL.DEVICE", "auto", *opts]
    if config_file is not None:
        local_weights(weights)
        cfg = load_config(config_file, here)
    else:
        text = read_metadata(weights, trusted=trusted).get("config")
        if not isinstance(text, str) or not text:
            # Of what is no checkpoint, that is the thing to say.
            read_weights_file(local_weights(weights), name=weights, trusted=trusted)
            raise UserError(
                f"weights '{weights}' carry no config, as those of train_net.py do: give the one "
                "that they were trained with by --config-file"
            )
        cfg = parse_config(text, f"the config in weights '{weights}'", here)
    cfg.MODEL.WEIGHTS = weights
    return cfg


def complete(cfg: CfgNode, *, trusted: bool = False) -> tuple[CfgNode, list[str]]:
    """What a model is built from, and what its classes are called.

    Args:
        cfg: MODEL.WEIGHTS has to name weights. Stays as it is.
        trusted: read the weights as a full pickle, and run what they say.

    Returns:
        a copy, with the number of classes where MODEL.ROI_HEADS.NUM_CLASSES is -1; and the names,
        in the order of class ids: the checkpoint's, else those of a data set that DATASETS names
        and that is known here, else none.

    Raises:
        UserError: MODEL.WEIGHTS is empty, missing or no checkpoint; or NUM_CLASSES is -1 and the
            checkpoint does not know better.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: name the checkpoint to predict with")
    names = read_class_names(weights, trusted=trusted)
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        if not names:
            raise UserError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, which "
                f"train_net.py alone can read, and weights '{weights}' have no class names: take "
                "the config.yaml of the run's OUTPUT_DIR, or set the number of classes"
            )
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    if "TIMM" in cfg.MODEL:
        # The checkpoint has all weights; ImageNet's would be fetched to be overwritten.
        cfg.MODEL.TIMM.PRETRAINED = False
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(names) != count:
        names = _registered_names(cfg, count)
    cfg.freeze()
    return cfg, names


def build_model(cfg: CfgNode, *, trusted: bool = False) -> torch.nn.Module:
    """The model of a config with all its weights, ready to predict.

    Args:
        cfg: from :func:`complete`.
        trusted: read the weights as a full pickle, and run what they say.

    Raises:
        UserError: the config describes no model that can be built, or the weights do not fit it.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError("MODEL.LOAD_PROPOSALS is True: a photo comes without proposals")
    check_components(cfg)
    try:
        model = modeling.build_model(cfg)
    except UserError:
        raise
    # Settings that do not go together can fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise UserError(f"what the config describes cannot be built: {kind}: {reason}") from error
    checkpointer = Checkpointer(model, strict=True)
    checkpointer.trusted = cfg.MODEL.WEIGHTS if trusted else ""
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return model.eval()


def _registered_names(cfg: CfgNode, count: int) -> list[str]:
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        # Asking for what is not registered would register it.
        if name in MetadataCatalog.list():
            names = MetadataCatalog.get(name).get("thing_classes") or []
            if len(names) == count:
                return [str(one) for one in names]
    return []
