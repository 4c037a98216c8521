import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import COCOEvaluator, build_coco_evaluator
from mask_rcnn_plus.evaluation import coco as coco_module
from mask_rcnn_plus.evaluation.metrics import accumulate, complete_ground_truth, read_summary

SIDE = 256  # of every image
Register = Callable[..., str]


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Register]:
    """Writes a COCO file of (image, category, (x, y, w, h)[, other keys]) and registers it."""
    names = []

    def _register(objects: list, categories: dict[int, str], images: int = 1, **top: Any) -> str:
        annotations = []
        for image, category, (x, y, w, h), *rest in objects:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": category,
                "bbox": [x, y, w, h],
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "area": w * h,
                "iscrowd": 0,
                **(rest[0] if rest else {}),
            }
            annotations.append({k: v for k, v in annotation.items() if v is not None})
        record = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
                for i in range(1, images + 1)
            ],
            "categories": [{"id": k, "name": v} for k, v in categories.items()],
            "annotations": annotations,
            **top,
        }
        name = f"test_coco_{tmp_path.name}_{len(names)}"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        DatasetCatalog.get(name)  # fills in the classes, as building a test loader does
        names.append(name)
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The evaluator's log, even if an earlier test has detached its logger from the root."""
    logger = logging.getLogger("mask_rcnn_plus.evaluation.coco")
    before = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.level, logger.propagate = before


