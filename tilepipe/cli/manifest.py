"""Which scenes a batch is of: the rows of a CSV or TOML file, or the rasters of a folder or pattern."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilepipe.cli.arguments import parsed, read_table
from tilepipe.errors import InputError, UsageError

RASTER_ENDINGS = (".tif", ".tiff", ".vrt", ".jp2", ".png", ".jpg", ".jpeg", ".img", ".nc", ".ecw")
"""Of the files in a folder, those that are taken for rasters; a pattern takes what it names."""
MANIFEST_ENDINGS = (".csv", ".toml")
PATHS = ("mask", "weights")
"""Options whose values are files."""

Legal = Mapping[str, bool]
"""The names of the options that a row may have, and which of them may be repeated."""


@dataclass(frozen=True, slots=True)
class Row:
    """One scene as a list names it."""

    inputs: tuple[str, ...]
    output: str | None = None
    """None where the list does not say."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Options of its own, as a command line would give them."""
    place: str = ""
    """The file and line that name it; nothing in a folder."""


def read_rows(jobs: Sequence[str], legal: Legal) -> list[Row]:
    """The scenes that a manifest, a folder, or rasters and patterns name; UsageError, with the line, for a wrong one.

    Paths in a manifest count from its own folder.
    """
    if is_manifest(jobs):
        rows = list((_toml_rows if jobs[0].lower().endswith(".toml") else _csv_rows)(jobs[0], legal))
    elif len(jobs) == 1 and os.path.isdir(jobs[0]):
        names = (entry for entry in sorted(os.listdir(jobs[0])) if entry.lower().endswith(RASTER_ENDINGS))
        rows = [Row((os.path.join(jobs[0], name),)) for name in names]
    else:
        rows = [Row((name,)) for job in jobs for name in _matches(job)]
    if not rows:
        raise UsageError(f"{jobs[0]} names no raster; give a manifest (.csv, .toml), a folder, or rasters")
    return rows


def is_manifest(jobs: Sequence[str]) -> bool:
    """Whether the words name a manifest; UsageError where they name one and something else."""
    found = [job for job in jobs if job.lower().endswith(MANIFEST_ENDINGS)]
    if found and len(jobs) > 1:
        raise UsageError(f"{found[0]} is a manifest, which stands alone; give the other {len(jobs) - 1} as rows of it")
    return bool(found)


def read_defaults(jobs: Sequence[str], legal: Legal) -> dict[str, Any]:
    """What a TOML manifest says under [defaults], as a command line would give it; nothing elsewhere."""
    if not is_manifest(jobs) or not jobs[0].lower().endswith(".toml"):
        return {}
    path = jobs[0]
    table = read_table(path, "the manifest").get("defaults", {})
    if not isinstance(table, dict):
        raise UsageError(f"defaults in {path} is no table; write [defaults] and a line for each option below it")
    return dict(parsed(f"{path} [defaults]", _placed(path, table), legal))


def missing(row: Row) -> str | None:
    """The first input that is not there, as far as that can be known before it is opened; None where none is."""
    for name in row.inputs:
        known = "://" in name or name.startswith("/vsi") or os.path.exists(name)
        if not known and not (glob.glob(name, recursive=True) if glob.has_magic(name) else ":" in name):
            return name
    return None


def would_be_file(output: str) -> bool:
    """Whether an output cannot be a zarr folder, by its name or by what is there."""
    return output.lower().endswith(RASTER_ENDINGS) or os.path.isfile(output)


def named_output(row: Row, folder: str) -> str:
    """Where a row's map goes that says nothing of it: in the folder, under the scene's name."""
    stem = os.path.splitext(os.path.basename(row.inputs[0].rstrip("/")))[0]
    return f"{folder.rstrip('/') or '/'}/{stem}.zarr"


def _matches(job: str) -> list[str]:
    """The files that a word names: itself, or those that fit it as a pattern."""
    if "://" in job or job.startswith("/vsi") or os.path.exists(job) or not glob.has_magic(job):
        return [job]
    return sorted(glob.glob(job, recursive=True))


