"""In which order samples come: a function of the seed and the step alone, so that a run can be
continued anywhere, on any number of devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["InOrder", "Shuffled", "seed_of"]


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Shuffled(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), each epoch in an order of its own.

    The epochs follow each other in one endless sequence, of which batch b is the b-th piece; so a
    batch may hold the end of one epoch and the beginning of the next, and none is shorter. Rank r
    of R takes every R-th sample of a batch, from the r-th.

    Args:
        samples: of an epoch.
        batch: samples per batch, over all ranks; a multiple of `ranks`.
        batches: how many there are in all.
        start: the first that is wanted.
    """

    def __init__(
        self,
        samples: int,
        batch: int,
        batches: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.samples, self.batch, self.batches, self.seed = samples, batch, batches, seed
        self.start, self.rank, self.ranks = start, rank, ranks
        self._epochs: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.start, self.batches):
            first = batch * self.batch
            places = range(first + self.rank, first + self.batch, self.ranks)
            yield [self._sample(*divmod(place, self.samples)) for place in places]

    def _sample(self, epoch: int, place: int) -> tuple[int, int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.samples, generator=generator)
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order
        return epoch, int(self._epochs[epoch][place])


class InOrder(Sampler[list[tuple[int, int]]]):
    """Every sample once, in order, as (0, index); rank r of R takes every R-th.

    Every rank has as many batches as the others, for the sake of what they do together: one whose
    samples have ended repeats the first, and `real(batch)` is then False.
    """

    def __init__(self, samples: int, batch: int, rank: int = 0, ranks: int = 1):
        self.samples, self.batch, self.rank, self.ranks = samples, batch, rank, ranks

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mine = iter(range(self.rank, self.samples, self.ranks))
        for _ in range(len(self)):
            some = list(itertools.islice(mine, self.batch))
            yield [(0, index) for index in some or [0]]

    def real(self, batch: int) -> bool:
        return batch * self.batch * self.ranks + self.rank < self.samples
