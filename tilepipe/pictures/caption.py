"""What is said of a map beside its picture: size, place, model, raster; no path of this machine, and no date."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tilepipe.ground import pixel_width
from tilepipe.pictures.scale import metres
from tilepipe.pictures.view import View, grid_info
from tilepipe.raster.overlap import crs_name
from tilepipe.store.spec import StoreSpec


def map_name(path: str) -> str:
    """What a store is called: its last folder, without its ending.

    >>> map_name("s3://bucket/maps/south.zarr/")
    'south'
    """
    name = os.path.basename(path.rstrip("/"))
    return name.removesuffix(".zarr") or name


def model_names(spec: StoreSpec) -> list[str]:
    """What the models that made the map are called."""
    models = spec.settings.get("models")
    found = [each.get("source") for each in models if isinstance(each, Mapping)] if isinstance(models, list) else []
    return [os.path.basename(str(name)) for name in found if name]


def size_text(shape: Sequence[int]) -> str:
    """Rows and columns.

    >>> size_text((20000, 512))
    '20,000 x 512'
    """
    return f"{shape[0]:,} x {shape[1]:,}"


def pixel_text(spec: StoreSpec, view: View) -> str:
    """How large a pixel of the map is in the middle of a view; empty where that is unknown."""
    rows, cols = view.window.rows, view.window.cols
    width = pixel_width(spec, (rows.start + rows.stop) / 2, (cols.start + cols.stop) / 2)
    return "" if width is None else metres(float(f"{width:.3g}"))


def crs_text(spec: StoreSpec) -> str:
    """What the map's CRS is called; "no CRS" where it has none."""
    return crs_name(grid_info(spec))


def subtitle(spec: StoreSpec, view: View) -> str:
    """The map in a line."""
    width = pixel_text(spec, view)
    found = [f"{size_text(spec.shape)} pixels" + (f" of {width}" if width else ""), crs_text(spec)]
    if view.window.shape != spec.shape:
        found.insert(0, f"{view.window} of")
        found[0:2] = [" ".join(found[0:2])]
    models = model_names(spec)
    if models:
        found.append(f"{'model' if len(models) == 1 else 'models'} {' + '.join(models)}")
    return "  ·  ".join(found)


def metadata(spec: StoreSpec, view: View, image_name: str) -> list[tuple[str, str]]:
    """(what, value) of all that is known of a map."""
    width = pixel_text(spec, view)
    found: list[tuple[str, str]] = [
        ("Size", f"{size_text(spec.shape)} pixels" + (f", {width} each" if width else "")),
        ("Coordinate reference system", crs_text(spec)),
    ]
    if view.window.shape != spec.shape:
        found.append(("Shown", str(view.window)))
    raster = image_name or os.path.basename(str(spec.settings.get("raster", "")).rstrip("/"))
    if raster:
        found.append(("Raster", raster))
    names = model_names(spec)
    if names:
        found.append(("Model" if len(names) == 1 else "Models", ", ".join(names)))
    found += _cards(spec.settings)
    return found


def _cards(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    models = settings.get("models")
    cards = [each.get("card") or {} for each in models] if isinstance(models, list) else []
    found = []
    for what, key in (("Architecture", "architecture"), ("Licence of the model", "licence")):
        values = [str(card[key]) for card in cards if card.get(key)]
        if values:
            found.append((what, ", ".join(dict.fromkeys(values))))
    plans = settings.get("plans")
    if isinstance(plans, list) and plans and "stitch" in plans[0]:
        found.append(("Stitching", str(plans[0]["stitch"])))
    return found
