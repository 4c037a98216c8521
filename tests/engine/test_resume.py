"""A run that is interrupted and resumed ends exactly like an uninterrupted run."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase

from mask_rcnn_plus.engine import Trainer, main

pytestmark = pytest.mark.slow


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differing(first: Path, second: Path) -> list[str]:
    """The names of weights and of optimizer, schedule and data state that differ in any bit."""
    one, other = load(first), load(second)
    names = [
        name for name in one["model"] if not torch.equal(one["model"][name], other["model"][name])
    ]
    states = [
        checkpoint["trainer"]["_trainer"]["optimizer"]["state"] for checkpoint in (one, other)
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 50
    for key, state in states[0].items():
        for name, value in state.items():
            if not torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key][name])):
                names.append(f"{name} {key}")
    hooks = [checkpoint["trainer"]["hooks"] for checkpoint in (one, other)]
    for name in ("LRScheduler", "Evaluation"):
        if hooks[0].get(name) != hooks[1].get(name):
            names.append(name)
    averages = [hook.get("WeightAverage", {}).get("average", {}) for hook in hooks]
    assert averages[0].keys() == averages[1].keys()
    for name, value in averages[0].items():
        if not torch.equal(value, averages[1][name]):
            names.append(f"average of {name}")
    if one["trainer"]["data"] != other["trainer"]["data"]:
        names.append("data")
    return names


def each_step(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Calls act(iteration) at the end of each step of later runs."""

    class Act(HookBase):
        def after_step(self) -> None:
            act(self.trainer.iter)

    build = Trainer.build_hooks
    patch.setattr(Trainer, "build_hooks", lambda self: [*build(self), Act()])


class Crash(Exception):
    pass


def crash_after(patch: pytest.MonkeyPatch, iteration: int) -> None:
    def act(now: int) -> None:
        if now == iteration:
            raise Crash

    each_step(patch, act)


