"""What a batch is of: manifests, folders and patterns; where options count; what is refused before anything runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import assert_one_line, run
from reference import scene, write_raster
from runs import pixel_model, saved

from tilepipe.cli.progress import Lines, Terminal, Work, _bar
from tilepipe.progress import Progress

SMALL = ("--device", "cpu", "--threads", "1", "--tile", "64", "--block", "96")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a raster of 150 x 170 pixels and a model of single pixels."""
    folder = tmp_path_factory.mktemp("batch")
    write_raster(folder / "image.tif", scene((150, 170)))
    saved(pixel_model(), folder / "net.safetensors")
    return folder


def lines(path: Path, *text: str) -> Path:
    path.write_text("\n".join(text) + "\n")
    return path


def looked(*words: str | Path, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    result = run("batch", *words, "--dry-run", "--json", env=env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def scenes_in(files: Path, *names: str) -> None:
    for name in names:
        (files / name).parent.mkdir(exist_ok=True)
        if not (files / name).exists():
            os.link(files / "image.tif", files / name)


# ---- lists ----


def test_a_csv_row_has_a_scene_and_options_of_its_own(files: Path) -> None:
    scenes_in(files, "a.tif", "b.tif")
    jobs = lines(
        files / "jobs.csv",
        "input, output, block, Confidence, shards, model, model",
        "a.tif, out/a.zarr, 64, true, , net.safetensors, ",
        "",
        '"b.tif", b.zarr, , , false, net.safetensors, net.safetensors',
    )
    first, second = looked(jobs, "--device", "cpu", "--block", "96")
    assert (first["inputs"], first["output"]) == ([str(files / "a.tif")], str(files / "out/a.zarr"))
    assert (first["place"], second["place"]) == (f"{jobs} line 2", f"{jobs} line 4")
    assert (first["plan"]["block"], second["plan"]["block"]) == ([64, 64], [96, 96])
    assert first["plan"]["output_bytes"] == 2 * second["plan"]["output_bytes"]
    assert (len(first["plan"]["models"]), len(second["plan"]["models"])) == (1, 2)
    assert first["state"] == second["state"] == "new"


def test_values_come_from_the_row_the_line_the_environment_and_the_files(files: Path, tmp_path: Path) -> None:
    scenes_in(files, "a.tif", "b.tif")
    jobs = lines(
        files / "jobs.toml",
        '[defaults]\nmodel = "net.safetensors"\ntile = [128, 112]\nblock = 64\ndevice = "cpu"',
        '[[scene]]\ninput = "a.tif"\noutput = "a.zarr"',
        '[[scene]]\ninput = ["b.tif"]\noutput = "b.zarr"\ntile = 96',
    )

    def tiles(*words: str | Path, **env: str) -> list[list[int]]:
        return [each["plan"]["models"][0]["tile"] for each in looked(jobs, *words, env=env)]

    assert tiles() == [[128, 112], [96, 96]]
    tuned, config = lines(tmp_path / "tuned.toml", "tile = 80"), lines(tmp_path / "job.toml", "tile = 144")
    for order in (("--tuned", tuned, "--config", config), ("--config", config, "--tuned", tuned)):
        assert tiles(*order) == [[144, 144], [96, 96]]
    assert tiles("--tuned", tuned) == [[128, 112], [96, 96]]
    assert tiles("--config", config, TILEPIPE_TILE="112") == [[112, 112], [96, 96]]
    assert tiles("--tile", "64", TILEPIPE_TILE="112") == [[64, 64], [96, 96]]
    assert looked(jobs)[1]["place"].endswith("jobs.toml line 9")


def test_a_folder_and_patterns_name_scenes_by_their_files(files: Path) -> None:
    scenes_in(files, "many/a.tif", "many/b.tif", "many/deep.TIF")
    (files / "many" / "notes.txt").write_text("no raster")
    words = ("--output", files / "maps", "--model", files / "net.safetensors", "--device", "cpu")
    found = looked(files / "many", *words)
    assert [each["output"] for each in found] == [str(files / "maps" / f"{name}.zarr") for name in ("a", "b", "deep")]
    assert [each["inputs"] for each in looked(files / "many" / "[ab].tif", *words)] == [
        [str(files / "many" / f"{name}.tif")] for name in "ab"
    ]
    # `bench --output` is another thing, and has another variable.
    variables = {"TILEPIPE_BATCH_OUTPUT": "s3://maps/x/", "TILEPIPE_OUTPUT": "other"}
    found = looked(files / "many" / "a.tif", files / "many" / "b*", *words[2:], "--shard", "3/3", env=variables)
    assert [each["output"] for each in found] == ["s3://maps/x/a.zarr", "s3://maps/x/b.zarr"]
    assert {each["state"] for each in found} == {"other shard"}


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("j.csv", "input,output,modle\na.tif,a.zarr,x", 2, ("j.csv line 1", "'modle'", "'model'")),
        ("j.csv", "input,output,tile,tile\na.tif,a.zarr,64,64", 2, ("line 1", "tile twice")),
        ("j.csv", "input,output,tile\na.tif,a.zarr", 2, ("line 2", "2 cells for 3 columns")),
        ("j.csv", "input,output,tile\n\na.tif,a.zarr,big", 2, ("line 3", "1408x1024")),
        ("j.csv", "input,output,workers\na.tif,a.zarr,two\nb.tif,b.zarr,0", 2, ("line 2", "line 3", "positive")),
        ("j.csv", "input,output\na.tif,x.zarr\nb.tif,./x.zarr", 2, ("a.tif", "line 2", "line 3", "both")),
        ("j.csv", "input,output\na.tif,a.tif", 2, ("line 2", "would be a file")),
        ("j.csv", "input,output\na.tif,\n", 2, ("line 2", "--output DIR")),
        ("j.csv", "output\na.zarr", 2, ("line 2", "no input")),
        ("j.csv", "input,output\na.tif,a.zarr\nno.tif,n.zarr\nnot*.tif,m.zarr", 3, ("line 3", "no.tif", "line 4")),
        ("j.csv", "", 2, ("empty",)),
        ("j.csv", "input,output", 2, ("names no raster",)),
        ("j.csv", 'input,output\n"a.tif,a.zarr', 2, ("CSV",)),
        ("j.toml", "[[scene]]\ninput = 'a.tif'\noutput = 'a.zarr'\ntyle = 3", 2, ("j.toml line 1", "'tile'")),
        ("j.toml", "\n[[scene]]\ninput = 3\noutput = 'a.zarr'", 2, ("line 2", "no input")),
        ("j.toml", "scene = [{input = 'a.tif', output = 3}]", 2, ("scene 1", "output 3")),
        ("j.toml", "[defaults]\nsummary = 'x'", 2, ("[defaults]", "'summary'")),
        ("j.toml", "[scenes]\n", 2, ("'scenes'", "[[scene]]")),
        ("j.toml", "scene = 1", 2, ("[[scene]]",)),
        ("j.toml", "defaults = 1", 2, ("[defaults]",)),
        ("j.toml", "[[scene", 2, ("TOML",)),
    ],
)
def test_what_is_wrong_in_a_list_is_said_with_its_line(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, code: int, said: tuple[str, ...]
) -> None:
    scenes_in(files, "a.tif", "b.tif")
    for raster in ("a.tif", "b.tif"):
        os.link(files / raster, tmp_path / raster)
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / name, text)
    assert_one_line(run("batch", name, "--model", files / "net.safetensors"), code, *said)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tif", "b.tif", name}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("none.csv",), 2, "none.csv"),
        (("none.toml",), 2, "none.toml"),
        (("none.tif", "--output", "o"), 3, "none.tif"),
        (("none/*.tif", "--output", "o"), 2, "names no raster"),
        (("a.csv", "b.tif"), 2, "stands alone"),
        (("b.tif",), 2, "--output DIR"),
        (("b.tif", "--output", "o", "--tile", "big"), 2, "1408x1024"),
        (("b.tif", "b.tif", "--output", "o"), 2, "both"),
        (("b.tif", "--output", "b.tif"), 2, "is a file"),
        (("b.tif", "--output", "o", "--shard", "3/2"), 2, "1/2 to 2/2"),
        (("b.tif", "--output", "o", "--summary", "none/sum.json"), 2, "none/sum.json"),
        (("b.tif", "--output", "o", "--model", "none.safetensors"), 3, "none.safetensors"),
    ],
)
def test_a_wrong_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_raster(tmp_path / "b.tif", scene((64, 64)))
    assert_one_line(run("batch", *words), code, said)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tif"]


