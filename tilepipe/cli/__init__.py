"""The command line: parses, calls the library, prints. Libraries are loaded when a command runs, not before."""

from __future__ import annotations

from typing import Annotated

import typer

from tilepipe.cli import batch, bench, demo, evaluate, jobs, networks, preview, stats, stores, train
from tilepipe.cli.group import Group
from tilepipe.version import __version__

app = typer.Typer(
    name="tilepipe",
    cls=Group,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    jobs.segment,
    jobs.predict,
    jobs.plan,
    batch.batch,
    networks.inspect,
    networks.models,
    stores.status,
    stats.stats,
    preview.preview,
    stores.export,
    stores.overviews,
    stores.ingest,
    train.train,
    evaluate.evaluate,
    demo.demo,
    bench.bench,
):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"tilepipe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Segment rasters of any size with a convolutional network: tiled, seamless, exact where it can be."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main() -> None:
    """Runs the command line and exits with its code."""
    app(prog_name="tilepipe")