def make_output(
    objects: list[tuple[int, tuple, float]], *, masks: bool = True
) -> dict[str, Instances]:
    """A model's output from (contiguous class, (x, y, w, h), score); masks equal the boxes."""
    instances = Instances((SIDE, SIDE))
    boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.pred_classes = torch.tensor([k for k, _, _ in objects], dtype=torch.int64)
    instances.scores = torch.tensor([score for _, _, score in objects])
    if masks:
        stack = torch.zeros(len(objects), SIDE, SIDE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(stack, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_masks = stack
    return {"instances": instances}


def evaluate(evaluator: COCOEvaluator, *outputs: dict[str, Instances]) -> dict[str, dict]:
    """The metrics for the outputs on images 1, 2, ..."""
    evaluator.reset()
    evaluator.process([{"image_id": i + 1} for i in range(len(outputs))], outputs)
    return evaluator.evaluate()


def assert_same(first: dict[str, dict], second: dict[str, dict]) -> None:
    assert first.keys() == second.keys()
    for task, metrics in first.items():
        assert metrics == pytest.approx(second[task], nan_ok=True, abs=1e-9)


def random_scene(
    register: Register, *, per_image: int, images: int = 4
) -> tuple[str, list[dict[str, Instances]]]:
    """Three classes with non-contiguous ids, and noisy detections of most objects."""
    rng = np.random.default_rng(7)
    ids = [3, 44, 90]
    objects, outputs = [], []
    for image in range(1, images + 1):
        sides = rng.integers(6, 120, (per_image, 2))
        corners = (rng.random((per_image, 2)) * (SIDE - sides)).astype(int)
        boxes = np.hstack([corners, sides])
        classes = rng.integers(0, 3, per_image)
        objects += [
            (image, ids[k], tuple(map(int, box))) for k, box in zip(classes, boxes, strict=True)
        ]
        noisy = (boxes + rng.normal(0, 4, boxes.shape)).round().clip(1, SIDE)
        noisy[:, 2:] = np.minimum(noisy[:, 2:], SIDE - noisy[:, :2]).clip(1)
        flipped = np.where(rng.random(per_image) < 0.1, rng.integers(0, 3, per_image), classes)
        outputs.append(
            make_output(
                [
                    (int(k), tuple(map(float, box)), float(score))
                    for k, box, score in zip(flipped, noisy, rng.random(per_image), strict=True)
                    if rng.random() < 0.8
                ]
            )
        )
    return register(objects, dict(zip(ids, "abc", strict=True)), images), outputs


def pycocotools_stats(name: str, outputs: list, task: str, limit: int = 100) -> np.ndarray:
    """AP, AP50, AP75, APs, APm, APl from pycocotools, by its documentation, in percent."""
    truth = COCO(MetadataCatalog.get(name).json_file)
    category = {
        v: k for k, v in MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.items()
    }
    results = []
    for image, output in enumerate(outputs, 1):
        instances = output["instances"]
        for i in range(len(instances)):
            x0, y0, x1, y1 = instances.pred_boxes.tensor[i].tolist()
            result = {
                "image_id": image,
                "category_id": category[int(instances.pred_classes[i])],
                "score": float(instances.scores[i]),
            }
            if task == "bbox":
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                mask = np.asfortranarray(instances.pred_masks[i].numpy().astype(np.uint8))
                result["segmentation"] = mask_util.encode(mask)
            results.append(result)
    coco_eval = COCOeval(truth, truth.loadRes(results), task)
    # Three equal limits: summarize looks for 100 and then reads the last one.
    coco_eval.params.maxDets = [1, 10, 100] if limit == 100 else [limit] * 3
    coco_eval.evaluate()
    coco_eval.accumulate()
    if limit == 100:
        coco_eval.summarize()
        return 100 * coco_eval.stats[:6]
    p = coco_eval.eval["precision"][..., -1]  # T x S x K x A
    parts = [p[..., 0], p[0, ..., 0], p[5, ..., 0], p[..., 1], p[..., 2], p[..., 3]]
    return np.array([100 * part[part > -1].mean() for part in parts])


def test_metrics_calculated_by_hand(register: Register) -> None:
    name = register([(1, 1, (10, 10, 20, 20)), (1, 1, (100, 100, 100, 100))], {1: "a"})
    results = evaluate(COCOEvaluator(name), make_output([(0, (100, 100, 100, 100), 0.9)]))
    # Precision is 1 at the 51 of 101 recall thresholds up to a half, then 0.
    half = 100 * 51 / 101
    for task in ("bbox", "segm"):
        metrics = results[task]
        assert [metrics[k] for k in ("AP", "AP50", "AP75")] == pytest.approx([half] * 3)
        assert (metrics["APs"], metrics["APl"]) == pytest.approx((0, 100))
        assert math.isnan(metrics["APm"])


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("fast", [True, False])
def test_equals_pycocotools(register: Register, task: str, fast: bool) -> None:
    name, outputs = random_scene(register, per_image=15)
    results = evaluate(COCOEvaluator(name, use_fast_impl=fast), *outputs)[task]
    expected = pycocotools_stats(name, outputs, task)
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [results[k] for k in keys] == pytest.approx(expected, abs=1e-9)
    assert 5 < results["AP"] < 95
    assert results["AP"] == pytest.approx(np.mean([results[f"AP-{k}"] for k in "abc"]))


GRID = [(16 * column, 16 * row, 10, 10) for row in range(10) for column in range(15)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    # 100 of 150 objects reach a recall of 2/3: precision is 1 at the thresholds 0, 0.01, ..., 0.66.
    [(None, 100 * 67 / 101), (50, 100 * 67 / 101), (100, 100 * 67 / 101), (150, 100), (-1, 100)],
)
def test_the_limit_can_rise_above_100_but_not_fall_below(
    register: Register, limit: int | None, expected: float
) -> None:
    assert len(GRID) == 150
    name = register([(1, 1, box) for box in GRID], {1: "a"})
    output = make_output([(0, box, 0.5 + i / 1000) for i, box in enumerate(GRID)])
    results = evaluate(COCOEvaluator(name, max_dets_per_image=limit), output)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(expected)
        assert results[task]["APs"] == pytest.approx(expected)


def test_equals_pycocotools_above_100_detections(register: Register) -> None:
    name, outputs = random_scene(register, per_image=400, images=1)
    raised = evaluate(COCOEvaluator(name, max_dets_per_image=300), *outputs)["bbox"]
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    expected = pycocotools_stats(name, outputs, "bbox", limit=300)
    assert [raised[k] for k in keys] == pytest.approx(expected, abs=1e-9)
    assert raised["AP"] > evaluate(COCOEvaluator(name), *outputs)["bbox"]["AP"] + 1


def test_evaluate_can_be_called_again(register: Register, tmp_path: Path) -> None:
    name, outputs = random_scene(register, per_image=8)
    before = copy.deepcopy(outputs)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    first = evaluate(evaluator, *outputs)
    predictions = copy.deepcopy(evaluator._predictions)
    written = (tmp_path / "out" / "coco_instances_results.json").read_text()
    assert_same(evaluator.evaluate(), first)
    assert evaluator._predictions == predictions
    assert (tmp_path / "out" / "coco_instances_results.json").read_text() == written
    assert {d["category_id"] for d in json.loads(written)} == {3, 44, 90}
    for output, original in zip(outputs, before, strict=True):
        torch.testing.assert_close(
            output["instances"].pred_boxes.tensor, original["instances"].pred_boxes.tensor
        )


def test_the_caller_may_change_the_results(register: Register) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "a"})
    evaluator = COCOEvaluator(name)
    evaluate(evaluator, make_output([(0, (10, 10, 20, 20), 0.9)]))["bbox"]["AP"] = -5
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_no_detections_score_zero_for_classes_with_objects(register: Register, log: Any) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "cat", 2: "dog"})
    results = evaluate(COCOEvaluator(name), make_output([]))
    for task in ("bbox", "segm"):
        zeros = {k for k, v in results[task].items() if v == 0}
        nans = {k for k, v in results[task].items() if math.isnan(v)}
        assert zeros == {"AP", "AP50", "AP75", "APs", "AP-cat"}
        assert nans == {"APm", "APl", "AP-dog"}
    assert "found nothing" in log.text


