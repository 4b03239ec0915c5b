"""`demo`: everything at once, on a scene whose truth is known."""

from __future__ import annotations

import json as jsonlib
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import spread
from tilepipe.cli.options import Json, Quiet, Verbose
from tilepipe.cli.progress import teller
from tilepipe.cli.words import plan_text, summary_text
from tilepipe.options import parse_pair

if TYPE_CHECKING:
    from tilepipe.demo import DemoFiles
    from tilepipe.metrics import Confusion
    from tilepipe.pipeline import Summary

Folder = Annotated[str, typer.Argument(metavar="[DIR]", help="A new folder, or one of an earlier demo.")]
Size = Annotated[
    str, typer.Option("--size", metavar="N|RxC", help="The scene's pixels, rows x columns.", show_default=True)
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Which scene.", show_default=True)]


@spread
def demo(
    folder: Folder = "tilepipe-demo",
    size: Size = "1536x2048",
    seed: Seed = 7,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Try it all on a synthetic scene.

    Makes the scene in DIR, prints the plan, segments it exactly with a bundled model, compares with the truth and
    draws a picture; under a minute on two cores. Run again, it resumes.
    """
    shape = parse_pair(size, "size")
    from tilepipe import demo as work
    from tilepipe.checkpoint import SYNTHETIC
    from tilepipe.describe import describe
    from tilepipe.job import prepare
    from tilepipe.schedule import stop_on_signals

    files = work.make_scene(folder, shape, seed)
    job = prepare(files.image, SYNTHETIC, work.demo_options(files))
    if not json and not quiet:
        print(plan_text(describe(job), verbose) + "\n")
    with teller(quiet, log_json=False) as tell, stop_on_signals() as stop:
        summary = work.segment_scene(files, tell, stop)
    scores = work.compare(files)
    work.draw(files)
    print(jsonlib.dumps(_result(files, summary, scores)) if json else _text(files, summary, scores))


def _result(files: DemoFiles, summary: Summary, scores: Confusion) -> dict[str, Any]:
    return {
        **summary.to_json(),
        "image": str(files.image),
        "truth": str(files.truth),
        "picture": str(files.picture),
        "accuracy": scores.accuracy,
        "mean_iou": scores.mean_iou,
        "iou": dict(_iou(summary, scores)),
    }


def _iou(summary: Summary, scores: Confusion) -> list[tuple[str, float | None]]:
    """Each class with its IoU; None for one that neither map shows."""
    values = (None if math.isnan(value) else value for value in scores.iou.tolist())
    return list(zip(summary.classes, values, strict=True))


def _text(files: DemoFiles, summary: Summary, scores: Confusion) -> str:
    iou = [(name, "-" if value is None else f"{value:.3f}") for name, value in _iou(summary, scores)]
    places = [
        ("scene", str(files.image)),
        ("truth", str(files.truth)),
        ("labels", str(files.labels)),
        ("picture", str(files.picture)),
    ]
    return "\n\n".join(
        [
            summary_text(summary),
            f"against the truth: accuracy {scores.accuracy:.3f}, mean IoU {scores.mean_iou:.3f}\n"
            + show.table(("class", "IoU"), iou, right=(1,)),
            show.entries(places),
        ]
    )
