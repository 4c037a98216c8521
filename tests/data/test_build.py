"""The training batches of a config."""

import itertools
import logging
from collections import Counter
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask_rcnn_plus.config import get_cfg
from mask_rcnn_plus.data import build_train_batches


@pytest.fixture
def rare(root: Any) -> Any:
    """A config with ten images: class 0 in all of them, class 1 only in the last one."""

    def records() -> list[dict[str, Any]]:
        return [
            {
                "file_name": str(number),
                "width": 9,
                "height": 9,
                "annotations": [{"category_id": c, "iscrowd": 0} for c in range(1 + number // 9)],
            }
            for number in range(10)
        ]

    DatasetCatalog.register("rare", records)
    MetadataCatalog.get("rare").thing_classes = ["common", "rare"]
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("rare",)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 1
    return cfg


def test_images_of_a_rare_class_occur_as_often_as_its_factor(
    rare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # In a tenth of the images: sqrt(0.4 / 0.1) is twice per epoch of 11 images.
    rare.DATALOADER.REPEAT_THRESHOLD = 0.4
    with caplog.at_level(logging.INFO, "mask_rcnn_plus"):
        batches = build_train_batches(rare, lambda record: record["file_name"], seed=0)
    assert "An epoch has 11 images on average: 1 of 10 occur more than once" in caplog.text
    names = [name for (name,) in itertools.islice(batches, 110)]
    expected = {str(number): 20 if number == 9 else 10 for number in range(10)}
    assert Counter(names) == expected
    # The same when it begins at a later step.
    later = build_train_batches(rare, lambda record: record["file_name"], seed=0)
    later.start(step=37)
    assert [name for (name,) in itertools.islice(later, 73)] == names[37:]


def test_a_threshold_that_repeats_nothing_logs_a_warning(
    rare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rare.DATALOADER.REPEAT_THRESHOLD = 0.1  # the share of the rarer class
    build_train_batches(rare, lambda record: record, seed=0)
    assert "repeats no image: DATALOADER.REPEAT_THRESHOLD is 0.1" in caplog.text
