"""The logarithms of attention's sums, with which the results of several key sets are merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_derivatives import checked, leaf
from test_layouts import layouts
from test_neighborhood import BACKENDS, areas, attention_by, attention_inputs

from translution import Layout
from translution.functional import (
    masked_softmax,
    neighborhood_attention,
    offset_mix,
    offset_scores,
)
from translution.neighborhoods import Neighborhood

DOUBLE = {"dtype": torch.float64}


def same(got, want, tol=1e-10):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def merged(parts):
    """The whole, from (y, lse) of each set of keys, y [..., channels] and lse [...]."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return sum((part - lse).exp()[..., None] * y for y, part in parts), lse


def layout_of(case):
    keywords, input_grid = case
    return Layout(**keywords).at(input_grid)


# -- softmax over all keys -------------------------------------------------------------------------


@settings(max_examples=30)
@given(layouts(most=3), st.booleans())
def test_softmax_returns_the_logarithm_of_its_sum(case, masked):
    layout = layout_of(case)
    s = torch.randn(2, 2, layout.n_queries, layout.n_keys, **DOUBLE, requires_grad=True)
    absent = s.masked_fill(layout.index < 0, float("-inf"))
    mask = torch.rand(2, 1, layout.n_queries, layout.n_keys) > 0.5 if masked else None
    a, lse = masked_softmax(absent, mask, return_lse=True)
    seen = (layout.index >= 0).expand(s.shape)
    seen = seen if mask is None else seen & mask
    want = (s.exp() * seen).sum(-1).log()
    assert torch.equal(a, masked_softmax(absent, mask))
    same(lse, want)
    full = seen.any(-1)
    (got,) = torch.autograd.grad(lse[full].sum(), s)
    (wanted,) = torch.autograd.grad(want[full].sum(), s)
    same(got, wanted.nan_to_num())


def test_rows_without_keys():
    s = torch.full((1, 1, 2, 3), float("-inf")).requires_grad_()
    for more in ({"empty_rows": True}, {"mask": torch.zeros(3, dtype=torch.bool)}):
        a, lse = masked_softmax(s, **more, return_lse=True)
        assert (a == 0).all()
        assert lse.isneginf().all()
        (grad,) = torch.autograd.grad(lse.sum(), s)
        assert (grad == 0).all()
    assert masked_softmax(s, return_lse=True)[1].isneginf().all()


@pytest.mark.parametrize(
    "layout", [Layout((2, 3), prefix=1), Layout(6, causal=True), Layout(6, window=1)], ids=str
)
def test_two_halves_of_the_keys_merge_to_the_whole(layout):
    """Also where a query sees no key of one half."""
    x = leaf(2, layout.tokens, 3)
    tables = [leaf(layout.classes, 3, 4) for _ in range(3)]

    def attend(part):
        keys = x[:, list(part)]
        here = layout.select(keys=part)
        s = offset_scores(x, keys, *tables[:2], here, heads=2)
        a, lse = masked_softmax(s, empty_rows=True, return_lse=True)
        y = offset_mix(a, keys, tables[2], here)
        return y.unflatten(-1, (2, -1)).transpose(1, 2), lse

    half = layout.tokens // 2
    want = attend(range(layout.tokens))
    got = merged([attend(range(half)), attend(range(half, layout.tokens))])
    same(got, want)
    ups = [torch.randn_like(part) for part in want]
    for_got = torch.autograd.grad(got, [x, *tables], ups)
    same(for_got, torch.autograd.grad(want, [x, *tables], ups))


# -- neighbourhoods --------------------------------------------------------------------------------


