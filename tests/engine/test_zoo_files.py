"""The formats of model zoos, made by hand, from each kind of address into a model."""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import Detectron2Handler, PathManager

from mask_rcnn_plus.engine import downloads
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.weights import read_class_names
from tests.server import Server, serve

KERNEL = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32)
SCALE = np.array([1, 2, 3, 4], np.float32)
ZERO, ONE = np.zeros(4, np.float32), np.ones(4, np.float32)
# Frozen BatchNorm in Caffe2 is a scale and a bias.
CAFFE2 = {"conv1_w": KERNEL, "res_conv1_bn_s": SCALE, "res_conv1_bn_b": ZERO}
STEM = {
    "stem.conv1.weight": KERNEL,
    "stem.conv1.norm.weight": SCALE,
    "stem.conv1.norm.bias": ZERO,
    "stem.conv1.norm.running_mean": ZERO,
    "stem.conv1.norm.running_var": ONE,
}
MODEL = {f"backbone.{name}": array for name, array in STEM.items()}


class Model(torch.nn.Module):
    """The first layer of a ResNet, with detectron2's names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.stem = BasicStem(3, 4, norm="FrozenBN")


class Python2(pickle._Pickler):
    """Writes as Python 2 and an old NumPy did: strings of bytes, numpy.core.multiarray."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def string(self, value: Any) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = string


def python2(content: Any) -> bytes:
    file = io.BytesIO()
    Python2(file, protocol=2, fix_imports=True).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def zoo(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


AUTHOR = "Detectron2 Model Zoo"
HEURISTICS = {"__author__": "Caffe2", "matching_heuristics": True}
# Name of the file -> its content.
FILES: dict[str, Callable[[], bytes]] = {
    "model_final.pkl": lambda: zoo({"model": MODEL, "__author__": AUTHOR}),
    "R-50.pkl": lambda: zoo({"model": CAFFE2, **HEURISTICS}),
    "backbone.pkl": lambda: zoo({"model": STEM, **HEURISTICS}),
    "python2.pkl": lambda: python2(
        {"model": MODEL, "__author__": "Köln", "score": np.float32(0.5), "steps": np.int64(9)}
    ),
    "MSRA.pkl": lambda: python2({**CAFFE2, "conv1_w_momentum": KERNEL}),
    "Caffe2.pkl": lambda: python2({"blobs": {**CAFFE2, "conv1_w_momentum": KERNEL}, "cfg": "A: 1"}),
    "plain.pth": lambda: saved(tensors(MODEL)),
    "model.pth": lambda: saved({"model": tensors(MODEL), "iteration": 9}),
    "classes.pth": lambda: saved({"model": tensors(MODEL), "class_names": ["cat", "dog"]}),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The servers of detectron2:// and catalog://, and an empty cache."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("urllib.request._opener", None)
    PathManager.register_handler(downloads.Downloads())
    with serve() as server:
        monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{server.address}/d2/")
        monkeypatch.setattr(ModelCatalog, "S3_C2_DETECTRON_PREFIX", f"{server.address}/c2")
        yield server


@pytest.mark.parametrize("address", ["file", "http://", "detectron2://", "catalog://"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_zoo_loads(
    name: str, address: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = FILES[name]()
    weights = {
        "file": str(tmp_path / name),
        "http://": f"{server.address}/x/{name}",
        "detectron2://": f"detectron2://a/{name}",
        "catalog://": "catalog://ImageNetPretrained/mine",
    }[address]
    monkeypatch.setitem(ModelCatalog.C2_IMAGENET_MODELS, "mine", f"1/{name}")
    (tmp_path / name).write_bytes(content)
    server.files = dict.fromkeys((f"/x/{name}", f"/d2/a/{name}", f"/c2/1/{name}"), content)

    model = Model()
    Checkpointer(model).load(weights)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert state.keys() == MODEL.keys()
    for key, array in MODEL.items():
        assert np.allclose(state[key], array), key
    assert read_class_names(weights) == (["cat", "dog"] if name == "classes.pth" else [])
    assert len(server.ranges) == (address != "file")
