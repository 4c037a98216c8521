"""A local HTTP server of files in memory, with ETags, ranges and faults."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Server:
    """What the server sends, and what it was asked for.

    Attributes:
        files: path -> content.
        breaks: path -> the numbers of bytes after which the next answers break off.
        etags: send ETags and obey ranges.
        types: path -> Content-Type.
        ranges: the Range header of each request; "" without one.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    etags: bool = True
    types: dict[str, str] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """Serves ``Server.files`` while the block runs."""
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = state.files.get(self.path)
            state.ranges.append(self.headers.get("Range", ""))
            if content is None:
                self.send_error(404)
                return
            etag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
            if state.etags and self.headers.get("If-Range") == etag:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Content-Type", state.types.get(self.path, "application/x"))
            if state.etags:
                self.send_header("ETag", etag)
            self.end_headers()
            breaks = state.breaks.get(self.path)
            self.wfile.write(content[start : start + breaks.pop(0) if breaks else None])

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client may close the connection."""

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()
