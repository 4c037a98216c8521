"""The paper's steps, computed by hand, in models that are built from a config.

Mask R-CNN, sections 3 and 3.1, and Faster R-CNN, section 3.1, for the RPN. RoIPool's and RoIAlign's
examples are in tests/ops.
"""

import math

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from tests.modeling.models import CLASSES, KEYPOINTS, build

SIZE = (400, 400)


def box(*corners: float) -> Boxes:
    return Boxes(torch.tensor([corners], dtype=torch.float32).view(-1, 4))


def objects(boxes: Boxes, classes: list[int]) -> Instances:
    """Ground truth whose masks fill the boxes."""
    instances = Instances(SIZE)
    instances.gt_boxes = boxes
    instances.gt_classes = torch.tensor(classes)
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tensor.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    return instances


def proposals(boxes: Boxes) -> Instances:
    instances = Instances(SIZE)
    instances.proposal_boxes = boxes
    instances.objectness_logits = torch.zeros(len(boxes))
    return instances


def set_logits(head: nn.Module, logits: torch.Tensor) -> None:
    """Makes a head predict these logits, whatever the features."""
    head.layers = lambda _features: logits


# The RPN


def test_rpn_is_a_3x3_convolution_then_two_1x1() -> None:
    head = build("fpn").proposal_generator.rpn_head
    layers = (head.conv, head.objectness_logits, head.anchor_deltas)
    assert [layer.kernel_size for layer in layers] == [(3, 3), (1, 1), (1, 1)]
    # Objectness and four deltas for 3 anchors per cell.
    assert [layer.out_channels for layer in layers[1:]] == [3, 12]


def test_anchors_are_scales_times_ratios() -> None:
    one_map = build("c4", ANCHOR_GENERATOR__SIZES=[[128, 256, 512]]).proposal_generator
    (cell,) = one_map.anchor_generator.cell_anchors
    width, height = (cell[:, 2:] - cell[:, :2]).T
    assert len(cell) == 9
    assert sorted((width * height).sqrt().round().tolist()) == [128] * 3 + [256] * 3 + [512] * 3
    ratios = (height / width).tolist()
    assert sorted(ratios) == pytest.approx([0.5] * 3 + [1] * 3 + [2] * 3)
    pyramid = build("fpn").proposal_generator.anchor_generator.cell_anchors
    assert [len(cell) for cell in pyramid] == [3] * 5


def test_anchors_are_positive_by_iou_or_as_an_objects_best() -> None:
    """Positive: IoU at least 0.7, or an object's best; negative: all IoUs below 0.3."""
    rpn = build("fpn").proposal_generator
    truth = objects(Boxes(torch.tensor([[0.0, 0, 100, 100], [200, 200, 300, 300]])), [0, 1])
    anchors = [
        ([0.0, 0, 100, 100], 1),  # IoU 1
        ([0, 0, 100, 71], 1),  # 0.71
        ([0, 0, 100, 69], -1),  # 0.69
        ([0, 0, 100, 31], -1),  # 0.31
        ([0, 0, 100, 29], 0),  # 0.29
        ([200, 200, 300, 245], 1),  # 0.45, but the best of the second object
        ([200, 200, 300, 240], -1),  # 0.40
        ([200, 200, 300, 220], 0),  # 0.20
        ([320, 0, 350, 30], 0),  # nothing
    ]
    boxes = [Boxes(torch.tensor([corners for corners, _ in anchors]))]
    (labels,), (targets,) = rpn.label_and_sample_anchors(boxes, [truth])
    assert labels.tolist() == [label for _, label in anchors]
    assert targets[1].tolist() == [0, 0, 100, 100]
    assert targets[5].tolist() == [200, 200, 300, 300]


@pytest.mark.parametrize(("positives", "expected"), [(300, (128, 128)), (10, (10, 246))])
def test_rpn_samples_256_anchors_half_of_them_positive(
    positives: int, expected: tuple[int, int]
) -> None:
    """Negatives take the place of missing positives."""
    rpn = build("fpn").proposal_generator
    anchors = torch.tensor([[0.0, 0, 100, 100]] * positives + [[200.0, 200, 300, 300]] * 500)
    truth = objects(box(0, 0, 100, 100), [0])
    (labels,), _ = rpn.label_and_sample_anchors([Boxes(anchors)], [truth])
    assert ((labels == 1).sum().item(), (labels == 0).sum().item()) == expected


