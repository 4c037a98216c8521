"""The mask loss has detectron2's value and metrics, and waits for the device once."""

from typing import Any

import pytest
import torch
from detectron2.modeling.roi_heads import mask_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from mask_rcnn_plus.modeling.mask_heads import mask_loss
from tests.modeling.models import batch, build
from tests.modeling.waits import Waits


def positives() -> list[Instances]:
    """Two images with objects, one without."""
    images = []
    for sample in [*batch(), *batch(empty=True)[:1]]:
        objects = sample["instances"]
        objects.proposal_boxes = Boxes(objects.gt_boxes.tensor + 2.5)
        images.append(objects)
    return images


@pytest.mark.parametrize("classes", [3, 1])
def test_value_gradient_and_metrics_equal_detectron2s(classes: int) -> None:
    results = []
    for loss_function in (mask_head.mask_rcnn_loss, mask_loss):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((4, classes, 14, 14), generator=generator).requires_grad_()
        with EventStorage() as storage:
            loss = loss_function(logits, positives(), vis_period=1)
        loss.backward()
        pictures = [(name, picture) for name, picture, _ in storage._vis_data]
        results.append((loss.detach(), logits.grad, storage.latest(), pictures))
    theirs, ours = results
    assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])
    assert ours[2] == theirs[2] and len(ours[2]) == 3
    for (name, picture), (other_name, other) in zip(ours[3], theirs[3], strict=True):
        assert name == other_name
        assert torch.equal(torch.as_tensor(picture), torch.as_tensor(other))


def test_loss_without_objects_keeps_the_graph() -> None:
    logits = torch.randn(0, 3, 14, 14).requires_grad_()
    loss = mask_loss(logits, [objects[:0] for objects in positives()])
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_loss_waits_for_the_device_once() -> None:
    def waits(loss_function: Any) -> int:
        logits: Tensor = torch.randn(4, 3, 14, 14)
        instances = positives()
        with EventStorage(), Waits() as counted:
            loss_function(logits, instances)
        return counted.count

    # Cropping BitMasks does not wait; detectron2's metrics wait one by one.
    assert waits(mask_head.mask_rcnn_loss) >= waits(mask_loss) + 3


@pytest.mark.parametrize("architecture", ["fpn", "cascade", "c4"])
def test_our_roi_heads_use_it_with_the_same_losses(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for ours in (False, True):
        model = build(architecture, ours=ours)
        if ours:
            monkeypatch.setattr(mask_head, "mask_rcnn_loss", None)
        torch.manual_seed(0)
        with EventStorage():
            losses.append({name: value.item() for name, value in model(batch()).items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("architecture", ["fpn", "cascade", "c4"])
def test_mask_head_with_hooks_or_its_own_forward_is_called(architecture: str) -> None:
    head = (model := build(architecture)).roi_heads.mask_head
    called = []
    handle = head.register_forward_hook(lambda *_: called.append("hook"))

    def step() -> None:
        with EventStorage():
            model(batch())

    step()
    handle.remove()
    forward = head.forward
    head.forward = lambda *arguments: called.append("own") or forward(*arguments)
    step()
    assert called == ["hook", "own"]
