"""Proof, not belief: a derived geometry checked on the real network, in float64 on the CPU.

Two tests, each of which misses what the other finds:

1. Poison. Everything outside a core and its reach becomes NaN, then noise; the core must not change. A reach that
   is too small fails.
2. Congruence. Tiles of two sizes, at several legal origins, inside and at all four borders, must equal one pass
   over a raster a few alignment steps larger, wherever the geometry says they do. Misplaced pooling windows,
   parallel strides that disagree and resizing with aligned corners fail.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from tilepipe.errors import GeometryError
from tilepipe.geometry.network import AxisGeometry, Geometry, round_up
from tilepipe.trace import activation_bytes, first_map
from tilepipe.window import Interval, Window

_WORK = 3e11
"""Operations in a pass above which rows and columns are proved apart, beside one tile that moves along both."""
_HARD_WORK = 2e12
"""Operations in a pass above which that one tile is left out."""
_SMALL_AREA = 400_000
"""Pixels up to which further residue classes of sizes are proved too."""
_CLASSES = 4
_TOLERANCE = 1e-9
_AMPLITUDES = (1.0, 1e2, 1e4, 1e6)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison, and what came of it."""

    test: str
    """ "poison" or "congruence"."""
    detail: str
    """What was compared, and the deviation found."""
    ok: bool


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparisons of a geometry with its network gave."""

    checks: tuple[Check, ...]
    seed: int
    """Of the random input."""

    @property
    def ok(self) -> bool:
        """Whether all comparisons held."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The comparisons that did not hold."""
        return tuple(check for check in self.checks if not check.ok)

    def __str__(self) -> str:
        if self.ok:
            count = sum(check.test == "congruence" for check in self.checks)
            return f"proved in float64: {len(self.checks) - count} poison and {count} congruence checks hold"
        failed = self.failures[0] if self.failures else None
        return f"not proved: {failed.test}: {failed.detail}" if failed else "not proved: nothing was compared"


@dataclass(frozen=True, slots=True)
class _Cut:
    """A tile along one axis."""

    origin: int
    size: int


@dataclass(frozen=True, slots=True)
class _Axis:
    """What is tried along one axis: a raster, tiles in it, and a core to poison around."""

    geometry: AxisGeometry
    extent: int
    tiles: tuple[_Cut, ...]
    core: Interval | None
    """Outputs, aligned; None: not poisoned here."""
    need: Interval
    """The inputs that the core needs."""

    def valid(self, cut: _Cut) -> Interval:
        """The raster's outputs that a tile has to reproduce."""
        return self.geometry.valid(cut.origin, cut.size, self.extent)


def prove(network: nn.Module, geometry: Geometry, *, seed: int = 0, channels: int | None = None) -> Proof:
    """What the poison and congruence tests say of `geometry`, derived or claimed, for `network`.

    Works on a copy in float64 on the CPU, in evaluation mode, fed with seeded noise; takes seconds to a minute. A
    network whose untrained weights all but ignore their input gets stronger noise, so that differences show.
    Raises GeometryError for a geometry that does not claim to be exact.
    """
    if not geometry.exact:
        raise GeometryError(f"there is nothing to prove: {geometry.obstacle or 'the reach has no bound'}")
    subject = _Subject(copy.deepcopy(network).double().cpu().eval(), geometry, channels or geometry.channels_in, seed)
    try:
        with torch.no_grad():
            checks = tuple(subject.checks())
    except GeometryError as error:
        checks = (Check("congruence", str(error), ok=False),)
    return Proof(checks, seed)


