"""Settings of -1 follow from the training data; explicit values, and those of a run, win."""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.config.values import AUTO, is_auto
from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.auto import resolve, warn_of_little_data
from mask_rcnn_plus.engine.auto_rules import images_to_see, images_to_see_pretrained
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.engine.derived import scale_schedule
from mask_rcnn_plus.prediction.building import resolve_classes

SMALL = Path(__file__).parents[2] / "configs/small_data.yaml"
TRAINED = ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"]


def records(
    images: int,
    *,
    objects: int = 2,
    size: float = 100,
    side: int = 400,
    classes: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Images of side x 1.5 side pixels; the class of an image's objects is drawn in turn."""
    return [
        {
            "width": side * 3 // 2,
            "height": side,
            "annotations": [
                {
                    "bbox": [float(k), float(k), size, size],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": classes[image % len(classes)],
                }
                for k in range(objects)
            ],
        }
        for image in range(images)
    ]


def chosen(data: list[dict[str, Any]], *opts: str, tests: int = 10) -> CfgNode:
    cfg = load_config(SMALL, ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16]]", *opts])
    resolve(cfg, data, tests=tests)
    return cfg


def test_every_key_gets_a_valid_value_and_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(SMALL, ["SOLVER.STEPS", "(-1,)"])
    assert all(is_auto(value_of(cfg, key)) for key in AUTO)
    with caplog.at_level(logging.INFO):
        resolve(cfg, records(128), tests=30)
    saved = tmp_path / "config.yaml"
    saved.write_text(cfg.dump())
    load_config(saved)  # in range
    lines = caplog.text.splitlines()
    for key in AUTO:
        assert not is_auto(value_of(cfg, key)), key
        assert len([line for line in lines if line.strip().startswith(key)]) == 1
    assert any("epochs of 128 images in batches of" in line for line in lines)


