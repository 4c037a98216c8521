"""Settings from the training data: replaces values of -1, and warns of too little data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from mask_rcnn_plus.config import load_config, parse_config
from mask_rcnn_plus.config.values import AUTO, is_auto
from mask_rcnn_plus.engine.auto_rules import (
    RULES,
    Data,
    Records,
    get_value,
    objects_of,
    set_value,
    shorter_side_of,
    sizes_of,
)
from mask_rcnn_plus.engine.weights import listed, read_metadata
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)

# The keys that prediction needs. For detectron2, -1 detections per image are all of them.
_FOR_TESTS = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.ANCHOR_GENERATOR.SIZES")
_CELL = 4  # pixels: the stride of p2


def resolve(cfg: CfgNode, records: Records, *, tests: int = 0, resume: bool = False) -> None:
    """Replaces each value of -1 in AUTO by one that suits the data, in place, and logs the reason.

    Args:
        cfg: unfrozen.
        records: of all data sets in DATASETS.TRAIN, with at least one object.
        tests: the number of images in DATASETS.TEST.
        resume: take the values of OUTPUT_DIR/config.yaml, if it exists: those the run began with.

    Raises:
        UserError: sizes of images are needed, but missing in the records.
    """
    saved = Path(cfg.OUTPUT_DIR) / "config.yaml"
    if _unresolved(cfg) and resume and saved.is_file():
        _take(cfg, load_config(saved))
    if not (keys := _unresolved(cfg)):
        return
    used = [r for r in records if objects_of(r) or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS]
    data = Data(used, tests)
    lines = []
    for key in keys:
        value, why = RULES[key](cfg, data)
        set_value(cfg, key, value)
        lines.append((key, _text(value), why))
    _switch_off(cfg, keys)
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    table = "\n".join(f"  {k:{widths[0]}}  {v:{widths[1]}}  {why}" for k, v, why in lines)
    logger.info(f"Settings from the data (-1 in the config):\n{table}")


def resolve_from_checkpoint(cfg: CfgNode, weights: str, *, trusted: bool = False) -> None:
    """Replaces each value of -1 in AUTO by that of the config in a checkpoint, in place.

    Args:
        cfg: unfrozen.
        weights: as for ``read_metadata``.
        trusted: read the file as a full pickle, which may run any code.

    Raises:
        UserError: the checkpoint does not contain a config.
    """
    if not _unresolved(cfg):
        return
    text = read_metadata(weights, trusted=trusted).get("config")
    if isinstance(text, str) and text:
        _take(cfg, parse_config(text, f"the config in weights '{weights}'"))
    if missing := [key for key in _unresolved(cfg) if key in _FOR_TESTS]:
        raise UserError(
            f"{missing[0]} is -1 (from the training data), but weights '{weights}' have no value: "
            "use the config.yaml in the run's OUTPUT_DIR, or set a value"
        )


def _take(cfg: CfgNode, source: CfgNode) -> None:
    keys = _unresolved(cfg)
    for key in keys:
        set_value(cfg, key, get_value(source, key))
    _switch_off(cfg, keys)


def _switch_off(cfg: CfgNode, keys: Sequence[str]) -> None:
    """Turns off, in place, what the values of these keys leave without effect."""
    loader, crop = cfg.DATALOADER, cfg.INPUT.CROP
    repeats = loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    if "DATALOADER.REPEAT_THRESHOLD" in keys and repeats and not loader.REPEAT_THRESHOLD:
        loader["SAMPLER_TRAIN"] = "TrainingSampler"
    if "INPUT.CROP.SIZE" in keys and min(crop.SIZE) == 1:
        crop["ENABLED"] = False  # with crops, boxes would be those of the masks


def _unresolved(cfg: CfgNode) -> list[str]:
    return [key for key in AUTO if is_auto(get_value(cfg, key))]


def warn_of_little_data(cfg: CfgNode, records: Records, names: Sequence[str]) -> None:
    """Warns of data that a model cannot learn from, and says what to do.

    Args:
        cfg: without values of -1 in AUTO.
        records: of all data sets in DATASETS.TRAIN.
        names: class names, in the order of class ids.
    """
    objects = [len(objects_of(record)) for record in records]
    if (images := sum(map(bool, objects))) < 2:
        logger.warning(
            f"DATASETS.TRAIN has {images} image with objects: the model will only know this image; "
            "label at least ten, and others for DATASETS.TEST"
        )
    used = {o["category_id"] for record in records for o in objects_of(record)}
    if empty := [name for index, name in enumerate(names) if index not in used]:
        missing = listed([f"'{name}'" for name in empty], 5)
        logger.warning(
            f"DATASETS.TRAIN lacks objects of {len(empty)} of {len(names)} classes ({missing}): "
            "the model will never predict them; label some, or remove the classes from the json "
            "files"
        )
    if cfg.INPUT.JITTER.ENABLED:
        return
    sized = [r for r in records if r.get("width") and r.get("height")]
    if any(size * _training_side(cfg, r) >= _CELL for r in sized for size in sizes_of(r)):
        return
    if largest := max(
        (size * _training_side(cfg, r) for r in sized for size in sizes_of(r)), default=0
    ):
        logger.warning(
            f"All objects are smaller than a cell of the finest feature map ({_CELL} pixels): the "
            f"largest is {largest:.1f} pixels wide at INPUT.MIN_SIZE_TRAIN "
            f"{max(cfg.INPUT.MIN_SIZE_TRAIN)}; set larger sizes, or cut the images into tiles"
        )


def _training_side(cfg: CfgNode, record: dict[str, Any]) -> float:
    """The largest shorter side that training resizes an image to, in pixels, before a crop."""
    own, crop = shorter_side_of(record), cfg.INPUT.CROP
    longest = cfg.INPUT.MAX_SIZE_TRAIN * own / max(record["width"], record["height"])
    shown = min(crop.SIZE) if crop.ENABLED and crop.TYPE == "relative" else 1
    return min(max(cfg.INPUT.MIN_SIZE_TRAIN) or own, longest) / shown


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)
