"""Where things lie in a synthetic scene: random numbers by position, the ground, houses and trees.

Everything is a pure function of a seed and a position. `synthetic.py` says what the plane is made of; here a window's
objects are put into grids of cells, and `ground_at` tells what lies under one pixel. Compiled functions may be
called from several threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

FIELD, GRASS, WOODS, WATER, ROAD, BUILDING = range(6)
"""The label values."""

VILLAGE, WORKS, FARM, FOREST, LAKE = range(5)
BLOCK, HOUSE_CELL, HALL_CELL, TREE_CELL = 430.0, 66.0, 168.0, 46.0
"""Spacing of the sites of blocks, houses, halls and trees, in pixels."""
ROOFS = 6
"""Number of roof colours."""

compiled = njit(nogil=True, cache=True, error_model="numpy")

Table = NDArray[np.float64]


@compiled
def hashed(i: int, j: int, key: int) -> np.uint64:
    """64 well-mixed bits of two coordinates and a key (the finaliser of MurmurHash3)."""
    h = np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
    h ^= np.uint64(j) * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(key) * np.uint64(0x165667B19E3779F9)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return h


@compiled
def uniform(i: int, j: int, key: int) -> float:
    """A random number, 0 up to 1, that belongs to two coordinates and a key."""
    return np.float64(hashed(i, j, key) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def noise(y: float, x: float, key: int) -> float:
    """Smooth value noise in 0..1 with features of size 1."""
    fi, fj = math.floor(y), math.floor(x)
    i, j = int(fi), int(fj)
    v, u = y - fi, x - fj
    v, u = v * v * (3.0 - 2.0 * v), u * u * (3.0 - 2.0 * u)
    top = uniform(i, j, key) * (1.0 - u) + uniform(i, j + 1, key) * u
    low = uniform(i + 1, j, key) * (1.0 - u) + uniform(i + 1, j + 1, key) * u
    return top * (1.0 - v) + low * v


@compiled
def stream(seed: int, stream: int) -> int:
    """The key of one of 64 independent sequences of random numbers."""
    return seed * 64 + stream


class Grid(NamedTuple):
    """The cells that a window touches and some around it."""

    cells: Table
    """(rows, columns, fields); what the fields are, the function that fills them says."""
    row: int
    col: int
    """Grid position of cell (0, 0)."""
    spacing: float


class Plane(NamedTuple):
    """Everything that pixels are made from: a window's objects."""

    blocks: Grid
    houses: Grid
    halls: Grid
    trees: Grid


def grid_over(window: tuple[float, float, float, float], spacing: float, margin: int, fields: int) -> Grid:
    """An empty grid over `window` (row, column, rows, columns) and `margin` cells around it."""
    row, col = (math.floor(start / spacing) - margin for start in window[:2])
    rows, cols = (
        math.floor((start + length) / spacing) + margin + 1 - first
        for start, length, first in zip(window[:2], window[2:], (row, col), strict=True)
    )
    return Grid(np.zeros((rows, cols, fields)), row, col, spacing)


@compiled
def place_blocks(seed: int, grid: Grid) -> Grid:
    """Fills y, x, kind, direction of the parcels, their width, their length."""
    key = stream(seed, 1)
    for r in range(grid.cells.shape[0]):
        for c in range(grid.cells.shape[1]):
            i, j, cell = grid.row + r, grid.col + c, grid.cells[r, c]
            cell[0] = (i + 0.5 + 0.62 * (uniform(i, j, key) - 0.5)) * grid.spacing
            cell[1] = (j + 0.5 + 0.62 * (uniform(i, j, key + 1) - 0.5)) * grid.spacing
            lot = uniform(i, j, key + 2)
            cell[2] = (lot > 0.28) + (lot > 0.39) + (lot > 0.77) + (lot > 0.88)
            cell[3] = math.pi * uniform(i, j, key + 3)
            cell[4] = 80.0 + 70.0 * uniform(i, j, key + 4)
            cell[5] = 170.0 + 160.0 * uniform(i, j, key + 5)
    return grid


