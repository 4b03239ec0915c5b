"""What becomes of a batch's scenes, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tilepipe.cli import show

if TYPE_CHECKING:
    from tilepipe.batch import BatchSummary, ScenePlan, SceneResult


def result_text(result: SceneResult) -> str:
    """What became of a scene, in a line."""
    if result.reason is not None:
        return f"{result.state}: {result.reason}"
    if result.state not in ("done", "resumed"):
        return result.state
    text = f"{result.state}, {show.count(result.computed, 'block')} in {show.duration(result.seconds)}"
    return text + (f", {result.resumed} done before" if result.resumed else "")


def batch_text(done: BatchSummary) -> str:
    """What became of all scenes: how many are in which state, and what is wrong with those that are not done."""
    counts = {result.state: done.count(result.state) for result in done.results}
    words = [f"{number} {state}" for state, number in counts.items()]
    untouched = done.scenes - len(done.results)
    if untouched:
        words.append(f"{untouched} untouched")
    pixels = show.pixels(sum(result.pixels for result in done.results))
    lines = [f"{show.count(done.scenes, 'scene')}: {', '.join(words)}; {pixels} in {show.duration(done.seconds)}"]
    lines += [
        _named(result.scene.name, result.scene.place, result_text(result))
        for result in done.results
        if result.exit_code
    ]
    return "\n".join(lines)


def plans_text(plans: Sequence[ScenePlan]) -> str:
    """What would be made of each scene, a line each."""
    rows = []
    for each in plans:
        job = each.job
        told = each.reason or ""
        if job is not None:
            told = f"{show.count(job.plan.block_count, 'block')} of {show.by(job.plan.block)}, {job.plan.stitch}"
            told += f", {each.done} done" if each.done else ""
        rows.append((each.state, each.scene.name, each.scene.output, told))
    return show.table(("state", "scene", "output", "plan"), rows)


def _named(name: str, place: str, told: str) -> str:
    return f"{name} ({place}): {told}" if place else f"{name}: {told}"
