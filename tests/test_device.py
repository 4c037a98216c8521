"""MODEL.DEVICE (auto, missing GPUs, detectron2's own functions) and MODEL.CHANNELS_LAST."""

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import engine, modeling
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.modeling.meta_arch.build import build_model
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.config import load_config, with_values
from mask_rcnn_plus.config.values import check_solver
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.device import extend_detectron2, make_current, resolve_device
from tests.conftest import TINY
from tests.modeling import models
from tests.shrink import batch


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda"), (2, "cuda")])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch, gpus: int, device: str) -> None:
    _gpus(monkeypatch, gpus)
    assert resolve_device("auto") == device


@pytest.mark.parametrize(
    ("gpus", "name"), [(0, "cpu"), (1, "cuda"), (1, "cuda:0"), (2, "cuda:1"), (0, "meta")]
)
def test_an_existing_device_is_kept(monkeypatch, gpus: int, name: str) -> None:
    _gpus(monkeypatch, gpus)
    assert resolve_device(name) == name


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for name in ("cpu", "cuda", "cuda:1", "meta"):
        make_current(name)
    assert made == [torch.device("cuda:1")]


def test_runs_and_tools_that_train_make_their_gpu_the_current_one(
    monkeypatch, tiny_config: Path
) -> None:
    class Made(Exception): ...

    def make(device: str) -> None:
        raise Made(device)

    _gpus(monkeypatch, 2)
    setup, tool = (
        importlib.import_module(name)
        for name in ("mask_rcnn_plus.engine.setup", "mask_rcnn_tools.config_run")
    )
    options = ["--config-file", str(tiny_config), "MODEL.DEVICE", "cuda:1"]
    for module, begin in (
        (setup, lambda: setup.setup(default_argument_parser().parse_args(options))),
        (tool, lambda: tool.prepare_training(load_config(str(tiny_config), options[2:]))),
    ):
        monkeypatch.setattr(module, "make_current", make)
        with pytest.raises(Made, match="cuda:1"):
            begin()


def test_several_processes_cannot_share_one_gpu(monkeypatch) -> None:
    cfg = get_cfg()
    check_solver(cfg, "cuda:0")
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    check_solver(cfg, "cuda")
    with pytest.raises(UserError, match="each of 2 processes needs a GPU of its own"):
        check_solver(cfg, "cuda:0")


