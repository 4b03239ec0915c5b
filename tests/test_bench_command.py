"""`tilepipe bench` as a command, and settings that come from the file that it writes."""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_line, job, make_files, planned, run

from tilepipe.job import Job
from tilepipe.store.output import open_store

SECONDS = 0.05


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def tuned(files: Path, tmp_path_factory) -> tuple[Path, Any]:
    """A file that the command wrote, and what it printed."""
    target = tmp_path_factory.mktemp("tuned") / "tuned.toml"
    words = ("--block", "96", "--tile", "64", "--stitch", "blend", "--threads", "2", "--seconds", SECONDS)
    result = run("bench", *job(files), *words, "--json", "--output", target)
    assert result.exit_code == 0, result.output
    return target, result


def test_the_command_prints_json_and_tells_what_it_measures(tuned: tuple[Path, Any]) -> None:
    _, result = tuned
    found = json.loads(result.stdout)
    promised = """subject seconds read stage products forward copy kernels write whole rates bound suggestion notes"""
    assert set(found) == set(promised.split())
    assert found["suggestion"]["options"] == {"tile": [64, 64], "block": [96, 96], "threads": 2}
    lines = result.stderr.splitlines()
    assert all(line.startswith("tilepipe: measuring: ") for line in lines)
    for said in ("reading", "zarr", "matrix", "64 x 64, 2 threads", "kernels", "writing", "itself"):
        assert any(said in line for line in lines), said


def test_the_file_holds_the_suggestion_and_says_where_it_is_from(tuned: tuple[Path, Any]) -> None:
    path, result = tuned
    text = path.read_text()
    found = json.loads(result.stdout)
    assert tomllib.loads(text) == found["suggestion"]["options"]
    comment = "\n".join(line for line in text.splitlines() if line.startswith("# "))
    for said in (found["subject"]["device"], "net.safetensors", "image.tif", "network", "tilepipe", "whole job"):
        assert said in comment


# ---- settings from the file ----


def test_a_job_obeys_the_file(files: Path, tuned: tuple[Path, Any]) -> None:
    words = (*job(files), "--stitch", "blend", "--tuned", tuned[0])
    found = planned(*words)
    assert (found["models"][0]["tile"], found["block"]) == ([64, 64], [96, 96])
    assert planned(*words[:-2])["block"] != [96, 96]
    from_environment = planned(*words[:-2], env={"TILEPIPE_TUNED": str(tuned[0])})
    assert from_environment["block"] == [96, 96]


def test_a_tuned_file_counts_after_everything_else(files: Path, tmp_path: Path) -> None:
    config, tuned = tmp_path / "job.toml", tmp_path / "tuned.toml"
    config.write_text("tile = 96\n")
    tuned.write_text('tile = [64, 64]\nblock = 80\nprecision = "float64"\n')
    blend = (*job(files), "--stitch", "blend")
    both = ((*blend, "--config", config, "--tuned", tuned), (*blend, "--tuned", tuned, "--config", config))
    for words in both:
        found = planned(*words)
        assert (found["models"][0]["tile"], found["block"], found["precision"]) == ([96, 96], [80, 80], "float64")
        environment = {"TILEPIPE_TILE": "128", "TILEPIPE_PRECISION": "float32"}
        found = planned(*words, env=environment)
        assert (found["models"][0]["tile"], found["precision"]) == ([128, 128], "float32")
        found = planned(*words, "--tile", "112", "--block", "64", env=environment)
        assert (found["models"][0]["tile"], found["block"]) == ([112, 112], [64, 64])


def test_the_store_does_not_tell_where_settings_came_from(files: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.toml"
    tuned.write_text("tile = [64, 64]\nblock = [96, 96]\nthreads = 1\n")
    line, file = tmp_path / "line.zarr", tmp_path / "file.zarr"
    blend = ("--stitch", "blend", "-q", "--json")
    result = run("segment", *job(files, line), *blend, "--tile", "64", "--block", "96", "--threads", "1")
    assert result.exit_code == 0, result.output
    result = run("segment", *job(files, file), *blend, "--tuned", tuned)
    assert result.exit_code == 0, result.output
    assert open_store(line).spec.to_json() == open_store(file).spec.to_json()
    # Either command finds the other's output done.
    again = run("segment", *job(files, line), *blend, "--tuned", tuned)
    assert json.loads(again.stdout)["computed"] == 0


def test_predict_takes_tuned_settings(files: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.toml"
    tuned.write_text("tile = [64, 64]\nblock = [96, 96]\n")
    words = (*job(files, tmp_path / "out.zarr"), "--stitch", "blend", "--tuned", tuned, "--dry-run", "--json")
    found = json.loads(run("predict", *words).stdout)
    assert (found["models"][0]["tile"], found["block"]) == ([64, 64], [96, 96])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tyle = 3", "'tile'"),
        ("tile = ", "TOML"),
        ("tuned = 'other.toml'", "unknown key 'tuned'"),
        ("config = 'other.toml'", "unknown key 'config'"),
    ],
)
def test_a_wrong_tuned_file_is_wrong_usage(tmp_path: Path, text: str, said: str) -> None:
    tuned = tmp_path / "tuned.toml"
    tuned.write_text(text)
    assert_one_line(run("plan", "a.tif", "--tuned", tuned), 2, said, "tuned.toml")


def test_a_config_file_names_no_tuned_file(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text("tuned = 'other.toml'")
    assert_one_line(run("plan", "a.tif", "--config", config), 2, "unknown key 'tuned'")


def test_an_unreadable_tuned_file_is_wrong_usage(tmp_path: Path) -> None:
    assert_one_line(run("plan", "a.tif", "--tuned", tmp_path / "none.toml"), 2, "--tuned", "none.toml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tile", "100"), "tile size 100 is not legal"),
        (("--seconds", "0"), "seconds is 0"),
        (("--scheduler", "tcp://a:1"), "--scheduler"),
        (("--folder", "nowhere-at-all"), "nowhere-at-all"),
        (("--output", "nowhere-at-all/tuned.toml"), "--output"),
    ],
)
def test_what_cannot_be_measured_is_one_line(files: Path, words: tuple[str, ...], said: str) -> None:
    assert_one_line(run("bench", *job(files), "-q", *words), 2, said)


def test_a_file_that_is_there_is_kept(files: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.toml"
    tuned.write_text("tile = 96\n")
    assert_one_line(run("bench", *job(files), "-q", "--output", tuned), 2, "--overwrite")
    assert tuned.read_text() == "tile = 96\n"


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_nothing_is_left(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    before = signal.getsignal(number)

    def staging(job: Job, folder: Path, seconds: float) -> None:
        (folder / "written").touch()
        signal.raise_signal(number)

    monkeypatch.setattr("tilepipe.bench.input.stage", staging)
    result = run("bench", *job(files), "-q", "--seconds", SECONDS, "--folder", tmp_path)
    assert_one_line(result, exit_code, "stopped", "removed")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before
