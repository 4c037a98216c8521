"""The values that config keys accept."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg as detectron2_config

from mask_rcnn_plus import UserError, get_cfg, load_config
from mask_rcnn_plus.config import values
from mask_rcnn_plus.config.values import RULES, check_values
from mask_rcnn_plus.engine import ema, validation
from mask_rcnn_plus.evaluation.coco import TASKS
from tests.test_configs import leaves


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("VERSION: 2\n")
    return path


def test_detectron2s_defaults_and_ours_are_in_range() -> None:
    defaults = dict(leaves(get_cfg()))
    check_values(defaults, defaults)


def test_every_rule_belongs_to_an_existing_key() -> None:
    assert not RULES.keys() - dict(leaves(get_cfg())).keys()


def test_every_number_and_choice_of_this_project_has_a_rule() -> None:
    ours = dict(leaves(get_cfg()))
    for key in dict(leaves(detectron2_config())):
        ours.pop(key)
    free = {"DATA_CHECK", "MODEL.TIMM.NAME"}  # checked where they are used
    unruled = {key for key, value in ours.items() if type(value) is not bool} - RULES.keys()
    assert unruled == free


def test_metrics_have_the_names_that_the_engine_gives_them() -> None:
    names = (values._AVERAGED, values._VALIDATION, values._TASKS.keys())
    assert names == (f"{ema.NAME}/", f"{validation.NAME}/", TASKS.keys())


def test_settings_of_the_model_zoo_are_in_range(config: Path) -> None:
    zoo = {
        "SOLVER.STEPS": "(210000, 250000)",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "1e999",  # documented: the largest gradient
        "SOLVER.WEIGHT_DECAY_BIAS": "0.0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0001",  # LVIS
        "TEST.DETECTIONS_PER_IMAGE": "300",
        "DATALOADER.REPEAT_THRESHOLD": "0.001",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "(10.0, 10.0, 5.0, 5.0, 1.0)",  # rotated
        "MODEL.ANCHOR_GENERATOR.SIZES": "[[32, 64.5], [128]]",
        "MODEL.RPN.CONV_DIMS": "[-1, -1]",
        "MODEL.ROI_HEADS.NUM_CLASSES": "-1",
        "INPUT.MIN_SIZE_TEST": "0",  # the image's own size
        "INPUT.FORMAT": "L",
        "INPUT.SIXTEEN_BIT": "-1000..400",  # a computed tomography scan
        "TEST.EXPECTED_RESULTS": "[['bbox', 'AP', 38.5, 0.2]]",
    }
    load_config(config, [part for pair in zoo.items() for part in pair])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.IMS_PER_BATCH", "-2", "1 or more"),
        ("SOLVER.BASE_LR", "0.0", "above 0"),
        ("SOLVER.BASE_LR", "-0.1", "above 0"),
        ("SOLVER.BASE_LR", "None", "above 0"),
        ("SOLVER.BASE_LR", "1e999", "above 0"),
        ("SOLVER.MOMENTUM", "1.0", "below 1"),
        ("TEST.OPTIMIZE.DTYPE", "int8", "fp32, bf16 or fp16"),
        ("SOLVER.STEPS", "(30, 20)", "each above the one before"),
        ("SOLVER.STEPS", "('a',)", "0 or more"),
        ("SOLVER.WARMUP_METHOD", "cubic", "linear or constant"),
        ("SOLVER.EMA.DECAY", "1.0", "below 1"),
        ("SOLVER.EMA.WARMUP", "0.5", "1 to 1e+09"),
        ("SOLVER.REFERENCE_IMS_PER_BATCH", "-1", "0 or more"),
        ("MODEL.FREEZE", "['']", "a name"),
        ("MODEL.ROI_BOX_HEAD.LOSS_CLS", "bce", "cross_entropy or focal"),
        ("MODEL.ROI_BOX_HEAD.FOCAL_GAMMA", "-1.0", "0 to 10"),
        ("MODEL.ROI_BOX_HEAD.FOCAL_GAMMA", "100.0", "0 to 10"),
        ("SOLVER.STEPS", "(0,)", "1 or more"),
        ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1.0, -1.0]", "0, or 1e-06 to 1e+06"),
        ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1e-50, 1.0]", "0, or 1e-06 to 1e+06"),
        ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[True]", "0, or 1e-06 to 1e+06"),
        ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[False]", "0, or 1e-06 to 1e+06"),
        ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING", "sqrt", "none or inverse_frequency"),
        ("TEST.BEST_MODE", "up", "auto, max or min"),
        ("TEST.LOSS_PERIOD", "-1", "0 or more"),
        ("TEST.LOSS_IMAGES", "-1", "0 or more"),
        ("TEST.EARLY_STOPPING.PATIENCE", "0", "1 or more"),
        ("TEST.EARLY_STOPPING.MIN_DELTA", "-0.1", "0 or more"),
        ("TEST.EARLY_STOPPING.MODE", "down", "auto, max or min"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "abc", "None, or 0 or more"),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "-1.0", "above 0"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "a list of 1 or more"),
        ("INPUT.MIN_SIZE_TRAIN", "(100000,)", "0 to 32767"),
        ("INPUT.FORMAT", "YUV-BT.601", "BGR, RGB or L"),
        ("INPUT.FORMAT", "HSV", "BGR, RGB or L"),
        ("INPUT.SIXTEEN_BIT", "fulll", "image, full, or a range"),
        ("INPUT.SIXTEEN_BIT", "4095..0", "image, full, or a range"),
        ("INPUT.SIXTEEN_BIT", "0..1e999", "image, full, or a range"),
        ("INPUT.MAX_PIXELS", "-1", "0 or more"),
        ("INPUT.RANDOM_FLIP", "diagonal", "horizontal, vertical or none"),
        ("INPUT.CROP.SIZE", "[2.0, 0.5]", "at most 1 if"),
        ("INPUT.JITTER.SCALE", "(0.0, 2.0)", "0.01 to 100"),
        ("INPUT.JITTER.SCALE", "(1e-9, 2.0)", "0.01 to 100"),
        ("INPUT.JITTER.SIZE", "(1, 1)", "8 to 8192"),
        ("INPUT.JITTER.SCALE", "(2.0, 0.5)", "the smallest value, then the largest"),
        ("INPUT.JITTER.SIZE", "(512,)", "a list of 2 values"),
        ("INPUT.COLOR.BRIGHTNESS", "1.5", "0 to 1"),
        ("INPUT.COLOR.LIGHTING", "-1.0", "0 to 255"),
        ("INPUT.BLUR.SIGMA", "(3.0, 1.0)", "the smallest value, then the largest"),
        ("INPUT.COPY_PASTE.MAX_OBJECTS", "0", "1 or more"),
        # MODEL.MASK_ON is False by default.
        ("INPUT.COPY_PASTE.PROB", "0.5", "0 unless MODEL.MASK_ON is True"),
        ("TEST.PREVIEW_IMAGES", "-3", "0 to 10000"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "1 to"),
        ("DATALOADER.NUM_WORKERS", "-1", "0 to 512"),
        ("DATALOADER.NUM_WORKERS", "1000000", "0 to 512"),
        ("DATASETS.TRAIN", "(3,)", "a name"),
        ("DATASETS.SHAPES.NAME", "../shapes", "a folder's name"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]", "above 0"),
        ("MODEL.PIXEL_STD", "[1.0]", "as long as MODEL.PIXEL_MEAN"),
        ("MODEL.PIXEL_MEAN", "[1e999, 0.0, 0.0]", "a list"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[0]]", "above 0"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, -1.0]]", "above 0"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "0", "-1, or an integer of 1"),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.5", "0 to 1"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.5, 0.4]", "each above the one before"),
        ("MODEL.ROI_HEADS.IOU_LABELS", "[0]", "a list of 2"),
        ("MODEL.RPN.NMS_THRESH", "-0.1", "0 to 1"),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", "0", "1 or more"),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", "1000000000000", "1 to 65536"),
        ("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "0", "1 to 1024"),
        ("GLOBAL.HACK", "-1e999", "finite"),
        ("OUTPUT_DIR", "None", "a value like './output'"),
        ("OUTPUT_DIR", "a\0b", "text without NUL"),
        ("MODEL.WEIGHTS", "a\udc80.pth", "broken Unicode"),
        ("DATASETS.TRAIN", "('a\\udc80',)", "broken Unicode"),
        ("MODEL.PIXEL_STD", "[1e-320, 1.0, 1.0]", "1e-06"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[1e-30]]", "0.1 to 100000"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[1e-30]]", "a list of lists of values, each above 0"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1e300]]", "0.01 to 100"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", "()", "a list of 4 or 5 values"),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2147483647", "-1 to 100"),
        ("MODEL.ROI_MASK_HEAD.NUM_CONV", "1000000", "0 to 100"),
        ("INPUT.JITTER.SIZE", "(8,)", "(), or a list of 2"),
        ("TEST.EXPECTED_RESULTS", "(1,)", "[task, metric, value, tolerance]"),
        ("TEST.PRECISE_BN.NUM_ITER", "-1", "1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(
    config: Path, key: str, value: str, expected: str
) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(config, [key, value])
    message = str(refusal.value)
    assert message.startswith(f"{key} is ") and expected in message and "\n" not in message


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER:\n  WEIGHT_DECAY: .nan\n")
    with pytest.raises(UserError, match=r"SOLVER\.WEIGHT_DECAY is nan: it must be 0 or more"):
        load_config(path)


def test_an_integer_is_a_number_also_where_the_default_is_one(config: Path) -> None:
    cfg = load_config(config, ["SOLVER.BASE_LR", "1"])
    assert cfg.SOLVER.BASE_LR == 1.0 and isinstance(cfg.SOLVER.BASE_LR, float)
    config.write_text("SOLVER: {BASE_LR: 1}\n")
    assert isinstance(load_config(config).SOLVER.BASE_LR, float)
    with pytest.raises(UserError, match="must be an integer"):
        load_config(config, ["SOLVER.MAX_ITER", "1.5"])


def test_contradictory_keys_are_refused(config: Path) -> None:
    for expected, *opts in (
        ("False if", "INPUT.CROP.ENABLED", "True", "INPUT.JITTER.ENABLED", "True"),
        (
            "given if INPUT.MIN_SIZE_TRAIN is 0",
            *("INPUT.JITTER.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(0,)"),
        ),
        ("0 if INPUT.FORMAT", "INPUT.COLOR.LIGHTING", "10.0", "INPUT.FORMAT", "L"),
        (
            "0 unless MODEL.LOAD_PROPOSALS is False",
            *("INPUT.COPY_PASTE.PROB", "0.5", "MODEL.MASK_ON", "True"),
            *("MODEL.LOAD_PROPOSALS", "True"),
        ),
        (
            "0 with semantic segmentation",
            *("INPUT.COPY_PASTE.PROB", "0.5", "MODEL.MASK_ON", "True"),
            *("MODEL.META_ARCHITECTURE", "PanopticFPN"),
        ),
    ):
        with pytest.raises(UserError, match=expected):
            load_config(config, opts)