def test_without_images_the_ground_truth_determines_the_tasks(register: Register) -> None:
    masked = register([(1, 1, (10, 10, 20, 20))], {1: "a"})
    bare = register([(1, 1, (10, 10, 20, 20), {"segmentation": None})], {1: "a"})
    assert {k: v["AP"] for k, v in evaluate(COCOEvaluator(masked)).items()} == {
        "bbox": 0,
        "segm": 0,
    }
    assert {k: v["AP"] for k, v in evaluate(COCOEvaluator(bare)).items()} == {"bbox": 0}


def test_a_box_model_that_finds_nothing_gets_no_mask_metrics(register: Register) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "a"})
    assert evaluate(COCOEvaluator(name), make_output([], masks=False)).keys() == {"bbox"}


def test_each_nan_is_explained(register: Register, log: Any) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "cat", 2: "dog", 5: "emu"})
    evaluate(COCOEvaluator(name), make_output([(0, (10, 10, 20, 20), 0.9)], masks=False))
    assert "APm is nan: the ground truth has no object with a medium area" in log.text
    assert "APl is nan: the ground truth has no object with a large area" in log.text
    assert "APs is nan" not in log.text
    assert "AP is nan for classes without an object in the ground truth: dog, emu" in log.text


def test_a_ground_truth_with_only_crowds_is_explained(register: Register, log: Any) -> None:
    name = register([(1, 1, (10, 10, 20, 20), {"iscrowd": 1})], {1: "a"})
    results = evaluate(COCOEvaluator(name), make_output([(0, (10, 10, 20, 20), 0.9)], masks=False))
    assert all(map(math.isnan, results["bbox"].values()))
    assert "the ground truth has no object with a box (crowds do not count)" in log.text


def test_no_reason_if_all_metrics_are_defined(register: Register, log: Any) -> None:
    boxes = [(10, 10, 20, 20), (40, 40, 50, 50), (100, 100, 120, 120)]
    name = register([(1, 1, box) for box in boxes], {1: "a"})
    evaluate(COCOEvaluator(name), make_output([(0, box, 0.9) for box in boxes]))
    assert "nan" not in log.text


