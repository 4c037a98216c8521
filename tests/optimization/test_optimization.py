"""mask_rcnn_plus.optimize: the same detections, the model unchanged, unchanged parts named."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from mask_rcnn_plus import UserError, optimize
from mask_rcnn_plus.evaluation import run_inference
from mask_rcnn_plus.modeling import PastedMasks
from mask_rcnn_plus.optimization import conversion, layers, onednn
from mask_rcnn_plus.optimization.proposals import largest
from tests.modeling.models import ARCHITECTURES, build

# The second is not a multiple of any stride.
SIZES = ((64, 96), (75, 51))


def lively(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that have an effect and scores that differ between places."""
    generator = torch.Generator().manual_seed(3)

    def numbers(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
                module.running_mean.copy_(numbers(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(numbers(module.running_var, 0.5, 1.5))
                module.bias.copy_(numbers(module.bias, -0.2, 0.2))
                module.weight.mul_(numbers(module.weight, 0.5, 1.2))
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("predictor", "objectness", "anchor_deltas", "score")):
                scale = 0.05 if "delta" in name or "bbox" in name else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """One of each (height, width); the detections are returned at half that size."""
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "image": torch.randint(0, 255, (3, *size), generator=generator, dtype=torch.uint8),
            "height": size[0] // 2,
            "width": size[1] // 2,
        }
        for size in sizes
    ]


@torch.no_grad()
def detect(model: nn.Module, inputs: list[dict[str, Any]] | None = None) -> list[Any]:
    return [output["instances"] for output in model(inputs or images(*SIZES))]


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    """The tolerance of fp32: 1e-4 in scores, 0.05 px in boxes and keypoints, the same masks."""
    for a, b in zip(actual, expected, strict=True):
        assert len(a) == len(b) > 0
        assert torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=0.05)
        if b.has("pred_masks"):
            assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3
        if b.has("pred_keypoints"):
            close = (a.pred_keypoints - b.pred_keypoints).abs() < 0.05
            # If two cells of a heatmap tie, either may win.
            assert close.float().mean() > 0.99


def group_norms() -> nn.Module:
    # detectron2's group norm needs at least 32 channels.
    keys = {"RESNETS__NORM": "GN", "FPN__NORM": "GN", "FPN__OUT_CHANNELS": 32}
    keys |= {"RESNETS__STEM_OUT_CHANNELS": 32, "RESNETS__RES2_OUT_CHANNELS": 32}
    return build("fpn", ours=False, RESNETS__WIDTH_PER_GROUP=32, **keys)


def gelu() -> nn.Module:
    model = build("fpn", ours=False)
    model.proposal_generator.rpn_head.conv.activation = nn.GELU()
    model.roi_heads.mask_head.mask_fcn1.activation = nn.Tanh()
    return model


def timm_model() -> nn.Module:
    pytest.importorskip("timm")
    name = {"TIMM__NAME": "resnet10t.c3_in1k", "BACKBONE__NAME": "build_timm_fpn_backbone"}
    return build("fpn", **name, TIMM__PRETRAINED=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: build(name, ours=False) for name in ARCHITECTURES},
    "ours": lambda: build("fpn"),
    "resnet-18, batch norm": lambda: build(
        "fpn",
        RESNETS__DEPTH=18,
        RESNETS__NORM="BN",
        RESNETS__STEM_OUT_CHANNELS=64,
        RESNETS__RES2_OUT_CHANNELS=64,
    ),
    "4conv1fc": lambda: build("fpn", ROI_BOX_HEAD__NUM_CONV=2, ROI_BOX_HEAD__CONV_DIM=8),
    "agnostic masks": lambda: build("fpn", ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True),
    "mlp masks": lambda: build("fpn", ROI_MASK_HEAD__NAME="MLPMaskHead"),
    "softmax masks": lambda: build("fpn", ROI_MASK_HEAD__NAME="SoftmaxMaskHead"),
    "average": lambda: build("fpn", FPN__FUSE_TYPE="avg"),
    "group norm": group_norms,
    "gelu": gelu,
    "timm": timm_model,
}


