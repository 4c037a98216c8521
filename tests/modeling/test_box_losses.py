"""Class weights and the focal loss of box heads, computed by hand; in all ROI heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import UserError
from mask_rcnn_plus.modeling.box_losses import weighted_loss
from tests.modeling.models import batch, build

# Two classes and the background. The true class has the probability 1/2, 1/4 and 1/4.
SCORES = torch.log(torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]) / 4)
LABELS = torch.tensor([0, 1, 2])
ONES = torch.ones(3)


def test_weights_of_one_give_the_cross_entropy() -> None:
    ours = weighted_loss(SCORES, LABELS, ONES, gamma=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(SCORES, LABELS))


def test_weight_multiplies_its_class_and_the_mean_is_over_all_rois() -> None:
    weights = torch.tensor([1.0, 3.0, 0.0])
    expected = (math.log(2) + 3 * math.log(4)) / 3
    assert float(weighted_loss(SCORES, LABELS, weights, gamma=0.0)) == pytest.approx(expected)


def test_focal_loss_reduces_easy_rois() -> None:
    expected = (0.5**2 * math.log(2) + 2 * 0.75**2 * math.log(4)) / 3
    assert float(weighted_loss(SCORES, LABELS, ONES, gamma=2.0)) == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_and_absent_rois_have_finite_gradients(gamma: float) -> None:
    for scores in (torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]]), torch.zeros(0, 3)):
        scores.requires_grad_()
        labels = torch.zeros(len(scores), dtype=torch.long)
        loss = weighted_loss(scores, labels, ONES, gamma=gamma)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("architecture", ["fpn", "c4", "cascade"])
def test_all_roi_heads_use_it_with_the_same_state(architecture: str) -> None:
    torch.manual_seed(0)
    plain = build(architecture)
    classes = plain.roi_heads.num_classes
    keys = {"ROI_BOX_HEAD__CLASS_WEIGHTS": [2.0] * (classes + 1)}
    double = build(architecture, **keys)
    focal = build(architecture, ROI_BOX_HEAD__LOSS_CLS="focal")
    losses = []
    for model in (plain, double, focal):
        model.load_state_dict(plain.state_dict())  # the names are the same
        torch.manual_seed(1)
        with EventStorage():
            losses.append({k: float(v.detach()) for k, v in model(batch()).items()})
    of_classes = {name for name in losses[0] if "loss_cls" in name}
    assert len(of_classes) == (3 if architecture == "cascade" else 1)
    for name, value in losses[0].items():
        if name in of_classes:
            assert losses[1][name] == pytest.approx(2 * value)
            # Each RoI contributes less than to the cross-entropy.
            assert 0 < losses[2][name] < value
        else:
            assert losses[1][name] == losses[2][name] == value


@pytest.mark.parametrize("architecture", ["fpn", "c4", "cascade"])
def test_loss_of_a_config_by_hand(architecture: str) -> None:
    model = build(
        architecture,
        ROI_BOX_HEAD__LOSS_CLS="focal",
        ROI_BOX_HEAD__FOCAL_GAMMA=3.0,
        ROI_BOX_HEAD__CLASS_WEIGHTS=[1.0, 5.0, 1.0],
    )
    predictors = model.roi_heads.box_predictor
    boxes = Boxes(torch.tensor([[0.0, 0, 9, 9]] * 3))
    labels = torch.tensor([0, 1, 3])  # the last is background
    rois = Instances((9, 9), proposal_boxes=boxes, gt_boxes=boxes, gt_classes=labels)
    # The true class has the probability 1/4, 1/8 and 1/2.
    scores = torch.log(torch.tensor([[2.0, 1.0, 1.0, 4.0]] * 3) / 8)
    expected = (0.75**3 * math.log(4) + 5 * 0.875**3 * math.log(8) + 0.5**3 * math.log(2)) / 3
    for predictor in predictors if architecture == "cascade" else [predictors]:
        deltas = torch.zeros(3, predictor.bbox_pred.out_features)
        with EventStorage():
            losses = predictor.losses((scores, deltas), [rois])
        assert float(losses["loss_cls"]) == pytest.approx(expected)


def test_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(UserError, match="CLASS_WEIGHTS has 1 values for"):
        build("fpn", ROI_BOX_HEAD__CLASS_WEIGHTS=[2.0])


@pytest.mark.parametrize(
    "weights", [[0.0] * 3, [0.0] * 4, [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
)
def test_fewer_than_two_weighted_classes_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="at least two classes") as error:
        build("fpn", ROI_BOX_HEAD__CLASS_WEIGHTS=weights)
    assert "\n" not in str(error.value) and str(weights) in str(error.value)


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0]])
def test_weights_of_classes_may_be_zero(weights: list[float]) -> None:
    torch.manual_seed(0)
    with EventStorage():
        build("fpn", ROI_BOX_HEAD__CLASS_WEIGHTS=weights)(batch())["loss_cls"].backward()
