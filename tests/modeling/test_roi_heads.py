"""FusedROIHeads beside detectron2's StandardROIHeads: same parameters, losses and predictions."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import get_cfg
from mask_rcnn_plus.modeling import FusedROIPooler
from tests.conftest import TINY


def build(name: str, **keys: object) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(type(cfg)(copy.deepcopy(TINY)))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.NAME = name
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    torch.manual_seed(0)
    return build_model(cfg)


def batch() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(2):
        objects = Instances((64, 64))
        objects.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]]))
        objects.gt_classes = torch.tensor([0, 2])
        masks = torch.zeros(2, 64, 64, dtype=torch.bool)
        masks[0, 6:40, 4:30] = masks[1, 20:50, 20:60] = True
        objects.gt_masks = BitMasks(masks)
        image = torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": objects, "height": 64, "width": 64})
    return inputs


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign", "ROIPool"])
def test_losses_and_predictions_are_those_of_the_standard_heads(pooler_type: str) -> None:
    keys = {
        "MODEL__ROI_BOX_HEAD__POOLER_TYPE": pooler_type,
        "MODEL__ROI_MASK_HEAD__POOLER_TYPE": pooler_type,
    }
    standard, fused = build("StandardROIHeads", **keys), build("FusedROIHeads", **keys)
    assert isinstance(fused.roi_heads.box_pooler, FusedROIPooler)
    assert isinstance(fused.roi_heads.mask_pooler, FusedROIPooler)
    fused.load_state_dict(standard.state_dict(), strict=True)

    losses = []
    for model in (standard, fused):
        torch.manual_seed(1)  # the sampling of anchors and proposals
        with EventStorage():
            losses.append(model(batch()))
    assert losses[0].keys() == losses[1].keys() >= {"loss_mask", "loss_box_reg"}
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-6)

    gradients = []
    for model, loss in zip((standard, fused), losses, strict=True):
        sum(loss.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-2, atol=1e-4, msg=name)

    outputs = []
    for model in (standard.eval(), fused.eval()):
        with torch.no_grad():
            outputs.append([one["instances"] for one in model(batch())])
    for expected, found in zip(*outputs, strict=True):
        assert len(expected) == len(found) > 0
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )
        assert (found.pred_masks == expected.pred_masks).float().mean() > 0.999


def test_a_batch_without_objects_keeps_the_graph() -> None:
    model = build("FusedROIHeads")
    inputs = batch()
    for one in inputs:
        one["instances"] = one["instances"][:0]
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.roi_heads.mask_head.predictor.weight.grad is not None
