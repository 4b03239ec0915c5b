"""How a synthetic scene looks: the colour of each pixel from what lies there, its shadows and the light.

Colours are laid over one another in a buffer of three numbers, red, green and blue: the ground, the shadows on it,
trees, roofs. `sun` is the direction (rows, columns) in which shadows fall, of length 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tilepipe.scene.terrain import (
    BUILDING,
    FARM,
    FIELD,
    FOREST,
    GRASS,
    WATER,
    WOODS,
    Grid,
    Ground,
    Plane,
    Table,
    compiled,
    ground_at,
    hashed,
    noise,
    stream,
    uniform,
)

Pixels = NDArray[np.uint8]

CROWN = 13.0
"""Spacing of the crowns in woods, in pixels."""
FIELD_COLOURS = np.array(
    [
        (148, 120, 92),
        (168, 146, 112),
        (150, 148, 96),
        (116, 136, 80),
        (98, 124, 70),
        (66, 90, 54),
        (92, 80, 64),
        (132, 128, 116),
    ],
    dtype=np.float64,
)
ROOF_COLOURS = np.array(
    [(158, 86, 68), (132, 106, 86), (104, 102, 102), (168, 162, 152), (92, 76, 66), (134, 134, 128)],
    dtype=np.float64,
)


@compiled
def render(seed: int, row: int, col: int, plane: Plane, image: Pixels, labels: Pixels) -> None:
    """Fills `image` (3, rows, columns) and `labels` (rows, columns) with the pixels from (row, col) on."""
    key = stream(seed, 52)
    azimuth = 2.0 * math.pi * uniform(0, 0, key)
    sun = math.sin(azimuth), math.cos(azimuth)
    cast = np.empty(3)
    for band in range(3):
        cast[band] = 0.95 + 0.1 * uniform(band, 1, key)
    rgb = np.empty(3)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            y, x = float(row + r), float(col + c)
            rgb[:] = 0.0  # a pixel's colour must not depend on what was painted before it
            labels[r, c] = paint_pixel(seed, y, x, plane, sun, rgb)
            light = 0.94 + 0.12 * noise(y / 600.0, x / 600.0, key + 1)
            bits = hashed(row + r, col + c, key + 2)
            for band in range(3):
                grain = float(bits & np.uint64(255)) + float((bits >> np.uint64(8)) & np.uint64(255)) - 255.0
                bits >>= np.uint64(16)
                value = rgb[band] * light * cast[band] + 0.055 * grain + 0.5
                image[band, r, c] = np.uint8(min(max(value, 0.0), 255.0))


@compiled
def paint_pixel(seed: int, y: float, x: float, plane: Plane, sun: tuple[float, float], rgb: Table) -> int:
    """The label of one pixel, whose noiseless colour is put into `rgb`."""
    ground = ground_at(seed, y, x, plane.blocks)
    label = paint_ground(seed, y, x, ground, sun, rgb)
    shade = 0.0
    if label != WOODS and woods_may_be_near(ground):
        behind = ground_at(seed, y - 9.0 * sun[0], x - 9.0 * sun[1], plane.blocks)
        shade = 0.9 if behind.label == WOODS else 0.0
    shade = max(shade, building_shadow(y, x, plane.houses, sun), building_shadow(y, x, plane.halls, sun))
    if label != WOODS:
        shade = max(shade, tree_shadow(y, x, plane.trees, sun))
    for band in range(3):
        rgb[band] *= 1.0 - shade * (0.62 - 0.06 * band)
    if paint_tree(y, x, plane.trees, sun, rgb):
        label = WOODS
    if paint_roof(seed, y, x, plane.houses, sun, rgb) or paint_roof(seed, y, x, plane.halls, sun, rgb):
        label = BUILDING
    return label


@compiled
def woods_may_be_near(ground: Ground) -> bool:
    """Whether another cover can begin within a tree's shadow; false for most pixels, which saves a second look."""
    at_border = ground.clear + ground.half < 16.0 or (ground.kind == FARM and ground.border < 16.0)
    return at_border or ground.kind == FOREST or (ground.kind == FARM and ground.label == WATER)


@compiled
def lay(rgb: Table, red: float, green: float, blue: float, tone: float, cover: float) -> None:
    """Lay `tone` times a colour over `rgb`, as opaque as `cover`."""
    rgb[0] += cover * (red * tone - rgb[0])
    rgb[1] += cover * (green * tone - rgb[1])
    rgb[2] += cover * (blue * tone - rgb[2])


