"""Which values each config key takes, so that a wrong one is refused and not trained with."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mask_rcnn_plus.config.rules import (
    MOST,
    MOST_CHANNELS,
    MOST_LAYERS,
    MOST_SIDE,
    Rule,
    either,
    integer,
    list_of,
    number,
    one_of,
)
from mask_rcnn_plus.errors import UserError

_COUNT = integer(1)
_COUNT_OR_ZERO = integer(0)
_CHANNELS = integer(1, MOST_CHANNELS)
_LAYERS = integer(0, MOST_LAYERS)
_POSITIVE = number(0, above=True)
_NOT_NEGATIVE = number(0)
_FRACTION = number(0, 1)
_PART = number(0, 1, above=True)
_BELOW_ONE = Rule("0 or more and below 1", lambda v: _FRACTION.allows(v) and v < 1)
# Smaller ones, or their gradients, may be 0 in float32.
_WEIGHT = Rule(
    "0, or 1e-06 to 1e+06", lambda v: number(1e-6, 1e6).allows(v) or number(0, 0).allows(v)
)
_CLASSES = either(one_of(-1), integer(1, MOST_CHANNELS))
_NAMES = list_of(Rule("a name", lambda value: isinstance(value, str) and value != ""), least=0)
_NESTED_POSITIVE = list_of(either(_POSITIVE, list_of(_POSITIVE)))
_BOX_WEIGHTS = list_of(_POSITIVE, lengths=(4, 5))
_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_RESOLUTION = integer(1, 1024)
_IOUS = list_of(_FRACTION, rising=True)
_LABELS = list_of(one_of(-1, 0, 1))
_MASKS_OF = integer(1, 2**20)
_MODE = one_of("auto", "max", "min")
_FIGURE = Rule('a figure\'s name, as "segm/AP", or ""', lambda value: isinstance(value, str))

RULES = {
    "SEED": integer(-MOST),
    "VIS_PERIOD": _COUNT_OR_ZERO,
    "DATALOADER.NUM_WORKERS": integer(0, 512),
    "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
    "DATALOADER.TIMEOUT": _NOT_NEGATIVE,
    "DATALOADER.MAX_BAD_SAMPLES": _COUNT_OR_ZERO,
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
    "DATASETS.SHAPES.NUM_TRAIN": integer(1, 10**6),
    "DATASETS.SHAPES.NUM_VAL": integer(1, 10**6),
    "DATASETS.SHAPES.IMAGE_SIZE": list_of(integer(1, MOST_SIDE), lengths=(2,)),
    "DATASETS.SHAPES.MASK_FORMAT": one_of("polygon", "rle"),
    "DATASETS.SHAPES.FREQUENCIES": list_of(number(0, 1e6, above=True), lengths=(3,)),
    "DATASETS.SHAPES.SEED": _COUNT_OR_ZERO,
    # 0 keeps the image's own size.
    "INPUT.MIN_SIZE_TRAIN": list_of(integer(0, MOST_SIDE)),
    "INPUT.MIN_SIZE_TEST": integer(0, MOST_SIDE),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _COUNT,
    "INPUT.MAX_SIZE_TEST": _COUNT,
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": list_of(_POSITIVE, lengths=(2,)),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    # Smaller ones leave no object, larger ones show none whole.
    "INPUT.JITTER.SCALE": list_of(number(0.01, 100), lengths=(2,)),
    "INPUT.JITTER.SIZE": list_of(integer(8, 8192), lengths=(2,)),
    "INPUT.COLOR.BRIGHTNESS": _FRACTION,
    "INPUT.COLOR.CONTRAST": _FRACTION,
    "INPUT.COLOR.SATURATION": _FRACTION,
    "INPUT.COLOR.LIGHTING": number(0, 255),
    "INPUT.BLUR.PROB": _FRACTION,
    "INPUT.BLUR.SIGMA": list_of(number(0, 100, above=True), lengths=(2,)),
    "INPUT.COPY_PASTE.PROB": _FRACTION,
    "INPUT.COPY_PASTE.MAX_OBJECTS": _COUNT,
    "MODEL.PIXEL_MEAN": list_of(number(-1e6, 1e6)),
    "MODEL.PIXEL_STD": list_of(_POSITIVE),
    "MODEL.BACKBONE.FREEZE_AT": integer(-1, MOST_LAYERS),
    "MODEL.FREEZE": _NAMES,
    "MODEL.TIMM.DROP_PATH_RATE": _BELOW_ONE,
    "MODEL.TIMM.OUT_FEATURES": _NAMES,
    "MODEL.FPN.IN_FEATURES": _NAMES,
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.ANCHOR_GENERATOR.SIZES": _NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _NESTED_POSITIVE,
    "MODEL.ANCHOR_GENERATOR.OFFSET": _BELOW_ONE,
    "MODEL.RPN.IN_FEATURES": _NAMES,
    "MODEL.RPN.BOUNDARY_THRESH": integer(-1),
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
    "MODEL.RPN.CONV_DIMS": list_of(either(one_of(-1), _CHANNELS)),
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
    "MODEL.ROI_BOX_HEAD.LOSS_CLS": one_of("cross_entropy", "focal"),
    # The paper tries up to 5; from about 10 on, nothing but what is wholly wrong counts.
    "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA": number(0, 10),
    "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS": list_of(_WEIGHT, least=0),
    "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING": one_of("none", "inverse_frequency"),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": list_of(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": list_of(_FRACTION),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": _LAYERS,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.NUM_FC": _LAYERS,
    "MODEL.ROI_MASK_HEAD.MLP.FC_DIM": _CHANNELS,
    "MODEL.ROI_MASK_HEAD.MLP.OUTPUT_RESOLUTION": _RESOLUTION,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": list_of(_CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": integer(1, MOST_CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _COUNT_OR_ZERO,
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    **{
        f"MODEL.{head}.{key}": rule
        for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
        for key, rule in (
            ("POOLER_RESOLUTION", _RESOLUTION),
            ("POOLER_SAMPLING_RATIO", integer(0, 1024)),
        )
    },
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": integer(1, MOST_CHANNELS),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RETINANET.NUM_CLASSES": integer(1, MOST_CHANNELS),
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
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _CHANNELS,
    "SOLVER.OPTIMIZER": one_of("SGD", "ADAMW"),
    "SOLVER.AMP.DTYPE": one_of("fp16", "bf16"),
    "SOLVER.ACCUMULATE_STEPS": _COUNT,
    "SOLVER.MAX_ITER": _COUNT,
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": _BELOW_ONE,
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": either(one_of(None), _NOT_NEGATIVE),
    "SOLVER.GAMMA": _PART,
    "SOLVER.STEPS": list_of(_COUNT, least=0, rising=True),
    "SOLVER.WARMUP_FACTOR": _FRACTION,
    "SOLVER.WARMUP_ITERS": _COUNT_OR_ZERO,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": _COUNT,
    "SOLVER.KEEP_CHECKPOINTS": _COUNT_OR_ZERO,
    "SOLVER.IMS_PER_BATCH": _COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": _COUNT_OR_ZERO,
    "SOLVER.REFERENCE_IMS_PER_BATCH": _COUNT_OR_ZERO,
    "SOLVER.EMA.DECAY": _BELOW_ONE,
    "SOLVER.EMA.WARMUP": number(1, 1e9),
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    # The one key whose infinity means something: the largest gradient.
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(_POSITIVE, one_of(math.inf)),
    "TEST.EVAL_PERIOD": _COUNT_OR_ZERO,
    "TEST.DETECTIONS_PER_IMAGE": _MASKS_OF,
    "TEST.BEST_METRIC": _FIGURE,
    "TEST.BEST_MODE": _MODE,
    "TEST.LOSS_PERIOD": _COUNT_OR_ZERO,
    "TEST.LOSS_IMAGES": _COUNT_OR_ZERO,
    "TEST.EARLY_STOPPING.METRIC": _FIGURE,
    "TEST.EARLY_STOPPING.MODE": _MODE,
    "TEST.EARLY_STOPPING.PATIENCE": _COUNT,
    "TEST.EARLY_STOPPING.MIN_DELTA": _NOT_NEGATIVE,
    "TEST.PREVIEW_IMAGES": integer(0, 10**4),
    "TEST.OPTIMIZE.DTYPE": one_of("fp32", "bf16", "fp16"),
    "TEST.KEYPOINT_OKS_SIGMAS": list_of(_POSITIVE, least=0),
    "TEST.AUG.MIN_SIZES": list_of(integer(1, MOST_SIDE)),
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
    # Padding after a crop would bring back the boxes and keypoints that the crop has cut off.
    if values["INPUT.JITTER.ENABLED"] and values["INPUT.CROP.ENABLED"]:
        _refuse("INPUT.CROP.ENABLED", True, "False where INPUT.JITTER.ENABLED is True")
    for key in ("INPUT.JITTER.SCALE", "INPUT.BLUR.SIGMA"):
        if values[key][0] > values[key][1]:
            _refuse(key, values[key], "the least value, then the largest")
    for color in ("BRIGHTNESS", "CONTRAST", "SATURATION", "LIGHTING"):
        key, fits = f"INPUT.COLOR.{color}", ("RGB", "BGR")
        if values[key] > 0 and values["INPUT.FORMAT"] not in fits:
            _refuse(key, values[key], "0 where INPUT.FORMAT is neither RGB nor BGR")
    pasting = values["INPUT.COPY_PASTE.PROB"]
    if pasting > 0:
        for key, wanted in (("MODEL.MASK_ON", True), ("MODEL.LOAD_PROPOSALS", False)):
            if values[key] != wanted:
                _refuse("INPUT.COPY_PASTE.PROB", pasting, f"0 unless {key} is {wanted}")
        if values["MODEL.META_ARCHITECTURE"] in ("PanopticFPN", "SemanticSegmentor"):
            _refuse("INPUT.COPY_PASTE.PROB", pasting, "0 with semantic segmentation")


def _refuse(key: str, value: Any, words: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    raise UserError(f"{key} is {shown}: it must be {words}")
