"""A web server on this machine that serves one file, badly if asked to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves ``body``; ``answers`` holds how to behave on each request, then it behaves well."""

    daemon_threads = True

    def __init__(self, file_name: str, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.file_name = file_name
        self.body = body
        self.answers: list[str | int] = []
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.file_name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        behaviour = self.server.answers.pop(0) if self.server.answers else "well"
        body = self.server.body
        if isinstance(behaviour, int):
            self.send_error(behaviour)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and "no-range" not in behaviour else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + (len(body) - start) // 2 if "break" in behaviour else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(file_name: str, body: bytes) -> Iterator[Server]:
    """A running server of ``body``."""
    with Server(file_name, body) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