def test_logs_the_tables_of_boxes_masks_and_classes(register: Register, log: Any) -> None:
    name, outputs = random_scene(register, per_image=5)
    results = evaluate(COCOEvaluator(name, max_dets_per_image=300), *outputs)
    for task in ("bbox", "segm"):
        ap = results[task]["AP"]
        line = f"@[ IoU=0.50:0.95 | area=   all | maxDets=300 ] = {ap / 100:.3f}"
        assert f" Average Precision  (AP) {line}" in log.text
        assert f"{ap:.3f}" in log.text
        assert f"{results[task]['AP-b']:.3f}" in log.text
    assert log.text.count("Average Recall     (AR)") == 12
    assert log.text.count("\n| class") == 2


def test_logs_the_lines_that_pycocotools_prints(
    register: Register, log: Any, capsys: pytest.CaptureFixture
) -> None:
    name, outputs = random_scene(register, per_image=15)
    evaluate(COCOEvaluator(name, ("bbox",)), *outputs)
    capsys.readouterr()
    pycocotools_stats(name, outputs, "bbox")
    expected = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert len(expected) == 12
    assert [line for line in log.text.splitlines() if "@[" in line] == expected


def test_one_class_needs_no_table_of_classes(register: Register, log: Any) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "a"})
    results = evaluate(COCOEvaluator(name), make_output([(0, (10, 10, 20, 20), 0.9)]))
    assert "| class" not in log.text
    assert not any(key.startswith("AP-") for key in results["bbox"])


def test_the_size_of_a_mask_is_its_pixels_not_its_box(register: Register) -> None:
    # Frames 100 pixels wide and one pixel thick have large boxes and small masks.
    frames = np.zeros((2, SIDE, SIDE), np.uint8)
    for frame, at in zip(frames, (20, 140), strict=True):
        frame[at : at + 100, at : at + 100] = 1
        frame[at + 1 : at + 99, at + 1 : at + 99] = 0
    rle = mask_util.encode(np.asfortranarray(frames[0]))
    rle["counts"] = rle["counts"].decode()
    label = {"segmentation": rle, "area": int(frames[0].sum())}
    name = register([(1, 1, (20, 20, 100, 100), label)], {1: "a"})
    output = make_output([(0, (20, 20, 100, 100), 0.5), (0, (140, 140, 100, 100), 0.9)])
    output["instances"].pred_masks = torch.from_numpy(frames.astype(bool))
    results = evaluate(COCOEvaluator(name), output)["segm"]
    # The second detection is wrong and has the higher score. It is small too: precision 1/2.
    assert results["APs"] == pytest.approx(50)
    assert math.isnan(results["APl"])


@pytest.mark.parametrize("fast", [True, False])
def test_completes_hand_written_files(register: Register, fast: bool) -> None:
    full = register([(1, 1, (10, 10, 40, 40))], {1: "a"})
    short = register([(1, 1, (10, 10, 40, 40), {"iscrowd": None, "area": None})], {1: "a"})
    output = make_output([(0, (10, 10, 40, 40), 0.9)])
    expected = evaluate(COCOEvaluator(full, use_fast_impl=fast), output)
    assert expected["segm"]["APm"] == pytest.approx(100)
    assert_same(evaluate(COCOEvaluator(short, use_fast_impl=fast), output), expected)


def test_without_mask_labels_boxes_are_still_scored(register: Register, log: Any) -> None:
    name = register([(1, 1, (10, 10, 20, 20), {"segmentation": None})], {1: "a"})
    results = evaluate(COCOEvaluator(name), make_output([(0, (10, 10, 20, 20), 0.9)]))
    assert results.keys() == {"bbox"}
    assert "No segm AP: no object of" in log.text


