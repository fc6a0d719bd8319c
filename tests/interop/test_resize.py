"""Tables for other grids, and between shared and relative."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from translution import (
    AlphaTranslution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    gpt,
    vit,
)
from translution.interop.conversion import make_relative, make_shared, resize_offsets
from translution.modules.projections import sharding


def offset_rows(layout, weight):
    """A table as a dict of offsets, from the pairs that the layout has."""
    found = {}
    places = layout.positions().tolist()
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        c = int(layout.index[layout.prefix + i, layout.prefix + j])
        if c >= 0:
            found[tuple(x - y for x, y in zip(a, b, strict=True))] = weight[c]
    return found


def linear_table(layer, name="v_proj"):
    """Fill the offsets' rows with something linear in the offset; return its slope."""
    table = getattr(layer, name)
    slopes = torch.randn(len(layer.layout.grid), *table.weight.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        table.weight.normal_()
        for offset, row in offset_rows(layer.layout, table.weight).items():
            row.copy_(sum(o * s for o, s in zip(offset, slopes, strict=True)))
    return slopes


@given(
    old=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    new=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    prefix=st.integers(0, 2),
    stretch=st.booleans(),
)
def test_a_linear_table_stays_linear(old, new, prefix, stretch):
    """Within the old offsets it is linear in the share of the grid (or in tokens), beyond the last
    one constant; prefix rows stay."""
    layer = Translution2d(4, old, heads=2, prefix=prefix, relative="kv", qkv_bias=True).double()
    slopes = linear_table(layer)
    kept = layer.v_proj.weight[layer.layout.offset_classes :].clone()
    resize_offsets(layer, new, stretch=stretch)
    for offset, row in offset_rows(layer.layout, layer.v_proj.weight).items():
        at = [o * a / b if stretch else o for o, a, b in zip(offset, old, new, strict=True)]
        at = [max(1 - n, min(o, n - 1)) for o, n in zip(at, old, strict=True)]
        want = sum(o * s for o, s in zip(at, slopes, strict=True))
        torch.testing.assert_close(row, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(layer.v_proj.weight[layer.layout.offset_classes :], kept)
    tokens = prefix + new[0] * new[1]
    layer(torch.randn(2, tokens, 4, dtype=torch.float64)).sum().backward()
    assert layer.v_proj.weight.grad is not None
    assert layer.v_proj.bias.grad is not None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets", [None, 4])
def test_offsets_that_coincide_are_exact(causal, buckets):
    layer = Translution1d(
        8, 9, heads=2, causal=causal, buckets=buckets, prefix=1, init="independent"
    )
    before = copy.deepcopy(layer)
    resize_offsets(layer, 18)
    if buckets is None:
        old = offset_rows(before.layout, before.q_proj.weight)
        new = offset_rows(layer.layout, layer.q_proj.weight)
        assert all(torch.equal(new[2 * o,], row) for (o,), row in old.items())
    there = copy.deepcopy(before)
    resize_offsets(there, 9)  # the same
    for a, b in zip(there.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rounding_is_no_interpolation():
    """11 · 30 / 22 is 15, but 11 · (30 / 22) is not."""
    layer = Translution1d(4, 30, heads=1, relative="v", init="independent").double()
    row = layer.v_proj.weight[29 + 15].clone()
    resize_offsets(layer, 22)
    assert torch.equal(layer.v_proj.weight[21 + 11], row)


def test_windows_grow_and_shrink():
    layer = Translution2d(8, 7, heads=2, window=1, init="independent", prefix=1)
    before = offset_rows(layer.layout, layer.k_proj.weight)
    resize_offsets(layer, window=3)
    assert layer.layout.window == (3, 3)
    assert layer.layout.grid == (7, 7)
    for (a, b), row in offset_rows(layer.layout, layer.k_proj.weight).items():
        assert torch.equal(row, before[max(-1, min(a, 1)), max(-1, min(b, 1))])
    resize_offsets(layer, window=1)
    for offset, row in offset_rows(layer.layout, layer.k_proj.weight).items():
        assert torch.equal(row, before[offset])


def test_a_longer_text_keeps_its_offsets_in_tokens():
    layer = Translution1d(8, 6, heads=2, causal=True, init="independent")
    x = torch.randn(2, 6, 8)
    y = layer(x)
    resize_offsets(layer, 12, stretch=False)
    torch.testing.assert_close(layer(x), y)
    assert layer(torch.randn(1, 12, 8)).isfinite().all()


def test_other_layers_with_tables():
    for layer in (
        AlphaTranslution2d(8, 3, heads=2, rank=3, prefix=1),
        SelfAttention(8, (3, 3), heads=2, position="bias", prefix=1),
        Translution2d(8, 3, heads=2, prefix=1, prefix_queries=True),
    ):
        rows = [p[-3:].clone() for n, p in layer.named_parameters() if "table" in n or p.ndim == 3]
        resize_offsets(layer, (4, 5))
        y = layer(torch.randn(2, 21, 8))
        assert y.shape[-1] == 8
        assert y.isfinite().all()
        now = [p[-3:] for n, p in layer.named_parameters() if "table" in n or p.ndim == 3]
        assert all(torch.equal(a, b) for a, b in zip(rows, now, strict=True))


@pytest.mark.parametrize(
    "mixer", ["translution", "alpha", "attention", "bias", "rotary", "acmix", "convolution"]
)
def test_a_vit_of_224_runs_at_384(mixer):
    model = vit(mixer=mixer, image_size=224, patch_size=32, dim=16, depth=2, heads=2, num_classes=3)
    resize_offsets(model, 12)
    assert model.config.image_size == (384, 384)
    assert model.config.grid == (12, 12)
    assert model(torch.randn(1, 3, 384, 384)).isfinite().all()
    with pytest.raises(ValueError, match="image: got"):
        model(torch.randn(1, 3, 390, 384))
    fresh = type(model)(model.config)  # what is saved fits a model of the new size
    fresh.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 384, 384)
    torch.testing.assert_close(fresh(image), model(image))


def test_positions_are_those_of_the_image():
    """A ramp of positions stays one, as nearly as bicubic interpolation leaves it, but for the
    border."""
    model = vit(mixer="attention", image_size=64, patch_size=8, dim=4, depth=1, heads=1)
    ramp = (torch.arange(8.0) + 0.5) / 8
    model.positions.data = ramp[None, :, None, None].expand(1, 8, 8, 4).clone()
    resize_offsets(model, (16, 8))
    want = (torch.arange(16.0) + 0.5) / 16
    torch.testing.assert_close(model.positions[0, 4:-4, 0, 0], want[4:-4], rtol=0, atol=0.01)


def test_a_gpt_of_another_context():
    for mixer in "translution", "attention", "rotary":
        model = gpt(mixer=mixer, context=8, vocab_size=11, dim=16, depth=2, heads=2)
        resize_offsets(model, 16)
        assert model(torch.randint(0, 11, (1, 16))).isfinite().all()
        assert model.config.context == 16


@pytest.mark.parametrize("bias", [True, False])
def test_shared_to_relative_and_back(bias):
    layer = Translution2d(8, 3, heads=2, relative="v", qkv_bias=bias, prefix=1, init="independent")
    x = torch.randn(2, 10, 8)
    y = layer(x)
    names = [n for n, _ in layer.named_parameters()]
    q = layer.q_proj.weight.clone()
    make_relative(layer, "qv")
    assert layer.relative == "qv"
    assert layer.q_proj.weight.ndim == 3
    torch.testing.assert_close(layer(x), y)
    again = Translution2d(8, 3, heads=2, relative="qv", qkv_bias=bias, prefix=1)
    again.load_state_dict(layer.state_dict())
    make_shared(layer, "qk")
    assert layer.relative == "v"
    assert names == [n for n, _ in layer.named_parameters()]
    assert torch.equal(layer.q_proj.weight, q)
    mean = layer.v_proj.weight.mean(0)
    make_shared(layer, "v")
    torch.testing.assert_close(layer.v_proj.weight, mean.T)
    assert layer.relative == ""
    assert layer(x).shape == y.shape


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (lambda: nn.Linear(2, 2), {"grid": 3}, "model: got Linear"),
        (lambda: 3, {"grid": 3}, "model: got int"),
        (lambda: Translution2d(8, 3), {}, "grid: got None"),
        (lambda: Translution2d(8, 3), {"grid": (3, 3, 3)}, "Translution2d: grid: got"),
        (lambda: Translution2d(8, 3), {"grid": 0}, "grid: got 0"),
        (lambda: Translution2d(8, 3), {"window": -1}, "window: got -1"),
        (lambda: nn.ModuleDict({"a": Translution1d(8, 3)}), {"grid": (3, 3)}, "a: grid: got"),
        (
            lambda: vit(mixer="attention", image_size=32, dim=8, depth=1, heads=1),
            {"grid": 3, "stretch": False},
            "stretch: got False for learned positions",
        ),
    ],
)
def test_refusals(make, keywords, message):
    with pytest.raises(ValueError, match=message):
        resize_offsets(make(), **keywords)


