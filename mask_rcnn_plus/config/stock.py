"""Converts a config for programs that know only detectron2's keys and ROI heads."""

import copy
import functools
from pathlib import Path

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from mask_rcnn_plus.config.keys import complete, get_cfg
from mask_rcnn_plus.errors import UserError

STOCK_CONFIG = "config_detectron2.yaml"
# Our heads -> detectron2's, with the same parameters, losses and detections.
COUNTERPARTS = {
    "FusedROIHeads": "StandardROIHeads",
    "FusedRes5ROIHeads": "Res5ROIHeads",
    "FusedCascadeROIHeads": "CascadeROIHeads",
}
POOLERS = ("", "ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")


def stock_config(cfg: CfgNode) -> CfgNode:
    """A config of the same model, with the same detections, in detectron2's keys and components.

    Args:
        cfg: any config. Not modified.

    Returns:
        an unfrozen config with the keys of detectron2's ``get_cfg``.

    Raises:
        UserError: the model has a part that detectron2 does not have.
    """
    stock = get_detectron2_cfg()
    _copy(cfg, stock)
    model = stock.MODEL
    model.ROI_HEADS.NAME = COUNTERPARTS.get(model.ROI_HEADS.NAME, model.ROI_HEADS.NAME)
    heads = ["ROI_BOX_HEAD"]
    heads += ["ROI_MASK_HEAD"] * model.MASK_ON + ["ROI_KEYPOINT_HEAD"] * model.KEYPOINT_ON
    for group in ("BACKBONE", "ROI_HEADS", *heads):
        name, registry = model[group].NAME, getattr(modeling, f"{group}_REGISTRY")
        if name in registry and registry.get(name).__module__.startswith("mask_rcnn_plus."):
            raise _no_counterpart(f"{group}.NAME", name)
    for group in heads:
        if model[group].POOLER_TYPE not in POOLERS:
            raise _no_counterpart(f"{group}.POOLER_TYPE", model[group].POOLER_TYPE)
    return stock


def accept_our_keys() -> None:
    """Makes detectron2's ``CfgNode`` merge files that have this project's keys.

    Only the keys of the file are added, so other configs, and what is saved of them, stay as they
    are. detectron2 offers no other place for this than the method itself. A second call changes
    nothing.
    """
    original = CfgNode.merge_from_other_cfg
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def merge_from_other_cfg(self: CfgNode, cfg_other: CfgNode) -> None:
        if "VERSION" in self:  # a whole config
            _add_keys(self, cfg_other, get_cfg())
        original(self, cfg_other)

    CfgNode.merge_from_other_cfg = merge_from_other_cfg


def _add_keys(cfg: CfgNode, other: CfgNode, defaults: CfgNode) -> None:
    for key in other.keys() & defaults.keys():
        group = isinstance(defaults[key], CfgNode)
        if key not in cfg:
            cfg[key] = CfgNode() if group else copy.deepcopy(defaults[key])
        if group and isinstance(cfg[key], CfgNode) and isinstance(other[key], dict):
            _add_keys(cfg[key], other[key], defaults[key])


def write_stock_config(cfg: CfgNode, path: Path) -> None:
    """Writes :func:`stock_config` as YAML, with a comment on what detectron2 does not have.

    Raises:
        UserError: as :func:`stock_config`.
        OSError: the file cannot be written.
    """
    lines = [
        "For programs that use detectron2 without mask_rcnn_plus. The detections are the same."
    ]
    if changed := _changed(complete(cfg), get_cfg(), get_detectron2_cfg()):
        lines.append(f"Left out, because detectron2 lacks these keys: {', '.join(changed)}.")
    text = "".join(f"# {line}\n" for line in lines) + stock_config(cfg).dump()
    path.write_text(text, encoding="utf-8")


def _copy(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if key in source:
            if isinstance(value, CfgNode) and value:
                _copy(source[key], value)
            else:
                target[key] = source[key]


def _changed(cfg: CfgNode, ours: CfgNode, theirs: CfgNode, prefix: str = "") -> list[str]:
    """The keys that only this project has and whose values are not the defaults."""
    changed = []
    for key, value in ours.items():
        if isinstance(value, CfgNode):
            below = theirs[key] if key in theirs else CfgNode()
            changed += _changed(cfg[key], value, below, f"{prefix}{key}.")
        elif key not in theirs and cfg[key] != value:
            changed.append(prefix + key)
    return changed


def _no_counterpart(key: str, value: str) -> UserError:
    return UserError(
        f"MODEL.{key} is '{value}', which detectron2 does not have: use the "
        "run's config.yaml with `import mask_rcnn_plus` instead"
    )
