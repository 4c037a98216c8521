"""Any image model of timm as a detectron2 backbone, alone or below an FPN."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn
from torch.nn import functional as F

from mask_rcnn_plus.errors import UserError, did_you_mean

# How timm's models of one input size (windows, position embeddings) are told to take any. Swin
# also has to keep its window, and shift it, where a map of its training size has but one.
_ANY_SIZE = ({"strict_img_size": False, "always_partition": True}, {"dynamic_img_size": True}, {})


class TimmBackbone(Backbone):
    """The feature maps of a timm model, named by stride as a ResNet's: 4 is "res2", 32 "res5".

    A map of stride s of an image (H, W) has the size (ceil(H / s), ceil(W / s)): images are padded
    with zeros, right and below, to what the model needs, and the maps cropped.
    """

    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        pretrained: bool = False,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
        freeze_batch_norm: bool = False,
    ) -> None:
        """
        Args:
            name: of the model in timm, with or without the tag of its weights
                ("convnext_tiny", "convnext_tiny.fb_in22k").
            out_features: the maps to give, finest first.
            pretrained: start from timm's ImageNet weights, fetched where they are not cached.
            in_channels: channels of the images.
            drop_path_rate: probability, in training, of dropping the last block (stochastic depth,
                arXiv:1603.09382); earlier ones linearly less.
            freeze_at: 0 trains all; 1 freezes the stem, n all up to "resn", batch norms with it.
            freeze_batch_norm: every batch norm keeps its statistics, scale and shift.

        Raises:
            UserError: timm is missing, has no such model, or the model no such maps; weights that
                cannot be fetched.
        """
        super().__init__()
        timm = _import_timm()
        if ":" not in name and not timm.is_model(name):  # "hf-hub:..." names a model elsewhere
            raise UserError(
                f"MODEL.TIMM.NAME is '{name}', which timm {timm.__version__} does not have"
                f"{did_you_mean(name, timm.list_models()) or '; see timm.list_models()'}"
            )
        options = {
            "pretrained": pretrained,
            "in_chans": in_channels,
            "drop_path_rate": drop_path_rate,
        }
        self.model = _create(timm, name, options)
        # By name, the deepest of each stride: its index in the model's list, and its module.
        there = _stages(self.model)
        missing = [feature for feature in out_features if feature not in there]
        if missing:
            raise UserError(
                f"MODEL.TIMM.OUT_FEATURES names '{missing[0]}', but '{name}' has {', '.join(there)}"
            )
        deepest = max(out_features, key=list(there).index)
        if deepest != list(there)[-1]:
            # Layers behind the last map would be carried, and trained, for nothing.
            last = there[deepest]["index"]
            wanted = tuple(i for i in self.model.feature_info.out_indices if i <= last)
            self.model = _create(timm, name, {**options, "out_indices": wanted})
            there = _stages(self.model)
        self._out_features = list(out_features)
        self._out_feature_strides = {key: there[key]["reduction"] for key in out_features}
        self._out_feature_channels = {key: there[key]["num_chs"] for key in out_features}
        self._positions = {key: there[key]["position"] for key in out_features}
        self._channels_at_the_end = "NHWC" in str(getattr(self.model, "output_fmt", ""))
        self._multiple = _input_multiple(
            self.model, name, max(self._out_feature_strides.values()), in_channels
        )
        if freeze_batch_norm:
            self.model = timm.layers.freeze_batch_norm_2d(self.model)
        if freeze_at > 0:
            _freeze(timm, self.model, there, freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, in_channels, H, W), normalised images.

        Returns:
            by name (N, C, ceil(H / stride), ceil(W / stride)), finest first.
        """
        height, width = x.shape[-2:]
        pad = (-width % self._multiple, -height % self._multiple)
        if any(pad):
            x = F.pad(x, (0, pad[0], 0, pad[1]))
        maps = self.model(x)
        found = {}
        for name in self._out_features:
            one = maps[self._positions[name]]
            if self._channels_at_the_end:
                one = one.permute(0, 3, 1, 2)
            stride = self._out_feature_strides[name]
            found[name] = one[..., : math.ceil(height / stride), : math.ceil(width / stride)]
        return found


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: Any, input_shape: ShapeSpec) -> TimmBackbone:
    """The model that MODEL.TIMM describes, for C4-like heads."""
    timm = cfg.MODEL.TIMM
    return TimmBackbone(
        name=timm.NAME,
        out_features=timm.OUT_FEATURES,
        # A checkpoint brings all weights with it, so nothing needs fetching.
        pretrained=timm.PRETRAINED and not cfg.MODEL.WEIGHTS,
        in_channels=input_shape.channels,
        drop_path_rate=timm.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze_batch_norm=timm.FREEZE_BATCH_NORM,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """The same below an FPN (arXiv:1612.03144) as MODEL.FPN describes it, with a coarsest level
    that takes every second cell of the one before."""
    bottom_up = build_timm_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    missing = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES names '{missing[0]}', but MODEL.TIMM.OUT_FEATURES is "
            f"{', '.join(shapes)}"
        )
    top_block = LastLevelMaxPool()
    top_block.in_feature = cfg.MODEL.FPN.IN_FEATURES[-1].replace("res", "p")
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _import_timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(
            "MODEL.BACKBONE.NAME asks for a timm model, and timm is not installed: run "
            "`uv sync --extra timm`, or `pip install timm`"
        ) from error
    return timm


