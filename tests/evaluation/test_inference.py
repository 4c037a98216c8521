import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import DatasetEvaluator, coco_evaluation
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

import mask_rcnn_plus
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation import (
    InferenceSpeed,
    PreviewWriter,
    build_coco_evaluator,
    run_inference,
)
from mask_rcnn_plus.evaluation.coco_json import instances_to_coco_json
from mask_rcnn_plus.evaluation.speed import Stopwatch, combine
from mask_rcnn_plus.modeling import PastedMasks

CPU = torch.device("cpu")


class Recorder(DatasetEvaluator):
    """Keeps its inputs and outputs."""

    def reset(self) -> None:
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.inputs += inputs
        self.outputs += outputs

    def evaluate(self) -> dict[str, Any]:
        return {"seen": {"images": len(self.inputs)}}


class Clock:
    """Replaces time.perf_counter: time passes only when a test calls spend."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class TimedLoader:
    """Batches that take time to load."""

    def __init__(self, clock: Clock, seconds: list[float], batch_size: int = 1) -> None:
        self.clock, self.seconds, self.batch_size = clock, seconds, batch_size

    def __len__(self) -> int:
        return len(self.seconds)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for i, seconds in enumerate(self.seconds):
            self.clock.spend(seconds)
            yield [{"image_id": i, "file_name": f"{i}.png"}] * self.batch_size


def timed_model(clock: Clock, seconds: float) -> Any:
    def model(batch: Any) -> list[dict]:
        clock.spend(seconds)
        return [{} for _ in batch]

    return model


class TimedEvaluator(DatasetEvaluator):
    def __init__(self, clock: Clock, process: float, evaluate: float) -> None:
        self.clock, self.seconds = clock, (process, evaluate)

    def process(self, inputs: Any, outputs: Any) -> None:
        self.clock.spend(self.seconds[0])

    def evaluate(self) -> None:
        self.clock.spend(self.seconds[1])


@pytest.fixture(scope="module")
def rcnn() -> torch.nn.Module:
    """A Mask R-CNN with random weights that detects something in every image."""
    cfg = mask_rcnn_plus.get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p4", "p5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    torch.manual_seed(0)
    return build_model(cfg)


def images(count: int) -> list[dict[str, Any]]:
    """Model inputs of two sizes; the last one has no output size."""
    generator = torch.Generator().manual_seed(1)
    inputs = [
        {
            "image": torch.randint(0, 256, (3, 64, 64 + 32 * (i % 2)), generator=generator),
            "height": 96,
            "width": 100 + i,
            "file_name": f"{i}.png",
        }
        for i in range(count)
    ]
    del inputs[-1]["height"], inputs[-1]["width"]
    return inputs


def assert_same_outputs(outputs: list[dict], expected: list[dict]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        ours, theirs = output["instances"], other["instances"]
        assert output.keys() == other.keys()
        assert ours.image_size == theirs.image_size
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert len(ours) > 0
        for name, value in ours.get_fields().items():
            value, reference = getattr(value, "tensor", value), theirs.get(name)
            if isinstance(value, PastedMasks):
                value = value.to_tensor()
            assert torch.equal(value, getattr(reference, "tensor", reference)), name


def test_outputs_equal_the_models(rcnn: torch.nn.Module) -> None:
    batches = [images(3), images(2)]
    rcnn.eval()
    with torch.no_grad():
        expected = [output for batch in batches for output in rcnn(batch)]
    recorder = Recorder()
    results, speed = run_inference(rcnn, batches, recorder, dataset_name="set")
    assert_same_outputs(recorder.outputs, expected)
    assert results == {"seen": {"images": 5}}
    assert speed.postprocessing_ms is not None and speed.postprocessing_ms > 0
    # The parts come from hooks on the modules, and no hook remains.
    parts = speed.inference_stages_ms
    expected_parts = {"backbone", "FPN", "RPN head", "proposals", "box pooler", "box head"}
    expected_parts |= {"detections", "mask pooler", "mask head", "other"}
    assert parts.keys() == expected_parts
    assert all(ms > 0 for ms in parts.values())
    assert sum(parts.values()) <= speed.inference_ms
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rcnn.modules())
    assert not recorder.outputs[0]["instances"].scores.requires_grad


def test_masks_are_evaluated_as_in_detectron2(
    rcnn: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_squares(tmp_path, 3)
    record = json.loads((tmp_path / "squares.json").read_text())
    record["categories"].append({"id": 2, "name": "other"})
    (tmp_path / "squares.json").write_text(json.dumps(record))
    name = f"test_inference_masks_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "squares.json"), str(tmp_path))
    batches = [
        [{**image, "image_id": i, "height": 64, "width": 64}] for i, image in enumerate(images(3))
    ]
    try:
        DatasetCatalog.get(name)
        outcomes = {}
        for way in ("lazy", "pasted"):
            folder = tmp_path / way
            coco = build_coco_evaluator(name, output_dir=str(folder), detections_per_image=10)
            evaluators = [coco, PreviewWriter(name, str(folder), num_images=2, score_threshold=0.0)]
            model = rcnn if way == "lazy" else lambda batch: rcnn(batch)
            if way == "pasted":
                rcnn.eval()
            with monkeypatch.context() as patch:
                if way == "lazy":
                    # No mask is pasted into an image.
                    patch.setattr(PastedMasks, "to_tensor", None)
                results, _ = run_inference(model, batches, evaluators, dataset_name=name)
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            outcomes[way] = results, files.pop("coco_instances_results.json"), files
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert repr(outcomes["lazy"][0]) == repr(outcomes["pasted"][0])  # nan included
    assert outcomes["lazy"][1] == outcomes["pasted"][1]
    assert len(json.loads(outcomes["lazy"][1])) > 3
    picture = f"preview_{name}.png"
    assert outcomes["lazy"][2][picture] == outcomes["pasted"][2][picture]


def test_json_equals_detectron2s_byte_for_byte(rcnn: torch.nn.Module) -> None:
    recorder = Recorder()
    run_inference(rcnn, [images(2)], recorder, dataset_name="set")
    rcnn.eval()
    with torch.no_grad():
        pasted = rcnn(images(2))
    for output, other in zip(recorder.outputs, pasted, strict=True):
        for instances in (output["instances"], other["instances"]):
            instances.pred_keypoints = torch.arange(len(instances) * 6.0).reshape(-1, 2, 3)
        ours = json.dumps(instances_to_coco_json(output["instances"], 7))
        assert ours == json.dumps(instances_to_coco_json(other["instances"], 7))
        assert ours == json.dumps(coco_evaluation.instances_to_coco_json(other["instances"], 7))
        # detectron2's own function iterates over the masks.
        theirs = coco_evaluation.instances_to_coco_json(output["instances"], 7)
        assert json.dumps(theirs) == ours


def test_a_model_with_hooks_is_called_as_a_whole(rcnn: torch.nn.Module) -> None:
    batch = images(2)
    rcnn.eval()
    with torch.no_grad():
        expected = rcnn(batch)
    calls = []
    handle = rcnn.register_forward_hook(lambda *_: calls.append(1))
    recorder = Recorder()
    _, speed = run_inference(rcnn, [batch], recorder, dataset_name="set")
    handle.remove()
    assert calls == [1]
    assert speed.postprocessing_ms is None
    assert_same_outputs(recorder.outputs, expected)


def test_a_model_with_its_own_forward_is_called_as_a_whole(
    rcnn: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubling(type(rcnn)):
        def forward(self, batch: Any) -> Any:
            return [{"instances": o["instances"], "more": 1} for o in super().forward(batch)]

    monkeypatch.setattr(rcnn, "__class__", Doubling)
    recorder = Recorder()
    _, speed = run_inference(rcnn, [images(2)], recorder, dataset_name="set")
    assert [output["more"] for output in recorder.outputs] == [1, 1]
    assert speed.postprocessing_ms is None
    assert "in inference" in speed.table()


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_returns_to_its_mode(rcnn: torch.nn.Module, fails: bool) -> None:
    rcnn.train()
    rcnn.backbone.bottom_up.eval()  # a frozen part
    before = {name: module.training for name, module in rcnn.named_modules()}
    assert set(before.values()) == {True, False}
    seen = []

    class Watcher(Recorder):
        def process(self, inputs: Any, outputs: Any) -> None:
            seen.append((any(m.training for m in rcnn.modules()), torch.is_grad_enabled()))
            if fails:
                raise KeyError("x")

    if fails:
        with pytest.raises(RuntimeError):
            run_inference(rcnn, [images(2)], Watcher(), dataset_name="set")
    else:
        run_inference(rcnn, [images(2)], Watcher(), dataset_name="set")
    assert seen == [(False, False)]
    assert {name: module.training for name, module in rcnn.named_modules()} == before
    assert torch.is_grad_enabled()


def test_the_model_can_train_after_an_evaluation(rcnn: torch.nn.Module) -> None:
    run_inference(rcnn, [images(2)], None, dataset_name="set")
    batch = [{"image": torch.zeros(3, 64, 64), "instances": Instances((64, 64))}]
    batch[0]["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8, 50, 50]]))
    batch[0]["instances"].gt_classes = torch.tensor([1])
    rcnn.train()
    rcnn.roi_heads.mask_on = False
    with EventStorage():
        losses = rcnn(batch)
    rcnn.roi_heads.mask_on = True
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in rcnn.parameters())


def test_stages_and_rates_exclude_the_warm_up(clock: Clock) -> None:
    # Five slow batches to warm up, then ten of two images: 0.1 + 0.3 + 0.2 s each.
    loader = TimedLoader(clock, [9.0] * 5 + [0.1] * 10, batch_size=2)
    evaluator = TimedEvaluator(clock, process=0.2, evaluate=6.0)
    results, speed = run_inference(timed_model(clock, 0.3), loader, evaluator, dataset_name="set")
    assert results == {}
    assert speed.images == 20
    assert speed.seconds == pytest.approx(6.0)
    assert speed.images_per_second == pytest.approx(20 / 6)
    assert speed.data_ms == pytest.approx(50)
    assert speed.inference_ms == pytest.approx(150)
    assert speed.postprocessing_ms is None
    # The final scoring is spread over all thirty images.
    assert speed.evaluation_ms == pytest.approx(100 + 6000 / 30)
    assert speed.processes == 1


@pytest.mark.parametrize(
    ("batches", "measured"), [(0, 0), (1, 1), (2, 1), (3, 2), (6, 3), (10, 5), (40, 35)]
)
def test_the_warm_up_is_at_most_half_of_a_small_set(
    clock: Clock, batches: int, measured: int
) -> None:
    loader = TimedLoader(clock, [0.5] * batches)
    _, speed = run_inference(timed_model(clock, 0.5), loader, None, dataset_name="set")
    assert speed.images == measured
    assert speed.images_per_second == pytest.approx(1.0 if measured else 0.0)
    assert speed.data_ms == pytest.approx(500 if measured else 0)
    assert "images/s" in speed.table()


def measured(images: int, seconds: float, *, scoring: float = 0.0, peak: float = 0.0) -> Stopwatch:
    watch = Stopwatch(CPU, all_images=images + 5, scoring_seconds=scoring, peak_memory_mib=peak)
    watch.seconds = {"data": 0.0, "model": seconds, "post": 0.0, "evaluation": 0.0}
    watch.images = images
    return watch


def test_the_slowest_process_determines_the_rate() -> None:
    watches = [
        measured(30, 10.0, scoring=8.0, peak=100.0),
        measured(20, 12.5, peak=700.0),
        measured(0, 0.0),
    ]
    speed = combine(watches, split=True, peak_kind="x", device=CPU)
    assert (speed.images, speed.seconds, speed.processes) == (50, 12.5, 3)
    assert speed.images_per_second == pytest.approx(4.0)
    assert speed.inference_ms == pytest.approx(22500 / 50)
    assert speed.evaluation_ms == pytest.approx(8000 / 65)
    assert speed.peak_memory_mib == 700


def test_cuda_is_synchronised_at_each_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    gpu = torch.device("cuda:1")
    watch = Stopwatch(gpu)
    watch.lap("model")
    assert waits == [gpu, gpu]
    Stopwatch(CPU).lap("model")
    assert len(waits) == 2


def test_table_and_dict_agree() -> None:
    speed = InferenceSpeed(
        images=50,
        seconds=12.5,
        images_per_second=4.0,
        data_ms=10.0,
        inference_ms=150.0,
        postprocessing_ms=30.0,
        evaluation_ms=10.0,
        peak_memory_mib=1234.4,
        peak_memory_kind="GPU memory",
        processes=2,
        device="cuda:0 (H200)",
        inference_stages_ms={"backbone": 100.0, "other": 50.0},
    )
    table = speed.table()
    assert "4.00 images/s (50 images in 12.5 s, 2 processes on cuda:0 (H200))" in table
    assert "peak memory: 1234 MiB (GPU memory)" in table
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if "|" in line}
    assert "150.0 ms" in rows["inference"] and "75 %" in rows["inference"]
    assert "100.0 ms" in rows["- backbone"] and "50 %" in rows["- backbone"]
    assert "30.0 ms" in rows["post-processing"] and "15 %" in rows["post-processing"]
    assert "200.0 ms" in rows["all"]
    assert json.loads(json.dumps(speed.to_dict()))["postprocessing_ms"] == 30.0
    with pytest.raises(AttributeError):
        speed.images = 3  # type: ignore[misc]


def test_peak_memory_on_the_cpu_is_the_process_memory() -> None:
    _, speed = run_inference(lambda batch: [{}], [[{}]], None, dataset_name="set")
    # Python with PyTorch needs a few hundred MiB, and no test needs a TiB.
    assert 100 < speed.peak_memory_mib < 2**20 or math.isnan(speed.peak_memory_mib)
    assert "process" in speed.peak_memory_kind or "not measured" in speed.peak_memory_kind
    assert speed.device.startswith("cpu")


def test_an_error_names_the_image() -> None:
    def model(batch: Any) -> list[dict]:
        if batch[0]["file_name"] == "b.png":
            raise ValueError("no such luck")
        return [{}]

    batches = [[{"file_name": f"{c}.png"}] for c in "abc"]
    with pytest.raises(RuntimeError, match=r"b\.png: ValueError: no such luck") as caught:
        run_inference(model, batches, None, dataset_name="set")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_user_error_stays_a_user_error() -> None:
    def refusing_loader() -> Iterator[list]:
        raise UserError("do that")
        yield

    class Loader(list):
        def __iter__(self) -> Iterator[list]:
            return refusing_loader()

    with pytest.raises(UserError, match=r"^do that$"):
        run_inference(lambda batch: [{}], Loader(), None, dataset_name="set")

    class Refusing(Recorder):
        def process(self, inputs: Any, outputs: Any) -> None:
            raise UserError("do this")

    with pytest.raises(UserError, match=r"^do this$"):
        run_inference(lambda batch: [{}], [[{}]], Refusing(), dataset_name="set")


class Files(torch.utils.data.Dataset):
    """Images by index; the sixth cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            raise OSError("image file is truncated")
        return {"file_name": f"{index}.png"}


