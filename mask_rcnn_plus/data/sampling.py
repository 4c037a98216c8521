"""The endless order of training images, which can be entered at any position.

detectron2's samplers begin at their beginning, and its grouping by shape remembers the images that
it has seen. Here the image at a position, and the images of a batch, follow from the seed alone, so
that a run that goes on takes the images that it would have taken.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from mask_rcnn_plus.data.draws import key


class Order:
    """Epoch after epoch of shuffled images; position 0 is the first image of the first epoch.

    Args:
        size: number of images.
        seed: 0 or more.
        subset_ratio: the share of the images to draw from, in (0, 1]; which ones, the seed says.
        repeat_factors: how often each image comes in an epoch, 1 or more; the fraction is the
            chance of one time more (LVIS, arXiv:1908.03195, appendix B.2).
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
        self._subset = max(1, int(size * subset_ratio))
        self._factors = None if repeat_factors is None else np.asarray(repeat_factors, np.float64)

    def walk(self, position: int = 0) -> Iterator[tuple[int, int]]:
        """Yields (position, index of the image) from a position on, without end."""
        images = self._images()
        epoch, offset = 0, position
        if self._factors is None:
            epoch, offset = divmod(position, len(images))
        else:
            while offset >= (length := int(self._times(epoch).sum())):
                epoch, offset = epoch + 1, offset - length
        while True:
            repeated = images if self._factors is None else np.repeat(images, self._times(epoch))
            for index in self._random("epoch", epoch).permutation(repeated)[offset:].tolist():
                yield position, index
                position += 1
            epoch, offset = epoch + 1, 0

    def substitute(self, position: int, attempt: int) -> int:
        """The index of the image to take where the one at a position cannot be used.

        Args:
            position: as in ``walk``.
            attempt: 1 for the first substitute, 2 for the substitute's substitute.
        """
        return self.draw("substitute", position, attempt)

    def draw(self, *words: int | str) -> int:
        """The index of an image, each as likely as any other.

        Args:
            words: what it is for; the same words draw the same image.
        """
        images = self._images()
        return int(images[key(self.seed, *words) % len(images)])

    def _images(self) -> np.ndarray:
        if self._subset == self._size:
            return np.arange(self._size)
        return self._random("subset", 0).permutation(self._size)[: self._subset]

    def _times(self, epoch: int) -> np.ndarray:
        assert self._factors is not None
        whole = np.floor(self._factors)
        return (
            whole + (self._random("times", epoch).rand(self._size) < self._factors - whole)
        ).astype(np.int64)

    def _random(self, purpose: str, number: int) -> np.random.RandomState:
        # The old generator, whose draws NumPy has promised never to change.
        bits = key(self.seed, purpose, number)
        return np.random.RandomState(np.array([bits & 0xFFFFFFFF, bits >> 32], np.uint32))


class Lots(Sampler[list[tuple[int, int]]]):
    """What one process loads for each of its iterations: lists of (position, index).

    The lots of all processes are the same ones whatever their number: process r of n takes every
    n-th from the r-th on.

    Args:
        order: of the images.
        lot_size: images a lot.
        portrait: for each image whether it is higher than wide, to keep a lot to one kind, as
            DATALOADER.ASPECT_RATIO_GROUPING wants; None to take the images as they come.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        order: Order,
        *,
        lot_size: int,
        portrait: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order = order
        self.start = 0
        """How many images all processes together have behind them."""
        self.lot_size = lot_size
        self.world_size = world_size
        self._portrait = portrait
        self._rank = rank

    @property
    def grouped(self) -> bool:
        return self._portrait is not None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self._portrait is None:
            walk = self.order.walk(self.start)
            lots = iter(lambda: list(itertools.islice(walk, self.lot_size)), None)
        else:
            # A lot depends on all images before it: go through them again, loading none.
            lots = itertools.islice(self._grouped(), self.start // self.lot_size, None)
        return itertools.islice(lots, self._rank, None, self.world_size)

    def _grouped(self) -> Iterator[list[tuple[int, int]]]:
        assert self._portrait is not None
        portrait = self._portrait.tolist()
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for position, index in self.order.walk():
            lot = waiting[portrait[index]]
            lot.append((position, index))
            if len(lot) == self.lot_size:
                yield lot[:]
                lot.clear()
