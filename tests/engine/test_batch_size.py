"""SOLVER.REFERENCE_IMS_PER_BATCH: the schedule of another batch size."""

import logging

import pytest

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.engine.batch_size import scale_to_batch


def test_rate_and_lengths_follow_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    cfg = get_cfg()
    # Detectron2's 1x schedule, for 16 images, with 4.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 16, 4
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 0.02, 90000, (60000, 80000)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 1000, 5000
    cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD = 0, 100
    with caplog.at_level(logging.INFO):
        scale_to_batch(cfg)
    assert cfg.SOLVER.BASE_LR == 0.005
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (360000, (240000, 320000))
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD) == (4000, 20000)
    assert (cfg.TEST.EVAL_PERIOD, cfg.TEST.LOSS_PERIOD) == (0, 400)
    assert "SOLVER.BASE_LR 0.02 -> 0.005" in caplog.text
    assert "0.25 times the reference 16" in caplog.text
    # The config that is saved is not scaled once more.
    saved = cfg.clone()
    scale_to_batch(cfg)
    assert cfg == saved


def test_off_and_at_the_reference_it_changes_nothing() -> None:
    for reference in (0, 16):
        cfg = get_cfg()
        cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = reference, 16
        before = cfg.clone()
        scale_to_batch(cfg)
        assert cfg == before


def test_two_references_are_refused() -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 8, 2
    with pytest.raises(UserError, match="both scale the learning rate"):
        scale_to_batch(cfg)


@pytest.mark.parametrize(
    ("batch", "length", "steps"),
    [
        (100, 100, (30, 40)),  # 0 and 0 of 1
        (20, 100, (1, 80)),  # 0 of 5
        (20, 100, (40, 41)),  # both 2
        (20, 101, (60, 100)),  # 5 of 5
    ],
)
def test_steps_that_a_larger_batch_brings_together_are_refused(
    batch: int, length: int, steps: tuple[int, ...]
) -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 1, batch
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = length, steps
    with pytest.raises(UserError, match="which do not rise from 1 on") as error:
        scale_to_batch(cfg)
    assert "\n" not in str(error.value) and f"MAX_ITER {length} and STEPS {steps}" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("steps", "scaled"),
    [((), ()), ((20, 80), (1, 4)), ((80, 100, 301), (4,))],
)
def test_steps_that_stay_apart_are_taken_and_those_beyond_the_end_are_not_missed(
    steps: tuple[int, ...], scaled: tuple[int, ...]
) -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = 1, 20
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 100, steps
    scale_to_batch(cfg)
    assert cfg.SOLVER.MAX_ITER == 5 and scaled == cfg.SOLVER.STEPS