def identity(batch: list) -> list:
    return batch


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int) -> None:
    name = f"test_inference_files_{workers}"
    DatasetCatalog.register(name, lambda: [{"file_name": f"/data/{i}.png"} for i in range(8)])
    loader = torch.utils.data.DataLoader(
        Files(), batch_size=2, num_workers=workers, collate_fn=identity
    )
    try:
        with pytest.raises(UserError) as caught:
            run_inference(lambda batch: [{}] * len(batch), loader, None, dataset_name=name)
    finally:
        DatasetCatalog.remove(name)
    message = f"{name}: cannot load /data/4.png or /data/5.png: OSError: image file is truncated"
    assert str(caught.value) == message


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """The log of run_inference."""
    logger = logging.getLogger("mask_rcnn_plus.evaluation.inference")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_progress_without_a_terminal_is_a_line_every_five_seconds(
    clock: Clock, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    loader = TimedLoader(clock, [1.0] * 20)
    run_inference(timed_model(clock, 1.0), loader, None, dataset_name="set")
    # A batch takes 2 s, so the fifth second passes in the batches 3, 6, 9, ...
    progress = [line for line in lines if "ETA" in line]
    assert [line.split(" batches")[0] for line in progress] == [
        f"set: {done}/20" for done in (3, 6, 9, 12, 15, 18)
    ]
    assert progress[0] == "set: 3/20 batches, 0.5 images/s, ETA 0:00:34"
    assert progress[-1].endswith("ETA 0:00:04")
    assert sys.stderr.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    run_inference(lambda batch: [{}], [[{}]] * 4, None, dataset_name="nuclei_val")
    shown = sys.stderr.getvalue()
    assert "nuclei_val: " in shown and "4/4" in shown and "images/s" in shown
    assert not any("ETA" in line for line in lines)

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    run_inference(lambda batch: [{}], [[{}]] * 4, None, dataset_name="nuclei_val")
    assert sys.stderr.getvalue() == ""


def write_squares(folder: Path, count: int) -> None:
    """Images of one square each, in COCO format."""
    annotations = []
    for i in range(count):
        image = np.zeros((64, 64, 3), np.uint8)
        x, size = 4 + 3 * i, 20 + 2 * i
        image[8 : 8 + size, x : x + size] = 200
        Image.fromarray(image).save(folder / f"{i}.png")
        square = [x, 8, x + size, 8, x + size, 8 + size, x, 8 + size]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 1,
                "bbox": [x, 8, size, size],
                "segmentation": [square],
                "area": size * size,
                "iscrowd": 0,
            }
        )
    record = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(count)
        ],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": annotations,
    }
    (folder / "squares.json").write_text(json.dumps(record))


