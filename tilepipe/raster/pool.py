"""A pool of GDAL's datasets: each is lent to one thread at a time, since they are not safe among threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rasterio.env import set_gdal_config
from rasterio.vrt import WarpedVRT

from tilepipe.raster.dataset import Warp, open_dataset

IDLE = 64
"""The most datasets that are kept open without being read."""

Key = tuple[str, Warp | None]


class DatasetPool:
    """Opens datasets as they are asked for, and keeps them for whoever asks next.

    That is the one that was read last, if it is not being read: its decoded blocks are in GDAL's cache, which keeps
    those of each dataset apart, and windows that follow each other share blocks.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._cache_bytes = cache_bytes
        """Of GDAL's cache, which is one for the whole process."""
        self._lock = threading.Lock()
        self._idle: OrderedDict[Key, list[Any]] = OrderedDict()
        self._generation = 0

    @contextmanager
    def open(self, target: str, warp: Warp | None = None) -> Iterator[Any]:
        """A dataset that no other thread has meanwhile; it is closed, and not kept, where something is raised."""
        key = target, warp
        with self._lock:
            generation, idle = self._generation, self._idle.get(key, [])
            dataset = idle.pop() if idle else None
        if dataset is None:
            set_gdal_config("GDAL_CACHEMAX", self._cache_bytes)
            dataset = open_dataset(target, warp)
        try:
            yield dataset
        except BaseException:
            _close(dataset)
            raise
        for unwanted in self._keep(key, dataset, generation):
            _close(unwanted)

    def close(self) -> None:
        """Close what is not lent, and the rest when it comes back."""
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, OrderedDict()
        for datasets in idle.values():
            for dataset in datasets:
                _close(dataset)

    def _keep(self, key: Key, dataset: Any, generation: int) -> list[Any]:
        """What has to be closed, now that a dataset came back."""
        with self._lock:
            if generation != self._generation:
                return [dataset]
            self._idle.setdefault(key, []).append(dataset)
            self._idle.move_to_end(key)
            if sum(map(len, self._idle.values())) <= IDLE:
                return []
            return self._idle.popitem(last=False)[1]


def _close(dataset: Any) -> None:
    dataset.close()
    if isinstance(dataset, WarpedVRT):
        dataset.src_dataset.close()
