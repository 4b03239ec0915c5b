"""The command on a CUDA device against the CPU: the same plan, the same labels but for the last bits of float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import scene, write_raster

from tilepipe.batch import Scene, segment_batch
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


def test_a_network_serves_the_next_scene_and_leaves_no_trace_in_its_map(tmp_path: Path) -> None:
    """Also where the next scene wants another tile, or another precision, and the device has to be freed first."""
    raster, _ = write_scene(tmp_path, (1200, 1300), seed=7)
    options = [
        SegmentOptions(device="cuda", tile=tile, block=(512, 512), precision=precision)  # type: ignore[arg-type]
        for tile, precision in [((640, 640), None), ((640, 640), None), ((704, 704), None), ((640, 640), "float32")]
    ]
    scenes = [Scene((str(raster),), str(tmp_path / f"{n}.zarr"), MODEL, each) for n, each in enumerate(options)]
    done = segment_batch(scenes)
    assert done.count("done") == len(scenes), [each.reason for each in done.results]
    for n, each in enumerate(options):
        assert (open_store(scenes[n].output).array()[:] == labels_of(raster, tmp_path / f"alone{n}.zarr", each)).all()


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


def checks() -> list[Any]:
    triton = pytest.importorskip("triton")
    assert triton
    import network_checks
    import triton_checks

    return [*triton_checks.CHECKS, *network_checks.CHECKS]


@pytest.mark.parametrize("number", range(11))
def test_kernels_have_the_bits_of_torchs_operators(number: int) -> None:
    check = checks()[number]
    check("cuda")


def block_of(values: str | None, side: int = 256) -> Any:
    """Noise, some of it masked, in 2 x 2 tiles whose cores lie in their corners."""
    from tilepipe.predict.maps import BlockJob, Wanted
    from tilepipe.window import Placement, Window

    rng, core, places = np.random.default_rng(3), side // 2, []
    for row in (0, core):
        for col in (0, core):
            part = Window.of(row, row + core, col, col + core)
            places.append(Placement(Window.of(0, side, 0, side).shift(row, col), part, part, part))
    pixels = rng.integers(0, 256, (3, side + core, side + core)).astype(np.uint8)
    wanted: Any = Wanted(confidence=values is None, values=values)  # type: ignore[arg-type]
    return BlockJob(pixels, rng.random(pixels.shape[1:]) < 0.9, None, places, (side, side), wanted)


def engine_of(name: str, precision: str, steps: Any, side: int = 256) -> Any:
    from tilepipe.models import build
    from tilepipe.predict.cuda import CudaEngine
    from tilepipe.predict.cuda_device import CudaDevice
    from tilepipe.predict.prepare import prepare
    from tilepipe.predict.scores import statistics_of

    torch.manual_seed(0)
    network = build(name, classes=5, bands=3, width=0.25).eval()
    statistics, device = statistics_of([90.0] * 3, [50.0] * 3, precision), CudaDevice(torch.device("cuda", 0))
    return CudaEngine(prepare(network, precision, "cuda", steps), statistics, 5, (side, side), device, steps)


@pytest.mark.parametrize("name", ["segnet", "segnet-basic", "segnet-basic-encoder-addition"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_steps_leave_the_scores_as_they_are(name: str, precision: str) -> None:
    """Kernels of ours, upload and graphs, against the network as torch runs it on the device, bit for bit."""
    from tilepipe.predict.cuda_steps import NONE, CudaSteps

    found, job = [], block_of("float32")
    for steps in (NONE, CudaSteps(), CudaSteps(graph_pixels=0)):
        engine = engine_of(name, precision, steps)
        found += [engine.exact(job).values for _ in range(3)]
        assert len(engine.passes._captured) == (4 if steps == CudaSteps() else 0)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bf16", 0.98)])
def test_labels_without_scores_agree_with_those_from_scores(precision: str, least: float) -> None:
    from tilepipe.predict.cuda_steps import CudaSteps

    job = block_of(None)
    scored, direct = (engine_of("segnet", precision, CudaSteps(classifier=on)).exact(job) for on in (False, True))
    assert (scored.labels == direct.labels).mean() >= least
    same = scored.labels == direct.labels
    assert np.abs(scored.confidence.astype(int) - direct.confidence.astype(int))[same].max() <= (
        1 if precision == "float32" else 8
    )


def test_a_network_that_waits_for_the_device_runs_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    from tilepipe.predict.predictor import Predictor
    from tilepipe.window import Placement, Window

    class Waiting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum().item() > -1e9 else x

    whole = Window.of(0, 64, 0, 64)
    with Predictor(Waiting(), mean=[0] * 3, std=[1] * 3, classes=4, device="cuda", tile=(64, 64)) as predictor:
        predictor.warm_up()
        assert "not captured as a CUDA graph" in caplog.text
        values = np.random.default_rng(0).integers(0, 255, (3, 64, 64)).astype(np.uint8)
        maps = [predictor.exact(values, None, [Placement(whole, whole, whole)], (64, 64)).labels for _ in range(3)]
        assert all((each == maps[0]).all() for each in maps)
        before = torch.cuda.memory_reserved()
        for _ in range(50):
            predictor.exact(values, None, [Placement(whole, whole, whole)], (64, 64))
        assert torch.cuda.memory_reserved() <= before + (1 << 22), "a failed capture keeps memory"