def test_all_gpus_are_seeded_whichever_is_current(monkeypatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_all(1, "step", 3)
    assert not seeds
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    seed_all(1, "step", 3)
    seed_all(1, "step", 3)
    assert seeds[0] == seeds[1] == torch.initial_seed() and len(seeds) == 2


@pytest.mark.parametrize(
    ("gpus", "name", "says"),
    [
        (0, "cuda", "MODEL.DEVICE is 'cuda', but torch sees no CUDA device"),
        (0, "cuda:0", "no CUDA device"),
        (1, "cuda:1", "'cuda:1', but torch sees 1 CUDA device here"),
        (2, "cuda:7", "2 CUDA devices"),
        (1, "gpu", "MODEL.DEVICE is 'gpu'"),
        (1, "", "MODEL.DEVICE is ''"),
        (1, "cuda:x", "'cuda:x'"),
    ],
)
def test_a_missing_device_is_reported_in_one_line(
    monkeypatch, gpus: int, name: str, says: str
) -> None:
    _gpus(monkeypatch, gpus)
    with pytest.raises(UserError) as error:
        resolve_device(name)
    message = str(error.value)
    assert says in message
    assert "set MODEL.DEVICE auto" in message
    assert "\n" not in message


@modeling.META_ARCH_REGISTRY.register()
class DeviceProbe(torch.nn.Module):
    """A model that remembers the config it was built from."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.built_from = cfg
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Size]:
        return [image["image"].shape for image in inputs]


def _cfg(device: str, frozen: bool) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "DeviceProbe"
    cfg.MODEL.DEVICE = device
    if frozen:
        cfg.freeze()
    return cfg


def test_the_default_is_auto() -> None:
    assert get_cfg().MODEL.DEVICE == "auto"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [build_model, modeling.build_model, engine.defaults.build_model])
def test_build_model_accepts_auto_and_does_not_change_the_config(
    monkeypatch, build, frozen: bool
) -> None:
    _gpus(monkeypatch, 0)
    cfg = _cfg("auto", frozen)
    model = build(cfg)
    assert model.weight.device.type == "cpu"
    assert model.built_from.MODEL.DEVICE == "cpu"
    assert model.built_from.is_frozen() == frozen
    assert cfg.MODEL.DEVICE == "auto"
    assert cfg.is_frozen() == frozen


def test_with_a_device_name_the_model_gets_the_callers_own_config() -> None:
    cfg = _cfg("meta", frozen=True)
    model = modeling.build_model(cfg)
    assert model.weight.device.type == "meta"
    assert model.built_from is cfg


@pytest.mark.parametrize("frozen", [False, True])
def test_the_predictor_accepts_auto(monkeypatch, frozen: bool) -> None:
    _gpus(monkeypatch, 0)
    cfg = _cfg("auto", frozen)
    predictor = engine.DefaultPredictor(cfg)
    # The shorter side grows to 800 by default.
    assert predictor(np.zeros((20, 30, 3), np.uint8)) == (3, 800, 1200)
    assert cfg.MODEL.DEVICE == "auto"


def test_build_model_reports_a_missing_gpu(monkeypatch) -> None:
    _gpus(monkeypatch, 0)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        modeling.build_model(_cfg("cuda", frozen=True))


def test_detectron2_is_extended_once() -> None:
    before = modeling.build_model, engine.DefaultPredictor.__init__
    extend_detectron2()
    assert (modeling.build_model, engine.DefaultPredictor.__init__) == before


def _tiny(**keys: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(copy.deepcopy(TINY)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.NAME = "FusedROIHeads"
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def _is_channels_last(maps: torch.Tensor) -> bool:
    return maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"RESNETS__NORM": "GN", "FPN__NORM": "GN", "FPN__OUT_CHANNELS": 32},
        {"BACKBONE__NAME": "build_timm_fpn_backbone", "TIMM__NAME": "convnext_atto"},
    ],
    ids=["BN", "GN", "timm"],
)
def test_channels_last_has_the_same_results_and_reaches_the_pooler(keys: dict[str, object]) -> None:
    if "BACKBONE__NAME" in keys:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    contiguous = modeling.build_model(_tiny(**keys))
    last = modeling.build_model(_tiny(CHANNELS_LAST=True, **keys))
    last.load_state_dict(contiguous.state_dict())
    assert _is_channels_last(last.proposal_generator.rpn_head.conv.weight)

    seen: list[torch.Tensor] = []
    for pooler in (last.roi_heads.box_pooler, last.roi_heads.mask_pooler):
        pooler.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    inputs = batch(_tiny())
    results = []
    for model in (contiguous, last):
        torch.manual_seed(1)  # the sampling of anchors and proposals
        with EventStorage():
            losses = model.train()(inputs)
        sum(losses.values()).backward()
        with torch.no_grad():
            maps = model.eval().backbone(model.preprocess_image(inputs).tensor)
        results.append((losses, maps))
    assert len(seen) == 8  # four levels, two heads
    assert all(_is_channels_last(m) for m in seen)

    (losses, maps), (losses_last, maps_last) = results
    for name, loss in losses.items():
        torch.testing.assert_close(losses_last[name], loss, rtol=1e-5, atol=1e-5)
    for name, level in maps.items():
        assert (maps_last[name] - level).abs().max() <= 1e-5 * level.abs().max(), name
    gradient, gradient_last = (
        model.backbone.fpn_output2.weight.grad for model in (contiguous, last)
    )
    assert (gradient_last - gradient).abs().max() <= 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "RetinaNet"])
def test_channels_last_works_with_other_architectures(architecture: str) -> None:
    cfg = _tiny(CHANNELS_LAST=True, META_ARCHITECTURE=architecture)
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16]] if architecture == "RetinaNet" else [[8]]
    model = modeling.build_model(cfg).eval()
    seen: list[torch.Tensor] = []
    first = model.backbone.bottom_up.stem.conv1
    first.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    with torch.no_grad():
        model(batch(cfg))
    assert [_is_channels_last(m) for m in seen] == [True]


def test_channels_last_without_a_backbone_is_refused() -> None:
    cfg = _cfg("cpu", frozen=False)
    cfg.MODEL.CHANNELS_LAST = True
    with pytest.raises(UserError, match="DeviceProbe has no backbone"):
        modeling.build_model(cfg)


def test_channels_last_trains_keypoints() -> None:
    losses = []
    for last in (False, True):
        model = models.build("keypoint", CHANNELS_LAST=last)
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model(models.batch()))
    assert losses[1]["loss_keypoint"] > 0
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)
    sum(losses[1].values()).backward()
    assert model.roi_heads.keypoint_head.score_lowres.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("MODEL.ROI_HEADS.NUM_CLASSES", -1), ("MODEL.ANCHOR_GENERATOR.SIZES", [[-1]])],
)
def test_a_model_is_not_built_from_values_that_the_data_must_give(key: str, value: object) -> None:
    cfg = with_values(get_cfg(), {key: value, "MODEL.DEVICE": "cpu"})
    with pytest.raises(UserError, match=key):
        modeling.build_model(cfg)
