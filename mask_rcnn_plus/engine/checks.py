"""What can be known to be wrong before the first iteration, in words."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.utils import comm

from mask_rcnn_plus.data import class_names, require_dataset
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.weights import local_weights, read_class_names
from mask_rcnn_plus.errors import UserError, did_you_mean


def check_components(cfg: CfgNode) -> None:
    """Looks up each component that the config names.

    Raises:
        UserError: a name is in no registry.
    """
    model = cfg.MODEL
    wanted = [
        ("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
        (
            "MODEL.PROPOSAL_GENERATOR.NAME",
            model.PROPOSAL_GENERATOR.NAME,
            PROPOSAL_GENERATOR_REGISTRY,
        ),
        ("MODEL.ANCHOR_GENERATOR.NAME", model.ANCHOR_GENERATOR.NAME, ANCHOR_GENERATOR_REGISTRY),
        ("MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
        ("MODEL.ROI_BOX_HEAD.NAME", model.ROI_BOX_HEAD.NAME, ROI_BOX_HEAD_REGISTRY),
    ]
    if model.MASK_ON:
        wanted.append(
            ("MODEL.ROI_MASK_HEAD.NAME", model.ROI_MASK_HEAD.NAME, ROI_MASK_HEAD_REGISTRY)
        )
    if model.KEYPOINT_ON:
        wanted.append(
            (
                "MODEL.ROI_KEYPOINT_HEAD.NAME",
                model.ROI_KEYPOINT_HEAD.NAME,
                ROI_KEYPOINT_HEAD_REGISTRY,
            )
        )
    for key, name, registry in wanted:
        # detectron2 reads an empty head name, and PrecomputedProposals, without a look-up.
        if name and name != "PrecomputedProposals" and name not in registry:
            known = [known for known, _ in registry]
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise UserError(f"{key} is '{name}', which is not registered{hint}")


def check_solver(cfg: CfgNode, device: str) -> None:
    """Compares the solver's settings with the device and the number of processes.

    Raises:
        UserError: mixed precision that the device lacks, one GPU for several processes, or a batch
            that cannot be shared evenly by the processes, or cut into SOLVER.ACCUMULATE_STEPS.
    """
    solver = cfg.SOLVER
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "fp16" and not device.startswith("cuda"):
        raise UserError(
            f"SOLVER.AMP.ENABLED with SOLVER.AMP.DTYPE fp16 needs a GPU, and the device is "
            f"'{device}': set SOLVER.AMP.DTYPE bf16, or SOLVER.AMP.ENABLED False"
        )
    processes = comm.get_world_size()
    if processes > 1 and device.startswith("cuda:"):
        raise UserError(
            f"MODEL.DEVICE is '{device}', and each of {processes} processes needs a GPU of its "
            "own: set MODEL.DEVICE cuda"
        )
    if solver.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, which {processes} processes cannot "
            f"share: set a multiple of {processes}"
        )
    if solver.IMS_PER_BATCH // processes % solver.ACCUMULATE_STEPS:
        raise UserError(
            f"SOLVER.ACCUMULATE_STEPS is {solver.ACCUMULATE_STEPS}, and a process's share of a "
            f"batch has {solver.IMS_PER_BATCH // processes} images: set a divisor of that"
        )


DataCheck = Callable[[CfgNode, Sequence[str]], None]
"""Checks the data sets with these names as cfg.DATA_CHECK asks for; raises UserError."""


def check_datasets(
    cfg: CfgNode, args: argparse.Namespace, *, check_data: DataCheck | None = None
) -> list[str]:
    """Loads each data set once and compares all that names classes: data, checkpoint, config.

    Args:
        cfg: its MODEL.ROI_HEADS.NUM_CLASSES is set in place where it is -1.
        args: of the command line.
        check_data: runs before the data sets are loaded; None checks nothing.

    Returns:
        the class names, in the order of class ids; none for a model without classes.

    Raises:
        UserError: a data set cannot be used, weights are missing, or classes contradict each other.
    """
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    weights = ""
    if args.eval_only:
        _require_some(test, "DATASETS.TEST", "('mine_val',)")
        weights = _require_weights(cfg, args)
    else:
        _require_some(train, "DATASETS.TRAIN", "('mine_train',)")
        if cfg.MODEL.WEIGHTS:
            local_weights(cfg.MODEL.WEIGHTS)
    used = list(dict.fromkeys(test if args.eval_only else train + test))
    if check_data is not None:
        check_data(cfg, used)
    for name in used:
        training = name in train and not args.eval_only
        records = require_dataset(name, training=training)
        if training:
            _check_annotations(cfg, name, records)
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return []  # region proposals alone have no classes

    sources = {f"data set '{name}'": class_names(name) for name in used}
    if args.eval_only and (stored := _stored_names(cfg, args, weights)):
        # First, since a model's classes are what everything else has to agree with.
        sources = {f"checkpoint '{weights}'": stored, **sources}
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


def _check_annotations(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> None:
    """Whether every object has what the config trains on."""
    counted = [
        (record, annotation)
        for record in records
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
    ]

    def refuse(bad: list[dict[str, Any]], what: str, advice: str) -> None:
        if bad:
            raise UserError(
                f"data set '{name}': {len(bad)} of {len(counted)} annotations {what}, the first "
                f"for '{bad[0].get('file_name', '?')}'; {advice}"
            )

    if cfg.MODEL.MASK_ON:
        without = [record for record, one in counted if not one.get("segmentation")]
        refuse(without, "have no segmentation", "set MODEL.MASK_ON False to train boxes alone")
    if cfg.MODEL.KEYPOINT_ON and not any("keypoints" in one for _, one in counted):
        raise UserError(
            f"data set '{name}' has no keypoints: set MODEL.KEYPOINT_ON False, or label some"
        )


def _require_some(names: list[str], key: str, example: str) -> None:
    if not names:
        raise UserError(f'{key} is empty: name a data set, e.g. {key} "{example}"')


def _weights(cfg: CfgNode, args: argparse.Namespace) -> str:
    """The checkpoint that an evaluation reads: MODEL.WEIGHTS, or with --resume the run's last."""
    if not args.resume:
        return cfg.MODEL.WEIGHTS
    chosen, faults = saving.choose(Path(cfg.OUTPUT_DIR))
    if faults and not chosen:
        raise saving.none_sound(Path(cfg.OUTPUT_DIR), faults)
    return str(chosen or cfg.MODEL.WEIGHTS)


def _stored_names(cfg: CfgNode, args: argparse.Namespace, weights: str) -> list[str]:
    trusted = getattr(args, "trust_checkpoint", False) and weights == cfg.MODEL.WEIGHTS
    return read_class_names(weights, trusted=trusted)


def _require_weights(cfg: CfgNode, args: argparse.Namespace) -> str:
    weights = _weights(cfg, args)
    if weights:
        local_weights(weights)
        return weights
    found = sorted(str(path) for path in Path(cfg.OUTPUT_DIR).glob("*.pth"))
    hint = f" (there is {found[-1]})" if found else ""
    raise UserError(
        f"--eval-only without weights would evaluate random ones: add MODEL.WEIGHTS FILE{hint}"
    )


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(name[:40] for name in names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({shown})"