def value_of(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def test_few_images_are_shown_more_often_and_many_for_twelve_epochs() -> None:
    counts = [1, 2, 12, 61, 96, 136, 500, 1000, 5000, 118_000]
    shown = [images_to_see(count) for count in counts]
    epochs = [images_to_see(count) / count for count in counts]
    assert shown == sorted(shown) and epochs == sorted(epochs, reverse=True)
    assert min(shown) >= 2000 and min(epochs) == 12
    cfg = chosen(records(1000), "SOLVER.IMS_PER_BATCH", "4")
    assert cfg.SOLVER.MAX_ITER == 3000
    assert chosen(records(1000), "SOLVER.IMS_PER_BATCH", "8").SOLVER.MAX_ITER == 1500


def test_pretrained_weights_see_fewer_images_and_still_fewer_dense_ones() -> None:
    for count in (2, 12, 96, 1000, 118_000):
        sparse, dense = (images_to_see_pretrained(count, objects=n) for n in (3, 36))
        assert 500 <= dense <= sparse <= images_to_see(count) / 2
    assert images_to_see_pretrained(1000, objects=48) == 3000
    weights = ["MODEL.WEIGHTS", "package://x"]
    assert chosen(records(1000), *weights).SOLVER.MAX_ITER == 3000


def test_images_without_objects_count_only_if_they_are_trained_on() -> None:
    data = [*records(1000), *records(1000, objects=0)]
    half = chosen(data).SOLVER.MAX_ITER
    assert 2 * half == chosen(data, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False").SOLVER.MAX_ITER


def test_periods_follow_the_length() -> None:
    cfg = chosen(records(128), "SOLVER.MAX_ITER", "900", "SOLVER.STEPS", "(-1,)")
    assert cfg.SOLVER.STEPS == (600, 800) and cfg.SOLVER.WARMUP_ITERS == 90
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 225
    assert 180 <= cfg.TEST.EVAL_PERIOD <= 450
    assert chosen(records(128), tests=0).TEST.EVAL_PERIOD == 0
    rare = chosen(records(128), tests=100_000)
    assert rare.TEST.EVAL_PERIOD == -(-rare.SOLVER.MAX_ITER // 2)


def test_one_iteration_is_enough_for_every_rule() -> None:
    cfg = chosen(records(1), "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "(-1,)")
    solver = cfg.SOLVER
    assert (solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (0, 1, 1)
    load_config(SMALL, ["SOLVER.STEPS", str(solver.STEPS)])


@pytest.mark.parametrize("side", [32, 64, 128, 256, 400, 1000, 4000])
@pytest.mark.parametrize("crop", ["[-1.0, -1.0]", "[1.0, 1.0]"])
def test_small_objects_get_large_images_within_bounds(side: int, crop: str) -> None:
    shares = [0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    inputs = [
        chosen(records(9, size=share * side, side=side, objects=20), "INPUT.CROP.SIZE", crop).INPUT
        for share in shares
    ]
    sizes = [each.MIN_SIZE_TEST for each in inputs]
    most = 384 if crop == "[1.0, 1.0]" else 800
    assert sizes == sorted(sizes, reverse=True)
    assert min(side, 256) <= min(sizes) and max(sizes) <= max(64, min(most, 2 * side))
    for each in inputs:
        seen = each.MIN_SIZE_TEST * each.CROP.SIZE[0]
        assert (
            min(each.MIN_SIZE_TRAIN) - 1 <= seen <= max(each.MIN_SIZE_TRAIN) <= each.MAX_SIZE_TRAIN
        )
        assert all(size % 32 == 0 for size in each.MIN_SIZE_TRAIN)


def test_large_and_small_objects() -> None:
    large = chosen(records(20, size=150)).INPUT
    assert (large.MIN_SIZE_TEST, large.CROP.SIZE) == (256, (1.0, 1.0))
    # Windows of 256 pixels of the enlarged image.
    small = chosen(records(20, size=15, side=256, objects=9)).INPUT
    assert (small.MIN_SIZE_TEST, small.CROP.SIZE, small.CROP.ENABLED) == (512, (0.5, 0.5), True)


@pytest.mark.parametrize(
    "data",
    [
        [*records(20, size=15, objects=9), *records(5, size=300, objects=9)],  # some do not fit
        records(20, size=15, objects=1),  # most windows would be empty
    ],
)
def test_windows_must_show_objects_and_show_them_whole(data: list[dict[str, Any]]) -> None:
    inputs = chosen(data).INPUT
    assert (inputs.MIN_SIZE_TEST, inputs.CROP.SIZE) == (384, (1.0, 1.0))
    assert not inputs.CROP.ENABLED


def test_without_crops_images_are_whole() -> None:
    dense = records(20, size=15, objects=9)
    inputs = chosen(dense, "INPUT.CROP.ENABLED", "False").INPUT
    assert inputs.MIN_SIZE_TEST == 384 <= max(inputs.MIN_SIZE_TRAIN)


def test_the_densest_image_decides_the_detections() -> None:
    crowded = records(1, objects=200)
    crowded[0]["annotations"] += [{**crowded[0]["annotations"][0], "iscrowd": 1}] * 100
    for data, expected in ((records(9), 100), (crowded, 300), (records(1, objects=5000), 1000)):
        assert expected == chosen([*records(3), *data]).TEST.DETECTIONS_PER_IMAGE


def test_rare_classes_are_repeated_and_others_are_not() -> None:
    often = [0, 1] * 10
    loader = chosen(records(100, classes=often)).DATALOADER
    assert (loader.SAMPLER_TRAIN, loader.REPEAT_THRESHOLD) == ("TrainingSampler", 0)
    loader = chosen(records(100, classes=[*often[:-1], 2])).DATALOADER
    assert loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    assert loader.REPEAT_THRESHOLD == 0.225  # half of the median class's share
    subset = ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    assert subset[1] == chosen(records(100), *subset).DATALOADER.SAMPLER_TRAIN


def test_anchors_are_fitted_only_if_that_gains_recall() -> None:
    cells = [[16.0], [32.0], [64.0], [128.0], [256.0]]
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(256,)", "INPUT.MIN_SIZE_TEST", "256"]
    cfg = load_config(SMALL, sizes)
    resolve(cfg, records(30, size=64, side=256))
    assert cells == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    cfg = load_config(SMALL, sizes)
    resolve(cfg, records(30, size=5, side=256))
    fitted = [size for (size,) in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    assert len(fitted) == 5 and fitted == sorted(fitted) and fitted[0] < 10


def test_explicit_values_win() -> None:
    opts = {
        "SOLVER.MAX_ITER": "7",
        "SOLVER.WARMUP_ITERS": "3",
        "SOLVER.CHECKPOINT_PERIOD": "5",
        "TEST.EVAL_PERIOD": "0",
        "TEST.DETECTIONS_PER_IMAGE": "20",
        "INPUT.MIN_SIZE_TRAIN": "(100, 120)",
        "INPUT.MAX_SIZE_TRAIN": "300",
        "DATALOADER.REPEAT_THRESHOLD": "0.5",
    }
    cfg = chosen(records(50), *(part for pair in opts.items() for part in pair))
    for key, value in opts.items():
        assert str(value_of(cfg, key)) == value
    assert cfg.INPUT.MIN_SIZE_TEST == 120  # follows the explicit training sizes


def test_sizes_are_needed_for_image_sizes_only() -> None:
    data = [{"annotations": records(1)[0]["annotations"]}]
    with pytest.raises(UserError, match=r"INPUT.MIN_SIZE_TRAIN .* 'width' or 'height'"):
        chosen(data)
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(100,)", "INPUT.MAX_SIZE_TRAIN", "200"]
    assert chosen(data, *sizes).SOLVER.MAX_ITER > 0


def test_another_batch_scales_the_rate_and_no_settings_from_the_data() -> None:
    opts = ["SOLVER.REFERENCE_IMS_PER_BATCH", "2", "SOLVER.IMS_PER_BATCH", "4"]
    cfg = load_config(SMALL, opts)
    rate = cfg.SOLVER.BASE_LR
    scale_schedule(cfg)
    assert 2 * rate == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.MAX_ITER == cfg.SOLVER.WARMUP_ITERS == cfg.TEST.EVAL_PERIOD == -1
    cfg = load_config(SMALL, [*opts, "SOLVER.STEPS", "(-1,)", "SOLVER.MAX_ITER", "100"])
    scale_schedule(cfg)
    assert cfg.SOLVER.MAX_ITER == 50 and cfg.SOLVER.STEPS == (-1,)


@pytest.fixture
def auto_config(tiny_config: Path) -> Path:
    """The tiny config with settings from the data; training takes two iterations."""
    text = tiny_config.read_text().replace("  - 64\n", "  - -1\n", 1)
    tiny_config.write_text(text + "TEST:\n  DETECTIONS_PER_IMAGE: -1\n")
    return tiny_config


def test_a_run_saves_its_values_and_keeps_them(auto_config: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    run = ["--config-file", str(auto_config)]
    assert main([*run, *TRAINED]) == 0
    saved = load_config(output / "config.yaml")
    assert saved.INPUT.MIN_SIZE_TRAIN[0] > 0 and saved.TEST.DETECTIONS_PER_IMAGE == 100
    # Other values than the data would give, to see where they come from.
    text = (output / "config.yaml").read_text()
    text = text.replace("DETECTIONS_PER_IMAGE: 100", "DETECTIONS_PER_IMAGE: 77")
    (output / "config.yaml").write_text(text)
    assert main([*run, "--resume", *TRAINED]) == 0
    assert load_config(output / "config.yaml").TEST.DETECTIONS_PER_IMAGE == 77
    # Prediction takes them from the checkpoint.
    opts = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    cfg, _ = resolve_classes(load_config(auto_config, opts))
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    args = argparse.Namespace(eval_only=True, resume=False)
    cfg = load_config(auto_config, opts)
    check_datasets(cfg, args)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100


def test_weights_without_a_config_do_not_tell_the_values(auto_config: Path, tmp_path: Path) -> None:
    torch.save({"model": {}, "class_names": ["a"]}, tmp_path / "bare.pth")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "bare.pth")]
    cfg, _ = resolve_classes(load_config(auto_config, opts))
    assert cfg.TEST.DETECTIONS_PER_IMAGE == -1  # all, as in detectron2
    with pytest.raises(UserError, match=r"INPUT\.MIN_SIZE_TEST is -1 .*config\.yaml"):
        resolve_classes(load_config(auto_config, [*opts, "INPUT.MIN_SIZE_TEST", "-1"]))


@pytest.mark.parametrize(
    ("data", "names", "expected"),
    [
        (records(1), ["a"], "1 image with objects.*label"),
        (records(9), ["a", "b", "c"], r"2 of 3 classes \('b', 'c'\).*remove the classes"),
        (records(9, size=3, side=4000), ["a"], r"\(4 pixels\).*0\.\d pixels.*tiles"),
    ],
)
def test_data_that_a_model_cannot_learn_from(
    data: list[dict[str, Any]], names: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_little_data(chosen(data), data, names)
    (warning,) = caplog.messages
    assert re.search(expected, warning) and "\n" not in warning


def test_normal_data_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_little_data(chosen(records(9)), records(9), ["a"])
    assert not caplog.messages
