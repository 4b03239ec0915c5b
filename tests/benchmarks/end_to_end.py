"""A job from file to store beside its network alone, in turns: how much of the job's time the network accounts for.

    python tests/benchmarks/end_to_end.py [--network segnet-quarter] [--tile 1408] [--size 8192] [--turns 5]

In each turn the bare network passes tiles of noise for --seconds before the job and after it, in the same process
with the same threads; then the share is the time that the job's tiles, halo included, would take at that rate, in
relation to the job's. The raster is made for the purpose, and kept in the folder with the model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import NETWORKS, make_raster, model_file

from tilepipe.allocator import worker_environment
from tilepipe.bench import network
from tilepipe.bench.report import ForwardFigure
from tilepipe.bench.whole import Place, whole
from tilepipe.job import prepare
from tilepipe.options import SegmentOptions
from tilepipe.predict.prepare import prepare as prepare_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="segnet-quarter")
    parser.add_argument("--tile", type=int, default=1408)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the bare network, before and after a job")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    args = parser.parse_args()
    if settings := worker_environment():  # as the commands start themselves
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings})
    args.folder.mkdir(parents=True, exist_ok=True)
    raster = make_raster(args.folder / f"noise{args.size}.tif", args.size)
    model = model_file(args.folder / f"{args.network}.safetensors", args.network)
    job = prepare([raster], [model], SegmentOptions(tile=(args.tile, args.tile), device="cpu", overviews=False))

    def alone() -> ForwardFigure:
        networks = [prepare_network(member.network, job.precision, torch.device("cpu")) for member in job.members]
        how = network.Pass(job.resources.threads, products=1.0)
        return network.forward(job, networks, torch.device("cpu"), args.seconds, how)

    shares = []
    for _ in range(args.turns):
        with TemporaryDirectory(dir=args.folder) as folder:
            found = whole([raster], job, alone, Place(torch.device("cpu"), Path(folder)), args.size**2)
        shares.append(found.busy)
        print(
            f"job {found.rate:.3f} Mpx/s of the raster, {found.seconds:.1f} s; network {found.network_rate:.3f} Mpx/s "
            f"of tiles; share {100 * found.busy:.1f} %",
            flush=True,
        )
    print(f"median share {100 * statistics.median(shares):.1f} %, {100 * min(shares):.1f} to {100 * max(shares):.1f} %")


if __name__ == "__main__":
    main()
