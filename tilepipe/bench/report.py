"""What a benchmark found, as plain values, and what follows from it: the bound and the suggestion.

Every rate is in megapixels per second. Where it is of the *raster*, the halos, overlaps and repeated tiles that the
part has to deal with are paid for: such rates can be compared with each other, and with that of the whole job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

NOISE = 0.03
"""Differences between two rates that say nothing: of tiles so close the smaller is taken, and the fewer threads."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured, and on what."""

    device: str
    """The processor or GPU, by its name."""
    kind: Literal["cpu", "cuda"]
    cores: int
    """Hardware threads that the process may use."""
    versions: Mapping[str, str]
    raster: str
    shape: tuple[int, int]
    bands: int
    dtype: str
    models: tuple[str, ...]
    stitch: Literal["exact", "blend"]
    precision: str
    """Of the job."""


@dataclass(frozen=True, slots=True)
class ReadFigure:
    """Windows of blocks, halos included, read and decoded."""

    window: tuple[int, int]
    """(rows, columns) of a block's window."""
    single: float
    """By one thread; Mpx/s of windows."""
    threads: int
    """Blocks that a worker reads at once."""
    together: float
    """By that many threads."""
    factor: float
    """Pixels of a window per pixel of its block."""

    @property
    def rate(self) -> float:
        """Mpx/s of the raster."""
        return self.together / self.factor


@dataclass(frozen=True, slots=True)
class StageFigure:
    """The raster copied into zarr chunks."""

    rate: float
    complete: bool
    """Whether the whole raster was copied within the time."""
    needed: str | None
    """Why the job copies it first; None where it reads in place."""


@dataclass(frozen=True, slots=True)
class ForwardFigure:
    """The bare network on noise: no reading, no labels."""

    tile: tuple[int, int]
    """The first model's, (rows, columns) of pixels."""
    core: tuple[int, int]
    """Outputs from one tile to the next."""
    block: tuple[int, int]
    blocks: int
    """Blocks of the job with such tiles."""
    precision: str
    threads: int
    """Tiles at once."""
    batch: int
    """Tiles that pass together; a job's pass one by one."""
    seconds: float
    """One pass in its thread."""
    network_rate: float
    """Mpx/s of tiles."""
    rate: float
    """Mpx/s of the raster: halos and partly used tiles paid for."""
    tflops: float
    share: float
    """Of the rate of matrix products in the same precision."""


@dataclass(frozen=True, slots=True)
class KernelFigure:
    """A kernel between scores and maps."""

    name: Literal["label", "accumulate", "finish"]
    used: bool
    """Whether the job's stitching runs it."""
    rate: float
    """Mpx/s of scores."""
    gigabytes: float
    """GB/s that it has to read and write."""
    share: float
    """Of the rate at which as many bytes are copied."""


@dataclass(frozen=True, slots=True)
class WriteFigure:
    """Blocks compressed, made durable and recorded by the store's own writer."""

    block: tuple[int, int]
    threads: int
    rate: float
    """Mpx/s of the raster."""


@dataclass(frozen=True, slots=True)
class WholeFigure:
    """A job from file to store, with the tile found best."""

    region: str
    blocks: int
    nodata: int
    """Outputs without data."""
    tiles: int
    start_seconds: float
    seconds: float
    """After the start."""
    rate: float
    """Mpx/s of the raster, the start left out."""
    network_rate: float
    """Mpx/s through the network alone, halos included, on average right before the job and right after it."""
    busy: float
    """The device's share of the wall time: the bare time of the tiles computed over that of the run."""
    host_bytes: int
    """At the peak, of this process and its workers."""
    projected_host_bytes: int
    device_bytes: int
    """Of torch's memory at the peak; 0 on a CPU, and where other processes had the devices."""
    projected_device_bytes: int


@dataclass(frozen=True, slots=True)
class Bound:
    """What holds the job back."""

    stage: str
    """The slowest part."""
    rate: float
    """Its Mpx/s of the raster."""
    following: str
    """The next slowest part."""
    following_rate: float
    expected: float
    """The rate that the parts allow together, Mpx/s of the raster."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The settings that were fastest, as options of a job; None leaves an option to the plan."""

    tile: tuple[int, int] | None
    block: tuple[int, int] | None
    threads: int | None
    workers: int | None = None
    precision: str | None = None
    stitch: str | None = None
    reasons: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The options by name, as a file for `--tuned` holds them."""
        sizes = {name: list(pair) for name in ("tile", "block") if (pair := getattr(self, name)) is not None}
        others = ("threads", "workers", "precision", "stitch")
        return {**sizes, **{name: value for name in others if (value := getattr(self, name)) is not None}}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All that a benchmark found."""

    subject: Subject
    seconds: float
    """Of one measurement."""
    read: ReadFigure
    stage: StageFigure
    products: Mapping[str, float]
    """TFLOP/s of matrix products, by precision."""
    forward: tuple[ForwardFigure, ...]
    copy: float
    """GB/s read and written by a plain copy."""
    kernels: tuple[KernelFigure, ...]
    write: WriteFigure
    whole: WholeFigure
    rates: Mapping[str, float]
    """Mpx/s of the raster of each part of the job, by all its threads."""
    bound: Bound
    suggestion: Suggestion
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        found = asdict(self)
        found["read"]["rate"] = self.read.rate
        found["suggestion"]["options"] = self.suggestion.options()
        return found


