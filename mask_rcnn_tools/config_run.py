"""Prepares a config and its data sets for commands that use them as train_net.py would."""

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from mask_rcnn_plus.config.values import (
    check_components,
    check_options,
    check_sampler,
    check_solver,
)
from mask_rcnn_plus.data import require_dataset
from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.device import make_current, resolve_device
from mask_rcnn_plus.engine.auto import resolve
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.engine.derived import resolve_class_weights
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.before_run import check_data


def training_records(cfg: CfgNode, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Registers the config's data sets; returns detectron2's records of the named ones.

    Args:
        cfg: from ``load_config``. Settings that follow from the records (-1) are replaced in place.
        names: data sets; default: DATASETS.TRAIN.

    Raises:
        UserError: DATASETS.TRAIN is empty, or a data set cannot be used.
    """
    names = names or cfg.DATASETS.TRAIN
    if not names:
        raise UserError("DATASETS.TRAIN is empty: name a data set, e.g. \"('mine_train',)\"")
    limit_pixels(cfg.INPUT.MAX_PIXELS)
    prepare_datasets(cfg)
    records = [record for name in names for record in require_dataset(name, training=True)]
    resolve(cfg, records)
    return records


def prepare_training(cfg: CfgNode) -> None:
    """Checks a config and its data sets for training without evaluation, and freezes it.

    Raises:
        UserError: the config or a data set is invalid.
    """
    limit_pixels(cfg.INPUT.MAX_PIXELS)
    check_components(cfg)
    device = resolve_device(cfg.MODEL.DEVICE)
    check_solver(cfg, device)
    make_current(device)
    check_options(cfg)
    check_sampler(cfg)
    prepare_datasets(cfg)
    cfg.DATASETS.TEST = ()
    args = argparse.Namespace(eval_only=False, resume=False)
    names = check_datasets(cfg, args, check_data=check_data)
    resolve_class_weights(cfg, names)
    cfg.freeze()
