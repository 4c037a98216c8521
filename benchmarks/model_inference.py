"""Measures the sides of the model benchmark at finding objects."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.memory import peak_memory
from benchmarks.model_agreement import Agreement
from benchmarks.model_sides import Inputs, Side


@dataclass
class Row:
    """One side's figures.

    Attributes:
        side: its name.
        stages: median milliseconds a batch, by stage.
        total: median milliseconds of a batch.
        images_per_second: by the median.
        peak_mib: memory beyond what was in use; None where no one counts it.
        detections: of an image, on average.
        agreement: with the first side.
    """

    side: str
    stages: dict[str, float]
    total: float
    images_per_second: float
    peak_mib: float | None
    detections: float
    agreement: dict[str, float | int | None]


@torch.no_grad()
def measure(
    sides: Sequence[Side],
    batches: Sequence[Inputs],
    *,
    repeats: int,
    device: torch.device,
    step: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Runs the sides in turns.

    Args:
        sides: the first is the one that the others are compared with.
        batches: as large as each other; a turn takes the next one.
        repeats: timed turns.
        device: on which the sides run.
        step: called after each run, also those that warm up.
    """
    results = {side.name: [] for side in sides}
    for side in sides:
        for batch in batches:
            results[side.name].append(side.detect(batch))
            step()
    times: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for turn in range(repeats):
        for side in sides:
            with side.timer.running() as stages:
                side.detect(batches[turn % len(batches)])
            times[side.name].append(stages)
            step()
    rows = []
    for side in sides:
        # Afterwards, since giving freed memory back to the system makes the next run slower.
        peak = peak_memory(lambda side=side: side.detect(batches[0]), device)
        step()
        stages, total = medians(times[side.name])
        rows.append(
            Row(
                side=side.name,
                stages=stages,
                total=total,
                images_per_second=1e3 * len(batches[0]) / total,
                peak_mib=peak,
                detections=_mean_count(results[side.name]),
                agreement=_agreement(results[sides[0].name], results[side.name]),
            )
        )
    return rows


def medians(times: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], float]:
    """Of each stage and of the sums of all."""
    stages = list(dict.fromkeys(stage for one in times for stage in one))
    return (
        {s: statistics.median(one.get(s, 0.0) for one in times) for s in stages},
        statistics.median(sum(one.values()) for one in times),
    )


def _mean_count(results: Sequence[Sequence[Any]]) -> float:
    return statistics.fmean(len(one) for batch in results for one in batch)


def _agreement(
    expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]
) -> dict[str, float | int | None]:
    agreement = Agreement()
    for one, other in zip(expected, found, strict=True):
        for pair in zip(one, other, strict=True):
            agreement.add(*pair)
    return agreement.summary()
