"""The model benchmark's implementations: stock detectron2, torchvision, ours, on the same weights.

Each maps images to boxes, scores and run-length encoded masks.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model, detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.evaluation.stages import StageTimer, stage_modules
from mask_rcnn_plus.modeling import PastedMasks, postprocess
from mask_rcnn_plus.optimization import optimize
from mask_rcnn_tools.convert_torchvision import parameter_names

DTYPES = ("fp32", "bf16", "fp16")
BASELINES = ("stock", "torchvision")
PASTE = "paste, RLE"

_FUSED_HEADS = {
    "StandardROIHeads": "FusedROIHeads",
    "Res5ROIHeads": "FusedRes5ROIHeads",
    "CascadeROIHeads": "FusedCascadeROIHeads",
}
_STOCK_HEADS = {ours: stock for stock, ours in _FUSED_HEADS.items()}
# Module of torchvision's model -> the stage that does the same in detectron2's.
_TORCHVISION_STAGES = {
    "transform": "other",
    "backbone.body": "backbone",
    "backbone.fpn": "FPN",
    "rpn": "proposals",
    "rpn.head": "RPN head",
    "roi_heads": "detections",
    "roi_heads.box_roi_pool": "box pooler",
    "roi_heads.box_head": "box head",
    "roi_heads.box_predictor": "box head",
    "roi_heads.mask_roi_pool": "mask pooler",
    "roi_heads.mask_head": "mask head",
    "roi_heads.mask_predictor": "mask head",
}

Inputs = list[dict[str, Any]]


@dataclass
class Implementation:
    """One way to find objects in images.

    Attributes:
        name: e.g. "stock fp32".
        model: the model, in evaluation mode.
        timer: times its stages.
        detect: from detectron2's inputs to one ``Instances`` per image, at its original size, with
            ``pred_boxes``, ``scores``, ``pred_classes`` and, where there are masks, ``rle``.
    """

    name: str
    model: nn.Module
    timer: StageTimer
    detect: Callable[[Inputs], list[Instances]]


def stock_config(cfg: CfgNode) -> CfgNode:
    """The config with detectron2's own ROI heads and memory layout.

    Raises:
        UserError: the config needs a pooler that detectron2 does not have.
    """
    stock = cfg.clone()
    stock.defrost()
    heads = cfg.MODEL.ROI_HEADS.NAME
    stock.MODEL.ROI_HEADS.NAME = _STOCK_HEADS.get(heads, heads)
    stock.MODEL.CHANNELS_LAST = False
    for section in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        kind = cfg.MODEL[section].POOLER_TYPE
        if kind not in ("", "ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated"):
            raise UserError(
                f"MODEL.{section}.POOLER_TYPE: '{kind}' is not in detectron2, which the benchmark "
                "compares with; set ROIAlignV2"
            )
    return stock


def our_config(cfg: CfgNode) -> CfgNode:
    """The config with this project's ROI heads and channels_last."""
    ours = cfg.clone()
    ours.defrost()
    heads = cfg.MODEL.ROI_HEADS.NAME
    ours.MODEL.ROI_HEADS.NAME = _FUSED_HEADS.get(heads, heads)
    ours.MODEL.CHANNELS_LAST = True
    return ours


def build_implementations(
    cfg: CfgNode,
    stock: nn.Module,
    *,
    against: Sequence[str],
    dtypes: Sequence[str],
    image_size: tuple[int, int],
) -> list[Implementation]:
    """The baselines in fp32, then ours in each dtype; on a GPU also with CUDA graphs.

    Args:
        cfg: detectron2's; its thresholds and numbers of detections apply to all implementations.
        stock: detectron2's model, in evaluation mode; all implementations get its weights.
        against: names from ``BASELINES``; "stock" is always included, since the others are
            compared with it.
        dtypes: the dtypes of our implementation, from ``DTYPES``.
        image_size: (height, width) of the network's input, for torchvision's resizing.

    Raises:
        UserError: torchvision does not have the model.
    """
    device = next(stock.parameters()).device
    implementations = [_detectron2("stock fp32", stock, device, detector_postprocess, _encode)]
    if "torchvision" in against:
        model = torchvision_model(cfg, stock.state_dict(), image_size).to(device)
        implementations.append(_torchvision(model, device))
    ours = build_model(our_config(cfg)).eval()
    ours.load_state_dict(stock.state_dict())
    for dtype, graphs in itertools.product(dtypes, (False, True)):
        if graphs and device.type != "cuda":
            continue
        model = optimize(ours, dtype, cuda_graphs=graphs)
        name = f"ours {dtype}" + ", graphs" * graphs
        implementations.append(_detectron2(name, model, device, postprocess, PastedMasks.rle))
    return implementations


