"""Keep the label map of a mosaic up to date, where some of its images are replaced now and then.

    gdalbuildvrt -te XMIN YMIN XMAX YMAX mosaic.vrt images/*.tif     # the whole area, also where no image is yet
    python workflows/incremental.py mosaic.vrt maps --sheet 8192 --model my.safetensors --tile 1408

The map is kept in sheets, stores of their own under maps/. A sheet's labels follow from the pixels that its tiles
read, the margin beyond its edges included, and from nothing else. So each sheet gets a virtual raster of its own: the
whole mosaic's grid, but only the images that these tiles read. `tilepipe batch` compares what it knows of these
images (path, size, time of change) with what each store was made from: sheets of which no image changed stay, others
are made anew, interrupted ones go on. The sheets together are, pixel by pixel, what one run over the whole mosaic
would give; a change of model or options makes all of them anew.

Two things to mind. The mosaic's extent must stay (-te above): tiles count from its corner. And --tile must be given,
or else each run would choose the tile that suits the memory that is free at the time.

    xarray.open_mfdataset("maps/*.zarr", engine="zarr", consolidated=False)      # the whole map, lazily
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import reduce
from pathlib import Path
from subprocess import run
from xml.etree import ElementTree

import tilepipe
from tilepipe.window import Window


def sheets(shape: tuple[int, int], side: int) -> dict[str, Window]:
    """The sheets by name: squares from the mosaic's corner, cut short at its end."""
    whole = Window.whole(shape)
    return {
        f"r{top // side:03}c{left // side:03}": Window.of(top, top + side, left, left + side).intersect(whole)
        for top in range(0, shape[0], side)
        for left in range(0, shape[1], side)
    }


def only_near(mosaic: Path, window: Window) -> tuple[str, int]:
    """The mosaic's XML with the images alone that touch the window, and how many these are."""
    tree = ElementTree.parse(mosaic).getroot()
    near = set()
    for band in [*tree.iter("VRTRasterBand")]:
        for source in [child for child in band if child.tag.endswith("Source")]:
            place = source.find("DstRect")
            if place is None:
                raise SystemExit(f"{mosaic}: a source without DstRect; build the mosaic with gdalbuildvrt")
            left, top, width, height = (float(place.attrib[name]) for name in ("xOff", "yOff", "xSize", "ySize"))
            rows, cols = window.rows, window.cols
            if top < rows.stop and top + height > rows.start and left < cols.stop and left + width > cols.start:
                near.add(absolute(source.find("SourceFilename"), mosaic.parent))
            else:
                band.remove(source)
    return ElementTree.tostring(tree, encoding="unicode"), len(near)


def absolute(name: ElementTree.Element, folder: Path) -> str:
    """The path of an image, which the element names from now on without regard to the mosaic's folder."""
    if name.get("relativeToVRT") == "1":
        name.set("relativeToVRT", "0")
        name.text = str((folder / str(name.text)).absolute())
    return str(name.text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("mosaic", type=Path, help="a VRT, as gdalbuildvrt makes it")
    parser.add_argument("maps", type=Path, help="the folder of the sheets")
    parser.add_argument("--sheet", type=int, default=8192, help="sides of a sheet, in pixels")
    parser.add_argument("--model", help="a model file; the bundled one that fits, if none is given")
    parser.add_argument("--tile", type=int, required=True, help="sides of a tile, in pixels; `tilepipe plan` proposes")
    # All that is not known here is for `tilepipe batch`: --confidence, --gpus all, --shard 1/8 ...
    options, more = parser.parse_known_args(arguments)
    job = tilepipe.prepare(options.mosaic, options.model, tilepipe.SegmentOptions(tile=(options.tile, options.tile)))

    options.maps.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, sheet in sheets(job.source.info.shape, options.sheet).items():
        read = reduce(Window.hull, (plan.hull(sheet) for plan in job.plans))
        text, images = only_near(options.mosaic, read)
        path = options.maps / f"{name}.vrt"
        if images == 0:
            continue
        # A file that says the same keeps its time of change, by which it is known.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        region = f"{sheet.rows.start}:{sheet.rows.stop},{sheet.cols.start}:{sheet.cols.stop}"
        rows.append({"input": path.name, "output": f"{name}.zarr", "region": region})
    manifest = options.maps / "sheets.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    command = [sys.executable, "-m", "tilepipe", "batch", str(manifest), "--overwrite", "--tile", str(options.tile)]
    model = [] if options.model is None else ["--model", options.model]
    return run([*command, *model, *more], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