@pytest.mark.parametrize("name", MODELS)
def test_fp32_gives_the_models_detections_and_does_not_change_it(name: str) -> None:
    model = lively(MODELS[name]())
    expected = detect(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    model.train()

    fast = optimize(model)
    assert_same(detect(fast), expected)

    assert all(module.training for module in (model, model.backbone, model.roi_heads))
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_same(detect(model.eval()), expected)
    # Nothing is shared: training the model does not change the copy.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(detect(fast), expected)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lively(build("fpn"))


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> nn.Module:
    return optimize(model)


def test_maps_are_as_exact_as_stock_ones_in_channels_last() -> None:
    wide = {"RESNETS__STEM_OUT_CHANNELS": 64, "RESNETS__RES2_OUT_CHANNELS": 256}
    wide |= {"RESNETS__WIDTH_PER_GROUP": 64, "FPN__OUT_CHANNELS": 128}
    model = lively(build("fpn", ours=False, **wide))
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    in_nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def maps(model: nn.Module, image: Tensor) -> Tensor:
        return torch.cat([m.flatten().double() for m in model.backbone(image).values()])

    exact = maps(copy.deepcopy(model).double(), image.double())
    image = image.contiguous(memory_format=torch.channels_last)
    ours, stock = (
        (maps(each, image) - exact).square().mean().sqrt() for each in (optimize(model), in_nhwc)
    )
    assert 0 < ours < 1.3 * stock < 1e-4 * exact.square().mean().sqrt()


def test_layers_agree_without_onednn_and_without_rois(model: nn.Module, fast: nn.Module) -> None:
    plain = copy.deepcopy(fast)
    for module in plain.modules():
        if isinstance(module, layers.InferenceLayer):
            module.fused = False
    assert_same(detect(plain), detect(model))
    none = optimize(model)
    none.roi_heads.box_predictor.test_score_thresh = 1.0
    assert [len(output) for output in detect(none)] == [0, 0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_images_and_weights_give_the_models_detections(
    model: nn.Module, value: float, dtype: str
) -> None:
    inputs = [{"image": torch.full((3, 64, 64), value), "height": 64, "width": 64}]
    inputs += images(SIZES[0])
    expected, fast = detect(model, inputs), optimize(model, dtype)
    assert len(expected[0]) == 0 < len(expected[1])
    actual = detect(fast, inputs)
    assert len(actual[0]) == 0 < len(actual[1])
    if dtype == "fp32":
        assert_same(actual[1:], expected[1:])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.backbone.bottom_up.stem.conv1.weight[0, 0, 0, 0] = value
    fast = optimize(broken, dtype)
    assert [len(output) for output in detect(fast)] == [len(output) for output in detect(broken)]
    report = str(fast.optimization_report)
    assert "backbone.bottom_up.stem.conv1.weight with NaN or infinite values" in report
    assert "by oneDNN" not in report


@pytest.mark.parametrize(
    ("statistic", "value", "folded"),
    [
        ("running_var", float("inf"), "finite"),  # its scale is 0, only the shift remains
        ("running_var", -1.0, "not"),  # finite, but its square root is NaN
        ("running_mean", float("inf"), "not"),  # minus infinity, which a ReLU turns into 0
        ("running_mean", float("nan"), "not"),
        ("weight", float("inf"), "not"),
    ],
)
def test_non_finite_norms_give_the_models_detections(
    model: nn.Module, statistic: str, value: float, folded: str
) -> None:
    broken = copy.deepcopy(model)
    getattr(broken.backbone.bottom_up.res2[0].conv1.norm, statistic)[1] = value
    expected, fast = detect(broken), optimize(broken)
    if value == float("inf") and statistic != "weight":
        assert_same(detect(fast), expected)
    else:
        assert (
            [len(output) for output in detect(fast)]
            == [len(output) for output in expected]
            == [0, 0]
        )
    kept = "\n".join(fast.optimization_report.kept)
    assert ("backbone.bottom_up.res2.0.conv1" in kept) == (folded == "not")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 300)])
def test_images_of_one_cell_are_accepted(size: tuple[int, int], dtype: str) -> None:
    fast = optimize(lively(build("c4", ours=False)), dtype)
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8), "height": 9, "width": 9}]
    assert len(detect(fast, inputs)) == 1


def test_non_finite_and_empty_proposals_are_dropped_as_in_detectron2(
    model: nn.Module, fast: nn.Module
) -> None:
    generator = torch.Generator().manual_seed(1)
    sides = (16, 8, 4, 2, 1)
    features = {f"p{i + 2}": torch.zeros(2, 8, side, side) for i, side in enumerate(sides)}
    logits = [torch.randn(2, 3, side, side, generator=generator) for side in sides]
    deltas = [torch.randn(2, 12, side, side, generator=generator) for side in sides]
    logits[0][0, 0, 3, 3], logits[1][1, 2, 4, 4] = float("nan"), float("inf")
    # An infinite shift, one far outside the image, and a width of zero.
    deltas[0][0, 0, 1, 1], deltas[1][:, 4, 2, 2], deltas[2][:, 2, 3, 3] = float("inf"), 1e3, -1e3
    logits[0][0, 0, 1, 1] = logits[1][0, 1, 2, 2] = logits[2][0, 0, 3, 3] = 9.0
    sizes = type("Images", (), {"image_sizes": [(60, 64), (64, 50)]})
    actual = []
    for output in (model, fast):
        rpn = copy.deepcopy(output.proposal_generator)
        rpn.rpn_head = _Constant((logits, deltas))
        rpn.min_box_size = 2.0
        actual.append(rpn(sizes, features)[0])
    for stock, ours in zip(*actual, strict=True):
        assert 0 < len(stock) == len(ours)
        assert torch.equal(ours.objectness_logits, stock.objectness_logits)
        assert torch.equal(ours.proposal_boxes.tensor, stock.proposal_boxes.tensor)


