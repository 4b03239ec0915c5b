"""One huge raster on many nodes of a SLURM cluster: dask-jobqueue asks SLURM for workers, tilepipe uses them.

    pip install 'tilepipe[gpu]' dask-jobqueue
    python workflows/slurm_dask.py scene.tif maps/scene.zarr --nodes 8 --model my.safetensors

Run it where jobs are submitted, or as a small job of its own: it holds the scheduler and no pixel. Blocks are handed
out as soon as the first worker is there, more as more come, and those of a worker that SLURM takes away are done by
others. Input and output must have the same path on all nodes, or be in a bucket (s3://...). Stopping this program
ends the workers' jobs; the same command resumes.

What follows is for you to change: queue, account, memory, how the environment is set up.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import tilepipe

NODE: dict[str, Any] = {
    "queue": "gpu",
    "cores": 3,  # threads, which are blocks in flight: on a GPU one is computed, one read and one written
    "processes": 1,
    "memory": "48GB",  # what `tilepipe plan` projects for one process, and a reserve
    "walltime": "04:00:00",
    "job_cpu": 8,  # cores that SLURM reserves for it
    "job_extra_directives": ["--gres=gpu:1"],
    "job_script_prologue": ["source $HOME/tilepipe/bin/activate"],
    # Workers leave before SLURM ends them at their walltime, and others are asked for.
    "worker_extra_args": ["--lifetime", "230m", "--lifetime-stagger", "5m"],
    # "interface": "ib0",  # where nodes reach the scheduler by another network than this machine's first
}
"""One worker, which is one job of SLURM."""


def make_cluster(nodes: int) -> Any:
    """A dask cluster whose workers are jobs of SLURM."""
    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(**NODE)
    print(cluster.job_script(), file=sys.stderr)
    # Not `scale`: jobs that end are to be replaced.
    cluster.adapt(minimum_jobs=nodes, maximum_jobs=nodes)
    return cluster


def main(arguments: list[str] | None = None) -> tilepipe.Summary:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--model", help="a model file; the bundled one that fits, if none is given")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--device", default="cuda", help="of the workers; this machine need not have one")
    options = parser.parse_args(arguments)
    with make_cluster(options.nodes) as cluster:
        settings = tilepipe.SegmentOptions(
            scheduler=cluster.scheduler_address,
            device=options.device,
            # This machine may be another one than the workers': what they have is said, not measured here.
            memory=40 << 30,
            device_memory=None if options.device == "cpu" else 70 << 30,
            threads=3 if options.device == "cpu" else None,
        )
        return tilepipe.segment_raster(options.input, options.output, options.model, settings, progress=tell)


def tell(state: Any) -> None:
    """One line now and then."""
    if state.done % 100 == 0 or state.done == state.total:
        print(f"{state.done} of {state.total} blocks, {state.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    done = main()
    print(f"{done.output}: {done.pixels / 1e6:.0f} Mpx at {done.rate:.1f} Mpx/s")
