"""MODEL.DEVICE and MODEL.CHANNELS_LAST: what detectron2's functions must understand of them."""

import functools
import sys
from typing import Any

import torch
from detectron2.config import CfgNode

from mask_rcnn_plus.errors import UserError


def resolve_device(name: str, option: str = "MODEL.DEVICE") -> str:
    """The device that a value of MODEL.DEVICE stands for.

    Args:
        name: "auto", or what ``torch.device`` takes, as "cpu", "cuda", "cuda:1".
        option: what messages call it.

    Returns:
        for "auto", "cuda" where torch sees a GPU and else "cpu"; otherwise the name itself.

    Raises:
        UserError: the name is no device, or a CUDA device that this machine lacks.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"{option} is '{name}', no device torch knows; set {option} auto, cpu or cuda"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            has = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise UserError(
                f"{option} is '{name}', but torch sees {has} here; set {option} auto or cpu"
            )
    return name


def make_current(device: str) -> None:
    """Makes a GPU that is named by its number the current one.

    That is the one that much of torch and detectron2 takes for the model's: to wait for, to tell
    the memory of, to launch on.

    Args:
        device: from :func:`resolve_device`; of others than "cuda:1" and the like nothing is done.
    """
    named = torch.device(device)
    if named.type == "cuda" and named.index is not None:
        torch.cuda.set_device(named)


def _with_device(cfg: CfgNode) -> CfgNode:
    device = resolve_device(cfg.MODEL.DEVICE)
    if device == cfg.MODEL.DEVICE:
        return cfg
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.DEVICE = device
    if cfg.is_frozen():
        copy.freeze()
    return copy


def use_channels_last(model: torch.nn.Module) -> None:
    """Converts a detectron2 model, in place, to run in channels_last (NHWC) memory.

    What enters the backbone is converted; convolutions, norms, resizing and pooling keep the layout
    of what they get, so the heads get it too.

    Args:
        model: of any architecture with a ``backbone`` that takes the batch of images.

    Raises:
        UserError: there is no backbone.
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
            # Its loss views each heatmap as a row, which it is in the usual layout alone.
            list(head.modules())[-1].register_forward_hook(_to_contiguous)


def _to_channels_last(
    backbone: torch.nn.Module, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _to_contiguous(layer: torch.nn.Module, inputs: Any, maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous()


@functools.cache
def extend_detectron2() -> None:
    """Lets detectron2 take a config that says MODEL.DEVICE "auto" or MODEL.CHANNELS_LAST.

    ``build_model`` and ``DefaultPredictor`` get a copy of the config that names the device; the
    caller's, which may be frozen, stays as it is. They also refuse an absent GPU as
    ``resolve_device`` does. A second call changes nothing.
    """
    from detectron2.engine import DefaultPredictor
    from detectron2.modeling import build_model

    @functools.wraps(build_model)
    def build_model_extended(cfg: CfgNode) -> torch.nn.Module:
        model = build_model(_with_device(cfg))
        # A config made without this project's keys has none.
        if cfg.MODEL.get("CHANNELS_LAST", False):
            use_channels_last(model)
        return model

    # Each module that imported the function by name holds its own reference to it.
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and vars(module).get("build_model") is build_model:
            module.build_model = build_model_extended

    # In main the predictor reads MODEL.DEVICE once more, from its own copy of the config.
    init = DefaultPredictor.__init__

    @functools.wraps(init)
    def init_anywhere(self: DefaultPredictor, cfg: CfgNode) -> None:
        init(self, _with_device(cfg))

    DefaultPredictor.__init__ = init_anywhere