class _Constant(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, features: Any) -> Any:
        return self.value


def test_first_of_equal_scores_are_chosen_as_by_a_stable_sort() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    best, index = largest(scores, 4)
    assert best.tolist() == [[3.0, 3.0, 2.0, 2.0]] and index.tolist() == [[1, 3, 2, 4]]
    assert largest(scores, 0)[1].shape == (1, 0)


def test_onednn_is_only_used_if_it_computes_correctly(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn.is_usable.cache_clear()
    monkeypatch.setattr(onednn, "linear", lambda x, weight, bias, relu: x @ weight.T)
    assert not onednn.is_usable(torch.float32)
    onednn.is_usable.cache_clear()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "group norm", "mlp masks", "timm"])
def test_bf16_detects_the_same_objects(name: str) -> None:
    model = lively(MODELS[name]())
    fast = optimize(model, "bf16")
    assert fast.backbone is not model.backbone
    assert_same_objects(detect(fast), detect(model))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "group norm", "mlp masks", "timm"])
def test_fp16_detects_the_same_objects_with_the_layers_of_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_usable", lambda dtype: False)
    # "fp16" is refused on CPUs, where it is slow.
    monkeypatch.setitem(conversion.DTYPES, "bf16", torch.float16)
    model = lively(MODELS[name]())
    fast = optimize(model, "bf16")
    assert fast.optimization_dtype == torch.float16
    assert_same_objects(detect(fast), detect(model))