def set_limits(model: nn.Module, *, threshold: float | None = None, detections: int) -> None:
    """Sets which detections a model of detectron2 or torchvision returns.

    Args:
        model: changed in place.
        threshold: the lowest score; None leaves it unchanged.
        detections: the most per image.
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


def _detectron2(
    name: str,
    model: nn.Module,
    device: torch.device,
    paste: Callable[[Instances, int, int], Instances],
    encode: Callable[[Any], list[dict[str, Any]]],
) -> Implementation:
    """A GeneralizedRCNN with its post-processing and the encoding of ``pred_masks``."""
    timer = StageTimer(stage_modules(model), device)

    def detect(inputs: Inputs) -> list[Instances]:
        results = []
        # The same as model(inputs), but the post-processing is timed separately.
        for raw, image in zip(model.inference(inputs, do_postprocess=False), inputs, strict=True):
            with timer.stage(PASTE):
                result = paste(raw, image["height"], image["width"])
                if result.has("pred_masks"):
                    result.rle = encode(result.pred_masks)
                    result.remove("pred_masks")
                results.append(result)
        return results

    return Implementation(name, model, timer, detect)


def _torchvision(model: Any, device: torch.device) -> Implementation:
    stages: dict[str, list[nn.Module]] = {}
    for path, stage in _TORCHVISION_STAGES.items():
        stages.setdefault(stage, []).append(model.get_submodule(path))
    timer = StageTimer(stages, device)
    paste = model.transform.postprocess

    def timed_paste(*arguments: Any) -> Any:
        with timer.stage(PASTE):
            return paste(*arguments)

    # Pasting is a method, not a module, so a hook cannot time it.
    model.transform.postprocess = timed_paste

    def detect(inputs: Inputs) -> list[Instances]:
        # torchvision expects RGB images, 0 to 1.
        images = [image["image"].flip(0).to(device).float() / 255 for image in inputs]
        results = []
        for output, image in zip(model(images), inputs, strict=True):
            with timer.stage(PASTE):
                result = Instances((image["height"], image["width"]))
                result.pred_boxes = Boxes(output["boxes"])
                result.scores = output["scores"]
                result.pred_classes = output["labels"] - 1
                result.rle = _encode(output["masks"][:, 0] > 0.5)
                results.append(result)
        return results

    return Implementation("torchvision fp32", model, timer, detect)


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Run lengths, encoded as by detectron2's evaluator."""
    return [
        mask_util.encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]
        for mask in masks.cpu()
    ]


def torchvision_model(
    cfg: CfgNode, state: Mapping[str, Tensor], image_size: tuple[int, int]
) -> MaskRCNN:
    """The model of ``maskrcnn_resnet50_fpn(weights="COCO_V1")``, in evaluation mode.

    Its batch norm is frozen. The config sets the strides of the bottlenecks, the mean and deviation
    of pixels, and the numbers and thresholds of proposals and detections. As in torchvision,
    RoIAlign does not shift by half a pixel and takes 2 x 2 samples, and anchors are rounded.

    Args:
        cfg: detectron2's config of the model.
        state: the weights of detectron2's model.
        image_size: (height, width) to which torchvision's transform resizes images.

    Raises:
        UserError: the config's model is not R50-FPN with masks.
    """
    roi, rpn = cfg.MODEL.ROI_HEADS, cfg.MODEL.RPN
    model = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None),
        num_classes=roi.NUM_CLASSES + 1,
        min_size=min(image_size),
        max_size=max(image_size),
        image_mean=[mean / 255 for mean in reversed(cfg.MODEL.PIXEL_MEAN)],
        image_std=[std / 255 for std in reversed(cfg.MODEL.PIXEL_STD)],
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        box_score_thresh=roi.SCORE_THRESH_TEST,
        box_nms_thresh=roi.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    if cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        for layer in ("layer2", "layer3", "layer4"):
            block = model.backbone.body[layer][0]
            block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    try:
        model.load_state_dict(torchvision_weights(state))
    except (KeyError, RuntimeError) as error:
        raise UserError(
            "--against torchvision needs a config of R50-FPN with masks "
            f"({reason(error, 120)}); leave torchvision out"
        ) from error
    return model.eval()


def torchvision_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """detectron2's R50-FPN weights with torchvision's names and orders, the inverse of ``convert``.

    The boxes and masks of the background, which detectron2 does not have, are zero.
    """
    result = {}
    for name, ours in parameter_names(masks=True):
        value = state[ours]
        if name == "backbone.body.conv1.weight":
            value = value.flip(1)
        elif ours.startswith("roi_heads.box_predictor.cls_score."):
            value = value.roll(1, 0)
        elif ours.startswith("roi_heads.box_predictor.bbox_pred."):
            value = torch.cat([torch.zeros_like(value[:4]), value])
        elif ours.startswith("roi_heads.mask_head.predictor."):
            value = torch.cat([torch.zeros_like(value[:1]), value])
        result[name] = value
    return result
