"""Which values each config key takes, so that a wrong one is refused and not trained with."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mask_rcnn_plus.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a value has to be: in words, after "it must be", and as a test."""

    words: str
    allows: Callable[[Any], bool]


_MOST = 2**31 - 1
_MOST_SIDE = 2**15 - 1  # OpenCV's for an image
# Far above what models have and far below what would end in the system killing the process.
_MOST_CHANNELS = 2**16
_MOST_LAYERS = 100


def _integer(least: int, most: int = _MOST) -> Rule:
    words = f"{least} or more" if most == _MOST else f"an integer of {least} to {most}"
    return Rule(words, lambda value: type(value) is int and least <= value <= most)


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Rule:
    """From ``least`` (with ``above``: from above it) to ``most``, both finite."""
    if most == math.inf:
        words = f"above {least:g}" if above else f"{least:g} or more"
    else:
        words = f"above {least:g} and at most {most:g}" if above else f"{least:g} to {most:g}"

    def allows(value: Any) -> bool:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            return False
        return (value > least if above else value >= least) and value <= most

    return Rule(words, allows)


def _one_of(*choices: Any) -> Rule:
    return Rule(
        ", ".join(str(choice) for choice in choices[:-1]) + f" or {choices[-1]}", _in(choices)
    )


def _in(choices: Sequence[Any]) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in choices)


def _either(first: Rule, second: Rule) -> Rule:
    return Rule(
        f"{first.words}, or {second.words}",
        lambda value: first.allows(value) or second.allows(value),
    )


def _list(item: Rule, *, least: int = 1, lengths: Sequence[int] = (), rising: bool = False) -> Rule:
    count = " or ".join(str(length) for length in lengths) if lengths else f"{least} or more"
    order = ", each above the one before" if rising else ""

    def allows(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and (len(value) in lengths if lengths else len(value) >= least)
            and all(item.allows(one) for one in value)
            and (not rising or all(a < b for a, b in pairwise(value)))
        )

    return Rule(f"a list of {count} values, each {item.words}{order}", allows)


_COUNT = _integer(1)
_COUNT_OR_ZERO = _integer(0)
_CHANNELS = _integer(1, _MOST_CHANNELS)
_LAYERS = _integer(0, _MOST_LAYERS)
_POSITIVE = _number(0, above=True)
_NOT_NEGATIVE = _number(0)
_FRACTION = _number(0, 1)
_PART = _number(0, 1, above=True)
_BELOW_ONE = Rule("0 or more and below 1", lambda v: _FRACTION.allows(v) and v < 1)
_CLASSES = _either(_one_of(-1), _integer(1, _MOST_CHANNELS))
_NAMES = _list(Rule("a name", lambda value: isinstance(value, str) and value != ""), least=0)
_NESTED_POSITIVE = _list(_either(_POSITIVE, _list(_POSITIVE)))
_BOX_WEIGHTS = _list(_POSITIVE, lengths=(4, 5))
_BOX_LOSS = _one_of("smooth_l1", "giou", "diou", "ciou")
_RESOLUTION = _integer(1, 1024)
_IOUS = _list(_FRACTION, rising=True)
_LABELS = _list(_one_of(-1, 0, 1))
_MASKS_OF = _integer(1, 2**20)

