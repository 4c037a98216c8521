"""The order of the training images: the same from any position, in any number of processes."""

import itertools
from collections import Counter

import numpy as np
import pytest

from mask_rcnn_plus.data.sampling import BatchIndices, SampleOrder


def take(iterable, count: int) -> list:
    return list(itertools.islice(iterable, count))


ORDERS = {
    "plain": lambda seed: SampleOrder(7, seed=seed),
    "subset": lambda seed: SampleOrder(10, seed=seed, subset_ratio=0.5),
    "repeated": lambda seed: SampleOrder(5, seed=seed, repeat_factors=[1, 1.5, 2.25, 3, 1]),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_the_order_can_begin_anywhere(kind: str) -> None:
    whole = take(ORDERS[kind](3).walk(), 60)
    assert [position for position, _ in whole] == list(range(60))
    for start in range(31):
        assert take(ORDERS[kind](3).walk(start), 29) == whole[start : start + 29]
    assert take(ORDERS[kind](4).walk(), 60) != whole


def test_an_epoch_has_each_image_once_and_epochs_differ() -> None:
    indices = [index for _, index in take(SampleOrder(50, seed=0).walk(), 150)]
    epochs = [indices[at : at + 50] for at in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))


def test_a_subset_and_its_substitutes_stay_the_same() -> None:
    order = SampleOrder(100, seed=1, subset_ratio=0.2)
    subset = {index for _, index in take(order.walk(), 20)}
    assert len(subset) == 20
    assert {index for _, index in take(order.walk(20), 200)} == subset
    substitutes = [order.draw("substitute", position, 1) for position in range(50)]
    assert set(substitutes) <= subset and len(set(substitutes)) > 10


def test_repeat_factors_are_met_on_average() -> None:
    order = SampleOrder(4, seed=0, repeat_factors=[1, 1.5, 2, 3.25])
    # 7.75 images per epoch on average.
    counts = Counter(index for _, index in take(order.walk(), 7750))
    for index, factor in enumerate([1, 1.5, 2, 3.25]):
        assert counts[index] == pytest.approx(1000 * factor, rel=0.05)


PORTRAIT = np.array([True, False, False, True, False, True, False])


@pytest.mark.parametrize("portrait", [None, PORTRAIT])
def test_processes_share_the_batches_of_one_process(portrait: np.ndarray | None) -> None:
    def batches(rank: int, world_size: int, start: int = 0) -> list:
        result = BatchIndices(
            SampleOrder(7, seed=5),
            batch_size=2,
            portrait=portrait,
            rank=rank,
            world_size=world_size,
        )
        result.start = start
        return take(result, 12)

    alone = take(BatchIndices(SampleOrder(7, seed=5), batch_size=2, portrait=portrait), 36)
    for rank in range(3):
        assert batches(rank, 3) == alone[rank::3]
        # After 4 iterations of 3 processes with 2 images each.
        assert batches(rank, 3, start=24)[:8] == alone[rank::3][4:]


def test_batches_have_images_of_one_shape_and_lose_none() -> None:
    batches = take(BatchIndices(SampleOrder(7, seed=5), batch_size=3, portrait=PORTRAIT), 70)
    assert all(len({bool(PORTRAIT[index]) for _, index in batch}) == 1 for batch in batches)
    assert {len({bool(PORTRAIT[i]) for _, i in batch}) for batch in batches} == {1}
    positions = sorted(position for batch in batches for position, _ in batch)
    # Except at most 2 + 2 images that wait for others of their shape.
    assert len(set(positions)) == 210 and positions[-1] <= 213
    order = dict(take(SampleOrder(7, seed=5).walk(), 214))
    assert all(order[position] == index for batch in batches for position, index in batch)
