"""Weights at a URL: downloaded completely, continued after a break, or refused in one line."""

import errno
import hashlib
import http.server
import multiprocessing
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import Detectron2Handler

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine import downloads
from mask_rcnn_plus.engine.downloads import cached_file
from mask_rcnn_plus.engine.weights import local_weights

CONTENT = b"0123456789" * 100_000
SHA256 = f"model_final_{hashlib.sha256(CONTENT).hexdigest()[:6]}.pkl"
MD5 = f"model_final_{hashlib.md5(CONTENT).hexdigest()[:6]}.pkl"
WRONG = "model_final_abcdef.pkl"


@dataclass
class Server:
    """What the test's server does, and what it was asked."""

    address: str = ""
    breaks_at: list[int] = field(default_factory=list)
    """For each connection in turn, the number of bytes after which it breaks."""
    ranges: list[str] = field(default_factory=list)
    """The Range header of each request; "" for none."""
    tag: str = '"1"'
    knows_ranges: bool = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local server that has CONTENT under every name but none.pth."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.ranges.append(self.headers.get("Range", ""))
            if self.path.endswith("none.pth"):
                self.send_error(404)
                return
            start = 0
            if state.knows_ranges and self.headers.get("If-Range") == state.tag:
                start = int(re.fullmatch(r"bytes=(\d+)-", state.ranges[-1])[1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.send_header("ETag", state.tag)
            self.end_headers()
            end = state.breaks_at.pop(0) if state.breaks_at else len(CONTENT)
            self.wfile.write(CONTENT[start:end])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{http_server.server_port}"
        yield state
        http_server.shutdown()


def left(url: str) -> list[str]:
    """The files in the cache folder of an address, without the lock."""
    folder = cached_file(url).parent
    return sorted(path.name for path in folder.glob("*") if not path.name.endswith(".lock"))


def test_a_download_shows_a_progress_bar(server: Server, capfd: pytest.CaptureFixture) -> None:
    url = f"{server.address}/folder/large.pth"
    assert local_weights(url).read_bytes() == CONTENT
    assert "large.pth: " in capfd.readouterr().err
    assert local_weights(url) == cached_file(url) and len(server.ranges) == 1
    assert left(url) == ["large.pth"]


def test_names_of_detectron2(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{server.address}/zoo/")
    assert local_weights("detectron2://a/b.pkl").read_bytes() == CONTENT
    monkeypatch.setattr(ModelCatalog, "get", lambda name: f"{server.address}/{name}.pkl")
    assert local_weights("catalog://R-50").read_bytes() == CONTENT
    monkeypatch.undo()
    with pytest.raises(UserError, match="catalog://nothing"):
        local_weights("catalog://nothing")


@pytest.mark.parametrize("name", [SHA256, MD5, "b-0123456789.pth", "model_0004999.pth"])
def test_the_digest_in_the_name_is_right(server: Server, name: str) -> None:
    assert local_weights(f"{server.address}/{name}").read_bytes() == CONTENT


@pytest.mark.parametrize("name", [WRONG, "resnet50-0676ba61.pth"])
def test_the_digest_in_the_name_is_wrong(server: Server, name: str) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=f"{name}' are damaged"):
            local_weights(f"{server.address}/{name}")
        assert left(server.address + "/x") == []


def test_a_damaged_file_in_the_cache_is_downloaded_again(server: Server) -> None:
    url = f"{server.address}/{SHA256}"
    local_weights(url).write_bytes(CONTENT[:-1])
    assert local_weights(url).read_bytes() == CONTENT


def test_a_broken_connection_is_continued(server: Server) -> None:
    server.breaks_at = [300_000, 700_000]
    assert local_weights(f"{server.address}/large.pth").read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=300000-", "bytes=700000-"]


def test_a_later_run_continues_the_same_version(server: Server) -> None:
    url = f"{server.address}/large.pth"
    server.breaks_at = [100, 200, 300, 400]
    with pytest.raises(UserError, match="connection broke at 400 of 1000000"):
        local_weights(url)
    server.breaks_at = [500, 600, 700, 800]
    server.tag = '"2"'  # another version of the file: from the start
    with pytest.raises(UserError, match="connection broke at 800"):
        local_weights(url)
    assert server.ranges[4:6] == ["bytes=400-", "bytes=500-"]
    assert local_weights(url).read_bytes() == CONTENT
    assert left(url) == ["large.pth"]


def test_a_server_without_ranges(server: Server) -> None:
    server.knows_ranges = False
    server.breaks_at = [500_000]
    assert local_weights(f"{server.address}/large.pth").read_bytes() == CONTENT


def test_a_failed_download_gives_a_one_line_error(
    server: Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"cannot download .*none\.pth': HTTP Error 404"):
        local_weights(f"{server.address}/none.pth")
    # No server listens on this port.
    dead = "http://127.0.0.1:9/none.pth"
    with pytest.raises(UserError, match=r"Connection refused; .* put the file to '.*none\.pth'"):
        local_weights(dead)
    with pytest.raises(UserError, match="name of a file"):
        local_weights(f"{server.address}/a/../../../b.pth")
    assert capfd.readouterr().err == "" and not caplog.records


def test_a_dead_proxy_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"through the proxy 127\.0\.0\.1: ") as error:
        local_weights("http://example.invalid/a.pth")
    assert "secret" not in str(error.value)


def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.address}/large.pth"
    original = Path.open

    class Full:
        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

        def write(self, data: bytes) -> None:
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(path, mode, *args, **kwargs)
        return Full(file) if path.name == "large.pth.part" and mode in ("wb", "ab") else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot save .*No space left"):
        local_weights(url)
    assert left(url) == []


def _download(url: str, results: Any) -> None:
    results.put(downloads.download(url).read_bytes() == CONTENT)


def test_two_processes_download_once(server: Server) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_download, args=(f"{server.address}/large.pth", results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join()
    assert len(server.ranges) == 1
