"""Servers of a folder on this machine: by HTTP (with faults, if asked for), as S3, as a hub; and one that hangs."""

import gzip
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import boto3
from moto.server import MotoRequestHandler, ThreadedMotoServer

BUCKET = "corpora"
REPOSITORY = "datasets/owner/name"


class Server(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        fetched: bytes sent of each file.
        failing: how many more requests for the content of a file end with status 503.
        truncating: how many more answers break off in the middle.
        ranges: whether parts of a file can be had; otherwise each answer is the whole file.
        seconds: that an answer takes.
        hanging: files that are asked for in vain.
        asked: files whose content was asked for.
        zipping: which files are sent with `Content-Encoding: gzip`, whatever was asked for; their ranges too.
        elsewhere: address that requests for a file are sent on to.
        endless: files of which something comes again and again, in pieces of so many bytes, and no end.
        shifted: files of which other ranges come than were asked for.
        unavailable: files to which any request, for the size too, is answered by status 503.
        sent: bytes sent of endless files.
        encodings: what `Accept-Encoding` the requests had.
        secrets: what their `Authorization` was.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder, self.address = folder, f"http://127.0.0.1:{self.server_port}"
        self.fetched, self.failing, self.truncating = Counter[str](), Counter[str](), Counter[str]()
        self.ranges, self.seconds, self.hanging, self.asked = True, 0.0, set[str](), set[str]()
        self.zipping, self.shifted, self.endless = set[str](), set[str](), dict[str, int]()
        self.elsewhere, self.encodings, self.secrets = dict[str, str](), set[str | None](), set[str | None]()
        self.unavailable, self.sent = set[str](), 0


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and content in one packet

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        path = self.server.folder / name
        if with_content:
            self.server.asked.add(name)
            if name in self.server.hanging:
                self.connection.recv(1)  # until the other side has gone
                return
        self.server.encodings.add(self.headers.get("Accept-Encoding"))
        self.server.secrets.add(self.headers.get("Authorization"))
        if name in self.server.elsewhere:
            self._send(302, headers={"Location": self.server.elsewhere[name]})
        elif name in self.server.unavailable:
            self._send(503)
        elif name in self.server.endless:
            self._send_without_end(self.server.endless[name], with_content)
        elif not path.is_file():
            self._send(404)
        elif with_content and self.server.failing[name] > 0:
            self.server.failing[name] -= 1
            self._send(503)
        elif not with_content:
            self._send(200, length=path.stat().st_size)
        else:
            time.sleep(self.server.seconds)
            content, status, headers = path.read_bytes(), 200, dict[str, str]()
            if name in self.server.zipping:
                content = gzip.compress(content)
                headers["Content-Encoding"] = "gzip"
            if self.server.ranges and (wanted := self.headers.get("Range")):
                first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                if name in self.server.shifted:
                    first += 8
                headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                content, status = content[first : last + 1], 206
            length = len(content)
            if self.server.truncating[name] > 0:
                self.server.truncating[name] -= 1
                content = content[: length // 2]
                self.close_connection = True
            self.server.fetched[name] += len(content)
            self._send(status, content, length, headers)

    def _send_without_end(self, size: int, with_content: bool) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        with suppress(OSError):  # the other side has gone
            while with_content:
                self.wfile.write(b" " * size)
                self.wfile.flush()
                self.server.sent += size
                if size < 1000:
                    time.sleep(0.01)

    def _send(
        self,
        status: int,
        content: bytes = b"",
        length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


class HubHandler(Handler):
    """What Hugging Face's client asks for: whether there is such a data set, what is in a folder of it, and files."""

    def do_GET(self) -> None:
        folder = self.server.folder
        if self.path in (f"/api/{REPOSITORY}", f"/api/{REPOSITORY}/revision/main"):
            self._send(200, json.dumps({"id": REPOSITORY.partition("/")[2], "sha": "0" * 40}).encode())
        elif self.path.startswith(f"/api/{REPOSITORY}/tree/main/{folder.name}?"):
            files = ((f"{folder.name}/{path.name}", path.stat().st_size) for path in folder.iterdir())
            entries = [{"type": "file", "oid": "0" * 40, "path": path, "size": size} for path, size in files]
            self._send(200, json.dumps(entries).encode())
        else:
            self.path = self.path.removeprefix(f"/{REPOSITORY}/resolve/main/{folder.name}")
            super().do_GET()


@contextmanager
def http_server(folder: Path, handler: type[Handler] = Handler) -> Iterator[Server]:
    with Server(folder, handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Bucket(NamedTuple):
    """Holds a folder.

    Attributes:
        address: of the folder in it.
        environment: variables with credentials and endpoint.
        fetched: requests for the content of each file.
    """

    address: str
    environment: dict[str, str]
    fetched: Counter[str]


@contextmanager
def s3_server(folder: Path) -> Iterator[Bucket]:
    """A bucket; its variables are in the environment meanwhile."""
    server, fetched = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False), Counter[str]()

    def count(request: MotoRequestHandler, *_: Any) -> None:
        if request.command == "GET":
            fetched[request.path.rpartition("/")[2]] += 1

    with mock.patch.object(MotoRequestHandler, "log_request", count):
        server.start()
        _, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            with mock.patch.dict("os.environ", environment):
                client = boto3.client("s3")
                client.create_bucket(Bucket=BUCKET)
                for path in folder.iterdir():
                    client.upload_file(str(path), BUCKET, f"{folder.name}/{path.name}")
                yield Bucket(f"s3://{BUCKET}/{folder.name}", environment, fetched)
        finally:
            server.stop()


class Hanging(NamedTuple):
    """Takes connections, and never says anything.

    Attributes:
        address: for HTTP.
        connections: which it has taken.
    """

    address: str
    connections: list[socket.socket]


@contextmanager
def hanging_server() -> Iterator[Hanging]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        hanging = Hanging(f"http://127.0.0.1:{server.getsockname()[1]}", [])

        def accept() -> None:
            with suppress(OSError):  # it is closed
                while True:
                    hanging.connections.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield hanging
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in hanging.connections:
            connection.close()
