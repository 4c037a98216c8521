"""Controls headless Chromium with the DevTools protocol over a pipe; it needs no package."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 120


def find() -> str | None:
    """The path of the browser; None if it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Shows one page at a time and records its console messages and its requests.

    Attributes:
        console: the page's console messages and exceptions, and the browser's log entries.
        requests: the URLs that the page has requested, without data URIs.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        self.console: list[str] = []
        self.requests: list[str] = []

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Loads a file in a window of this size, in CSS pixels, and waits for its load event."""
        if self._session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.console, self.requests = [], []
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None, top: int = 0) -> None:
        """Saves the page, or a part of it, as PNG."""
        width, full = self.evaluate(
            "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
        )
        clip = {"x": 0, "y": top, "width": width, "height": height or full - top, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a DevTools command and returns its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _until(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._read], [], [], end - time.monotonic())
                data = os.read(self._read, 1 << 20) if ready else b""
                assert data, "the browser has exited or does not respond"
                self._buffer += data
            text, self._buffer = self._buffer.split(b"\0", 1)
            message = json.loads(text)
            self._record(message)
            if matches(message):
                return message

    def _record(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)


@contextlib.contextmanager
def started(path: str, profile: Path) -> Iterator[Browser]:
    """Starts a browser with its own profile and ends it after the block."""
    to_read, to_write = os.pipe(), os.pipe()
    # Chromium reads commands from file descriptor 3 and writes answers to 4.
    command = (
        f'exec "$0" --headless=new --no-sandbox --disable-gpu --no-first-run --disable-sync '
        f"--disable-background-networking --remote-debugging-pipe --user-data-dir='{profile}' "
        f"about:blank 3<&{to_read[0]} 4>&{to_write[1]}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command, path],
        pass_fds=(to_read[0], to_write[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        yield Browser(to_write[0], to_read[1])
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        os.close(to_write[0])
        os.close(to_read[1])
