"""The order in which samples are read, and the random numbers that belong to a sample.

Both are functions of the seed and of a position alone. A run can therefore continue at any step and
on any number of devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["InOrder", "Shuffled", "generator_of", "seed_of"]


def _hashed(*numbers: int) -> int:
    """A hash of 64 bits of these numbers. NumPy promises that it never changes."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits, which torch and NumPy accept, that depends on all of these numbers."""
    return _hashed(*numbers) >> 1


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose seed depends on all of these numbers.

    It takes 32 bits of the hash that `seed_of` takes 63 bits of. The two stay different because
    held-out parts and augmentations of published results were drawn in this way.
    """
    return torch.Generator().manual_seed(_hashed(*numbers) % 2**32)


class Shuffled(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training. Each epoch has its own random order.

    The epochs form one endless sequence, and batch b is its b-th piece. A batch may contain the end
    of one epoch and the beginning of the next, so all batches have the same size. Of each batch,
    rank r of R ranks takes samples r, r + R, r + 2R and so on.

    Args:
        samples: the number of samples in an epoch.
        batch: the number of samples in a batch over all ranks, a multiple of `ranks`.
        batches: the number of batches in the whole run.
        seed: the seed of the run.
        start: the first batch to return.
        rank, ranks: which process this is, and how many there are.
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
        self._orders: dict[int, Tensor] = {}  # by epoch, of the last two epochs

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.start, self.batches):
            first = batch * self.batch
            positions = range(first + self.rank, first + self.batch, self.ranks)
            yield [self._sample(*divmod(position, self.samples)) for position in positions]

    def _sample(self, epoch: int, position: int) -> tuple[int, int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.samples, generator=generator)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return epoch, int(self._orders[epoch][position])


class InOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (0, index) for evaluation: every sample once, in order.

    Rank r of R ranks takes samples r, r + R, r + 2R and so on. All ranks return the same number of
    batches, because they communicate in each. A rank without samples left returns the first sample
    again, and `is_new` is then False.

    Args:
        samples: the number of samples.
        batch: the number of samples in a batch of one rank.
        rank, ranks: which process this is, and how many there are.
    """

    def __init__(self, samples: int, batch: int, rank: int = 0, ranks: int = 1):
        self.samples, self.batch, self.rank, self.ranks = samples, batch, rank, ranks

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.ranks))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = iter(range(self.rank, self.samples, self.ranks))
        for _ in range(len(self)):
            indices = list(itertools.islice(own, self.batch))
            yield [(0, index) for index in indices or [0]]

    def is_new(self, batch: int) -> bool:
        """Whether this batch has samples of its own, so that its results count."""
        return batch * self.batch * self.ranks + self.rank < self.samples
