"""The model benchmark's measurements: inference, training, sweeps, agreement and AP."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.steps import Steps
from mask_rcnn_plus.evaluation import build_coco_evaluator, run_inference
from mask_rcnn_plus.evaluation.stages import StageTimer

FORWARD, BACKWARD, OPTIMIZER, DATA = "forward", "backward", "optimiser", "data"
# Quantity that a sweep varies -> its values.
SWEEPS = {"batch": (1, 2, 4, 6, 8), "detections": (1, 50, 100, 200, 300)}
_SWEEP_REPEATS = 3
# Detections of one class whose boxes overlap less are different objects.
_SAME_OBJECT_IOU = 0.5

Row = dict[str, Any]
Stages = dict[str, float]


@torch.no_grad()
def measure_inference(
    implementations: Sequence[Implementation],
    batches: Sequence[Inputs],
    *,
    repeats: int,
    device: str,
) -> list[Row]:
    """Runs the implementations alternately; each turn uses the next batch, all of one size.

    Returns:
        a row per implementation: what ``_row`` returns, "detections", the mean number per image,
        and the "agreement" with the first implementation.
    """
    # These calls are also the warm-up.
    results = {i.name: [d for batch in batches for d in i.detect(batch)] for i in implementations}

    def detect(implementation: Implementation, turn: int) -> Stages:
        with implementation.timer.running() as stages:
            implementation.detect(batches[turn % len(batches)])
        return stages

    runs = {i.name: partial(detect, i) for i in implementations}
    times = alternate(runs, turns=repeats, warm_ups=0, label="inference")
    reference = results[implementations[0].name]
    return [
        {
            **_row(name, times[name], run, images=len(batches[0]), device=device),
            "detections": statistics.fmean(map(len, results[name])),
            "agreement": agreement(reference, results[name]),
        }
        for name, run in runs.items()
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
) -> list[Row]:
    """Runs training steps of detectron2 and of ours alternately.

    Args:
        cfg: detectron2's.
        model: detectron2's, with the weights that all implementations start from.
        batches: mapped samples with ground truth; each step uses the next one.
        dtypes: the dtypes of our implementation: "fp32" or the dtype of mixed precision.
        repeats: timed steps of each implementation.
        device: where to run.
        data_ms: milliseconds of loading a batch, by detectron2's mapper and by ours. The totals do
            not include this stage, since loaders work while the model trains.

    Returns:
        a row per implementation: what ``_row`` returns, the "losses" of all steps, and
        "loss_difference", the mean relative difference from stock's losses.
    """
    stock = copy.deepcopy(model).train()
    optimizer = build_stock_optimizer(cfg, stock)
    trainers = {"stock fp32": _Trainer(SimpleTrainer, stock, optimizer, device)}
    trainers |= {f"ours {dtype}": _our_trainer(cfg, model, dtype, device) for dtype in dtypes}
    losses: dict[str, list[float]] = {name: [] for name in trainers}

    def step(name: str, turn: int) -> Stages:
        with trainers[name].timer.running() as stages:
            losses[name].append(trainers[name].step(batches[turn % len(batches)], turn))
        return stages

    runs = {name: partial(step, name) for name in trainers}
    times = alternate(runs, turns=repeats, label="training")
    rows = []
    for number, (name, run) in enumerate(runs.items()):
        # The measurement of memory adds further losses.
        own, expected = (losses[key][: 1 + repeats] for key in (name, "stock fp32"))
        row = _row(name, times[name], run, images=len(batches[0]), device=device)
        row["stages"][DATA] = data_ms[number > 0]
        pairs = zip(expected, own, strict=True)
        difference = statistics.fmean(abs(a - b) / abs(a) for a, b in pairs)
        rows.append({**row, "losses": own, "loss_difference": difference})
    return rows


def _row(
    name: str, times: Sequence[Stages], run: Callable[[int], object], *, images: int, device: str
) -> Row:
    """The part that rows of inference and training share.

    Returns:
        "side", the implementation's name; "stages", the median milliseconds of each stage; "total",
        the median of their sum; "images_per_second"; "peak_mib", the memory beyond what was in use,
        None if unknown.
    """
    stages = dict.fromkeys(stage for turn in times for stage in turn)
    total = statistics.median(sum(turn.values()) for turn in times)
    return {
        "side": name,
        "stages": {s: statistics.median(turn.get(s, 0.0) for turn in times) for s in stages},
        "total": total,
        "images_per_second": 1e3 * images / total,
        # Not before the timing: memory that went back to the system makes the next run slower.
        "peak_mib": peak_memory(lambda: run(0), device),
    }


class _Trainer:
    """A trainer that does single steps, timed by stage."""

    def __init__(
        self,
        build_trainer: Callable[..., SimpleTrainer],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: str,
    ) -> None:
        self._batch: Inputs = []
        self._storage = EventStorage()
        self._trainer = build_trainer(model, self._batches(), optimizer)
        self.timer = StageTimer({}, torch.device(device))
        model.register_forward_pre_hook(lambda *_: self.timer.begin(FORWARD))
        # Between the forward pass and the optimizer: the backward pass and some logging.
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


def _our_trainer(cfg: CfgNode, model: nn.Module, dtype: str, device: str) -> _Trainer:
    ours = our_config(cfg)
    ours.SOLVER.FUSED = True
    built = build_model(ours).train()
    built.load_state_dict(model.state_dict())
    amp = "" if dtype == "fp32" else dtype
    return _Trainer(partial(Steps, amp=amp), built, build_optimizer(ours, built), device)


@torch.no_grad()
def sweep(
    kind: str, implementations: Sequence[Implementation], images: Inputs, *, detections: int
) -> list[Row]:
    """Times the implementations alternately at each value of a range.

    Args:
        kind: what varies, a key of ``SWEEPS``.
        implementations: their limit afterwards is ``detections``.
        images: for "batch" at least as many as the largest value; otherwise only the first is used.
        detections: the most per image, while the batch varies.

    Returns:
        a row per implementation: "kind"; "side", the implementation's name; "counts" of images, or
        of detections that the model returned; "times", the median milliseconds per batch; and the
        values of ``fit_line``.
    """
    counts: dict[tuple[int, str], float] = {}

    def detect(value: int, implementation: Implementation, turn: int) -> float:
        batch, limit = (images[:value], detections) if kind == "batch" else (images[:1], value)
        set_limits(implementation.model, detections=limit)
        with implementation.timer.running() as stages:
            results = implementation.detect(batch)
        found = statistics.fmean(map(len, results))
        counts[value, implementation.name] = len(batch) if kind == "batch" else found
        return sum(stages.values())

    # Values alternate too, so that a slow minute of the machine affects all of them.
    values = SWEEPS[kind]
    runs = {(value, i.name): partial(detect, value, i) for value in values for i in implementations}
    times = alternate(runs, turns=_SWEEP_REPEATS, label=f"sweep of {kind}")
    rows = []
    for implementation in implementations:
        name = implementation.name
        set_limits(implementation.model, detections=detections)
        medians = [statistics.median(times[value, name]) for value in values]
        own = [counts[value, name] for value in values]
        row = {"kind": kind, "side": name, "counts": own, "times": medians}
        rows.append({**row, **fit_line(own, medians)})
    return rows


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line: "slope", "intercept", and "determination" (R^2)."""
    xs, ys = np.array(x), np.array(y)
    slope, intercept = (float(c) for c in np.polyfit(xs, ys, 1))
    residuals = ys - (slope * xs + intercept)
    variation = ((ys - ys.mean()) ** 2).sum()
    determination = float(1 - (residuals**2).sum() / variation) if variation else 1.0
    return {"slope": slope, "intercept": intercept, "determination": determination}


