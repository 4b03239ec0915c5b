"""The command line as its users meet it: exit codes, one-line errors, JSON, precedence, help and documentation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import typer
from rasterio.transform import from_origin
from typer.testing import CliRunner, Result

from tilepipe.checkpoint import ClassInfo, ModelCard, save_model
from tilepipe.cli import app
from tilepipe.cli.arguments import option, spread
from tilepipe.cli.failures import Manner, explain, report
from tilepipe.cli.options import JobOptions
from tilepipe.errors import InputError, Interrupted, RunError, StoreBusyError, UsageError
from tilepipe.models import build
from tilepipe.options import SegmentOptions
from tilepipe.proof import Check, Proof

README = Path(__file__).parent.parent / "README.md"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEAVY = ("torch", "dask", "distributed", "zarr", "rasterio", "numba", "numpy")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with image.tif (150 x 170, 3 bands), net.safetensors (3 classes) and whole.safetensors' raster."""
    folder = tmp_path_factory.mktemp("cli")
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


@pytest.fixture(autouse=True)
def _clean(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith("TILEPIPE_") and name != "TILEPIPE_TEST_DATA":
            monkeypatch.delenv(name)


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


# ---- help and documentation ----


def test_the_commands_are_these() -> None:
    assert set(COMMANDS) == {"segment", "plan", "inspect", "models", "status", "export", "ingest", "demo"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name} has no help"
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert re.search(rf"`?tilepipe {name}\b", README.read_text()), f"tilepipe {name} is missing from README.md"


def test_segment_has_the_promised_options() -> None:
    flags = {flag for parameter in COMMANDS["segment"].params for flag in parameter.opts}
    promised = """--model --stitch --tile --overlap --window --block --bands --nodata --region --mask --resample
        --confidence --probabilities --precision --device --memory --device-memory --workers --threads --gpus
        --scheduler --stage --no-shards --overwrite --dry-run --config --quiet -q --verbose -v --json --log-json"""
    assert set(promised.split()) <= flags


def test_plan_takes_the_options_of_a_job() -> None:
    def names(command: str) -> set[str]:
        return {parameter.name for parameter in COMMANDS[command].params}

    assert names("segment") - names("plan") == {"paths", "quiet", "log_json", "overwrite", "dry_run"}


def test_every_option_of_a_job_reaches_the_library() -> None:
    taken = {"no_shards": "shards"}
    fields = {taken.get(name, name) for name in JobOptions.__dataclass_fields__} - {"model"}
    assert fields | {"overwrite"} == set(SegmentOptions.__dataclass_fields__)
    chosen = JobOptions(
        stitch="blend",
        tile="64x96",
        overlap=8,
        window="hann",
        precision="float64",
        bands="3,2,1",
        nodata=7.0,
        region="0:10,0:20",
        mask="area.geojson",
        resample=True,
        stage="never",
        block="128",
        confidence=True,
        probabilities="uint8",
        no_shards=True,
        device="cpu",
        gpus="0,1",
        memory="2G",
        device_memory="1G",
        workers=2,
        threads=3,
        scheduler="tcp://a:1",
    ).resolve(overwrite=True)
    assert chosen == SegmentOptions(
        stitch="blend",
        tile=(64, 96),
        overlap=8,
        window="hann",
        precision="float64",
        bands=(3, 2, 1),
        nodata=7.0,
        region="0:10,0:20",
        mask="area.geojson",
        resample=True,
        stage="never",
        block=(128, 128),
        confidence=True,
        probabilities="uint8",
        shards=False,
        device="cpu",
        gpus=(0, 1),
        memory=2 << 30,
        device_memory=1 << 30,
        workers=2,
        threads=3,
        scheduler="tcp://a:1",
        overwrite=True,
    )
    default = SegmentOptions()
    assert all(getattr(chosen, name) != getattr(default, name) for name in fields - {"window"})


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom tilepipe.cli import app\n"
        "try: app(['--help'], prog_name='tilepipe')\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "segment" in done.stdout
    assert done.stderr.strip() == "[]"


def test_help_uses_little_time() -> None:
    # Processor time, which other load on the machine does not change much; the wall time without load is like it.
    code = "from tilepipe.cli import app; app(['--help'], prog_name='tilepipe')"
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
        after = os.times()
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(times) < 0.6


def test_without_a_command_help_is_printed() -> None:
    result = run()
    assert result.exit_code == 0
    assert "segment" in result.output


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("segment",), "INPUT... OUTPUT.zarr"),
        (("segment", "a.tif"), "output last"),
        (("segment", "a.tif", "b.tif"), "tilepipe export"),
        (("segment", "a.tif", "b.zarr", "--stitch", "magic"), "auto, exact, blend"),
        (("segment", "a.tif", "b.zarr", "--tile", "big"), "1408x1024"),
        (("segment", "a.tif", "b.zarr", "--memory", "lots"), "8G"),
        (("segment", "a.tif", "b.zarr", "--workers", "0"), "positive"),
        (("segment", "a.tif", "b.zarr", "--workers", "two"), "--workers"),
        (("segment", "a.tif", "b.zarr", "--bands", "red"), "1,2,3"),
        (("segment", "a.tif", "b.zarr", "--precision", "int8"), "float64, float32, bf16"),
        (("segment", "a.tif", "b.zarr", "--probabilities", "uint64"), "uint8, float16"),
        (("segment", "a.tif", "b.zarr", "--no-such-option"), "--no-such-option"),
        (("segmnt",), "'segment'"),
        (("plan",), "INPUT"),
        (("demo", "--size", "wide"), "size"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(words: tuple[str, ...], said: str) -> None:
    assert_one_line(run(*words), 2, said)


def test_a_missing_raster_is_bad_input(files: Path) -> None:
    result = run("plan", files / "nowhere.tif", "--model", files / "net.safetensors")
    assert_one_line(result, 3, "nowhere.tif")


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_what_is_no_model_is_bad_input(files: Path, command: str) -> None:
    words = ["image.tif", "--model", "image.tif"] if command == "plan" else ["image.tif"]
    result = run(command, *(files / word if word.endswith(".tif") else word for word in words))
    assert_one_line(result, 3, "image.tif")


def test_an_unknown_model_names_the_legal_ones() -> None:
    assert_one_line(run("inspect", "segnot"), 3, "segnot", "segnet-basic")


def test_an_output_that_is_something_else_is_left_alone(files: Path, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "notes.txt").write_text("mine")
    assert_one_line(run("segment", *job(files, tmp_path / "out.zarr"), "--overwrite", "-q"), 3, "notes.txt")
    assert (tmp_path / "out.zarr" / "notes.txt").read_text() == "mine"


def test_a_store_that_is_none_is_bad_input(tmp_path: Path) -> None:
    for words in (("status", tmp_path), ("export", tmp_path, tmp_path / "a.tif")):
        assert_one_line(run(*words), 3, str(tmp_path))


def test_too_little_memory_is_said_with_a_remedy(files: Path) -> None:
    assert_one_line(run("plan", *job(files), "--memory", "10M"), 2, "--memory")


def test_errors_as_json_are_one_object_on_stdout(files: Path) -> None:
    result = run("plan", files / "nowhere.tif", "--model", files / "net.safetensors", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"] == 3
    assert "nowhere.tif" in found["error"]
    assert result.stderr == ""


def test_errors_in_the_log_are_one_object_on_stderr(files: Path, tmp_path: Path) -> None:
    result = run("segment", files / "nowhere.tif", tmp_path / "o.zarr", "--model", "m", "--log-json")
    event = json.loads(result.stderr)
    assert (event["event"], event["exit_code"], result.exit_code) == ("error", 3, 3)


@pytest.mark.parametrize(
    ("error", "exit_code", "said"),
    [
        (UsageError("a\nb"), 2, "a b"),
        (InputError("bad"), 3, "bad"),
        (RunError("later"), 1, "later"),
        (StoreBusyError("busy"), 1, "busy"),
        (Interrupted("stopped", 75), 75, "stopped"),
        (KeyboardInterrupt(), 130, "resumes"),
        (MemoryError(), 1, "memory"),
        (OSError(28, "No space left on device", "/disk/x"), 1, "No space left on device: /disk/x"),
        (PermissionError(13, "Permission denied", "/root/x"), 3, "Permission denied: /root/x"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_every_error_has_one_line_and_an_exit_code(
    error: BaseException, exit_code: int, said: str, capsys
) -> None:
    assert explain(error).exit_code == exit_code
    assert report(error, Manner()) == exit_code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert ("-v" in printed) == isinstance(error, ZeroDivisionError)


def test_a_traceback_comes_only_with_verbose(files: Path) -> None:
    words = ("plan", files / "nowhere.tif", "--model", files / "net.safetensors")
    assert "Traceback" not in run(*words).stderr
    assert "Traceback" in run(*words, "-v").stderr


# ---- where values come from ----


def planned(*words: str | Path, env: dict[str, str] | None = None) -> dict[str, object]:
    result = run("plan", *words, "--json", env=env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_values_come_from_the_line_then_the_environment_then_the_file(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('tile = 256\nprecision = "float64"\nblock = [128, 64]\n')
    words = (*job(files), "--stitch", "blend", "--config", config)
    tile = {"TILEPIPE_TILE": "128"}
    assert planned(*words)["tile"] == [160, 176]  # larger tiles than the raster are the raster
    assert planned(*words)["block"] == [128, 64]
    assert planned(*words, env=tile)["tile"] == [128, 128]
    assert planned(*words, "--tile", "96", env=tile)["tile"] == [96, 96]
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