RULES = {
    "SEED": _integer(-_MOST),
    "VIS_PERIOD": _COUNT_OR_ZERO,
    "DATALOADER.NUM_WORKERS": _integer(0, 512),
    "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
    "DATALOADER.RANDOM_SUBSET_RATIO": _PART,
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATASETS.PROPOSAL_FILES_TRAIN": _NAMES,
    "DATASETS.PROPOSAL_FILES_TEST": _NAMES,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _COUNT,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _COUNT,
    "DATASETS.SHAPES.NAME": Rule(
        "a folder's name of letters, digits, _ and -",
        lambda value: bool(re.fullmatch(r"[\w-]{1,100}", value or "")),
    ),
    "DATASETS.SHAPES.NUM_TRAIN": _integer(1, 10**6),
    "DATASETS.SHAPES.NUM_VAL": _integer(1, 10**6),
    "DATASETS.SHAPES.IMAGE_SIZE": _list(_integer(1, _MOST_SIDE), lengths=(2,)),
    "DATASETS.SHAPES.MASK_FORMAT": _one_of("polygon", "rle"),
    "DATASETS.SHAPES.SEED": _COUNT_OR_ZERO,
    # 0 keeps the image's own size.
    "INPUT.MIN_SIZE_TRAIN": _list(_integer(0, _MOST_SIDE)),
    "INPUT.MIN_SIZE_TEST": _integer(0, _MOST_SIDE),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": _one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": _list(_POSITIVE, lengths=(2,)),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    "MODEL.PIXEL_MEAN": _list(_number(-1e6, 1e6)),
    "MODEL.PIXEL_STD": _list(_POSITIVE),
    "MODEL.BACKBONE.FREEZE_AT": _integer(-1, _MOST_LAYERS),
    "MODEL.TIMM.DROP_PATH_RATE": _BELOW_ONE,
    "MODEL.TIMM.OUT_FEATURES": _NAMES,
    "MODEL.FPN.IN_FEATURES": _NAMES,
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.FPN.FUSE_TYPE": _one_of("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.ANCHOR_GENERATOR.SIZES": _NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.OFFSET": _BELOW_ONE,
    "MODEL.RPN.IN_FEATURES": _NAMES,
    "MODEL.RPN.BOUNDARY_THRESH": _integer(-1),
    "MODEL.RPN.IOU_THRESHOLDS": _IOUS,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _PART,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.RPN.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.NMS_THRESH": _FRACTION,
    "MODEL.RPN.CONV_DIMS": _list(_either(_one_of(-1), _CHANNELS)),
    # -1 is as many as the training set has.
    "MODEL.ROI_HEADS.NUM_CLASSES": _CLASSES,
    "MODEL.ROI_HEADS.IN_FEATURES": _NAMES,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _IOUS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _PART,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _FRACTION,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _LAYERS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _CHANNELS,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _list(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _list(_FRACTION),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.NUM_FC": _integer(1, _MOST_LAYERS),
    "MODEL.ROI_MASK_HEAD.MLP.FC_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.OUTPUT_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": _list(_CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _integer(1, _MOST_CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _COUNT_OR_ZERO,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    **{
        f"MODEL.{head}.{key}": rule
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
        for key, rule in (
            ("POOLER_RESOLUTION", _RESOLUTION),
            ("POOLER_SAMPLING_RATIO", _integer(0, 1024)),
        )
    },
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _integer(1, _MOST_CHANNELS),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RETINANET.NUM_CLASSES": _integer(1, _MOST_CHANNELS),
    "MODEL.RETINANET.NUM_CONVS": _LAYERS,
    "MODEL.RETINANET.IOU_THRESHOLDS": _IOUS,
    "MODEL.RETINANET.IOU_LABELS": _LABELS,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.RETINANET.NMS_THRESH_TEST": _FRACTION,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _COUNT,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RESNETS.OUT_FEATURES": _NAMES,
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.RESNETS.RES5_DILATION": _one_of(1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _CHANNELS,
    "SOLVER.OPTIMIZER": _one_of("SGD", "ADAMW"),
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _BELOW_ONE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": _either(_one_of(None), _NOT_NEGATIVE),
    "SOLVER.GAMMA": _PART,
    "SOLVER.STEPS": _list(_COUNT_OR_ZERO, least=0, rising=True),
    "SOLVER.WARMUP_FACTOR": _FRACTION,
    "SOLVER.WARMUP_ITERS": _COUNT_OR_ZERO,
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": _COUNT_OR_ZERO,
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    # The one key whose infinity means something: the largest gradient.
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _either(_POSITIVE, _one_of(math.inf)),
    "TEST.EVAL_PERIOD": _COUNT_OR_ZERO,
    "TEST.DETECTIONS_PER_IMAGE": _MASKS_OF,
    "TEST.PREVIEW_IMAGES": _integer(0, 10**4),
    "TEST.KEYPOINT_OKS_SIGMAS": _list(_POSITIVE, least=0),
    "TEST.AUG.MIN_SIZES": _list(_integer(1, _MOST_SIDE)),
    "TEST.AUG.MAX_SIZE": _COUNT,
    "TEST.PRECISE_BN.NUM_ITER": _COUNT,
}


def check_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Compares every value of a config with what its key takes.

    Args:
        values: from a key with its dots ("SOLVER.BASE_LR") to its value.
        defaults: the same, as detectron2 and this project set them.

    Raises:
        UserError: a value is out of range, NaN, infinite or null, or two keys contradict.
    """
    for key, value in values.items():
        rule = RULES.get(key)
        if rule is None:
            _check_unlisted(key, value, defaults)
        elif not rule.allows(value):
            _refuse(key, value, rule.words)
    _check_together(values)


def _check_unlisted(key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    if value is None and defaults.get(key) is not None:
        _refuse(key, value, f"a value like {defaults[key]!r}")
    if not _finite(value):
        _refuse(key, value, "finite")


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def _check_together(values: Mapping[str, Any]) -> None:
    for key, other in (
        ("MODEL.PIXEL_STD", "MODEL.PIXEL_MEAN"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS"),
    ):
        if len(values[key]) != len(values[other]):
            _refuse(key, values[key], f"as long as {other}, which has {len(values[other])} values")
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = f"MODEL.{part}.IOU_THRESHOLDS", f"MODEL.{part}.IOU_LABELS"
        wanted = len(values[thresholds]) + 1
        if len(values[labels]) != wanted:
            _refuse(labels, values[labels], f"a list of {wanted}, one more than {thresholds} has")
    sizes = values["INPUT.MIN_SIZE_TRAIN"]
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range" and len(sizes) != 2:
        _refuse("INPUT.MIN_SIZE_TRAIN", sizes, "two sizes where its SAMPLING is 'range'")
    crop = values["INPUT.CROP.SIZE"]
    if values["INPUT.CROP.TYPE"].startswith("relative") and max(crop) > 1:
        _refuse("INPUT.CROP.SIZE", crop, "at most 1 where INPUT.CROP.TYPE is relative")


def _refuse(key: str, value: Any, words: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    raise UserError(f"{key} is {shown}: it must be {words}")
