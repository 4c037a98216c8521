"""With the same weights and inputs, our models and detectron2's have the same results."""

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from tests.modeling.models import ARCHITECTURES, batch, build

TOLERANCE = 1e-5


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces ReLU by a smooth function, in both models.

    If a value is zero up to rounding, one model's ReLU may pass a gradient and the other's not: a
    difference of 1e-8 in the value changes the gradient completely.
    """

    def smooth_relu(x: Tensor, inplace: bool = False) -> Tensor:
        return F.gelu(x)

    monkeypatch.setattr(F, "relu", smooth_relu)
    monkeypatch.setattr(F, "relu_", smooth_relu)


def randomised(model: nn.Module) -> nn.Module:
    """Sets weights of the predictors that distinguish boxes and classes, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("predictor", "objectness", "anchor_deltas", "score")):
                scale = 0.05 if "delta" in name or "bbox" in name else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def in_zoo_format(model: nn.Module, path: Path) -> str:
    """Writes a file like the model zoo's .pkl files: NumPy arrays by name, and an author."""
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    return str(path)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """detectron2's model, and ours with its weights, loaded from a checkpoint file."""
    stock = randomised(build(request.param, ours=False))
    ours = build(request.param)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {
        n: v.shape for n, v in stock.state_dict().items()
    }
    Checkpointer(ours, strict=True).load(in_zoo_format(stock, tmp_path / "model_final.pkl"))
    return stock, ours


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Within 1e-5 of the largest value."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        bound = TOLERANCE * max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= bound, what


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_losses_and_gradients(pair: tuple[nn.Module, nn.Module], smooth: None) -> None:
    losses = []
    for model in pair:
        torch.manual_seed(1)  # for the sampling of anchors and proposals
        with EventStorage():
            losses.append(model(batch()))
        sum(losses[-1].values()).backward()
    assert losses[0].keys() == losses[1].keys()
    assert {"loss_mask", "loss_keypoint"} & losses[0].keys()
    for name, expected in losses[0].items():
        assert expected > 0
        assert_near(losses[1][name], expected, name)
    ours = dict(pair[1].named_parameters())
    for name, parameter in pair[0].named_parameters():
        expected = parameter.grad
        # The absolute part is for a bias before a softmax over pixels, whose gradient is only
        # rounding error.
        bound = TOLERANCE * expected.abs().max().item() + 1e-7
        assert expected.any(), name
        assert (ours[name].grad - expected).abs().max().item() <= bound, name


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_detections(pair: tuple[nn.Module, nn.Module]) -> None:
    results = []
    for model in pair:
        with torch.no_grad():
            results.append(model.eval().inference(batch(), do_postprocess=False))
    for expected, actual in zip(*results, strict=True):
        assert len(expected) >= 10
        # Otherwise, confusing classes or boxes would not be noticed.
        assert len(expected.pred_classes.unique()) > 1
        assert (expected.scores[:-1] - expected.scores[1:]).max() > 100 * TOLERANCE
        fields = expected.get_fields()
        assert fields.keys() == actual.get_fields().keys()
        assert {"pred_masks", "pred_keypoints"} & fields.keys()
        for name, value in fields.items():
            there = actual.get(name)
            if isinstance(value, Boxes):
                value, there = value.tensor, there.tensor
            assert_near(there, value, name)


@pytest.mark.parametrize("architecture", ["fpn", "cascade"])
def test_checkpoint_of_another_architecture_is_refused(
    architecture: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = in_zoo_format(build("c4", ours=False), tmp_path / "c4.pkl")
    with pytest.raises(UserError, match="do not fit this model: ") as error:
        Checkpointer(build(architecture), strict=True).load(path)
    # The message has their number and the first name, instead of hundreds of names.
    message = str(error.value)
    assert re.search(r"\d+ of \d+ parameters are missing: \S+, \S+, \S+ and \d+ more;", message)
    assert "\n" not in message and len(message) < 800
    assert capfd.readouterr().err == ""
    assert all(record.levelno < logging.WARNING for record in caplog.records)
