"""Shrinks any config of this project, so that a training step takes a fraction of a second."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

SIDE = 64  # width and height of the images, in pixels


def shrink(cfg: CfgNode) -> CfgNode:
    """Reduces channels, proposals and classes of a config in place.

    Kinds of layers, depths, strides, poolers and losses stay. detectron2's group norm needs at
    least 32 channels, its ResNet-18 and 34 at least 64.
    """
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.WEIGHTS = ""
    model.TIMM.PRETRAINED = False
    if model.RESNETS.DEPTH > 34:
        model.RESNETS.RES2_OUT_CHANNELS = 32
        model.RESNETS.STEM_OUT_CHANNELS = 32
        model.RESNETS.WIDTH_PER_GROUP = 32 // model.RESNETS.NUM_GROUPS
    model.FPN.OUT_CHANNELS = 32
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 60
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 20
    model.RPN.BATCH_SIZE_PER_IMAGE = 32
    model.ROI_HEADS.NUM_CLASSES = min(model.ROI_HEADS.NUM_CLASSES % 1000, 3)  # -1: from the data
    if model.ANCHOR_GENERATOR.SIZES == [[-1]]:  # from the data
        model.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    model.ROI_BOX_HEAD.FC_DIM = 16
    model.ROI_BOX_HEAD.CONV_DIM = 32
    model.ROI_MASK_HEAD.CONV_DIM = 32
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = [32] * len(model.ROI_KEYPOINT_HEAD.CONV_DIMS)
    if "MLP" in model.ROI_MASK_HEAD:
        model.ROI_MASK_HEAD.MLP.FC_DIM = 16
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return cfg


def calm(model: torch.nn.Module) -> torch.nn.Module:
    """Scales down frozen norms in place: a ResNet with random weights would explode otherwise."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d) and name.endswith(("conv2.norm", "conv3.norm")):
            module.weight.mul_(0.3)
    return model


def batch(cfg: CfgNode) -> list[dict[str, Any]]:
    """Two images with two objects each, with everything that the config trains on."""
    generator = torch.Generator().manual_seed(0)
    corners = [[4.0, 6.0, 40.0, 50.0], [20.0, 20.0, 60.0, 60.0]]
    inputs = []
    for _ in range(2):
        objects = Instances((SIDE, SIDE))
        objects.gt_boxes = Boxes(torch.tensor(corners))
        objects.gt_classes = torch.tensor([0, cfg.MODEL.ROI_HEADS.NUM_CLASSES - 1])
        if cfg.INPUT.MASK_FORMAT == "polygon":
            objects.gt_masks = PolygonMasks(
                [[torch.tensor([x0, y0, x1, y0, x1, y1]).numpy()] for x0, y0, x1, y1 in corners]
            )
        else:
            masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
            masks[0, 6:50, 4:40] = masks[1, 20:60, 20:60] = True
            objects.gt_masks = BitMasks(masks)
        count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        points = 22 + 16 * torch.rand(2, count, 2, generator=generator)
        objects.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, count, 1), 2.0)], 2))
        proposals = Instances((SIDE, SIDE))
        proposals.proposal_boxes = Boxes(torch.tensor([*corners, [0.0, 0.0, 20.0, 20.0]]))
        proposals.objectness_logits = torch.zeros(3)
        image = torch.randint(0, 255, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        inputs.append(
            {
                "image": image,
                "instances": objects,
                "proposals": proposals,
                "height": SIDE,
                "width": SIDE,
            }
        )
    return inputs
