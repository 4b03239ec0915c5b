"""Overviews as a job's last phase and as a command, and that nothing else minds them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from commands import assert_one_line, run
from pyramids import most_frequent
from rasters import write
from runs import OPTIONS, pixel_model, saved, segment
from stores import STATE, contents, make_spec, make_store

from tilepipe.errors import StoppedError
from tilepipe.evaluation import EvaluationOptions, evaluate
from tilepipe.pipeline import predict_raster, segment_raster
from tilepipe.schedule import Stop
from tilepipe.store.output import open_store

SHAPE = (530, 1100)
CUT: dict[str, Any] = {"tile": (512, 512), "block": (512, 512)}


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bands of patches and noise."""
    rng = np.random.default_rng(0)
    patches = np.kron(rng.integers(0, 256, (3, 53, 110)), np.ones((10, 10), int))
    values = np.clip(patches + rng.integers(-40, 40, (3, *SHAPE)), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("raster") / "in.tif"
    write(path, values)
    return path


def overview(path: Path, factor: int, name: str = "labels") -> Any:
    return zarr.open_group(path, mode="r")[f"ovr_{factor}x/{name}"][:]  # type: ignore[index]


@pytest.mark.parametrize("more", [{"confidence": True, "shards": False}, {"region": "3:530,7:901"}])
def test_segment_makes_them_at_its_end(memory_path: Path, raster: Path, more: dict[str, Any]) -> None:
    path = memory_path / "o.zarr"
    labels, summary = segment(raster, path, pixel_model(), **CUT, **more)
    assert list(summary.overviews) == [2, 4][: 1 if "region" in more else 2]
    assert summary.to_json()["overviews"] == list(summary.overviews)
    for factor in summary.overviews:
        np.testing.assert_array_equal(overview(path, factor), most_frequent(labels, factor, 255))
    # What segmenting once more, or without overviews before, does to the store: nothing, or what it lacks.
    before = contents(path)
    segment(raster, path, pixel_model(), **CUT, **more)
    assert contents(path) == before
    _, bare = segment(raster, memory_path / "b.zarr", pixel_model(), **CUT, **more, overviews=False)
    assert not bare.overviews
    assert not list((memory_path / "b.zarr").glob("ovr_*"))
    segment(raster, memory_path / "b.zarr", pixel_model(), **CUT, **more)
    assert overview(memory_path / "b.zarr", 2).tobytes() == overview(path, 2).tobytes()


def test_predict_makes_them_of_values(memory_path: Path, raster: Path) -> None:
    summary = predict_raster(raster, memory_path / "o.zarr", pixel_model(), replace(OPTIONS, **CUT))
    assert list(summary.overviews) == [2, 4]
    assert overview(memory_path / "o.zarr", 4, "values").shape == (5, 133, 275)


def test_a_job_stopped_before_them_makes_them_when_run_again(memory_path: Path, raster: Path) -> None:
    path, stop = memory_path / "o.zarr", Stop()
    seen: list[Any] = []

    def watch(state: Any) -> None:
        seen.append(state)
        if state.done == state.total and not state.work:
            stop.asked = True

    options = replace(OPTIONS, **CUT)
    with pytest.raises(StoppedError, match="0 of 1 parts of the overviews; the same command resumes"):
        segment_raster(raster, path, pixel_model(), options, progress=watch, stop=stop)
    assert [state.work for state in seen[-2:]] == ["", "overviews"]
    assert len(open_store(path).done()) == 6
    summary = segment_raster(raster, path, pixel_model(), options)
    assert (summary.computed, list(summary.overviews)) == (0, [2, 4])


def test_status_export_and_evaluate_see_the_map_alone(memory_path: Path, raster: Path) -> None:
    model, bare, path = (
        saved(pixel_model(), memory_path / "m.safetensors"),
        memory_path / "b.zarr",
        memory_path / "o.zarr",
    )
    segment(raster, bare, model, **CUT, overviews=False)
    shutil.copytree(bare, path)
    result = run("overviews", path, "--json", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["overviews"] == [2, 4]
    told = [json.loads(run("status", each, "--json").stdout) for each in (bare, path)]
    assert {**told[0], "store": ""} == {**told[1], "store": ""}
    scores = [evaluate(path, each, EvaluationOptions(boundary=False)) for each in (bare, path)]
    assert [each.confusion.accuracy for each in scores] == [1, 1]
    for each in (bare, path):
        assert run("export", each, memory_path / f"{each.stem}.tif").exit_code == 0
    assert (memory_path / "b.tif").read_bytes() == (memory_path / "o.tif").read_bytes()


def test_the_command_tells_what_it_did(memory_path: Path) -> None:
    path = memory_path / "o.zarr"
    make_store(path, make_spec(shape=(600, 1030), shard=(512, 512), chunk=(256, 256)))
    result = run("overviews", path)
    assert result.exit_code == 0, result.output
    assert f"{path}: overviews 2x, 4x, in" in result.stdout
    assert "overviews: 1 of 1 parts" in result.stderr
    events = [json.loads(line) for line in run("overviews", path, "--overwrite", "--log-json").stderr.splitlines()]
    assert events[-1]["work"] == "overviews"
    make_store(memory_path / "s.zarr")
    assert "none, since the map is small" in run("overviews", memory_path / "s.zarr", "-q").stdout
    assert not list((memory_path / "s.zarr").glob("ovr_*"))


def test_mistakes_are_one_line(memory_path: Path) -> None:
    assert_one_line(run("overviews", memory_path / "no.zarr", "-q"), 3, "not a tilepipe store")
    make_store(memory_path / "o.zarr")
    (memory_path / "o.zarr" / STATE / "1" / "0.json").unlink()
    assert_one_line(run("overviews", memory_path / "o.zarr", "-q"), 3, "5 of 6 blocks", "finish")