# Sampling RoIs


@pytest.mark.parametrize("architecture", ["fpn", "c4", "cascade"])
def test_rois_are_positive_from_an_iou_of_a_half(architecture: str) -> None:
    heads = build(architecture).roi_heads
    candidates = proposals(
        Boxes(torch.tensor([[0.0, 0, 100, 51], [0, 0, 100, 49], [300, 0, 350, 50]]))
    )
    with EventStorage():
        (sampled,) = heads.label_and_sample_proposals(
            [candidates], [objects(box(0, 0, 100, 100), [1])]
        )
    lower_edges = sampled.proposal_boxes.tensor[:, 3].int().tolist()
    classes = dict(zip(lower_edges, sampled.gt_classes.tolist(), strict=True))
    # The ground truth (100) is added as a proposal. Background is class K.
    assert classes == {51: 1, 49: CLASSES, 50: CLASSES, 100: 1}


@pytest.mark.parametrize("architecture", ["fpn", "c4", "cascade"])
def test_one_roi_in_four_is_positive(architecture: str) -> None:
    heads = build(architecture).roi_heads  # they sample 16 RoIs per image
    candidates = torch.tensor([[0.0, 0, 100, 100]] * 40 + [[200.0, 200, 300, 300]] * 40)
    truth = objects(box(0, 0, 100, 100), [2])
    with EventStorage():
        (sampled,) = heads.label_and_sample_proposals([proposals(Boxes(candidates))], [truth])
    assert sampled.gt_classes.sort().values.tolist() == [2] * 4 + [CLASSES] * 12


# Losses


def matched(boxes: Boxes, truth: Instances) -> Instances:
    """RoIs matched to one object each, as from label_and_sample_proposals."""
    instances = proposals(boxes)
    for name, value in truth.get_fields().items():
        instances.set(name, value)
    return instances


def maps(channels: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"p{k}": torch.rand(1, channels, 400 >> k, 400 >> k) for k in (2, 3, 4, 5)}


def mask_loss(heads: nn.Module, rois: Instances) -> float:
    with EventStorage():
        return heads._forward_mask(maps(8), [rois])["loss_mask"].item()


@pytest.mark.parametrize("right", [42, 60, 400])
def test_mask_target_is_the_intersection_of_roi_and_object(right: int) -> None:
    heads = build("fpn", ROI_MASK_HEAD__POOLER_RESOLUTION=14).roi_heads
    # The object covers the right half of the RoI (0, 0, 28, 28), and possibly more outside.
    rois = matched(box(0, 0, 28, 28), objects(box(14, 0, right, 28), [1]))
    logits = torch.zeros(1, CLASSES, 28, 28)
    logits[:, 1, :, :14], logits[:, 1, :, 14:] = -3, 3
    set_logits(heads.mask_head, logits)
    # Each pixel is correct with a logit of 3: the binary cross-entropy is log(1 + e^-3).
    assert mask_loss(heads, rois) == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-5)


def test_mask_loss_is_the_mean_cross_entropy_of_a_sigmoid() -> None:
    heads = build("fpn", ROI_MASK_HEAD__POOLER_RESOLUTION=14).roi_heads
    rois = matched(
        Boxes(torch.tensor([[0.0, 0, 28, 28], [0, 0, 28, 28]])),
        objects(Boxes(torch.tensor([[0.0, 0, 28, 7], [0, 0, 28, 28]])), [0, 2]),
    )
    logits = torch.zeros(2, CLASSES, 28, 28)
    logits[0, 0], logits[1, 2] = 1, -2
    set_logits(heads.mask_head, logits)
    # A quarter of the first RoI is the object, with logits of 1; all of the second, with -2.
    first = (math.log(1 + math.exp(-1)) + 3 * math.log(1 + math.e)) / 4
    second = math.log(1 + math.exp(2))
    assert mask_loss(heads, rois) == pytest.approx((first + second) / 2, rel=1e-5)


