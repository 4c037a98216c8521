"""SOLVER.ACCUMULATE_STEPS: the gradient of a batch is the mean of its parts' gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.engine.steps import Steps
from tests.modeling.models import KEYPOINTS, build

# Each image has another size, and 0 to 3 objects.
SIZES = [(64, 64), (48, 96), (80, 40), (64, 72)]


def different_images() -> list[dict[str, Any]]:
    """Images of different sizes with different numbers of objects, so that the parts differ."""
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
        proposals = Instances((height, width))
        proposals.proposal_boxes = Boxes(torch.cat([boxes + 1, boxes.new_tensor([[0, 0, 30, 30]])]))
        proposals.objectness_logits = torch.zeros(count + 1)
        samples.append({"image": image, "instances": objects, "proposals": proposals})
    return samples


def step(model: nn.Module, parts: int, **options: Any) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The gradient of one step, its losses, and the first random number after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Steps(model, [different_images()], optimizer, parts=parts, **options)
    torch.manual_seed(1)
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
    losses = {name: value for name, (value, _) in storage.latest().items() if "loss" in name}
    return gradient_of(model), losses, torch.rand(1)


def mean_of_parts(model: nn.Module, parts: int) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """The same, computed from separate passes over the parts."""
    torch.manual_seed(1)
    gradients, losses = [], []
    for part in range(parts):
        model.zero_grad(set_to_none=False)
        with EventStorage():
            part_losses = model(different_images()[part::parts])
        sum(part_losses.values()).backward()
        gradients.append(gradient_of(model))
        losses.append(part_losses)
    means = {name: sum(float(part[name].detach()) for part in losses) / parts for name in losses[0]}
    means["total_loss"] = sum(means.values())
    return torch.stack(gradients).mean(0), means, torch.rand(1)


def gradient_of(model: nn.Module) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def distance(gradient: torch.Tensor, other: torch.Tensor) -> float:
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
def test_a_step_equals_its_parts_computed_one_by_one(
    architecture: str, keys: dict[str, Any]
) -> None:
    whole, whole_losses, _ = step(build(architecture, **keys), 1)
    for parts in (2, 4):
        gradient, losses, drawn = step(build(architecture, **keys), parts)
        mean, mean_losses, drawn_in_turn = mean_of_parts(build(architecture, **keys), parts)
        assert distance(gradient, mean) < 5e-6
        assert losses == pytest.approx(mean_losses, rel=1e-5)
        assert drawn == drawn_in_turn
    # Each part samples separately and has its own means, so the gradient is not the whole batch's.
    assert distance(gradient, whole) > 1e-3
    assert losses != pytest.approx(whole_losses, rel=1e-5)


def test_one_part_equals_the_whole_batch() -> None:
    gradient, losses, drawn = step(build("fpn"), 1)
    mean, mean_losses, drawn_in_turn = mean_of_parts(build("fpn"), 1)
    assert distance(gradient, mean) < 5e-6
    assert losses == pytest.approx(mean_losses, rel=1e-5)
    assert drawn == drawn_in_turn


def test_parts_in_a_cascade_that_moves_boxes_far() -> None:
    def wild() -> nn.Module:
        model = build("cascade")
        with torch.no_grad():  # the first stage moves boxes 1.5 widths to the right
            model.roi_heads.box_predictor[0].bbox_pred.bias[0] = 15
        return model

    mean, mean_losses, _ = mean_of_parts(wild(), 2)
    gradient, losses, _ = step(wild(), 2)
    assert losses == pytest.approx(mean_losses, rel=1e-5)
    assert distance(gradient, mean) < 5e-6


def test_parts_with_few_visible_keypoints() -> None:
    def wild() -> nn.Module:
        model = build("keypoint", ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True)
        with torch.no_grad():  # boxes of half the width and height lose keypoints
            model.roi_heads.box_predictor.bbox_pred.bias.view(-1, 4)[:, 2:] = -3.5
        return model

    mean, mean_losses, _ = mean_of_parts(wild(), 2)
    gradient, losses, _ = step(wild(), 2)
    assert losses == pytest.approx(mean_losses, rel=1e-5)
    assert distance(gradient, mean) < 5e-6


def test_a_part_without_objects_counts_as_much_as_the_others() -> None:
    model = build("fpn")
    torch.manual_seed(1)
    with EventStorage():
        single = [float(model([image])["loss_mask"].detach()) for image in different_images()]
    assert single[0] == 0  # without objects
    _, losses, _ = step(build("fpn"), 4)
    assert losses["loss_mask"] == pytest.approx(sum(single[1:]) / 4, rel=1e-5)


def test_batch_norm_uses_the_statistics_of_each_part() -> None:
    def normed() -> nn.Module:
        model = build("fpn")
        model.backbone.fpn_output2.norm = nn.BatchNorm2d(8)
        return model.train()

    stepped, in_turn = normed(), normed()
    gradient, losses, _ = step(stepped, 2)
    mean, mean_losses, _ = mean_of_parts(in_turn, 2)
    assert distance(gradient, mean) < 5e-6
    assert losses == pytest.approx(mean_losses, rel=1e-5)
    norms = [model.backbone.fpn_output2.norm for model in (stepped, in_turn)]
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == 2
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)


def test_each_part_has_its_own_dropout() -> None:
    def dropping() -> nn.Module:
        model = build("fpn")
        model.backbone.bottom_up.res5.add_module("drop", nn.Dropout(0.5))
        return model.train()

    gradient, _, drawn = step(dropping(), 2)
    mean, _, drawn_in_turn = mean_of_parts(dropping(), 2)
    assert distance(gradient, mean) < 5e-6 and drawn == drawn_in_turn
    assert distance(gradient, step(build("fpn"), 2)[0]) > 1e-3


def test_a_step_does_not_change_module_attributes() -> None:
    model = build("cascade")
    own = {name: set(vars(module)) for name, module in model.named_modules()}
    step(model, 2)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == own


def test_bf16_parts_train() -> None:
    exact, _, _ = step(build("fpn"), 2)
    gradient, _, _ = step(build("fpn"), 2, amp="bf16")
    assert gradient.shape == exact.shape and distance(gradient, exact) < 0.5


def test_processes_exchange_gradients_once_per_step(tmp_path: Path) -> None:
    exchanges: list[int] = []

    def exchange(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(1)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = build("fpn")
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        wrapped.register_comm_hook(None, exchange)
        gradient, losses, _ = step(wrapped, 4)
        buckets = len(exchanges)
        step(wrapped, 1)
        assert len(exchanges) == 2 * buckets > 0
    finally:
        dist.destroy_process_group()
    mean, mean_losses, _ = mean_of_parts(build("fpn"), 4)
    assert distance(gradient, mean) < 5e-6
    assert losses == pytest.approx(mean_losses, rel=1e-5)


def test_configs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("SOLVER: {ACCUMULATE_STEPS: 2, ACCUMULATE_EXACT: true}")
    cfg = load_config(path)
    assert cfg.SOLVER.ACCUMULATE_STEPS == 2 and "ACCUMULATE_EXACT" not in cfg.SOLVER
    with pytest.raises(UserError, match=r"unknown key 'SOLVER\.ACCUMULATE_EXACT'"):
        load_config(path, ["SOLVER.ACCUMULATE_EXACT", "True"])
