"""What tells one file's content from another's without reading it, and the names GDAL knows files by."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

_SCHEMES = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}


def gdal_path(text: str) -> str:
    """The path GDAL knows a file or URL by.

    >>> gdal_path("s3://bucket/a.tif"), gdal_path("https://host/a.tif"), gdal_path("a.tif")
    ('/vsis3/bucket/a.tif', '/vsicurl/https://host/a.tif', 'a.tif')
    """
    scheme, _, rest = text.partition("://")
    if not rest:
        return text
    if scheme in ("http", "https", "ftp"):
        return f"/vsicurl/{text}"
    return _SCHEMES[scheme] + rest if scheme in _SCHEMES else text


def bucket_options(environment: Mapping[str, str]) -> dict[str, str]:
    """GDAL's options for a bucket at AWS_ENDPOINT_URL, which other libraries go by; none where GDAL's own are set.

    >>> bucket_options({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"})
    {'AWS_S3_ENDPOINT': '127.0.0.1:9000', 'AWS_HTTPS': 'NO', 'AWS_VIRTUAL_HOSTING': 'FALSE'}
    """
    scheme, _, host = (environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL", "")).partition(
        "://"
    )
    if not host or "AWS_S3_ENDPOINT" in environment:
        return {}
    secure = "NO" if scheme == "http" else "YES"
    return {"AWS_S3_ENDPOINT": host.rstrip("/"), "AWS_HTTPS": secure, "AWS_VIRTUAL_HOSTING": "FALSE"}


def file_identity(path: str) -> dict[str, Any]:
    """What tells a file's content from another's: path, size and time; of a URL what a HEAD request tells."""
    real = _container(path) if path.startswith("/vsi") else path
    try:
        status = os.stat(real)
    except OSError:
        return {"path": path, **_url_identity(path.removeprefix("/vsicurl/"))}
    return {
        "path": os.path.abspath(path) if real == path else path,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def _container(path: str) -> str:
    """The file that a path such as /vsizip/dir/a.zip/b.tif lies in; the path itself if none is found."""
    inner = "/" + path.partition("/")[2].partition("/")[2].lstrip("/")
    for start in (inner, inner.lstrip("/")):
        candidate = start
        while candidate not in ("", "/"):
            if os.path.isfile(candidate):
                return candidate
            candidate = os.path.dirname(candidate)
    return path


def _url_identity(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return _object_identity(url)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as answer:
            headers = {name: answer.headers[name] for name in ("ETag", "Content-Length", "Last-Modified")}
    except (URLError, OSError, ValueError):
        return {}
    return {name.lower(): value for name, value in headers.items() if value}


def _object_identity(path: str) -> dict[str, Any]:
    """ETag and size of an object in a bucket, where fsspec and the bucket's package are there to ask."""
    for scheme, prefix in _SCHEMES.items():
        if path.startswith(prefix):
            path = f"{scheme}://{path.removeprefix(prefix)}"
    if "://" not in path:
        return {}
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
        facts = filesystem.info(inner)
    except (ImportError, OSError, ValueError):
        return {}
    return {name: str(facts[name]) for name in ("ETag", "etag", "size", "LastModified") if facts.get(name)}
