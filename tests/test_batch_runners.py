"""Two runners of one list, one of which is killed: every good scene is done exactly once, the bad ones are reported."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from reference import scene, write_raster
from runs import pixel_model, saved
from test_kill import content

from tilepipe.cli import app
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.store.output import OutputStore, open_store

SIDE, BLOCK = 150, 64
BLOCKS = 9
SCENES, BAD = 20, {"s03": "text", "s09": "cut", "s15": "narrow"}
KILLED_AFTER = 23
"""Blocks, which is within a scene."""
OPTIONS = SegmentOptions(device="cpu", tile=(64, 64), block=(BLOCK, BLOCK), threads=1)


def runner(folder: str, name: str, meeting: Barrier, fatal: int | None) -> None:
    """The command in a process of its own: its log, and each block that it wrote, a line each; killed after `fatal`.

    Within its second scene it waits for the other, so that both are at work at once.
    """
    os.chdir(folder)
    log = os.open(f"{name}.log", os.O_CREAT | os.O_WRONLY)
    blocks = os.open(f"{name}.blocks", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    write, numbers = OutputStore._write, itertools.count(1)

    def counted(store: OutputStore, index: tuple[int, int], *words: Any) -> Any:
        record = write(store, index, *words)
        os.write(blocks, f"{Path(store.path).stem} {index[0]} {index[1]}\n".encode())
        number = next(numbers)
        if number == BLOCKS + 1:
            meeting.wait(60)
        if number == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    OutputStore._write = counted  # type: ignore[method-assign]
    words = ["batch", "jobs.csv", "--device", "cpu", "--threads", "1", "--tile", "64", "--log-json", "--json"]
    app([*words, "--summary", f"{name}.json"])


def make_list(folder: Path) -> Path:
    """The folder, with twenty rasters of which three are bad, a model, and the list of them all."""
    saved(pixel_model(), folder / "m.safetensors")
    rows = ["input,output,model,block"]
    for number in range(SCENES):
        name = f"s{number:02}"
        wrong = BAD.get(name)
        write_raster(folder / f"{name}.tif", scene((SIDE, SIDE), 1 if wrong == "narrow" else 3, seed=number))
        rows.append(f"{name}.tif,{name}.zarr,m.safetensors,{BLOCK}")
        if wrong == "text":
            (folder / f"{name}.tif").write_text("no raster at all")
        if wrong == "cut":
            os.truncate(folder / f"{name}.tif", 3000)
    (folder / "jobs.csv").write_text("\n".join(rows))
    return folder


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a log, but for a line that a kill cut short."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def ends(path: Path) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["event"] == "end"]


@pytest.mark.timeout(240)
def test_two_runners_one_of_them_killed_do_every_good_scene_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_list(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tilepipe.pipeline", "tilepipe.batch", "test_batch_runners"])
    meeting = context.Barrier(2)
    killed, other = (
        context.Process(target=runner, args=(str(folder), name, meeting, fatal))
        for name, fatal in (("killed", KILLED_AFTER), ("other", None))
    )
    killed.start(), other.start()
    killed.join(120), other.join(120)
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 3)

    good = [f"s{number:02}" for number in range(SCENES) if f"s{number:02}" not in BAD]
    last = {event["output"]: event for event in ends(folder / "other.log")}
    began = [event["scene"] for event in events(folder / "killed.log") if event["event"] == "begin"]
    unfinished = Path(began[-1]).stem
    assert unfinished in good
    # The bad ones are reported, and nothing else: with no busy one left, the other took over what was unfinished.
    summary = json.loads((folder / "other.json").read_text())
    failed = {result["place"]: result["reason"] for result in summary["results"] if result["exit_code"]}
    assert {place.split()[-1] for place in failed} == {str(int(name[1:]) + 2) for name in BAD}
    assert (summary["states"]["failed"], summary["states"]["resumed"], summary["states"]["busy"]) == (3, 1, 0)
    assert last[f"{unfinished}.zarr"]["state"] == "resumed"
    assert any("took over" in note for note in last[f"{unfinished}.zarr"]["notes"])

    # By the logs: each good scene was done by one of the two, but for the unfinished one, which they shared.
    finished = [event for log in ("killed.log", "other.log") for event in ends(folder / log)]
    by_scene = Counter(dict.fromkeys(good, 0))
    for event in finished:
        by_scene[Path(event["output"]).stem] += event["computed"]
    shared = last[f"{unfinished}.zarr"]
    assert 0 < shared["resumed"] < BLOCKS
    assert by_scene.pop(unfinished) == BLOCKS - shared["resumed"]
    assert {by_scene[name] for name in good if name != unfinished} == {BLOCKS}
    # By the blocks themselves: none was written twice, except where its writer died before its record was there.
    lines = [line for log in ("killed.blocks", "other.blocks") for line in (folder / log).read_text().splitlines()]
    assert max(Counter(lines).values()) == 1
    assert {line.split()[0] for line in lines} >= set(good)
    assert len(set((folder / "killed.blocks").read_text().splitlines())) >= KILLED_AFTER
    for name in good:
        assert len(open_store(folder / f"{name}.zarr").done()) == BLOCKS

    # The same bytes as by a run of its own, the resumed one and some others.
    monkeypatch.chdir(folder)
    for name in {unfinished, good[0], good[-1]}:
        alone = folder / "alone" / f"{name}.zarr"
        segment_raster(f"{name}.tif", alone, "m.safetensors", OPTIONS)
        assert content(alone) == content(folder / f"{name}.zarr")
        assert list(open_store(folder / f"{name}.zarr").verify()) == []