@compiled
def paint_ground(seed: int, y: float, x: float, ground: Ground, sun: tuple[float, float], rgb: Table) -> int:
    """The label of the ground, whose colour is put into `rgb`."""
    key = stream(seed, 56)
    patch = noise(y / 37.0, x / 37.0, key) - 0.5
    if ground.label == FIELD:
        lot = hashed(ground.row, ground.col, key + 1)
        colour = FIELD_COLOURS[int(lot % np.uint64(FIELD_COLOURS.shape[0]))]
        period = 5.5 + 0.5 * float((lot >> np.uint64(8)) & np.uint64(7))
        place = ground.across if (lot >> np.uint64(16)) & np.uint64(3) else ground.along
        tone = 0.9 + 0.2 * float((lot >> np.uint64(24)) & np.uint64(255)) / 255.0
        tone += 0.11 * math.sin(2.0 * math.pi * place / period) + 0.12 * patch
        tone *= 0.86 if ground.border < 1.6 else 1.0
        lay(rgb, colour[0], colour[1], colour[2], tone, 1.0)
    elif ground.label == GRASS:
        dry = noise(y / 140.0, x / 140.0, key + 2)
        fine = noise(y / 6.0, x / 6.0, key + 3) - 0.5
        lay(rgb, 80.0 + 72.0 * dry, 112.0 + 34.0 * dry, 60.0 + 38.0 * dry, 1.0 + 0.3 * patch + 0.2 * fine, 1.0)
    elif ground.label == WOODS:
        paint_crowns(y, x, sun, key + 4, rgb)
    elif ground.label == WATER:
        mud = noise(y / 500.0, x / 500.0, key + 6)
        ripple = noise(y / 4.0, x / 11.0, key + 7) - 0.5
        lay(rgb, 24.0 + 62.0 * mud, 44.0 + 58.0 * mud, 52.0 + 20.0 * mud, 1.0 + 0.1 * patch + 0.1 * ripple, 1.0)
    else:
        paint_road(y, x, ground, patch, key + 8, rgb)
    return ground.label


@compiled
def paint_crowns(y: float, x: float, sun: tuple[float, float], key: int, rgb: Table) -> None:
    """A closed canopy: the crown whose centre is nearest, lit from the sun's side and dark at its rim."""
    i, j = math.floor(y / CROWN), math.floor(x / CROWN)
    near, dy, dx, ni, nj = 1e18, 0.0, 0.0, 0, 0
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            lot = hashed(ci, cj, key)
            oy = y - (ci + 0.1 + 0.8 * float(lot & np.uint64(1023)) / 1023.0) * CROWN
            ox = x - (cj + 0.1 + 0.8 * float((lot >> np.uint64(10)) & np.uint64(1023)) / 1023.0) * CROWN
            distance = oy * oy + ox * ox
            if distance < near:
                near, dy, dx, ni, nj = distance, oy, ox, ci, cj
    hue = uniform(ni, nj, key + 1)
    lit = -(dy * sun[0] + dx * sun[1]) / CROWN
    tone = 1.0 + 0.75 * lit - 0.45 * min(near / (0.5 * CROWN * CROWN), 1.0)
    tone *= 0.92 + 0.2 * noise(y / 3.0, x / 3.0, key + 2)
    lay(rgb, 48.0 + 34.0 * hue, 80.0 + 22.0 * hue, 46.0 + 8.0 * hue, tone, 1.0)


@compiled
def paint_road(y: float, x: float, ground: Ground, patch: float, key: int, rgb: Table) -> None:
    """Lays a road: asphalt, the widest with a white centre line, or a track of bare earth."""
    worn = noise(y / 5.0, x / 5.0, key) - 0.5
    if ground.half < 8.6:  # the narrow ones are unpaved: the colour of tilled soil, with two wheel tracks
        track = 0.1 if abs(-ground.clear - ground.half * 0.55) < 1.5 else 0.0
        lay(rgb, 158.0, 136.0, 106.0, 1.0 + track + 0.16 * patch + 0.1 * worn, 1.0)
        return
    grey = 96.0 + 12.0 * (ground.half - 8.6)
    lay(rgb, grey, grey, grey + 2.0, 1.0 + 0.14 * patch + 0.08 * worn, 1.0)
    if ground.half > 9.6 and ground.half + ground.clear < 0.9:
        lay(rgb, 205.0, 205.0, 198.0, 1.0, 0.75)