# Settings that change the order of the images, the random numbers, or what is saved.
VARIANTS = {
    "plain": [],
    "adamw, fused": [
        *("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", "0.002", "SOLVER.FUSED", "True")
    ],
    "fused, bf16, in parts": [
        *("SOLVER.FUSED", "True", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bf16"),
        *("SOLVER.ACCUMULATE_STEPS", "2", "SOLVER.IMS_PER_BATCH", "4"),
        *("MODEL.CHANNELS_LAST", "True", "MODEL.ROI_HEADS.NAME", "FusedROIHeads"),
    ],
    "ungrouped and augmented": [
        *("DATALOADER.ASPECT_RATIO_GROUPING", "False"),
        *("INPUT.JITTER.ENABLED", "True", "INPUT.JITTER.SIZE", "(48, 64)"),
        *("INPUT.JITTER.SCALE", "(0.5, 2.0)", "INPUT.COPY_PASTE.PROB", "0.5"),
        *("INPUT.COLOR.BRIGHTNESS", "0.4", "INPUT.COLOR.CONTRAST", "0.4"),
        *("INPUT.COLOR.SATURATION", "0.4", "INPUT.COLOR.LIGHTING", "20.0"),
        *("INPUT.BLUR.PROB", "0.5"),
    ],
    # Scaled to as many iterations as the others.
    "repeated and scaled": [
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        *("DATALOADER.REPEAT_THRESHOLD", "0.9"),
        *("SOLVER.REFERENCE_IMS_PER_BATCH", "1", "SOLVER.BASE_LR", "0.005"),
        *("SOLVER.MAX_ITER", "14", "SOLVER.CHECKPOINT_PERIOD", "4"),
    ],
    "subset and precise": [
        *("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
        *("DATALOADER.RANDOM_SUBSET_RATIO", "0.75"),
        *("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"),
        *("TEST.EVAL_PERIOD", "3"),
    ],
    # Each after 3 and 6 iterations, where the run is interrupted.
    "averaged, frozen and watched": [
        *("SOLVER.EMA.ENABLED", "True", "MODEL.FREEZE", "['backbone.bottom_up.stem']"),
        *("DATASETS.TEST", "('shapes_val',)", "TEST.LOSS_PERIOD", "3", "TEST.LOSS_IMAGES", "2"),
        *("TEST.BEST_METRIC", "validation/total_loss", "TEST.PREVIEW_IMAGES", "0"),
        *("TEST.EARLY_STOPPING.METRIC", "validation/total_loss"),
        *("MODEL.ROI_HEADS.NAME", "FusedROIHeads", "MODEL.ROI_BOX_HEAD.LOSS_CLS", "focal"),
        *("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING", "inverse_frequency"),
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    def run(name: str, *arguments: str) -> int:
        command = [
            "--config-file",
            str(small_config),
            *arguments,
            "OUTPUT_DIR",
            str(tmp_path / name),
        ]
        return main([*command, *VARIANTS[variant]])

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            run("cut", "DATALOADER.NUM_WORKERS", "1")
    with monkeypatch.context() as patch:
        crash_after(patch, 5)
        with pytest.raises(Crash):
            run("cut", "--resume")
    assert run("cut", "--resume", "DATALOADER.NUM_WORKERS", "2") == 0
    final = [tmp_path / name / "model_final.pth" for name in ("whole", "cut")]
    assert differing(*final) == []
    if variant != "plain":
        return
    # So are the metrics, except for times, and no iteration comes twice.
    metrics = [
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if "time" not in key and "eta" not in key
            }
            for line in (tmp_path / name / "metrics.json").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    assert metrics[0][-1] == metrics[1][-1] and metrics[0][-1]["iteration"] == 6
    iterations = [line["iteration"] for line in metrics[1]]
    assert iterations == sorted(set(iterations))
    # Another seed gives another run.
    assert run("other", "SEED", "2") == 0
    assert differing(final[0], tmp_path / "other" / "model_final.pth")


def test_a_random_seed_is_kept(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(name: str, *arguments: str) -> int:
        command = ["--config-file", str(small_config), *arguments, "SOLVER.MAX_ITER", "4"]
        return main([*command, "OUTPUT_DIR", str(tmp_path / name)])

    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            run("cut", "SEED", "-1")
    assert run("cut", "--resume", "SEED", "-1") == 0
    seed = load(tmp_path / "cut" / "model_final.pth")["trainer"]["data"]["seed"]
    assert f"SEED -1: {seed}, from the checkpoint" in capsys.readouterr().out
    assert f"SEED: {seed}" in (tmp_path / "cut" / "config.yaml").read_text()
    assert run("whole", "SEED", str(seed)) == 0
    assert differing(*[tmp_path / name / "model_final.pth" for name in ("cut", "whole")]) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_saves_and_exits(
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    def run(name: str, *arguments: str) -> int:
        return main(
            ["--config-file", str(small_config), *arguments, "OUTPUT_DIR", str(tmp_path / name)]
        )

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        each_step(patch, lambda now: os.kill(os.getpid(), number) if now == 2 else None)
        assert run("cut") == code
    assert signal.getsignal(number) == before
    assert "stopped after 3 iterations" in capsys.readouterr().err
    stopped = load(tmp_path / "cut" / "model_0000002.pth")
    assert stopped["iteration"] == stopped["trainer"]["iteration"] == 2
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "cut" / "model_final.pth").exists()
    assert run("cut", "--resume") == run("whole") == 0
    assert differing(*[tmp_path / name / "model_final.pth" for name in ("cut", "whole")]) == []


def test_a_signal_ends_an_evaluation_at_once(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*args: object) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation continued")

    monkeypatch.setattr(Trainer, "test", evaluate)
    # Once during the run, where iteration 2 is not saved yet, and once at its end.
    for period, last in (("3", "model_0000002.pth"), ("0", "model_final.pth")):
        assert main(["--config-file", str(small_config), "TEST.EVAL_PERIOD", period]) == 143
        assert (tmp_path / "output" / "last_checkpoint").read_text() == last


def test_a_damaged_checkpoint_is_skipped(
    small_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    command = ["--config-file", str(small_config)]
    assert main(command) == 0
    whole = tmp_path / "whole.pth"
    (output / "model_final.pth").rename(whole)
    newest = output / "model_0000005.pth"
    newest.write_bytes(newest.read_bytes()[:-9])
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    screen = capsys.readouterr().out
    assert "model_final.pth is missing; falling back" in screen
    assert "model_0000005.pth is damaged" in screen
    assert f"Resuming from {output / 'model_0000003.pth'} after 4 iterations" in screen
    assert differing(whole, output / "model_final.pth") == []

    # A run killed after its last periodic checkpoint only lacks the final one.
    for name in ("model_final.pth", "model_final.pth.sha256"):
        (output / name).unlink()
    (output / "last_checkpoint").write_text("model_0000005.pth")
    assert main([*command, "--resume", "SOLVER.MAX_ITER", "6"]) == 0
    assert load(output / "model_final.pth")["iteration"] == 5

    for path in output.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-9])
    assert main([*command, "--resume"]) == 2
    assert "cannot load any checkpoint in" in capsys.readouterr().err
    weights = str(output / "model_final.pth")
    assert main([*command, "MODEL.WEIGHTS", weights]) == 2
    assert "its SHA-256 is not the one in model_final.pth.sha256" in capsys.readouterr().err


def test_the_newest_and_the_best_checkpoints_are_kept(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A metric that depends only on the weights, as AP does, and is best at iteration 3.
    def evaluate(cls: type, cfg: object, model: torch.nn.Module) -> dict[str, Any]:
        evaluations.append(1)
        value = metrics[len(evaluations) - 1]
        return {"segm": {"AP": value}}

    monkeypatch.setattr(Trainer, "test", classmethod(evaluate))
    keys = ["SOLVER.KEEP_CHECKPOINTS", "1", "TEST.EVAL_PERIOD", "2", "TEST.BEST_METRIC", "segm/AP"]
    keys += ["DATASETS.TEST", "('shapes_val',)"]

    def run(name: str, *arguments: str) -> int:
        command = ["--config-file", str(small_config), *arguments, *keys]
        return main([*command, "OUTPUT_DIR", str(tmp_path / name)])

    def best(name: str) -> int:
        return load(tmp_path / name / "model_best.pth")["iteration"]

    evaluations: list[int] = []
    metrics = [20.0, 30.0, 25.0, float("nan")]
    assert run("whole") == 0
    assert best("whole") == 3
    expected = {"model_0000005.pth", "model_best.pth", "model_final.pth"}
    assert {path.name for path in (tmp_path / "whole").glob("*.pth")} == expected
    # The run dies after saving iteration 3 and before evaluating it; the resumed run evaluates it.
    evaluations, metrics = [], [20.0, 0.0]
    with monkeypatch.context() as patch:
        dying = classmethod(lambda cls, *args: evaluate(cls, *args) if not evaluations else 1 / 0)
        patch.setattr(Trainer, "test", dying)
        with pytest.raises(ZeroDivisionError):
            run("cut")
    assert best("cut") == 1
    evaluations, metrics = [], [30.0, 25.0, 10.0]
    assert run("cut", "--resume") == 0
    assert best("cut") == 3
    final = [tmp_path / name / "model_best.pth" for name in ("whole", "cut")]
    assert differing(*final) == []


def test_another_batch_size_continues_after_the_images_already_used(
    small_config: Path, tmp_path: Path
) -> None:
    command = ["--config-file", str(small_config)]
    ungrouped = ["DATALOADER.ASPECT_RATIO_GROUPING", "False"]
    assert main([*command, *ungrouped, "SOLVER.MAX_ITER", "2"]) == 0
    more = ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "1"]
    assert main([*command, "--resume", *ungrouped, *more]) == 0
    assert load(tmp_path / "output" / "model_final.pth")["trainer"]["data"]["images"] == 5
