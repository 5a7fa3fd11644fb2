"""Serves the page of tools.watch, and what it shows, to browsers on this machine."""

import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tools.watching.content import Content

ADDRESS = "127.0.0.1"
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer: the page loads from here alone and runs nothing that stands in a run's files."""
MAX_ASKED = 50
"""Runs or tags that one request may name."""


class Watching(ThreadingHTTPServer):
    """Answers on a port of 127.0.0.1 until it is shut down.

    Args:
        folder: with runs.
        port: 0: any that is free.

    Raises:
        OSError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.content = Content(folder)
        super().__init__((ADDRESS, port), Answer)


class Answer(BaseHTTPRequestHandler):
    """Answers GET for the page's files, /runs, /curves, /picture and /differences; nothing else is there.

    A request that was sent to another name than this machine's is refused: a page from elsewhere could otherwise have
    its own name lead here, and read along. Through a tunnel the name is localhost, the port another one.
    """

    server: Watching
    server_version = "watch"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer it."""
        if not is_of_this_machine(self.headers.get("Host", "")):
            self._send(HTTPStatus.FORBIDDEN, b"This page is of 127.0.0.1 alone.\n", "text/plain")
            return
        url = urlsplit(self.path)
        asked = {name: values[:MAX_ASKED] for name, values in parse_qs(url.query).items()}
        if url.path in FILES:
            name, kind = FILES[url.path]
            self._send(HTTPStatus.OK, Path(__file__).with_name(name).read_bytes(), kind)
        elif url.path == "/runs":
            self._send_json(self.server.content.runs())
        elif url.path in ("/curves", "/picture", "/differences"):
            self._answer_of_runs(url.path, asked)
        else:
            self._not_found()

    def _answer_of_runs(self, path: str, asked: dict[str, list[str]]) -> None:
        content = self.server.content
        runs = [run for name in asked.get("run", []) if (run := content.find(name)) is not None]
        tags = asked.get("tag", [])
        if len(runs) != len(asked.get("run", [])) or not runs:
            self._not_found()
        elif path == "/differences":
            self._send_json(content.differences(runs))
        elif path == "/curves":
            self._send_json(content.curves(runs[0], tags))
        else:
            picture = content.picture(runs[0], tags[0]) if tags else None
            if picture is None:
                self._not_found()
            else:
                self._send(HTTPStatus.OK, picture, "image/png")

    def _not_found(self) -> None:
        self._send(HTTPStatus.NOT_FOUND, b"There is no such thing here.\n", "text/plain")

    def _send_json(self, content: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(content, allow_nan=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""


def is_of_this_machine(host: str) -> bool:
    """Return whether a request's Host, with or without a port, is a name of this machine's for itself."""
    return re.fullmatch(rf"({re.escape(ADDRESS)}|localhost)(:\d{{1,5}})?", host, re.IGNORECASE) is not None