def _create(timm: ModuleType, name: str, options: dict[str, Any]) -> nn.Module:
    """The model as a list of feature maps, for any input size where the model can be told so."""
    config = timm.get_pretrained_cfg(name) if ":" not in name else None
    any_size = list(_ANY_SIZE if config is None or config.fixed_input_size else ({},))
    options = dict(options)
    while True:
        try:
            return timm.create_model(name, features_only=True, **any_size[0], **options)
        except TypeError as error:
            if any(key in str(error) for key in any_size[0]):
                any_size.pop(0)
            elif "drop_path_rate" in str(error) and "drop_path_rate" in options:
                if options.pop("drop_path_rate"):
                    raise UserError(
                        f"MODEL.TIMM.NAME is '{name}', which has no drop path: set "
                        "MODEL.TIMM.DROP_PATH_RATE 0.0"
                    ) from error
            else:
                raise
        except Exception as error:
            # Anything can go wrong while weights are fetched: no network, no such tag, no space.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if options["pretrained"]:
                raise UserError(
                    f"the pretrained weights of '{name}' cannot be had ({reason}): connect to the "
                    "network once, or set MODEL.TIMM.PRETRAINED False"
                ) from error
            raise UserError(
                f"MODEL.TIMM.NAME is '{name}', which gives no feature maps ({reason})"
            ) from error


def _stages(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, finest first: a map's stride, channels, module, index in timm, place in the list."""
    stages = {}
    for position, info in enumerate(model.feature_info.get_dicts()):
        level = math.log2(info["reduction"])
        if level.is_integer():
            index = model.feature_info.out_indices[position]
            stages[f"res{int(level)}"] = {**info, "position": position, "index": index}
    return dict(sorted(stages.items(), key=lambda item: item[1]["reduction"]))


def _input_multiple(model: nn.Module, name: str, stride: int, channels: int) -> int:
    """What the sides of an image must be multiples of: the stride, or windows' whole input."""
    config = model.pretrained_cfg
    if not config.get("fixed_input_size"):
        return stride
    side = config["input_size"][-1]
    for multiple in (stride, side):
        if _runs(model, torch.zeros(1, channels, multiple, 2 * multiple)):
            return multiple
    raise UserError(
        f"MODEL.TIMM.NAME is '{name}', which takes images of {side} x {side} pixels alone: choose "
        "a model for any size"
    )


@torch.no_grad()
def _runs(model: nn.Module, image: Tensor) -> bool:
    training = model.training
    try:
        model.eval()(image)
    except (AssertionError, RuntimeError, ValueError):
        return False
    finally:
        model.train(training)
    return True


def _freeze(timm: ModuleType, model: nn.Module, stages: dict[str, Any], freeze_at: int) -> None:
    """Freezes what is registered before "res2" (1), or up to the end of "resn" (n)."""
    modules = dict(model.named_modules())
    stage = f"res{max(freeze_at, 2)}"
    if stage not in stages:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but the stages are {', '.join(stages)}"
        )
    path = stages[stage]["module"]
    # timm's list of maps flattens one level of modules, its getter wraps the model.
    paths = (path, path.replace(".", "_"), f"model.{path}")
    path = next((candidate for candidate in paths if candidate in modules), "")
    if not path:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but this timm model does not say which of "
            "its layers belong to which stage: set it to 0"
        )
    reached = False
    for name, module in modules.items():
        inside = name == path or name.startswith(f"{path}.")
        if (inside and freeze_at < 2) or (reached and not inside):
            break
        reached |= inside
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            parent, _, child = name.rpartition(".")
            frozen = timm.layers.freeze_batch_norm_2d(module)
            setattr(model.get_submodule(parent), child, frozen)
