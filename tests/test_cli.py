"""The command line as its users meet it: exit codes, one-line errors, JSON, precedence, help and documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import assert_one_line, job, make_files, run

from tilepipe.cli import app
from tilepipe.cli.failures import Manner, explain, report
from tilepipe.cli.model_options import ModelOptions
from tilepipe.cli.options import JobOptions, LabelOptions
from tilepipe.errors import InputError, RunError, StoppedError, StoreBusyError, UsageError
from tilepipe.options import SegmentOptions

README = Path(__file__).parent.parent / "README.md"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEAVY = ("torch", "dask", "distributed", "zarr", "rasterio", "numba", "numpy")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("cli"))


# ---- help and documentation ----


def test_the_commands_are_these() -> None:
    names = (
        "segment predict plan batch inspect models status stats preview export overviews ingest train evaluate demo "
        "bench"
    )
    assert set(COMMANDS) == set(names.split())


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
        --scheduler --stage --no-shards --no-overviews --overwrite --dry-run --config --quiet -q --verbose -v --json
        --log-json"""
    assert set(promised.split()) <= flags


def test_plan_takes_the_options_of_a_job() -> None:
    def names(command: str) -> set[str]:
        return {parameter.name for parameter in COMMANDS[command].params}

    assert names("segment") - names("plan") == {"paths", "quiet", "log_json", "overwrite", "dry_run"}


def test_every_option_of_a_job_reaches_the_library() -> None:
    network = ModelOptions(stride=1, dense="stitch", tta="d4")
    labels = LabelOptions(combine="max", refine="crf", confidence=True, probabilities="uint8")
    job = JobOptions(
        stitch="blend",
        tile="64x96",
        overlap=8,
        window="hann",
        precision="float64",
        bands="3,2,1",
        nodata="7",
        region="0:10,0:20",
        mask="area.geojson",
        resample=True,
        stage="never",
        block="128",
        no_shards=True,
        no_overviews=True,
        device="cpu",
        gpus="0,1",
        memory="2G",
        device_memory="1G",
        workers=2,
        threads=3,
        scheduler="tcp://a:1",
    )
    chosen = job.resolve(overwrite=True, **network.resolve(), **labels.resolve())
    assert chosen == SegmentOptions(
        stitch="blend",
        tile=(64, 96),
        overlap=8,
        window="hann",
        precision="float64",
        bands=(3, 2, 1),
        nodata=7,
        region="0:10,0:20",
        mask="area.geojson",
        resample=True,
        stage="never",
        block=(128, 128),
        confidence=True,
        probabilities="uint8",
        stride=1,
        dense="stitch",
        tta="d4",
        combine="max",
        refine="crf",
        shards=False,
        overviews=False,
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
    untold = {name for name in SegmentOptions.__dataclass_fields__ if getattr(chosen, name) == getattr(default, name)}
    assert untold == {"window", "values"}


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom tilepipe.cli import app\n"
        "try: app(['--help'], prog_name='tilepipe')\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "segment" in done.stdout
    assert done.stderr.strip() == "[]"


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
        (StoppedError("stopped", 75), 75, "stopped"),
        (KeyboardInterrupt(), 130, "resumes"),
        (MemoryError(), 1, "memory"),
        (OSError(28, "No space left on device", "/disk/x"), 1, "No space left on device: /disk/x"),
        (PermissionError(13, "Permission denied", "/data/x"), 3, "Permission denied: /data/x"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_every_error_has_one_line_and_an_exit_code(error: BaseException, exit_code: int, said: str, capsys) -> None:
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
