"""Weights that lie elsewhere, fetched into iopath's cache."""

import contextlib
import io
import logging
import sys
from pathlib import Path
from urllib.error import HTTPError

from detectron2.utils.file_io import PathManager

from mask_rcnn_plus.errors import UserError

# Says once more, and with less, what is raised.
_DOWNLOADS = "iopath.common.download"
_NOT_BEGUN = "0.00B ["


def fetched(path: str) -> Path:
    """The local copy of a remote file, with a bar on standard error while it is on its way.

    Args:
        path: a URL or a ``detectron2://`` name.

    Raises:
        UserError: it cannot be fetched.
    """
    downloads = logging.getLogger(_DOWNLOADS)
    before = downloads.disabled
    downloads.disabled = True
    try:
        with contextlib.redirect_stderr(_OnceBegun()):
            return Path(PathManager.get_local_path(path))
    except Exception as error:
        # What urllib wraps says more, but for an answer of the server.
        cause = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        reason = " ".join(str(cause).split())[:200]
        raise UserError(f"weights '{path}' cannot be fetched: {reason}") from error
    finally:
        downloads.disabled = before


class _OnceBegun(io.TextIOBase):
    """Standard error without the bar of a download that has not brought a byte yet."""

    def __init__(self) -> None:
        self._file = sys.stderr
        self._begun = False

    def write(self, text: str) -> int:
        self._begun = self._begun or bool(text.strip() and _NOT_BEGUN not in text)
        return self._file.write(text) if self._begun else len(text)

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()
