"""Batches: the same ones for any number of workers, and the errors of loading."""

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mask_rcnn_plus.data import NamingMapper
from mask_rcnn_plus.data.batches import Batches, LoaderError
from mask_rcnn_plus.data.sampling import BatchIndices, SampleOrder, Samples
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.data.workers import worker_deaths
from mask_rcnn_plus.errors import UserError

RECORDS = [{"file_name": f"{number}.png"} for number in range(9)]


def drawing(record: dict[str, Any]) -> tuple[str, float, float, float]:
    """A mapper that returns a draw of each generator."""
    return record["file_name"], random.random(), np.random.rand(), float(torch.rand(()))


def batches(
    mapper: Callable[[dict[str, Any]], Any] = drawing, *, seed: int = 1, **options: Any
) -> Batches:
    order = SampleOrder(len(RECORDS), seed=seed)
    samples = Samples(RECORDS, mapper, order, max_bad=options.get("max_bad", 0))
    return Batches(samples, BatchIndices(order, batch_size=2), **options)


def take(source: Batches, count: int) -> list[Any]:
    """Each batch, and what its step would draw."""
    return [
        (batch, random.random(), np.random.rand(), float(torch.rand(())))
        for batch in itertools.islice(source, count)
    ]


def test_all_draws_are_the_same_from_any_step_with_any_workers() -> None:
    whole = take(batches(), 12)
    assert len({draw for batch, *_ in whole for sample in batch for draw in sample[1:]}) == 3 * 24
    for start, workers in ((5, 0), (3, 1), (7, 2)):
        seed_all("another history", start)
        later = batches(num_workers=workers)
        later.start(step=start)
        assert take(later, 12 - start) == whole[start:]
        assert later.images == 24
    assert take(batches(seed=2), 12) != whole
    assert take(batches(rank=1), 2)[0][1:] != whole[0][1:]


def test_a_fetched_batch_counts_only_when_its_step_begins() -> None:
    source = batches()
    first = source.fetch()
    assert (source.images, source.current) == (0, [])
    source.begin_step(first)
    assert source.images == 2 and source.current is first
    # The step's draws are those of a batch from the iterator.
    step = (first, random.random(), np.random.rand(), float(torch.rand(())))
    assert step == take(batches(), 1)[0]


def test_python_and_numpy_draw_different_numbers() -> None:
    seed_all(0)
    assert random.random() != np.random.rand()


def test_up_to_max_bad_unusable_images_are_skipped() -> None:
    def partly(record: dict[str, Any]) -> Any:
        if record["file_name"] in ("2.png", "7.png"):
            raise OSError("truncated")
        return drawing(record)

    mapper = NamingMapper(partly)
    whole = batches(mapper, max_bad=2)
    expected = take(whole, 12)
    assert set(whole.bad) == {"2.png", "7.png"} and "OSError: truncated" in whole.bad["2.png"]
    # The others are the same as if all images were usable.
    usable = [sample for batch, *_ in take(batches(), 12) for sample in batch]
    kept = [sample for batch, *_ in expected for sample in batch]
    assert len(kept) == len(usable)
    for expected_sample, sample in zip(usable, kept, strict=True):
        assert (sample == expected_sample) == (expected_sample[0] not in ("2.png", "7.png"))
    later = batches(mapper, max_bad=2, num_workers=2)
    later.start(step=4)
    assert take(later, 8) == expected[4:]

    with pytest.raises(UserError, match=r"2 images cannot be used.*MAX_BAD_SAMPLES is 1.*OSError"):
        take(batches(mapper, max_bad=1), 12)
    with pytest.raises(UserError, match=r"image '[27]\.png' cannot be used"):
        take(batches(mapper), 12)


def test_a_mapper_that_returns_none_gets_another_image() -> None:
    choosy = lambda record: None if record["file_name"] < "6" else record["file_name"]  # noqa: E731
    names = [name for batch, *_ in take(batches(choosy), 9) for name in batch]
    assert set(names) == {"6.png", "7.png", "8.png"}
    with pytest.raises(UserError, match="100 images in a row"):
        take(batches(lambda record: None), 1)


@pytest.mark.slow
def test_a_dead_worker_is_an_error_only_when_the_next_batch_is_fetched() -> None:
    def deadly(record: dict[str, Any]) -> str:
        if record["file_name"] == doomed:
            time.sleep(1)  # until the first batch has arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return record["file_name"]

    order = [index for _, index in itertools.islice(SampleOrder(9, seed=1).walk(), 9)]
    doomed = RECORDS[order[2]]["file_name"]  # in the second batch
    source = iter(batches(deadly, num_workers=1))
    assert len(next(source)) == 2
    # The worker dies while it prefetches; this process can finish what it does meanwhile.
    for _ in range(300):
        time.sleep(0.01)
    with pytest.raises(LoaderError, match=rf"worker died.*'{doomed}'.*(signal|unexpectedly)"):
        list(itertools.islice(source, 9))


@pytest.mark.slow
def in_a_thread(act: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_of_an_app_loads_after_the_main_thread_has() -> None:
    # torch's signal handler exists from the first loader with workers on; Python lets only the
    # main thread change it.
    main = take(batches(num_workers=1), 1)
    assert in_a_thread(lambda: take(batches(num_workers=1), 1)) == main


def test_a_death_that_a_thread_waits_for_does_not_interrupt_the_main_thread() -> None:
    source = batches(num_workers=1)
    source.fetch()
    try:
        in_a_thread(lambda: worker_deaths.raised().__enter__())
        worker_deaths._on_signal(signal.SIGCHLD, None)
        assert not worker_deaths._waiting and worker_deaths._pending
    finally:
        worker_deaths._pending = False


@pytest.mark.slow
def test_the_error_of_a_hanging_worker_names_its_images() -> None:
    def slow(record: dict[str, Any]) -> str:
        time.sleep(60)
        return record["file_name"]

    first, second = (
        RECORDS[index]["file_name"]
        for _, index in next(iter(BatchIndices(SampleOrder(9, seed=1), batch_size=2)))
    )
    with pytest.raises(LoaderError, match=rf"no batch for 1 seconds.*'{first}', '{second}'"):
        take(batches(slow, num_workers=1, timeout=1), 1)
