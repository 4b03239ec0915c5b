"""The options that name, describe and vary networks, as dataclasses whose fields are annotated for typer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tilepipe.cli.arguments import option
from tilepipe.cli.options import MAP
from tilepipe.errors import UsageError
from tilepipe.options import SegmentOptions

if TYPE_CHECKING:
    from tilepipe.loading.reference import ModelReference
    from tilepipe.member import Models

Weights = Annotated[
    str | None,
    option(
        "--weights",
        metavar="FILE",
        panel=MAP,
        help="The weights of a factory or architecture: safetensors, or a state dictionary (.pt, .pth).",
    ),
]
Arguments = Annotated[
    list[str] | None,
    option("--arg", metavar="KEY=VALUE", panel=MAP, help="An argument of the factory or architecture; repeatable."),
]
InputBands = Annotated[
    str | None,
    option(
        "--input-bands",
        metavar="NAMES|N",
        panel=MAP,
        help="The bands that such a network takes, in its order: red,green,blue,nir ...",
    ),
]
Stride = Annotated[
    int | None,
    option(
        "--stride",
        metavar="1",
        panel=MAP,
        help="Slide a classifier whose outputs lie several pixels apart over every pixel.",
    ),
]
Dense = Annotated[
    str,
    option(
        "--dense",
        metavar="dilate|stitch",
        panel=MAP,
        help="How --stride 1 slides: one pass with dilated layers, or all offsets interleaved; equal results.",
    ),
]
Augmentation = Annotated[
    str | None,
    option(
        "--tta",
        metavar="flips|d4",
        panel=MAP,
        help="Average over the tile's flips (4 passes), or its flips and quarter turns (8 passes).",
    ),
]


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """How one network is made, to look at."""

    weights: Weights = None
    arg: Arguments = None
    input_bands: InputBands = None
    stride: Stride = None
    dense: Dense = "dilate"
    tta: Augmentation = None

    def reference(self, name: str) -> ModelReference:
        """How to load the network of that name."""
        from tilepipe.loading.reference import ModelReference

        return ModelReference.parse(name, weights=self.weights, arguments=self.arg or None, bands=self.input_bands)

    def resolve(self) -> SegmentOptions:
        """How to run it other than as it comes; UsageError where a value is not legal."""
        return SegmentOptions(**_how(self))


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which networks run, and how."""

    model: Annotated[
        list[str] | None,
        option(
            "--model",
            "-m",
            metavar="NAME|FILE|MODULE:FACTORY",
            panel=MAP,
            help="A bundled model, a model file, an exported program (.pt2) or a factory; "
            "without it the bundled model that fits bands and ground resolution. Given several times, the models are "
            "combined.",
        ),
    ] = None
    weights: Weights = None
    arg: Arguments = None
    classes: Annotated[
        str | None,
        option(
            "--classes",
            metavar="NAMES|N",
            panel=MAP,
            help="The classes of a network that does not name them, by commas, in the order of its scores.",
        ),
    ] = None
    input_bands: InputBands = None
    mean: Annotated[
        str | None,
        option("--mean", metavar="NUMBERS", panel=MAP, help="Their means, which such a network wants subtracted."),
    ] = None
    std: Annotated[
        str | None,
        option(
            "--std", metavar="NUMBERS", panel=MAP, help="Their standard deviations, which it wants them divided by."
        ),
    ] = None
    stride: Stride = None
    dense: Dense = "dilate"
    tta: Augmentation = None

    def resolve(self) -> dict[str, Any]:
        """The options as SegmentOptions takes them."""
        return _how(self)

    def models(self) -> Models:
        """The models as the library takes them; UsageError where what is told of one does not say of which."""
        told = {
            "weights": self.weights,
            "arguments": self.arg or None,
            "classes": self.classes,
            "bands": self.input_bands,
            "mean": self.mean,
            "std": self.std,
        }
        given = [name for name, value in told.items() if value is not None]
        names = self.model or []
        if given and len(names) != 1:
            raise UsageError(
                f"{_FLAGS[given[0]]} describes one model and {len(names)} are given; describe each in a model.toml, "
                "and give these as --model"
            )
        if not names:
            return None
        from tilepipe.loading.reference import ModelReference

        return [ModelReference.parse(name, **told) for name in names]


def _how(chosen: ModelOptions | NetworkOptions) -> dict[str, Any]:
    """How networks run other than as they come, as SegmentOptions takes it."""
    return {"stride": chosen.stride, "dense": chosen.dense, "tta": chosen.tta}


_FLAGS = {
    "weights": "--weights",
    "arguments": "--arg",
    "classes": "--classes",
    "bands": "--input-bands",
    "mean": "--mean",
    "std": "--std",
}
