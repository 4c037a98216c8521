"""A divergence file contains the exact batch, and reading it does not run code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine.divergence import STRUCTURES, replay
from mask_rcnn_plus.engine.weights import read_torch


def test_every_structure_of_a_sample_is_restored(tmp_path: Path) -> None:
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
    torch.save([sample], tmp_path / "a.pt")
    (restored,) = read_torch(tmp_path / "a.pt", also=STRUCTURES)
    assert restored["file_name"] == "a.png" and torch.equal(restored["image"], sample["image"])
    copy = restored["instances"]
    assert copy.image_size == (6, 8) and copy.gt_classes.tolist() == [2]
    for name in ("gt_boxes", "gt_bits", "gt_keypoints"):
        one, other = copy.get(name), instances.get(name)
        assert type(one) is type(other) and torch.equal(one.tensor, other.tensor)
    assert np.array_equal(copy.gt_masks.polygons[0][0], triangle)


def test_other_classes_and_malformed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "divergence.pt"
    torch.save({"batch": [Path("x")]}, path)
    with pytest.raises(UserError, match=r"divergence\.pt.*Path.*may run code"):
        replay(path, torch.nn.Identity())
    torch.save({"batch": [Boxes(torch.zeros(1, 4))]}, path)
    with pytest.raises(UserError, match=r"divergence\.pt.*seeds"):
        replay(path, torch.nn.Identity())
