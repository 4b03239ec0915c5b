"""The command on a CUDA device against the CPU: the same plan, the same labels but for the last bits of float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import scene, write_raster

from tilepipe.errors import RunError
from tilepipe.options import SegmentOptions
from tilepipe.pipeline import predict_raster, segment_raster
from tilepipe.scene.synthetic import write_scene
from tilepipe.store.output import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MODEL = "synthetic-landcover"


def labels_of(raster: Path, output: Path, options: SegmentOptions) -> np.ndarray:
    segment_raster(raster, output, MODEL, options)
    return open_store(output).array()[:]


@pytest.mark.parametrize("stitch", ["exact", "blend"])
def test_float32_labels_agree_with_the_cpu(tmp_path: Path, stitch: str) -> None:
    raster, _ = write_scene(tmp_path, (1200, 1300), seed=5)
    base = SegmentOptions(stitch=stitch, tile=(640, 640), precision="float32", block=(512, 512))  # type: ignore[arg-type]
    cpu = labels_of(raster, tmp_path / "cpu.zarr", replace(base, device="cpu"))
    cuda = labels_of(raster, tmp_path / "cuda.zarr", replace(base, device="cuda"))
    assert (cpu == cuda).mean() >= 0.999
    again = labels_of(raster, tmp_path / "again.zarr", replace(base, device="cuda", block=(700, 400)))
    assert (again == cuda).all(), "the block size changed labels"


def test_bf16_agrees_with_float32_on_a_trained_network(tmp_path: Path) -> None:
    raster, _ = write_scene(tmp_path, (1200, 1300), seed=6)
    exact = labels_of(raster, tmp_path / "f.zarr", SegmentOptions(precision="float32", device="cuda"))
    quick = labels_of(raster, tmp_path / "b.zarr", SegmentOptions(precision="bf16", device="cuda"))
    assert (exact == quick).mean() >= 0.98


def test_confidence_and_nodata_come_back(tmp_path: Path) -> None:
    values = scene((700, 800))
    values[:, 100:200, 300:500] = 0
    raster = write_raster(tmp_path / "in.tif", values, nodata=0)
    labels = labels_of(raster, tmp_path / "out.zarr", SegmentOptions(device="cuda", confidence=True))
    confidence = open_store(tmp_path / "out.zarr").array("confidence")[:]
    masked = (values == 0).any(0)
    assert ((labels == 255) == masked).all()
    assert ((confidence == 255) == masked).all()


@pytest.mark.parametrize(
    ("more", "least"),
    [
        ({"tta": "flips"}, 0.99999),
        ({"refine": "crf:iterations=3", "tile": None}, 0.999),
        ({"refine": "crf:iterations=3", "stitch": "blend"}, 0.999),
    ],
)
def test_augmented_and_refined_labels_agree_with_the_cpu(tmp_path: Path, more: dict[str, Any], least: float) -> None:
    raster, _ = write_scene(tmp_path, (1200, 1300), seed=5)
    base = SegmentOptions(
        **{"stitch": "exact", "tile": (704, 704), "precision": "float32", "block": (512, 512), **more}
    )
    cpu, cuda = (
        labels_of(raster, tmp_path / f"{device}.zarr", replace(base, device=device)) for device in ("cpu", "cuda")
    )
    assert (cpu == cuda).mean() >= least


@pytest.mark.parametrize("stitch", ["exact", "blend"])
def test_values_and_ensembles_agree_with_the_cpu(tmp_path: Path, stitch: str) -> None:
    raster, _ = write_scene(tmp_path, (900, 1000), seed=6)
    base = SegmentOptions(stitch=stitch, precision="float32", block=(512, 512))  # type: ignore[arg-type]
    values, labels = [], []
    for device in ("cpu", "cuda"):
        options = replace(base, device=device)
        predict_raster(raster, tmp_path / f"{device}-values.zarr", MODEL, options)
        values.append(open_store(tmp_path / f"{device}-values.zarr").array("values")[:])
        segment_raster(raster, tmp_path / f"{device}-labels.zarr", [MODEL, MODEL], replace(options, combine="max"))
        labels.append(open_store(tmp_path / f"{device}-labels.zarr").array()[:])
    scale = np.abs(values[0]).max()
    # Behind max-unpooling a near-tie may fall the other way in another kernel.
    assert (np.abs(values[0] - values[1]) <= 1e-4 * scale).mean() >= 0.99
    assert (labels[0] == labels[1]).mean() >= 0.99999


def test_a_device_that_gives_too_little_ends_the_job_before_anything_is_stored(tmp_path: Path) -> None:
    from tilepipe.checkpoint import load_model
    from tilepipe.predict.predictor import Predictor

    model = load_model(MODEL)
    with Predictor(
        model.network, mean=model.card.mean, std=model.card.std, classes=6, device="cuda", tile=(2048, 2048)
    ) as predictor:
        with pytest.raises(RunError, match="smaller"):
            predictor.settle(64 << 20)
        predictor.settle(torch.cuda.get_device_properties(0).total_memory)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_refinement_agrees_with_the_cpu(dtype: type[np.floating], tolerance: float) -> None:
    from tilepipe.crf.cuda import refine_on
    from tilepipe.crf.parameters import CrfParameters
    from tilepipe.crf.refine import refine
    from tilepipe.predict.cuda_device import CudaDevice

    rng, p = np.random.default_rng(7), CrfParameters(iterations=3, radius=4)
    probabilities = np.ascontiguousarray(rng.dirichlet(np.ones(11), (301, 203)).transpose(2, 0, 1), dtype)
    colors, valid = rng.normal(0, 0.5, (3, 301, 203)).astype(dtype), rng.random((301, 203)) < 0.9
    device = CudaDevice(torch.device("cuda", 0))
    whole = refine_on(device, probabilities, colors, valid, p)
    assert whole.dtype == dtype
    np.testing.assert_allclose(whole, refine(probabilities, colors, valid, p), atol=tolerance)
    part = refine_on(device, probabilities[:, 40:], colors[:, 40:], valid[40:], p)
    np.testing.assert_array_equal(part[:, p.reach :], whole[:, 40 + p.reach :])
