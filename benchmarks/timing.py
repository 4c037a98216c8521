"""Times functions against each other, on the CPU or a GPU."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]

# A GPU's clock is read after it has finished all it was given, which takes longer than a small
# kernel; over several calls that hardly counts.
CALLS = {"cpu": 1, "cuda": 12}
# Timings of a side before the next has its turn. A virtual machine may give memory that was freed
# back to its host within seconds, so after a slow side the first call pays for fetching it again,
# more than for its own work; the median of three does not.
TIMINGS_A_TURN = {"cpu": 3, "cuda": 1}
WARM_UPS = {"cpu": 1, "cuda": 3}

# torchvision's fp16 on a CPU takes half a minute where ours takes less than a second. Enough is
# enough after this many seconds, if every side was timed this often.
PATIENCE_SECONDS = 20
FEWEST_REPEATS = 3


def input_sets(sides: int) -> int:
    """How many input sets to take turns with.

    At least three, so that none is still in a cache when its turn comes, and no divisor in common
    with the number of sides, so that every side meets every set.
    """
    return 3 if sides % 3 else 4


def alternate(sides: Mapping[str, Sequence[Run]], repeats: int, device: str) -> dict[str, float]:
    """Times several sides in turns, so that all see the same machine.

    Args:
        sides: name -> runs that do the same on one input set each, as many in every side.
        repeats: turns of each side, after warming up; fewer, but at least ``FEWEST_REPEATS``,
            where that takes more than ``PATIENCE_SECONDS``.
        device: "cpu" or "cuda".

    Returns:
        the median milliseconds of one run, by side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    turn = itertools.count()
    first = time.perf_counter()
    for repeat in range(WARM_UPS[device] + repeats):
        for name, runs in sides.items():
            for _ in range(TIMINGS_A_TURN[device]):
                start = _clock(device)
                for _ in range(CALLS[device]):
                    runs[next(turn) % len(runs)]()
                if repeat >= WARM_UPS[device]:
                    times[name].append((_clock(device) - start) / CALLS[device])
        done = repeat + 1 - WARM_UPS[device]
        if done >= FEWEST_REPEATS and time.perf_counter() - first > PATIENCE_SECONDS:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: str) -> float:
    """Bytes a millisecond of a large copy, read and write: what the device's memory gives."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    milliseconds = alternate({"copy": [lambda: target.copy_(source)]}, 5, device)["copy"]
    return 2 * source.nbytes / milliseconds


def extra_memory(run: Run, device: str) -> float | None:
    """MiB that a run takes at its peak beyond what was allocated; None where no one counts it."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
