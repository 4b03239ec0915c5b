"""Whole-process time and memory of `tilepipe segment`, beside a command of your own in turns with it.

    python tests/benchmarks/whole_process.py BIG.tif [--against 'COMMAND with {input}, {output} and {network}']
    python tests/benchmarks/whole_process.py BIG.tif --network segnet-quarter --tile 1408 --against '...'

The network is near-free by default (one 1x1 convolution, 3 bands to 12 classes), so that everything around it is
measured: start-up, reading, normalising, best class, writing. {network} is the same network as an exported program for
one tile, raw values of shape (1, 3, tile, tile) to scores. Both commands run in alternation, so that they meet the
same state of the machine; the first run of each fills caches and does not count.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import BANDS, NETWORKS, Timed, model_file, network, timed


def exported(path: Path, name: str, tile: int) -> Path:
    """The network as an exported program for tiles of this size."""
    pixels = torch.zeros(1, BANDS, tile, tile)
    torch.export.save(torch.export.export(network(name), (pixels,)), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="near-free")
    parser.add_argument("--tile", type=int, help="tilepipe's tile; it chooses by default")
    parser.add_argument("--against", help="another command")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path(args.input).resolve().parent) as place:
        folder = Path(place)
        model, ours, theirs = (
            model_file(folder / "model.safetensors", args.network),
            folder / "out.zarr",
            folder / "other.tif",
        )
        segment = [sys.executable, "-m", "tilepipe", "segment", args.input, str(ours), "--model", str(model)]
        segment += ["-q", "--no-overviews"]
        commands = {"tilepipe": segment + ([] if args.tile is None else ["--tile", str(args.tile)])}
        if args.against:
            program = folder / "network.pt2"
            if "{network}" in args.against:
                exported(program, args.network, args.tile or 1024)
            commands["other"] = shlex.split(args.against.format(input=args.input, output=theirs, network=program))
        results: dict[str, list[Timed]] = {name: [] for name in commands}
        for number in range(args.runs + 1):
            for name, command in commands.items():
                shutil.rmtree(ours, ignore_errors=True)
                theirs.unlink(missing_ok=True)
                result = timed(command)
                if number:
                    results[name].append(result)
    for name, rows in results.items():
        wall, processor, peak = (statistics.median(each) for each in list(zip(*rows, strict=True))[:3])
        figures = f"wall {wall:6.2f} s   processor {processor:6.2f} s   peak {peak:6.0f} MiB"
        print(f"{name:10} {figures}   (median of {len(rows)})")
    if args.against:
        ratios = [a.wall / b.wall for a, b in zip(results["tilepipe"], results["other"], strict=True)]
        print(f"tilepipe / other, wall: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