def bound(rates: Mapping[str, float], kind: Literal["cpu", "cuda"]) -> Bound:
    """What holds a job back whose parts do so many Mpx/s of the raster, each with all its threads.

    On a CPU the parts share the cores, so that their times add up; beside a GPU the slowest decides.
    """
    (stage, rate), *others = sorted(rates.items(), key=lambda item: item[1])
    following, following_rate = others[0] if others else (stage, rate)
    expected = 1 / sum(1 / each for each in rates.values()) if kind == "cpu" else rate
    return Bound(stage, rate, following, following_rate, expected)


def best_tile(figures: Sequence[ForwardFigure], precision: str) -> ForwardFigure:
    """The tile that gives most of the raster per second as a job runs it; of those as fast, the smallest.

    Compared are the figures in this precision, one tile at a time, with the most threads that were tried.
    """
    alike = [each for each in figures if each.precision == precision and each.batch == 1]
    threads = max(each.threads for each in alike)
    alike = [each for each in alike if each.threads == threads]
    fastest = max(each.rate for each in alike)
    return min(
        (each for each in alike if each.rate >= fastest * (1 - NOISE)), key=lambda each: each.tile[0] * each.tile[1]
    )


def best_threads(figures: Sequence[ForwardFigure], best: ForwardFigure) -> ForwardFigure:
    """The figure of the best tile with the fewest threads that are as fast as any."""
    alike = [each for each in figures if _same_tiles(each, best)]
    fastest = max(each.rate for each in alike)
    return min((each for each in alike if each.rate >= fastest * (1 - NOISE)), key=lambda each: each.threads)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for that a suggestion has to keep."""

    kind: Literal["cpu", "cuda"]
    precision: str
    """Of the job."""
    models: int = 1
    workers: int | None = None
    stitch: str | None = None
    """How to stitch, where the tile alone would make the plan choose otherwise."""


def suggestion(figures: Sequence[ForwardFigure], asked: Asked) -> Suggestion:
    """The options with which the network gave most of the raster per second, and why.

    Threads are of a CPU; the precision is suggested where a more exact one is as fast. The block is that of the
    plan for the tile, and left out where the raster is a single one, which says nothing of larger rasters.
    """
    first = best_tile(figures, asked.precision)
    reasons = [f"tiles of {_by(first.tile)} gave {first.rate:.3g} Mpx/s of the raster{_others(figures, first)}"]
    precision = None
    if asked.precision == "bf16" and any(each.precision == "float32" for each in figures):
        exact = best_tile(figures, "float32")
        if exact.rate >= first.rate:
            precision, first = "float32", exact
            reasons.append(f"float32 is more exact than bf16 and as fast, {exact.rate:.3g} Mpx/s")
    best = best_threads(figures, first)
    counts = [each for each in figures if _same_tiles(each, best)]
    if len(counts) > 1:
        gave = ", ".join(f"{each.threads} gave {each.rate:.3g}" for each in counts)
        reasons.append(f"of the threads tried {gave}")
    return Suggestion(
        tile=best.tile if asked.models == 1 else None,
        block=best.block if best.blocks > 1 else None,
        threads=best.threads if asked.kind == "cpu" else None,
        workers=asked.workers,
        precision=precision,
        stitch=asked.stitch,
        reasons=tuple(reasons),
    )


def _same_tiles(one: ForwardFigure, other: ForwardFigure) -> bool:
    """Whether two figures differ in nothing but the threads."""
    return (one.tile, one.precision, one.batch) == (other.tile, other.precision, other.batch)


def _others(figures: Sequence[ForwardFigure], best: ForwardFigure) -> str:
    """What the other tiles gave, run as the best one."""
    how = best.precision, best.batch, best.threads
    alike = [each for each in figures if (each.precision, each.batch, each.threads) == how and each is not best]
    return f"; {', '.join(f'{_by(each.tile)} gave {each.rate:.3g}' for each in alike)}" if alike else ""


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
