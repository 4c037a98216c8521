"""mask-rcnn-plus convert-torchvision: torchvision's model and ours detect the same objects."""

import argparse
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.engine import saving
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.convert_torchvision import CONFIG, convert

ROOT = Path(__file__).parents[2]
SIDE = 128
THRESHOLD = 0.75


def randomise(model: nn.Module) -> None:
    """Sets weights with which the model detects distinct objects with high scores."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    state = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("running_var"):
                # Some are as small as epsilon, where it matters; the weights compensate.
                value.copy_(10 ** (-5 + 5 * torch.rand(value.shape, generator=generator)))
                weight = state[name.replace("running_var", "weight")]
                normal(weight, 0.5, 0.2)
                weight *= value.sqrt() * (0.3 if ".bn3." in name else 1)
                normal(state[name.replace("running_var", "running_mean")], 0.0, 0.1)
                normal(state[name.replace("running_var", "bias")], 0.0, 0.1)
            elif "cls_logits" in name or "mask_fcn_logits" in name:
                normal(value, 0.0, 0.3)
            elif "cls_score" in name:
                normal(value, 0.0, 0.06)
            elif "bbox_pred" in name:
                normal(value, 0.0, 0.02)
            elif "box_head" in name and value.dim() == 2:
                # The scores of boxes depend on their content.
                normal(value, 0.0, (6 / value.shape[1]) ** 0.5)


@pytest.mark.slow
@torch.no_grad()
def test_the_same_detections() -> None:
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        min_size=SIDE,
        max_size=SIDE,
        box_score_thresh=THRESHOLD,
    ).eval()
    randomise(theirs)
    cfg = load_config(ROOT / CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = THRESHOLD
    ours = build_model(cfg).eval()
    # This is a BatchNorm2d with epsilon 1e-5; for torchvision's COCO weights, epsilon is 0.
    state = convert(theirs.state_dict(), batch_norm_eps=1e-5)
    ours.load_state_dict(state, strict=True)
    # The documented difference: torchvision rounds its anchors.
    for anchors in ours.proposal_generator.anchor_generator.cell_anchors:
        anchors.copy_(anchors.round())
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randint(0, 255, (1, 3, 16, 16), generator=generator).float()
    image = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 255).byte()[0]

    # Without pasting masks, which differs too.
    images, _ = theirs.transform([image / 255])
    features = theirs.backbone(images.tensors)
    proposals, _ = theirs.rpn(images, features)
    (expected,), _ = theirs.roi_heads(features, proposals, images.image_sizes)
    bgr = {"image": image.flip(0), "height": SIDE, "width": SIDE}
    (detections,) = ours.inference([bgr], do_postprocess=False)

    assert 20 <= len(detections) == len(expected["scores"]) < 100
    assert len(detections.pred_classes.unique()) > 1
    assert expected["masks"].std() > 0.05
    # Objects with nearly equal scores may have another order.
    distance = (expected["boxes"][:, None] - detections.pred_boxes.tensor).abs().amax(dim=2)
    nearest = distance.argmin(dim=1)
    assert len(nearest.unique()) == len(detections)
    assert distance.min(dim=1).values.max() < 1e-2
    detections = detections[nearest]
    assert torch.equal(detections.pred_classes, expected["labels"] - 1)
    torch.testing.assert_close(detections.scores, expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(detections.pred_masks, expected["masks"], rtol=0, atol=1e-3)


def coco_state(masks: bool = True) -> dict[str, Tensor]:
    """A state dict with the published names and numbers of classes; row k of a head contains k."""
    make = maskrcnn_resnet50_fpn if masks else fasterrcnn_resnet50_fpn
    with torch.device("meta"):
        shapes = make(weights=None, weights_backbone=None).state_dict()
    # One channel is enough: the conversion does not depend on widths.
    state = {
        name: torch.ones((len(value), *[1] * (value.dim() - 1)) if value.dim() else ())
        for name, value in shapes.items()
    }
    for name in state:
        if "cls_score" in name or "mask_fcn_logits" in name:
            state[name] = torch.arange(91.0).view(91, *[1] * (state[name].dim() - 1))
        elif "box_predictor.bbox_pred" in name:
            rows = torch.arange(91.0).repeat_interleave(4) + torch.arange(4).repeat(91) / 10
            state[name] = rows.view(364, *[1] * (state[name].dim() - 1))
    state["backbone.body.conv1.weight"] = torch.arange(3.0).view(1, 3, 1, 1)
    return state


def test_the_command_prints_how_to_use_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(coco_state(), source)
    arguments = ["convert-torchvision", str(source), str(out)]
    assert main([*arguments, "--coco"]) == 0
    assert f"--config-file {CONFIG} MODEL.WEIGHTS {out} MODEL.ROI_HEADS.NUM_CLASSES 80\n" in (
        capsys.readouterr().out
    )
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: OUT.pth {out} exists; name another file, or give --overwrite\n"
    )
    assert main([*arguments, "--overwrite"]) == 0
    assert "NUM_CLASSES 90\n" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.pth",
        "out.pth",
        "out.pth.sha256",
    ]


def test_classes_channels_and_deltas_move_as_documented() -> None:
    converted = convert(coco_state())
    predictor = "roi_heads.box_predictor"
    # The background moves from the first row to the last; it has no boxes and no masks.
    assert converted[f"{predictor}.cls_score.bias"].tolist() == [*range(1, 91), 0]
    assert converted[f"{predictor}.cls_score.weight"].flatten().tolist() == [*range(1, 91), 0]
    boxes = converted[f"{predictor}.bbox_pred.weight"].flatten()
    assert len(boxes) == 360
    torch.testing.assert_close(boxes[:5], torch.tensor([1, 1.1, 1.2, 1.3, 2]))
    assert converted["roi_heads.mask_head.predictor.bias"].tolist() == [*range(1, 91)]
    assert converted["backbone.bottom_up.stem.conv1.weight"].flatten().tolist() == [2, 1, 0]


def test_coco_keeps_the_80_categories_in_detectron2s_order() -> None:
    converted = convert(coco_state(), coco=True)
    classes = converted["roi_heads.box_predictor.cls_score.bias"].tolist()
    # COCO has no category 12, 26, ...; 1 is person, 13 stop sign, 90 toothbrush; background last.
    assert len(classes) == 81
    assert (classes[0], classes[10:13], classes[79:]) == (1, [11, 13, 14], [90, 0])
    assert len(converted["roi_heads.mask_head.predictor.bias"]) == 80
    assert len(converted["roi_heads.box_predictor.bbox_pred.bias"]) == 320


def test_batch_norm_is_equal_with_detectron2s_epsilon() -> None:
    state = coco_state()
    state["backbone.body.bn1.running_var"] = torch.full((64,), 1e-5)
    weight = convert(state)["backbone.bottom_up.stem.conv1.norm.weight"]
    # torchvision: 1 / sqrt(1e-5); detectron2: weight / sqrt(1e-5 + 1e-5).
    torch.testing.assert_close(weight, torch.full((64,), 2.0**0.5))
    same = convert(state, batch_norm_eps=1e-5)["backbone.bottom_up.stem.conv1.norm.weight"]
    torch.testing.assert_close(same, torch.ones(64))


def test_the_old_names_of_the_published_weights() -> None:
    """COCO_V1 was saved before torchvision 0.13, which moved its convolutions into blocks."""
    old = {}
    for name, value in coco_state().items():
        for there, here in (
            ("_blocks.0.0.", "_blocks.0."),
            ("_blocks.1.0.", "_blocks.1."),
            ("_blocks.2.0.", "_blocks.2."),
            ("_blocks.3.0.", "_blocks.3."),
            ("rpn.head.conv.0.0.", "rpn.head.conv."),
            ("mask_head.0.0.", "mask_head.mask_fcn1."),
            ("mask_head.1.0.", "mask_head.mask_fcn2."),
            ("mask_head.2.0.", "mask_head.mask_fcn3."),
            ("mask_head.3.0.", "mask_head.mask_fcn4."),
        ):
            name = name.replace(there, here)
        old[name] = value
    assert old.keys() != coco_state().keys()
    assert convert(old).keys() == convert(coco_state()).keys()


def test_faster_rcnn_and_reference_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without masks, in a checkpoint of torchvision's reference training."""
    path = tmp_path / "model_25.pth"
    torch.save({"model": coco_state(masks=False), "args": argparse.Namespace(lr=1)}, path)
    assert main(["convert-torchvision", str(path), str(tmp_path / "out.pth")]) == 0
    out = capsys.readouterr().out
    assert "NUM_CLASSES 90 MODEL.MASK_ON False" in out
    assert "--coco keeps the 80" in out
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert not any("mask" in name for name in state)


