"""What a job is before it runs: its device, and the plan that a resumed one keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rasterio.transform import from_origin
from reference import model_of, scene, write_raster

from tilepipe.errors import PlanError, UsageError
from tilepipe.job import Job, Machine, prepare
from tilepipe.member import choose_models
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.projection import Resources
from tilepipe.raster.source import open_raster


def job_with(options: SegmentOptions, device: Any) -> Job:
    nothing: Any = None
    machine = Machine(Resources(device=device), "float32")
    return Job(nothing, None, (), (), options, None, machine, ())


@pytest.mark.parametrize(
    ("options", "device", "target"),
    [
        (SegmentOptions(), "cpu", "cpu"),
        (SegmentOptions(), "cuda", "cuda"),
        (SegmentOptions(device="cuda:1"), "cuda", "cuda:1"),
        (SegmentOptions(gpus=(3,)), "cuda", "cuda:3"),
        (SegmentOptions(gpus=(2, 3)), "cuda", "cuda"),
    ],
)
def test_each_worker_asks_for_the_device_that_it_sees(options: SegmentOptions, device: str, target: str) -> None:
    job = job_with(options, device)
    assert job.target == target
    # Several GPUs are a process each; one is this process's own.
    assert job.pool.gpus == ((2, 3) if options.gpus == (2, 3) else ())


def test_a_resumed_job_keeps_its_plan_and_needs_its_memory(tmp_path: Path) -> None:
    model = model_of(build("linear", classes=4, bands=3).eval(), 4)
    raster = write_raster(tmp_path / "in.tif", scene((300, 300)))
    options = SegmentOptions(device="cpu", block=(128, 128))
    segment_raster(raster, tmp_path / "out.zarr", model, options)
    kept = prepare(raster, model, replace(options, threads=1), [prepare(raster, model, options).plan.to_json()]).plan
    assert kept.block == (128, 128)
    assert segment_raster(raster, tmp_path / "out.zarr", model, replace(options, threads=1)).computed == 0
    with pytest.raises(PlanError, match="planned with more memory"):
        segment_raster(raster, tmp_path / "out.zarr", model, replace(options, memory=1 << 20))


def test_a_job_on_a_gpu_stores_its_steps_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one on a CPU has none, so that it can be resumed whatever Triton is there."""
    model = model_of(build("linear", classes=4, bands=3).eval(), 4)
    raster = write_raster(tmp_path / "in.tif", scene((300, 300)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (8 << 30, 8 << 30))
    jobs, fingerprints, parts = {}, {}, {"steps", "triton"}
    for found in ("3.6.0", None):
        for module in ("tilepipe.predict.cuda_steps", "tilepipe.job"):
            monkeypatch.setattr(f"{module}.triton_version", lambda found=found: found)
        jobs[found] = prepare(raster, model, SegmentOptions(device="cuda"))
        fingerprints[found] = jobs[found].fingerprint()
        assert not prepare(raster, model, SegmentOptions(device="cpu")).fingerprint().keys() & parts
    with_it, without = fingerprints.values()
    assert (with_it["steps"]["pooling"], without["steps"]["pooling"]) == (True, False)
    assert {name for name in with_it if with_it[name] != without[name]} == parts
    assert jobs[None].settings()["steps"] == without["steps"]
    assert [any("Triton is not installed" in note for note in jobs[found].notes) for found in jobs] == [False, True]


def test_the_bundled_model_is_chosen_by_bands(tmp_path: Path) -> None:
    five = open_raster(write_raster(tmp_path / "five.tif", scene((50, 50), 5), photometric="minisblack"))
    with pytest.raises(UsageError, match="choose bands by --bands, or a model by --model"):
        choose_models(None, five, SegmentOptions())
    ((model, _),), notes = choose_models(None, five, SegmentOptions(bands=(1, 2, 3)))
    assert model.card.bands == ("red", "green", "blue")
    assert "bundled buildings" in notes[0]


@pytest.mark.parametrize("size", [0.03, 0.3, 5.0])
def test_of_the_bundled_models_the_synthetic_one_comes_last(tmp_path: Path, size: float) -> None:
    """Whatever the ground resolution; and one that the model does not know is said."""
    transform = from_origin(500000, 5400000, size, size)
    raster = write_raster(tmp_path / "in.tif", scene((50, 50)), photometric="rgb", transform=transform)
    job = prepare(raster, None, SegmentOptions(device="cpu"))
    assert [member.model.source for member in job.members] == ["buildings"]
    assert any("was trained at 0.0746 to 0.299 m" in note for note in job.notes) == (size in (0.03, 5.0))