def _csv_rows(path: str, legal: Legal) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a CSV file: {' '.join(str(error).split())}") from None
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise UsageError(f"{path} is empty; its first line is to name the columns, such as input,output,model")
    (first, columns), *rest = lines
    columns = [column.lower().replace("-", "_") for column in columns]
    options = [column for column in columns if column not in ("input", "output")]
    dict(parsed(f"{path} line {first}", dict.fromkeys(options, True), legal))
    twice = next((c for c in columns if columns.count(c) > 1 and not legal.get(c, c == "input")), None)
    if twice is not None:
        raise UsageError(f"{path} line {first} names the column {twice} twice, and it can have one value")
    for number, cells in rest:
        place = f"{path} line {number}"
        if len(cells) != len(columns):
            raise UsageError(f"{place} has {len(cells)} cells for {len(columns)} columns; quote cells that hold commas")
        table: dict[str, Any] = {}
        for column, cell in zip(columns, cells, strict=True):
            if cell:
                value: Any = {"true": True, "false": False}.get(cell.lower(), cell)
                table[column] = [*table.get(column, []), value] if columns.count(column) > 1 else value
        yield _row(path, place, table, legal)


def _toml_rows(path: str, legal: Legal) -> Iterator[Row]:
    manifest = read_table(path, "the manifest")
    unknown = next((key for key in manifest if key not in ("defaults", "scene")), None)
    if unknown is not None:
        raise UsageError(f"unknown key {unknown!r} in {path}; legal are [defaults] and a [[scene]] for each scene")
    tables = manifest.get("scene", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"scene in {path} is no list of tables; write each scene under [[scene]]")
    with open(path, encoding="utf-8") as file:
        heads = [number for number, line in enumerate(file, 1) if re.match(r"\s*\[\[\s*scene\s*\]\]", line)]
    for number, table in enumerate(tables, 1):
        place = f"line {heads[number - 1]}" if len(heads) == len(tables) else f"scene {number}"
        yield _row(path, f"{path} {place}", table, legal)


def _row(path: str, place: str, table: Mapping[str, Any], legal: Legal) -> Row:
    """The scene that a manifest's row names."""
    rest = _placed(path, table)
    inputs, output = rest.pop("input", None), rest.pop("output", None)
    names = [inputs] if isinstance(inputs, str) else inputs
    if not names or not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{place} names no input; give a raster, a pattern, or several of them")
    if output is not None and not (isinstance(output, str) and output):
        raise UsageError(f"{place} has the output {output!r}; give a zarr folder such as labels.zarr")
    if output is not None and would_be_file(output):
        raise UsageError(f"{place}: the output {output} would be a file; name a zarr folder such as labels.zarr")
    return Row(tuple(names), output, dict(parsed(place, rest, legal)), place)


def _placed(path: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with paths that count from the manifest's folder."""
    folder = os.path.dirname(path)

    def at(key: str, name: Any) -> Any:
        if isinstance(name, list):
            return [at(key, one) for one in name]
        if not isinstance(name, str) or os.path.isabs(name) or "://" in name or not folder:
            return name
        there = os.path.join(folder, name)
        if key in ("input", "output", *PATHS):
            # What GDAL takes for a driver's own names, such as NETCDF:file.nc:variable, is left to it.
            return name if ":" in name and not os.path.exists(there) else there
        # A model may also be a bundled one, an architecture, or a module's factory.
        return there if os.path.exists(there) or os.path.exists(there.rpartition(":")[0]) else name

    return {
        key: at(key, value) if key in ("input", "output", "model", *PATHS) else value for key, value in table.items()
    }


def refuse_missing(rows: Sequence[Row]) -> None:
    """Nothing where every input is there; else InputError, which names the first rows whose input is not."""
    found = [f"{row.place}: {name}".removeprefix(": ") for row in rows if (name := missing(row)) is not None]
    if found:
        raise InputError(f"no such file: {several(found)}")


def several(problems: Sequence[str], most: int = 3) -> str:
    """The first of several problems in one line, and how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")