def test_refuses_mask_labels_of_only_some_objects(register: Register) -> None:
    bare = (1, 1, (60, 60, 20, 20), {"segmentation": None})
    name = register([(1, 1, (10, 10, 20, 20)), bare], {1: "a"})
    with pytest.raises(UserError, match=r"no segmentation: 1 \(the first has id 2\)"):
        evaluate(COCOEvaluator(name), make_output([]))


def test_refuses_a_class_that_the_data_set_lacks(register: Register) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "a", 7: "b"})
    with pytest.raises(UserError, match=r"predicted class 2, .* has 2 classes"):
        evaluate(COCOEvaluator(name), make_output([(2, (10, 10, 20, 20), 0.9)]))


def test_refuses_images_that_the_ground_truth_lacks(register: Register) -> None:
    name = register([(1, 1, (10, 10, 20, 20))], {1: "a"})
    with pytest.raises(UserError, match="image id 2 has predictions"):
        evaluate(COCOEvaluator(name), *[make_output([(0, (10, 10, 20, 20), 0.9)])] * 2)


def test_scores_only_the_given_images_and_tasks(register: Register) -> None:
    box = (10, 10, 20, 20)
    name = register([(1, 1, box), (2, 1, box)], {1: "a"}, images=2)
    evaluator = COCOEvaluator(name, ("bbox",))
    assert evaluate(evaluator, make_output([(0, box, 0.9)]), make_output([]))["bbox"]["AP"] < 60
    assert evaluator.evaluate(img_ids=[1])["bbox"]["AP"] == pytest.approx(100)
    assert evaluator.evaluate().keys() == {"bbox"}


