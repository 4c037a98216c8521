"""MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING: weights from counts."""

from collections.abc import Iterator

import pytest
from detectron2.data import DatasetCatalog

from mask_rcnn_plus import UserError, get_cfg
from mask_rcnn_plus.engine.class_weights import settle_class_weights

NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def counted() -> Iterator[str]:
    """6 cats, 3 dogs, 1 eel, and a crowd of eels."""
    objects = [{"category_id": index} for index in [0] * 6 + [1] * 3 + [2]]
    records = [{"annotations": [*objects, {"category_id": 2, "iscrowd": 1}]}, {}]
    DatasetCatalog.register("counted_train", lambda: records)
    yield "counted_train"
    DatasetCatalog.remove("counted_train")


def test_inverse_frequency(counted: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (counted,)
    settle_class_weights(cfg, NAMES)
    head = cfg.MODEL.ROI_BOX_HEAD
    assert head.CLASS_WEIGHTS == []
    head.CLASS_WEIGHTING = "inverse_frequency"
    settle_class_weights(cfg, NAMES)
    # 10 / (3 * n).
    assert pytest.approx([10 / 18, 10 / 9, 10 / 3], rel=1e-3) == head.CLASS_WEIGHTS
    # The config that is saved has the numbers, and is not counted again.
    assert head.CLASS_WEIGHTING == "none"
    head.CLASS_WEIGHTING = "inverse_frequency"
    with pytest.raises(UserError, match="CLASS_WEIGHTS are given"):
        settle_class_weights(cfg, NAMES)


def test_a_class_without_objects_is_refused(counted: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (counted,)
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING = "inverse_frequency"
    with pytest.raises(UserError, match="class 'fox' has no object"):
        settle_class_weights(cfg, [*NAMES, "fox"])
