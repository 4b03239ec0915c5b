"""Commands at work: where their values come from, what they print, write, resume and refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import typer
from commands import assert_one_line, job, make_files, planned, run, shell
from typer.testing import CliRunner

from tilepipe.cli.arguments import option, spread
from tilepipe.cli.options import JobOptions
from tilepipe.exported.archive import save_exported
from tilepipe.models import build
from tilepipe.proof import Check, Proof


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("cli"))


# ---- where values come from ----


def test_values_come_from_the_line_then_the_environment_then_the_file(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('tile = 256\nprecision = "float64"\nblock = [128, 64]\n')
    words = (*job(files), "--stitch", "blend", "--config", config)
    tile = {"TILEPIPE_TILE": "128"}
    assert planned(*words)["models"][0]["tile"] == [160, 176]  # larger tiles than the raster are the raster
    assert planned(*words)["block"] == [128, 64]
    assert planned(*words, env=tile)["models"][0]["tile"] == [128, 128]
    assert planned(*words, "--tile", "96", env=tile)["models"][0]["tile"] == [96, 96]
    assert planned(*words)["precision"] == "float64"
    assert planned(*words, env={"TILEPIPE_PRECISION": "float32"})["precision"] == "float32"
    assert planned(*words[:-2], env={"TILEPIPE_CONFIG": str(config)})["precision"] == "float64"


def test_a_flag_can_be_taken_back(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text("confidence = true\nshards = false\n")
    whole = planned(*job(files))["output_bytes"]
    words = (*job(files), "--config", config)
    assert planned(*words)["output_bytes"] == 2 * whole
    assert planned(*words, "--no-confidence")["output_bytes"] == whole
    assert planned(*words, env={"TILEPIPE_CONFIDENCE": "0"})["output_bytes"] == whole


def test_a_file_may_hold_options_of_segment_alone(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text("overwrite = true\ndevice-memory = '4G'\nno-shards = true\n")
    assert planned(*job(files), "--config", config)["blocks"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tyle = 3", "'tile'"),
        ("[segment]\ntile = 3", "unknown key 'segment'"),
        ("tile = {rows = 3}", "tile"),
        ("tile = ", "TOML"),
        ("config = 'other.toml'", "unknown key 'config'"),
    ],
)
def test_a_wrong_file_is_wrong_usage(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "job.toml"
    config.write_text(text)
    assert_one_line(run("plan", "a.tif", "--config", config), 2, said)


def test_an_unknown_key_lists_the_legal_ones(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text("divice = 'cpu'")
    result = run("segment", "a.tif", "b.zarr", "--config", config)
    for name in ("'divice'", "'device'", "device-memory", "overwrite", "no-shards"):
        assert name in result.stderr


def test_a_missing_file_is_wrong_usage(tmp_path: Path) -> None:
    assert_one_line(run("plan", "a.tif", "--config", tmp_path / "none.toml"), 2, "none.toml")


def test_spread_gives_a_command_a_dataclass_fields() -> None:
    seen = []

    def command(talk: JobOptions, last: int = 3) -> None:
        seen.append((talk, last))

    small = typer.Typer(pretty_exceptions_enable=False)
    # Annotations are strings in this file, as in the package's.
    small.command()(spread(command))
    assert CliRunner().invoke(small, ["--tile", "64", "--last", "5"]).exit_code == 0
    assert seen == [(JobOptions(tile="64"), 5)]


def test_an_option_listens_to_its_own_variable() -> None:
    assert option("--device-memory", help="h", panel="p").envvar == "TILEPIPE_DEVICE_MEMORY"
    assert option("--no-shards/--shards", help="h", panel="p").envvar == "TILEPIPE_NO_SHARDS"


# ---- plan and inspect ----


def test_plan_prints_what_a_job_takes(files: Path) -> None:
    result = run("plan", *job(files), "--tile", "224", "--stitch", "exact")
    assert result.exit_code == 0, result.output
    for said in ("16n", "halo", "overhead", "exact", "float32", "limit"):
        assert said in result.output


def test_dry_run_prints_the_plan_and_writes_nothing(files: Path, tmp_path: Path) -> None:
    before = sorted(files.rglob("*"))
    result = run("segment", *job(files, tmp_path / "out.zarr"), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == planned(*job(files)) | {
        name: json.loads(result.stdout)[name] for name in ("limits",)
    }
    assert list(tmp_path.iterdir()) == []
    assert sorted(files.rglob("*")) == before


def test_inspect_says_what_a_model_asks(files: Path) -> None:
    result = run("inspect", files / "net.safetensors", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["network"]["rows"]["sizes"] == "16n"
    assert found["exact"] is True
    assert found["proof"]["passed"] is True
    assert [tile["core"][0] for tile in found["tiles"]] == [1024, 2048, 4096]
    assert found["card"]["classes"][1]["name"] == "sea"


def test_inspect_exits_with_3_where_the_proof_fails(files: Path, monkeypatch) -> None:
    found = Proof((Check("poison", "rows 1:2 changed", ok=False), Check("congruence", "equal", ok=True)), seed=0)
    monkeypatch.setattr("tilepipe.proof.prove", lambda network, geometry: found)
    result = run("inspect", files / "net.safetensors")
    assert result.exit_code == 3
    assert "FAILED: 1 of 2" in result.output
    assert "rows 1:2 changed" in result.output
    assert "Traceback" not in result.output


def test_inspect_knows_architectures_without_weights() -> None:
    result = run("inspect", "segnet", "--no-proof")
    assert result.exit_code == 0, result.output
    for said in ("32n", "reach 186", "halo 192", "1408 x 1408", "1.89"):
        assert said in result.output


def inspected(*words: object) -> dict[str, Any]:
    result = run("inspect", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_inspect_takes_whatever_a_job_takes(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text("import torch\ndef make(depth): return torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 3)] * depth)")
    found = inspected(f"{code}:make", "--arg", "depth=3")
    assert (found["network"]["rows"]["reach"], found["channels"], found["card"]) == ([0, 6], [4, 4], None)
    torch.save(build("lenet", width=0.1).state_dict(), tmp_path / "lenet.pt")
    found = inspected("lenet", "--arg", "width=0.1", "--weights", tmp_path / "lenet.pt")
    assert "lenet.pt" in found["model"]
    assert inspected("segnet", "--no-proof", "--arg", "width=0.1", "--input-bands", 5)["channels"][0] == 5
    save_exported(tmp_path / "net.pt2", torch.nn.Conv2d(2, 3, 5))
    assert inspected(tmp_path / "net.pt2")["network"]["rows"]["reach"] == [0, 4]


def test_inspect_shows_a_network_as_a_job_varies_it() -> None:
    lenet = ("lenet", "--arg", "width=0.1", "--stride", 1)
    for dense in ("dilate", "stitch"):
        found = inspected(*lenet, "--dense", dense)
        assert (found["network"]["rows"]["scale"], found["proof"]["passed"]) == (1, True)
    basic = ("segnet-basic", "--arg", "width=0.05")
    assert inspected(*basic, "--stride", 1, "--no-proof")["network"]["rows"]["sizes"] == "16n"
    found = inspected(*basic, "--tta", "flips")
    assert found["proof"]["passed"]
    assert_one_line(run("inspect", *lenet, "--tta", "flips"), 3, "--tta is not possible")
    assert_one_line(run("inspect", "lenet", "--stride", 2), 2, "stride is 2", "legal is 1")


def test_inspect_verbose_lists_the_layers() -> None:
    result = run("inspect", "segnet-basic", "--no-proof", "-v")
    assert "max_unpool2d" in result.output


def test_models_lists_architectures() -> None:
    assert "segnet-basic" in run("models").output
    assert {"bundled", "architectures"} == set(json.loads(run("models", "--json").stdout))


# ---- segment, status, export, ingest ----


@pytest.fixture(scope="module")
def labelled(files: Path) -> Path:
    """A finished store of the folder's raster, in four blocks."""
    store = files / "labels.zarr"
    result = run("segment", *job(files, store), "--block", "96", "--tile", "160x176", "--json", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["computed"], found["resumed"], found["stitch"]) == (4, 0, "exact")
    assert sum(found["classes"].values()) + found["nodata"] == 150 * 170
    return store


