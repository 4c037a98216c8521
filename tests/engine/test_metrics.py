"""Best checkpoints and early stopping: when a metric is better, and what happens then."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.utils import comm

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.config.values import (
    check_class_metrics,
    check_metrics,
    check_options,
    check_sampler,
)
from mask_rcnn_plus.engine import Trainer, main
from mask_rcnn_plus.engine.metrics import EarlyStopping, Evaluation, Metric
from mask_rcnn_plus.engine.steps import Steps
from mask_rcnn_plus.engine.stops import Interrupt
from mask_rcnn_plus.engine.validation import ValidationLoss

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "mode", "value", "than", "delta", "better"),
    [
        ("segm/AP", "auto", 2.0, 1.0, 0.0, True),
        ("segm/AP", "auto", 1.0, 1.0, 0.0, False),
        ("segm/AP", "auto", 1.5, 1.0, 0.5, False),
        ("segm/AP", "auto", 1.6, 1.0, 0.5, True),
        ("validation/total_loss", "auto", 1.0, 2.0, 0.0, True),
        ("validation/total_loss", "auto", 2.0, 1.0, 0.0, False),
        ("validation/total_loss", "max", 2.0, 1.0, 0.0, True),
        ("loss_set/segm/AP", "auto", 2.0, 1.0, 0.0, True),  # the name of a data set does not count
        ("segm/AP-glossy", "auto", 2.0, 1.0, 0.0, True),  # nor does that of a class
        ("segm/AP", "min", 1.0, 2.0, 0.0, True),
        ("segm/AP", "auto", NAN, None, 0.0, False),
        ("segm/AP", "auto", NAN, 1.0, 0.0, False),
        ("segm/AP", "auto", 0.0, None, 9.0, True),
    ],
)
def test_which_value_is_better(
    name: str, mode: str, value: float, than: float | None, delta: float, better: bool
) -> None:
    assert Metric(name, mode).better(value, than, delta) == better


def test_patience_counts_evaluations_since_the_best() -> None:
    stopping = EarlyStopping(Metric("segm/AP"), patience=2, min_delta=0.5)
    over = []
    for iteration, value in enumerate([10.0, 10.4, 11.0, 11.2, NAN]):
        stopping.update(value, iteration)
        over.append(bool(stopping.reason_to_end()))
    assert over == [False, False, False, False, True]
    assert stopping.reason_to_end() == (
        "segm/AP has not risen by more than 0.5 for 2 evaluations "
        "(best: 11.0000 at iteration 2; TEST.EARLY_STOPPING)"
    )


@pytest.mark.slow
def test_a_run_ends_early_with_a_final_checkpoint_and_stays_ended(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # After iteration 0, 1, ...: the best is that of iteration 1.
    values = [20.0, 30.0, 25.0, 29.0, 31.0, 0.0, 0.0]
    done: list[int] = []

    class Killed(Exception):
        pass

    def evaluate(cls: type, cfg: Any, model: torch.nn.Module) -> dict[str, Any]:
        if len(done) == dies_at:
            raise Killed
        done.append(1)
        return {"segm": {"AP": values[len(done) - 1]}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    steps: list[int] = []
    train_on = Steps.train_on

    def count(self: Steps, batch: list[Any], data_time: float) -> None:
        steps.append(self.iter)
        train_on(self, batch, data_time)

    monkeypatch.setattr(Steps, "train_on", count)
    keys = ["TEST.EVAL_PERIOD", "1", "TEST.EARLY_STOPPING.METRIC", "segm/AP"]
    keys += ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.EMA.ENABLED", "False"]
    keys += ["DATASETS.TEST", "('shapes_val',)"]

    def run(name: str, patience: int, *arguments: str) -> int:
        command = ["--config-file", str(small_config), *arguments, *keys]
        command += ["TEST.EARLY_STOPPING.PATIENCE", str(patience)]
        return main([*command, "OUTPUT_DIR", str(tmp_path / name)])

    def final(name: str) -> dict[str, Any]:
        return torch.load(tmp_path / name / "model_final.pth", weights_only=True)

    dies_at = -1
    assert run("whole", 2) == 0
    assert steps == [0, 1, 2, 3]
    assert len(done) == 4  # the last evaluation is of the final weights
    assert final("whole")["iteration"] == final("whole")["trainer"]["iteration"] == 3
    assert (tmp_path / "whole" / "last_checkpoint").read_text() == "model_final.pth"
    line = "The run ends after 4 iterations: segm/AP has not risen for 2 evaluations (best: 30.0000"
    assert line in capsys.readouterr().out
    # A resumed run has ended already; with more patience it continues.
    assert run("whole", 2, "--resume") == 0
    assert final("whole")["iteration"] == 3
    done[4:] = []
    assert run("whole", 3, "--resume") == 0
    assert final("whole")["iteration"] == 6

    # Killed between saving iteration 3 and its evaluation, it still ends after iteration 3.
    done, dies_at = [], 3
    with pytest.raises(Killed):
        run("cut", 2)
    dies_at = -1
    assert run("cut", 2, "--resume") == 0
    assert len(done) == 4
    assert final("cut")["iteration"] == 3


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("loss_class", "did you mean 'loss_cls'?"),
        ("x", "its losses: loss_box_reg, loss_cls"),
        ("shapes_val/total_loss", "did you mean 'total_loss'?"),  # there is only one test set
    ],
)
def test_a_missing_loss_is_refused_at_the_first_step(
    small_config: Path, capsys: pytest.CaptureFixture[str], loss: str, expected: str
) -> None:
    keys = ["TEST.LOSS_PERIOD", "2", "TEST.LOSS_IMAGES", "1", "DATASETS.TEST", "('shapes_val',)"]
    keys += ["TEST.BEST_METRIC", f"validation/{loss}"]
    assert main(["--config-file", str(small_config), *keys]) == 2
    error = capsys.readouterr().err
    assert f"error: TEST.BEST_METRIC is 'validation/{loss}', but the model has no loss" in error
    assert expected in error


def test_any_existing_loss_can_be_watched_and_all_processes_end_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(name: str, sets: Sequence[str] = ("a", "b")) -> None:
        evaluation = Evaluation(
            dict,
            period=0,
            validation=ValidationLoss({name: [] for name in sets}, dict),
            watchers=[EarlyStopping(Metric(name), patience=1)],
            checkpointer=None,
            signals=None,
        )
        steps = SimpleNamespace(loss_names=("iou", "loss_cls_stage0"))
        evaluation.trainer = SimpleNamespace(iter=3, start_iter=3, max_iter=9, _trainer=steps)
        evaluation.after_step()

    for right in ("a/iou", "b/loss_cls_stage0", "b/total_loss"):
        check(f"validation/{right}")
    check("validation/iou", ["a"])
    with pytest.raises(UserError, match="no loss 'a/iou'; did you mean 'iou'"):
        check("validation/b/a/iou")
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    check("validation/a/iou")
    with pytest.raises(Interrupt) as interrupt:
        check("validation/a/iu")
    assert interrupt.value.code == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["TEST.EARLY_STOPPING.METRIC", "segm/AP"], "TEST.EVAL_PERIOD 0 evaluates at the end"),
        (["TEST.EARLY_STOPPING.METRIC", "validation/total_loss"], "TEST.LOSS_PERIOD 0 measures"),
        (["TEST.BEST_METRIC", "validation/total_loss"], "TEST.LOSS_PERIOD 0 measures"),
        (["TEST.BEST_METRIC", "ema/segm/AP"], "set SOLVER.EMA.ENABLED True"),
        (["TEST.LOSS_PERIOD", "5", "DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (
            ["MODEL.ROI_BOX_HEAD.LOSS_CLS", "focal"],
            "'StandardROIHeads' does not support: set Fused",
        ),
        (["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1, 2, 3]"], "does not support: set Fused"),
    ],
)
def test_settings_without_an_effect_are_refused(
    small_config: Path, keys: list[str], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        check_options(load_config(small_config, keys))
    assert expected in str(error.value)


def test_a_sampler_that_cannot_repeat_images_is_refused(
    small_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    assert main(["--config-file", str(small_config), *sampler]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DATALOADER.SAMPLER_TRAIN") and error.count("\n") == 1
    assert "REPEAT_THRESHOLD 0 repeats no image" in error
    check_sampler(load_config(small_config, [*sampler, "DATALOADER.REPEAT_THRESHOLD", "0.001"]))


@pytest.mark.parametrize(
    ("name", "sets", "expected"),
    [
        ("segm/APP", "('a',)", "did you mean 'segm/AP"),
        ("ema/bbox/ap", "('a',)", "which is not a metric"),
        ("AP", "('a',)", "like segm/AP"),
        ("segm/AP", "('a','b')", "as 'a/segm/AP'"),
        ("ema/segm/AP", "('a','b')", "as 'ema/a/segm/AP'"),
        ("validation/total_loss", "('a','b')", "as 'validation/a/total_loss'"),
    ],
)
@pytest.mark.parametrize("key", ["TEST.BEST_METRIC", "TEST.EARLY_STOPPING.METRIC"])
def test_an_unknown_metric_is_refused_before_the_run(
    small_config: Path, key: str, name: str, sets: str, expected: str
) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as refused:
        check_metrics(load_config(small_config, [key, name, "DATASETS.TEST", sets]))
    assert key in str(refused.value) and f"'{name}'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("segm/AP", "MODEL.MASK_ON"),
        ("ema/boundary/AP", "TEST.BOUNDARY_AP"),
        ("keypoints/AP50", "MODEL.KEYPOINT_ON"),
        ("bbox/AP", "DATASETS.TEST"),
    ],
)
def test_a_disabled_metric_is_refused(small_config: Path, name: str, setting: str) -> None:
    off = "()" if setting == "DATASETS.TEST" else "False"
    keys = ["TEST.BEST_METRIC", name, "DATASETS.TEST", "('a',)", "MODEL.MASK_ON", "True"]
    cfg = load_config(small_config, [*keys, setting, off])
    with pytest.raises(UserError, match=f"^TEST.BEST_METRIC is '{name}', but {setting} is "):
        check_metrics(cfg)


def test_the_ap_of_an_unknown_class_is_refused(small_config: Path) -> None:
    def check(name: str) -> None:
        keys = ["TEST.EARLY_STOPPING.METRIC", name]
        check_class_metrics(load_config(small_config, keys), ["cell", "a/AP-b"])

    for right in ("segm/AP-cell", "ema/val/bbox/AP-a/AP-b", "segm/AP", "mine/AP-x"):
        check(right)
    with pytest.raises(UserError, match="no class is called 'cel'; did you mean 'cell'"):
        check("ema/segm/AP-cel")
    with pytest.raises(UserError, match="no class is called ''; the classes are cell, a/AP-b"):
        check("segm/AP-")


@pytest.mark.parametrize("name", ["ema/a/segm/AP-a/b", "b/bbox/APs", "a/mine/F1"])
def test_possible_metrics_are_accepted(small_config: Path, name: str) -> None:
    keys = ["TEST.BEST_METRIC", name, "DATASETS.TEST", "('a','b')"]
    check_metrics(load_config(small_config, keys))