class _Subject:
    """A network under test."""

    def __init__(self, network: nn.Module, geometry: Geometry, channels: int, seed: int) -> None:
        self.network = network
        self.geometry = geometry
        self.channels = channels
        self.random = torch.Generator().manual_seed(seed)

    def checks(self) -> Iterator[Check]:
        """All comparisons, as far as the network runs."""
        amplitude = self._amplitude()
        for rows, cols in _trials(self.geometry, self._flops()):
            image = amplitude * self._noise(rows.extent, cols.extent)
            whole = self._run(image)
            if rows.core and cols.core:
                yield from self._poison(image, whole, (rows.core, rows.need), (cols.core, cols.need), amplitude)
            for row, col in _paired(rows.tiles, cols.tiles):
                yield self._congruence(image, whole, (rows, row), (cols, col))

    def _noise(self, rows: int, cols: int) -> torch.Tensor:
        return torch.randn((1, self.channels, rows, cols), generator=self.random, dtype=torch.float64)

    def _run(self, image: torch.Tensor) -> torch.Tensor:
        """The network's output, of the size that the geometry promises."""
        rows, cols = int(image.shape[2]), int(image.shape[3])
        try:
            output = first_map(self.network(image.clone()))
        except Exception as error:
            raise GeometryError(f"the network raised on a legal input of {rows} x {cols}: {error}") from error
        promised = self.geometry.rows.output_size(rows), self.geometry.cols.output_size(cols)
        if tuple(output.shape[2:]) != promised:
            raise GeometryError(f"the output for {rows} x {cols} is {tuple(output.shape[2:])}, not {promised}")
        return output

    def _amplitude(self) -> float:
        """How strong the noise has to be for the output to depend on it more than on the biases."""
        rows, cols = (axis.sizes.minimums[0] for axis in self.geometry.axes)
        one, other = self._noise(rows, cols), self._noise(rows, cols)
        best, chosen = -1.0, 1.0
        for amplitude in _AMPLITUDES:
            a, b = self._run(amplitude * one), self._run(amplitude * other)
            answer = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))
            if answer > 0.1:
                return amplitude
            if answer > best:
                best, chosen = answer, amplitude
        return chosen

    def _flops(self) -> float:
        """Operations for an input pixel, where what a network adds around small images does not count."""
        rows, cols = (
            axis.sizes.ceil(256) if axis.sizes.step else axis.sizes.minimums[0] for axis in self.geometry.axes
        )
        cost = activation_bytes(self.network, (1, self.channels, rows, cols), torch.float64)
        return cost.flops / (rows * cols)

    def _poison(
        self,
        image: torch.Tensor,
        whole: torch.Tensor,
        rows: tuple[Interval, Interval],
        cols: tuple[Interval, Interval],
        amplitude: float,
    ) -> Iterator[Check]:
        """The two checks around a core, given (outputs, inputs that they need) along either axis."""
        core, shape = _part(whole, rows[0], cols[0]), (int(image.shape[2]), int(image.shape[3]))
        keep = Window(rows[1].clip(shape[0]), cols[1].clip(shape[1]))
        inside = keep.within(Window.whole(shape))
        for name in "NaN", "noise":
            poisoned = torch.full_like(image, torch.nan) if name == "NaN" else 10 * amplitude * self._noise(*shape)
            poisoned[(..., *inside)] = image[(..., *inside)]
            found = _part(self._run(poisoned), rows[0], cols[0])
            ok, deviation = _equal(core, found, whole)
            yield Check("poison", f"core {Window(rows[0], cols[0])}; {name} outside {keep}: {deviation}", ok)

    def _congruence(
        self, image: torch.Tensor, whole: torch.Tensor, row: tuple[_Axis, _Cut], col: tuple[_Axis, _Cut]
    ) -> Check:
        (rows, top), (cols, left) = row, col
        tile = image[..., top.origin : top.origin + top.size, left.origin : left.origin + left.size]
        valid = rows.valid(top), cols.valid(left)
        shift = -top.origin // rows.geometry.scale, -left.origin // cols.geometry.scale
        found = _part(self._run(tile), valid[0].shift(shift[0]), valid[1].shift(shift[1]))
        ok, deviation = _equal(_part(whole, *valid), found, whole)
        where = f"tile {top.size} x {left.size} at ({top.origin}, {left.origin}) of {rows.extent} x {cols.extent}"
        return Check("congruence", f"{where}: {deviation}", ok)


def _part(output: torch.Tensor, rows: Interval, cols: Interval) -> torch.Tensor:
    return output[..., rows.start : rows.stop, cols.start : cols.stop]