def test_all_layers_of_a_model_change_hands():
    """And what is saved fits a model of its configuration."""
    for make in (
        lambda: vit(mixer="translution", image_size=16, patch_size=4, dim=8, depth=2, heads=2),
        lambda: gpt(mixer="translution", context=8, vocab_size=11, dim=8, depth=2, heads=2),
    ):
        model = make()
        make_shared(model, "qk")
        assert model.config.relative == "v"
        make_relative(model, "k")
        assert model.config.relative == "kv"
        type(model)(model.config).load_state_dict(model.state_dict())


def test_all_layers_change_or_none():
    good, bad = (
        Translution1d(8, 4, heads=2, relative="v", position=name) for name in ("none", "rotary")
    )
    with pytest.raises(ValueError, match=r"1: relative: got 'q', but q and k have rotary"):
        make_relative(nn.ModuleList([good, bad]), "q")
    assert good.relative == "v"
    assert good.q_proj.weight.ndim == 2


def test_divided_tables_are_refused():
    with sharding((0, 2)):
        layer = Translution1d(8, 4)
    with pytest.raises(ValueError, match="divided over processes"):
        resize_offsets(layer, 8)
    with pytest.raises(ValueError, match="divided over processes"):
        make_shared(layer, "q")


def test_what_can_not_change_hands():
    with pytest.raises(ValueError, match="rotary"):
        make_relative(Translution1d(8, 4, heads=2, relative="v", position="rotary"), "q")
    with pytest.raises(ValueError, match="layer: got SelfAttention"):
        make_relative(SelfAttention(8, 4), "q")
    with pytest.raises(ValueError, match="layer: got ModuleList, want Translution1d, 2d or 3d, or"):
        make_shared(nn.ModuleList([nn.Linear(2, 2)]), "q")
    with pytest.raises(ValueError, match="layer: got int"):
        make_shared(3, "q")
    with pytest.raises(ValueError, match="relative: got 'x'"):
        make_shared(Translution1d(8, 4), "x")
