"""Measures the sides of the model benchmark at learning."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as build_stock_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.memory import peak_memory
from benchmarks.model_inference import medians
from benchmarks.model_sides import Inputs, our_config
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.engine.optimizer import build_optimizer
from mask_rcnn_plus.engine.steps import Steps
from mask_rcnn_plus.evaluation.stages import StageTimer

FORWARD, BACKWARD, OPTIMISER, DATA = "forward", "backward", "optimiser", "data"


@dataclass
class TrainingRow:
    """One side's figures.

    Attributes:
        side: its name.
        stages: median milliseconds a step, by stage; ``DATA`` is what it takes one process to load
            a batch, and not in the total, since others load while this one computes.
        total: median milliseconds of a step.
        images_per_second: by the median.
        peak_mib: memory beyond what was in use; None where no one counts it.
        losses: of the first steps, which all sides do from the same weights with the same draws.
        loss_difference: mean share by which those differ from the first side's.
    """

    side: str
    stages: dict[str, float]
    total: float
    images_per_second: float
    peak_mib: float | None
    losses: list[float]
    loss_difference: float


class _Side:
    """A trainer with its model, which does a step when asked."""

    def __init__(
        self, name: str, trainer: SimpleTrainer, feed: list[Inputs], device: torch.device
    ) -> None:
        self.name = name
        self._trainer = trainer
        self._feed = feed
        self._storage = EventStorage()
        self.timer = StageTimer({}, device)
        trainer.model.register_forward_pre_hook(lambda *_: self.timer.begin(FORWARD))
        # Between the forward and the optimiser's step lies the backward, with what is logged.
        trainer.model.register_forward_hook(lambda *_: self._next(BACKWARD))
        trainer.optimizer.register_step_pre_hook(lambda *_: self._next(OPTIMISER))
        trainer.optimizer.register_step_post_hook(lambda *_: self.timer.end())

    def _next(self, stage: str) -> None:
        self.timer.end()
        self.timer.begin(stage)

    def step(self, batch: Inputs, number: int) -> float:
        """The sum of the losses."""
        seed_all(0, "benchmark", number)
        self._feed[:] = [batch]
        with self._storage:
            self._trainer.run_step()
        return self._storage.latest()["total_loss"][0]


def measure_training(
    cfg: CfgNode,
    model: nn.Module,
    batches: Sequence[Inputs],
    *,
    dtypes: Sequence[str],
    repeats: int,
    device: torch.device,
    data_ms: tuple[float, float],
    step: Callable[[], object] = lambda: None,
) -> list[TrainingRow]:
    """Runs training steps of detectron2 and of ours in turns.

    Args:
        cfg: detectron2's.
        model: its model, with the weights that all begin from.
        batches: mapped samples with ground truth; a step takes the next one.
        dtypes: of ours, "fp32" or a type of mixed precision.
        repeats: timed steps of each side.
        device: on which to run.
        data_ms: of loading a batch, detectron2's way and ours.
        step: called after each run, also those that warm up.
    """
    sides = [_stock_side(cfg, model, device)]
    sides += [_our_side(cfg, model, dtype, device) for dtype in dtypes]
    losses: dict[str, list[float]] = {side.name: [] for side in sides}
    times: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(1 + repeats):
        for side in sides:
            with side.timer.running() as stages:
                losses[side.name].append(side.step(batches[number % len(batches)], number))
            if number:
                times[side.name].append(stages)
            step()
    rows = []
    for side in sides:
        peak = peak_memory(lambda side=side: side.step(batches[0], 0), device)
        step()
        stages, total = medians(times[side.name])
        pairs = zip(losses[sides[0].name], losses[side.name], strict=True)
        rows.append(
            TrainingRow(
                side=side.name,
                stages={**stages, DATA: data_ms[side is not sides[0]]},
                total=total,
                images_per_second=1e3 * len(batches[0]) / total,
                peak_mib=peak,
                losses=losses[side.name],
                loss_difference=statistics.fmean(abs(a - b) / abs(a) for a, b in pairs),
            )
        )
    return rows


def _stock_side(cfg: CfgNode, model: nn.Module, device: torch.device) -> _Side:
    model = copy.deepcopy(model).train()
    feed: list[Inputs] = []
    trainer = SimpleTrainer(model, _Endless(feed), build_stock_optimizer(cfg, model))
    return _Side("stock fp32", trainer, feed, device)


def _our_side(cfg: CfgNode, model: nn.Module, dtype: str, device: torch.device) -> _Side:
    ours = our_config(cfg)
    ours.SOLVER.FUSED = True
    built = build_model(ours).train()
    built.load_state_dict(model.state_dict())
    feed: list[Inputs] = []
    amp = "" if dtype == "fp32" else dtype
    trainer = Steps(built, _Endless(feed), build_optimizer(ours, built), amp=amp)
    return _Side(f"ours {dtype}", trainer, feed, device)


class _Endless:
    """Gives what lies in a list, again and again."""

    def __init__(self, feed: list[Inputs]) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[Inputs]:
        while True:
            yield self._feed[0]


def time_mapping(
    mappers: Sequence[Callable[[dict[str, Any]], Any]],
    records: Sequence[dict[str, Any]],
    *,
    repeats: int,
) -> list[float]:
    """Median milliseconds that each mapper takes for an image, in turns, with the same draws."""
    times: list[list[float]] = [[] for _ in mappers]
    for turn in range(repeats + 1):
        for number, record in enumerate(records):
            for mapper, taken in zip(mappers, times, strict=True):
                seed_all(0, "benchmark", number)
                since = time.perf_counter()
                mapper(copy.deepcopy(record))
                if turn:
                    taken.append(1e3 * (time.perf_counter() - since))
    return [statistics.median(taken) for taken in times]