def _equal(expected: torch.Tensor, found: torch.Tensor, whole: torch.Tensor) -> tuple[bool, str]:
    """Whether two parts of an output are equal, labels included, and the deviation in words."""
    if expected.shape != found.shape or not expected.numel():
        return False, f"{tuple(found.shape[2:])} outputs instead of {tuple(expected.shape[2:])}"
    contrast = float((whole - whole.mean((2, 3), keepdim=True)).abs().max())
    bound = (_TOLERANCE if whole.dtype == torch.float64 else 1e-4) * max(contrast, 1e-300)
    deviation = float((expected - found).abs().max())
    if not deviation <= bound:
        return False, f"outputs differ by {deviation:.3g}, of {contrast:.3g}; legal: {bound:.3g}"
    unequal = int((expected.argmax(1) != found.argmax(1)).sum())
    if unequal:
        return False, f"{unequal} of {expected[:, 0].numel()} labels differ"
    return True, f"equal within {deviation / max(contrast, 1e-300):.1g}"


# ---- what to try -----------------------------------------------------------------------------------------------


def _trials(geometry: Geometry, flops: float) -> Iterator[tuple[_Axis, _Axis]]:
    """Pairs of axes to try together, for a network of `flops` operations for an input pixel.

    A cheap network is tried on both axes at once, then on further residue classes. A dear one is tried along one axis
    with the other as short as it may be, then the other way round, then with one inner tile on both.
    """
    rows, cols = (_axis(axis, axis.sizes.minimums[0]) for axis in geometry.axes)
    work = flops * rows.extent * cols.extent
    if work > _WORK:
        yield rows, _shortest(geometry.cols)
        yield _shortest(geometry.rows), cols
        if work <= _HARD_WORK:
            yield replace(rows, tiles=rows.tiles[2:3], core=None), replace(cols, tiles=cols.tiles[3:4], core=None)
        return
    yield rows, cols
    count = max(len(axis.sizes.minimums) for axis in geometry.axes)
    for index in range(1, min(count, _CLASSES)):
        chosen = [_residue(axis, index * max(1, count // _CLASSES)) for axis in geometry.axes]
        pair = [_axis(axis, least, few=True) for axis, least in zip(geometry.axes, chosen, strict=True)]
        if pair[0].extent * pair[1].extent <= _SMALL_AREA:
            yield pair[0], pair[1]


def _residue(axis: AxisGeometry, index: int) -> int:
    return axis.sizes.minimums[index % len(axis.sizes.minimums)]


def _axis(axis: AxisGeometry, residue_of: int, few: bool = False) -> _Axis:
    """A raster three alignment steps longer than the smallest tile, and tiles at its ends and inside."""
    step = axis.alignment
    core = round_up(max(step, 8), step) // axis.scale
    tile = axis.tile(core, residue_of)
    extent = axis.sizes.ceil(tile + 3 * step, tile)
    larger = axis.sizes.ceil(tile + step, tile)
    tiles = [_Cut(0, tile), _Cut(extent - tile, tile), _Cut(step, tile)]
    if not few:
        tiles += [_Cut(2 * step, tile), _Cut(0, larger), _Cut(extent - larger, larger), _Cut(step, larger)]
    poisoned = _poisoned(axis, extent, tiles)
    return replace(poisoned, core=None) if few else poisoned


def _poisoned(axis: AxisGeometry, extent: int, tiles: list[_Cut]) -> _Axis:
    reach = axis.reach or (0, 0)
    begin = axis.halo[0] + axis.alignment
    core = Interval(begin // axis.scale, (begin + axis.alignment) // axis.scale)
    need = Interval(begin - reach[0], begin + axis.alignment + reach[1])
    return _Axis(axis, extent, tuple(tiles), core, need)


def _shortest(axis: AxisGeometry) -> _Axis:
    """The smallest raster, which is one tile."""
    least = axis.sizes.minimums[0]
    core = Interval(0, axis.output_size(least))
    return _Axis(axis, least, (_Cut(0, least),), core, Interval(0, least))


def _paired(rows: tuple[_Cut, ...], cols: tuple[_Cut, ...]) -> list[tuple[_Cut, _Cut]]:
    """Tiles of both axes: the corners together, then the inner ones shifted by one, so that pairs vary."""
    count = max(len(rows), len(cols))
    mixed = cols if len(cols) == 1 else (*cols[:2], *cols[3:], cols[2])
    return [(rows[index % len(rows)], mixed[index % len(mixed)]) for index in range(count)]