# ---- what is told ----


def test_a_batch_tells_each_scene_on_stderr_and_the_result_on_stdout(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.link(files / "image.tif", folder / "a.tif")
    (folder / "b.tif").write_text("no raster")
    words = ("batch", folder, "--output", tmp_path, "--model", files / "net.safetensors", *SMALL)
    result = run(*words, "--summary", tmp_path / "sum.json")
    assert result.exit_code == 3
    told = result.stderr.splitlines()
    assert told[0].startswith(f"tilepipe: [1/2] {folder}/a.tif: done, 4 blocks in ")
    assert told[1].startswith(f"tilepipe: [2/2] {folder}/b.tif: failed: cannot open")
    assert len(told) == 2
    assert result.stdout.startswith("2 scenes: 1 done, 1 failed; ")
    assert f"{folder}/b.tif: failed" in result.stdout
    summary = json.loads((tmp_path / "sum.json").read_text())
    assert (summary["states"]["done"], summary["computed"], summary["exit_code"]) == (1, 4, 3)
    again = run(*words, "--json", "--log-json")
    events = [json.loads(line) for line in again.stderr.splitlines()]
    assert {"time", "level", "event", "scene"} <= set.intersection(*(set(event) for event in events))
    ends = [(event["level"], event["state"]) for event in events if event["event"] == "end"]
    assert ends == [("info", "already done"), ("error", "failed")]
    assert json.loads(again.stdout)["states"] == {**summary["states"], "done": 0, "already done": 1}
    assert run(*words, "-q").stderr == ""
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 3
    assert "already done" in dry.stdout


def test_sigterm_ends_a_batch_with_75(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler is the process's own; the signal comes as the second scene begins."""
    begin = Lines.scene

    def scene(self: Lines, name: str, number: int, total: int) -> None:
        begin(self, name, number, total)
        if number == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Lines, "scene", scene)
    scenes_in(files, "a.tif", "b.tif", "c.tif")
    words = [files / name for name in ("a.tif", "b.tif", "c.tif")]
    result = run("batch", *words, "--output", tmp_path, "--model", files / "net.safetensors", *SMALL)
    assert result.exit_code == 75
    assert "3 scenes: 1 done, 1 stopped, 1 untouched" in result.stdout
    assert result.stderr.splitlines()[-1] == "tilepipe: note: stopped; the same command resumes"
    assert not (tmp_path / "c.zarr").exists()


def test_an_array_job_that_does_not_split_the_list_is_told_so(files: Path, tmp_path: Path) -> None:
    scenes_in(files, "a.tif", "b.tif", "c.tif")
    words = ["batch", *(files / name for name in ("a.tif", "b.tif", "c.tif")), "--output", tmp_path]
    words += ["--model", files / "net.safetensors", *SMALL]
    array = {"JOB_COMPLETION_INDEX": "1"}
    result = run(*words, "--json", "--shard", "auto/3", env=array)
    assert [each["state"] for each in json.loads(result.stdout)["results"]] == ["other shard", "done", "other shard"]
    assert "--shard auto" not in result.stderr
    result = run(*words, env=array)
    assert "--shard auto" in result.stderr
    assert result.stdout.startswith("3 scenes: 2 done, 1 already done; ")


def test_the_bar_names_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    with _bar() as bar:
        told = Terminal(Work(), bar)
        told.scene("a.tif", 2, 9)
        assert bar.tasks[0].description == "[2/9] a.tif: starting"
        told(Progress(1, 4, 0, 10, 40, 1.0))
        assert bar.tasks[0].description == "[2/9] a.tif: segmenting"
        assert (bar.tasks[0].completed, bar.tasks[0].total) == (1, 4)
        told.scene("b.tif", 3, 9)
        assert bar.tasks[0].completed == 0
