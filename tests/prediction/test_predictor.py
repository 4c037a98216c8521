"""BatchPredictor compared with detectron2's DefaultPredictor on the same checkpoint."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances
from PIL import Image

from mask_rcnn_plus import BatchPredictor, SlicedPredictor, UserError, load_config
from mask_rcnn_plus.data import SafeDatasetMapper
from mask_rcnn_plus.prediction import predictor as predictor_module
from mask_rcnn_plus.prediction.building import read_config
from tests.modeling import models

# After resizing to 64 and padding to 32, some of them have the same size.
SIZES = [(64, 64), (90, 64), (64, 90), (40, 40), (128, 128), (200, 150)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def weights(trained: Path) -> str:
    return str(trained / "model_final.pth")


@pytest.fixture(scope="module")
def predictor(weights: str) -> BatchPredictor:
    return BatchPredictor.from_checkpoint(weights, opts=["MODEL.DEVICE", "cpu"])


def assert_equal(ours: Instances, theirs: Instances) -> None:
    assert ours.image_size == theirs.image_size
    assert set(ours.get_fields()) == set(theirs.get_fields())
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
    boxes = (ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    assert ours.pred_masks.dtype == torch.bool
    assert (ours.pred_masks != theirs.pred_masks).float().mean() < 1e-4


@pytest.mark.parametrize(("order", "first"), [("BGR", 0), ("RGB", 4)])
def test_results_equal_the_default_predictors(
    order: str, first: int, weights: str, trained: Path, images: list[np.ndarray]
) -> None:
    cfg = load_config(trained / "config.yaml", ["INPUT.FORMAT", order, "MODEL.WEIGHTS", weights])
    single = DefaultPredictor(cfg)
    detections = BatchPredictor(cfg, batch_size=3)(images[first:])
    for image, ours in zip(images[first:], detections, strict=True):
        assert_equal(ours, single(image)["instances"])


def test_only_inputs_of_one_size_share_a_batch(
    predictor: BatchPredictor, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    inference = predictor.model.inference

    def spy(batch: list[dict], **kwargs: object) -> list[Instances]:
        seen.append([tuple(-(-side // 32) for side in entry["image"].shape[1:]) for entry in batch])
        return inference(batch, **kwargs)

    monkeypatch.setattr(predictor.model, "inference", spy)
    predictor([*images, *images])
    assert all(len(set(batch)) == 1 and len(batch) <= 4 for batch in seen)
    assert max(map(len, seen)) > 1 and sum(map(len, seen)) == 2 * len(images)


def test_paths_pil_images_and_arrays_are_equivalent(
    predictor: BatchPredictor, images: list[np.ndarray], tmp_path: Path
) -> None:
    array = images[1]
    cv2.imwrite(str(tmp_path / "a.png"), array)
    rgb = np.ascontiguousarray(array[:, :, ::-1])
    given = [array, str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(rgb)]
    # One by one, because a batch may change the order of sums.
    first, *others = (predictor([entry])[0] for entry in given)
    for other in others:
        assert torch.equal(first.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(first.pred_masks, other.pred_masks)
    assert predictor([]) == []
    assert predictor.class_names == ["circle", "square", "triangle"]


def test_threads_do_not_disturb_each_other(
    predictor: BatchPredictor, images: list[np.ndarray]
) -> None:
    alone = [predictor([image])[0] for image in images]
    barrier = threading.Barrier(4)

    def work(number: int) -> list[tuple[int, Instances]]:
        barrier.wait()
        order = [(number + step) % len(images) for step in range(len(images))]
        return [(i, predictor([images[i]])[0]) for i in order]

    with ThreadPoolExecutor(4) as pool:
        for detections in pool.map(work, range(4)):
            for i, instances in detections:
                assert torch.equal(instances.scores, alone[i].scores)
                assert torch.equal(instances.pred_masks, alone[i].pred_masks)


def test_masks_that_are_not_pasted(
    predictor: BatchPredictor, weights: str, images: list[np.ndarray]
) -> None:
    opts = ["MODEL.DEVICE", "cpu"]
    small = BatchPredictor.from_checkpoint(weights, opts=opts, paste=False)([images[5]])[0]
    dense = predictor([images[5]])[0].pred_masks
    assert torch.equal(small.pred_masks.to_tensor(), dense)
    decoded = mask_util.decode(small.pred_masks.rle()).astype(bool)
    assert (decoded.transpose(2, 0, 1) == dense.numpy()).all()


def test_augmentation_equals_detectron2s(
    predictor: BatchPredictor, weights: str, images: list[np.ndarray]
) -> None:
    opts = ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48,)"]
    augmented = BatchPredictor.from_checkpoint(weights, opts=opts)
    ours = augmented([images[1]])[0]
    cfg = read_config(weights, opts=opts)
    tta = GeneralizedRCNNWithTTA(cfg, predictor.model)
    tensor = torch.as_tensor(images[1].transpose(2, 0, 1).copy())
    height, width = images[1].shape[:2]
    with torch.no_grad():
        theirs = tta([{"image": tensor, "height": height, "width": width}])[0]["instances"]
    assert len(ours) > 0 and torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    plain = predictor([images[1]])[0]
    assert len(plain) != len(ours) or not torch.equal(plain.scores, ours.scores)
    augmented._paste = False
    assert torch.equal(augmented([images[1]])[0].pred_masks.to_tensor(), theirs.pred_masks)

    # After an error, detectron2 leaves the mask head switched off.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(GeneralizedRCNNWithTTA, "_get_augmented_boxes", lambda *_: 1 / 0)
        augmented(images[:1])
    assert augmented(images[:1])[0].has("pred_masks")


def test_an_optimized_copy(
    predictor: BatchPredictor, weights: str, images: list[np.ndarray]
) -> None:
    fast = BatchPredictor.from_checkpoint(weights, opts=["MODEL.DEVICE", "cpu"], optimize_to="fp32")
    assert hasattr(fast.model, "optimization_report")
    assert_equal(fast(images[:1])[0], predictor(images[:1])[0])


def test_a_model_without_masks() -> None:
    keypoints = models.build("keypoint").eval()
    resize = ResizeShortestEdge([64, 64], 90)
    predict = BatchPredictor(model=keypoints, resize=resize)
    (detections,) = predict([np.zeros((50, 60, 3), np.uint8)])
    assert detections.image_size == (50, 60) and not detections.has("pred_masks")


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (3, 6000), (1, 1)])
@pytest.mark.parametrize("augment", ["False", "True"])
def test_a_thin_image_does_not_end_the_batch(
    size: tuple[int, int], augment: str, weights: str, images: list[np.ndarray]
) -> None:
    opts = ["MODEL.DEVICE", "cpu", "TEST.AUG.ENABLED", augment, "TEST.AUG.MIN_SIZES", "(48,)"]
    predictor = BatchPredictor.from_checkpoint(weights, opts=[*opts, "TEST.AUG.MAX_SIZE", "1000"])
    thin = np.zeros((*size, 3), np.uint8)
    for predict in (predictor, SlicedPredictor(predictor)):
        before, result, after = predict([images[0], thin, images[0]])
        assert result.image_size == size
        assert torch.equal(before.scores, after.scores) and len(before) > 0


def test_items_that_cannot_be_read_are_counted_if_asked(
    predictor: BatchPredictor, images: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    given = [images[0], tmp_path / "text.jpg", None, images[0], tmp_path / "missing.png"]
    for predict in (predictor, SlicedPredictor(predictor)):
        errors = {}
        results = predict(given, on_error=errors.__setitem__)
        assert list(errors) == [1, 2, 4]
        assert "text.jpg is not an image" in str(errors[1]) and "missing.png" in str(errors[4])
        assert [len(result) > 0 for result in results] == [True, False, False, True, False]
        assert results[1].image_size == (0, 0) and len(results[1].pred_boxes) == 0
        with pytest.raises(UserError, match=r"text\.jpg"):
            predict(given)


def test_few_large_images_are_in_memory_at_a_time(
    predictor: BatchPredictor, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    predict = predictor._predict
    monkeypatch.setattr(
        predictor, "_predict", lambda part: sizes.append(len(part)) or predict(part)
    )
    monkeypatch.setattr(predictor_module, "_PIXELS_AT_A_TIME", 64 * 64)
    results = predictor([images[0], images[4], images[4], images[0]])
    assert sizes == [2, 1, 1] and len(results) == 4


@pytest.mark.slow
@pytest.mark.parametrize("order", ["RGB", "L"])
def test_a_model_of_another_format_predicts_what_it_evaluates(
    order: str, weights: str, tmp_path: Path
) -> None:
    opts = ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", order]
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 60000, (70, 80), dtype=np.uint16)).save(tmp_path / "a.png")
    predictor = BatchPredictor.from_checkpoint(weights, opts=opts)
    sample = SafeDatasetMapper(read_config(weights, opts=opts), is_train=False)(
        {"file_name": str(tmp_path / "a.png"), "height": 70, "width": 80}
    )
    with torch.no_grad():
        evaluated = predictor.model([sample])[0]["instances"]
    (predicted,) = predictor([tmp_path / "a.png"])
    assert len(evaluated) > 0
    # Memory alignment may change the last bits; other pixels would change far more.
    torch.testing.assert_close(predicted.scores, evaluated.scores)
    augmented = BatchPredictor.from_checkpoint(weights, opts=[*opts, "TEST.AUG.ENABLED", "True"])
    assert len(augmented([tmp_path / "a.png"])) == 1


def test_errors_name_the_value(
    predictor: BatchPredictor, weights: str, trained: Path, tmp_path: Path
) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    for argument, message in (
        ("photo.jpg", "a list of images, not a single str"),
        (image, r"not one array of shape \(40, 40, 3\)"),
        ([image, image.astype(float)], "image 1 of the list is an array of float64"),
        ([tmp_path / "none.jpg"], r"none\.jpg does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            predictor(argument)
    with pytest.raises(UserError, match="did you mean"):
        BatchPredictor.from_checkpoint(weights.replace("final", "fnal"))
    bare = {"model": torch.load(weights, weights_only=True)["model"]}
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"contain no config.*--config-file.*config_file"):
        BatchPredictor.from_checkpoint(tmp_path / "bare.pth")
    cfg = load_config(trained / "config.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "-1"])
    with pytest.raises(UserError, match="NUM_CLASSES is -1"):
        cfg.MODEL.WEIGHTS = str(tmp_path / "bare.pth")
        BatchPredictor(cfg)
    cfg.MODEL.WEIGHTS = weights  # its class names are counted
    assert BatchPredictor(cfg).class_names == predictor.class_names
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS is empty"):
        BatchPredictor(cfg)
    for wrong in ({"array_format": "rgb"}, {"batch_size": 0}):  # said before the weights are read
        with pytest.raises(UserError, match=next(iter(wrong))):
            BatchPredictor(cfg, **wrong)
    for key, value, message in (
        ("INPUT.FORMAT", "YUV-BT.601", "INPUT.FORMAT"),
        ("MODEL.ROI_HEADS.NAME", "NoHeads", "not registered"),
    ):
        with pytest.raises(UserError, match=message):
            BatchPredictor.from_checkpoint(weights, opts=[key, value])
    with pytest.raises(UserError, match="array_format"):
        BatchPredictor.from_checkpoint(weights, array_format="GBR")


@pytest.mark.parametrize("names", [3, "cat", None])
def test_class_names_that_are_not_a_list_are_refused(weights: str, names: object) -> None:
    with pytest.raises(UserError, match=f"class_names is {names!r}"):
        BatchPredictor.from_checkpoint(weights, opts=["MODEL.DEVICE", "cpu"], class_names=names)
