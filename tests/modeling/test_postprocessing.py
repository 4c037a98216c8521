"""Masks that are pasted only when needed, against detectron2's post-processing."""

import copy
import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks

from mask_rcnn_plus.modeling import PastedMasks, RunLengthMasks, postprocess


def detections(kind: type = torch.Tensor) -> Instances:
    """Six detections in a 100 x 80 input; the third has no area, the fourth is outside."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(6, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 10 + 30 * torch.rand(6, 2, generator=generator)], dim=1)
    boxes[2, 2] = boxes[2, 0]
    boxes[3] = torch.tensor([90.0, 20, 130, 40])
    raw = Instances((100, 80))
    raw.pred_boxes = Boxes(boxes)
    raw.scores = torch.linspace(0.9, 0.4, 6)
    raw.pred_classes = torch.arange(6)
    masks = torch.rand(6, 1, 14, 14, generator=generator)
    raw.pred_masks = ROIMasks(masks[:, 0]) if kind is ROIMasks else masks
    raw.pred_keypoints = torch.rand(6, 3, 3, generator=generator) * 80
    return raw


@pytest.mark.parametrize("kind", [torch.Tensor, ROIMasks])
def test_same_as_detectron2(kind: type) -> None:
    raw = detections(kind)
    theirs = detector_postprocess(copy.deepcopy(raw), 150, 200)
    ours = postprocess(raw, 150, 200)
    assert len(ours) == len(theirs) == 4
    assert ours.image_size == theirs.image_size
    assert ours.get_fields().keys() == theirs.get_fields().keys()
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "pred_keypoints"):
        assert torch.equal(ours.get(name), theirs.get(name)), name
    masks = ours.pred_masks
    assert isinstance(masks, PastedMasks)
    assert masks.shape == theirs.pred_masks.shape == (4, 150, 200)
    assert torch.equal(masks.to_tensor(), theirs.pred_masks)
    assert masks.to_tensor().dtype == torch.bool
    encoded = [mask_util.encode(np.asfortranarray(m.numpy(), np.uint8)) for m in theirs.pred_masks]
    assert masks.rle() == encoded


def test_pasted_masks_are_indexed_like_tensors() -> None:
    masks = postprocess(detections(), 150, 200).pred_masks
    dense = masks.to_tensor()
    assert torch.equal(masks[1], dense[1])
    assert torch.equal(masks[-1], dense[-1])
    assert torch.equal(torch.stack(list(masks)), dense)
    chosen = torch.tensor([True, False, True, False])
    for item in (slice(1, 3), chosen, torch.tensor([3, 0]), slice(2, None, 4)):
        assert torch.equal(masks[item].to_tensor(), dense[item])
    with pytest.raises(IndexError):
        masks[4]
    assert np.array_equal(np.asarray(masks), dense.numpy())
    assert np.asarray(masks, dtype=np.uint8).dtype == np.uint8


@pytest.mark.parametrize("kind", [PastedMasks, RunLengthMasks])
def test_masks_have_the_methods_that_apps_need(kind: type) -> None:
    masks = postprocess(detections(), 150, 200).pred_masks
    dense = masks.to_tensor()
    if kind is RunLengthMasks:
        masks = RunLengthMasks(masks.rle(), masks.image_size)
    assert np.array_equal(masks.cpu().numpy(), dense.numpy())
    assert torch.equal(masks.sum(dim=(1, 2)), dense.sum(dim=(1, 2)))
    assert (masks.dtype, masks.dim(), masks.size(0)) == (torch.bool, 3, 4)
    # The dtype is that of pixels, not of the small masks, which would all be empty as bytes.
    assert torch.equal(masks.to(torch.uint8), dense.to(torch.uint8))
    assert torch.equal(masks.to("cpu", dtype=torch.float32), dense.float())
    assert isinstance(masks.to("cpu"), kind)
    for item in (torch.tensor(2), np.array(-1), (slice(None), slice(60, 90)), (0, 70), ..., None):
        assert torch.equal(masks[item], dense[item]), item
    # Other methods of tensors do not paste: ask for to_tensor() first.
    for name in ("no_such", "float"):
        with pytest.raises(AttributeError, match=name):
            getattr(masks, name)
    for same in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert isinstance(same, kind) and torch.equal(same.to_tensor(), dense)


@pytest.fixture(params=[PastedMasks, RunLengthMasks])
def masks(request: pytest.FixtureRequest) -> PastedMasks | RunLengthMasks:
    masks = postprocess(detections(), 150, 200).pred_masks
    whole = request.param is PastedMasks
    return masks if whole else RunLengthMasks(masks.rle(), masks.image_size)


FUNCTIONS = {
    "cat": lambda m: torch.cat([m, m]),
    "any": lambda m: torch.any(m, dim=0),
    "where": lambda m: torch.where(m, 1.0, torch.zeros(())),
    "as_tensor": torch.as_tensor,
    "tensor": torch.tensor,
    "asarray": torch.asarray,
    "as_tensor of bytes": lambda m: torch.as_tensor(m, dtype=torch.uint8),
    "BitMasks": lambda m: BitMasks(m).tensor,
    "BitMasks' boxes": lambda m: BitMasks(m).get_bounding_boxes().tensor,
    "stack": lambda m: torch.stack((m, m), dim=1),
    "count": lambda m: torch.count_nonzero(m, dim=(1, 2)),
    "interpolate": lambda m: torch.nn.functional.interpolate(torch.unsqueeze(m, 0) * 1.0, (7, 9)),
    "== number": lambda m: m == True,  # noqa: E712
    "!=": lambda m: m != False,  # noqa: E712
    "== itself": lambda m: m == m,
    "== tensor": lambda m: torch.ones(150, 200, dtype=torch.bool) == m,
    "| tensor": lambda m: m | torch.ones(150, 200, dtype=torch.bool),
    "tensor &": lambda m: torch.ones(150, 200, dtype=torch.bool) & m,
    "^": lambda m: m ^ m,
    "~": lambda m: ~m,
    "* number": lambda m: m * 2.5,
    "number *": lambda m: 2.5 * m,
    "-": lambda m: 1 - m * 1,
    "/": lambda m: m / 2,
    "<": lambda m: m < 0.5,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_functions_and_operators_take_them_as_tensors(masks, name: str) -> None:
    call = FUNCTIONS[name]
    actual, expected = call(masks), call(masks.to_tensor())
    assert type(actual) is torch.Tensor
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_numpy_takes_them_as_arrays(masks) -> None:
    dense = masks.to_tensor().numpy()
    assert np.array_equal(np.logical_or.reduce(masks), dense.any(axis=0))
    assert np.array_equal(np.ones((150, 200), bool) & masks, dense)


def test_pixels_cannot_be_changed_in_place(masks) -> None:
    with pytest.raises(TypeError, match="assignment"):
        masks[0] = True
    changed = masks
    changed |= torch.ones(150, 200, dtype=torch.bool)
    assert changed.all() and not masks.to_tensor().all()
    assert len({masks, masks}) == 1


def test_pasted_masks_work_in_instances() -> None:
    instances = postprocess(detections(), 150, 200)
    dense = instances.pred_masks.to_tensor()
    assert instances.to("cpu").pred_masks is instances.pred_masks
    assert torch.equal(instances[instances.scores > 0.6].pred_masks.to_tensor(), dense[:2])
    joined = Instances.cat([instances, instances[1:2]])
    assert torch.equal(joined.pred_masks.to_tensor(), dense[[0, 1, 2, 3, 1]])
    assert "PastedMasks" in repr(instances)
    # The masks stay in place when the boxes move.
    instances.pred_boxes.tensor.add_(20)
    assert torch.equal(instances.pred_masks.to_tensor(), dense)


def test_masks_of_two_image_sizes_cannot_be_joined() -> None:
    parts = [postprocess(detections(), 150, width).pred_masks for width in (200, 201)]
    with pytest.raises(ValueError, match="image size"):
        PastedMasks.cat(parts)


def test_half_precision_masks_are_sampled_in_fp32() -> None:
    masks = postprocess(detections(), 150, 200).pred_masks
    half = PastedMasks(masks.masks.bfloat16(), masks.boxes, masks.image_size)
    rounded = PastedMasks(masks.masks.bfloat16().float(), masks.boxes, masks.image_size)
    assert torch.equal(half.to_tensor(), rounded.to_tensor())
    assert half.rle() == rounded.rle()


def test_no_detections_and_no_masks() -> None:
    masks = postprocess(detections()[[]], 150, 200).pred_masks
    assert masks.to_tensor().shape == (0, 150, 200)
    assert masks.rle() == []
    raw = detections()
    raw.remove("pred_masks")
    assert not postprocess(raw, 150, 200).has("pred_masks")
