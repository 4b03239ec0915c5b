"""Random windows as a network learns from them: read, resampled, turned, jittered, normalised; and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tilepipe.errors import RunError, TilepipeError
from tilepipe.training.augment import Jitter, Layers, filled, one_thread, oriented, resampled, rotated, widened
from tilepipe.training.pairs import Pair
from tilepipe.training.statistics import IGNORE, Statistics, target_table, targets_of
from tilepipe.training.windows import Augmentation, Draw, Draws, turned

__all__ = ["IGNORE", "Augmentation", "WindowDataset", "loader", "worker_deaths"]

ATTEMPTS = 5
"""Windows that are drawn for an item, until one shows a labelled pixel; the last is taken in any case."""
PREFETCH = 4
"""Batches that each worker has ready or in the making."""

Item = tuple[Tensor, Tensor]


class WindowDataset(Dataset[Item]):
    """Item k is the window of draw k: (image, labels), the same in every process.

    image: float32 (bands, *crop), (value - mean) / std, 0 where not valid. labels: int64 (*crop), IGNORE (-100)
    where void, not valid, masked, or beyond the raster. A pixel is valid where all are that it is made from.
    Raises ReadError for what cannot be read, InputError for a label beyond the classes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        draws: Draws,
        augmentation: Augmentation,
        statistics: Statistics,
        void: Sequence[int] = (),
    ) -> None:
        self.pairs, self.draws, self.augmentation = tuple(pairs), draws, augmentation
        self._table = target_table(statistics.classes, void)
        self._mean = torch.tensor(statistics.mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(statistics.std, dtype=torch.float32)[:, None, None]
        self._colour = all(pair.bands == 3 and pair.image.info.dtype == "uint8" for pair in pairs)
        self._jitter = Jitter(augmentation.jitter, self._colour)

    def __getitem__(self, index: int) -> Item:
        with one_thread():
            for attempt in range(ATTEMPTS):
                draw = self.draws(index, attempt)
                image, valid, targets = self._shown(draw)
                if bool((targets != IGNORE).any()):
                    break
            image = self._normalised(image, draw.seed)
            if valid is not None:
                image = torch.where(valid, image, 0.0)
            return image.contiguous(), targets.contiguous()

    def _shown(self, draw: Draw) -> Layers:
        """What a draw shows, in the crop's shape, in raw units; targets are IGNORE where not valid."""
        pair = self.pairs[draw.pair]
        shape = turned(self.augmentation.crop, draw.turns)
        window, wide = widened(draw.window, shape, draw.angle)
        values, valid, labels = pair.read(window)
        targets = torch.from_numpy(targets_of(pair, window, labels, self._table))
        layers = resampled(Layers(*filled(values, valid, self._mean), targets), wide)
        layers = oriented(rotated(layers, shape, draw.angle), draw.turns, draw.mirrored)
        if layers.valid is None:
            return layers
        return layers._replace(targets=torch.where(layers.valid, layers.targets, IGNORE))

    def _normalised(self, image: Tensor, seed: int) -> Tensor:
        """The image as the network gets it, jittered: of colours as such, of other bands once they are normalised."""
        if self._colour:
            image = self._jitter(image / 255, seed) * 255
            return (image - self._mean) / self._std
        return self._jitter((image - self._mean) / self._std, seed)


class _Caught(Dataset[Item | TilepipeError]):
    """The items, and as values the errors that some raise: a worker's way to hand them over whole."""

    def __init__(self, dataset: WindowDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Item | TilepipeError:
        try:
            return self.dataset[index]
        except TilepipeError as error:
            return type(error)(*error.args)  # without its cause, which may not survive the way between processes


def loader(dataset: WindowDataset, items: Sequence[int], batch: int, workers: int) -> Iterator[Item]:
    """Batches (images (N, bands, h, w), labels (N, h, w)) of these items, in order, the last one shorter.

    The batches are equal for any number of workers: processes that read ahead; with 0, this one reads. Where there
    is CUDA they lie in page-locked memory. Raises an item's own error in its turn, RunError where a worker died.
    """
    batches = DataLoader(
        _Caught(dataset),
        batch_size=batch,
        sampler=items,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCH if workers else None,
        # Its own random numbers: the loader draws some, which would change the training's.
        generator=torch.Generator(),
    )
    start = 0
    with worker_deaths(lambda: _names(dataset, items[start : start + batch])):
        for found in batches:
            if isinstance(found, TilepipeError):
                raise found
            yield found[0], found[1]
            start += batch


@contextmanager
def worker_deaths(reading: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns the death of a worker into a RunError of one line, which says what was being read where `reading` can.

    torch tells of a death wherever the process happens to be, so a training loop needs this around it too.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = f" reading {reading()} or what follows it" if reading else ""
        told = " ".join(str(error).split("\n", 1)[0].split())
        raise RunError(
            f"a worker process died{what} ({told}); where memory is short use fewer --workers, "
            "or 0 to read in the training process"
        ) from None


def _names(dataset: WindowDataset, items: Sequence[int]) -> str:
    """The images that these items show, the first few."""
    names = dict.fromkeys(dataset.pairs[dataset.draws(index).pair].image.info.name for index in items)
    return ", ".join(list(names)[:3])


def _collated(items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, TilepipeError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.stack(labels)