class Ground(NamedTuple):
    """What lies under a pixel before objects are put on it."""

    label: int
    clear: float
    """Distance to the nearest road's edge; negative on the road."""
    half: float
    """Half that road's width; negative where there is none."""
    kind: int
    """Of the block."""
    row: int
    col: int
    """Of the parcel; unique numbers rather than positions."""
    along: float
    across: float
    """Place in the parcel, from one of its corners."""
    border: float
    """Distance to the parcel's border."""


@compiled
def ground_at(seed: int, y: float, x: float, blocks: Grid) -> Ground:
    """What lies at (y, x); `blocks` must hold the cells around it."""
    key = stream(seed, 8)
    wy = y + 52.0 * (noise(y / 230.0, x / 230.0, key) - 0.5)
    wx = x + 52.0 * (noise(y / 230.0, x / 230.0, key + 1) - 0.5)
    bi, bj, edge, half = nearest_blocks(wy, wx, blocks, key + 2)
    block = blocks.cells[bi - blocks.row, bj - blocks.col]
    kind = int(block[2])
    cos, sin = math.cos(block[3]), math.sin(block[3])
    across, along = wx * cos + wy * sin, wy * cos - wx * sin
    pi = math.floor(across / block[4])
    along += uniform(pi, bi * 8191 + bj, key + 6) * block[5]
    pj = math.floor(along / block[5])
    across -= pi * block[4]
    along -= pj * block[5]
    border = min(across, block[4] - across, along, block[5] - along)
    row, col = pi * 131 + bi, pj * 137 + bj
    label = GRASS
    if kind == FARM:
        lot = uniform(row, col, key + 7)
        label = FIELD if lot < 0.72 else (GRASS if lot < 0.86 else WOODS)
    elif kind == FOREST:
        label = WOODS if noise(y / 90.0, x / 90.0, key + 8) > 0.2 else GRASS
    elif kind == LAKE and edge > 20.0 + 80.0 * noise(y / 80.0, x / 80.0, key + 9):
        label = WATER
    river = 0.8 * noise(y / 900.0, x / 900.0, key + 10) + 0.2 * noise(y / 260.0, x / 260.0, key + 11) - 0.5
    if abs(river) < 0.012:
        label = WATER
    if edge < half:
        label = ROAD
    return Ground(label, edge - half, half, kind, row, col, along, across, border)


@compiled
def nearest_blocks(wy: float, wx: float, blocks: Grid, key: int) -> tuple[int, int, float, float]:
    """(row, column of the block, distance to its border, half the width of the road there or -8)."""
    i, j = math.floor(wy / blocks.spacing), math.floor(wx / blocks.spacing)
    near = far = 1e18
    ni = nj = fi = fj = 0
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = blocks.cells[ci - blocks.row, cj - blocks.col]
            distance = (wy - cell[0]) ** 2 + (wx - cell[1]) ** 2
            if distance < near:
                far, fi, fj = near, ni, nj
                near, ni, nj = distance, ci, cj
            elif distance < far:
                far, fi, fj = distance, ci, cj
    a, b = blocks.cells[ni - blocks.row, nj - blocks.col], blocks.cells[fi - blocks.row, fj - blocks.col]
    edge = (far - near) / (2.0 * math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2))
    pair = uniform(ni + fi, nj + fj, key + abs(ni - fi) + 2 * abs(nj - fj))
    return ni, nj, edge, -8.0 if pair > 0.86 else 7.0 + 5.0 * pair


