"""The order of samples: a function of the seed and the step, for any number of ranks."""

from __future__ import annotations

import pytest

pytest.importorskip("numpy")
from hypothesis import given
from hypothesis import strategies as st

from translution.apps.data.order import InOrder, Shuffled, generator_of, seed_of


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.data())
def test_shuffled(samples, each, ranks, batches, data):
    batch = each * ranks
    whole = list(Shuffled(samples, batch, batches, seed=3))
    assert len(whole) == batches
    flat = [item for items in whole for item in items]
    for epoch in range(len(flat) // samples):  # every whole epoch is a permutation
        assert sorted(flat[epoch * samples : (epoch + 1) * samples]) == [
            (epoch, i) for i in range(samples)
        ]
    start = data.draw(st.integers(0, batches))
    assert list(Shuffled(samples, batch, batches, seed=3, start=start)) == whole[start:]
    shares = [list(Shuffled(samples, batch, batches, 3, 0, r, ranks)) for r in range(ranks)]
    for step, items in enumerate(whole):
        assert sorted(i for share in shares for i in share[step]) == sorted(items)
        assert all(len(share[step]) == each for share in shares)


def test_another_seed_or_epoch_is_another_order():
    def order(seed):
        return [i for items in Shuffled(50, 10, 10, seed) for _, i in items]

    assert order(0)[:50] != order(0)[50:]
    assert order(0) != order(1)
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
def test_in_order(samples, batch, ranks):
    """Every sample counts once; every rank has as many batches."""
    seen = []
    for rank in range(ranks):
        order = InOrder(samples, batch, rank, ranks)
        batches = list(order)
        assert len(batches) == len(order) == -(-samples // (batch * ranks))
        for number, items in enumerate(batches):
            assert items
            if order.is_new(number):
                seen += items
    assert sorted(seen) == [(0, i) for i in range(samples)]


def test_seeds_stay_what_they_are():
    """Held-out parts and augmentations of published results were drawn with these."""
    assert seed_of(3, 1, 2) == 5839918186241800584
    assert generator_of(3, 1, 2).initial_seed() == 1620210449
