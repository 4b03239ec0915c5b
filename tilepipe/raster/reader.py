"""Reading windows: reflection beyond the raster, validity and palettes, over whatever stores the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import InputError, UsageError
from tilepipe.raster.info import BandChoice, Pixels, RasterInfo, band_nodata
from tilepipe.window import Interval, Window


class Backend(Protocol):
    """Stored pixels of a raster; any number of threads may call it at once. Windows lie in the raster."""

    def fetch(self, bands: Sequence[int], window: Window, out: NDArray[Any]) -> None:
        """Fill `out` (bands, rows, columns) with the 1-based `bands` of `window`; ReadError if unreadable."""

    def fetch_mask(self, bands: Sequence[int], window: Window) -> NDArray[np.bool_]:
        """(rows, columns): where the stored mask of every one of `bands` says valid."""

    def close(self) -> None:
        """Let go of open files."""


class Recipe(Protocol):
    """How to open a raster anywhere: a small picklable value."""

    def backend(self) -> Backend:
        """A backend that opens its files when they are first read."""

    def identity(self) -> list[dict[str, Any]]:
        """What tells this raster's content from another's, as JSON-able parts, one a file."""


class Reader:
    """Reads windows of one raster from any number of threads; pickles by its recipe, not by open files."""

    def __init__(self, recipe: Recipe, raw: RasterInfo, choice: BandChoice) -> None:
        self._recipe = recipe
        self._raw = raw
        self._choice = choice
        self.info = raw.select(choice)
        """The raster as this reader returns it."""
        self._nodata = tuple(band_nodata(raw, band) for band in choice.indices)
        # Alpha holds for every band but itself.
        self._alpha = raw.alpha if raw.alpha not in choice.indices or len(choice.indices) > 1 else None
        together = choice.indices if self._alpha is None else (*choice.indices, self._alpha)
        self._dtype = np.dtype(raw.select(BandChoice(together)).dtype)
        self._lut = palette_table(raw, choice) if choice.palette else None
        self._backend = recipe.backend()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, (self._recipe, self._raw, self._choice)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that any thread has opened; a later read opens them anew."""
        self._backend.close()

    def read(self, window: Window, out: NDArray[Any] | None = None) -> Pixels:
        """The pixels of `window`, extended by reflection where it reaches beyond the raster on any side.

        `out`, if given, receives and becomes the values: (bands, rows, columns) of the reader's dtype. Only the
        part of the raster that is needed is read. An unreadable block is a ReadError naming file and window.
        """
        shape = (self.info.bands, *window.shape)
        if out is not None and (out.shape != shape or out.dtype != np.dtype(self.info.dtype)):
            raise UsageError(f"out is {out.shape} {out.dtype}, the read gives {shape} {self.info.dtype}")
        if window.area == 0:
            return Pixels(np.empty(shape, self.info.dtype) if out is None else out, None)
        if window.clip(self.info.shape) == window:
            return self._inside(window, out)
        rows, cols = window.rows.reflect(self.info.shape[0]), window.cols.reflect(self.info.shape[1])
        hull = Window(_span(rows), _span(cols))
        values, valid = self._inside(hull, None)
        index = (rows - hull.rows.start)[:, None], (cols - hull.cols.start)[None, :]
        extended = values[:, index[0], index[1]]
        if out is not None:
            out[...] = extended
            extended = out
        return Pixels(extended, None if valid is None else valid[index])

    def _inside(self, window: Window, out: NDArray[Any] | None) -> Pixels:
        bands = self._choice.indices
        alpha = self._alpha
        direct = out is not None and alpha is None and self._lut is None
        planes: NDArray[Any]
        if direct and out is not None:
            planes = out
        else:
            # Alpha is read together with the bands: interleaved files would be decoded twice otherwise.
            planes = np.empty((len(bands) + (alpha is not None), *window.shape), self._dtype)
        self._backend.fetch(bands if alpha is None else (*bands, alpha), window, planes)
        stored = planes[: len(bands)]
        valid = self._valid(stored, planes[-1] if alpha is not None else None, window)
        if self._lut is not None:
            stored = self._lut[:, stored[0]]
        stored = stored.astype(self.info.dtype, copy=False)
        if out is not None:
            if not direct:
                out[...] = stored
            stored = out
        return Pixels(stored, valid)

    def _valid(self, values: NDArray[Any], alpha: NDArray[Any] | None, window: Window) -> NDArray[np.bool_] | None:
        parts = [_differs(plane, value) for plane, value in zip(values, self._nodata, strict=True) if value is not None]
        if alpha is not None:
            parts.append(alpha > 0)
        if self._raw.stored_mask != "none":
            parts.append(self._backend.fetch_mask(self._choice.indices, window))
        if values.dtype.kind == "f":
            parts.extend(np.isfinite(plane) for plane in values)
        if not parts:
            return None
        valid = parts[0]
        for part in parts[1:]:
            valid &= part
        return None if valid.all() else valid


def _span(indices: NDArray[np.intp]) -> Interval:
    return Interval(int(indices.min()), int(indices.max()) + 1)


def palette_table(info: RasterInfo, choice: BandChoice) -> NDArray[np.uint8]:
    """(colours, values): what each pixel value stands for in the chosen columns; black beyond the table."""
    dtype = np.dtype(info.dtypes[choice.indices[0] - 1])
    if info.colormap is None or dtype.name not in ("uint8", "uint16"):
        raise InputError(f"{info.name} has no colour table for its {dtype} pixels; only uint8 and uint16 can have one")
    lut = np.zeros((len(choice.palette), 1 << (8 * dtype.itemsize)), dtype=np.uint8)
    table = np.array(info.colormap, dtype=np.uint8)
    lut[:, : len(table)] = table[:, list(choice.palette)].T
    return lut


def _differs(plane: NDArray[Any], nodata: float) -> NDArray[np.bool_]:
    """Where a band is not nodata. Floats within two units in the last place count as equal, as in GDAL's masks."""
    if plane.dtype.kind != "f":
        return plane != nodata
    if np.isnan(nodata):
        return ~np.isnan(plane)
    value = plane.dtype.type(nodata)
    if np.isinf(value):
        return plane != value
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.abs(plane - value) < np.finfo(plane.dtype).eps * np.abs(plane + value) * 2
    return ~((plane == value) | close)