def find_squares(batch: list[dict[str, Any]]) -> list[dict[str, Instances]]:
    """A model with exact boxes on even images and boxes off by a few pixels on odd images."""
    outputs = []
    for image in batch:
        i = image["image_id"]
        x, size = 4 + 3 * i, 20 + 2 * i
        instances = Instances((64, 64))
        box = torch.tensor([[x, 8.0, x + size, 8 + size]]) + 4 * (i % 2)
        instances.pred_boxes = Boxes(box)
        instances.pred_classes = torch.tensor([0])
        instances.scores = torch.tensor([0.9 - i / 20])
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        x0, y0, x1, y1 = box[0].int().tolist()
        mask[0, y0:y1, x0:x1] = True
        instances.pred_masks = mask
        outputs.append({"instances": instances})
    return outputs


def evaluate_squares(folder: Path, output: Path) -> None:
    """One process of an evaluation of the squares; writes its results as JSON."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    name = f"test_inference_{folder.name}"
    register_coco_instances(name, {}, str(folder / "squares.json"), str(folder))
    records = DatasetCatalog.get(name)
    loader = torch.utils.data.DataLoader(
        records, batch_size=1, sampler=InferenceSampler(len(records)), collate_fn=identity
    )
    coco = build_coco_evaluator(name, output_dir=None, detections_per_image=10)
    writer = PreviewWriter(name, str(output), num_images=2)
    results, speed = run_inference(find_squares, loader, [coco, writer], dataset_name=name)
    output.mkdir(exist_ok=True)
    outcome = {"results": results, "processes": speed.processes, "images": speed.images}
    (output / f"rank{rank}.json").write_text(json.dumps(outcome))
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def _worker(rank: int, rendezvous: str, folders: list[Path], outputs: list[Path]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    for folder, output in zip(folders, outputs, strict=True):
        evaluate_squares(folder, output)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    # With a single image, the second process has no image.
    folders = [tmp_path / "five", tmp_path / "one"]
    for folder, count in zip(folders, (5, 1), strict=True):
        folder.mkdir()
        write_squares(folder, count)
        evaluate_squares(folder, tmp_path / f"{folder.name}_alone")
    outputs = [tmp_path / f"{folder.name}_both" for folder in folders]
    arguments = (str(tmp_path / "rendezvous"), folders, outputs)
    # Forked processes need no slow imports.
    torch.multiprocessing.start_processes(_worker, arguments, nprocs=2, start_method="fork")
    for folder, output in zip(folders, outputs, strict=True):
        alone = json.loads((tmp_path / f"{folder.name}_alone" / "rank0.json").read_text())
        main, other = (json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert set(alone["results"]) == {"bbox", "segm"}
        for task, metrics in alone["results"].items():
            assert main["results"][task] == pytest.approx(metrics, nan_ok=True)
        assert other["results"] == {}
        assert main["processes"] == other["processes"] == 2
        assert main["images"] == other["images"] > 0
        (picture,) = output.glob("preview_*.png")
        (expected,) = (tmp_path / f"{folder.name}_alone").glob("preview_*.png")
        assert picture.read_bytes() == expected.read_bytes()
    assert 20 < alone["results"]["bbox"]["AP"] <= 100
