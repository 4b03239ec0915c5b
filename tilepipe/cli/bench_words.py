"""A benchmark's report in words, and its suggestion as a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilepipe.cli import show

if TYPE_CHECKING:
    from tilepipe.bench.report import BenchReport, WholeFigure

KERNELS = {"label": "best class", "accumulate": "blend: add a tile", "finish": "blend: best class of the sums"}


def report_text(report: BenchReport, output: str | None) -> str:
    """The report for people; `output`: where its suggestion was written."""
    subject = report.subject
    head = [
        ("machine", f"{subject.device}, {show.count(subject.cores, 'hardware thread')}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in subject.versions.items())),
        ("raster", f"{subject.raster}: {show.by(subject.shape)} pixels, {subject.bands} bands, {subject.dtype}"),
        *(("model", source) for source in subject.models),
        ("job", f"{subject.stitch}, {subject.kind}, {subject.precision}; {report.seconds:g} s each"),
    ]
    tail = [*_job_entries(report.whole), ("bound", _bound(report)), *_suggestion(report, output)]
    tail += [("note", note) for note in report.notes]
    return "\n\n".join([show.entries(head), _parts(report), _forward(report), _kernels(report), show.entries(tail)])


def _parts(report: BenchReport) -> str:
    """Reading, staging and writing."""
    read, stage, write = report.read, report.stage, report.write
    windows = f"windows of {show.by(read.window)}"
    rows = [
        ("read", f"{windows}, 1 thread", _rate(read.single), _rate(read.single / read.factor)),
        ("read", f"{windows}, {_threads(read.threads)}", _rate(read.together), _rate(read.rate)),
        (
            "stage",
            "into zarr chunks" + ("" if stage.needed is None else ", needed"),
            _rate(stage.rate),
            _rate(stage.rate),
        ),
        ("write", f"blocks of {show.by(write.block)}, {_threads(write.threads)}", _rate(write.rate), _rate(write.rate)),
    ]
    return show.table(("part", "", "Mpx/s", "Mpx/s of the raster"), rows, right=(2, 3))


def _forward(report: BenchReport) -> str:
    """The network, a line for each tile."""
    rows = [
        (
            show.by(each.tile),
            show.by(each.core),
            each.precision,
            str(each.threads),
            str(each.batch),
            _rate(each.network_rate),
            _rate(each.rate),
            f"{each.tflops:.3g}",
            f"{100 * each.share:.0f} %",
        )
        for each in report.forward
    ]
    head = ("tile", "core", "precision", "threads", "batch", "Mpx/s", "Mpx/s of the raster", "TFLOP/s", "of products")
    products = ", ".join(f"{rate:.3g} TFLOP/s in {name}" for name, rate in report.products.items())
    return show.table(head, rows, right=range(3, 9)) + f"\nmatrix products: {products}"


def _kernels(report: BenchReport) -> str:
    """The kernels between scores and maps."""
    rows = [
        (
            KERNELS[each.name],
            "yes" if each.used else "no",
            _rate(each.rate),
            f"{each.gigabytes:.3g}",
            f"{100 * each.share:.0f} %",
        )
        for each in report.kernels
    ]
    head = ("kernel", "used here", "Mpx/s", "GB/s", "of a copy")
    return show.table(head, rows, right=(2, 3, 4)) + f"\nplain copy: {report.copy:.3g} GB/s read and written"


def _job_entries(whole: WholeFigure) -> Iterator[tuple[str, str]]:
    """The job from file to store."""
    yield (
        "whole job",
        f"{_rate(whole.rate)} Mpx/s of the raster: {show.count(whole.blocks, 'block')} in "
        f"{show.duration(whole.seconds)} after {show.duration(whole.start_seconds)} of preparation",
    )
    yield (
        "busy",
        f"{100 * whole.busy:.0f} % of the time, for {show.count(whole.tiles, 'tile')} at the bare network's "
        f"{_rate(whole.network_rate)} Mpx/s, measured before and after",
    )
    yield "host", f"{show.size(whole.host_bytes)} at the peak, projected {show.size(whole.projected_host_bytes)}"
    if whole.device_bytes:
        sizes = show.size(whole.device_bytes), show.size(whole.projected_device_bytes)
        yield "gpu", f"{sizes[0]} of torch's memory at the peak, projected {sizes[1]} with its context"


def _bound(report: BenchReport) -> str:
    found = report.bound
    return (
        f"{found.stage}, {_rate(found.rate)} Mpx/s of the raster; next {found.following}, "
        f"{_rate(found.following_rate)}; together {_rate(found.expected)}"
    )


def _suggestion(report: BenchReport, output: str | None) -> Iterator[tuple[str, str]]:
    """The options that suit the machine, why, and where they are."""
    words = [f"--{name} {_value(value)}" for name, value in report.suggestion.options().items()]
    yield "suggested", "\n".join([" ".join(words), *report.suggestion.reasons])
    if output is not None:
        yield "written", f"{output}; use it as --tuned {output}"


def tuned_text(report: BenchReport) -> str:
    """The suggestion as a TOML file for `--tuned`, with what it was measured on as a comment."""
    subject = report.subject
    told = [
        f"Measured by tilepipe bench, {report.seconds:g} s each.",
        f"machine: {subject.device}, {show.count(subject.cores, 'hardware thread')}",
        f"libraries: {', '.join(f'{name} {version}' for name, version in subject.versions.items())}",
        f"raster: {subject.raster}, {show.by(subject.shape)} pixels, {subject.bands} bands, {subject.dtype}",
        f"model: {', '.join(subject.models)}; {subject.stitch}, {subject.kind}, {subject.precision}",
        f"Mpx/s of the raster: {', '.join(f'{name} {_rate(rate)}' for name, rate in report.rates.items())}; "
        f"whole job {_rate(report.whole.rate)}",
        *report.suggestion.reasons,
    ]
    # A line break in a name would end the comment.
    lines = [f"# {' '.join(line.split())}" for line in told]
    lines += [f"{name} = {_toml(value)}" for name, value in report.suggestion.options().items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _value(value: Any) -> str:
    return "x".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _threads(count: int) -> str:
    return show.count(count, "thread")


def _rate(value: float) -> str:
    return f"{value:.3g}"
