"""The sides of the model benchmark: from images to boxes, scores and run lengths of masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model, detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from benchmarks import model_torchvision
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from mask_rcnn_plus.modeling import postprocess
from mask_rcnn_plus.optimization import optimize

DTYPES = ("fp32", "bf16", "fp16")
BASELINES = ("stock", "torchvision")
PASTE = "paste, RLE"
FUSED = {
    "StandardROIHeads": "FusedROIHeads",
    "Res5ROIHeads": "FusedRes5ROIHeads",
    "CascadeROIHeads": "FusedCascadeROIHeads",
}
_STOCK = {ours: stock for stock, ours in FUSED.items()}

Inputs = list[dict[str, Any]]


@dataclass
class Side:
    """One way to find objects in images.

    Attributes:
        name: as "stock fp32".
        model: in evaluation mode.
        timer: of its stages.
        detect: from detectron2's inputs to one ``Instances`` an image, at its original size, with
            ``pred_boxes``, ``scores``, ``pred_classes`` and, where there are masks, ``rle``.
    """

    name: str
    model: nn.Module
    timer: StageTimer
    detect: Callable[[Inputs], list[Instances]]


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config with detectron2's own ROI heads and memory layout, which it also runs as.

    Raises:
        UserError: it asks for a pooler that detectron2 does not have.
    """
    stock = cfg.clone()
    stock.defrost()
    heads = cfg.MODEL.ROI_HEADS.NAME
    stock.MODEL.ROI_HEADS.NAME = _STOCK.get(heads, heads)
    stock.MODEL.CHANNELS_LAST = False
    for section in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        kind = cfg.MODEL[section].POOLER_TYPE
        if kind not in ("", "ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"):
            raise UserError(
                f"MODEL.{section}.POOLER_TYPE is '{kind}', which detectron2 does not have, so "
                "there is nothing to compare with: set ROIAlignV2"
            )
    return stock


def our_config(cfg: CfgNode) -> CfgNode:
    """The config with this project's ROI heads and channels_last."""
    ours = cfg.clone()
    ours.defrost()
    heads = cfg.MODEL.ROI_HEADS.NAME
    ours.MODEL.ROI_HEADS.NAME = FUSED.get(heads, heads)
    ours.MODEL.CHANNELS_LAST = True
    return ours


def build_sides(
    cfg: CfgNode,
    stock: nn.Module,
    *,
    against: Sequence[str],
    dtypes: Sequence[str],
    image_size: tuple[int, int],
) -> list[Side]:
    """The baselines, in fp32, then ours in each dtype.

    Args:
        cfg: detectron2's; its thresholds and numbers of detections are those of all sides.
        stock: its model, in evaluation mode, whose weights all sides have.
        against: the baselines, of ``BASELINES``.
        dtypes: ours, of ``DTYPES``.
        image_size: (height, width) of the network's input, for torchvision's resizing.

    Raises:
        UserError: a side cannot be built.
    """
    device = next(stock.parameters()).device
    sides = []
    if "stock" in against:
        sides.append(_stock_side(stock, device))
    if "torchvision" in against:
        theirs = model_torchvision.build(cfg, stock.state_dict(), image_size).to(device)
        sides.append(_torchvision_side(theirs, device))
    ours = build_model(our_config(cfg)).eval()
    ours.load_state_dict(stock.state_dict())
    for dtype in dtypes:
        sides.append(_our_side(ours, dtype, device))
    return sides


def set_limits(model: nn.Module, *, threshold: float | None = None, detections: int) -> None:
    """Sets which detections come out of a model: detectron2's or torchvision's.

    Args:
        model: in place.
        threshold: the least score; None leaves it.
        detections: of an image, at most.
    """
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_topk_per_image = detections
            if threshold is not None:
                module.test_score_thresh = threshold
        elif hasattr(module, "detections_per_img"):
            module.detections_per_img = detections
            if threshold is not None:
                module.score_thresh = threshold


def _stock_side(model: nn.Module, device: torch.device) -> Side:
    timer = StageTimer(stage_modules(model), device)

    def detect(inputs: Inputs) -> list[Instances]:
        results = []
        # What model(inputs) does, with a mark before the post-processing.
        for raw, one in zip(model.inference(inputs, do_postprocess=False), inputs, strict=True):
            with timer.stage(PASTE):
                found = detector_postprocess(raw, one["height"], one["width"])
                results.append(_encoded(found, found.get_fields().get("pred_masks")))
        return results

    return Side("stock fp32", model, timer, detect)


def _our_side(model: nn.Module, dtype: str, device: torch.device) -> Side:
    model = optimize(model, dtype)
    timer = StageTimer(stage_modules(model), device)

    def detect(inputs: Inputs) -> list[Instances]:
        results = []
        for raw, one in zip(model.inference(inputs, do_postprocess=False), inputs, strict=True):
            with timer.stage(PASTE):
                found = postprocess(raw, one["height"], one["width"])
                if found.has("pred_masks"):
                    found.rle = found.pred_masks.rle()
                    found.remove("pred_masks")
                results.append(found)
        return results

    return Side(f"ours {dtype}", model, timer, detect)


def _torchvision_side(model: Any, device: torch.device) -> Side:
    timer = StageTimer(model_torchvision.stage_modules(model), device)
    paste = model.transform.postprocess

    def timed_paste(*arguments: Any) -> Any:
        with timer.stage(PASTE):
            return paste(*arguments)

    model.transform.postprocess = timed_paste

    def detect(inputs: Inputs) -> list[Instances]:
        # RGB of 0 to 1, which torchvision's own transforms would have made.
        images = [one["image"].flip(0).to(device).float() / 255 for one in inputs]
        results = []
        for found, one in zip(model(images), inputs, strict=True):
            with timer.stage(PASTE):
                result = Instances((one["height"], one["width"]))
                result.pred_boxes = Boxes(found["boxes"])
                result.scores = found["scores"]
                result.pred_classes = found["labels"] - 1
                results.append(_encoded(result, found["masks"][:, 0] > 0.5))
        return results

    return Side("torchvision fp32", model, timer, detect)


def _encoded(found: Instances, masks: Tensor | None) -> Instances:
    """With run lengths as detectron2's evaluator makes them, in the place of images of masks."""
    if masks is not None:
        found.rle = [
            mask_util.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]
            for mask in masks.cpu()
        ]
        if found.has("pred_masks"):
            found.remove("pred_masks")
    return found