def test_a_finished_job_is_already_done(files: Path, labelled: Path) -> None:
    result = run("segment", *job(files, labelled), "--block", "96", "--tile", "160x176")
    assert result.exit_code == 0, result.output
    assert "already done" in result.stdout


def test_another_job_is_refused_until_overwrite(files: Path, labelled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "labels.zarr"
    shutil.copytree(labelled, copy)
    words = ("segment", *job(files, copy), "--block", "96", "--tile", "160x176", "--confidence")
    assert_one_line(run(*words, "-q"), 3, "--overwrite")
    result = run(*words, "--overwrite", "-q")
    assert result.exit_code == 0, result.output
    assert "exact" not in result.stderr


def test_progress_is_lines_on_stderr_and_the_result_on_stdout(files: Path, tmp_path: Path) -> None:
    words = ("segment", *job(files, tmp_path / "a.zarr"), "--stitch", "blend", "--tile", "96", "--overlap", "32")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "1 of 1 blocks" in result.stderr
    assert "disagreed on" in result.stdout
    assert all(name in result.stdout for name in ("land", "sea", "road"))


def test_log_json_is_an_object_per_line(files: Path, tmp_path: Path) -> None:
    result = run("segment", *job(files, tmp_path / "a.zarr"), "--log-json", "--json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert events[-1]["event"] in ("progress", "note")
    last = [event for event in events if event["event"] == "progress"][-1]
    assert last["done"] == last["total"] == 1
    assert json.loads(result.stdout)["blocks"] == 1


def test_status_tells_of_a_store(labelled: Path) -> None:
    found = json.loads(run("status", labelled, "--json").stdout)
    assert (found["done"], found["blocks"], found["writer"]) == (4, 4, None)
    assert found["pixel_area"] == pytest.approx(0.25)
    with rasterio.open(labelled.parent / "image.tif") as tif:
        assert sum(found["classes"].values()) + found["nodata"] == tif.width * tif.height
    text = run("status", labelled).output
    for said in ("4 of 4", "sea", "net.safetensors", "ha", "nobody"):
        assert said in text


def test_export_writes_a_geotiff_once(labelled: Path, tmp_path: Path) -> None:
    target = tmp_path / "labels.tif"
    assert json.loads(run("export", labelled, target, "--json").stdout)["file"] == str(target)
    with rasterio.open(target) as tif:
        assert (tif.shape, tif.crs.to_epsg()) == ((150, 170), 32633)
    assert_one_line(run("export", labelled, target), 2, "--overwrite")
    assert run("export", labelled, target, "--overwrite").exit_code == 0


def test_ingest_makes_a_raster_that_plans_alike(files: Path, tmp_path: Path) -> None:
    store = tmp_path / "image.zarr"
    result = run("ingest", files / "image.tif", store, "--json", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shape"] == [150, 170]
    assert planned(store, "--model", files / "net.safetensors", "--device", "cpu")["shape"] == [150, 170]
    assert_one_line(run("ingest", files / "image.tif", store, "-q"), 3, "exists")


# ---- the process itself ----


def test_the_module_runs_as_a_program() -> None:
    done = shell("segment", "nowhere.tif")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tilepipe: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_stops_a_job_that_resumes(files: Path, tmp_path: Path, number: int, exit_code: int) -> None:
    store = tmp_path / "out.zarr"
    big = tmp_path / "big.tif"
    with rasterio.open(big, "w", driver="GTiff", height=3000, width=3000, count=3, dtype="uint8") as tif:
        tif.write(np.random.default_rng(2).integers(0, 256, (3, 3000, 3000), dtype=np.uint8))
    words = (
        big,
        store,
        "--model",
        files / "net.safetensors",
        "--device",
        "cpu",
        "--block",
        "256",
        "--tile",
        "448",
    )
    command = [sys.executable, "-m", "tilepipe", "segment", *map(str, words), "--stitch", "exact"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    records = store / "labels" / ".tilepipe"
    deadline = time.monotonic() + 90
    while not list(records.glob("[0-9]*/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == exit_code, told
    assert "resumes" in told.splitlines()[-1]
    assert "Traceback" not in told
    done = json.loads(run("status", store, "--json").stdout)
    assert 0 < done["done"] < done["blocks"]
    assert done["writer"] is None
