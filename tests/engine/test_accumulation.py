"""A batch in parts has the gradient of the batch in one piece."""

import logging
from typing import Any

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plus.engine.accumulation import make_plan, obstacle
from mask_rcnn_plus.engine.steps import Steps
from tests.modeling.models import KEYPOINTS, build

# Every image its own size, and 0 to 3 objects.
SIZES = [(64, 64), (48, 96), (80, 40), (64, 72)]


def unlike_images() -> list[dict[str, Any]]:
    """Images of several sizes with several numbers of objects, so that their parts differ."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    samples = []
    for count, (height, width) in enumerate(SIZES):
        corner = rand(count, 2) * 20
        boxes = torch.cat([corner, corner + 12 + rand(count, 2) * 15], dim=1)
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(boxes)
        objects.gt_classes = torch.arange(count)
        objects.gt_masks = BitMasks(torch.zeros(count, height, width, dtype=torch.bool))
        points = torch.zeros(count, KEYPOINTS, 3)
        points[:, :, :2] = boxes[:, None, :2] + rand(count, KEYPOINTS, 2) * 12
        for number, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
            objects.gt_masks.tensor[number, y0:y1, x0:x1] = True
            points[number, : number + 2, 2] = 2
        objects.gt_keypoints = Keypoints(points)
        image = torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8)
        given = Instances((height, width))
        given.proposal_boxes = Boxes(torch.cat([boxes + 1, boxes.new_tensor([[0, 0, 30, 30]])]))
        given.objectness_logits = torch.zeros(count + 1)
        samples.append({"image": image, "instances": objects, "proposals": given})
    return samples


def step(model: nn.Module, parts: int, **options: Any) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The gradient of one step, its losses, and the first number that is drawn after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Steps(model, [unlike_images()], optimizer, parts=parts, **options)
    torch.manual_seed(1)
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
    losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients), losses, torch.rand(1)


def far(gradient: torch.Tensor, other: torch.Tensor) -> float:
    return float((gradient - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("fpn", {}),
        ("fpn", {"ROI_MASK_HEAD__NAME": "SoftmaxMaskHead"}),
        ("fpn", {"PROPOSAL_GENERATOR__NAME": "PrecomputedProposals"}),
        ("c4", {}),
        ("dc5", {}),
        ("cascade", {}),
        ("keypoint", {}),
        ("keypoint", {"ROI_KEYPOINT_HEAD__NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": False}),
        ("fpn", {"ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES": True}),
    ],
)
def test_parts_have_the_gradient_losses_and_draws_of_the_batch(
    architecture: str, keys: dict[str, Any]
) -> None:
    whole, losses, drawn = step(build(architecture, **keys), 1)
    for parts in (2, 4):
        gradient, in_parts, drawn_in_parts = step(build(architecture, **keys), parts)
        assert far(gradient, whole) < 5e-6
        assert in_parts == pytest.approx(losses, rel=1e-5)
        assert drawn_in_parts == drawn
    # Without the plan they differ, so that the test sees what it looks for.
    alone, _, _ = step(build(architecture, **keys), 4, exact=False)
    assert far(alone, whole) > 1e-3


def test_the_rois_that_leave_a_cascade_are_counted() -> None:
    def wild() -> nn.Module:
        model = build("cascade")
        with torch.no_grad():  # the first stage moves boxes 1.5 widths to the right
            model.roi_heads.box_predictor[0].bbox_pred.bias[0] = 15
        return model

    samples = unlike_images()
    with EventStorage():
        counts = make_plan(wild(), samples, [range(0, 4, 2), range(1, 4, 2)]).counts
    assert 0 < sum(counts["loss_cls_stage1"]) < sum(counts["loss_cls_stage0"])
    whole, losses, _ = step(wild(), 1)
    gradient, in_parts, _ = step(wild(), 2)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    assert far(gradient, whole) < 5e-6


def test_keypoints_are_counted_in_the_boxes_that_train_them() -> None:
    def wild() -> nn.Module:
        model = build("keypoint", ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True)
        with torch.no_grad():  # boxes of half the width and height lose keypoints
            model.roi_heads.box_predictor.bbox_pred.bias.view(-1, 4)[:, 2:] = -3.5
        return model

    whole, losses, _ = step(wild(), 1)
    gradient, in_parts, _ = step(wild(), 2)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    assert far(gradient, whole) < 5e-6


def test_a_plan_has_no_mask_for_each_roi() -> None:
    samples = unlike_images()
    with EventStorage():
        plan = make_plan(build("fpn"), samples, [range(4)])
    # Each would be a map as large as the image, for every RoI of the batch.
    largest = max(
        (getattr(value, "tensor", value).numel() / len(one), name)
        for one in plan.proposals
        for name, value in one.get_fields().items()
    )
    assert largest[0] <= KEYPOINTS * 3, largest


def test_weights_are_shares_of_what_a_loss_is_a_mean_over() -> None:
    model = build("fpn")
    with EventStorage():
        plan = make_plan(model, unlike_images(), [range(2), range(2, 4)])
    rois = [len(one) for one in plan.proposals]
    assert plan.side == (96, 96)  # 80 and 96, of which 32 are to divide both
    assert plan.weight("loss_cls", [1, 3]) == (rois[1] + rois[3]) / sum(rois)
    assert plan.weight("loss_mask", [0]) == 0  # has no object
    assert plan.weight("loss_rpn_cls", [0]) == plan.weight("loss_of_another_head", [3]) == 0.25


def test_a_plan_leaves_the_model_as_it_was() -> None:
    model = build("cascade")
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    step(model, 2)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == own


def test_bf16_parts_train() -> None:
    exact, _, _ = step(build("fpn"), 2)
    gradient, _, _ = step(build("fpn"), 2, amp="bf16")
    # The weights that the pass without gradients has cast are not those of the next.
    assert gradient.shape == exact.shape and far(gradient, exact) < 0.5


def test_what_does_not_allow_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("fpn")
    model.backbone.fpn_output2.norm = nn.BatchNorm2d(8)
    assert obstacle(model) == "batch norm takes the statistics of one part"
    assert obstacle(model.eval()) == ""
    model = build("fpn")
    model.backbone.bottom_up.res5.add_module("drop", nn.Dropout(0.1))
    assert obstacle(model) == "backbone.bottom_up.res5.drop drops at random what another pass keeps"
    model.backbone.bottom_up.res5.drop.p = 0.0
    assert obstacle(model) == ""
    model.backbone.fpn_output2.norm = nn.BatchNorm2d(8)
    assert obstacle(nn.Linear(1, 1)) == "Linear is not detectron2's GeneralizedRCNN"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Steps(model.train(), [unlike_images()] * 2, optimizer, parts=2)
    with EventStorage() as storage, caplog.at_level(logging.WARNING):
        for trainer.iter in range(2):
            trainer.run_step()
    assert sum("batch norm" in record.message for record in caplog.records) == 1
    assert storage.latest()["total_loss"][0] > 0
