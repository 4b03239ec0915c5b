"""Running the command line in tests: a raster, a model, and what a command printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from typer.testing import CliRunner, Result

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.cli import app
from tilepipe.models import build


def make_files(folder: Path) -> Path:
    """The folder, with image.tif (150 x 170 pixels, 3 bands) and net.safetensors (3 classes)."""
    random = np.random.default_rng(1)
    profile = {
        "driver": "GTiff",
        "height": 150,
        "width": 170,
        "count": 3,
        "dtype": "uint8",
        "crs": "EPSG:32633",
        "transform": from_origin(500_000, 5_800_000, 0.5, 0.5),
    }
    with rasterio.open(folder / "image.tif", "w", photometric="rgb", **profile) as tif:
        tif.write(random.integers(0, 256, (3, 150, 170), dtype=np.uint8))
    torch.manual_seed(3)
    arguments = {"classes": 3, "bands": 3, "width": 0.1}
    card = ModelCard(
        architecture="segnet-basic",
        arguments=arguments,
        classes=tuple(ClassInfo(name, (90 * i, 20, 200)) for i, name in enumerate(("land", "sea", "road"))),
        bands=("red", "green", "blue"),
        mean=(120.0, 120.0, 120.0),
        std=(60.0, 60.0, 60.0),
        nodata="zero after normalisation",
        resolution=0.5,
        licence="MIT",
        provenance={"score": {"mean_iou": 0.5}},
    )
    save_model(folder / "net.safetensors", build("segnet-basic", **arguments), card)
    return folder


def run(*words: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def shell(*words: str | Path, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tilepipe", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **more)


def job(files: Path, *words: str | Path) -> tuple[str | Path, ...]:
    """The words after a command that name the folder's raster and model."""
    return (files / "image.tif", *words, "--model", files / "net.safetensors", "--device", "cpu")


def assert_one_line(result: Result, exit_code: int, *said: str) -> None:
    assert result.exit_code == exit_code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("tilepipe: ")
    for text in said:
        assert text in lines[0]
    assert result.stdout == ""


def planned(*words: str | Path, env: dict[str, str] | None = None) -> dict[str, object]:
    result = run("plan", *words, "--json", env=env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
