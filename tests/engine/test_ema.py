"""SOLVER.EMA: averages computed by hand; they are evaluated and saved with the weights."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.ema import WeightAverage


def averaging(model: nn.Module, decay: float, warmup: float) -> WeightAverage:
    hook = WeightAverage(decay=decay, warmup=warmup, checkpointer=Checkpointer(model))
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    return hook


def follow(hook: WeightAverage, model: nn.Module, weights: list[float]) -> float:
    for weight in weights:
        nn.init.constant_(model.weight, weight)
        hook.after_step()
    with hook.applied():
        return float(model.weight.detach()[0])


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [
        # Beginning with 0, half each time: 0.5 * 4 = 2; 1 + 0.5 * 8 = 5.
        (0.5, 1.0, 5.0),
        # It keeps min(0.5, 2 / 8), then min(0.5, 3 / 9): 0.75 * 4 = 3; 1 + 2 / 3 * 8 = 6 1/3.
        (0.5, 7.0, 19 / 3),
        (0.0, 1.0, 8.0),
    ],
)
def test_the_average_is_exponential_after_its_warmup(
    decay: float, warmup: float, expected: float
) -> None:
    model = nn.BatchNorm1d(1)
    nn.init.zeros_(model.weight)
    hook = averaging(model, decay, warmup)
    assert follow(hook, model, [4.0, 8.0]) == pytest.approx(expected)
    # Outside, the model has its own weights, bit for bit.
    assert float(model.weight.detach()[0]) == 8.0


def test_statistics_are_averaged_and_counts_copied() -> None:
    model = nn.BatchNorm1d(1)
    hook = averaging(model, 0.5, 1.0)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(7)
    hook.after_step()
    with pytest.raises(ZeroDivisionError), hook.applied():
        assert float(model.running_mean) == 2.0 and int(model.num_batches_tracked) == 7
        _ = 1 / 0
    assert float(model.running_mean) == 4.0


def test_the_average_continues_from_its_state() -> None:
    model = nn.BatchNorm1d(1)
    whole = averaging(model, 0.9, 10.0)
    expected = follow(whole, model, [3.0, 5.0, 2.0])
    first = averaging(nn.BatchNorm1d(1), 0.9, 10.0)
    follow(first, first.trainer.model, [3.0, 5.0])
    second = WeightAverage(decay=0.9, warmup=10.0, checkpointer=Checkpointer(model))
    second.trainer = SimpleNamespace(model=nn.BatchNorm1d(1))
    second.load_state_dict(first.state_dict())
    second.before_train()
    assert follow(second, second.trainer.model, [2.0]) == expected


@pytest.mark.slow
def test_a_run_evaluates_and_saves_both(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["DATASETS.TEST", "('shapes_val',)", "SOLVER.EMA.ENABLED", "True"]
    keys += ["TEST.BEST_METRIC", "ema/bbox/AP", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"]
    keys += ["TEST.PREVIEW_IMAGES", "2", "TEST.PREVIEW_TENSORBOARD", "True"]
    command = ["--config-file", str(small_config), *keys]
    assert main(command) == 0
    output = tmp_path / "output"
    raw, averaged = load(output / "model_final.pth"), load(output / "model_ema_final.pth")
    assert averaged["class_names"] == raw["class_names"] and averaged["iteration"] == 6
    assert averaged["model"].keys() == raw["model"].keys()
    assert "trainer" not in averaged
    stored = raw["trainer"]["hooks"]["WeightAverage"]
    assert stored["steps"] == 7
    for name, value in averaged["model"].items():
        assert torch.equal(value, stored["average"][name])
    assert not torch.equal(
        *(file["model"]["backbone.bottom_up.stem.conv1.weight"] for file in (raw, averaged))
    )
    last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "segm/AP", "ema/bbox/AP", "ema/segm/AP"} <= last.keys()
    assert load(output / "model_ema_best.pth")["model"].keys() == raw["model"].keys()
    shown = pictures(output)
    assert shown.keys() == {"preview/shapes_val", "ema/preview/shapes_val"}
    for tag, folder in (("preview/shapes_val", output), ("ema/preview/shapes_val", output / "ema")):
        assert np.array_equal(shown[tag], cv2.imread(str(folder / "preview_shapes_val.png")))

    # Evaluating each file gives the predictions of its evaluation in the run.
    predictions = [detections(output), detections(output / "ema")]
    assert predictions[0] and predictions[0] != predictions[1]
    for name, expected in zip(("model_final", "model_ema_final"), predictions, strict=True):
        again = ["--eval-only", *command, "MODEL.WEIGHTS", str(output / f"{name}.pth")]
        assert main([*again, "OUTPUT_DIR", str(tmp_path / name)]) == 0
        assert detections(tmp_path / name) == expected
    # A run cannot resume from averaged weights.
    for path in output.glob("model_[0f]*.pth"):
        path.unlink()
    assert "model_ema" not in "".join(p.name for p in candidates(output))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def detections(output: Path) -> Any:
    path = output / "inference" / "shapes_val" / "coco_instances_results.json"
    return json.loads(path.read_text())


def candidates(output: Path) -> list[Path]:
    from mask_rcnn_plus.engine.saving import candidates

    return [path for path in candidates(output) if path.is_file()]


def pictures(output: Path) -> dict[str, np.ndarray]:
    """The last picture that TensorBoard has of each tag, BGR."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output))
    events.Reload()
    return {
        tag: cv2.imdecode(
            np.frombuffer(events.Images(tag)[-1].encoded_image_string, np.uint8), cv2.IMREAD_COLOR
        )
        for tag in events.Tags()["images"]
    }
