"""TEST.LOSS_PERIOD: means of the validation losses, and a measurement without side effects."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.validation import ValidationLoss


class Model(nn.Module):
    """Its losses: the image's number, a random number, and the norm of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, eps=0.0)
        self.frozen = nn.BatchNorm1d(1).eval()
        self.dropout = nn.Dropout(0.5)
        self.normalizer = 100.0

    def forward(self, batch: list[int]) -> dict[str, Tensor]:
        assert self.training and len(batch) == 1
        self.normalizer += 1
        self.seen = self.normalizer
        two = self.dropout(self.norm(torch.full((1, 1), 2.0)))
        return {
            "loss_number": torch.tensor(float(batch[0])),
            "loss_draw": torch.rand(()),
            "loss_norm": two.sum(),
        }


def test_a_loss_is_the_mean_over_images_and_the_model_does_not_change() -> None:
    model = Model()
    # In training mode batch norm refuses a single value; (2 - 1) / sqrt(4) is 0.5.
    model.norm.running_mean.fill_(1.0)
    model.norm.running_var.fill_(4.0)
    before = copy.deepcopy(model.state_dict())
    validation = ValidationLoss({"val": [1, 2, 6]}, lambda record: record)
    metrics = validation.measure(model)
    assert metrics["validation/loss_number"] == 3.0
    assert metrics["validation/loss_norm"] == 0.5
    parts = [metrics[f"validation/loss_{name}"] for name in ("number", "draw", "norm")]
    assert metrics["validation/total_loss"] == pytest.approx(sum(parts))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.normalizer, hasattr(model, "seen")) == (100.0, False)
    assert model.training and model.norm.training and not model.frozen.training
    # The same again, also after other random draws.
    torch.rand(5)
    assert validation.measure(model) == metrics


def test_losses_have_the_precision_of_the_training() -> None:
    class Precise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, batch: list[Any]) -> dict[str, Tensor]:
            return {"loss_bits": torch.tensor(torch.finfo(self.layer(torch.ones(1, 1)).dtype).bits)}

    for amp, bits in (("", 32), ("bf16", 16)):
        metrics = ValidationLoss({"val": [1]}, lambda record: record, amp=amp).measure(Precise())
        assert metrics["validation/loss_bits"] == bits


def test_a_part_of_the_images_is_evenly_spaced() -> None:
    records = {"a": list(range(10)), "b": [7]}
    metrics = ValidationLoss(records, lambda record: record, images=2).measure(Model())
    # The middles of 0 to 4 and of 5 to 9; all images of a smaller data set.
    assert metrics["validation/a/loss_number"] == (2 + 7) / 2
    assert metrics["validation/b/loss_number"] == 7


@pytest.mark.slow
def test_training_is_bitwise_equal_with_and_without(small_config: Path, tmp_path: Path) -> None:
    def run(name: str, *keys: str) -> dict[str, Any]:
        command = ["--config-file", str(small_config), "SOLVER.MAX_ITER", "5", *keys]
        assert main([*command, "OUTPUT_DIR", str(tmp_path / name)]) == 0
        return torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]

    sets = ["DATASETS.TEST", "('shapes_val','shapes_train')"]
    on = run(
        *("on", *sets, "TEST.LOSS_PERIOD", "2", "SOLVER.EMA.ENABLED", "True"),
        *("TEST.LOSS_IMAGES", "2", "TEST.BEST_METRIC", "validation/shapes_val/total_loss"),
    )
    off = run("off")
    assert all(torch.equal(value, off[name]) for name, value in on.items())
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.json").open()]
    names = ("loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    for data in ("shapes_val", "shapes_train"):
        measured = {
            line["iteration"]: line for line in lines if f"validation/{data}/total_loss" in line
        }
        # Writers write the latest value every 20 iterations and at the end, there with the number
        # of the next iteration.
        assert list(measured) == [3, 5]
        for line in measured.values():
            parts = sum(line[f"validation/{data}/{name}"] for name in names)
            assert line[f"validation/{data}/total_loss"] == pytest.approx(parts)
    losses = [line.get("validation/shapes_val/total_loss", math.inf) for line in lines]
    best = torch.load(tmp_path / "on" / "model_best.pth", weights_only=True)
    lowest = best["trainer"]["hooks"]["Evaluation"]["best"]
    assert best["iteration"] == lowest["iteration"] and best["iteration"] in (1, 3, 4)
    assert lowest["value"] <= min(losses)
