"""Labels in bf16 against float32, and whole jobs on a device; parts of gpu.py."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import save_random
from gpu import Report, Scale
from gpu_network import CLASSES, PRODUCT, segnet

from tilepipe.bench import network as bare
from tilepipe.bench.report import ForwardFigure
from tilepipe.bench.whole import Place
from tilepipe.bench.whole import whole as run_whole
from tilepipe.checkpoint import load_model
from tilepipe.job import Job, prepare
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import segment_raster
from tilepipe.predict.cuda_steps import CudaSteps
from tilepipe.predict.predictor import Predictor
from tilepipe.predict.prepare import prepare as prepare_network
from tilepipe.scene.synthetic import synthetic_scene, write_scene
from tilepipe.window import Placement, Window

WANTED = {"agreement": 0.98, "end_to_end": 0.95, "busy": 0.95, "seconds": 45.0}
"""What has to be reached, printed beside what is."""


def agreement(scale: Scale, report: Report, folder: Path) -> None:
    """The share of pixels that both precisions give the same label, per bundled network, on an unseen scene."""
    shape = (scale.scene, scale.scene)
    scene = synthetic_scene(shape, seed=90_001)
    for name in ("synthetic-landcover", "buildings"):
        model, labels = load_model(name), {}
        for precision in ("float32", "bf16"):
            whole = Window.whole(shape)
            with Predictor(
                model.network,
                mean=model.card.mean,
                std=model.card.std,
                classes=len(model.card.classes),
                tile=shape,
                device=str(scale.device),
                precision=precision,
            ) as predictor:
                labels[precision] = predictor.exact(scene.image, None, [Placement(whole, whole, whole)], shape).labels
        same = float(np.mean(labels["float32"] == labels["bf16"]))
        report.add("agreement", name, same=same, wanted=WANTED["agreement"])


def whole(scale: Scale, report: Report, folder: Path) -> None:
    """End to end against the bare pass of the same network in the same plan, and memory against the projection."""
    raster, model = mosaic(scale, folder), a_model(scale, folder)
    options = options_for(scale, scale.whole)
    job = prepare(raster, model, options)
    forward = bare_pass(job, scale, report)
    report.add("whole", "bare pass, halos paid for", mpxs=forward.rate, tile=float(job.plan.tile[0]))
    gc.collect()
    done = run_whole([raster], job, forward, Place(scale.device, folder), scale.whole**2)
    report.add("whole", "end to end", mpxs=done.rate, of_bare=done.rate / forward.rate, wanted=WANTED["end_to_end"])
    report.add("whole", "device busy", share=done.busy, wanted=WANTED["busy"])
    if scale.cuda:
        peak, planned = done.device_bytes / 2**30, done.projected_device_bytes / 2**30
        report.add("whole", "device memory", gib=peak, projected_gib=planned)
    report.add("whole", "host memory", gib=done.host_bytes / 2**30, projected_gib=done.projected_host_bytes / 2**30)


def gigapixels(scale: Scale, report: Report, folder: Path) -> None:
    """The whole mosaic, after a small part of it has filled the caches of compilers."""
    raster, model = mosaic(scale, folder), a_model(scale, folder)
    side = min(scale.side, 2 * scale.core)
    segment_raster(raster, folder / "warm.zarr", model, options_for(scale, side))
    done = segment_raster(raster, folder / "all.zarr", model, options_for(scale, None))
    report.add(
        "gigapixels",
        f"{scale.side:,} x {scale.side:,}",
        seconds=done.seconds,
        wanted=WANTED["seconds"],
        start_seconds=done.start_seconds,
        mpxs=done.rate,
        blocks=float(done.blocks),
    )


def bare_pass(job: Job, scale: Scale, report: Report) -> ForwardFigure:
    """The job's network on noise, in its plan."""
    steps = CudaSteps.on(scale.device.type)
    networks = [prepare_network(member.network, job.precision, scale.device, steps) for member in job.members]
    product = report.get("product", "bf16 matrix product", "tflops", PRODUCT)
    return bare.forward(job, networks, scale.device, scale.seconds, bare.Pass(1, product))


def options_for(scale: Scale, side: int | None) -> SegmentOptions:
    """A job of that many rows and columns at the mosaic's corner; all of it for None."""
    region = None if side is None else f"0:{side},0:{side}"
    options = SegmentOptions(device=scale.device.type, stitch="exact", region=region, overwrite=True)
    if scale.cuda:
        return options
    return replace(options, threads=1, stitch="blend", tile=(96, 96), block=(256, 256))


def a_model(scale: Scale, folder: Path) -> Path:
    """A model file of SegNet with random weights."""
    arguments = {"classes": CLASSES, "bands": 3, "width": scale.width}
    return save_random(folder / "segnet.safetensors", segnet(scale), "segnet", arguments, (110.0, 50.0))


def mosaic(scale: Scale, folder: Path) -> Path:
    """A VRT that repeats several compressed scenes, so that every block of it is really decoded.

    Together they are larger than GDAL's cache of a job.
    """
    path = folder / "mosaic.vrt"
    if path.exists():
        return path
    files = [write_scene(folder / f"scene{n}", (scale.scene,) * 2, 100 + n, threads=8)[0] for n in range(scale.scenes)]
    bands = "".join(_band(number, files, scale) for number in (1, 2, 3))
    place = "500000.0, 0.3, 0.0, 5800000.0, 0.0, -0.3"
    path.write_text(
        f'<VRTDataset rasterXSize="{scale.side}" rasterYSize="{scale.side}"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
    )
    return path


def _band(number: int, files: list[Path], scale: Scale) -> str:
    colour = ("Red", "Green", "Blue")[number - 1]
    size = scale.scene
    sources = []
    for row in range(0, scale.side, size):
        for col in range(0, scale.side, size):
            file = files[(row // size * 7 + col // size) % len(files)]
            high, wide = min(size, scale.side - row), min(size, scale.side - col)
            sources.append(
                f'<SimpleSource><SourceFilename relativeToVRT="0">{file}</SourceFilename><SourceBand>{number}'
                f'</SourceBand><SrcRect xOff="0" yOff="0" xSize="{wide}" ySize="{high}"/>'
                f'<DstRect xOff="{col}" yOff="{row}" xSize="{wide}" ySize="{high}"/></SimpleSource>'
            )
    interpreted = f"<ColorInterp>{colour}</ColorInterp>"
    return f'<VRTRasterBand dataType="Byte" band="{number}">{interpreted}{"".join(sources)}</VRTRasterBand>'
