"""Weights at a URL: downloaded, resumed and checked, or refused in one line."""

import errno
import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.file_io import PathManager

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine import downloads
from mask_rcnn_plus.engine.weights import local_weights
from tests.server import Server, serve

CONTENT = b"0123456789" * 100_000
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, as in a new process."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its first use
    PathManager.register_handler(downloads.Downloads())
    return tmp_path / "cache"


@pytest.fixture
def server(cache: Path) -> Iterator[Server]:
    """A server of large.pth."""
    with serve() as server:
        server.files["/a/large.pth"] = CONTENT
        yield server


def refusal(url: str) -> str:
    with pytest.raises(UserError) as error:
        local_weights(url)
    message = str(error.value)
    assert message.startswith("cannot ") and "\n" not in message and len(message) < 600
    return message


def kept(folder: Path) -> list[str]:
    """The names of the files in a folder of the cache, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_download_shows_a_progress_bar(
    server: Server, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = local_weights(f"{server.address}/a/large.pth")
    assert file == cache / "a/large.pth" and file.read_bytes() == CONTENT
    assert "large.pth: " in capfd.readouterr().err
    assert local_weights(f"{server.address}/a/large.pth") == file and len(server.ranges) == 1


def test_a_failed_download_gives_a_one_line_error(
    server: Server, cache: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    with pytest.raises(UserError, match=r"cannot download .*none\.pth': HTTP Error 404"):
        local_weights(f"{server.address}/none.pth")
    # No server listens on this port.
    with pytest.raises(UserError, match=r"cannot download .*: \[Errno \d+\] Connection refused"):
        local_weights("http://127.0.0.1:9/b/none.pth")
    # The message says which file to put where.
    assert f"save this file as '{cache / 'b/none.pth'}'" in refusal("http://127.0.0.1:9/b/none.pth")
    assert capfd.readouterr().err == "" and not caplog.records
    (cache / "b/none.pth").write_bytes(CONTENT)
    assert local_weights("http://127.0.0.1:9/b/none.pth").read_bytes() == CONTENT


def test_names_that_lead_nowhere_are_named(cache: Path) -> None:
    for name in ("catalog://ImageNetPretrained/no", "catalog://no", "nowhere://model.pth"):
        with pytest.raises(UserError, match=name):
            local_weights(name)


def test_a_broken_download_continues_where_it_broke(server: Server, cache: Path) -> None:
    server.breaks["/a/large.pth"] = [300_000, 200_000]
    assert local_weights(f"{server.address}/a/large.pth").read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=300000-", "bytes=500000-"]
    assert kept(cache / "a") == ["large.pth", "large.pth.sha256"]


def test_a_later_attempt_continues_unless_the_file_has_changed(server: Server, cache: Path) -> None:
    url = f"{server.address}/a/large.pth"
    server.breaks["/a/large.pth"] = [300_000, 0]
    assert "received 300,000 of 1,000,000 bytes" in refusal(url)
    assert not (cache / "a/large.pth").exists()
    assert local_weights(url).read_bytes() == CONTENT and server.ranges[-1] == "bytes=300000-"

    server.files["/b.pth"] = CONTENT
    server.breaks["/b.pth"] = [300_000, 0]
    refusal(f"{server.address}/b.pth")
    server.files["/b.pth"] = CONTENT[::-1]
    assert local_weights(f"{server.address}/b.pth").read_bytes() == CONTENT[::-1]
    # A part that is longer than the file.
    server.files["/c.pth"] = CONTENT
    server.breaks["/c.pth"] = [300_000, 0]
    refusal(f"{server.address}/c.pth")
    (cache / "c.pth.part").write_bytes(CONTENT)
    assert local_weights(f"{server.address}/c.pth").read_bytes() == CONTENT


def test_without_an_etag_a_download_starts_again(server: Server, cache: Path) -> None:
    server.etags = False
    server.breaks["/a/large.pth"] = [300_000]
    assert "received 300,000" in refusal(f"{server.address}/a/large.pth")
    assert kept(cache / "a") == []
    assert local_weights(f"{server.address}/a/large.pth").read_bytes() == CONTENT
    assert server.ranges == ["", ""]


NAMES = {
    "the zoo's MD5": f"model_final_{MD5[:6]}.pkl",
    "as the zoo, SHA-256": f"model_0039999_{SHA256[:6]}.pkl",
    "torchvision's SHA-256": f"resnet18-{SHA256[:8]}.pth",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_digest_in_a_name_is_checked(server: Server, cache: Path, name: str) -> None:
    server.files[f"/{name}"] = CONTENT[:-1] + b"x"
    assert "must begin with" in refusal(f"{server.address}/{name}")
    assert kept(cache) == []
    server.files[f"/{name}"] = CONTENT
    assert local_weights(f"{server.address}/{name}").read_bytes() == CONTENT
    assert kept(cache) == [name]


def test_a_date_in_a_name_is_not_a_digest(server: Server) -> None:
    for name in ("model-20240131.pth", "model_202401.pkl", "model_0004999.pth"):
        server.files[f"/{name}"] = CONTENT
        assert local_weights(f"{server.address}/{name}").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["large.pth", f"model_final_{MD5[:6]}.pkl"])
def test_a_damaged_file_in_the_cache_is_downloaded_again(
    server: Server, cache: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.files[f"/{name}"] = CONTENT
    url = f"{server.address}/{name}"
    file = local_weights(url)
    file.write_bytes(CONTENT[:-1])
    assert local_weights(url).read_bytes() == CONTENT
    (record,) = caplog.records
    assert str(file) in record.message and "again" in record.message
    file.write_bytes(CONTENT[:-1])
    del server.files[f"/{name}"]
    assert "404" in refusal(url)


def test_a_damaged_file_is_named_without_a_network(cache: Path) -> None:
    file = cache / f"detectron2/a/model_final_{MD5[:6]}.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half")
    message = refusal(f"http://127.0.0.1:9/detectron2/a/{file.name}")
    assert f"'{file}' (the file there is damaged)" in message


def test_files_of_iopath_and_of_a_read_only_cache_are_found(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cache / "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    assert local_weights("detectron2://ImageNetPretrained/MSRA/R-50.pkl") == file


def test_another_servers_file_of_the_same_path_is_downloaded(server: Server) -> None:
    first = local_weights(f"{server.address}/a/large.pth").read_bytes()
    with serve() as other:
        other.files["/a/large.pth"] = CONTENT[::-1]
        assert local_weights(f"{other.address}/a/large.pth").read_bytes() == first[::-1]


def test_no_url_leads_out_of_the_cache(server: Server, cache: Path) -> None:
    for path in ("/../../out.pth", "/a/../../../../out.pth", f"/x?{'y' * 400}/.."):
        assert downloads._relative(f"http://host{path}") != ".."
        assert (cache / downloads._relative(f"http://host{path}")).resolve().is_relative_to(cache)


def test_a_web_page_is_not_kept(server: Server, cache: Path) -> None:
    server.types["/a/large.pth"] = "text/html; charset=utf-8"
    assert "web page" in refusal(f"{server.address}/a/large.pth")
    assert kept(cache / "a") == []


def test_a_dead_proxy_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    message = refusal(f"{server.address}/a/large.pth")
    assert "proxy 127.0.0.1:9" in message and "refused" in message and "secret" not in message
    assert server.ranges == []


def test_a_proxy_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy is asked for the whole URL.
    server.files["http://far.example/model.pth"] = CONTENT
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", server.address)
    assert local_weights("http://far.example/model.pth").read_bytes() == CONTENT


def test_a_full_disk_is_one_line_and_leaves_nothing(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot save .*large\.pth': No space left") as error:
        local_weights(f"{server.address}/a/large.pth")
    assert error.value.exit_code == 4 and "FVCORE_CACHE" in str(error.value)
    assert kept(cache / "a") == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.mkdir()
    (cache / "b").touch()  # in the place of a folder, since root may write into any
    assert str(cache / "b") in refusal("http://127.0.0.1:9/b/model.pth")


def test_two_threads_download_once(server: Server) -> None:
    results: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(local_weights(f"{server.address}/a/large.pth"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(server.ranges) == 1


@pytest.mark.slow
def test_two_processes_download_once(server: Server, cache: Path) -> None:
    code = (
        "import sys; from mask_rcnn_plus.engine.weights import local_weights\n"
        "print(local_weights(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, f"{server.address}/a/large.pth"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].strip() for process in both]
    assert outputs == [str(cache / "a/large.pth")] * 2 and len(server.ranges) == 1
