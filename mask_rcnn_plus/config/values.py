"""Checks whether a config is valid: values, combinations of keys, names of components and metrics.

Every key of this project has its rule here. detectron2's keys have one only where a wrong value
would otherwise fail late, or silently train something else. All checks raise a UserError.
"""

import importlib.util
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.utils import comm

from mask_rcnn_plus.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Rule:
    """A test of a value, and the phrase that completes "it must be" in the message."""

    expected: str
    allows: Callable[[Any], bool]


_MAX_INTEGER = 2**31 - 1
_MAX_SIDE = 2**15 - 1  # OpenCV's limit for an image
_MAX_CHANNELS = 2**16  # far more than real models have, far less than what exhausts memory


def _integer(least: int, most: int = _MAX_INTEGER) -> Rule:
    expected = f"{least} or more" if most == _MAX_INTEGER else f"an integer of {least} to {most}"
    return Rule(expected, lambda value: type(value) is int and least <= value <= most)


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Rule:
    """Finite, from ``least`` (with ``above``: greater than it) to ``most``."""
    if above:
        expected = f"above {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    else:
        expected = f"{least:g} to {most:g}" if most < math.inf else f"{least:g} or more"

    def allows(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return (value > least if above else value >= least) and value <= most

    return Rule(expected, allows)


def _one_of(*choices: Any) -> Rule:
    """One of these values, of the same type."""
    first, last = ", ".join(map(str, choices[:-1])), str(choices[-1])
    expected = f"{first} or {last}" if first else last
    return Rule(expected, lambda value: (type(value), value) in [(type(c), c) for c in choices])


def _either(first: Rule, second: Rule) -> Rule:
    expected = f"{first.expected}, or {second.expected}"
    return Rule(expected, lambda value: first.allows(value) or second.allows(value))


def _auto(rule: Rule, auto: Any = -1) -> Rule:
    """The rule, or -1 for a value that follows from the training data."""
    expected = f"{rule.expected}, or {auto} (from the data)"
    return Rule(expected, lambda v: is_auto(v) or rule.allows(v))


def is_auto(value: Any) -> bool:
    """Whether a value is -1, or a list of such values: train_net.py chooses by the data."""
    if _is_list(value):
        return len(value) > 0 and all(map(is_auto, value))
    return type(value) in (int, float) and value == -1


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _list_of(
    item: Rule, *, least: int = 1, lengths: Sequence[int] = (), rising: bool = False
) -> Rule:
    """A list or tuple of items, with one of the lengths or at least ``least`` items."""
    count = " or ".join(map(str, lengths)) or f"{least} or more"
    order = ", each above the one before" if rising else ""

    def allows(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and (len(value) in lengths if lengths else len(value) >= least)
            and all(item.allows(v) for v in value)
            and (not rising or all(a < b for a, b in pairwise(value)))
        )

    return Rule(f"a list of {count} values, each {item.expected}{order}", allows)


def _per_level(item: Rule) -> Rule:
    """A list of values for each level. detectron2 also accepts one list, for all levels."""
    allows = _list_of(_either(item, _list_of(item))).allows
    return Rule(f"a list of lists of values, each {item.expected}", allows)


def _is_depth_rule(value: Any) -> bool:
    if value in ("image", "full"):
        return True
    try:
        low, high = map(float, value.split(".."))
    except (AttributeError, ValueError):
        return False
    return -math.inf < low < high < math.inf


_COUNT = _integer(1)
_COUNT_OR_ZERO = _integer(0)
_POSITIVE = _number(0, above=True)
_NOT_NEGATIVE = _number(0)
_FRACTION = _number(0, 1)
_SHARE = _number(0, 1, above=True)
_BELOW_ONE = Rule("0 or more and below 1", lambda v: _FRACTION.allows(v) and v < 1)
_CHANNELS = _integer(1, _MAX_CHANNELS)
_RESOLUTION = _integer(1, 1024)
_LAYERS = _integer(0, 100)
_NAMES = _list_of(Rule("a name", lambda v: isinstance(v, str) and v != ""), least=0)
# Beyond these ranges, the areas of anchors are 0 or infinite in float32.
_ANCHOR_SIZE = Rule("above 0 (0.1 to 100000 pixels)", _number(0.1, 1e5).allows)
_ANCHOR_RATIO = Rule("above 0 (0.01 to 100)", _number(0.01, 100).allows)
# Beyond this range, pixels become infinite or 0 in float32.
_PIXEL_STD = Rule("above 0 (1e-06 to 1e+06)", _number(1e-6, 1e6).allows)
_BOX_WEIGHTS = _list_of(_number(1e-3, 1e6), lengths=(4, 5))  # 5 for rotated boxes
# The samples per bin and direction; 0 or -1 chooses it by the RoI's size.
_SAMPLING = _integer(-1, 100)
_BOX_LOSS = _one_of("smooth_l1", "giou", "diou", "ciou")
_IOUS = _list_of(_FRACTION, rising=True)
_IOU_LABELS = _list_of(_one_of(-1, 0, 1))
_METRIC = Rule('the name of a metric, such as "segm/AP", or ""', lambda v: isinstance(v, str))
_LOGGERS = ("mlflow", "wandb")
_MODE = _one_of("auto", "max", "min")
# Smaller weights, or their gradients, may be 0 in float32.
_WEIGHT = Rule(
    "0, or 1e-06 to 1e+06", lambda v: _number(0, 0).allows(v) or _number(1e-6, 1e6).allows(v)
)

# The keys that engine/auto.py sets if they are -1, each after those that its rule needs.
AUTO = (
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.CROP.SIZE",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TRAIN",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "DATALOADER.REPEAT_THRESHOLD",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "TEST.DETECTIONS_PER_IMAGE",
)

RULES = {
    "VERSION": _one_of(2),
    "SEED": _integer(-_MAX_INTEGER),
    "DATALOADER.NUM_WORKERS": _integer(0, 512),
    "DATALOADER.REPEAT_THRESHOLD": _auto(_FRACTION, -1.0),
    "DATALOADER.TIMEOUT": _NOT_NEGATIVE,
    "DATALOADER.MAX_BAD_SAMPLES": _COUNT_OR_ZERO,
    "DATALOADER.RANDOM_SUBSET_RATIO": _SHARE,
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATASETS.SHAPES.NAME": Rule(
        "a folder's name of letters, digits, _ and -",
        lambda v: bool(re.fullmatch(r"[\w-]{1,100}", v or "")),
    ),
    "DATASETS.SHAPES.NUM_TRAIN": _integer(1, 10**6),
    "DATASETS.SHAPES.NUM_VAL": _integer(1, 10**6),
    "DATASETS.SHAPES.IMAGE_SIZE": _list_of(_integer(1, _MAX_SIDE), lengths=(2,)),
    "DATASETS.SHAPES.MASK_FORMAT": _one_of("polygon", "rle"),
    "DATASETS.SHAPES.FREQUENCIES": _list_of(_number(0, 1e6, above=True), lengths=(3,)),
    "DATASETS.SHAPES.SEED": _COUNT_OR_ZERO,
    # 0 keeps the image's own size.
    "INPUT.MIN_SIZE_TRAIN": _auto(_list_of(_integer(0, _MAX_SIDE)), (-1,)),
    "INPUT.MIN_SIZE_TEST": _auto(_integer(0, _MAX_SIDE)),
    "INPUT.MAX_SIZE_TRAIN": _auto(_COUNT),
    "INPUT.MAX_SIZE_TEST": _auto(_COUNT),
    # What else detectron2 reads (YUV-BT.601, HSV, ...) its resizing or drawing does not support.
    "INPUT.FORMAT": _one_of("BGR", "RGB", "L"),
    "INPUT.SIXTEEN_BIT": Rule("image, full, or a range such as 0..4095", _is_depth_rule),
    "INPUT.MAX_PIXELS": _COUNT_OR_ZERO,
    "INPUT.RANDOM_FLIP": _one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.SIZE": _auto(_list_of(_POSITIVE, lengths=(2,)), [-1.0, -1.0]),
    "INPUT.MASK_FORMAT": _one_of("polygon", "bitmask"),
    # Smaller scales make objects too small to see, larger ones show only parts of them.
    "INPUT.JITTER.SCALE": _list_of(_number(0.01, 100), lengths=(2,)),
    "INPUT.JITTER.SIZE": _either(
        Rule("()", lambda v: v in ((), [])), _list_of(_integer(8, 8192), lengths=(2,))
    ),
    "INPUT.COLOR.BRIGHTNESS": _FRACTION,
    "INPUT.COLOR.CONTRAST": _FRACTION,
    "INPUT.COLOR.SATURATION": _FRACTION,
    "INPUT.COLOR.LIGHTING": _number(0, 255),
    "INPUT.BLUR.PROB": _FRACTION,
    "INPUT.BLUR.SIGMA": _list_of(_number(0, 100, above=True), lengths=(2,)),
    "INPUT.COPY_PASTE.PROB": _FRACTION,
    "INPUT.COPY_PASTE.MAX_OBJECTS": _COUNT,
    "MODEL.PIXEL_MEAN": _list_of(_number(-1e6, 1e6)),
    "MODEL.PIXEL_STD": _list_of(_PIXEL_STD),
    "MODEL.FREEZE": _NAMES,
    "MODEL.TIMM.DROP_PATH_RATE": _BELOW_ONE,
    "MODEL.TIMM.OUT_FEATURES": _NAMES,
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.ANCHOR_GENERATOR.SIZES": _auto(_per_level(_ANCHOR_SIZE), [[-1]]),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _per_level(_ANCHOR_RATIO),
    "MODEL.RPN.BOUNDARY_THRESH": _integer(-1),
    "MODEL.RPN.CONV_DIMS": _list_of(_either(_one_of(-1), _CHANNELS)),
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.IOU_THRESHOLDS": _IOUS,
    "MODEL.RPN.IOU_LABELS": _IOU_LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": _COUNT,
    "MODEL.RPN.POST_NMS_TOPK_TEST": _COUNT,
    "MODEL.RPN.NMS_THRESH": _FRACTION,
    # -1 means as many as the training set has.
    "MODEL.ROI_HEADS.NUM_CLASSES": _either(_one_of(-1), _CHANNELS),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _IOUS,
    "MODEL.ROI_HEADS.IOU_LABELS": _IOU_LABELS,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _COUNT,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _FRACTION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _FRACTION,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _list_of(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": _SAMPLING,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": _SAMPLING,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": _SAMPLING,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _LAYERS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _CHANNELS,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_BOX_HEAD.LOSS_CLS": _one_of("cross_entropy", "focal"),
    # The paper goes up to 5. From about 10, only completely wrong predictions count.
    "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA": _number(0, 10),
    "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS": _list_of(_WEIGHT, least=0),
    "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING": _one_of("none", "inverse_frequency"),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.NUM_FC": _LAYERS,
    "MODEL.ROI_MASK_HEAD.MLP.FC_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.OUTPUT_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": _RESOLUTION,
    "SOLVER.OPTIMIZER": _one_of("SGD", "ADAMW"),
    "SOLVER.AMP.DTYPE": _one_of("fp16", "bf16"),
    "SOLVER.ACCUMULATE_STEPS": _COUNT,
    "SOLVER.MAX_ITER": _auto(_COUNT),
    "SOLVER.BASE_LR": _number(0, 1e6, above=True),  # above, weights overflow float32
    "SOLVER.MOMENTUM": _BELOW_ONE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": _either(_one_of(None), _NOT_NEGATIVE),
    "SOLVER.GAMMA": _SHARE,
    "SOLVER.STEPS": _auto(_list_of(_COUNT, least=0, rising=True), (-1,)),
    "SOLVER.WARMUP_FACTOR": _FRACTION,
    "SOLVER.WARMUP_ITERS": _auto(_COUNT_OR_ZERO),
    "SOLVER.WARMUP_METHOD": _one_of("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": _auto(_COUNT),
    "SOLVER.KEEP_CHECKPOINTS": _COUNT_OR_ZERO,
    "SOLVER.LOGGERS": _NAMES,
    "SOLVER.IMS_PER_BATCH": Rule("1 or more (at most 65536)", _integer(1, 2**16).allows),
    "SOLVER.REFERENCE_WORLD_SIZE": _COUNT_OR_ZERO,
    "SOLVER.REFERENCE_IMS_PER_BATCH": _COUNT_OR_ZERO,
    "SOLVER.EMA.DECAY": _BELOW_ONE,
    "SOLVER.EMA.WARMUP": _number(1, 1e9),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    # Infinity has a meaning here: the largest gradient.
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _either(_POSITIVE, _one_of(math.inf)),
    "TEST.EVAL_PERIOD": _auto(_COUNT_OR_ZERO),
    "TEST.EXPECTED_RESULTS": _list_of(
        Rule("[task, metric, value, tolerance]", lambda v: _is_list(v) and len(v) == 4), least=0
    ),
    "TEST.PRECISE_BN.NUM_ITER": _COUNT,
    "TEST.DETECTIONS_PER_IMAGE": _auto(_integer(1, 2**20)),
    "TEST.KEYPOINT_OKS_SIGMAS": _list_of(_number(0, 100, above=True), least=0),
    "TEST.BEST_METRIC": _METRIC,
    "TEST.BEST_MODE": _MODE,
    "TEST.LOSS_PERIOD": _COUNT_OR_ZERO,
    "TEST.LOSS_IMAGES": _COUNT_OR_ZERO,
    "TEST.EARLY_STOPPING.METRIC": _METRIC,
    "TEST.EARLY_STOPPING.MODE": _MODE,
    "TEST.EARLY_STOPPING.PATIENCE": _COUNT,
    "TEST.EARLY_STOPPING.MIN_DELTA": _NOT_NEGATIVE,
    "TEST.PREVIEW_IMAGES": _integer(0, 10**4),
    "TEST.OPTIMIZE.DTYPE": _one_of("fp32", "bf16", "fp16"),
}


def check_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks every value of a config, and keys against each other.

    Args:
        values: all values by their full keys, such as "SOLVER.BASE_LR".
        defaults: the same, with the defaults of detectron2 and this project.
    """
    for key, value in values.items():
        if not _is_text(value):
            raise _invalid(key, value, "text without NUL characters and without broken Unicode")
        if key in RULES:
            if not RULES[key].allows(value):
                raise _invalid(key, value, RULES[key].expected)
        elif value is None and defaults.get(key) is not None:
            raise _invalid(key, value, f"a value like {defaults[key]!r}")
        elif not _is_finite(value):
            raise _invalid(key, value, "finite")
    _check_combinations(values)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _is_text(value: Any) -> bool:
    """Whether the strings in a value can be file names, and be written into files."""
    if isinstance(value, list | tuple):
        return all(map(_is_text, value))
    if not isinstance(value, str):
        return True
    return "\0" not in value and value == value.encode(errors="ignore").decode()


def _check_combinations(values: Mapping[str, Any]) -> None:
    def require(key: str, valid: bool, expected: str) -> None:
        if not valid:
            raise _invalid(key, values[key], expected)

    same = len(values["MODEL.PIXEL_STD"]) == len(values["MODEL.PIXEL_MEAN"])
    require("MODEL.PIXEL_STD", same, "as long as MODEL.PIXEL_MEAN")
    for part in ("MODEL.RPN", "MODEL.ROI_HEADS"):
        thresholds, labels = f"{part}.IOU_THRESHOLDS", f"{part}.IOU_LABELS"
        count = len(values[thresholds]) + 1
        valid = len(values[labels]) == count
        require(labels, valid, f"a list of {count}, one more than {thresholds} has")
    fits = max(values["INPUT.CROP.SIZE"]) <= 1 or values["INPUT.CROP.TYPE"].startswith("absolute")
    require("INPUT.CROP.SIZE", fits, "at most 1 if INPUT.CROP.TYPE is relative")
    fits = not is_auto(values["INPUT.CROP.SIZE"]) or values["INPUT.CROP.TYPE"] == "relative"
    require("INPUT.CROP.SIZE", fits, "given unless INPUT.CROP.TYPE is relative")
    # Padding after a crop would bring back boxes and keypoints that the crop has cut off.
    both = values["INPUT.JITTER.ENABLED"] and values["INPUT.CROP.ENABLED"]
    require("INPUT.CROP.ENABLED", not both, "False if INPUT.JITTER.ENABLED is True")
    if values["INPUT.JITTER.ENABLED"] and not values[key := "INPUT.JITTER.SIZE"]:
        require(key, min(values["INPUT.MIN_SIZE_TRAIN"]) > 0, "given if INPUT.MIN_SIZE_TRAIN is 0")
    for key in ("INPUT.JITTER.SCALE", "INPUT.BLUR.SIGMA"):
        require(key, values[key][0] <= values[key][1], "the smallest value, then the largest")
    if values["INPUT.FORMAT"] == "L":
        for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "LIGHTING"):
            key = f"INPUT.COLOR.{name}"
            require(key, values[key] == 0, "0 if INPUT.FORMAT is L")
    if values[key := "INPUT.COPY_PASTE.PROB"] > 0:
        require(key, values["MODEL.MASK_ON"], "0 unless MODEL.MASK_ON is True")
        require(key, not values["MODEL.LOAD_PROPOSALS"], "0 unless MODEL.LOAD_PROPOSALS is False")
        semantic = values["MODEL.META_ARCHITECTURE"] in ("PanopticFPN", "SemanticSegmentor")
        require(key, not semantic, "0 with semantic segmentation")


def _invalid(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{key} is {reprlib.repr(value)}: it must be {expected}")


def check_components(cfg: CfgNode) -> None:
    """Refuses names of components that are not registered."""
    groups = ["BACKBONE", "PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "ROI_HEADS", "ROI_BOX_HEAD"]
    groups += ["ROI_MASK_HEAD"] * cfg.MODEL.MASK_ON + ["ROI_KEYPOINT_HEAD"] * cfg.MODEL.KEYPOINT_ON
    components = [("META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, modeling.META_ARCH_REGISTRY)]
    components += [
        (f"{group}.NAME", cfg.MODEL[group].NAME, getattr(modeling, f"{group}_REGISTRY"))
        for group in groups
    ]
    for key, name, registry in components:
        # detectron2 does not look up an empty name of a head, or PrecomputedProposals.
        if name and name != "PrecomputedProposals" and name not in registry:
            known = [known for known, _ in registry]
            hint = did_you_mean(name, known) or f"; registered: {', '.join(known)}"
            raise UserError(f"MODEL.{key} is '{name}', which is not registered{hint}")


def check_solver(cfg: CfgNode, device: str) -> None:
    """Refuses a solver that does not suit the device or the number of processes."""
    solver = cfg.SOLVER
    if device.startswith("meta"):
        raise UserError("MODEL.DEVICE is 'meta', which holds no values: set auto, cpu or cuda")
    if solver.AMP.ENABLED and solver.AMP.DTYPE == "fp16" and not device.startswith("cuda"):
        raise UserError(
            f"SOLVER.AMP.DTYPE fp16 needs a GPU, but the device is '{device}': set "
            "SOLVER.AMP.DTYPE bf16, or SOLVER.AMP.ENABLED False"
        )
    processes = comm.get_world_size()
    if processes > 1 and device.startswith("cuda:"):
        raise UserError(
            f"MODEL.DEVICE is '{device}', but each of {processes} processes needs a GPU of its "
            "own: set MODEL.DEVICE cuda"
        )
    share, rest = divmod(solver.IMS_PER_BATCH, processes)
    if rest:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, which {processes} processes cannot "
            f"share: set a multiple of {processes}"
        )
    if share % solver.ACCUMULATE_STEPS:
        raise UserError(
            f"SOLVER.ACCUMULATE_STEPS is {solver.ACCUMULATE_STEPS}, but a process's share of a "
            f"batch has {share} images: set a divisor of that"
        )


def check_optimize(cfg: CfgNode, device: str) -> None:
    """Refuses a TEST.OPTIMIZE.DTYPE that does not suit the device."""
    optimize = cfg.TEST.OPTIMIZE
    if optimize.ENABLED and optimize.DTYPE == "fp16" and device == "cpu":
        raise UserError(
            "TEST.OPTIMIZE.DTYPE is 'fp16', which CPUs compute slower than fp32: set bf16 or fp32"
        )


# Prefixes of metrics: averaged weights, and losses on the test sets.
_AVERAGED, _VALIDATION = "ema/", "validation/"
# The tasks of an evaluation, with the switches that each one needs.
_TASKS: dict[str, tuple[str, ...]] = {
    "bbox": (),
    "segm": ("MODEL.MASK_ON",),
    "boundary": ("MODEL.MASK_ON", "TEST.BOUNDARY_AP"),
    "keypoints": ("MODEL.KEYPOINT_ON",),
}
# The metrics of each task, besides AP-<class>.
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def check_options(cfg: CfgNode) -> None:
    """Refuses options that have no effect without others, or with these ROI heads."""
    test = cfg.TEST
    if test.LOSS_PERIOD and not cfg.DATASETS.TEST:
        raise UserError(
            f"TEST.LOSS_PERIOD is {test.LOSS_PERIOD}, but DATASETS.TEST is empty: name a data set"
        )
    for key, name in _named_metrics(cfg):
        cause = ""
        if name.startswith(_VALIDATION):
            if not test.LOSS_PERIOD:
                cause = "TEST.LOSS_PERIOD 0 measures no losses"
        elif key == "TEST.EARLY_STOPPING.METRIC" and not test.EVAL_PERIOD:
            cause = "TEST.EVAL_PERIOD 0 evaluates at the end only"
        if cause:
            raise UserError(f"{key} is '{name}', but {cause}: set it to a number of iterations")
        if name.startswith(_AVERAGED) and not cfg.SOLVER.EMA.ENABLED:
            raise UserError(f"{key} is '{name}': set SOLVER.EMA.ENABLED True")
    head, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS.NAME
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and heads.startswith("Fused"):
        return
    defaults = {"LOSS_CLS": "cross_entropy", "CLASS_WEIGHTS": [], "CLASS_WEIGHTING": "none"}
    for key, default in defaults.items():
        if head[key] != default:
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.{key} is {head[key]}, which MODEL.ROI_HEADS.NAME '{heads}' "
                "does not support: set FusedROIHeads, FusedRes5ROIHeads or FusedCascadeROIHeads"
            )


def check_sampler(cfg: CfgNode) -> None:
    """Refuses a RepeatFactorTrainingSampler that would repeat no image."""
    loader = cfg.DATALOADER
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and not loader.REPEAT_THRESHOLD:
        raise UserError(
            "DATALOADER.SAMPLER_TRAIN is 'RepeatFactorTrainingSampler', but REPEAT_THRESHOLD 0 "
            "repeats no image: set the share of the images below which a class counts as rare, "
            "such as 0.001 for LVIS"
        )


def check_loggers(cfg: CfgNode) -> None:
    """Refuses loggers that are unknown or not installed."""
    for name in cfg.SOLVER.LOGGERS:
        if name not in _LOGGERS:
            known = "TensorBoard is always on; others: " + " and ".join(_LOGGERS)
            raise UserError(
                f"SOLVER.LOGGERS: unknown '{name}'{did_you_mean(name, _LOGGERS) or f'; {known}'}"
            )
        # A folder of that name, which the services themselves create, is not the package.
        if not (spec := importlib.util.find_spec(name)) or not spec.origin:
            raise UserError(
                f"SOLVER.LOGGERS names '{name}', which is not installed: "
                f"`uv sync --extra {name}`, or `pip install {name}`"
            )


def check_metrics(cfg: CfgNode) -> None:
    """Refuses names of metrics that no evaluation of the run can produce."""
    sets = cfg.DATASETS.TEST
    for key, name in _named_metrics(cfg):
        if not sets:
            raise UserError(f"{key} is '{name}', but DATASETS.TEST is empty: name a data set")
        metric = name.removeprefix(_AVERAGED).removeprefix(_VALIDATION)
        if len(sets) > 1:
            test_set = next((s for s in sets if metric.startswith(f"{s}/")), None)
            if test_set is None:
                prefix = name.removesuffix(metric)
                raise UserError(
                    f"{key} is '{name}', but there are {len(sets)} test sets: name one, such as "
                    f"'{prefix}{sets[0]}/{metric}'"
                )
            metric = metric.removeprefix(f"{test_set}/")
        if name.startswith(_VALIDATION):
            continue
        task, slash, kind = metric.partition("/")
        # The user's own evaluators may have other tasks.
        if not slash or (task in _TASKS and kind not in _METRICS and not kind.startswith("AP-")):
            known = [f"{task}/{kind}" for task in _TASKS for kind in _METRICS]
            hint = did_you_mean(metric, known) or "; a metric has a name like segm/AP"
            raise UserError(f"{key} is '{name}', which is not a metric of an evaluation{hint}")
        if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
            for switch in _TASKS.get(task, ()):
                group, option = switch.split(".")
                if not cfg[group][option]:
                    raise UserError(f"{key} is '{name}', but {switch} is False: set it to True")


def check_class_metrics(cfg: CfgNode, names: Sequence[str]) -> None:
    """Refuses the AP of a class that is not among the names. Without names, accepts all."""
    if not names:
        return
    for key, name in _named_metrics(cfg):
        task, separator, class_name = name.partition("/AP-")
        if separator and task.rsplit("/", 1)[-1] in _TASKS and class_name not in names:
            hint = did_you_mean(class_name, names) or f"; the classes are {', '.join(names)}"
            raise UserError(f"{key} is '{name}', but no class is called '{class_name}'{hint}")


def _named_metrics(cfg: CfgNode) -> list[tuple[str, str]]:
    best, stopping = cfg.TEST.BEST_METRIC, cfg.TEST.EARLY_STOPPING.METRIC
    metrics = {"TEST.BEST_METRIC": best, "TEST.EARLY_STOPPING.METRIC": stopping}
    return [(key, name) for key, name in metrics.items() if name]
