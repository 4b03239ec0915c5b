"""What the scheduler costs: blocks that only return, through the same bounded map as a job's.

python tests/benchmarks/scheduler.py [--blocks 100000] [--workers 1] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import psutil

from tilepipe.pipeline import WAITING
from tilepipe.schedule import Bounded, Pool, connect, map_bounded, resident


@dataclass(frozen=True)
class Nothing:
    """Builds what the workers hold."""

    def build(self) -> int:
        return 1


def block(held: int, number: int) -> int:
    """What a block's task gives: a small record."""
    return number + held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="blocks in flight in each worker")
    args = parser.parse_args()
    me, marks = psutil.Process(), []
    in_flight = WAITING * args.workers * args.threads
    with (
        connect(Pool(workers=args.workers, threads=args.threads)) as client,
        resident(client, "nothing", Nothing()) as name,
    ):
        started = time.perf_counter()
        for done, _ in enumerate(map_bounded(client, name, block, range(args.blocks), Bounded(in_flight)), 1):
            if done % (args.blocks // 10) == 0:
                seconds, held = time.perf_counter() - started, me.memory_info().rss
                marks.append((done, seconds, held))
                print(f"{done:8} blocks  {seconds / done * 1e3:6.3f} ms a block  {held / 2**20:7.1f} MiB", flush=True)
    # The first tenth fills caches and tables of a fixed size.
    (first, _, before), (last, seconds, after) = marks[0], marks[-1]
    print(f"{seconds / last * 1e3:.3f} ms a block, {(after - before) / (last - first):.0f} bytes a block kept")


if __name__ == "__main__":
    main()
