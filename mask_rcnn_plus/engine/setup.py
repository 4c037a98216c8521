"""From the command line's arguments to a checked, frozen config and a prepared process."""

import argparse
import logging
import secrets
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

from mask_rcnn_plus.compat.origin import check_detectron2
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import (
    check_class_metrics,
    check_components,
    check_metrics,
    check_optimize,
    check_options,
    check_sampler,
    check_solver,
)
from mask_rcnn_plus.data import dataset_root, generate_shapes, register_folder_datasets
from mask_rcnn_plus.device import make_current, resolve_device
from mask_rcnn_plus.engine.batch_size import scale_to_batch
from mask_rcnn_plus.engine.checks import DataCheck, check_datasets
from mask_rcnn_plus.engine.class_weights import settle_class_weights
from mask_rcnn_plus.engine.console import setup_console
from mask_rcnn_plus.engine.saving import read_seed
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace, *, check_data: DataCheck | None = None) -> CfgNode:
    """Reads the config and checks all that can be checked before the first iteration.

    Prepares the output folder, the loggers, the generated data set and the data set catalogue, and
    puts the number of classes into the config where it says -1.

    Args:
        args: from detectron2's ``default_argument_parser``.
        check_data: the data check that DATA_CHECK configures; None skips it.

    Returns:
        the frozen config; its MODEL.DEVICE may still say "auto", so that the config saved with the
        run also serves a machine without a GPU.

    Raises:
        UserError: something in what the user gave is wrong; see the message.
    """
    cfg = load_config(args.config_file, args.opts)
    device = resolve_device(cfg.MODEL.DEVICE)
    check_components(cfg)
    check_solver(cfg, device)
    make_current(device)
    check_options(cfg)
    check_optimize(cfg, device)
    if not args.eval_only:
        check_metrics(cfg)
        check_sampler(cfg)
    _require_writable(cfg.OUTPUT_DIR)
    setup_console(cfg.OUTPUT_DIR, comm.get_rank())
    if comm.is_main_process():
        check_detectron2()
    _settle_seed(cfg, args)
    scale_to_batch(cfg)
    prepare_datasets(cfg)
    names = check_datasets(cfg, args, check_data=check_data)
    if not args.eval_only:
        check_class_metrics(cfg, names)
        settle_class_weights(cfg, names)
    cfg.freeze()
    default_setup(cfg, args)
    _log_device(device, cfg.MODEL.DEVICE)
    _log_classes(names, cfg)
    return cfg


def _require_writable(output_dir: str) -> None:
    if not output_dir:
        raise UserError("OUTPUT_DIR is empty: name a folder")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"output folder '{output_dir}' is not writable ({error.strerror}): set OUTPUT_DIR"
        ) from error


def _settle_seed(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Puts a number into SEED where it is -1: that of the run to resume, or a drawn one."""
    if cfg.SEED >= 0:
        return
    stored = read_seed(Path(cfg.OUTPUT_DIR)) if args.resume and comm.is_main_process() else None
    drawn = stored if stored is not None else secrets.randbelow(2**31)
    cfg.SEED = comm.all_gather(drawn)[0]
    origin = "that of the checkpoint" if stored is not None else "drawn"
    logger.info(f"SEED -1: {cfg.SEED}, {origin}; SEED {cfg.SEED} gives the same run again")


def prepare_datasets(cfg: CfgNode) -> None:
    """Draws the generated data set where the config asks for it; registers those by folder."""
    shapes = cfg.DATASETS.SHAPES
    # One process a machine draws; the others wait for its files.
    if shapes.ENABLED and comm.get_local_rank() == 0:
        generate_shapes(
            dataset_root(),
            name=shapes.NAME,
            num_train=shapes.NUM_TRAIN,
            num_val=shapes.NUM_VAL,
            image_size=tuple(shapes.IMAGE_SIZE),
            mask_format=shapes.MASK_FORMAT,
            seed=shapes.SEED,
            frequencies=shapes.FREQUENCIES,
        )
    comm.synchronize()
    register_folder_datasets()


def _log_device(device: str, asked: str) -> None:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else name
    why = ""
    if asked == "auto":
        why = "; MODEL.DEVICE auto: " + ("CUDA found" if name else "no CUDA found")
    logger.info(f"Device: {device} ({threads}{why})")


def _log_classes(names: list[str], cfg: CfgNode) -> None:
    if names:
        mapping = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        logger.info(f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes (id name): {mapping}")
