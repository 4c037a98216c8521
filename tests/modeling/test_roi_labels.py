"""Training has the bits and the figures of detectron2's heads, and waits for the device less."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from mask_rcnn_plus.modeling.box_losses import LeanOutputLayers
from tests.modeling.models import batch, build
from tests.modeling.waits import Waits

POOLERS = ("box_pooler", "mask_pooler", "keypoint_pooler", "pooler")


def trained(model: nn.Module) -> tuple[dict, dict, list, torch.Tensor, int]:
    """Losses, figures, gradients, the next draw and the waits of a step; an image has no object."""
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
    # Three images: 6 waits a classification for 1, 3 sizes for 1, 4 figures of masks for 1; the
    # one that is left of each classification and of the masks is a copy that Waits does not see.
    [
        ("fpn", 6 + 2 + 4),
        ("dc5", 6 + 2 + 4),
        ("c4", 6 + 2 + 4),
        ("cascade", 18 + 6 + 4),
        ("keypoint", 8),
    ],
)
def test_a_step_has_detectron2s_bits_and_fewer_waits(architecture: str, saved: int) -> None:
    stock, ours = build(architecture, ours=False), build(architecture)
    ours.load_state_dict(stock.state_dict())
    for name in POOLERS:  # which round otherwise
        if hasattr(stock.roi_heads, name):
            setattr(ours.roi_heads, name, getattr(stock.roi_heads, name))
    losses, figures, gradients, drawn, waits = trained(stock)
    our_losses, our_figures, our_gradients, our_drawn, our_waits = trained(ours)
    assert our_losses == losses and our_figures == figures and our_drawn == drawn
    assert len(our_gradients) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(our_gradients, gradients, strict=True))
    assert waits - our_waits == saved


def test_a_seed_gives_detectron2s_first_weights_and_draws() -> None:
    results = []
    for ours in (False, True):
        model = build("cascade", ours=ours)
        results.append((model.state_dict(), torch.rand(1)))
    (theirs, drawn), (weights, our_drawn) = results
    assert isinstance(model.roi_heads.box_predictor[2], LeanOutputLayers)
    assert list(weights) == list(theirs) and our_drawn == drawn
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
