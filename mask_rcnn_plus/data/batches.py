"""The training batches of one process, from any iteration on, and what can go wrong with them."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.utils import comm
from torch.utils.data import DataLoader

from mask_rcnn_plus.data.draws import seed_all
from mask_rcnn_plus.data.samples import Samples
from mask_rcnn_plus.data.sampling import Lots
from mask_rcnn_plus.data.workers import deaths, ignore_interrupts
from mask_rcnn_plus.errors import UserError

logger = logging.getLogger(__name__)


class LoaderError(UserError):
    """A loader's worker process died or hangs."""

    exit_code = 5


class Batches:
    """An endless iterable of batches, each a list of samples.

    Nothing is loaded before the first batch is asked for; ``start`` says until then where to begin.
    After each batch all random generators are seeded for the step that follows.

    Args:
        samples: the images.
        lots: which of them make a batch.
        num_workers: processes that load; 0 to load in this one.
        timeout: seconds that a worker may take for a batch; 0 for ever.
        max_bad: how many different images may be skipped because they cannot be used.
        rank: of this process.
    """

    def __init__(
        self,
        samples: Samples,
        lots: Lots,
        *,
        num_workers: int = 0,
        timeout: float = 0,
        max_bad: int = 0,
        rank: int = 0,
    ) -> None:
        self._samples = samples
        self._lots = lots
        self._workers = num_workers
        self._timeout = timeout if num_workers else 0
        self._max_bad = max_bad
        self._rank = rank
        self._step = 0
        self._ahead: deque[list[tuple[int, int]]] = deque()
        self.images = 0
        """Images that all processes together have been given."""
        self.bad: dict[str, str] = {}
        """The images skipped so far: file -> why."""
        self.latest: list[Any] = []
        """The batch of the running step."""
        self.previous: list[Any] = []
        """The batch before it."""
        self.gate: Callable[[UserError | None], None] = _raise
        """Called with what went wrong, or None, when a batch is there and its step could begin."""

    @property
    def seed(self) -> int:
        return self._lots.order.seed

    @property
    def step_words(self) -> tuple[int | str, ...]:
        """What the random generators were seeded with for the running step."""
        return (self.seed, "step", self._step - 1, self._rank)

    def start(self, *, step: int, images: int | None = None, seed: int | None = None) -> None:
        """Says where to begin.

        Args:
            step: the iteration of the next batch.
            images: how many images all processes have behind them; by default those of ``step``
                batches as large as now.
            seed: another one than at construction.
        """
        per_step = self._lots.lot_size * self._lots.world_size
        self._step = step
        self.images = step * per_step if images is None else images
        if self._lots.grouped and self.images % per_step:
            logger.warning(
                "The batch size is another one than before: images are grouped by shape anew, and "
                "some of this epoch's come again"
            )
        self._lots.start = self.images
        if seed is not None:
            self._lots.order.seed = seed

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "images": self.images, "bad": dict(self.bad)}

    def report_bad(self) -> None:
        """Logs the images that were skipped; every process must call it."""
        shares = comm.gather(self.bad)
        reasons = sorted({reason for share in shares for reason in share.values()})
        if reasons:
            lines = "\n  ".join(reasons)
            logger.warning(f"{len(reasons)} images were skipped:\n  {lines}")

    def __iter__(self) -> Iterator[list[Any]]:
        # A generator, so that it begins only with its first batch: SimpleTrainer of detectron2 0.6
        # asks for the iterator before it is known where to begin.
        self._ahead.clear()
        source = self._open()
        while True:
            batch, fault = None, None
            try:
                batch = self._fetch(source)
            except UserError as error:
                fault = error
            self.gate(fault)
            assert batch is not None
            self._step += 1
            seed_all(*self.step_words)
            self.images += self._lots.lot_size * self._lots.world_size
            self.previous, self.latest = self.latest, batch
            yield batch

    def _open(self) -> Iterator[list[tuple[Any, list[tuple[str, str]]]]]:
        loader = DataLoader(
            self._samples,
            batch_sampler=_Noted(self._lots, self._ahead),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            timeout=self._timeout,
            worker_init_fn=ignore_interrupts,
        )
        source = iter(loader)
        deaths.take_over()
        return source

    def _fetch(self, source: Iterator[list[tuple[Any, list[tuple[str, str]]]]]) -> list[Any]:
        try:
            with deaths.raised():
                pairs = next(source)
        except (RuntimeError, EOFError, OSError) as error:
            # The latter two where a worker died before its tensors were fetched from it.
            if not self._workers:
                raise
            raise self._explained(error) from error
        self._ahead.popleft()
        for _, refused in pairs:
            for file, reason in refused:
                self._count(file, reason)
        return [sample for sample, _ in pairs]

    def _count(self, file: str, reason: str) -> None:
        if file in self.bad:
            return
        self.bad[file] = reason
        if len(self.bad) > self._max_bad:
            raise UserError(
                f"{len(self.bad)} images cannot be used, and DATALOADER.MAX_BAD_SAMPLES is "
                f"{self._max_bad}; the last: {reason}"
            )
        logger.warning(
            f"Skipped, {len(self.bad)} of at most {self._max_bad} (DATALOADER.MAX_BAD_SAMPLES): "
            f"{reason}"
        )

    def _explained(self, error: Exception) -> LoaderError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        # Batches come back in the order in which they were handed out, to each worker in turn.
        files = ", ".join(f"'{self._samples.name(index)}'" for _, index in self._ahead[0])
        if "timed out" in reason:
            return LoaderError(
                f"a loader worker has given no batch for {self._timeout:g} seconds "
                f"(DATALOADER.TIMEOUT); it was to load {files}: see whether these can be read, or "
                "raise the timeout, 0 for none"
            )
        return LoaderError(
            f"a loader worker died, and the next images were {files}: {reason}; where memory or "
            "/dev/shm ran out, lower DATALOADER.NUM_WORKERS"
        )


class _Noted:
    """A batch sampler that notes down what the loader was told to load."""

    def __init__(self, lots: Lots, notes: deque[list[tuple[int, int]]]) -> None:
        self._lots = lots
        self._notes = notes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for lot in self._lots:
            self._notes.append(lot)
            yield lot


def _as_it_is(pairs: list[Any]) -> list[Any]:
    return pairs


def _raise(fault: UserError | None) -> None:
    if fault is not None:
        raise fault
