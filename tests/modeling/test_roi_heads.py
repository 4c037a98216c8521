"""This project's ROI heads: pooler types, refusals, no objects. See also test_parity.py."""

import pytest
import torch
from detectron2.export import scripting_with_instances
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import UserError
from mask_rcnn_plus.modeling import FusedROIPooler
from mask_rcnn_plus.modeling.pooler import POOLER_TYPES
from tests.modeling.models import ARCHITECTURES, batch, build, config

POOLERS = {
    "fpn": {"box_pooler": "ROI_BOX_HEAD", "mask_pooler": "ROI_MASK_HEAD"},
    "dc5": {"box_pooler": "ROI_BOX_HEAD", "mask_pooler": "ROI_MASK_HEAD"},
    "cascade": {"box_pooler": "ROI_BOX_HEAD", "mask_pooler": "ROI_MASK_HEAD"},
    "keypoint": {"box_pooler": "ROI_BOX_HEAD", "keypoint_pooler": "ROI_KEYPOINT_HEAD"},
    "c4": {"pooler": "ROI_BOX_HEAD"},
}


@pytest.mark.parametrize("pooler_type", POOLER_TYPES)
def test_every_pooler_type_in_every_head(pooler_type: str) -> None:
    # C4 has one pooler, the box head's.
    for architecture, mask_pooler_type in (("fpn", pooler_type), ("c4", "ROIPool")):
        model = build(
            architecture,
            ROI_BOX_HEAD__POOLER_TYPE=pooler_type,
            ROI_MASK_HEAD__POOLER_TYPE=mask_pooler_type,
        )
        for name in POOLERS[architecture]:
            pooler = getattr(model.roi_heads, name)
            assert isinstance(pooler, FusedROIPooler)
            assert pooler.pooler_type == pooler_type
        with EventStorage():
            losses = model(batch())
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
    keypoints = build("keypoint", ROI_KEYPOINT_HEAD__POOLER_TYPE=pooler_type).roi_heads
    assert keypoints.keypoint_pooler.pooler_type == pooler_type
    assert keypoints.box_pooler.pooler_type == "ROIAlignV2"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_poolers_have_detectron2s_sizes_and_levels(architecture: str) -> None:
    keys = {f"{s}__POOLER_SAMPLING_RATIO": 2 for s in POOLERS[architecture].values()}
    ours = build(architecture, **keys).roi_heads
    theirs = build(architecture, ours=False, **keys).roi_heads
    for name in POOLERS[architecture]:
        actual, expected = getattr(ours, name), getattr(theirs, name)
        assert isinstance(actual, FusedROIPooler)
        assert isinstance(expected, ROIPooler)
        assert actual.sampling_ratio == 2
        assert actual.scales == [p.spatial_scale for p in expected.level_poolers]
        for field in ("output_size", "min_level", "max_level", "canonical_box_size"):
            assert getattr(actual, field) == getattr(expected, field)


def test_config_is_not_changed() -> None:
    cfg = config("fpn", ROI_MASK_HEAD__POOLER_TYPE="ROIWarp")
    before = cfg.dump()
    build("fpn", ROI_MASK_HEAD__POOLER_TYPE="ROIWarp")
    assert cfg.dump() == before
    assert cfg.is_frozen()


@pytest.mark.parametrize(
    ("architecture", "section", "pooler_type", "expected"),
    [
        ("fpn", "ROI_MASK_HEAD", "ROIWrap", "did you mean 'ROIWarp'?"),
        ("c4", "ROI_BOX_HEAD", "ROIPoolMax", "did you mean 'ROIPool'?"),
        (
            "cascade",
            "ROI_BOX_HEAD",
            "",
            "ROI_BOX_HEAD.POOLER_TYPE: unknown ''; choose one of ROIAlign,",
        ),
        ("keypoint", "ROI_KEYPOINT_HEAD", "max", "'max'; choose one of ROIAlign, ROIAlignV2,"),
    ],
)
def test_unknown_pooler_type_is_refused(
    architecture: str, section: str, pooler_type: str, expected: str
) -> None:
    with pytest.raises(UserError) as refusal:
        build(architecture, **{f"{section}__POOLER_TYPE": pooler_type})
    assert expected in str(refusal.value)
    assert all(name in str(refusal.value) for name in POOLER_TYPES)


def test_without_a_pooler_type_a_mask_head_gets_the_maps() -> None:
    # As in detectron2. No head here accepts maps, so it refuses them.
    with pytest.raises(UserError, match="MLPMaskHead needs RoIs"):
        build("fpn", ROI_MASK_HEAD__NAME="MLPMaskHead", ROI_MASK_HEAD__POOLER_TYPE="")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_without_objects_keeps_the_graph(architecture: str) -> None:
    model = build(architecture)
    with EventStorage():
        losses = model(batch(empty=True))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    # Distributed training would wait forever for a parameter without gradient.
    assert all(p.grad is not None for p in model.roi_heads.parameters())


@pytest.mark.parametrize("architecture", ["fpn", "dc5"])
def test_detectron2_compiles_the_heads_with_torchscript(architecture: str) -> None:
    model = build(architecture, ROI_HEADS__SCORE_THRESH_TEST=0.0).eval()
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    scripted = scripting_with_instances(model, fields)
    inputs = [{"image": sample["image"]} for sample in batch()]
    with torch.no_grad():
        expected = model.inference(inputs, do_postprocess=False)
        results = scripted.inference(inputs, do_postprocess=False)
    for instances, result in zip(expected, results, strict=True):
        assert len(instances) > 0
        assert torch.equal(result.pred_boxes.tensor, instances.pred_boxes.tensor)
        assert torch.equal(result.pred_masks, instances.pred_masks)
