"""Training is bitwise equal to detectron2's heads, and waits for the device less often."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plus.modeling.box_losses import LeanOutputLayers
from tests.modeling.models import batch, build
from tests.modeling.waits import Waits

POOLERS = ("box_pooler", "mask_pooler", "keypoint_pooler", "pooler")


def trained(model: nn.Module) -> tuple[dict, dict, list, torch.Tensor, int]:
    """Losses, metrics, gradients, next random number and waits of a step; one image is empty."""
    samples = [*batch(), *batch(empty=True)[:1]]
    torch.manual_seed(3)
    with EventStorage() as storage, Waits() as waits:
        losses = model(samples)
    sum(losses.values()).backward()
    return (
        {name: loss.item() for name, loss in losses.items()},
        {name: value for name, (value, _) in storage.latest().items()},
        [p.grad for p in model.parameters() if p.grad is not None],
        torch.rand(1),
        waits.count,
    )


@pytest.mark.parametrize(
    ("architecture", "saved"),
    # For three images, one wait replaces 6 per classification, 3 for sizes and 4 for metrics of
    # masks. For classifications and masks, the remaining one is a copy, which Waits does not count.
    [
        ("fpn", 6 + 2 + 4),
        ("dc5", 6 + 2 + 4),
        ("c4", 6 + 2 + 4),
        ("cascade", 18 + 6 + 4),
        ("keypoint", 8),
    ],
)
def test_step_equals_detectron2s_with_fewer_waits(architecture: str, saved: int) -> None:
    stock, ours = build(architecture, ours=False), build(architecture)
    ours.load_state_dict(stock.state_dict())
    for name in POOLERS:  # ours rounds differently
        if hasattr(stock.roi_heads, name):
            setattr(ours.roi_heads, name, getattr(stock.roi_heads, name))
    losses, metrics, gradients, drawn, waits = trained(stock)
    our_losses, our_metrics, our_gradients, our_drawn, our_waits = trained(ours)
    assert our_losses == losses and our_metrics == metrics and our_drawn == drawn
    assert len(our_gradients) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(our_gradients, gradients, strict=True))
    assert waits - our_waits == saved


def test_seed_gives_detectron2s_initial_weights_and_random_numbers() -> None:
    results = []
    for ours in (False, True):
        model = build("cascade", ours=ours)
        results.append((model.state_dict(), torch.rand(1)))
    (theirs, drawn), (weights, our_drawn) = results
    assert isinstance(model.roi_heads.box_predictor[2], LeanOutputLayers)
    assert list(weights) == list(theirs) and our_drawn == drawn
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