@compiled
def place_buildings(seed: int, grid: Grid, blocks: Grid, kind: int) -> Grid:
    """Fills radius (0: none), y, x, cos, sin, half length, half width, shadow, roof colour, tone."""
    key = stream(seed, 24 + 10 * (kind == WORKS))
    large = kind == WORKS
    for r in range(grid.cells.shape[0]):
        for c in range(grid.cells.shape[1]):
            i, j, cell = grid.row + r, grid.col + c, grid.cells[r, c]
            length = 34.0 + 16.0 * uniform(i, j, key) if large else 14.0 + 7.0 * uniform(i, j, key)
            width = 22.0 + 10.0 * uniform(i, j, key + 1) if large else 10.0 + 4.0 * uniform(i, j, key + 1)
            radius = math.sqrt(length * length + width * width)
            room = grid.spacing - 2.0 * radius
            y = i * grid.spacing + radius + room * uniform(i, j, key + 2)
            x = j * grid.spacing + radius + room * uniform(i, j, key + 3)
            ground = ground_at(seed, y, x, blocks)
            free = ground.label == GRASS and ground.kind == kind and ground.clear > 0.9 * radius + 4.0
            for side in range(8):
                oy, ox = radius * math.sin(0.25 * math.pi * side), radius * math.cos(0.25 * math.pi * side)
                free = free and ground_at(seed, y + oy, x + ox, blocks).label == GRASS
            if not free or uniform(i, j, key + 4) > 0.92:
                continue
            bi, bj, _, _ = nearest_blocks(y, x, blocks, 0)
            angle = blocks.cells[bi - blocks.row, bj - blocks.col, 3] + 0.5 * math.pi * (uniform(i, j, key + 5) > 0.5)
            cell[0], cell[1], cell[2], cell[3], cell[4] = radius, y, x, math.cos(angle), math.sin(angle)
            cell[5], cell[6] = length, width
            cell[7] = 14.0 + 14.0 * uniform(i, j, key + 6)
            cell[8] = math.floor(uniform(i, j, key + 7) * ROOFS)
            cell[9] = uniform(i, j, key + 8)
    return grid


@compiled
def place_trees(seed: int, grid: Grid, blocks: Grid, houses: Grid, halls: Grid) -> Grid:
    """Fills radius (0: none), y, x, tone, shadow."""
    key = stream(seed, 44)
    for r in range(grid.cells.shape[0]):
        for c in range(grid.cells.shape[1]):
            i, j, cell = grid.row + r, grid.col + c, grid.cells[r, c]
            radius = 8.0 + 5.0 * uniform(i, j, key)
            y = (i + uniform(i, j, key + 1)) * grid.spacing
            x = (j + uniform(i, j, key + 2)) * grid.spacing
            ground = ground_at(seed, y, x, blocks)
            share = 0.12 if ground.kind == FARM and ground.border > 8.0 else 0.42
            if ground.label > GRASS or ground.clear < radius or uniform(i, j, key + 3) > share:
                continue
            if near_building(y, x, radius, houses) or near_building(y, x, radius, halls):
                continue
            cell[0], cell[1], cell[2] = radius, y, x
            cell[3], cell[4] = uniform(i, j, key + 4), 0.9 * radius
    return grid


@compiled
def near_building(y: float, x: float, radius: float, grid: Grid) -> bool:
    """Whether a disc meets the circle around any building."""
    i, j = math.floor(y / grid.spacing) - grid.row, math.floor(x / grid.spacing) - grid.col
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = grid.cells[ci, cj]
            if cell[0] > 0.0 and (y - cell[1]) ** 2 + (x - cell[2]) ** 2 < (cell[0] + radius) ** 2:
                return True
    return False


def plan_window(seed: int, window: tuple[float, float, float, float]) -> Plane:
    """The objects that pixels of `window` (row, column, rows, columns) can see."""
    blocks = place_blocks(seed, grid_over(window, BLOCK, 4, 6))
    houses = place_buildings(seed, grid_over(window, HOUSE_CELL, 2, 10), blocks, VILLAGE)
    halls = place_buildings(seed, grid_over(window, HALL_CELL, 2, 10), blocks, WORKS)
    trees = place_trees(seed, grid_over(window, TREE_CELL, 1, 6), blocks, houses, halls)
    return Plane(blocks, houses, halls, trees)
