"""Rasters that a web server gives."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rasters import noise, read_whole, same_pixels, write

from tilepipe.errors import InputError
from tilepipe.raster.source import open_raster
from tilepipe.window import Window

SERVER = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
    def end_headers(self):
        self.send_header("ETag", '"abc"')
        super().end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def url(tmp_path, monkeypatch):
    """Of tmp_path; served by a process of its own, since GDAL waits for answers with the interpreter locked."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()
    process.stdout.close()


def test_rasters_by_url(tmp_path, url):
    path = write(tmp_path / "a.tif", noise((2, 30, 20)))
    source = open_raster(f"{url}/a.tif")
    same_pixels(source.open().read(Window.whole((30, 20))), *read_whole(path))
    first = source.identity()[0]
    assert first["etag"] == '"abc"'
    assert first["content-length"] == str(path.stat().st_size)
    with pytest.raises(InputError, match=r"cannot open http.*none\.tif"):
        open_raster(f"{url}/none.tif")