def assert_same_objects(actual: list[Any], expected: list[Any]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.scores.dtype == a.pred_boxes.tensor.dtype == torch.float32
        strong = b[b.scores > 0.5]
        same = pairwise_iou(strong.pred_boxes, a.pred_boxes)
        same *= strong.pred_classes[:, None] == a.pred_classes[None]
        # With 8 bits, a random network changes some boxes and classes; most stay.
        assert len(strong) == 0 or (same.amax(dim=1) > 0.5).float().mean() > 0.6


def test_scores_and_deltas_are_fp32_also_without_onednn(model: nn.Module) -> None:
    # As on a GPU, where autocast must not cast these layers.
    fast = optimize(model, "bf16")
    for layer in fast.modules():
        if isinstance(layer, layers.InferenceLayer):
            layer.fused = False
    actual: list[torch.dtype] = []
    predictor = fast.roi_heads.box_predictor
    predictor.register_forward_hook(lambda _, inputs, both: actual.extend(x.dtype for x in both))
    detect(fast)
    assert actual == [torch.float32, torch.float32]
    assert fast.roi_heads.box_head.fc1.weight.dtype == torch.bfloat16


def test_detector_without_rois_works_in_any_dtype() -> None:
    keys = {"META_ARCHITECTURE": "RetinaNet", "RETINANET__NUM_CLASSES": 3, "MASK_ON": False}
    keys |= {"BACKBONE__NAME": "build_retinanet_resnet_fpn_backbone"}
    keys |= {"RESNETS__OUT_FEATURES": ["res3", "res4", "res5"]}
    keys |= {"FPN__IN_FEATURES": ["res3", "res4", "res5"], "RETINANET__NUM_CONVS": 1}
    model = lively(build("fpn", ours=False, **keys))
    expected = detect(model)
    assert_same(detect(optimize(model)), expected)
    fast = optimize(model, "bf16")
    assert "head: scores and boxes in fp32" in str(fast.optimization_report)
    for a, b in zip(detect(copy.deepcopy(fast)), expected, strict=True):
        assert a.scores.dtype == a.pred_boxes.tensor.dtype == torch.float32
        same = pairwise_iou(b.pred_boxes, a.pred_boxes)
        same *= b.pred_classes[:, None] == a.pred_classes[None]
        assert (same.amax(dim=1) > 0.5).float().mean() > 0.6


def test_deformable_convolutions_run_in_fp32() -> None:
    keys = {"RESNETS__DEFORM_ON_PER_STAGE": [False, False, False, True]}
    model = lively(build("fpn", ours=False, **keys))
    assert_same(detect(optimize(model)), detect(model))
    assert all(len(output) for output in detect(optimize(model, "bf16")))


def test_copies_and_pickles_detect_the_same(fast: nn.Module) -> None:
    expected = detect(fast)
    assert_same(detect(copy.deepcopy(fast)), expected)
    again = pickle.loads(pickle.dumps(fast))
    assert_same(detect(again), expected)
    assert str(again.optimization_report) == str(fast.optimization_report)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert_same(detect(torch.load(file, weights_only=False)), expected)


def test_training_and_other_weights_are_refused(model: nn.Module, fast: nn.Module) -> None:
    assert isinstance(fast, GeneralizedRCNN) and not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(UserError, match="for inference only"):
        fast.train()
    with pytest.raises(UserError, match="cannot load other weights"):
        fast.load_state_dict(model.state_dict())
    assert fast.eval() is fast
    part = copy.deepcopy(fast.backbone).train()
    with pytest.raises(UserError, match="for inference only"):
        part(torch.zeros(1, 3, 64, 64))


def test_wrong_arguments_are_refused(model: nn.Module, fast: nn.Module) -> None:
    with pytest.raises(UserError, match=r"dtype 'int8'; choose one of fp32, bf16, fp16"):
        optimize(model, "int8")
    with pytest.raises(UserError, match="slower than fp32"):
        optimize(model, "fp16")
    with pytest.raises(UserError, match="already optimized"):
        optimize(fast)


def test_hooks_of_the_model_are_called_in_the_copy() -> None:
    model = lively(build("fpn"))
    called: list[str] = []
    parts = ("backbone", "backbone.bottom_up.stem", "roi_heads.mask_head", "roi_heads.box_head.fc1")
    for name in parts:
        part = model.get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        part.register_forward_pre_hook(lambda *_, name=name: called.append(f"before {name}"))
    fast = optimize(model)
    assert type(fast.backbone) is not type(model.backbone)
    detect(fast)
    assert sorted(called) == sorted([*parts, *(f"before {name}" for name in parts)])


class _Square(nn.Module):
    """An unknown layer with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_unchanged_parts_are_named() -> None:
    model = lively(group_norms())
    model.roi_heads.mask_head.deconv_relu = _Square()
    fast = optimize(model, cuda_graphs=True)
    assert_same(detect(fast), detect(model))
    kept = "\n".join(fast.optimization_report.kept)
    assert "16 residual blocks: their norms depend on the map" in kept
    assert "GroupNorm (as backbone.fpn_lateral2.norm)" in kept
    assert "1 _Square (as roi_heads.mask_head.deconv_relu)" in kept
    assert "roi_heads.mask_head: only the layers of MaskRCNNConvUpsampleHead" in kept
    assert "CUDA graphs: the model is on cpu" in kept


def test_report_has_the_memory_of_the_weights(model: nn.Module) -> None:
    whole = optimize(model).optimization_report
    half = optimize(model, "bf16").optimization_report
    assert not whole.kept and "53 norms folded" in whole.done[0]
    # The last layers of the box head and the anchors stay fp32.
    assert 0.5 < half.weight_mib / whole.weight_mib < 0.6
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    assert weights < whole.weight_mib < 1.1 * weights
    assert "MiB of weights of its own" in str(whole)


def test_copy_can_be_used_like_the_model(model: nn.Module, fast: nn.Module) -> None:
    batches = [[output] for output in images(*SIZES)]
    expected = [detect(model, batch)[0] for batch in batches]
    # As called by detectron2's loop and DefaultPredictor.
    assert_same([detect(fast, batch)[0] for batch in batches], expected)
    recorder = _Recorder()
    _, speed = run_inference(fast, batches, recorder, dataset_name="two images")
    assert all(isinstance(output.pred_masks, PastedMasks) for output in recorder.actual)
    assert speed.postprocessing_ms is not None
    for output in recorder.actual:
        output.pred_masks = output.pred_masks.to_tensor()
    assert_same(recorder.actual, expected)
    # Given boxes, as in test-time augmentation.
    given = [Instances(size) for size in SIZES]
    for output in given:
        output.pred_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 40.0]]))
        output.pred_classes = torch.tensor([1])
    with torch.no_grad():
        a, b = (m.inference(images(*SIZES), copy.deepcopy(given)) for m in (fast, model))
    for output, other in zip(a, b, strict=True):
        assert torch.equal(output["instances"].pred_masks, other["instances"].pred_masks)


class _Recorder(DatasetEvaluator):
    def __init__(self) -> None:
        self.actual: list[Any] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.actual += [output["instances"] for output in outputs]


def test_first_block_of_a_stage_does_not_overwrite_its_input() -> None:
    stage = nn.Sequential(*(BasicBlock(8, 8, norm="FrozenBN") for _ in range(2)))
    box = lively(nn.ModuleDict({"backbone": stage}))
    fast = optimize(box)
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)  # the layout that is not copied
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast["backbone"](x), stage(x), rtol=0, atol=1e-5)
    assert torch.equal(x, before)
    assert "the model: only the parts of ModuleDict" in str(fast.optimization_report)