def test_only_the_mask_of_the_objects_class_is_trained() -> None:
    heads = build("fpn").roi_heads
    rois = matched(box(20, 20, 120, 120), objects(box(30, 10, 100, 110), [1]))
    before = mask_loss(heads, rois)
    predictor = heads.mask_head.predictor
    with torch.no_grad():
        predictor.weight[[0, 2]] += 5
        predictor.bias[[0, 2]] -= 3
    assert mask_loss(heads, rois) == before
    with EventStorage():
        heads._forward_mask(maps(8), [rois])["loss_mask"].backward()
    assert predictor.weight.grad[[0, 2]].abs().max() == 0
    assert predictor.weight.grad[1].abs().max() > 0
    with torch.no_grad():
        predictor.bias[1] += 1
    assert mask_loss(heads, rois) != before


def test_background_rois_have_no_mask_and_no_box_loss() -> None:
    heads = build("fpn").roi_heads
    positive, truth = torch.tensor([[20.0, 20, 120, 120]]), [[30.0, 10, 100, 110]]

    def losses(background: list[float], delta: float) -> tuple[float, float]:
        boxes = Boxes(torch.cat([positive, torch.tensor([background])]))
        rois = matched(boxes, objects(Boxes(torch.tensor(truth * 2)), [1, CLASSES]))
        deltas = torch.full((2, 4 * CLASSES), 0.1)
        deltas[1] = delta
        scores = torch.zeros(2, CLASSES + 1)
        with EventStorage():
            box_loss = heads.box_predictor.losses((scores, deltas), [rois])["loss_box_reg"].item()
        return mask_loss(heads, rois), box_loss

    assert losses([200, 200, 300, 300], 0.5) == losses([0, 0, 50, 60], 7.0)
    assert min(losses([200, 200, 300, 300], 0.5)) > 0


def test_mask_loss_without_positives_is_zero() -> None:
    heads = build("fpn").roi_heads
    assert mask_loss(heads, matched(box(0, 0, 9, 9), objects(box(0, 0, 9, 9), [CLASSES]))) == 0


# Keypoints


def keypoint_loss(logits: torch.Tensor, points: list[list[float]], roi: Boxes) -> float:
    heads = build("keypoint").roi_heads
    instances = matched(roi, objects(box(0, 0, 112, 112), [0]))
    instances.gt_keypoints = Keypoints(torch.tensor([points]))
    set_logits(heads.keypoint_head, logits)
    with EventStorage():
        return heads._forward_keypoint(maps(8), [instances])["loss_keypoint"].item()


def test_a_keypoint_is_one_cell_of_56x56_under_a_softmax() -> None:
    heads = build("keypoint").roi_heads
    assert heads.keypoint_head.layers(torch.rand(2, 8, 14, 14)).shape == (2, KEYPOINTS, 56, 56)
    # A cell is 2 pixels of the RoI (0, 0, 112, 112): (21.5, 40.2) is column 10, row 20.
    points = [[21.5, 40.2, 2.0], [0.0, 111.9, 1.0], [50.0, 50.0, 0.0], [200.0, 50.0, 2.0]]
    logits = torch.zeros(1, KEYPOINTS, 56, 56)
    logits[0, 0, 20, 10] = 4
    # The third is not labelled and the fourth is outside the RoI, so two count. Visible and hidden
    # keypoints count equally.
    first = math.log(math.exp(4) + 56 * 56 - 1) - 4
    by_hand = (first + math.log(56 * 56)) / 2
    assert keypoint_loss(logits, points, box(0, 0, 112, 112)) == pytest.approx(by_hand, rel=1e-5)
    # Keypoints do not compete with each other, and those that do not count have no effect.
    logits[0, 1] += 3
    logits[0, 2:] = torch.rand(2, 56, 56)
    assert keypoint_loss(logits, points, box(0, 0, 112, 112)) == pytest.approx(by_hand, rel=1e-5)


# Inference


