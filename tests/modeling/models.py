"""Mask R-CNNs of every architecture, small enough to run in a fraction of a second."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from mask_rcnn_plus import get_cfg

CLASSES = 3
KEYPOINTS = 4

_COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.MASK_ON": True,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    # The structure and names of a ResNet-50, with a sixteenth of its width.
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.PIXEL_STD": [58.0, 58.0, 58.0],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": KEYPOINTS,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.MLP.FC_DIM": 16,
}
_FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
}
# As detectron2's Base-RCNN-C4 and so on, apart from sizes.
ARCHITECTURES = {
    "fpn": _FPN,
    "c4": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 0,
    },
    "dc5": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res5"],
        "MODEL.RESNETS.RES5_DILATION": 2,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        "MODEL.RPN.IN_FEATURES": ["res5"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    },
    "cascade": {
        **_FPN,
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    },
    "keypoint": {**_FPN, "MODEL.MASK_ON": False, "MODEL.KEYPOINT_ON": True},
}
OURS = {
    "StandardROIHeads": "FusedROIHeads",
    "Res5ROIHeads": "FusedRes5ROIHeads",
    "CascadeROIHeads": "FusedCascadeROIHeads",
}


def config(architecture: str, *, ours: bool = True, **keys: object) -> CfgNode:
    """The config of a tiny model, with detectron2's ROI heads or this project's.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        ours: this project's ROI heads.
        keys: further keys below ``MODEL``, "__" for ".": ``ROI_MASK_HEAD__NUM_CONV=0``.
    """
    cfg = get_cfg()
    more = {f"MODEL.{key.replace('__', '.')}": value for key, value in keys.items()}
    for key, value in {**_COMMON, **ARCHITECTURES[architecture], **more}.items():
        cfg.merge_from_list([key, value])
    if ours:
        cfg.MODEL.ROI_HEADS.NAME = OURS[cfg.MODEL.ROI_HEADS.NAME]
    cfg.freeze()
    return cfg


def build(architecture: str, *, ours: bool = True, **keys: object) -> torch.nn.Module:
    """A tiny model in training mode; the arguments are :func:`config`'s."""
    torch.manual_seed(0)
    model = build_model(config(architecture, ours=ours, **keys))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            # With weights of 1, the maps of a random residual network grow a thousandfold.
            if name.endswith(("conv3.norm.weight", "conv2.norm.weight")):
                buffer.fill_(0.5)
    return model


def batch(*, empty: bool = False) -> list[dict]:
    """Two images of 64 x 64 with two objects each; masks fill the boxes and contain keypoints."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 6:40, 4:30] = masks[1, 20:50, 20:60] = True
    points = torch.tensor([[10.0, 12.0, 2.0], [12.5, 30.0, 2.0], [22.0, 22.0, 1.0], [25, 39, 2]])
    inputs = []
    for _ in range(2):
        objects = Instances((64, 64))
        objects.gt_boxes = Boxes(boxes.clone())
        objects.gt_classes = torch.tensor([0, 2])
        objects.gt_masks = BitMasks(masks.clone())
        objects.gt_keypoints = Keypoints(torch.stack([points, points]))
        image = torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8)
        objects = objects[:0] if empty else objects
        inputs.append({"image": image, "instances": objects, "height": 64, "width": 64})
    return inputs
