"""The training batches of one process, from any iteration on, and the errors of loading them."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader

from mask_rcnn_plus.data.sampling import BatchIndices, LoadedSample, Samples
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.data.workers import ignore_interrupts, worker_deaths
from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)


class LoaderError(UserError):
    """A worker process of the loader died or hangs."""

    exit_code = 5


class Batches:
    """An endless iterable of batches, each a list of samples.

    A training loop that does something between loading a batch and its step calls ``fetch`` and
    ``begin_step``; iterating does both. The first ``fetch`` starts the workers.

    Args:
        samples: the images.
        indices: the indices of the images in each batch.
        num_workers: worker processes; 0 loads in this process.
        timeout: seconds that a worker may take for a batch; 0 for no limit.
        max_bad: the number of different unusable images that may be skipped.
        rank: rank of this process.
    """

    def __init__(
        self,
        samples: Samples,
        indices: BatchIndices,
        *,
        num_workers: int = 0,
        timeout: float = 0,
        max_bad: int = 0,
        rank: int = 0,
    ) -> None:
        self._samples = samples
        self._indices = indices
        self._num_workers = num_workers
        self._timeout = timeout if num_workers else 0
        self._max_bad = max_bad
        self._rank = rank
        self._step = 0
        self._loader: Iterator[list[LoadedSample]] | None = None
        self._expected: Iterator[list[tuple[int, int]]] = iter(())
        self.images = 0
        """The number of images that all processes together have used."""
        self.bad: dict[str, str] = {}
        """The skipped images: file -> reason."""
        self.current: list[Any] = []
        """The batch of the current step."""

    @property
    def size(self) -> int:
        """The number of training images."""
        return len(self._samples)

    @property
    def seed(self) -> int:
        return self._indices.order.seed

    @property
    def step_seed(self) -> tuple[int | str, ...]:
        """The arguments of ``seed_all`` for the current step."""
        return (self.seed, "step", self._step - 1, self._rank)

    def start(self, *, step: int, images: int | None = None, seed: int | None = None) -> None:
        """Sets where to begin.

        Args:
            step: the iteration of the next batch.
            images: how many images all processes have used so far; by default those of ``step``
                batches of the current size.
            seed: None keeps the current seed.
        """
        per_step = self._indices.batch_size * self._indices.world_size
        self._step = step
        self.images = step * per_step if images is None else images
        if self._indices.portrait is not None and self.images % per_step:
            logger.warning(
                "The batch size has changed: images are grouped by shape again, and some of this "
                "epoch's images are repeated"
            )
        self._indices.start = self.images
        if seed is not None:
            self._indices.order.seed = seed
        self._loader = None

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "images": self.images, "bad": dict(self.bad)}

    def report_bad(self) -> None:
        """Logs the skipped images; every process must call it."""
        shares = comm.gather(self.bad)
        if reasons := sorted({why for share in shares for why in share.values()}):
            lines = "\n  ".join(reasons)
            logger.warning(f"{len(reasons)} images were skipped:\n  {lines}")

    def __iter__(self) -> Iterator[list[Any]]:
        while True:
            batch = self.fetch()
            self.begin_step(batch)
            yield batch

    def fetch(self) -> list[Any]:
        """Loads the next batch.

        Raises:
            UserError: too many images cannot be used.
            LoaderError: a worker died or hangs.
        """
        if self._loader is None:
            self._loader = self._start_loader()
            self._expected = iter(self._indices)
        places = next(self._expected)
        try:
            with worker_deaths.raised():
                loaded = next(self._loader)
        except (RuntimeError, EOFError, OSError) as error:
            # EOFError and OSError: a worker died before its tensors were received.
            if not self._num_workers:
                raise
            raise self._loader_error(error, places) from error
        for file, why in itertools.chain(*(refused for _, refused in loaded)):
            self._skip(file, why)
        return [sample for sample, _ in loaded]

    def begin_step(self, batch: list[Any]) -> None:
        """Counts a fetched batch as used, and seeds all random generators for its step."""
        self._step += 1
        self.images += self._indices.batch_size * self._indices.world_size
        self.current = batch
        seed_all(*self.step_seed)

    def _start_loader(self) -> Iterator[list[LoadedSample]]:
        loader = DataLoader(
            self._samples,
            batch_sampler=self._indices,
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            timeout=self._timeout,
            worker_init_fn=ignore_interrupts,
        )
        iterator = iter(loader)
        worker_deaths.install()
        return iterator

    def _skip(self, file: str, why: str) -> None:
        if file in self.bad:
            return
        self.bad[file] = why
        if len(self.bad) > self._max_bad:
            raise UserError(
                f"{len(self.bad)} images cannot be used, but DATALOADER.MAX_BAD_SAMPLES is "
                f"{self._max_bad}; the last one: {why}"
            )
        logger.warning(
            f"Skipped an image, {len(self.bad)} of at most {self._max_bad} "
            f"(DATALOADER.MAX_BAD_SAMPLES): {why}"
        )

    def _loader_error(self, error: Exception, places: list[tuple[int, int]]) -> LoaderError:
        why = reason(error)
        files = ", ".join(f"'{self._samples.name(index)}'" for _, index in places)
        if "timed out" in why:
            return LoaderError(
                f"a loader worker returned no batch for {self._timeout:g} seconds "
                f"(DATALOADER.TIMEOUT) while loading {files}: check whether these images can be "
                "read, and whether 'ulimit -n' allows 1024 open files, or raise the timeout (0 for "
                "no limit)"
            )
        return LoaderError(
            f"a loader worker died; the next images were {files}: {why}; if memory or /dev/shm "
            "ran out, lower DATALOADER.NUM_WORKERS"
        )
