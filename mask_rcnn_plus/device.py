"""MODEL.DEVICE: what "auto" means, and detectron2's functions that must understand it."""

import functools
import sys

import torch
from detectron2.config import CfgNode

from mask_rcnn_plus.errors import UserError


def resolve_device(name: str) -> str:
    """The device that a value of MODEL.DEVICE stands for.

    Args:
        name: "auto", or what ``torch.device`` takes, as "cpu", "cuda", "cuda:1".

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
            f"MODEL.DEVICE is '{name}', no device torch knows; set MODEL.DEVICE auto, cpu or cuda"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            has = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise UserError(
                f"MODEL.DEVICE is '{name}', but torch sees {has} here; set MODEL.DEVICE auto or cpu"
            )
    return name


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


@functools.cache
def allow_auto_device() -> None:
    """Lets detectron2's ``build_model`` and ``DefaultPredictor`` take a config that says "auto".

    They get a copy of the config that names the device; the caller's, which may be frozen, stays
    as it is. They also refuse an absent GPU as ``resolve_device`` does. A second call changes
    nothing.
    """
    from detectron2.engine import DefaultPredictor
    from detectron2.modeling import build_model

    @functools.wraps(build_model)
    def build_model_anywhere(cfg: CfgNode) -> torch.nn.Module:
        return build_model(_with_device(cfg))

    # Each module that imported the function by name holds its own reference to it.
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and vars(module).get("build_model") is build_model:
            module.build_model = build_model_anywhere

    # In main the predictor reads MODEL.DEVICE once more, from its own copy of the config.
    init = DefaultPredictor.__init__

    @functools.wraps(init)
    def init_anywhere(self: DefaultPredictor, cfg: CfgNode) -> None:
        init(self, _with_device(cfg))

    DefaultPredictor.__init__ = init_anywhere
