"""timm models as backbones: names by stride, sizes, layouts, frozen stages, refusals."""

import sys

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.modeling import TimmBackbone

timm = pytest.importorskip("timm")

RGB = ShapeSpec(channels=3)


def from_config(**keys: object) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.TIMM.NAME = "resnet10t"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    torch.manual_seed(0)
    return build_backbone(cfg, RGB)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("convnext_atto", (40, 80, 160, 320)),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("efficientnet_b0", (24, 40, 112, 320)),
        ("resnet18", (64, 128, 256, 512)),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (50, 71)])
def test_maps_have_the_sizes_of_their_strides(
    name: str, channels: tuple[int, ...], size: tuple[int, int]
) -> None:
    backbone = TimmBackbone(name=name).eval()
    shapes = backbone.output_shape()
    assert list(shapes) == ["res2", "res3", "res4", "res5"]
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    assert tuple(shape.channels for shape in shapes.values()) == channels
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    for key, feature in maps.items():
        stride = shapes[key].stride
        sides = [-(-side // stride) for side in size]
        assert feature.shape == (2, shapes[key].channels, *sides)


def test_maps_equal_the_models() -> None:
    name = "swin_tiny_patch4_window7_224"
    backbone = TimmBackbone(name=name, out_features=["res3", "res5"]).eval()
    model = timm.create_model(name, features_only=True, img_size=(64, 96), always_partition=True)
    model.load_state_dict(backbone.model.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        actual, expected = backbone(image), model.eval()(image)
    assert list(actual) == ["res3", "res5"]
    torch.testing.assert_close(actual["res3"], expected[1].permute(0, 3, 1, 2))
    torch.testing.assert_close(actual["res5"], expected[3].permute(0, 3, 1, 2))


def test_image_is_padded_with_zeros_right_and_below() -> None:
    backbone = TimmBackbone(name="convnext_atto").eval()
    image = torch.randn(1, 3, 64, 64)
    image[:, :, 40:] = image[:, :, :, 33:] = 0
    with torch.no_grad():
        whole, cut = backbone(image), backbone(image[:, :, :40, :33])
    for name, feature in cut.items():
        torch.testing.assert_close(
            feature, whole[name][..., : feature.shape[2], : feature.shape[3]]
        )


def test_image_is_padded_to_whole_windows() -> None:
    backbone = TimmBackbone(name="maxvit_tiny_tf_224", out_features=["res2"]).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 80))
    assert maps["res2"].shape == (1, 64, 16, 20)


def test_no_layers_behind_the_last_map() -> None:
    backbone = TimmBackbone(name="resnet18", out_features=["res2", "res4"])
    maps = backbone(torch.randn(1, 3, 32, 32))
    assert list(maps) == ["res2", "res4"]
    sum(feature.sum() for feature in maps.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen", "trained"),
    [
        ("resnet18", 1, ["conv1", "bn1"], ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet18", 3, ["conv1", "bn1", "layer1", "layer2"], ["layer3", "layer4"]),
        ("convnext_atto", 1, ["stem_0", "stem_1"], ["stages_0", "stages_1"]),
        ("convnext_atto", 2, ["stem_0", "stages_0"], ["stages_1", "stages_3"]),
        ("efficientnet_b0", 2, ["conv_stem", "blocks.0", "blocks.1"], ["blocks.2", "blocks.6"]),
    ],
)
def test_frozen_stages(name: str, freeze_at: int, frozen: list[str], trained: list[str]) -> None:
    backbone = TimmBackbone(name=name, freeze_at=freeze_at)
    parameters = dict(backbone.model.named_parameters())

    def requires_grad_flags(part: str) -> list[bool]:
        return [p.requires_grad for key, p in parameters.items() if key.startswith(f"{part}.")]

    assert not any(flag for part in frozen for flag in requires_grad_flags(part))
    assert all(requires_grad_flags(part) and all(requires_grad_flags(part)) for part in trained)
    # Statistics of batch norms must stay as well, whatever the images.
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    maps = backbone.train()(5 + torch.randn(2, 3, 64, 64))
    sum(feature.sum() for feature in maps.values()).backward()
    after = backbone.model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in changed if key.startswith(tuple(f"{part}." for part in frozen))]


def test_frozen_batch_norms_keep_their_statistics_and_their_activation() -> None:
    """EfficientNet's norms contain the activation, which must be kept."""
    free = TimmBackbone(name="efficientnet_b0").eval()
    frozen = TimmBackbone(name="efficientnet_b0", freeze_batch_norm=True)
    frozen.load_state_dict(free.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = free(image), frozen.train()(image)
    for name, feature in expected.items():
        torch.testing.assert_close(actual[name], feature)
    assert frozen.model.bn1.weight.requires_grad is False


def test_drop_path_is_only_active_in_training() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name="convnext_atto", drop_path_rate=0.5)
    for key, parameter in backbone.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.ones_(parameter)  # full weight for the branches that are dropped
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        kept = [backbone.eval()(image)["res5"] for _ in range(2)]
        dropped = [backbone.train()(image)["res5"] for _ in range(2)]
    assert torch.equal(*kept)
    assert not torch.equal(*dropped)


@pytest.mark.parametrize(("norm", "bias"), [("", True), ("GN", False)])
def test_fpn_by_config(norm: str, bias: bool) -> None:
    fpn = from_config(
        BACKBONE__NAME="build_timm_fpn_backbone", FPN__OUT_CHANNELS=32, FPN__NORM=norm
    )
    maps = fpn(torch.randn(1, 3, 64, 64))
    assert {name: feature.shape[2] for name, feature in maps.items()} == {
        "p2": 16,
        "p3": 8,
        "p4": 4,
        "p5": 2,
        "p6": 1,
    }
    assert all(feature.shape[1] == 32 for feature in maps.values())
    assert fpn.size_divisibility == 32
    assert (fpn.fpn_lateral2.bias is not None) == bias
    torch.testing.assert_close(maps["p6"], maps["p5"][..., ::2, ::2])


def test_fpn_with_fewer_levels_has_its_top_above_them() -> None:
    fpn = from_config(
        BACKBONE__NAME="build_timm_fpn_backbone",
        FPN__IN_FEATURES="['res2', 'res3', 'res4']",
        TIMM__OUT_FEATURES="['res2', 'res3', 'res4']",
    )
    assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5"]
    maps = fpn(torch.randn(1, 3, 64, 64))
    torch.testing.assert_close(maps["p5"], maps["p4"][..., ::2, ::2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"TIMM__NAME": "convnext_tinny"}, "did you mean 'convnext_tiny'"),
        ({"TIMM__NAME": "unknown model"}, "see timm.list_models()"),
        (
            {"TIMM__OUT_FEATURES": "['res2', 'res7']"},
            "'resnet10t' has no 'res7'; choose from res1, res2",
        ),
        (
            {"TIMM__NAME": "vit_tiny_patch16_224"},
            "'vit_tiny_patch16_224' has no 'res2'; choose from res4",
        ),
        ({"TIMM__NAME": "vgg11", "TIMM__DROP_PATH_RATE": 0.1}, "does not support drop path"),
        ({"TIMM__NAME": "gcvit_xxtiny"}, "only supports images of 224 x 224 pixels"),
        ({"BACKBONE__FREEZE_AT": 9}, "FREEZE_AT 9: no stage 'res9', only"),
        ({"TIMM__NAME": "hrnet_w18_small", "BACKBONE__FREEZE_AT": 2}, "set it to 0"),
        (
            {"BACKBONE__NAME": "build_timm_fpn_backbone", "TIMM__OUT_FEATURES": "['res2', 'res3']"},
            "MODEL.FPN.IN_FEATURES: 'res4' is not in",
        ),
    ],
)
def test_wrong_configs_give_a_one_line_error(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_config(**keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_timm_the_message_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="uv sync --extra timm"):
        TimmBackbone(name="resnet18")


def test_failed_download_gives_a_one_line_error(monkeypatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("Could not reach\nthe hub")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", no_network)
    with pytest.raises(UserError) as error:
        from_config(TIMM__PRETRAINED=True)
    assert "cannot download the pretrained weights of 'resnet10t'" in str(error.value)
    assert "set MODEL.TIMM.PRETRAINED False" in str(error.value)
    assert "\n" not in str(error.value)
    # A checkpoint contains all weights.
    from_config(TIMM__PRETRAINED=True, WEIGHTS="model_final.pth")