@pytest.mark.parametrize("architecture", ["fpn", "c4"])
def test_the_100_best_detections_remain(architecture: str) -> None:
    predictor = build(architecture).eval().roi_heads.box_predictor
    # 150 boxes that do not touch, with increasing scores of class 0.
    grid = torch.cartesian_prod(torch.arange(15.0), torch.arange(10.0)) * 20
    candidates = proposals(Boxes(torch.cat([grid, grid + 10], dim=1)))
    scores = torch.zeros(150, CLASSES + 1)
    scores[:, 0] = torch.linspace(4, 8, 150)
    (kept,), _ = predictor.inference((scores, torch.zeros(150, 4 * CLASSES)), [candidates])
    assert len(kept) == 100
    torch.testing.assert_close(
        kept.pred_boxes.tensor, candidates.proposal_boxes.tensor[50:].flip(0)
    )
    # exp(8) against exp(0) for two other classes and the background.
    assert kept.scores[0].item() == pytest.approx(math.exp(8) / (math.exp(8) + 3), rel=1e-5)


def test_nms_is_per_class_with_an_iou_of_a_half() -> None:
    predictor = build("fpn").eval().roi_heads.box_predictor
    corners = [[0.0, 0, 100, 100], [0, 0, 100, 60], [0, 0, 100, 40], [0, 0, 100, 100]]
    scores = torch.zeros(4, CLASSES + 1)
    for row, (kind, logit) in enumerate([(0, 9.0), (0, 8.0), (0, 7.0), (1, 6.0)]):
        scores[row, kind] = logit
    candidates = proposals(Boxes(torch.tensor(corners)))
    (kept,), _ = predictor.inference((scores, torch.zeros(4, 4 * CLASSES)), [candidates])
    # The second has an IoU of 0.6 with the first, the third 0.4; the fourth has another class.
    assert kept.pred_boxes.tensor.tolist() == [corners[0], corners[2], corners[3]]
    assert kept.pred_classes.tolist() == [0, 0, 1]


def pasted(logits: torch.Tensor, kind: int) -> torch.Tensor:
    """The mask (400, 400) in the image of a detection (10, 20, 38, 48) of class ``kind``."""
    model = build("fpn", ROI_MASK_HEAD__POOLER_RESOLUTION=14).eval()
    set_logits(model.roi_heads.mask_head, logits)
    instances = Instances(SIZE)
    instances.pred_boxes, instances.pred_classes = box(10, 20, 38, 48), torch.tensor([kind])
    instances.scores = torch.ones(1)
    raw = model.roi_heads.forward_with_given_boxes(maps(8), [instances])
    (result,) = model._postprocess(raw, [{"height": SIZE[0], "width": SIZE[1]}], [SIZE])
    return result["instances"].pred_masks[0]


def test_mask_of_the_predicted_class_is_pasted_into_its_box() -> None:
    logits = torch.zeros(1, CLASSES, 28, 28)
    logits[:, 0], logits[:, 1] = 5, -5
    logits[:, 1, :, :14] = 5
    # The box is 28 pixels wide, so a pixel is a cell of the mask. The object is its left half.
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[20:48, 10:24] = True
    assert torch.equal(pasted(logits, kind=1), expected)


@pytest.mark.parametrize(("probability", "pixels"), [(0.49, 0), (0.51, 26 * 26)])
def test_mask_is_where_the_probability_exceeds_a_half(probability: float, pixels: int) -> None:
    logits = torch.full((1, CLASSES, 28, 28), math.log(probability / (1 - probability)))
    # Beyond the centres of its outer cells, the mask is blended with 0, so look inside.
    assert pasted(logits, kind=2)[21:47, 11:37].sum() == pixels
    assert pasted(logits, kind=2).sum() <= 28 * 28


def test_the_paper_mask_head() -> None:
    """Four 3 x 3 convolutions on 14 x 14, a 2 x 2 deconvolution of stride 2, 1 x 1 to K masks."""
    keys = {"NUM_CONV": 4, "CONV_DIM": 256, "POOLER_RESOLUTION": 14}
    head = build("fpn", **{f"ROI_MASK_HEAD__{k}": v for k, v in keys.items()}).roi_heads.mask_head
    layers = [module for module in head.modules() if hasattr(module, "kernel_size")]
    kernels = [(type(m).__name__, m.kernel_size[0], m.stride[0], m.out_channels) for m in layers]
    convolution = ("Conv2d", 3, 1, 256)
    assert kernels == [
        *[convolution] * 4,
        ("ConvTranspose2d", 2, 2, 256),
        ("Conv2d", 1, 1, CLASSES),
    ]
    assert head.layers(torch.rand(1, 8, 14, 14)).shape == (1, CLASSES, 28, 28)
