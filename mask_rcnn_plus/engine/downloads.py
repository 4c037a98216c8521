"""Downloads files into iopath's cache: resumed after a break, checked, never half-written.

A download goes into ``NAME.part``, which is renamed when it is complete. ``NAME.part.etag`` holds
the server's ETag, which tells whether the rest still belongs to the same file.
"""

import errno
import hashlib
import logging
import os
import re
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import portalocker
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler, file_lock, get_cache_dir
from tqdm import tqdm

from mask_rcnn_plus.errors import UserError, reason
from mask_rcnn_plus.files import file_digest, replacing

logger = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without a byte
_BLOCK = 1 << 20


class NoSpaceError(UserError):
    """The disk is full."""

    exit_code = 4


class Downloads(HTTPURLHandler):
    """Replaces iopath's handler of URLs; uses the same file names in the same cache.

    ``detectron2://`` and ``catalog://`` lead here too. A cached file is checked once per process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checked: dict[tuple[str, Path], tuple[int, int]] = {}

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        self._check_kwargs(kwargs)
        # iopath would not look into a cache that it cannot write to.
        own = Path(cache_dir or os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
        if not force and self._is_sound(path, file := own / _relative(path)):
            return str(file)
        file = Path(get_cache_dir(cache_dir)) / _relative(path)
        try:
            self._fetch(path, file, force)
        except (OSError, HTTPException, portalocker.LockException) as error:
            raise _failure(path, file, error) from error
        return str(file)

    def _fetch(self, url: str, file: Path, force: bool) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with portalocker.Lock(f"{file}.lock", timeout=0):
                pass
        except portalocker.LockException:
            logger.warning(f"another process is downloading {file.name}: waiting for it")
        with file_lock(str(file)):
            if not force and self._is_sound(url, file):
                return
            replaced = file.is_file() and not force
            _download(url, file)
            if replaced:
                logger.warning(f"'{file}' was damaged or from another URL: downloaded again")
            self._is_sound(url, file)

    def _is_sound(self, url: str, file: Path) -> bool:
        if not file.is_file():
            return False
        version = file.stat().st_mtime_ns, file.stat().st_size
        if self._checked.get((url, file)) != version:
            if _fault(url, file) or not _as_recorded(url, file):
                return False
            self._checked[url, file] = version
        return True


def _relative(url: str) -> str:
    """The file of a URL in the cache, named as iopath does, but never outside the cache."""
    name = url.rpartition("/")[2]
    if len(name) > HTTPURLHandler.MAX_FILENAME_LEN:
        name = f"{name[:100]}_{hashlib.sha256(url.encode()).hexdigest()[:32]}"
    return os.path.normpath(f"/{urlsplit(url).path}/../{name}").lstrip("/")


def _download(url: str, file: Path) -> None:
    """Downloads a file; after a break the rest, as long as each attempt brings some of it."""
    part, etag = file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.part.etag")
    while True:
        start = _size(part) if etag.is_file() else 0
        try:
            _receive(url, part, etag, start)
        except HTTPError as error:
            if error.code != 416 or not start:
                raise
            _remove(part, etag)  # longer than the file
            continue
        except (OSError, HTTPException) as error:
            if _is_full(error) or not etag.is_file():
                _remove(part, etag)
            elif _size(part) > start:
                continue
            raise
        if not (fault := _fault(url, part)):
            break
        _remove(part, etag)
        if not start:
            raise URLError(fault)
    if not _promised(url)[0]:
        with replacing(_record(file)) as record:
            record.write(f"{file_digest(part)}  {file.name}\n# {url}\n")
    part.replace(file)
    _remove(etag)


def _receive(url: str, part: Path, etag: Path, start: int) -> None:
    """Appends what is missing to the first ``start`` bytes, or begins again if it has changed."""
    headers = (
        {"Range": f"bytes={start}-", "If-Range": etag.read_text(encoding="utf-8")} if start else {}
    )
    with request.urlopen(request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html" and not url.endswith(
            (".html", "htm")
        ):
            raise URLError("the server sent a web page")
        if response.status != 206:
            start = 0
            _remove(etag, part)
            # A weak ETag may be the same for other bytes.
            if (tag := response.headers.get("ETag", "")).startswith('"'):
                etag.write_text(tag, encoding="utf-8")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            part.open("ab") as out,
            tqdm(
                desc=urlsplit(url).path.rpartition("/")[2],
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                # In a log file, a line now and then.
                mininterval=0.1 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            while block := response.read1(_BLOCK):
                out.write(block)
                bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())
            if total is not None and out.tell() != total:
                raise ConnectionError(f"received {out.tell():,} of {total:,} bytes")


def _promised(url: str) -> tuple[str, tuple[str, ...]]:
    """The start of the digest in a file name, and the algorithms that it may be of."""
    name = urlsplit(url).path.rpartition("/")[2]
    # detectron2's zoo documents MD5; other projects that name files like this use SHA-256.
    if match := re.fullmatch(r"model_(?:final|\d{7})_([0-9a-f]{6})\.(?:pkl|pth)", name):
        return match[1], ("md5", "sha256")
    # torchvision and timm. Eight decimal digits may be a date.
    if match := re.search(r"-(?!\d{8})([0-9a-f]{8})\.pth?$", name):
        return match[1], ("sha256",)
    return "", ()


def _fault(url: str, file: Path) -> str:
    """Why a file cannot be the one that its name promises; "" if it can."""
    start, algorithms = _promised(url)
    if not start or any(file_digest(file, a).startswith(start) for a in algorithms):
        return ""
    return f"the {' and '.join(map(str.upper, algorithms))} of the content must begin with {start}"


def _as_recorded(url: str, file: Path) -> bool:
    """Whether a file without a digest in its name is what this module downloaded from the URL."""
    record = _record(file)
    if _promised(url)[0] or not record.is_file():  # iopath makes no record
        return True
    return record.read_text(encoding="utf-8") == f"{file_digest(file)}  {file.name}\n# {url}\n"


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)


def _failure(url: str, file: Path, error: Exception) -> UserError:
    if _is_full(error):
        return NoSpaceError(
            f"cannot save '{file}': {reason(error)}; free space, or set FVCORE_CACHE to a folder "
            "on another disk"
        )
    if not isinstance(error, URLError) and getattr(error, "filename", None):
        return UserError(
            f"cannot save '{file}': {reason(error)}; set FVCORE_CACHE to another folder"
        )
    # urllib wraps the cause in its own error; only an HTTP status says more than the cause.
    cause = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
    advice = ""
    if not isinstance(cause, HTTPError | str):
        advice = f"; without a network, save this file as '{file}'"
        if file.is_file():
            advice += " (the file there is damaged)"
    return UserError(f"cannot download '{url}'{_through_proxy(url)}: {cause!s:.200}{advice}")


def _through_proxy(url: str) -> str:
    parts = urlsplit(url)
    proxy = request.getproxies().get(parts.scheme)
    if not proxy or request.proxy_bypass(parts.hostname or ""):
        return ""
    return f" through the proxy {proxy.rpartition('@')[2]}"  # without its password


PathManager.register_handler(Downloads())
