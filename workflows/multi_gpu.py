"""One raster on all GPUs of one node.

Usually one line is enough, with or without dask-cuda: a process for each GPU, which sees that GPU alone.

    tilepipe segment scene.tif maps/scene.zarr --gpus all

This script is for those who want dask-cuda's own settings (CPU affinity, InfiniBand, RMM), or the cluster for other
work, too:

    pip install 'tilepipe[gpu,dask-cuda]'
    python workflows/multi_gpu.py scene.tif maps/scene.zarr [my.safetensors]
"""

from __future__ import annotations

import sys
from typing import Any

import tilepipe


def make_cluster() -> Any:
    """One worker process for each GPU of this machine."""
    from dask_cuda import LocalCUDACluster

    return LocalCUDACluster(
        threads_per_worker=3,  # blocks in flight: one is computed, one read, one written
        memory_limit=0,  # tilepipe's plan bounds the memory; dask would only pause and spill
        dashboard_address=None,
        # rmm_pool_size=...: leave it out, torch has an allocator of its own
    )


def main(words: list[str], device: str = "cuda") -> tilepipe.Summary:
    source, output, *model = words
    with make_cluster() as cluster:
        # Memory of host and device are measured here, where the workers are; each may use its share of the host's.
        share = tilepipe.SegmentOptions(
            scheduler=cluster.scheduler_address, device=device, workers=len(cluster.workers)
        )
        return tilepipe.segment_raster(source, output, model[0] if model else None, share)


if __name__ == "__main__":
    done = main(sys.argv[1:])
    print(f"{done.output}: {done.pixels / 1e6:.0f} Mpx at {done.rate:.1f} Mpx/s")
