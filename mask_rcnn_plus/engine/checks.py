"""Checks before a run that need the data sets or the checkpoint."""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_rcnn_plus.data import class_names, coco_files, require_dataset, require_flip_map
from mask_rcnn_plus.data.coco_json import folded
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.engine.auto import resolve, resolve_from_checkpoint, warn_of_little_data
from mask_rcnn_plus.engine.weights import local_weights, read_class_names
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

DataCheck = Callable[[CfgNode, Sequence[str]], None]
"""Checks the data sets with these names as cfg.DATA_CHECK says; raises UserError."""


def check_datasets(
    cfg: CfgNode, args: argparse.Namespace, *, check_data: DataCheck | None = None
) -> list[str]:
    """Loads each data set once and compares the classes of data, checkpoint and config.

    It calls ``check_data`` first, and replaces settings of -1 in place.

    Returns:
        the class names, in the order of class ids; empty for a model without classes.

    Raises:
        UserError: a data set cannot be used, weights are missing, or classes contradict each other.
    """
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    weights = ""
    if args.eval_only:
        _require_names(test, "DATASETS.TEST", "('mine_val',)")
        weights = _require_weights(cfg, args)
        train = []
    else:
        _require_names(train, "DATASETS.TRAIN", "('mine_train',)")
        if cfg.MODEL.WEIGHTS:
            local_weights(cfg.MODEL.WEIGHTS)
    used = list(dict.fromkeys(train + test))
    if check_data is not None:
        check_data(cfg, used)
    training: list[dict[str, Any]] = []
    tests = 0
    for name in used:
        records = require_dataset(name, training=name in train)
        tests += len(records) if name in test else 0
        if name in train:
            _check_annotations(cfg, name, records)
            training += records
        if cfg.MODEL.KEYPOINT_ON:
            _check_keypoints(cfg, name, records)
    if cfg.MODEL.KEYPOINT_ON:
        _compare_keypoints(used)
        if not args.eval_only and cfg.INPUT.RANDOM_FLIP == "horizontal":
            require_flip_map(train)
    if args.eval_only:
        resolve_from_checkpoint(cfg, weights, trusted=_is_trusted(cfg, args, weights))
    else:
        resolve(cfg, training, tests=tests, resume=args.resume)
        warn_of_little_data(cfg, training, class_names(train[0]))
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return []  # a proposal network does not have classes

    sources = {f"data set '{name}'": class_names(name) for name in used}
    if args.eval_only:
        trusted = _is_trusted(cfg, args, weights)
        if stored := read_class_names(weights, trusted=trusted):
            # First, so that the data sets are compared with the model.
            sources = {f"checkpoint '{weights}'": stored, **sources}
    first, *others = sources
    for other in others:
        if sources[other] != sources[first]:
            alike = [*map(folded, sources[other])] == [*map(folded, sources[first])]
            hint = "; only case, spaces or the Unicode form differ" if alike else ""
            raise UserError(
                f"classes differ: {first} has {_listed(sources[first])}, "
                f"{other} has {_listed(sources[other])}{hint}"
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


def _is_trusted(cfg: CfgNode, args: argparse.Namespace, weights: str) -> bool:
    return getattr(args, "trust_checkpoint", False) and weights == cfg.MODEL.WEIGHTS


def _check_annotations(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> None:
    """Checks that the objects have the masks and keypoints that the config trains on."""
    flags = [a.get("iscrowd", 0) for r in records for a in r.get("annotations", ())]
    if invalid := [flag for flag in flags if flag not in (0, 1)]:
        raise UserError(
            f"data set '{name}': {len(invalid)} annotations have an iscrowd that is neither 0 nor "
            f"1, the first {invalid[0]!r}; set it to 0, or to 1 for a crowd, or DATA_CHECK repair"
        )
    objects = [
        (record, annotation)
        for record in records
        for annotation in record.get("annotations", ())
        if not annotation.get("iscrowd", 0)
    ]
    bare = [record for record, annotation in objects if not annotation.get("segmentation")]
    if cfg.MODEL.MASK_ON and bare:
        raise UserError(
            f"data set '{name}': {len(bare)} of {len(objects)} annotations have no segmentation, "
            f"the first for '{bare[0].get('file_name', '?')}'; set MODEL.MASK_ON False to train "
            "boxes only"
        )
    if cfg.MODEL.KEYPOINT_ON and not any(a.get("keypoints") for _, a in objects):
        raise UserError(
            f"data set '{name}' has no keypoints: set MODEL.KEYPOINT_ON False, or label some"
        )


def _check_keypoints(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> None:
    """Checks how many keypoints the objects have; the model would find out during the run."""
    lists = (a.get("keypoints") for r in records for a in r.get("annotations", ()))
    counts = sorted({len(keypoints) // 3 for keypoints in lists if keypoints})
    if len(counts) > 1:
        raise UserError(
            f"data set '{name}' has objects with {' and '.join(map(str, counts))} keypoints, but a "
            "model predicts one number of them for all classes: keep the classes with the same "
            "keypoints, or set MODEL.KEYPOINT_ON False"
        )
    if not counts:
        return
    (count,), model = counts, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if count != model:
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {model}, but the objects of data set "
            f"'{name}' have {count} keypoints: set it to {count}"
        )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if name in cfg.DATASETS.TEST and (sigmas or 17) != count:
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values (an empty list means COCO's 17), but "
            f"data set '{name}' has {count} keypoints: give {count} values, such as "
            f"[{', '.join(['0.05'] * min(count, 3))}{', ...' if count > 3 else ''}]"
        )


def _compare_keypoints(names: list[str]) -> None:
    """Checks that the data sets that name keypoints name the same ones."""
    known = {name: MetadataCatalog.get(name).get("keypoint_names") for name in names}
    named = [name for name in names if known[name]]
    for name in named[1:]:
        if list(known[name]) != list(known[named[0]]):
            raise UserError(
                f"keypoints differ: data set '{named[0]}' has {', '.join(known[named[0]])}, "
                f"'{name}' has {', '.join(known[name])}"
            )


def describe_data(cfg: CfgNode) -> dict[str, Any]:
    """The SHA-256 of the content of each data set, for a checkpoint: of its json or its records."""
    return {
        f"{key} '{name}'": _digest(name)
        for key in ("DATASETS.TRAIN", "DATASETS.TEST")
        for name in cfg.DATASETS[key.removeprefix("DATASETS.")]
    }


def log_changes(stored: Any, now: Mapping[str, Any]) -> None:
    """Says in one line how the data of a resumed run differ from those of its checkpoint."""
    if not isinstance(stored, dict):  # a checkpoint of an earlier version or of detectron2
        return
    changes = []
    for key in (*now, *(key for key in stored if key not in now)):
        before, after = stored.get(key), now.get(key)
        if before == after:
            continue
        if type(after) is int:
            changes.append(f"{after} {key} instead of {before}")
        elif before is None or after is None:
            changes.append(f"{key} is {'new' if before is None else 'no longer used'}")
        else:
            changes.append(f"the content of {key} is different")
    if changes:
        logger.warning(f"--resume: the data have changed: {'; '.join(changes)}; continuing")


def _digest(name: str) -> str:
    digest = hashlib.sha256()
    if files := coco_files(name):
        with files[0].open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        records = DatasetCatalog.get(name)
        for index in range(len(records)):
            digest.update(json.dumps(records[index], default=repr).encode())
    return digest.hexdigest()


def _require_names(names: list[str], key: str, example: str) -> None:
    if not names:
        raise UserError(f'{key} is empty: name a data set, e.g. {key} "{example}"')


def _require_weights(cfg: CfgNode, args: argparse.Namespace) -> str:
    """The checkpoint to evaluate: MODEL.WEIGHTS, or with --resume the run's last one."""
    output = Path(cfg.OUTPUT_DIR)
    weights = cfg.MODEL.WEIGHTS
    if args.resume:
        chosen, faults = saving.choose(output)
        if faults and not chosen:
            raise saving.none_sound(output, faults)
        weights = str(chosen or weights)
    if weights:
        local_weights(weights)
        return weights
    checkpoints = sorted(str(path) for path in output.glob("*.pth"))
    hint = f" (such as {checkpoints[-1]})" if checkpoints else ""
    raise UserError(
        f"--eval-only without weights would evaluate random ones: add MODEL.WEIGHTS FILE{hint}"
    )


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(name[:40] for name in names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} class{'es' if len(names) != 1 else ''} ({shown})"
