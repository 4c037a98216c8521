"""torchvision's Mask R-CNN with the weights and the settings of a detectron2 config."""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert_torchvision import parameter_names

# Module of torchvision's model -> the stage that does the same in detectron2's.
STAGES = {
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


def build(cfg: CfgNode, state: Mapping[str, Tensor], image_size: tuple[int, int]) -> MaskRCNN:
    """A model as ``maskrcnn_resnet50_fpn(weights="COCO_V1")`` builds it, in evaluation mode.

    Its batch norm is frozen, as with those weights. The strides of the bottlenecks, the mean and
    deviation of pixels, and the numbers and thresholds of proposals and detections are the
    config's; RoIAlign is torchvision's (no half pixel, 2 x 2 samples), anchors are rounded.

    Args:
        cfg: of a model with the state's names.
        state: of detectron2's model.
        image_size: (height, width) to which its transform resizes images.

    Raises:
        UserError: the config is not of R50-FPN with masks.
    """
    roi, rpn = cfg.MODEL.ROI_HEADS, cfg.MODEL.RPN
    # The box head and mask head of torchvision's builder do not read the number of channels.
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
        model.load_state_dict(reverted(state))
    except (KeyError, RuntimeError) as error:
        raise UserError(
            "--against torchvision takes the weights of R50-FPN with masks, and this config is of "
            f"another model ({' '.join(str(error).split())[:120]}); leave torchvision out"
        ) from error
    return model.eval()


def reverted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with torchvision's names and orders: the way back of ``convert``.

    The background's boxes and masks, which detectron2 does not have, are zero.

    Args:
        state: of detectron2's R50-FPN.
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


def stage_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each stage."""
    stages: dict[str, list[nn.Module]] = {}
    for path, stage in STAGES.items():
        stages.setdefault(stage, []).append(model.get_submodule(path))
    return stages
