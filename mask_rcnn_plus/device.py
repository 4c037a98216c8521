"""MODEL.DEVICE "auto" and MODEL.CHANNELS_LAST, also in detectron2's own functions."""

import functools
import sys
from typing import Any

import torch
from detectron2.config import CfgNode

from mask_rcnn_plus.config import complete, with_values
from mask_rcnn_plus.errors import UserError


def resolve_device(name: str, option: str = "MODEL.DEVICE") -> str:
    """The device that a value of MODEL.DEVICE means.

    Args:
        name: "auto", or a name that ``torch.device`` accepts, such as "cpu", "cuda" or "cuda:1".
        option: the name of the option in messages.

    Returns:
        for "auto", "cuda" if torch sees a GPU, else "cpu"; otherwise the name itself.

    Raises:
        UserError: the name is not a device, or a CUDA device that this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"{option} is '{name}', which torch does not know; set {option} auto, cpu or cuda"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            devices = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise UserError(
                f"{option} is '{name}', but torch sees {devices} here; set {option} auto or cpu"
            )
    return name


def make_current(device: str) -> None:
    """Makes a GPU with a number the current one.

    Much of torch and detectron2 assumes that the current GPU is the model's, when it synchronises,
    measures memory or launches kernels.

    Args:
        device: from :func:`resolve_device`. Only names such as "cuda:1" have an effect.
    """
    gpu = torch.device(device)
    if gpu.type == "cuda" and gpu.index is not None:
        torch.cuda.set_device(gpu)


def _with_device(cfg: CfgNode) -> CfgNode:
    cfg = complete(cfg)
    device = resolve_device(cfg.MODEL.DEVICE)
    return cfg if device == cfg.MODEL.DEVICE else with_values(cfg, {"MODEL.DEVICE": device})


def _require_values(cfg: CfgNode) -> None:
    """Refuses a config whose model depends on the data; train_net.py has resolved these values."""
    model = cfg.MODEL
    for key, value, resolved in (
        ("MODEL.ROI_HEADS.NUM_CLASSES", model.ROI_HEADS.NUM_CLASSES, "the number of classes"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", model.ANCHOR_GENERATOR.SIZES, "the sizes in pixels"),
    ):
        if value in (-1, [[-1]]):
            raise UserError(
                f"{key} is {value}, which only train_net.py takes from the data: set {resolved}, "
                "or use the config.yaml of a run"
            )


def use_channels_last(model: torch.nn.Module) -> None:
    """Converts a detectron2 model, in place, to channels_last (NHWC) memory.

    The input of the backbone is converted. Convolutions, norms, resizing and pooling keep the
    layout of their inputs, so the heads receive it too.

    Args:
        model: any architecture with a ``backbone`` that accepts the batch of images.

    Raises:
        UserError: the model has no backbone.
    """
    if not isinstance(getattr(model, "backbone", None), torch.nn.Module):
        raise UserError(
            f"MODEL.CHANNELS_LAST is True, but {type(model).__name__} has no backbone: set it to "
            "False"
        )
    from detectron2.modeling.roi_heads import BaseKeypointRCNNHead

    model.to(memory_format=torch.channels_last)
    model.backbone.register_forward_pre_hook(_to_channels_last)
    for head in model.modules():
        if isinstance(head, BaseKeypointRCNNHead):
            # Its loss views each heatmap as a row, which only works in the contiguous layout.
            list(head.modules())[-1].register_forward_hook(_to_contiguous)


def _to_channels_last(
    backbone: torch.nn.Module, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _to_contiguous(layer: torch.nn.Module, inputs: Any, maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous()


@functools.cache
def extend_detectron2() -> None:
    """Makes detectron2 accept a config with MODEL.DEVICE "auto" or MODEL.CHANNELS_LAST.

    Every config of this project has both keys, and detectron2 has no hook between the config and
    ``model.to(device)``, so this replaces ``build_model`` and ``DefaultPredictor.__init__``. They
    receive a copy of the config with the device's name; the caller's config, which may be frozen,
    does not change. Keys of this project that it lacks have their defaults. A missing GPU is
    reported as in ``resolve_device``. A second call changes nothing.
    """
    from detectron2.engine import DefaultPredictor
    from detectron2.modeling import build_model

    @functools.wraps(build_model)
    def build_model_extended(cfg: CfgNode) -> torch.nn.Module:
        cfg = _with_device(cfg)
        _require_values(cfg)
        model = build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            use_channels_last(model)
        return model

    # Each module that imported the function by name has its own reference to it.
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and vars(module).get("build_model") is build_model:
            module.build_model = build_model_extended

    # detectron2's main branch also reads MODEL.DEVICE in the predictor.
    init = DefaultPredictor.__init__

    @functools.wraps(init)
    def init_extended(self: DefaultPredictor, cfg: CfgNode) -> None:
        init(self, _with_device(cfg))

    DefaultPredictor.__init__ = init_extended
