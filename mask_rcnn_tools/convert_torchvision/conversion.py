"""Converts torchvision's weights of maskrcnn_ or fasterrcnn_resnet50_fpn to detectron2."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from mask_rcnn_plus.engine.weights import (
    UnsafePickleError,
    cannot_load,
    explain,
    local_weights,
    read_torch,
)
from mask_rcnn_plus.errors import UserError

_STAGES = (3, 4, 6, 3)  # blocks per stage of a ResNet-50
# BatchNorm uses its count of batches only with a momentum of None.
_IGNORED = ".num_batches_tracked"
_D2_EPS = 1e-5
_MAX_NAMES = 4  # in a message

# Names of layers before torchvision 0.13, as in its published COCO_V1 weights, and since then.
_OLD_NAMES = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    *(
        (rf"^roi_heads\.mask_head\.mask_fcn{i + 1}\.", f"roi_heads.mask_head.{i}.0.")
        for i in range(4)
    ),
)


def convert(
    state: Mapping[str, Tensor], *, coco: bool = False, batch_norm_eps: float = 0.0
) -> dict[str, Tensor]:
    """Converts a state dict to detectron2's R-50-FPN of ``configs/torchvision_R_50_FPN.yaml``.

    Args:
        state: ``state_dict()`` of torchvision's ``maskrcnn_resnet50_fpn`` or
            ``fasterrcnn_resnet50_fpn``, from any version of torchvision.
        coco: keep only the 80 of 90 classes that are COCO categories, in detectron2's order.
        batch_norm_eps: epsilon of the model's batch norm: 0 for torchvision's COCO weights and
            models trained from them, else 1e-5.

    Returns:
        detectron2's state dict. Unchanged tensors are not copied.

    Raises:
        UserError: the keys or the numbers of classes do not match these models.
    """
    source = {_new_name(n): v for n, v in state.items() if not n.endswith(_IGNORED)}
    masks = any(name.startswith("roi_heads.mask_") for name in source)
    names = dict(parameter_names(masks=masks))
    _require_same_keys(source, names)
    keep = _classes(source, coco=coco, masks=masks)
    result = {}
    for name, new_name in names.items():
        value = source[name]
        if name == "backbone.body.conv1.weight":
            value = value.flip(1)
        elif new_name.startswith("roi_heads.box_predictor.cls_score."):
            value = value[[*keep, 0]]
        elif new_name.startswith("roi_heads.box_predictor.bbox_pred."):
            value = value.unflatten(0, (-1, 4))[keep].flatten(0, 1)
        elif new_name.startswith("roi_heads.mask_head.predictor."):
            value = value[keep]
        elif new_name.endswith(".norm.weight"):
            # Changing the variance instead would fail where it is below detectron2's epsilon.
            variance = source[name.removesuffix("weight") + "running_var"]
            value = value * ((variance + _D2_EPS) / (variance + batch_norm_eps)).sqrt()
        result[new_name] = value
    return result


def parameter_names(*, masks: bool) -> Iterator[tuple[str, str]]:
    """The name of each parameter and buffer in torchvision, and in detectron2."""

    def pairs(theirs: str, ours: str, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
        for part in parts:
            yield f"{theirs}.{part}", f"{ours}.{part}"

    affine = ("weight", "bias")
    norm = (*affine, "running_mean", "running_var")

    def convolution(theirs: str, batch_norm: str, ours: str) -> Iterator[tuple[str, str]]:
        yield from pairs(theirs, ours, ["weight"])
        yield from pairs(batch_norm, f"{ours}.norm", norm)

    body, bottom_up = "backbone.body", "backbone.bottom_up"
    yield from convolution(f"{body}.conv1", f"{body}.bn1", f"{bottom_up}.stem.conv1")
    for stage, blocks in enumerate(_STAGES, 1):
        for block in range(blocks):
            theirs, ours = f"{body}.layer{stage}.{block}", f"{bottom_up}.res{stage + 1}.{block}"
            for k in (1, 2, 3):
                yield from convolution(f"{theirs}.conv{k}", f"{theirs}.bn{k}", f"{ours}.conv{k}")
            if block == 0:
                downsample = f"{theirs}.downsample"
                yield from convolution(f"{downsample}.0", f"{downsample}.1", f"{ours}.shortcut")
    layers = {
        "rpn.head.conv.0.0": "proposal_generator.rpn_head.conv",
        "rpn.head.cls_logits": "proposal_generator.rpn_head.objectness_logits",
        "rpn.head.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
        "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
        "roi_heads.box_predictor.cls_score": "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred": "roi_heads.box_predictor.bbox_pred",
    }
    for level in range(4):
        layers[f"backbone.fpn.inner_blocks.{level}.0"] = f"backbone.fpn_lateral{level + 2}"
        layers[f"backbone.fpn.layer_blocks.{level}.0"] = f"backbone.fpn_output{level + 2}"
        if masks:
            layers[f"roi_heads.mask_head.{level}.0"] = f"roi_heads.mask_head.mask_fcn{level + 1}"
    if masks:
        layers["roi_heads.mask_predictor.conv5_mask"] = "roi_heads.mask_head.deconv"
        layers["roi_heads.mask_predictor.mask_fcn_logits"] = "roi_heads.mask_head.predictor"
    for theirs, ours in layers.items():
        yield from pairs(theirs, ours, affine)


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _require_same_keys(source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    missing = [name for name in names if name not in source]
    unknown = [name for name in source if name not in names]
    parts = [
        f"{title}: {len(keys)} keys ({', '.join(keys[:_MAX_NAMES])}"
        f"{', ...' if len(keys) > _MAX_NAMES else ''})"
        for title, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    if parts:
        raise UserError(
            "these are not the weights of torchvision's maskrcnn_resnet50_fpn or "
            f"fasterrcnn_resnet50_fpn: {'; '.join(parts)}"
        )


def _classes(source: Mapping[str, Tensor], *, coco: bool, masks: bool) -> list[int]:
    """The rows of torchvision's heads in detectron2's class order, without background (row 0)."""
    rows = {
        "cls_score": len(source["roi_heads.box_predictor.cls_score.bias"]),
        "bbox_pred": len(source["roi_heads.box_predictor.bbox_pred.bias"]) / 4,
    }
    if masks:
        rows["mask_fcn_logits"] = len(source["roi_heads.mask_predictor.mask_fcn_logits.bias"])
    if len(set(rows.values())) > 1 or rows["cls_score"] < 2:
        counts = ", ".join(f"{name} {count:g}" for name, count in rows.items())
        raise UserError(f"the heads have different numbers of classes: {counts}")
    if not coco:
        return list(range(1, int(rows["cls_score"])))
    if rows["cls_score"] != 91:
        raise UserError(
            "--coco needs the 91 classes of torchvision's COCO weights; these have "
            f"{rows['cls_score']}"
        )
    return [category["id"] for category in COCO_CATEGORIES if category["isthing"]]


def read_state(weights: str) -> dict[str, Tensor]:
    """Reads a state dict of torchvision, or of a checkpoint of its reference training.

    Args:
        weights: a file or a URL.

    Raises:
        UserError: the file cannot be read, or contains no state dict.
    """
    path = local_weights(weights)
    try:
        # Checkpoints of torchvision's reference training also contain its arguments.
        state = read_torch(path, also=[argparse.Namespace])
    except UnsafePickleError as error:
        raise UserError(f"weights '{path}' cannot be loaded: {explain(error)}") from error
    except Exception as error:
        raise cannot_load(str(path), error, path) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"weights '{path}' are not a state dict: save model.state_dict()")
    return state