def average_precision(
    cfg: CfgNode, implementations: Sequence[Implementation], name: str
) -> dict[str, dict[str, float]]:
    """AP of each task over a whole data set, per implementation; torchvision is left out.

    Our evaluator encodes the masks of all implementations, with the same bytes as detectron2's.
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


def agreement(
    expected: Sequence[Instances], found: Sequence[Instances]
) -> dict[str, float | int | None]:
    """Compares a model's detections with a reference's.

    By falling score, each of the reference's detections is matched with the unmatched detection of
    the same class that overlaps most, at an IoU of at least 0.5.

    Args:
        expected: the reference's, per image.
        found: the model's, of the same images.

    Returns:
        the numbers of detections; of the matches, the differences of scores, the largest difference
        of a box's coordinates (in pixels), and the IoU of the masks; None without matches.
    """
    scores, boxes, masks = list[float](), list[float](), list[float]()
    for theirs, ours in ((a.to("cpu"), b.to("cpu")) for a, b in zip(expected, found, strict=True)):
        for index, other in _matches(theirs, ours):
            scores.append(abs(theirs.scores[index] - ours.scores[other]).item())
            difference = theirs.pred_boxes.tensor[index] - ours.pred_boxes.tensor[other]
            boxes.append(difference.abs().max().item())
            if theirs.has("rle") and ours.has("rle"):
                pair = ours.rle[other], theirs.rle[index]
                empty = not sum(map(mask_util.area, pair))
                iou = mask_util.iou([pair[0]], [pair[1]], [0])[0, 0]
                masks.append(1.0 if empty else float(iou))
    return {
        "expected": sum(map(len, expected)),
        "found": sum(map(len, found)),
        "matched": len(scores),
        "score_difference_median": statistics.median(scores) if scores else None,
        "score_difference_largest": max(scores, default=None),
        "box_difference_median": statistics.median(boxes) if boxes else None,
        "box_difference_largest": max(boxes, default=None),
        "mask_iou_mean": statistics.fmean(masks) if masks else None,
        "mask_iou_least": min(masks, default=None),
    }


def _matches(expected: Instances, found: Instances) -> Iterator[tuple[int, int]]:
    if not len(expected) or not len(found):
        return
    overlaps = pairwise_iou(expected.pred_boxes, found.pred_boxes)
    overlaps[expected.pred_classes[:, None] != found.pred_classes[None]] = 0
    for index in expected.scores.float().argsort(descending=True).tolist():
        overlap, other = overlaps[index].max(0)
        if overlap >= _SAME_OBJECT_IOU:
            overlaps[:, other] = 0
            yield index, int(other)
