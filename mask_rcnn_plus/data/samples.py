"""One training sample: its draws seeded by its position, its image replaced if it is no good."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from mask_rcnn_plus.data.copy_paste import CopyPaste
from mask_rcnn_plus.data.draws import seed_all
from mask_rcnn_plus.data.sampling import Order
from mask_rcnn_plus.errors import UserError

# A mapper may return None for "another image, please"; one that does for all images must end.
_MOST_SUBSTITUTES = 100


class Samples(Dataset[tuple[Any, list[tuple[str, str]]]]):
    """Maps (position, index) to a sample that depends on the seed and these two alone.

    Args:
        records: of the images, in detectron2's format.
        mapper: from a record to a sample, or None for another image; what it draws from Python's,
            NumPy's and torch's global generators is seeded.
        order: gives the seed and the substitutes.
        max_bad: whether an image that the mapper refuses with a UserError may be replaced, and by
            how many substitutes that are refused as well; 0 to refuse it at once.
        copy_paste: lays objects of another image, drawn from all, over the sample; None for none.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], Any],
        order: Order,
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
        """The file of an image."""
        return str(self._records[index].get("file_name", f"number {index}"))

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, list[tuple[str, str]]]:
        """The sample, and the (file, reason) of each image that was refused on the way to it.

        Raises:
            UserError: an image is refused and may not be replaced.
        """
        position, index = place
        sample, refused = self._take("sample", position, index)
        if self._copy_paste is None:
            return sample, refused
        seed = self._order.seed
        seed_all(seed, "copy-paste", position)
        if not self._copy_paste.wanted():
            return sample, refused
        index = self._order.draw("other", position)
        other, also_refused = self._take("other", position, index)
        seed_all(seed, "paste", position)
        return self._copy_paste(sample, other), refused + also_refused

    def _take(self, purpose: str, position: int, index: int) -> tuple[Any, list[tuple[str, str]]]:
        """The sample of an image, or of the first of its substitutes that can be used."""
        refused: list[tuple[str, str]] = []
        for attempt in range(_MOST_SUBSTITUTES):
            if attempt:
                index = self._order.substitute(position, attempt)
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
        raise UserError(f"none of {_MOST_SUBSTITUTES} images drawn in a row could be used")
