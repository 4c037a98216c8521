"""Any image model of timm as a detectron2 backbone, with or without an FPN on top."""

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

from mask_rcnn_plus.config import complete
from mask_rcnn_plus.errors import UserError, did_you_mean, reason

# Options that let timm's models with a fixed input size (windows, position embeddings) accept any
# size. Swin must also keep partitioning and shifting windows where its training size has only one.
_ANY_SIZE = ({"strict_img_size": False, "always_partition": True}, {"dynamic_img_size": True}, {})


class TimmBackbone(Backbone):
    """The feature maps of a timm model, named by stride as for a ResNet: 4 is "res2", 32 "res5".

    Images are padded with zeros, right and below, to the size that the model needs, and the maps
    are cropped again.
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
            name: timm's name of the model, with or without the tag of its weights
                ("convnext_tiny", "convnext_tiny.fb_in22k").
            out_features: the maps to return, finest first.
            pretrained: start from timm's ImageNet weights, downloaded unless they are cached.
            in_channels: channels of the images.
            drop_path_rate: probability, in training, of dropping the last block (stochastic depth,
                arXiv:1603.09382); it falls linearly to 0 towards the first block.
            freeze_at: 0 trains everything; 1 freezes the stem; n freezes everything up to "resn".
            freeze_batch_norm: every batch norm keeps its statistics, scale and shift.

        Raises:
            UserError: timm is missing, the model or a map does not exist, or weights cannot be
                downloaded.
        """
        super().__init__()
        timm = _import_timm()
        if ":" not in name and not timm.is_model(name):  # not checked: "hf-hub:..."
            raise UserError(
                f"MODEL.TIMM.NAME: timm {timm.__version__} has no model '{name}'"
                f"{did_you_mean(name, timm.list_models()) or '; see timm.list_models()'}"
            )
        options = {
            "pretrained": pretrained,
            "in_chans": in_channels,
            "drop_path_rate": drop_path_rate,
        }
        self.model = _create(timm, name, options)
        stages = _stages(self.model)
        missing = [feature for feature in out_features if feature not in stages]
        if missing:
            raise UserError(
                f"MODEL.TIMM.OUT_FEATURES: '{name}' has no '{missing[0]}'; choose from "
                f"{', '.join(stages)}"
            )
        deepest = max(out_features, key=list(stages).index)
        if deepest != list(stages)[-1]:
            # Leave out the layers behind the last map, which have no effect.
            last = stages[deepest]["index"]
            indices = tuple(i for i in self.model.feature_info.out_indices if i <= last)
            self.model = _create(timm, name, {**options, "out_indices": indices})
            stages = _stages(self.model)
        self._out_features = list(out_features)
        self._out_feature_strides = {key: stages[key]["reduction"] for key in out_features}
        self._out_feature_channels = {key: stages[key]["num_chs"] for key in out_features}
        self._positions = {key: stages[key]["position"] for key in out_features}
        self._channels_last = "NHWC" in str(getattr(self.model, "output_fmt", ""))
        stride = max(self._out_feature_strides.values())
        self._multiple = _input_multiple(self.model, name, stride, in_channels)
        if freeze_batch_norm:
            self.model = timm.layers.freeze_batch_norm_2d(self.model)
        if freeze_at > 0:
            _freeze(timm, self.model, stages, freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, in_channels, H, W), normalised images.

        Returns:
            name -> (N, C, ceil(H / stride), ceil(W / stride)), finest first.
        """
        height, width = x.shape[-2:]
        pad = (-width % self._multiple, -height % self._multiple)
        if any(pad):
            x = F.pad(x, (0, pad[0], 0, pad[1]))
        maps = self.model(x)
        features = {}
        for name in self._out_features:
            feature = maps[self._positions[name]]
            if self._channels_last:
                feature = feature.permute(0, 3, 1, 2)
            stride = self._out_feature_strides[name]
            features[name] = feature[..., : math.ceil(height / stride), : math.ceil(width / stride)]
        return features


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: Any, input_shape: ShapeSpec) -> TimmBackbone:
    """The model from MODEL.TIMM, without FPN, for C4-like heads."""
    timm = complete(cfg).MODEL.TIMM
    return TimmBackbone(
        name=timm.NAME,
        out_features=timm.OUT_FEATURES,
        # A checkpoint contains all weights, so nothing needs downloading.
        pretrained=timm.PRETRAINED and not cfg.MODEL.WEIGHTS,
        in_channels=input_shape.channels,
        drop_path_rate=timm.DROP_PATH_RATE,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze_batch_norm=timm.FREEZE_BATCH_NORM,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """The model from MODEL.TIMM with an FPN on top (arXiv:1612.03144), configured by MODEL.FPN.

    An additional coarsest level takes every second cell of the level below.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    missing = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES: '{missing[0]}' is not in MODEL.TIMM.OUT_FEATURES "
            f"({', '.join(shapes)})"
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
            "MODEL.BACKBONE.NAME needs timm, which is not installed: run "
            "`uv sync --extra timm`, or `pip install timm`"
        ) from error
    return timm


def _create(timm: ModuleType, name: str, options: dict[str, Any]) -> nn.Module:
    """A model that returns a list of feature maps, for any input size if the model supports it."""
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
                        f"MODEL.TIMM.NAME '{name}' does not support drop path: set "
                        "MODEL.TIMM.DROP_PATH_RATE 0.0"
                    ) from error
            else:
                raise
        except Exception as error:
            # Downloads fail in many ways: no network, an unknown tag, no space.
            cause = f"{type(error).__name__}: {reason(error)}"
            if options["pretrained"]:
                raise UserError(
                    f"cannot download the pretrained weights of '{name}' ({cause}): connect to the "
                    "network once, or set MODEL.TIMM.PRETRAINED False"
                ) from error
            raise UserError(
                f"MODEL.TIMM.NAME '{name}' does not provide feature maps ({cause})"
            ) from error


def _stages(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describes the deepest map of each stride by name, finest first.

    The keys are timm's ("reduction", "num_chs", "module"), its "index" in timm and its "position"
    in the model's list of maps.
    """
    stages = {}
    for position, info in enumerate(model.feature_info.get_dicts()):
        level = math.log2(info["reduction"])
        if level.is_integer():
            index = model.feature_info.out_indices[position]
            stages[f"res{int(level)}"] = {**info, "position": position, "index": index}
    return dict(sorted(stages.items(), key=lambda item: item[1]["reduction"]))


def _input_multiple(model: nn.Module, name: str, stride: int, channels: int) -> int:
    """The number that image sides must be multiples of: the stride, or the model's input size."""
    config = model.pretrained_cfg
    if not config.get("fixed_input_size"):
        return stride
    side = config["input_size"][-1]
    for multiple in (stride, side):
        if _runs(model, torch.zeros(1, channels, multiple, 2 * multiple)):
            return multiple
    raise UserError(
        f"MODEL.TIMM.NAME '{name}' only supports images of {side} x {side} pixels: choose a model "
        "for any size"
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
    """Freezes the modules registered before "res2" (1), or up to the end of "resn" (n)."""
    modules = dict(model.named_modules())
    stage = f"res{max(freeze_at, 2)}"
    if stage not in stages:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: no stage '{stage}', only {', '.join(stages)}"
        )
    path = stages[stage]["module"]
    # timm either flattens one level of modules or wraps the model.
    paths = (path, path.replace(".", "_"), f"model.{path}")
    path = next((candidate for candidate in paths if candidate in modules), "")
    if not path:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: this timm model does not tell its stages "
            "apart; set it to 0"
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
