"""Turns command-line arguments into a checked, frozen config, and prepares the process."""

import argparse
import logging
import secrets
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from mask_rcnn_plus.compat.origin import check_detectron2
from mask_rcnn_plus.config import complete, load_config, with_values
from mask_rcnn_plus.config.stock import STOCK_CONFIG, write_stock_config
from mask_rcnn_plus.config.values import (
    check_class_metrics,
    check_components,
    check_loggers,
    check_metrics,
    check_optimize,
    check_options,
    check_sampler,
    check_solver,
)
from mask_rcnn_plus.data import dataset_root, generate_shapes, register_folder_datasets
from mask_rcnn_plus.data.formats import limit_pixels
from mask_rcnn_plus.device import make_current, resolve_device
from mask_rcnn_plus.engine import lock
from mask_rcnn_plus.engine.checks import DataCheck, check_datasets
from mask_rcnn_plus.engine.console import LOG_ONLY, setup_console
from mask_rcnn_plus.engine.derived import resolve_class_weights, scale_schedule
from mask_rcnn_plus.engine.saving import read_seed, write_text
from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace, *, check_data: DataCheck | None = None) -> CfgNode:
    """Reads the config and checks everything that can be checked before the first iteration.

    It also prepares the output folder, the loggers, the generated data set and the data set
    catalog, and replaces settings that depend on the data, such as NUM_CLASSES -1. The output
    folder is locked until the end of the training, or of the process.

    Args:
        args: from detectron2's ``default_argument_parser``.
        check_data: the data check that DATA_CHECK configures; None for no check.

    Returns:
        the frozen config; its MODEL.DEVICE may still be "auto", so that the saved config also
        works on a machine without a GPU.

    Raises:
        UserError: an argument, the config, a data set or a checkpoint is invalid, or another run
            uses the output folder.
    """
    cfg = load_config(args.config_file, args.opts)
    limit_pixels(cfg.INPUT.MAX_PIXELS)
    device = resolve_device(cfg.MODEL.DEVICE)
    check_components(cfg)
    check_solver(cfg, device)
    make_current(device)
    check_options(cfg)
    check_optimize(cfg, device)
    if not args.eval_only:
        check_metrics(cfg)
        check_sampler(cfg)
        check_loggers(cfg)
    _take_folder(cfg.OUTPUT_DIR)
    setup_console(cfg.OUTPUT_DIR, comm.get_rank())
    if comm.is_main_process():
        check_detectron2()
    _resolve_seed(cfg, args)
    scale_schedule(cfg)
    prepare_datasets(cfg)
    if check_data is None and cfg.DATA_CHECK != "off":
        logger.info(
            f"DATA_CHECK is '{cfg.DATA_CHECK}', but setup() got no data check: the data sets are "
            "not checked before the run"
        )
    names = check_datasets(cfg, args, check_data=check_data)
    if not args.eval_only:
        check_class_metrics(cfg, names)
        resolve_class_weights(cfg, names)
    cfg.freeze()
    _record(cfg, args)
    if comm.is_main_process():
        _write_stock_config(cfg, trains=not args.eval_only)
    logger.info(f"Full log: {Path(cfg.OUTPUT_DIR) / 'log.txt'}")
    _log_device(device, cfg.MODEL.DEVICE)
    if names:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        logger.info(f"{len(names)} classes (id name): {listed}")
    return cfg


def _take_folder(output_dir: str) -> None:
    """Creates and locks the folder; if the main process cannot, all processes raise."""
    if not output_dir:
        raise UserError("OUTPUT_DIR is empty: set it to a folder")
    problem = ""
    if comm.is_main_process():
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output_dir).close()
            lock.acquire(output_dir)
        except OSError as error:
            problem = f"OUTPUT_DIR '{output_dir}' is not writable ({reason(error)}): set another"
        except UserError as error:
            problem = str(error)
    if problem := comm.all_gather(problem)[0]:
        raise UserError(problem)


def _write_stock_config(cfg: CfgNode, *, trains: bool) -> None:
    """Writes a config for programs that predict with this run's weights in plain detectron2."""
    path = Path(cfg.OUTPUT_DIR) / STOCK_CONFIG
    values = {"MODEL.DEVICE": resolve_device(cfg.MODEL.DEVICE)}
    if trains:
        values["MODEL.WEIGHTS"] = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    try:
        write_stock_config(with_values(cfg, values), path)
    except UserError as error:
        path.unlink(missing_ok=True)  # of another model
        logger.info(f"{STOCK_CONFIG} is not written: {error}")


def _resolve_seed(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Replaces SEED -1 by the seed of the run to resume, or by a random one."""
    if cfg.SEED >= 0:
        return
    stored = read_seed(Path(cfg.OUTPUT_DIR)) if args.resume and comm.is_main_process() else None
    seed = stored if stored is not None else secrets.randbelow(2**31)
    cfg.SEED = comm.all_gather(seed)[0]
    origin = "from the checkpoint" if stored is not None else "chosen at random"
    logger.info(f"SEED -1: {cfg.SEED}, {origin}; SEED {cfg.SEED} repeats this run")


def prepare_datasets(cfg: CfgNode) -> None:
    """Generates the data set of DATASETS.SHAPES if enabled; registers data sets by folder."""
    shapes = complete(cfg).DATASETS.SHAPES
    # One process per machine generates the files; the others wait for them.
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


def _record(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What detectron2's ``default_setup`` does, but a full disk leaves an old config.yaml whole."""
    for title, text in {
        "Processes": comm.get_world_size(),
        "Environment info": collect_env_info(),
        "Command line arguments": args,
        "Running with full config": cfg.dump(),
    }.items():
        logger.info(f"{title}:\n{text}", extra=LOG_ONLY)
    if comm.is_main_process():
        write_text(Path(cfg.OUTPUT_DIR) / "config.yaml", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if precision := cfg.get("FLOAT32_PRECISION"):  # of detectron2's main branch
        torch.set_float32_matmul_precision(precision)


def _log_device(device: str, requested: str) -> None:
    if device.startswith("cuda"):
        hardware, why = torch.cuda.get_device_name(device), "CUDA found"
    else:
        hardware, why = f"{torch.get_num_threads()} threads", "no CUDA found"
    if requested == "auto":
        hardware += f"; MODEL.DEVICE auto: {why}"
    logger.info(f"Device: {device} ({hardware})")
