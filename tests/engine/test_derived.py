"""The schedule is computed from the batch size, class weights from the data."""

import logging
from collections.abc import Iterator

import pytest
from detectron2.data import DatasetCatalog

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.engine.derived import resolve_class_weights, scale_schedule


def test_rate_and_lengths_follow_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    cfg = get_cfg()
    # Detectron2's 1x schedule, for 16 images, with 4.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 16, 4
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 0.02, 90000, (60000, 80000)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 1000, 5000
    cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD = 0, 100
    with caplog.at_level(logging.INFO):
        scale_schedule(cfg)
    assert cfg.SOLVER.BASE_LR == 0.005
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (360000, (240000, 320000))
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD) == (4000, 20000)
    assert (cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD) == (0, 400)
    assert "SOLVER.BASE_LR 0.02 -> 0.005" in caplog.text
    assert "0.25 times the reference 16" in caplog.text
    # The saved config is not scaled again.
    saved = cfg.clone()
    scale_schedule(cfg)
    assert cfg == saved


def test_without_or_at_the_reference_nothing_changes() -> None:
    for reference in (0, 16):
        cfg = get_cfg()
        cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = reference, 16
        before = cfg.clone()
        scale_schedule(cfg)
        assert cfg == before


def test_two_references_are_refused() -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 8, 2
    with pytest.raises(UserError, match="both scale the learning rate"):
        scale_schedule(cfg)


@pytest.mark.parametrize(
    ("batch", "length", "steps"),
    [
        (100, 100, (30, 40)),  # 0 and 0 of 1
        (20, 100, (1, 80)),  # 0 of 5
        (20, 100, (40, 41)),  # both 2
        (20, 101, (60, 100)),  # 5 of 5
    ],
)
def test_steps_that_no_longer_increase_are_refused(
    batch: int, length: int, steps: tuple[int, ...]
) -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 1, batch
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = length, steps
    with pytest.raises(UserError, match="which do not increase from 1 on") as error:
        scale_schedule(cfg)
    assert "\n" not in str(error.value) and f"MAX_ITER {length} and STEPS {steps}" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("steps", "scaled"),
    [((), ()), ((20, 80), (1, 4)), ((80, 100, 301), (4,))],
)
def test_increasing_steps_are_accepted_and_steps_after_the_end_are_dropped(
    steps: tuple[int, ...], scaled: tuple[int, ...]
) -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 1, 20
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 100, steps
    scale_schedule(cfg)
    assert cfg.SOLVER.MAX_ITER == 5 and scaled == cfg.SOLVER.STEPS


NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def counted() -> Iterator[str]:
    """6 cats, 3 dogs, 1 eel, and a crowd of eels."""
    objects = [{"category_id": index} for index in [0] * 6 + [1] * 3 + [2]]
    records = [{"annotations": [*objects, {"category_id": 2, "iscrowd": 1}]}, {}]
    DatasetCatalog.register("counted_train", lambda: records)
    yield "counted_train"
    DatasetCatalog.remove("counted_train")


def test_inverse_frequency(counted: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (counted,)
    resolve_class_weights(cfg, NAMES)
    head = cfg.MODEL.ROI_BOX_HEAD
    assert head.CLASS_WEIGHTS == []
    head.CLASS_WEIGHTING = "inverse_frequency"
    resolve_class_weights(cfg, NAMES)
    # 10 / (3 * n).
    assert pytest.approx([10 / 18, 10 / 9, 10 / 3], rel=1e-3) == head.CLASS_WEIGHTS
    # The saved config has the numbers, which are not computed again.
    assert head.CLASS_WEIGHTING == "none"
    head.CLASS_WEIGHTING = "inverse_frequency"
    with pytest.raises(UserError, match="CLASS_WEIGHTS is set"):
        resolve_class_weights(cfg, NAMES)


def test_a_class_without_objects_is_refused(counted: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (counted,)
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING = "inverse_frequency"
    with pytest.raises(UserError, match="class 'fox' has no object"):
        resolve_class_weights(cfg, [*NAMES, "fox"])
