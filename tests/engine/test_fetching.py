"""Weights at a URL: downloaded with a progress bar, or refused in one line."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_plus.engine.weights import local_weights


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local server of a folder with large.pth."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "large.pth").write_bytes(b"0123456789" * 100_000)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "served"))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_shows_a_progress_bar(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert local_weights(f"{address}/large.pth").read_bytes() == b"0123456789" * 100_000
    assert "large.pth: " in capfd.readouterr().err


def test_a_failed_download_gives_a_one_line_error(
    address: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"cannot download .*none\.pth': HTTP Error 404"):
        local_weights(f"{address}/none.pth")
    # No server listens on this port.
    with pytest.raises(UserError, match=r"cannot download .*: \[Errno \d+\] Connection refused"):
        local_weights("http://127.0.0.1:9/none.pth")
    assert capfd.readouterr().err == "" and not caplog.records
