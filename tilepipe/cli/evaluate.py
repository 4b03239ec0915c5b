"""`evaluate`: label maps against the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli import show
from tilepipe.cli.arguments import option, spread
from tilepipe.cli.options import INPUT, OUTPUT, Config, LongTalk, Overwrite
from tilepipe.cli.progress import Work, teller

if TYPE_CHECKING:
    from tilepipe.comparison.scores import Evaluation
    from tilepipe.evaluation import EvaluationOptions

Prediction = Annotated[
    str,
    typer.Argument(
        metavar="PREDICTION",
        show_default=False,
        help="A store that `segment` wrote, a raster of labels, or a folder of them.",
    ),
]
Truth = Annotated[
    str,
    typer.Argument(
        metavar="TRUTH",
        show_default=False,
        help="A raster of true labels, or a folder with one of the same name for each file of PREDICTION.",
    ),
]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What is scored, and what is drawn of it."""

    classes: Annotated[
        str | None,
        option(
            "--classes",
            metavar="NAMES|N",
            panel=INPUT,
            help="Names of the labels 0, 1, ..., such as land,sea,road, or how many there are; "
            "by default as the store or the file tells them.",
        ),
    ] = None
    void: Annotated[
        list[int] | None,
        option("--void", metavar="VALUE", panel=INPUT, help="A value of TRUTH to ignore; may be repeated."),
    ] = None
    nodata: Annotated[
        str | None,
        option("--nodata", metavar="VALUE|none", panel=INPUT, help="The value of PREDICTION that means no data."),
    ] = None
    truth_nodata: Annotated[
        str | None,
        option("--truth-nodata", metavar="VALUE|none", panel=INPUT, help="The value of TRUTH that means no data."),
    ] = None
    tolerance: Annotated[
        float | None,
        option(
            "--tolerance",
            metavar="PIXELS",
            panel=OUTPUT,
            help="How far apart boundaries may be; 0.75 % of the image's diagonal by default, at most 256.",
        ),
    ] = None
    no_boundary: Annotated[
        bool, option("--no-boundary/--boundary", panel=OUTPUT, help="No boundary F1, which takes most of the time.")
    ] = False
    confusion: Annotated[
        str | None,
        option("--confusion", metavar="FILE.png", panel=OUTPUT, help="Draw the confusion matrix; needs matplotlib."),
    ] = None
    errors: Annotated[
        str | None,
        option(
            "--errors",
            metavar="FILE.tif|.png",
            panel=OUTPUT,
            help="Where the map is wrong: every pixel as GeoTIFF (0 right, 1 wrong, 255 ignored), or a picture.",
        ),
    ] = None

    def resolve(self, overwrite: bool) -> EvaluationOptions:
        """The options as the library takes them; UsageError where a value is not legal."""
        from tilepipe.comparison.labels import parse_classes
        from tilepipe.evaluation import EvaluationOptions
        from tilepipe.options import parse_nodata

        return EvaluationOptions(
            classes=None if self.classes is None else parse_classes(self.classes),
            void=tuple(self.void or ()),
            tolerance=self.tolerance,
            boundary=not self.no_boundary,
            nodata=None if self.nodata is None else parse_nodata(self.nodata),
            truth_nodata=None if self.truth_nodata is None else parse_nodata(self.truth_nodata),
            errors=self.errors,
            overwrite=overwrite,
        )


@spread
def evaluate(
    prediction: Prediction,
    truth: Truth,
    scores: ScoreOptions,
    talk: LongTalk,
    overwrite: Overwrite = False,
    config: Config = None,  # noqa: ARG001 - its callback has read it
) -> None:
    """Score label maps against the truth.

    Confusion matrix, accuracy, IoU, precision, recall, F1 and boundary F1, of the pixels that both have by their
    georeference; without one, pixel by pixel. Files of two folders are matched by name and counted together.
    """
    with teller(talk.quiet, talk.log_json, Work("scoring", "blocks")) as tell:
        from tilepipe.comparison.picture import check_drawing, draw_confusion
        from tilepipe.evaluation import evaluate as score
        from tilepipe.targets import check_target

        options = scores.resolve(overwrite)
        if scores.confusion is not None:
            check_target(scores.confusion, (".png",), overwrite)
            check_drawing()
        found = score(prediction, truth, options, tell)
        for note in found.notes:
            tell.note(note)
        if scores.confusion is not None:
            draw_confusion(scores.confusion, found.confusion, found.classes)
    if talk.json:
        print(json.dumps({"prediction": prediction, "truth": truth, **found.to_json()}))
    else:
        print(f"{prediction} against {truth}: {evaluation_text(found)}")


def evaluation_text(found: Evaluation) -> str:
    """An evaluation's scores, for people."""
    told = found.to_json()
    return "\n\n".join([_first_line(found), _class_table(told), show.entries(_totals(found, told))])


def _first_line(found: Evaluation) -> str:
    words = [f"{show.pixels(found.confusion.pixels)} scored in {show.duration(found.seconds)}"]
    if len(found.images) > 1:
        words[0] += f", {len(found.images)} images"
    if found.ignored:
        words.append(f"{found.ignored:,} void or nodata in the truth")
    if found.missing:
        words.append(f"{found.missing:,} nodata in the prediction only")
    return "; ".join(words)


def _class_table(told: dict[str, Any]) -> str:
    names = ("accuracy", "iou", "precision", "recall", "f1", "boundary_f1")
    rows = [
        (row["name"], f"{row['pixels']:,}", *(_score(row[name]) for name in names))
        for row in told["classes"]
        if row["pixels"] or row["found"] or len(told["classes"]) < 30
    ]
    means = ("mean_accuracy", "mean_iou", "mean_precision", "mean_recall", "mean_f1", "boundary_f1")
    rows.append(("mean", f"{told['pixels']:,}", *(_score(told[name]) for name in means)))
    head = ("class", "pixels", "accuracy", "IoU", "precision", "recall", "F1", "boundary F1")
    return show.table(head, rows, right=range(1, 8))


def _totals(found: Evaluation, told: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "global accuracy", _score(told["accuracy"])
    yield "class average accuracy", _score(told["mean_accuracy"])
    yield "mean IoU", _score(told["mean_iou"])
    yield "mean F1", _score(told["mean_f1"])
    if told["boundary_f1"] is not None:
        tolerances = sorted({image.tolerance for image in found.images})
        within = f"{tolerances[0]:.3g}" + (f" to {tolerances[-1]:.3g}" if len(tolerances) > 1 else "")
        mean = f", the mean of {len(found.images)} images" if len(found.images) > 1 else ""
        yield "boundary F1", f"{_score(told['boundary_f1'])} within {within} pixels{mean}"


def _score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
