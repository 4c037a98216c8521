"""Downloads weights into iopath's cache: completely or not at all, and continued after a break."""

import functools
import hashlib
import http.client
import logging
import re
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from mask_rcnn_plus.errors import UserError, reason

logger = logging.getLogger(__name__)

_ATTEMPTS = 4  # connections per download, each continuing where the one before broke
_TIMEOUT = 30  # seconds without any data
_CHUNK = 1 << 20
_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
# Names that contain the start of the file's digest: the model zoo's (which calls it MD5; other
# sources say SHA-256, so both are accepted) and torchvision's (SHA-256).
_DIGESTS = (r"model_final_([0-9a-f]{6})\.pkl", r".*-([0-9a-f]*[a-f][0-9a-f]*)\.pth")


def download(url: str) -> Path:
    """The file at an address; downloaded unless it is in the cache.

    The cache is iopath's ($FVCORE_CACHE, else ``~/.torch/iopath_cache``), with its layout. Proxies
    are those of the environment (``https_proxy``). Processes that need the same file wait for one.

    Args:
        url: ``http://`` or ``https://``.

    Raises:
        UserError: the file cannot be downloaded or saved, or differs from the digest in its name.
    """
    file = cached_file(url)
    if file.is_file() and _is_intact(file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(file)):
            if not (file.is_file() and _is_intact(file)):
                if file.is_file():
                    logger.warning(f"'{file}' is damaged: downloading it again")
                _replace(file, url)
    except OSError as error:
        if isinstance(error, (URLError, *_BROKEN)):
            raise UserError(_explain(url, error, file)) from error
        raise UserError(f"cannot save the weights '{url}' in '{file}': {reason(error)}") from error
    return file


def cached_file(url: str) -> Path:
    """Where the cache keeps the file of an address, whether it exists or not.

    Raises:
        UserError: the address does not name a file.
    """
    path = unquote(urlsplit(url).path)
    if not Path(path).name or ".." in Path(path).parts:
        raise UserError(f"weights '{url}': the address does not end in the name of a file")
    return Path(get_cache_dir(), path.lstrip("/"))


def _replace(file: Path, url: str) -> None:
    """Downloads a file beside the old one, and replaces that."""
    part = file.with_name(f"{file.name}.part")
    _receive(url, part)
    if not _is_intact(part, file.name):
        part.unlink()
        raise UserError(
            f"the weights '{url}' are damaged or changed: the digest in their name is not that of "
            "the downloaded file; nothing was kept"
        )
    part.replace(file)


def _receive(url: str, part: Path) -> None:
    """Downloads into a file. What an earlier try has left is continued if the server can do so."""
    # The version of the file on the server that the part belongs to.
    version_file = part.with_name(f"{part.name}.version")
    for attempt in range(_ATTEMPTS):
        last = attempt == _ATTEMPTS - 1
        version = (
            version_file.read_text(encoding="utf-8")
            if part.exists() and version_file.exists()
            else ""
        )
        start = part.stat().st_size if version else 0
        headers = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                start = start if response.status == 206 else 0
                length = response.headers.get("Content-Length", "")
                total = start + int(length) if length.isdecimal() else 0
                tag = response.headers.get("ETag", "")
                version_file.write_text("" if tag.startswith("W/") else tag, encoding="utf-8")
                with _writing(part, version_file), part.open("ab") as target:
                    target.truncate(start)
                    for chunk in _chunks(response, part.name.removesuffix(".part"), start, total):
                        target.write(chunk)
            if not total or part.stat().st_size == total:
                version_file.unlink()
                return
            if last:
                raise ConnectionError(f"the connection broke at {part.stat().st_size} of {total} B")
        except HTTPError as error:
            if error.code != 416 or last:  # 416: the part is longer than the file
                raise
            part.unlink()
        except _BROKEN as error:
            if last or not part.exists():
                raise URLError(error) from error


@contextmanager
def _writing(*files: Path) -> Iterator[None]:
    """Removes the files if the disk is full."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, _BROKEN):
            for file in files:
                file.unlink(missing_ok=True)
        raise


def _chunks(
    response: http.client.HTTPResponse, name: str, start: int, total: int
) -> Iterator[bytes]:
    with tqdm(
        desc=name, initial=start, total=total or None, unit="B", unit_scale=True, unit_divisor=1024
    ) as bar:
        while chunk := response.read(_CHUNK):
            yield chunk
            bar.update(len(chunk))


def _is_intact(file: Path, name: str = "") -> bool:
    status = file.stat()
    return _has_digest(name or file.name, file, status.st_size, status.st_mtime_ns)


@functools.cache  # a run asks several times for the same file
def _has_digest(name: str, file: Path, *_: int) -> bool:
    """Whether a file has the digest in a name; True if the name contains none."""
    match = next(filter(None, (re.fullmatch(pattern, name) for pattern in _DIGESTS)), None)
    if not match or len(match[1]) < 6:
        return True
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    return any(digest.hexdigest().startswith(match[1]) for digest in digests.values())


def _explain(url: str, error: OSError, file: Path) -> str:
    # urllib wraps the cause in its own error; only an HTTP status says more than the cause.
    cause = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme)
    through = ""
    with suppress(ValueError):
        if proxy and not urllib.request.proxy_bypass(urlsplit(url).hostname or ""):
            through = f" through the proxy {urlsplit(proxy).hostname}"
    advice = (
        "" if isinstance(error, HTTPError) else f"; without a network, put the file to '{file}'"
    )
    return f"cannot download the weights '{url}'{through}: {cause!s:.200}{advice}"