def test_without_annotations_writes_the_predictions(register: Register, tmp_path: Path) -> None:
    name = register([], {1: "a"}, annotations=None)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    assert evaluate(evaluator, make_output([(0, (10, 10, 20, 20), 0.75)])) == {}
    (written,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert (written["bbox"], written["score"]) == ([10, 10, 20, 20], 0.75)


def test_gathers_from_all_processes(
    register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, outputs = random_scene(register, per_image=6)
    for output in outputs:
        output["instances"].remove("pred_masks")
    expected = evaluate(COCOEvaluator(name), *outputs)
    assert expected.keys() == {"bbox"}

    # Three processes; the last one saw no image.
    parts = []
    for start, stop in ((0, 1), (1, 4), (4, 4)):
        part = COCOEvaluator(name)
        part.process([{"image_id": i + 1} for i in range(start, stop)], outputs[start:stop])
        parts.append((part._predictions, part._predicted))
    monkeypatch.setattr(coco_module.comm, "gather", lambda data, dst: parts)
    assert_same(COCOEvaluator(name).evaluate(), expected)

    monkeypatch.setattr(coco_module.comm, "is_main_process", lambda: False)
    elsewhere = COCOEvaluator(name, output_dir=str(tmp_path / "elsewhere"))
    assert elsewhere.evaluate() == {}
    assert not (tmp_path / "elsewhere").exists()
    alone = COCOEvaluator(name, distributed=False)
    assert_same(evaluate(alone, *outputs), expected)


def keypoint_output(boxes: list, points: torch.Tensor) -> dict[str, Instances]:
    output = make_output([(0, box, 0.9 - i / 10) for i, box in enumerate(boxes)], masks=False)
    output["instances"].pred_keypoints = points
    return output


@pytest.fixture
def people(register: Register) -> tuple[str, list, torch.Tensor]:
    """Two people with three keypoints each, after a tree without keypoints."""
    boxes = [(10, 10, 100, 100), (130, 130, 100, 100)]
    labels = [[x + 10, y + 10, 2, x + 50, y + 50, 2, x + 90, y + 90, 1] for x, y, _, _ in boxes]
    people = [(1, 1, box, {"keypoints": points}) for box, points in zip(boxes, labels, strict=True)]
    name = register([(1, 2, (0, 0, 5, 5)), *people], {1: "person", 2: "tree"})
    # Labels are pixel indices and predictions continuous coordinates, half a pixel apart.
    predicted = torch.tensor(labels, dtype=torch.float32).reshape(2, 3, 3)
    predicted[..., :2] += 0.5
    return name, boxes, predicted


def test_keypoints(people: tuple, log: Any) -> None:
    name, boxes, points = people
    output = keypoint_output(boxes, points)
    before = points.clone()
    evaluator = COCOEvaluator(name, kpt_oks_sigmas=(0.1, 0.1, 0.1))
    results = evaluate(evaluator, output)
    assert results["keypoints"]["AP"] == pytest.approx(100)
    assert results["keypoints"]["AP-person"] == pytest.approx(100)
    assert "APs" not in results["keypoints"]
    assert "No small" not in log.text and "maxDets= 20" in log.text
    assert_same(evaluator.evaluate(), results)
    torch.testing.assert_close(output["instances"].pred_keypoints, before)


def test_keypoints_are_scored_with_the_given_sigmas(people: tuple) -> None:
    name, boxes, points = people
    moved = points.clone()
    moved[..., 0] += 10
    # OKS = exp(-d^2 / (2 area (2 sigma)^2)): d = 10, area = 10^4, so exp(-1 / (800 sigma^2)).
    # sigma 0.05: 0.61, above 3 of the 10 thresholds from 0.5 to 0.95; sigma 0.1: 0.88, above 8.
    for sigma, expected in ((0.05, 30), (0.1, 80)):
        evaluator = COCOEvaluator(name, kpt_oks_sigmas=[sigma] * 3)
        results = evaluate(evaluator, keypoint_output(boxes, moved))["keypoints"]
        assert results["AP"] == pytest.approx(expected)


def test_refuses_keypoints_before_the_inference(people: tuple) -> None:
    name, boxes, points = people
    batch = [{"image_id": 1}]
    with pytest.raises(UserError, match=r"has 0 values .* has 3 keypoints: give 3"):
        COCOEvaluator(name).process(batch, [keypoint_output(boxes, points)])
    with pytest.raises(UserError, match=r"predicts 2 keypoints, .* has 3"):
        COCOEvaluator(name).process(batch, [keypoint_output(boxes, points[:, :2])])


def test_proposals(register: Register) -> None:
    boxes = [(10, 10, 20, 20), (100, 100, 100, 100)]
    name = register([(1, 1, box) for box in boxes], {1: "a"})
    proposals = Instances((SIDE, SIDE))
    proposals.proposal_boxes = Boxes(torch.tensor([[100.0, 100, 200, 200], [0, 0, 9, 9]]))
    proposals.objectness_logits = torch.tensor([0.3, 0.1])
    results = evaluate(COCOEvaluator(name), {"proposals": proposals})
    assert results.keys() == {"box_proposals"}
    assert results["box_proposals"]["AR@100"] == pytest.approx(50)
    assert results["box_proposals"]["ARl@100"] == pytest.approx(100)
    assert results["box_proposals"]["ARs@100"] == pytest.approx(0)


def test_factory(register: Register, tmp_path: Path) -> None:
    name = register([(1, 1, box) for box in GRID], {1: "a"})
    evaluator = build_coco_evaluator(
        name, output_dir=str(tmp_path / "out"), detections_per_image=200
    )
    output = make_output([(0, box, 0.5) for box in GRID])
    assert evaluate(evaluator, output)["segm"]["AP"] == pytest.approx(100)
    assert (tmp_path / "out" / "instances_predictions.pth").exists()


def band(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask within a distance of its outline or the image's edge."""
    padded = np.pad(mask, width)
    kept = mask.copy()
    for dy in range(2 * width + 1):
        for dx in range(2 * width + 1):
            kept &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return mask & ~kept


def test_boundary_ap_equals_the_papers_definition(register: Register) -> None:
    # 2 % of the diagonal of 256 x 256 is 7 pixels. The squares are 80 x 80, 3 pixels apart.
    truth, moved = np.zeros((2, SIDE, SIDE), bool)
    truth[100:180, 100:180] = True
    moved[100:180, 103:183] = True
    first, second = band(truth, 7), band(moved, 7)
    assert first.sum() == 80 * 80 - 66 * 66
    iou = (first & second).sum() / (first | second).sum()
    assert 0.6 < iou < 0.65 and 0.9 < 77 / 83 < 0.95  # 77 / 83 is the IoU of the masks
    name = register([(1, 1, (100, 100, 80, 80)), (1, 1, (0, 0, 9, 9))], {1: "a"})
    results = evaluate(
        COCOEvaluator(name, boundary=True), make_output([(0, (103, 100, 80, 80), 0.9)])
    )
    # One of two objects is found: 51 of 101 recall thresholds, at 3 of 10 IoUs (masks: 9 of 10).
    assert results["boundary"]["AP"] == pytest.approx(100 * 51 / 101 * 3 / 10)
    assert results["segm"]["AP"] == pytest.approx(100 * 51 / 101 * 9 / 10)
    assert evaluate(COCOEvaluator(name, boundary=True), make_output([]))["boundary"]["AP"] == 0


@pytest.mark.parametrize("odd", [-1, 2**53 + 1])
def test_ids_unsupported_for_boundaries_do_not_affect_other_tasks(
    register: Register, log: pytest.LogCaptureFixture, odd: int
) -> None:
    name = register([(1, odd, (10, 10, 20, 20))], {odd: "a"})
    results = evaluate(
        COCOEvaluator(name, boundary=True), make_output([(0, (10, 10, 20, 20), 0.9)])
    )
    assert f"No boundary AP: 1 of the 2 ids of images and categories of {name}" in log.text
    assert str(odd) in log.text
    assert set(results) == {"bbox", "segm"} and results["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("area", [None, "x", math.nan, -1, []])
def test_null_in_the_ground_truth_has_a_meaning(area: Any) -> None:
    truth = COCO()
    square = [[2.0, 2, 12, 2, 12, 12, 2, 12]]
    truth.dataset = {
        "images": [{"id": 1, "height": 20, "width": 20}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "iscrowd": None,
             "area": area, "segmentation": square}
        ],
    }  # fmt: skip
    truth.createIndex()
    complete_ground_truth(truth)
    assert (truth.anns[1]["iscrowd"], truth.anns[1]["area"]) == (0, 100)
    detection = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "score": 1.0}
    scores = accumulate(truth, [detection], "bbox", max_dets=(1, 10, 100))
    assert scores.eval["precision"][0, :, 0, 0, -1].min() > 0.999


def test_summary_has_all_metrics_of_all_classes(register: Register, tmp_path: Path) -> None:
    name = register(
        [(1, 1, (10, 10, 20, 20)), (1, 1, (100, 100, 100, 100)), (1, 2, (50, 50, 40, 40))],
        {1: "a", 2: 'b, "c"', 7: "d"},
    )
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), max_dets_per_image=150)
    evaluate(evaluator, make_output([(0, (100, 100, 100, 100), 0.9), (1, (0, 0, 9, 9), 0.5)]))
    rows = {(r["task"], r["class"]): r for r in read_summary(tmp_path / "summary.csv")}
    half = pytest.approx(100 * 51 / 101)
    a = rows["bbox", "a"]
    assert (a["AP"], a["AP50"], a["AP75"], a["ARmax"]) == (half, half, half, 50)
    assert (a["APs"], a["APl"], a["ARs"], a["ARl"]) == (0, 100, 0, 100)
    assert math.isnan(a["APm"]) and math.isnan(rows["segm", "d"]["AP"])
    assert (a["objects"], a["detections"], a["max_dets"], a["class_id"]) == (2, 1, 150, "1")
    everything = rows["segm", "all"]
    assert everything["AP"] == pytest.approx(50 * 51 / 101)
    assert (everything["objects"], everything["detections"], rows["segm", 'b, "c"']["AP"]) == (
        3,
        2,
        0,
    )
