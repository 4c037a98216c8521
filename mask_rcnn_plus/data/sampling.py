"""The order of the training images, and their samples.

detectron2's samplers always begin at the first image, and its grouping by shape depends on the
images seen so far. Here only the seed determines the image at each position, the images of each
batch, and all random draws of a sample. So a resumed run trains on the same samples as a run that
was never interrupted.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from mask_rcnn_plus.data.copy_paste import CopyPaste
from mask_rcnn_plus.data.seeding import seed_all, seed_for
from mask_rcnn_plus.errors import UserError

# A mapper may return None to get another image; this ends the search if it always does.
_MAX_SUBSTITUTES = 100

# A sample, and (file, reason) for each image that was refused and replaced.
LoadedSample = tuple[Any, list[tuple[str, str]]]


class SampleOrder:
    """The endless order of the training images: one shuffled epoch after another.

    Position 0 is the first image of the first epoch.

    Args:
        size: number of images.
        seed: 0 or more.
        subset_ratio: share of the images to draw from, in (0, 1]; the seed chooses them.
        repeat_factors: how often each image occurs in an epoch, 1 or more. The fraction is the
            probability of one more time (LVIS, arXiv:1908.03195, appendix B.2).
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        subset_ratio: float = 1.0,
        repeat_factors: Sequence[float] | None = None,
    ) -> None:
        self.seed = seed
        self._size = size
        self._subset_size = max(1, int(size * subset_ratio))
        self._factors = None if repeat_factors is None else np.asarray(repeat_factors, np.float64)

    def walk(self, position: int = 0) -> Iterator[tuple[int, int]]:
        """Yields (position, index of the image), beginning at a position, without end."""
        images = self._images()
        epoch, offset = 0, position
        if self._factors is None:
            epoch, offset = divmod(position, len(images))
        else:
            while offset >= (length := int(self._counts(epoch, self._factors).sum())):
                epoch, offset = epoch + 1, offset - length
        while True:
            epoch_images = images
            if self._factors is not None:
                epoch_images = np.repeat(images, self._counts(epoch, self._factors))
            shuffled = self._generator("epoch", epoch).permutation(epoch_images)
            for index in shuffled[offset:].tolist():
                yield position, index
                position += 1
            epoch, offset = epoch + 1, 0

    def draw(self, *purpose: int | str) -> int:
        """The index of an image, any with the same probability. The purpose determines it."""
        images = self._images()
        return int(images[seed_for(self.seed, *purpose) % len(images)])

    def _images(self) -> np.ndarray:
        if self._subset_size == self._size:
            return np.arange(self._size)
        return self._generator("subset", 0).permutation(self._size)[: self._subset_size]

    def _counts(self, epoch: int, factors: np.ndarray) -> np.ndarray:
        """How often each image occurs in an epoch."""
        whole = np.floor(factors)
        extra = self._generator("times", epoch).rand(self._size) < factors - whole
        return (whole + extra).astype(np.int64)

    def _generator(self, purpose: str, number: int) -> np.random.RandomState:
        # NumPy promises that the draws of this legacy generator never change.
        bits = seed_for(self.seed, purpose, number)
        return np.random.RandomState(np.array([bits & 0xFFFFFFFF, bits >> 32], np.uint32))


class BatchIndices(Sampler[list[tuple[int, int]]]):
    """The batches of one process, each a list of (position, index of the image).

    All processes share one sequence of batches: process r of n gets every n-th of them, beginning
    with batch r.

    Args:
        order: the order of the images.
        batch_size: images per batch of one process.
        portrait: for each image whether it is at least as high as wide; then all images of a batch
            are of the same kind (DATALOADER.ASPECT_RATIO_GROUPING). None for no grouping.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        batch_size: int,
        portrait: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order = order
        self.start = 0
        """How many images all processes together have already used."""
        self.batch_size = batch_size
        self.portrait = portrait
        self.world_size = world_size
        self._rank = rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.portrait is None:
            walk = self.order.walk(self.start)
            batches = iter(lambda: list(itertools.islice(walk, self.batch_size)), None)
        else:
            # A batch depends on all images before it: repeat their order, without loading them.
            grouped = self._grouped(self.portrait.tolist())
            batches = itertools.islice(grouped, self.start // self.batch_size, None)
        return itertools.islice(batches, self._rank, None, self.world_size)

    def _grouped(self, portrait: list[bool]) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for position, index in self.order.walk():
            batch = waiting[portrait[index]]
            batch.append((position, index))
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()


class Samples(Dataset[LoadedSample]):
    """Maps (position, index) to a sample that depends only on these two and the seed.

    Args:
        records: detectron2's records of the images.
        mapper: makes a sample from a record, or returns None to get another image. Its draws from
            the global generators of Python, NumPy and torch are seeded.
        order: has the seed and draws substitutes.
        max_bad: how many different images per sample the mapper may refuse with a UserError; each
            is replaced by another one. 0 passes on the first error.
        copy_paste: pastes objects of another image into the sample.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], Any],
        order: SampleOrder,
        *,
        max_bad: int = 0,
        copy_paste: CopyPaste | None = None,
    ) -> None:
        self._records = records
        self._mapper = mapper
        self._order = order
        self._max_bad = max_bad
        self._copy_paste = copy_paste

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """The file name of an image."""
        return str(self._records[index].get("file_name", f"number {index}"))

    def __getitem__(self, place: tuple[int, int]) -> LoadedSample:
        """Loads a sample.

        Raises:
            UserError: more images are refused than ``max_bad`` allows.
        """
        position, index = place
        sample, refused = self._load("sample", position, index)
        if self._copy_paste is None:
            return sample, refused
        seed = self._order.seed
        seed_all(seed, "copy-paste", position)
        if not self._copy_paste.wanted():
            return sample, refused
        index = self._order.draw("other", position)
        other, also_refused = self._load("other", position, index)
        seed_all(seed, "paste", position)
        return self._copy_paste(sample, other), refused + also_refused

    def _load(self, purpose: str, position: int, index: int) -> LoadedSample:
        """The sample of an image, or of its first usable substitute."""
        refused: list[tuple[str, str]] = []
        for attempt in range(_MAX_SUBSTITUTES):
            if attempt:
                index = self._order.draw("substitute", position, attempt)
            seed_all(self._order.seed, purpose, position, attempt)
            try:
                sample = self._mapper(self._records[index])
            except UserError as error:
                refused.append((self.name(index), str(error)))
                if len({file for file, _ in refused}) > self._max_bad:
                    raise
                continue
            if sample is not None:
                return sample, refused
        raise UserError(f"{_MAX_SUBSTITUTES} images in a row could not be used")
