"""A real S3-compatible server for the tests, over HTTP: moto's, with a log of its requests, and able to misbehave."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Request(NamedTuple):
    method: str
    path: str
    """/bucket/key"""
    query: str


class Answer(NamedTuple):
    """What is answered in the place of the server."""

    status: str
    code: str
    """S3's name of the error."""
    message: str = "as the test wants it"

    def to_xml(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()


Rule = Callable[[Request, dict[str, Any]], Answer | None]
"""What to answer to a request, or None to let the server answer; may change the request's environment."""


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Server:
    """An S3 server of this process."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.rule: Rule | None = None
        self.app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        self.requests.append(request)
        answer = None if self.rule is None else self.rule(request, environ)
        if answer is None:
            return self.app(environ, start)
        body = b"" if request.method == "HEAD" else answer.to_xml()
        start(answer.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    @contextmanager
    def obeying(self, rule: Rule) -> Iterator[None]:
        """The server with a rule."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = None

    @contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """The requests that come, as they come."""
        found: list[Request] = []
        before = len(self.requests)
        yield found
        found.extend(self.requests[before:])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server, in the environment of this process and of those that it starts."""
    server = Server()
    try:
        with _environment(server.host):
            yield server
    finally:
        server.close()


@contextmanager
def s3_process(folder: Path) -> Iterator[None]:
    """As `s3_server`, in a process of its own: GDAL waits for answers without letting this one's threads run."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with (folder / "moto.log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with _environment(f"127.0.0.1:{_port(folder / 'moto.log', process)}"):
                yield
        finally:
            process.terminate()
            process.wait(30)


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    """The port that the server says it listens at."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextmanager
def _environment(host: str) -> Iterator[None]:
    """What a process must have in its environment to use a server: for fsspec, and for GDAL."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{host}",
        }.items():
            patch.setenv(name, value)
        forget_connections()
        yield
    forget_connections()


def forget_connections() -> None:
    """Make fsspec read credentials and endpoint anew."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def new_bucket(name: str) -> str:
    """The URL of a bucket that is made."""
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def bucket_contents(url: str) -> dict[str, str]:
    """As `stores.contents`, of a store in a bucket."""
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    found = {path.removeprefix(f"{root}/"): path for path in files.find(root)}
    return {
        name: hashlib.sha256(files.cat_file(path)).hexdigest()
        for name, path in found.items()
        if ".tilepipe" not in name.split("/")
    }
