"""The model benchmark's measurements: inference, training, sweeps, agreement and AP."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.harness import alternate, peak_memory
from benchmarks.model_implementations import Implementation, Inputs, our_config, set_limits
from mask_rcnn_plus.data.build import build_test_batches
from mask_rcnn_plus.data.draws import seed_all
from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.steps import Steps
from mask_rcnn_plus.evaluation import build_coco_evaluator, run_inference
from mask_rcnn_plus.evaluation.stages import StageTimer

FORWARD, BACKWARD, OPTIMIZER, DATA = "forward", "backward", "optimiser", "data"
# What a sweep varies -> its values.
SWEEPS = {"batch": (1, 2, 4, 6, 8), "detections": (1, 50, 100, 200, 300)}
_SWEEP_REPEATS = 3
# Detections of one class whose boxes overlap less are different objects.
_SAME_OBJECT_IOU = 0.5

Stages = dict[str, float]


@dataclass
class InferenceRow:
    """Measurements of one implementation at inference.

    Attributes:
        side: the implementation's name.
        stages: median milliseconds per batch of each stage.
        total: median milliseconds per batch.
        images_per_second: at the median time.
        peak_mib: memory beyond what was in use; None if unknown.
        detections: per image, on average.
        agreement: with the first implementation.
    """

    side: str
    stages: Stages
    total: float
    images_per_second: float
    peak_mib: float | None
    detections: float
    agreement: dict[str, float | int | None]


@dataclass
class TrainingRow:
    """Measurements of one implementation in training.

    Attributes:
        side: the implementation's name.
        stages: median milliseconds per step of each stage. ``DATA`` is the time in which one
            process loads a batch; it is not in the total, since loaders work beside the training.
        total: median milliseconds per step.
        images_per_second: at the median time.
        peak_mib: memory beyond what was in use; None if unknown.
        losses: of all steps; all implementations start from the same weights and seeds.
        loss_difference: mean relative difference of the losses from the first implementation's.
    """

    side: str
    stages: Stages
    total: float
    images_per_second: float
    peak_mib: float | None
    losses: list[float]
    loss_difference: float


@torch.no_grad()
def measure_inference(
    implementations: Sequence[Implementation],
    batches: Sequence[Inputs],
    *,
    repeats: int,
    device: str,
) -> list[InferenceRow]:
    """Runs the implementations alternately.

    Args:
        implementations: the others are compared with the first.
        batches: of the same size; each turn uses the next one.
        repeats: timed turns.
        device: where the implementations run.
    """
    # These calls are the warm-up too.
    results = {i.name: [i.detect(batch) for batch in batches] for i in implementations}

    def timed(implementation: Implementation) -> Callable[[int], Stages]:
        return lambda turn: implementation.timed_detect(batches[turn % len(batches)])[1]

    runs = {i.name: timed(i) for i in implementations}
    times = alternate(runs, turns=repeats, warm_ups=0, label="inference")
    return [
        InferenceRow(
            **_summary(name, times[name], runs[name], images=len(batches[0]), device=device),
            detections=statistics.fmean(len(one) for batch in results[name] for one in batch),
            agreement=_agreement(results[implementations[0].name], results[name]),
        )
        for name in runs
    ]


def measure_training(
    cfg: CfgNode,
    model: nn.Module,
    batches: Sequence[Inputs],
    *,
    dtypes: Sequence[str],
    repeats: int,
    device: str,
    data_ms: tuple[float, float],
) -> list[TrainingRow]:
    """Runs training steps of detectron2 and of ours alternately.

    Args:
        cfg: detectron2's.
        model: detectron2's, with the weights that all implementations start from.
        batches: mapped samples with ground truth; each step uses the next one.
        dtypes: of ours: "fp32" or the dtype of mixed precision.
        repeats: timed steps of each implementation.
        device: where to run.
        data_ms: milliseconds of loading a batch, by detectron2's mapper and by ours.
    """
    steppers = {"stock fp32": _stock_stepper(cfg, model, device)}
    steppers |= {f"ours {dtype}": _our_stepper(cfg, model, dtype, device) for dtype in dtypes}
    losses: dict[str, list[float]] = {name: [] for name in steppers}

    def timed(name: str, stepper: _Stepper) -> Callable[[int], Stages]:
        def measure_turn(turn: int) -> Stages:
            with stepper.timer.running() as stages:
                losses[name].append(stepper.step(batches[turn % len(batches)], turn))
            return stages

        return measure_turn

    runs = {name: timed(name, stepper) for name, stepper in steppers.items()}
    times = alternate(runs, turns=repeats, label="training")
    expected = next(iter(losses.values()))[:]
    rows = []
    for number, name in enumerate(runs):
        own = losses[name][:]  # without the loss of the memory's run
        differences = [abs(a - b) / abs(a) for a, b in zip(expected, own, strict=True)]
        summary = _summary(name, times[name], runs[name], images=len(batches[0]), device=device)
        summary["stages"][DATA] = data_ms[number > 0]
        rows.append(
            TrainingRow(**summary, losses=own, loss_difference=statistics.fmean(differences))
        )
    return rows


def _summary(
    name: str,
    times: Sequence[Stages],
    run: Callable[[int], object],
    *,
    images: int,
    device: str,
) -> dict[str, Any]:
    """What rows of inference and training have in common."""
    # After the timing, since memory that went back to the system makes the next run slower.
    peak_mib = peak_memory(lambda: run(0), device)
    stages = dict.fromkeys(stage for turn in times for stage in turn)
    total = statistics.median(sum(turn.values()) for turn in times)
    return {
        "side": name,
        "stages": {s: statistics.median(turn.get(s, 0.0) for turn in times) for s in stages},
        "total": total,
        "images_per_second": 1e3 * images / total,
        "peak_mib": peak_mib,
    }


class _Stepper:
    """A trainer that does single steps, timed by stage."""

    def __init__(
        self, build_trainer: Callable[[Iterator[Inputs]], SimpleTrainer], device: str
    ) -> None:
        self._batch: Inputs = []
        self._storage = EventStorage()
        self._trainer = build_trainer(self._batches())
        self.timer = StageTimer({}, torch.device(device))
        model, optimizer = self._trainer.model, self._trainer.optimizer
        model.register_forward_pre_hook(lambda *_: self.timer.begin(FORWARD))
        # The backward pass, with some logging, lies between the forward pass and the optimizer.
        model.register_forward_hook(lambda *_: self._next(BACKWARD))
        optimizer.register_step_pre_hook(lambda *_: self._next(OPTIMIZER))
        optimizer.register_step_post_hook(lambda *_: self.timer.end())

    def _batches(self) -> Iterator[Inputs]:
        while True:
            yield self._batch

    def _next(self, stage: str) -> None:
        self.timer.end()
        self.timer.begin(stage)

    def step(self, batch: Inputs, seed: int) -> float:
        """Returns the total loss."""
        seed_all(0, "benchmark", seed)
        self._batch = batch
        with self._storage:
            self._trainer.run_step()
        return self._storage.latest()["total_loss"][0]


def _stock_stepper(cfg: CfgNode, model: nn.Module, device: str) -> _Stepper:
    model = copy.deepcopy(model).train()
    optimizer = build_stock_optimizer(cfg, model)
    return _Stepper(lambda batches: SimpleTrainer(model, batches, optimizer), device)


def _our_stepper(cfg: CfgNode, model: nn.Module, dtype: str, device: str) -> _Stepper:
    ours = our_config(cfg)
    ours.SOLVER.FUSED = True
    built = build_model(ours).train()
    built.load_state_dict(model.state_dict())
    optimizer = build_optimizer(ours, built)
    amp = "" if dtype == "fp32" else dtype
    return _Stepper(lambda batches: Steps(built, batches, optimizer, amp=amp), device)


@dataclass
class Line:
    """Times of one implementation over a range of values, with their least-squares line.

    Attributes:
        kind: what varies, a key of ``SWEEPS``.
        side: the implementation's name.
        counts: images, or detections that the model returned.
        times: median milliseconds per batch.
        slope, intercept: of the line, in milliseconds.
        determination: R^2, the share of the times' variance that the line explains.
    """

    kind: str
    side: str
    counts: list[float]
    times: list[float]
    slope: float = 0.0
    intercept: float = 0.0
    determination: float = 0.0

    def __post_init__(self) -> None:
        counts, times = np.array(self.counts), np.array(self.times)
        self.slope, self.intercept = (float(x) for x in np.polyfit(counts, times, 1))
        residuals = times - (self.slope * counts + self.intercept)
        variation = ((times - times.mean()) ** 2).sum()
        self.determination = float(1 - (residuals**2).sum() / variation) if variation else 1.0


@torch.no_grad()
def sweep(
    kind: str,
    implementations: Sequence[Implementation],
    images: Inputs,
    *,
    detections: int,
) -> list[Line]:
    """Times the implementations alternately at each value of a range.

    Args:
        kind: what varies, a key of ``SWEEPS``.
        implementations: left with the limit ``detections``.
        images: for "batch" at least as many as the largest value; otherwise only the first is used.
        detections: the most per image, while the batch varies.
    """
    counts: dict[tuple[int, str], float] = {}

    def timed(value: int, implementation: Implementation) -> Callable[[int], float]:
        batch, limit = (images[:value], detections) if kind == "batch" else (images[:1], value)

        def measure_turn(turn: int) -> float:
            set_limits(implementation.model, detections=limit)
            results, stages = implementation.timed_detect(batch)
            found = statistics.fmean(map(len, results))
            counts[value, implementation.name] = len(batch) if kind == "batch" else found
            return sum(stages.values())

        return measure_turn

    # Values alternate too, so that a slow minute of the machine does not affect only one.
    values = SWEEPS[kind]
    runs = {(value, i.name): timed(value, i) for value in values for i in implementations}
    times = alternate(runs, turns=_SWEEP_REPEATS, label=f"sweep of {kind}")
    for implementation in implementations:
        set_limits(implementation.model, detections=detections)
    return [
        Line(
            kind,
            i.name,
            [counts[value, i.name] for value in values],
            [statistics.median(times[value, i.name]) for value in values],
        )
        for i in implementations
    ]


def average_precision(
    cfg: CfgNode, implementations: Sequence[Implementation], name: str
) -> dict[str, dict[str, float]]:
    """AP of boxes and masks over a whole data set, per implementation, without torchvision's.

    The masks of all implementations are encoded by ours, which returns detectron2's bytes.
    """
    precisions = {}
    for implementation in implementations:
        if implementation.name.startswith("torchvision"):
            continue
        evaluator = build_coco_evaluator(
            name,
            output_dir=None,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        )
        results, _ = run_inference(
            implementation.model, build_test_batches(cfg, name), evaluator, dataset_name=name
        )
        precisions[implementation.name] = {task: m["AP"] for task, m in results.items()}
    return precisions


@dataclass
class Agreement:
    """Compares detections with those of a reference, over images.

    Attributes:
        expected: the number of the reference's detections.
        found: the number of the other model's.
        scores: absolute differences of the scores of matched detections.
        boxes: the largest absolute difference of a coordinate, in pixels, of each match.
        masks: IoU of the masks of each match.
    """

    expected: int = 0
    found: int = 0
    scores: list[float] = field(default_factory=list)
    boxes: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | None]:
        """Counts, medians and extremes; None where nothing matched."""

        def apply(function: Callable, values: Sequence[float]) -> float | None:
            return function(values) if values else None

        return {
            "expected": self.expected,
            "found": self.found,
            "matched": len(self.scores),
            "score_difference_median": apply(statistics.median, self.scores),
            "score_difference_largest": apply(max, self.scores),
            "box_difference_median": apply(statistics.median, self.boxes),
            "box_difference_largest": apply(max, self.boxes),
            "mask_iou_mean": apply(statistics.fmean, self.masks),
            "mask_iou_least": apply(min, self.masks),
        }

    def add(self, expected: Instances, found: Instances) -> None:
        """Compares the detections of one image.

        The reference's detections, by falling score, are matched with the unmatched detection of
        the same class that overlaps most, at an IoU of at least 0.5.
        """
        expected, found = expected.to("cpu"), found.to("cpu")
        self.expected += len(expected)
        self.found += len(found)
        if not len(expected) or not len(found):
            return
        overlaps = pairwise_iou(expected.pred_boxes, found.pred_boxes)
        overlaps[expected.pred_classes[:, None] != found.pred_classes[None]] = 0
        for index in expected.scores.float().argsort(descending=True).tolist():
            other = int(overlaps[index].argmax())
            if overlaps[index, other] < _SAME_OBJECT_IOU:
                continue
            overlaps[:, other] = 0
            self.scores.append(abs(expected.scores[index] - found.scores[other]).item())
            boxes = expected.pred_boxes.tensor[index], found.pred_boxes.tensor[other]
            self.boxes.append(torch.sub(*boxes).abs().max().item())
            if expected.has("rle") and found.has("rle"):
                iou = mask_util.iou([found.rle[other]], [expected.rle[index]], [0])
                empty = not mask_util.area(expected.rle[index]) + mask_util.area(found.rle[other])
                self.masks.append(1.0 if empty else float(iou[0, 0]))


def _agreement(
    expected: Sequence[Sequence[Instances]], found: Sequence[Sequence[Instances]]
) -> dict[str, float | int | None]:
    agreement = Agreement()
    for expected_batch, found_batch in zip(expected, found, strict=True):
        for pair in zip(expected_batch, found_batch, strict=True):
            agreement.add(*pair)
    return agreement.summary()
