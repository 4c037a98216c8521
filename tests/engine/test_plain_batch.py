"""A batch written without detectron2's classes comes back as it was."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine.plain_batch import from_plain, to_plain


def test_every_structure_of_a_sample_comes_back(tmp_path: Path) -> None:
    triangle = np.array([0.0, 0, 4, 0, 4, 3])
    instances = Instances(
        (6, 8),
        gt_boxes=Boxes(torch.tensor([[0.0, 0, 4, 3]])),
        gt_classes=torch.tensor([2]),
        gt_masks=PolygonMasks([[triangle]]),
        gt_bits=BitMasks(torch.ones(1, 6, 8, dtype=torch.bool)),
        gt_keypoints=Keypoints(torch.ones(1, 5, 3)),
    )
    sample = {"image": torch.ones(3, 6, 8), "file_name": "a.png", "instances": instances}
    torch.save(to_plain([sample]), tmp_path / "a.pt")
    (again,) = from_plain(torch.load(tmp_path / "a.pt", weights_only=True))
    assert again["file_name"] == "a.png" and torch.equal(again["image"], sample["image"])
    found = again["instances"]
    assert found.image_size == (6, 8) and found.gt_classes.tolist() == [2]
    for name in ("gt_boxes", "gt_bits", "gt_keypoints"):
        one, other = found.get(name), instances.get(name)
        assert type(one) is type(other) and torch.equal(one.tensor, other.tensor)
    assert np.array_equal(found.gt_masks.polygons[0][0], triangle)


def test_what_is_no_structure_is_refused() -> None:
    with pytest.raises(UserError, match=r"'os\.system', which is none"):
        from_plain([{"__structure__": "os.system"}])