@compiled
def building_shadow(y: float, x: float, grid: Grid, sun: tuple[float, float]) -> float:
    """How dark the buildings' shadow is: 1 where the ray to the sun meets a building (slab test)."""
    i, j = math.floor(y / grid.spacing) - grid.row, math.floor(x / grid.spacing) - grid.col
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = grid.cells[ci, cj]
            oy, ox = y - cell[1], x - cell[2]
            if cell[0] == 0.0 or oy * oy + ox * ox > (cell[0] + cell[7]) ** 2:
                continue
            u, v = ox * cell[3] + oy * cell[4], oy * cell[3] - ox * cell[4]
            ru, rv = (
                -cell[7] * (sun[1] * cell[3] + sun[0] * cell[4]),
                -cell[7] * (sun[0] * cell[3] - sun[1] * cell[4]),
            )
            ru, rv = ru if abs(ru) > 1e-9 else 1e-9, rv if abs(rv) > 1e-9 else 1e-9
            u0, u1 = (-cell[5] - u) / ru, (cell[5] - u) / ru
            v0, v1 = (-cell[6] - v) / rv, (cell[6] - v) / rv
            enter = max(min(u0, u1), min(v0, v1), 0.0)
            if enter <= min(max(u0, u1), max(v0, v1), 1.0):
                return 1.0
    return 0.0


@compiled
def paint_roof(seed: int, y: float, x: float, grid: Grid, sun: tuple[float, float], rgb: Table) -> bool:
    """Whether a building covers more than half of the pixel; paints its roof, gabled or flat."""
    i, j = math.floor(y / grid.spacing) - grid.row, math.floor(x / grid.spacing) - grid.col
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = grid.cells[ci, cj]
            oy, ox = y - cell[1], x - cell[2]
            if cell[0] == 0.0 or oy * oy + ox * ox > (cell[0] + 1.0) ** 2:
                continue
            u, v = ox * cell[3] + oy * cell[4], oy * cell[3] - ox * cell[4]
            inside = min(cell[5] - abs(u), cell[6] - abs(v))
            if inside <= -0.5:
                continue
            colour = ROOF_COLOURS[int(cell[8])]
            tone = 0.92 + 0.2 * cell[9]
            if cell[9] < 0.35:  # flat, with a bright parapet
                tone = 1.25 if inside < 1.8 else tone
            else:  # gabled: the side that faces the sun is the brighter
                facing = (sun[0] * cell[3] - sun[1] * cell[4]) * (-1.0 if v > 0.0 else 1.0)
                tone *= 1.0 + 0.28 * facing + (0.14 if abs(v) < 0.8 else 0.0)
            tone *= 0.96 + 0.08 * noise(u / 2.0, v / 9.0, stream(seed, 50))
            lay(rgb, colour[0], colour[1], colour[2], tone, min(inside + 0.5, 1.0))
            return inside > 0.0
    return False


@compiled
def tree_shadow(y: float, x: float, grid: Grid, sun: tuple[float, float]) -> float:
    """How dark the single trees' shadow is, 0 to 1."""
    i, j = math.floor(y / grid.spacing) - grid.row, math.floor(x / grid.spacing) - grid.col
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = grid.cells[ci, cj]
            oy, ox = y - cell[1] - cell[4] * sun[0], x - cell[2] - cell[4] * sun[1]
            if cell[0] > 0.0 and oy * oy + ox * ox < cell[0] * cell[0]:
                return 0.85
    return 0.0


@compiled
def paint_tree(y: float, x: float, grid: Grid, sun: tuple[float, float], rgb: Table) -> bool:
    """Whether a single tree covers the pixel; paints its crown."""
    i, j = math.floor(y / grid.spacing) - grid.row, math.floor(x / grid.spacing) - grid.col
    for ci in range(i - 1, i + 2):
        for cj in range(j - 1, j + 2):
            cell = grid.cells[ci, cj]
            oy, ox = y - cell[1], x - cell[2]
            radius = cell[0] * (0.85 + 0.3 * noise(y / 5.0, x / 5.0, 977)) if cell[0] > 0.0 else 0.0
            distance = oy * oy + ox * ox
            if distance < radius * radius:
                lit = -(oy * sun[0] + ox * sun[1]) / cell[0]
                tone = 0.9 + 0.38 * lit - 0.2 * distance / (radius * radius)
                tone *= 0.9 + 0.2 * noise(y / 3.0, x / 3.0, 978)
                lay(rgb, 52.0 + 34.0 * cell[3], 86.0 + 22.0 * cell[3], 48.0 + 8.0 * cell[3], tone, 1.0)
                return True
    return False