def resnet() -> object:
    with torch.device("meta"):
        shapes = torchvision.models.resnet18(weights=None).state_dict()
    return {name: torch.zeros(1) for name in shapes}


def classes_that_differ() -> object:
    return {**coco_state(), "roi_heads.mask_predictor.mask_fcn_logits.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (None, [], "in.pth' does not exist"),
        (b"not a checkpoint", [], "in.pth' cannot be loaded: the file is text"),
        ([torch.zeros(1)], [], "are not a state dict: save model.state_dict()"),
        (b"a text\n", [], "the file is text"),
        ({"a": 1}, [], "are not a state dict: save model.state_dict()"),
        (resnet, [], "missing: 295 keys (backbone.body.conv1.weight, "),
        (classes_that_differ, [], "cls_score 91, bbox_pred 91, mask_fcn_logits 3"),
        (coco_state, ["--batch-norm-eps", "1"], "invalid choice: 1.0"),
    ],
)
def test_a_wrong_input_gives_a_one_line_error(
    content: object,
    options: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content() if callable(content) else content, source)
    assert main(["convert-torchvision", str(source), str(out), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not out.exists()


def test_a_pickled_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "in.pth")
    assert main(["convert-torchvision", str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be loaded" in line and "weights_only" not in line.split("loaded: ")[1][:40]


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(coco_state(), tmp_path / "in.pth")
    out = tmp_path / "nowhere" / "out.pth"
    assert main(["convert-torchvision", str(tmp_path / "in.pth"), str(out)]) == 2
    assert f"{out}: name a file in a folder that exists" in capsys.readouterr().err
    if not Path("/dev/full").exists():
        return
    (tmp_path / "out.pth.part").symlink_to("/dev/full")
    assert main(["convert-torchvision", str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_coco_needs_cocos_classes() -> None:
    state = coco_state()
    for name in state:
        if "predictor" in name and "conv5" not in name:
            state[name] = state[name][: len(state[name]) // 91 * 5]
    with pytest.raises(UserError, match=r"--coco needs the 91 classes .* these have 5"):
        convert(state, coco=True)


def test_the_output_has_a_digest_and_the_input_runs_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(coco_state(), source)
    assert main(["convert-torchvision", str(source), str(out)]) == 0
    assert saving.has_digest(out) and saving.damage(out) == ""
    capsys.readouterr()
    torch.save({"model": nn.Linear(1, 1)}, source)
    assert main(["convert-torchvision", str(source), str(out), "--overwrite"]) == 2
    assert "may run code" in capsys.readouterr().err
