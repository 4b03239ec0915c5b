"""LeNet on every window of an image: by dilation, by shift-and-stitch, and window by window, in one run.

    python tests/benchmarks/dense.py [--side 192] [--runs 5] [--threads 1] [--precision float32]

All three get the same image and are prepared as a job prepares them; the rounds alternate, so that all meet the same
state of the machine. Their largest deviation from each other is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tilepipe.models import build
from tilepipe.predict.prepare import DTYPES, prepare, use_large_pages
from tilepipe.variants.dense import dilated, shift_and_stitch

WINDOW = 28


def brute_force(network: nn.Module, image: Tensor, batch: int) -> Tensor:
    """The scores (1, classes, rows, columns) of every window of an image, each cut out, `batch` of them at a time."""
    windows = image.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1)[0].movedim(0, 2)
    rows, cols = windows.shape[:2]
    flat = [(row, start) for row in range(rows) for start in range(0, cols, batch)]
    scores = [network(windows[row, start : start + batch].contiguous()) for row, start in flat]
    return torch.cat(scores).reshape(rows, cols, -1).permute(2, 0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=192, help="pixels of the image's sides")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256, help="windows that pass together, window by window")
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    args = parser.parse_args()
    use_large_pages()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network, image = build("lenet"), torch.randn(1, 1, args.side, args.side)
    each = prepare(network, args.precision)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "dilation": prepare(dilated(network), args.precision),
        "shift-and-stitch": prepare(shift_and_stitch(network), args.precision),
        "window by window": lambda pixels: brute_force(each, pixels, args.batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, Tensor] = {}
    with torch.inference_mode():
        for number in range(args.runs + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                scores[name] = way(image)
                if number:  # the first round allocates, and chooses kernels
                    seconds[name].append(time.perf_counter() - started)
    outputs = (args.side - WINDOW + 1) ** 2 / 1e6
    slowest = statistics.median(seconds["window by window"])
    exact = scores["window by window"].double()
    scale = float(exact.abs().max())
    print(f"LeNet, {args.side} x {args.side} pixels, {args.precision}, {args.threads} threads, median of {args.runs}")
    for name, rows in seconds.items():
        median, off = statistics.median(rows), float((scores[name].double() - exact).abs().max()) / scale
        print(f"{name:17} {outputs / median:8.4f} Mpx/s   {slowest / median:6.2f} times   deviation {off:.1e}")


if __name__ == "__main__":
    main()
