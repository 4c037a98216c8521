"""MLPMaskHead and SoftmaxMaskHead: shapes, losses and predictions computed by hand."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from mask_rcnn_plus import UserError
from mask_rcnn_plus.modeling import MLPMaskHead, SoftmaxMaskHead
from tests.modeling.models import CLASSES, batch, build

HEADS = ("MLPMaskHead", "SoftmaxMaskHead")


def softmax_head(num_classes: int, *, conv: bool = False) -> SoftmaxMaskHead:
    """A head for (R, 4, 2, 2) features; num_classes includes the background."""
    torch.manual_seed(0)
    dims = [4, 4] if conv else [4]
    return SoftmaxMaskHead(ShapeSpec(channels=4), num_classes=num_classes, conv_dims=dims)


def constant_logits(head: torch.nn.Module, values: list[float]) -> None:
    """Makes the head predict the same logits at every pixel."""
    with torch.no_grad():
        head.predictor.weight.zero_()
        head.predictor.bias.copy_(torch.tensor(values))


def half_inside(classes: list[int]) -> Instances:
    """Positives of a 16 x 16 image whose object fills the left half of the RoI (0, 0, 16, 16)."""
    image = Instances((16, 16))
    mask = torch.zeros(len(classes), 16, 16, dtype=torch.bool)
    mask[:, :, :8] = True
    image.proposal_boxes = Boxes(torch.tensor([[0.0, 0.0, 16.0, 16.0]] * len(classes)))
    image.gt_classes = torch.tensor(classes)
    image.gt_masks = BitMasks(mask)
    return image


def test_softmax_loss_is_weighted() -> None:
    head, losses = softmax_head(4), []
    for head.loss_weight in (1.0, 2.5):
        with EventStorage():
            losses.append(head(torch.ones(1, 4, 2, 2), [half_inside([1])])["loss_mask"].item())
    assert losses[1] == pytest.approx(2.5 * losses[0])


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_softmax_loss_is_the_cross_entropy_of_class_inside_and_background_outside() -> None:
    head = softmax_head(4)
    constant_logits(head, [1.0, 2.0, -1.0, 0.5])
    p = softmax([1.0, 2.0, -1.0, 0.5])
    with EventStorage() as storage:
        losses = head(torch.rand(2, 4, 2, 2), [half_inside([1]), half_inside([0])])
    # Half of each RoI's pixels belong to its class, the other half to the background.
    by_hand = -(math.log(p[1]) + math.log(p[0]) + 2 * math.log(p[3])) / 4
    assert losses["loss_mask"].item() == pytest.approx(by_hand, rel=1e-5)
    # p[1] = 0.6 predicts the object everywhere in the first RoI, p[0] = 0.22 nowhere in the second.
    scalars = {name: value for name, (value, _) in storage.latest().items()}
    assert scalars["mask_rcnn/accuracy"] == 0.5
    assert scalars["mask_rcnn/false_positive"] == 0.5
    assert scalars["mask_rcnn/false_negative"] == 0.5


def test_softmax_loss_is_deterministic_on_a_gpu() -> None:
    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            names.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with EventStorage(), Called():
        softmax_head(4)(torch.rand(1, 4, 2, 2), [half_inside([1])])["loss_mask"].backward()
    losses = {name for name in names if "nll_loss" in name}
    # For maps, aten::nll_loss2d_forward and _backward add in any order.
    assert losses == {"aten::nll_loss_forward", "aten::nll_loss_backward"}


def test_softmax_loss_of_agnostic_masks_ignores_the_class() -> None:
    head = softmax_head(2)
    constant_logits(head, [0.3, -0.4])
    p = softmax([0.3, -0.4])
    with EventStorage():
        losses = head(torch.rand(2, 4, 2, 2), [half_inside([2, 0])])
    by_hand = -(math.log(p[0]) + math.log(p[1])) / 2
    assert losses["loss_mask"].item() == pytest.approx(by_hand, rel=1e-5)


def test_softmax_classes_compete() -> None:
    """Unlike with a sigmoid, the logit of another class changes the loss."""
    head, losses = softmax_head(4), []
    for other in (0.0, 3.0):
        constant_logits(head, [1.0, 2.0, other, 0.5])
        with EventStorage():
            losses.append(head(torch.rand(1, 4, 2, 2), [half_inside([1])])["loss_mask"].item())
    assert losses[1] > losses[0] + 0.5


@pytest.mark.parametrize(("logits", "classes"), [([1.0, 2.0, -1.0, 0.5], 3), ([0.3, -0.4], 1)])
def test_softmax_predicts_the_class_relative_to_its_strongest_rival(
    logits: list[float], classes: int
) -> None:
    head = softmax_head(len(logits)).eval()
    constant_logits(head, logits)
    first, second = Instances((16, 16)), Instances((16, 16))
    first.pred_classes = torch.tensor([1, 0])
    second.pred_classes = torch.tensor([2])
    predictions = head(torch.rand(3, 4, 2, 2), [first, second])
    p = softmax(logits)
    # In [1, 2, -1, 0.5], class 1 has the largest logit, and its strongest rival is class 0.
    if classes == 3:
        expected = [[p[1] / (p[1] + p[0]), p[0] / (p[0] + p[1])], [p[2] / (p[2] + p[1])]]
    else:
        expected = [[p[0], p[0]], [p[0]]]
    for image, values in zip(predictions, expected, strict=True):
        assert image.pred_masks.shape == (len(values), 1, 4, 4)
        for mask, value in zip(image.pred_masks, values, strict=True):
            torch.testing.assert_close(mask, torch.full((1, 4, 4), value))


def test_softmax_masks_are_where_the_class_is_most_probable() -> None:
    head = softmax_head(4).eval()
    constant_logits(head, [0.1, 0.2, 0.0, 0.1])  # no class reaches a probability of 0.5
    image = Instances((16, 16))
    image.pred_classes = torch.tensor([0, 1, 2])
    (predictions,) = head(torch.rand(3, 4, 2, 2), [image])
    assert [bool((mask > 0.5).all()) for mask in predictions.pred_masks] == [False, True, False]


def test_softmax_logs_images_every_vis_period() -> None:
    head = softmax_head(4)
    head.vis_period = 1
    with EventStorage() as storage:
        head(torch.rand(1, 4, 2, 2), [half_inside([1])])
        ((name, image, _),) = storage._vis_data
    assert image.shape == (3, 4, 8) and name.startswith("Left: mask prediction")


def test_softmax_state_has_one_more_channel_than_the_convolutional_head() -> None:
    ours = build("fpn", ROI_MASK_HEAD__NAME="SoftmaxMaskHead").state_dict()
    theirs = build("fpn").state_dict()
    assert list(ours) == list(theirs)
    different = {name for name in ours if ours[name].shape != theirs[name].shape}
    predictor = "roi_heads.mask_head.predictor"
    assert different == {f"{predictor}.weight", f"{predictor}.bias"}
    assert len(ours[f"{predictor}.bias"]) == CLASSES + 1


@pytest.mark.parametrize(("num_fc", "resolution"), [(0, 14), (2, 28), (3, 56)])
def test_mlp_is_fully_connected(num_fc: int, resolution: int) -> None:
    torch.manual_seed(0)
    head = MLPMaskHead(
        ShapeSpec(channels=2, height=3, width=3),
        num_classes=4,
        fc_dims=[6] * num_fc,
        output_resolution=resolution,
    )
    *hidden, last = [module for module in head.modules() if isinstance(module, torch.nn.Linear)]
    assert [layer.in_features for layer in (*hidden, last)] == [18, 6, 6, 6][: num_fc + 1]
    x = torch.rand(2, 2, 3, 3)
    out = head.layers(x)
    assert out.shape == (2, 4, resolution, resolution)
    # By hand: row-major features, ReLU between layers, row-major masks, classes first.
    y = x.flatten(1)
    for layer in hidden:
        y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    y = y @ last.weight.T + last.bias
    torch.testing.assert_close(out[1, 2, 5, 7], y[1, 2 * resolution**2 + 5 * resolution + 7])


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    ("architecture", "keys", "side"),
    [
        ("fpn", {"NAME": "MLPMaskHead"}, 28),
        ("fpn", {"NAME": "MLPMaskHead", "MLP__OUTPUT_RESOLUTION": 56, "MLP__NUM_FC": 3}, 56),
        ("fpn", {"NAME": "MLPMaskHead", "MLP__OUTPUT_RESOLUTION": 14}, 14),
        ("fpn", {"NAME": "SoftmaxMaskHead", "POOLER_RESOLUTION": 28}, 56),
        ("cascade", {"NAME": "SoftmaxMaskHead", "POOLER_RESOLUTION": 14}, 28),
        ("dc5", {"NAME": "SoftmaxMaskHead"}, 14),
        ("c4", {"NAME": "SoftmaxMaskHead"}, 14),
        ("fpn", {"NAME": "MaskRCNNConvUpsampleHead", "POOLER_RESOLUTION": 28}, 56),
        ("c4", {"NAME": "MaskRCNNConvUpsampleHead"}, 14),
    ],
)
def test_trains_and_predicts(architecture: str, keys: dict, side: int, agnostic: bool) -> None:
    keys = {f"ROI_MASK_HEAD__{key}": value for key, value in keys.items()}
    model = build(architecture, ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=agnostic, **keys)
    seen: list[tuple] = []
    model.roi_heads.mask_head.predictor.register_forward_hook(
        lambda _module, _inputs, out: seen.append(tuple(out.shape))
    )
    with EventStorage():
        losses = model(batch())
    assert 0 < losses["loss_mask"].item() < 5
    losses["loss_mask"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.roi_heads.mask_head.parameters())
    background = keys["ROI_MASK_HEAD__NAME"] == "SoftmaxMaskHead"
    channels = (1 if agnostic else CLASSES) + background
    assert math.prod(seen[0][1:]) == channels * side * side
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(batch()).tensor)
        boxes = Instances((64, 64))
        boxes.pred_boxes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0]]))
        boxes.pred_classes = torch.tensor([1])
        predictions = model.eval().roi_heads.forward_with_given_boxes(features, [boxes, boxes[:0]])
    assert [tuple(image.pred_masks.shape) for image in predictions] == [
        (1, 1, side, side),
        (0, 1, side, side),
    ]
    assert 0 < predictions[0].pred_masks.min() <= predictions[0].pred_masks.max() < 1


@pytest.mark.parametrize("name", HEADS)
def test_loss_without_positives_keeps_the_graph(name: str) -> None:
    model = build("fpn", ROI_MASK_HEAD__NAME=name)
    with EventStorage():
        losses = model(batch(empty=True))
    assert losses["loss_mask"] == 0
    losses["loss_mask"].backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_head.parameters())


def test_mlp_refuses_features_of_c4() -> None:
    model = build("c4", ROI_MASK_HEAD__NAME="MLPMaskHead")
    expected = "built for RoIs of 128 x 14 x 14, got 128 x 7 x 7: C4"
    with EventStorage(), pytest.raises(UserError, match=expected):
        model(batch())


@pytest.mark.parametrize(
    ("key", "value"), [("NUM_FC", -1), ("FC_DIM", 0), ("OUTPUT_RESOLUTION", 0)]
)
def test_mlp_refuses_sizes_out_of_range(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"ROI_MASK_HEAD.MLP.{key} must be at least .*got {value}"):
        build("fpn", ROI_MASK_HEAD__NAME="MLPMaskHead", **{f"ROI_MASK_HEAD__MLP__{key}": value})
