"""The progress bar of commands that read many files."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    description: str,
    unit: str,
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
) -> tqdm:
    """A bar on standard error, shown only on a terminal and only after two seconds.

    Args:
        description: the text before the bar.
        unit: what it counts, in the singular.
        items: iterated over, if given; else the caller updates the bar.
        total: the number of items, if they have no length.
    """
    return tqdm(
        items,
        total=total,
        desc=description,
        unit=unit,
        delay=2,
        leave=False,
        file=sys.stderr,
        disable=None,  # only on a terminal
    )
