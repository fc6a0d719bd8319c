from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from translution import Layout


@st.composite
def layouts(draw, most=4, axes=None):
    """(keywords of a layout, an input grid)"""
    axes = draw(st.integers(1, 3)) if axes is None else axes
    most = {1: 2 * most, 2: most, 3: 3}[axes]
    grid = tuple(draw(st.lists(st.integers(1, most), min_size=axes, max_size=axes)))
    keywords = {"grid": grid, "prefix": draw(st.integers(0, 2))}
    if axes == 1:
        keywords["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        keywords["window"] = tuple(draw(st.one_of(st.none(), st.integers(0, 2))) for _ in grid)
    if draw(st.booleans()):
        keywords["dilation"] = tuple(draw(st.integers(1, 2)) for _ in grid)
    if keywords["prefix"] and draw(st.booleans()):
        keywords["prefix_queries"] = True
    input_grid = tuple(draw(st.integers(1, n)) for n in grid)
    return keywords, input_grid


@given(layouts())
def test_index_is_that_of_the_oracle(case):
    keywords, input_grid = case
    layout = Layout(**keywords)
    assert torch.equal(layout.index, oracle.index(**keywords))
    assert torch.equal(layout.at(input_grid).index, oracle.index(input_grid, **keywords))


@given(layouts())
def test_derived_facts_agree_with_the_index(case):
    keywords, input_grid = case
    layout = Layout(**keywords).at(input_grid)
    index = layout.index
    assert index.shape == (layout.n_queries, layout.n_keys)
    assert layout.full == bool((index >= 0).all())
    if not layout.may_be_empty:
        assert (index >= 0).any(-1).all()
    if layout.plain_causal:
        assert torch.equal(index >= 0, torch.ones_like(index).tril().bool())
    whole = Layout(**keywords).index
    assert set(range(layout.classes)) == set(whole.unique().tolist()) - {-1}, "a row has no pair"


@given(layouts())
def test_pairs_are_the_index_sorted_by_class(case):
    keywords, input_grid = case
    layout = Layout(**keywords).at(input_grid)
    pairs, index = layout.pairs_on("cpu"), layout.index
    assert pairs.starts[-1] == int((index >= 0).sum())
    assert len(pairs.starts) == layout.classes + 1
    for cls in range(layout.classes):
        mine = slice(pairs.starts[cls], pairs.starts[cls + 1])
        assert (index[pairs.query[mine], pairs.key[mine]] == cls).all()
    cells = torch.arange(index.numel())
    found = torch.cat([pairs.flat.long(), torch.tensor([-1])])[pairs.slot.long()]
    assert torch.equal(found, torch.where(index.flatten() >= 0, cells, -1))


@given(layouts())
def test_spec_rebuilds_the_layout(case):
    keywords, input_grid = case
    layout = Layout(**keywords).at(input_grid)
    part = layout.select(queries=[layout.n_queries - 1], keys=range(layout.tokens))
    for each in (layout, part):
        again = Layout.parse(each.spec)
        assert again == each
        assert again.spec == each.spec
        assert torch.equal(again.index, each.index)


@given(layouts(), st.data())
def test_select_takes_rows_and_columns(case, data):
    keywords, _ = case
    layout = Layout(**keywords)
    queries = data.draw(st.lists(st.integers(0, layout.n_queries - 1), max_size=4))
    keys = data.draw(st.lists(st.integers(0, layout.tokens - 1), min_size=1, max_size=4))
    assert torch.equal(layout.select(queries, keys).index, layout.index[queries][:, keys])


def test_published_row_order():
    """Rows (Δy + H - 1)(2W - 1) + (Δx + W - 1), then class-class, class query, class key."""
    layout = Layout((3, 4), prefix=1)
    index = layout.index
    for i in range(12):
        for j in range(12):
            dy, dx = i // 4 - j // 4, i % 4 - j % 4
            assert index[1 + i, 1 + j] == (dy + 2) * 7 + (dx + 3)
    assert index[0, 0] == 35
    assert (index[0, 1:] == 36).all()
    assert (index[1:, 0] == 37).all()
    assert torch.equal(Layout(5, causal=True).index[4], torch.tensor([4, 3, 2, 1, 0]))


@given(st.integers(1, 300), st.integers(1, 12))
def test_buckets_are_exact_near_and_logarithmic_far(size, buckets):
    layout = Layout(size, buckets=buckets, causal=True).at(size + 50)
    classes = layout.index[-1].flip(0)  # from the nearest key to the farthest
    steps = classes.diff()
    assert ((steps == 0) | (steps == 1)).all(), (
        "each offset has the class of the one before it, or the next one"
    )
    assert layout.classes == min(buckets, size - 1) + 1
    exact = (buckets + 1) // 2 + 1
    near = classes[: min(exact, size)]
    assert torch.equal(near, torch.arange(len(near)))
    widths = torch.bincount(classes[:size])[exact:-1]
    assert (widths.diff() >= -1).all(), "far buckets grow"
    assert (classes[size:] == layout.classes - 1).all(), (
        "offsets beyond the grid have the last class"
    )


def test_buckets_keep_tables_small_and_sequences_unbounded():
    layout = Layout((14, 14), buckets=3, prefix=1)
    assert layout.classes == 7 * 7 + 3
    assert layout.at((40, 9)).index.max() == layout.classes - 1
    both = Layout(9, buckets=2).index
    assert torch.equal(both, (both.max() - both).T), "opposite offsets have classes of their own"


def test_a_window_serves_larger_inputs():
    layout = Layout((5, 5), window=1)
    assert torch.equal(layout.at((9, 6)).index, Layout((9, 6), window=1).index)
    with pytest.raises(ValueError, match="tables are made for at most 5"):
        Layout((5, 5), window=(5, 1)).at((6, 5))


def test_index_is_cached_and_safe_to_write():
    layout = Layout((3, 3))
    assert layout.pairs_on("cpu") is Layout((3, 3)).pairs_on("cpu")
    layout.index.fill_(7)
    assert layout.index[0, 0] == 12


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"grid": ()}, "grid: got 0 axes"),
        ({"grid": (2, 2, 2, 2)}, "grid: got 4 axes"),
        ({"grid": 0}, "grid: got 0"),
        ({"grid": "ab"}, "grid: got 'ab'"),
        ({"grid": 2.5}, "grid: got 2.5"),
        ({"grid": (4, 4), "causal": True}, "causal: needs a grid of one axis"),
        ({"grid": 4, "window": -1}, "window: got -1"),
        ({"grid": 4, "window": (1, 2)}, r"window: got \(1, 2\), want an int or None or 1 of them"),
        ({"grid": 4, "dilation": 0}, "dilation: got 0"),
        ({"grid": 4, "buckets": 0}, "buckets: got 0"),
        ({"grid": 4, "prefix": -1}, "prefix: got -1"),
        ({"grid": 4, "prefix_queries": True}, "prefix_queries: needs"),
        ({"grid": 4, "input_grid": (5,)}, "grid: got 5 tokens on axis 0"),
        ({"grid": 4, "prefix": True}, "prefix: got True"),
        ({"grid": 4, "causal": "no"}, "causal: got 'no', want True or False"),
        ({"grid": 4, "prefix": 1, "prefix_queries": 1}, "prefix_queries: got 1"),
        ({"grid": 4, "queries": (4,)}, "queries: got token 4, want 0 to 3"),
        ({"grid": 4, "queries": (1.7,)}, r"queries: got \(1.7,\), want ints"),
        ({"grid": 4, "keys": "12"}, "keys: got '12', want ints"),
    ],
)
def test_bad_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        Layout(**keywords)