def slow(q, k, v, area, scale):
    """y and lse in float64, with a copy of every neighbourhood."""
    k, v = (x.flatten(2, 3)[:, :, area.index] for x in (k, v))
    s = (q.flatten(2, 3)[..., None, :] * k).sum(-1) * scale
    y, lse = (s.softmax(-1)[..., None] * v).sum(-2), s.exp().sum(-1).log()
    return y.unflatten(2, area.out), lse.unflatten(2, area.out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighborhoods_are_the_oracle(backend):
    kind = attention_by(backend)

    @settings(max_examples=10 if backend == "torch" else 1)  # it is in the gradients only
    @given(areas(kind.most), st.integers(0, 2), st.integers(1, kind.heads), st.integers(1, 4))
    def check(area, batch, heads, dim):
        leaves = kind.inputs(area, batch=batch, heads=heads, dim=dim)
        leaves = [x.requires_grad_() for x in leaves]
        geometry = area.kernel, area.stride, area.dilation
        got = kind.operator(*leaves, *geometry, scale=0.7, return_lse=True)
        want = slow(*leaves, area, 0.7)
        ups = [torch.randn_like(part) for part in want]
        kind.agree(
            [*got, *torch.autograd.grad(got, leaves, ups)],
            [*want, *torch.autograd.grad(want, leaves, ups)],
        )

    check()


def test_a_neighborhood_and_further_keys_merge_to_the_softmax_over_both():
    area = Neighborhood((4, 5), (3, 3))
    q, k, v = (x.requires_grad_() for x in attention_inputs(area))
    more_k, more_v = leaf(2, 2, 3, 3), leaf(2, 2, 3, 4)  # three keys that every position sees
    local = neighborhood_attention(q, k, v, 3, scale=0.5, return_lse=True)
    a, lse = masked_softmax(q.flatten(2, 3) @ more_k.mT * 0.5, return_lse=True)
    y = (a @ more_v).unflatten(2, area.out)
    got = merged([local, (y, lse.unflatten(2, area.out))])
    near_k, near_v = (x.flatten(2, 3)[:, :, area.index] for x in (k, v))
    flat = q.flatten(2, 3)[..., None, :]
    s = torch.cat([(flat * near_k).sum(-1), (flat * more_k[:, :, None]).sum(-1)], -1) * 0.5
    far_v = more_v[:, :, None].expand(-1, -1, near_v.shape[2], -1, -1)
    want = (s.softmax(-1)[..., None] * torch.cat([near_v, far_v], -2)).sum(-2)
    same(got[0], want.unflatten(2, area.out))
    leaves = [q, k, v, more_k, more_v]
    up = torch.randn_like(got[0])
    same(
        torch.autograd.grad(got[0], leaves, up),
        torch.autograd.grad(want, leaves, up.flatten(2, 3)),
    )


def lse_of(q, k):
    return neighborhood_attention(q, k, k, 3, stride=2, return_lse=True)[1]


def test_all_derivatives():
    torch.manual_seed(0)
    checked(lse_of, [leaf(1, 1, 2, 2, 2), leaf(1, 1, 3, 3, 2)], False)


def test_vmap_and_programs():
    q, k = torch.randn(3, 2, 1, 2, 2, 2), torch.randn(3, 2, 1, 3, 3, 2)
    want = torch.stack([lse_of(*each) for each in zip(q, k, strict=True)])
    same(torch.func.vmap(lse_of)(q, k), want, 1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lse_of, fullgraph=True, backend="aot_eager")
    leaves = [q[0].requires_grad_(), k[0].requires_grad_()]
    got = [f(*leaves) for f in (compiled, lse_of)]
    same(*got, 1e-5)
    same(*(torch.autograd.grad(y.sum(), leaves) for y in got), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    area = Neighborhood((5, 4), (3, 3))
    leaves = [x.to(dtype).requires_grad_() for x in attention_inputs(area)]
    y, lse = neighborhood_attention(*leaves, 3, return_lse=True)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = slow(*wide, area, 3**-0.5)[1]
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(lse.sum(), leaves[:2])
    for g, w in zip(got, torch.autograd.grad(want.sum(), wide[:2]), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0.02, atol=0.02)
