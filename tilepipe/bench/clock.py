"""How much is done per second: the same work again and again, by several threads at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

from tilepipe.predict.prepare import use_one_thread


@dataclass(frozen=True, slots=True)
class Rate:
    """What `sustained` found."""

    amount: float
    """Units of work per second, of all threads together."""
    seconds: float
    """What one call took in its thread, while all threads worked."""


def _nothing() -> None:
    pass


def sustained(
    work: Callable[[int], float],
    seconds: float,
    threads: int = 1,
    settle: Callable[[], None] = _nothing,
    enough: float = math.inf,
) -> Rate:
    """The rate of `work`, which is given its thread's number and returns how much it did, over about `seconds`.

    Each thread calls it again and again, with one torch thread of its own. The first call of each is left out,
    since it fills caches; where it alone took `enough` seconds, it counts, and is the only one. `settle` waits for
    what the calls have queued. An error in a thread is raised.
    """
    gate = Barrier(threads)

    def repeat(number: int) -> tuple[float, float, int]:
        gate.wait()
        started = time.perf_counter()
        amount = work(number)
        settle()
        spent = time.perf_counter() - started
        if spent >= enough:
            return amount, spent, 1
        started, amount, calls = time.perf_counter(), 0.0, 0
        while calls == 0 or time.perf_counter() - started < seconds:
            amount += work(number)
            calls += 1
        settle()
        return amount, time.perf_counter() - started, calls

    with ThreadPoolExecutor(threads, "tilepipe-bench", use_one_thread) as pool:
        found = [future.result() for future in [pool.submit(repeat, number) for number in range(threads)]]
    rate = sum(amount / spent for amount, spent, _ in found)
    return Rate(rate, sum(spent for _, spent, _ in found) / sum(calls for _, _, calls in found))
