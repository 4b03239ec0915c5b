"""`train`: images and labels to a model file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilepipe.cli.arguments import option, spread
from tilepipe.cli.options import MACHINE, TALK, Config, LongTalk
from tilepipe.cli.training_progress import training_teller
from tilepipe.cli.training_words import outcome_text, run_text
from tilepipe.errors import UsageError
from tilepipe.options import parse_numbers, parse_pair

if TYPE_CHECKING:
    from tilepipe.training.options import Stage, TrainOptions
    from tilepipe.training.samples import DataSet

SHARE = 0.2
"""Of a folder's images, for validation."""

DATA, NETWORK, WINDOWS, LEARNING = "Data", "Network", "Windows", "Learning"

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="MANIFEST|IMAGES LABELS RUN",
        show_default=False,
        help="A manifest (.csv or .toml: image, label, split), or a folder or pattern of images and one of labels; "
        "last the folder that the run writes.",
    ),
]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What is learnt from."""

    classes: Annotated[
        str | None,
        option("--classes", metavar="NAMES", panel=DATA, help="Class names by commas, in the order of label values."),
    ] = None
    void: Annotated[
        str | None,
        option("--void", metavar="VALUES", panel=DATA, help="Label values, by commas, that mean no class."),
    ] = None
    validation: Annotated[
        float | None,
        option(
            "--validation", metavar="SHARE", panel=DATA, help=f"Of the images of a folder, for validation; {SHARE}."
        ),
    ] = None
    bands: Annotated[
        str | None,
        option("--bands", metavar="NUMBERS", panel=DATA, help="Bands to learn from, from 1, in the model's order."),
    ] = None
    input_bands: Annotated[
        str | None,
        option("--input-bands", metavar="NAMES", panel=DATA, help="What these bands are: red,green,blue,nir ..."),
    ] = None
    licence: Annotated[
        str, option("--licence", metavar="TEXT", panel=DATA, help="The licence that the model's card states.")
    ] = "unknown"

    def read(self, paths: list[str], seed: int) -> DataSet:
        """The data set that the paths name, with what is told beside it."""
        from tilepipe.checkpoint import ClassInfo
        from tilepipe.loading.reference import palette
        from tilepipe.training.samples import pair_folders, read_manifest

        void = () if self.void is None else parse_numbers(self.void, "void")
        if len(paths) == 1:
            if self.validation is not None:
                raise UsageError("--validation draws from folders; a manifest says itself which images are for it")
            data = read_manifest(paths[0])
        elif len(paths) == 2:
            images, labels = paths
            data = pair_folders(images, labels, SHARE if self.validation is None else self.validation, seed)
        else:
            raise UsageError(f"{len(paths) + 1} paths were given; write MANIFEST RUN, or IMAGES LABELS RUN")
        if void:
            data = replace(data, void=void)
        if self.classes is not None:
            names = self._names(self.classes)
            infos = zip(names, palette(len(names)), strict=True)
            data = replace(data, classes=tuple(ClassInfo(name, color) for name, color in infos))
        return data

    def _names(self, text: str) -> tuple[str, ...]:
        from tilepipe.loading.spelling import names_of

        told = names_of(text)
        names = tuple(f"class{n}" for n in range(told)) if isinstance(told, int) else told
        if not names or len(set(names)) < len(names):
            raise UsageError(f"classes {text!r} are not legal; name each once, such as background,building")
        return names


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    """What is trained, and from which weights."""

    model: Annotated[
        str,
        option("--model", "-m", metavar="NAME|MODULE:FACTORY", panel=NETWORK, help="An architecture or a factory."),
    ] = "segnet"
    arg: Annotated[
        list[str] | None,
        option("--arg", metavar="KEY=VALUE", panel=NETWORK, help="An argument of it, such as width=0.25; repeatable."),
    ] = None
    start: Annotated[
        str | None,
        option(
            "--start",
            metavar="NAME|FILE",
            panel=NETWORK,
            help="Weights to start from: a model, a state dictionary, or VGG16's (a file, or DEFAULT to download).",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class WindowChoice:
    """Which windows are shown to the network, and how."""

    crop: Annotated[str, option("--crop", metavar="N|RxC", panel=WINDOWS, help="Rows and columns of a window.")] = "256"
    batch: Annotated[int, option("--batch", metavar="N", panel=WINDOWS, help="Windows of a pass.")] = 8
    accumulate: Annotated[int, option("--accumulate", metavar="N", panel=WINDOWS, help="Passes of a step.")] = 1
    flips: Annotated[
        str,
        option("--flips", metavar="none|horizontal|d4", panel=WINDOWS, help="Reflections; d4 has quarter turns too."),
    ] = "d4"
    rotate: Annotated[
        float, option("--rotate", metavar="DEGREES", panel=WINDOWS, help="Also turn by up to so much to either side.")
    ] = 0.0
    scales: Annotated[
        str,
        option("--scales", metavar="LEAST,MOST", panel=WINDOWS, help="Resample to pixels so many times as large."),
    ] = "1,1"
    jitter: Annotated[
        float, option("--jitter", metavar="0..1", panel=WINDOWS, help="How much brightness and colours change.")
    ] = 0.2
    stage: Annotated[
        list[str] | None,
        option(
            "--stage",
            variable="TRAINING_STAGE",
            metavar="KIND=STEPS",
            panel=WINDOWS,
            help="Instead of --steps, stages one after the other: uniform; objects, windows centred on objects; "
            "candidates, windows that overlap objects. DeconvNet's training is --stage objects=N --stage candidates=M.",
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """How the network learns."""

    steps: Annotated[
        int | None, option("--steps", metavar="N", panel=LEARNING, help="Steps of the optimiser; 4000 by default.")
    ] = None
    rate: Annotated[float, option("--rate", metavar="R", panel=LEARNING, help="The highest learning rate.")] = 1e-3
    optimiser: Annotated[str, option("--optimiser", metavar="adamw|sgd", panel=LEARNING, help="The optimiser.")] = (
        "adamw"
    )
    momentum: Annotated[
        float, option("--momentum", metavar="M", panel=LEARNING, help="Of SGD; the first beta of AdamW.")
    ] = 0.9
    weight_decay: Annotated[
        float, option("--weight-decay", metavar="D", panel=LEARNING, help="Decay of the weights.")
    ] = 0.01
    decay: Annotated[
        str,
        option("--decay", metavar="onecycle|polynomial|constant", panel=LEARNING, help="How the rate falls."),
    ] = "onecycle"
    power: Annotated[float, option("--power", metavar="P", panel=LEARNING, help="Of the polynomial decay.")] = 0.9
    warmup: Annotated[
        float, option("--warmup", metavar="SHARE", panel=LEARNING, help="The share of steps in which the rate rises.")
    ] = 0.1
    clip: Annotated[
        float | None, option("--clip", metavar="NORM", panel=LEARNING, help="The largest norm of the gradient.")
    ] = None
    average: Annotated[
        float,
        option("--average", metavar="DECAY", panel=LEARNING, help="Keep a moving average of weights, such as 0.999."),
    ] = 0.0
    class_weights: Annotated[
        str,
        option(
            "--class-weights",
            metavar="none|median-frequency|NUMBERS",
            panel=LEARNING,
            help="How much a pixel of each class counts.",
        ),
    ] = "median-frequency"
    keep: Annotated[
        str,
        option("--keep", metavar="best|last", panel=LEARNING, help="The network to save; last needs no validation."),
    ] = "best"
    hints: Annotated[
        float,
        option("--hints", metavar="WEIGHT", panel=LEARNING, help="Also classify at a SegNet's inner stages."),
    ] = 0.0
    every: Annotated[
        int, option("--every", metavar="STEPS", panel=LEARNING, help="Validate and keep the state each so many steps.")
    ] = 500
    seed: Annotated[
        int, option("--seed", metavar="N", panel=LEARNING, help="Of weights, windows and augmentation.")
    ] = 0


@dataclass(frozen=True, slots=True)
class TrainingMachine:
    """What it runs on, and whether it does."""

    precision: Annotated[
        str | None,
        option("--precision", metavar="float32|bf16|fp16", panel=MACHINE, help="Of the passes; bf16 on GPUs."),
    ] = None
    device: Annotated[
        str | None, option("--device", metavar="cpu|cuda|cuda:N", panel=MACHINE, help="By default a GPU where one is.")
    ] = None
    workers: Annotated[
        int, option("--workers", metavar="N", panel=MACHINE, help="Processes that read and augment; 0 for none.")
    ] = 2
    threads: Annotated[
        int | None, option("--threads", metavar="N", panel=MACHINE, help="Processor threads of the network.")
    ] = None
    overwrite: Annotated[
        bool, option("--overwrite/--no-overwrite", panel=MACHINE, help="Start anew where RUN holds a run.")
    ] = False
    dry_run: Annotated[
        bool,
        option(
            "--dry-run/--no-dry-run",
            panel=TALK,
            help="Tell what would be learnt, from one look at the training images; train and write nothing.",
        ),
    ] = False


@spread
def train(
    paths: Paths,
    data: DataOptions,
    network: NetworkChoice,
    windows: WindowChoice,
    learning: LearningOptions,
    machine: TrainingMachine,
    talk: LongTalk,
    config: Config = None,  # noqa: ARG001 - its callback has read it
) -> None:
    """Train a network on images and their labels.

    RUN gets model.safetensors, the best by mean IoU on the validation images (or, with --keep last, the last), with
    curves and the state from which the same command continues a run that was stopped.
    """
    from tilepipe.schedule import stop_on_signals

    if len(paths) < 2:
        raise UsageError(f"one path was given ({paths[0]}); write MANIFEST RUN, or IMAGES LABELS RUN")
    options = train_options(data, network, windows, learning, machine)
    images = data.read(paths[:-1], options.seed)
    if machine.dry_run:
        from tilepipe.training.plan import plan_run

        told = plan_run(images, options).describe()
        print(json.dumps(told) if talk.json else run_text(told))
        return
    from tilepipe.training.team import leads
    from tilepipe.training.train import train as run

    with stop_on_signals() as stop, training_teller(talk.quiet or not leads(), talk.log_json) as tell:
        outcome = run(
            images, paths[-1], options, tell=tell, note=tell.note, stop=stop, overwrite=machine.overwrite
        )  # fmt: skip
    if leads():
        print(json.dumps(asdict(outcome)) if talk.json else outcome_text(outcome))


def train_options(
    data: DataOptions,
    network: NetworkChoice,
    windows: WindowChoice,
    learning: LearningOptions,
    machine: TrainingMachine,
) -> TrainOptions:
    """The options as the library takes them; UsageError where a value is not legal."""
    from tilepipe.loading.spelling import arguments_of
    from tilepipe.training.options import TrainOptions

    told: dict[str, Any] = {**asdict(network), **asdict(windows), **asdict(learning), **asdict(machine)}
    del told["overwrite"], told["dry_run"]
    told |= _stages(told.pop("stage"), told.pop("steps"))
    told["arguments"] = arguments_of(told.pop("arg") or ())
    told["crop"] = parse_pair(told["crop"], "crop")
    told["scales"] = _scales(told["scales"])
    if told["class_weights"] not in ("none", "median-frequency"):
        told["class_weights"] = _numbers(
            told["class_weights"], "class-weights", "none, median-frequency, or numbers such as 1,2.5"
        )
    told["bands"] = None if data.bands is None else parse_numbers(data.bands, "bands")
    told["input_bands"] = None if data.input_bands is None else tuple(data.input_bands.split(","))
    return TrainOptions(**told, licence=data.licence)


def _stages(stages: list[str] | None, steps: int | None) -> dict[str, Any]:
    """The stages, where any are told; otherwise those are the library's."""
    from tilepipe.training.options import Stage

    if stages and steps is not None:
        raise UsageError(f"--steps {steps} and --stage {stages[0]} were both given; a stage says its own steps")
    if stages:
        return {"stages": tuple(map(_stage, stages))}
    return {} if steps is None else {"stages": (Stage("uniform", steps),)}


def _stage(text: str) -> Stage:
    from tilepipe.training.options import Stage

    kind, _, steps = text.partition("=")
    if not steps.strip().isdigit():
        raise UsageError(f"stage {text!r} is not legal; write KIND=STEPS such as objects=20000")
    kinds: Any = kind.strip()
    return Stage(kinds, int(steps))


def _scales(text: str) -> tuple[float, float]:
    numbers = _numbers(text, "scales", "two numbers such as 0.5,2")
    if len(numbers) != 2:
        raise UsageError(f"scales {text!r} are not legal; write two numbers such as 0.5,2")
    return numbers[0], numbers[1]


def _numbers(text: str, name: str, legal: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text!r} is not understood; write {legal}") from None
