"""mask-rcnn-plus models, and prediction with a model of detectron2's zoo."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.model_zoo.model_zoo import _ModelZooUrls
from detectron2.modeling import build_model

from mask_rcnn_plus import load_config
from mask_rcnn_plus.engine import downloads
from mask_rcnn_plus.engine.weights import local_weights
from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.models import zoo
from tests.shrink import shrink


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_each_model_has_weights_and_a_config_of_its_kind(name: str, cache: Path) -> None:
    table = _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX
    # Other data sets have models of the same names.
    folders = ("COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "Misc")
    (folder,) = (f"{f}/{name}" for f in folders if f"{f}/{name}" in table)
    suffix = table[folder]
    assert zoo.weights(name) == f"detectron2://{folder}/{suffix}"
    url = f"{_ModelZooUrls.S3_PREFIX}{folder}/{suffix}"
    assert zoo.cached_file(name) == downloads.cached_file(url)
    cfg = load_config(zoo.config_file(name))
    _, mask, keypoints, _ = zoo.MODELS[name]
    assert (mask is not None, keypoints is not None) == (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_size_is_that_of_the_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(load_config(zoo.config_file(name), ["MODEL.DEVICE", "meta"]))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert round(size / 1e6) == zoo.MODELS[name].megabytes


def test_the_list_says_what_is_cached(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = zoo.cached_file(zoo.DEFAULT)
    file.parent.mkdir(parents=True)
    file.touch()
    assert main(["models", "--paths"]) == 0
    out = capsys.readouterr().out
    assert str(file) in out
    cached = [line.split()[0] for line in out.splitlines() if line.endswith("cached")]
    assert cached == [zoo.DEFAULT]
    assert len(out.splitlines()) == 1 + 2 * len(zoo.MODELS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mask_rcnn_R_50_FPN", "mask_rcnn_R_50_FPN_3x"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "mask_rcnn_R_50_FPN_1x"),
        ("cascade_mask_rcnn_R_50_FPN_3x", "cascade_mask_rcnn_R_50_FPN_3x"),
    ],
)
def test_names(text: str, expected: str) -> None:
    assert zoo.model_name(text) == expected


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'mask_rcnn_R_50_FPN_3x'.*models` lists"):
        zoo.model_name("mask_rcnn_R50_FPN_3x")


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels)
    return str(tmp_path / "photo.png")


def test_prediction_without_a_training_knows_cocos_classes(
    photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = shrink(load_config(zoo.config_file(zoo.DEFAULT)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    state = {key: value.numpy() for key, value in build_model(cfg).state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "test"}))
    (tmp_path / "zoo.yaml").write_text(cfg.dump())
    monkeypatch.setattr(zoo, "weights", lambda name: str(tmp_path / "zoo.pkl"))
    monkeypatch.setattr(zoo, "config_file", lambda name: tmp_path / "zoo.yaml")
    out = str(tmp_path / "out")
    arguments = ["--output", out, "--json", "--score-threshold", "0", "--classes", "person,dog"]
    assert main(["predict", photo, *arguments]) == 0
    categories = json.loads(Path(out, "images.json").read_text())["categories"]
    assert [c["name"] for c in categories][:3] == ["person", "bicycle", "car"]
    assert [c["id"] for c in categories][-1] == 90  # COCO's own ids


def test_without_a_network_the_error_says_where_to_put_the_file(
    photo: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert main(["predict", photo, "--output", str(cache / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert str(zoo.cached_file(zoo.DEFAULT)) in error and "Connection refused" in error


@pytest.mark.parametrize(
    "arguments",
    [["--model", "a", "--weights", "b://c"], ["--config-file", __file__], ["--model", "none"]],
)
def test_options_that_do_not_fit(
    photo: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", photo, *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        # As Caffe2 models of ImageNet, of detection, and as the zoo's own: all are pickles.
        lambda state: {**state, "fc1000_w": state["conv1_w"], "lr": np.zeros(1)},
        lambda state: {"blobs": {**state, "conv1_w_momentum": state["conv1_w"]}},
        lambda state: {"model": state, "__author__": "Caffe2", "matching_heuristics": True},
    ],
    ids=["ImageNet", "blobs", "heuristics"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_formats_of_the_zoo_load_from_its_server(
    content: object, protocol: int, tmp_path: Path, cache: Path
) -> None:
    from mask_rcnn_plus.engine.checkpoint import Checkpointer

    cfg = shrink(load_config(zoo.config_file(zoo.DEFAULT)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model = build_model(cfg)
    shape = model.backbone.bottom_up.stem.conv1.weight.shape
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    state = {"conv1_w": kernel, "res_conv1_bn_s": np.ones(shape[0], np.float32)}
    file = downloads.cached_file("http://example.invalid/zoo/R-50.pkl")
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(content(state), protocol))
    assert local_weights("http://example.invalid/zoo/R-50.pkl") == file
    Checkpointer(model).load("http://example.invalid/zoo/R-50.pkl")
    assert np.array_equal(model.backbone.bottom_up.stem.conv1.weight.detach().numpy(), kernel)
