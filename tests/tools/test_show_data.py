"""mask-rcnn-plus show-data: a drawing of the images that a config trains on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.evaluation.text import text_size
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.show_data import drawing as show_drawing
from mask_rcnn_tools.show_data.drawing import draw_sample, first_samples


def test_the_first_training_images_are_drawn(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.png"
    command = ["show-data", "--config-file", str(tiny_config), "--output", str(output)]
    command += ["--images", "5", "--side", "100"]
    assert main([*command, "INPUT.JITTER.ENABLED", "True"]) == 0
    height, width = cv2.imread(str(output)).shape[:2]
    # Three columns, two rows.
    assert width >= 3 * 100 and 2 * 100 <= height < 3 * 100
    assert main([*command, "INPUT.JITTER.ENABLED", "True"]) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert main([*command[:3], "--output", "data.txt"]) == 2
    assert "name a .png or .jpg file" in capsys.readouterr().err

    cfg = load_config(tiny_config)
    names = [sample["file_name"] for sample in first_samples(cfg, 4)]
    assert len(set(names)) == 4
    cfg.SEED = 2
    assert [sample["file_name"] for sample in first_samples(cfg, 4)] != names


def test_masks_and_keypoints_are_drawn_at_their_positions() -> None:
    objects = Instances((20, 40))
    objects.gt_boxes = Boxes(torch.tensor([[20.0, 0, 40, 20]]))
    objects.gt_classes = torch.tensor([0])
    masks = torch.zeros(1, 20, 40, dtype=torch.bool)
    masks[:, :, 20:] = True
    objects.gt_masks = BitMasks(masks)
    objects.gt_keypoints = Keypoints(torch.tensor([[[5.0, 10, 2], [0, 0, 0]]]))
    # Blue, in RGB.
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[2] = 200
    sample = {"image": image, "instances": objects, "file_name": "a.png"}
    drawn = draw_sample(sample, ["thing"], image_format="RGB", side=200)[-100:, :200]
    assert drawn[50, 60].tolist() == [200, 0, 0]
    assert drawn[50, 25].tolist() == [255, 255, 255]
    assert drawn[60, 150].tolist() != [200, 0, 0]
    assert np.array_equal(drawn[0, 0], drawn[95, 5])


def test_a_long_file_name_loses_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(show_drawing, "write_text", lambda _, text, *rest: written.append(text))
    objects = Instances((20, 40))
    objects.gt_boxes, objects.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=int)
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    sample = {"image": image, "instances": objects, "file_name": f"in/begin_{'x' * 90}_0042.png"}
    draw_sample(sample, ["thing"], image_format="BGR", side=400)
    (caption,) = written
    name = caption.split("  ")[0]
    assert name.startswith("begin_") and "..." in name and name.endswith("_0042.png")
    assert "40 x 20, 0 objects" in caption and text_size(caption)[0] <= 400
