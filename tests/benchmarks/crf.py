"""Speed of refinement on the CPU, one thread, in millions of pixels a second, and what its kernels cost.

    python tests/benchmarks/crf.py [--size 512 1024] [--classes 2 6 21] [--radius 5] [--iterations 5] [--runs 3]

Times are the process's own, so that other work on the machine disturbs them less. "kernels" is one step's share for
the appearance kernel, which is computed once and kept for all steps; "anew" is what all would take if each step
computed it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from tilepipe.crf.parameters import CrfParameters
from tilepipe.crf.refine import refine, working_bytes


def seconds(classes: int, shape: tuple[int, int], parameters: CrfParameters, runs: int, bands: int = 3) -> float:
    """The best of `runs` refinements in float32."""
    rng = np.random.default_rng(0)
    probabilities = rng.random((classes, *shape), np.float32) + np.float32(0.1)
    probabilities /= probabilities.sum(axis=0)
    colors = rng.normal(0, 0.5, (bands, *shape)).astype(np.float32)
    refine(probabilities[:, :8], colors[:, :8], None, parameters)
    taken = []
    for _ in range(runs):
        started = time.process_time()
        refine(probabilities, colors, None, parameters)
        taken.append(time.process_time() - started)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 6, 21])
    parser.add_argument("--radius", type=int, default=CrfParameters().radius)
    parser.add_argument("--iterations", type=int, default=CrfParameters().iterations)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    shape = tuple(args.size)
    asked = CrfParameters(radius=args.radius, iterations=args.iterations)
    pixels = shape[0] * shape[1] / 1e6
    print(f"{shape[0]} x {shape[1]}, radius {asked.radius}, {asked.iterations} iterations, reach {asked.reach}")
    for classes in args.classes:
        whole = seconds(classes, shape, asked, args.runs)
        once = seconds(classes, shape, replace(asked, iterations=1), args.runs)
        twice = seconds(classes, shape, replace(asked, iterations=2), args.runs)
        kernels = max(0.0, 2 * once - twice)
        anew = whole + kernels * (asked.iterations - 1)
        print(
            f"{classes:3} classes {pixels / whole:6.2f} Mpx/s   kernels {kernels / whole:4.0%}   "
            f"anew {pixels / anew:6.2f} Mpx/s   memory {working_bytes(classes, shape[1], 4, asked) / 2**20:5.1f} MiB"
        )


if __name__ == "__main__":
    main()
