"""From the command line's arguments to a checked, frozen config and a prepared process."""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.data import (
    class_names,
    dataset_root,
    generate_shapes,
    register_folder_datasets,
    require_dataset,
)
from mask_rcnn_plus.device import resolve_device
from mask_rcnn_plus.engine.checkpoint import local_weights, read_class_names
from mask_rcnn_plus.engine.console import setup_console
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config and checks all that can be checked before the first iteration.

    Prepares the output folder, the loggers, the generated data set and the data set catalogue, and
    puts the number of classes into the config where it says -1.

    Args:
        args: from detectron2's ``default_argument_parser``.

    Returns:
        the frozen config; its MODEL.DEVICE may still say "auto", so that the config saved with the
        run also serves a machine without a GPU.

    Raises:
        UserError: something in what the user gave is wrong; see the message.
    """
    cfg = load_config(args.config_file, args.opts)
    device = resolve_device(cfg.MODEL.DEVICE)
    _require_writable(cfg.OUTPUT_DIR)
    setup_console(cfg.OUTPUT_DIR, comm.get_rank())
    _prepare_datasets(cfg)
    names = _check_datasets(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    _log_device(device, cfg.MODEL.DEVICE)
    _log_classes(names, cfg)
    return cfg


def _require_writable(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"output folder '{output_dir}' is not writable ({error.strerror}): set OUTPUT_DIR"
        ) from error


def _prepare_datasets(cfg: CfgNode) -> None:
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
        )
    comm.synchronize()
    register_folder_datasets()


def _check_datasets(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """Loads each data set once; returns the classes, after comparing everything that names some."""
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    if args.eval_only:
        _require_some(test, "DATASETS.TEST", "('mine_val',)")
        _require_weights(cfg, args)
    else:
        _require_some(train, "DATASETS.TRAIN", "('mine_train',)")
        if cfg.MODEL.WEIGHTS:
            local_weights(cfg.MODEL.WEIGHTS)
    used = list(dict.fromkeys(test if args.eval_only else train + test))
    for name in used:
        require_dataset(name, training=name in train and not args.eval_only)
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return []  # region proposals alone have no classes

    sources = {f"data set '{name}'": class_names(name) for name in used}
    if args.eval_only and (stored := read_class_names(_weights(cfg, args))):
        # First, since a model's classes are what everything else has to agree with.
        sources = {f"checkpoint '{_weights(cfg, args)}'": stored, **sources}
    first, *others = sources
    for other in others:
        if sources[other] != sources[first]:
            raise UserError(
                f"classes differ: {first} has {_listed(sources[first])}, "
                f"{other} has {_listed(sources[other])}"
            )
    names = sources[first]
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    elif len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}, but {first} has "
            f"{_listed(names)}: set it to {len(names)}, or to -1 to take it from the data"
        )
    return names


def _require_some(names: list[str], key: str, example: str) -> None:
    if not names:
        raise UserError(f'{key} is empty: name a data set, e.g. {key} "{example}"')


def _weights(cfg: CfgNode, args: argparse.Namespace) -> str:
    """The checkpoint that an evaluation reads: MODEL.WEIGHTS, or with --resume the run's last."""
    last = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    if args.resume and last.is_file():
        return str(Path(cfg.OUTPUT_DIR, last.read_text().strip()))
    return cfg.MODEL.WEIGHTS


def _require_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    weights = _weights(cfg, args)
    if weights:
        local_weights(weights)
        return
    found = sorted(str(path) for path in Path(cfg.OUTPUT_DIR).glob("*.pth"))
    hint = f" (there is {found[-1]})" if found else ""
    raise UserError(
        f"--eval-only without weights would evaluate random ones: add MODEL.WEIGHTS FILE{hint}"
    )


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


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({shown})"
