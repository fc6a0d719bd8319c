"""The primitives against the oracle: values and every gradient, over layouts, subsets, dtypes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import layouts

import oracle
from paths import PATHS, backend_of
from translution import Layout, backends
from translution.functional import masked_softmax, offset_mix, offset_scores

SUBSETS = ["".join(s) for n in range(4) for s in itertools.combinations("qkv", n)]
KINDS = ("table", "matrix", "none")


def tensors(layout, kind, channels, inner, tokens, batch=2, bias=False, dtype=torch.float64):
    """x, weight, bias of one side."""
    make = {"dtype": dtype}
    x = torch.randn(batch, tokens, inner if kind == "none" else channels, **make)
    if kind == "none":
        return x, None, None
    lead = (layout.classes,) if kind == "table" else ()
    weight = torch.randn(*lead, channels, inner, **make) / channels**0.5
    return x, weight, torch.randn(*lead, inner, **make) if bias else None


def graded(leaves):
    return [None if t is None else t.detach().clone().requires_grad_() for t in leaves]


def gradients(out, seed_grad, leaves):
    live = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, live, seed_grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, live, strict=True)]


def run_scores(function, leaves, present):
    """Scores of the present pairs and all gradients, from one random upstream gradient."""
    leaves = graded(leaves)
    s = function(*leaves)
    assert (s.isneginf() == ~present).all()
    s = s.masked_fill(~present, 0)
    up = torch.randn(s.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [s, *gradients(s, up.to(s.dtype), leaves)]


def close(got, want, rtol=1e-9):
    for g, w in zip(got, want, strict=True):
        scale = w.abs().max().clamp(min=1e-30) if w.numel() else 1.0
        assert g.shape == w.shape
        assert ((g.double() - w.double()).abs() <= rtol * scale).all()


@pytest.mark.parametrize("path", PATHS)
def test_scores_are_the_oracles(path):
    @settings(max_examples=20 if path == "torch" else 10)
    @given(
        layouts(most=3),
        st.sampled_from(KINDS),
        st.sampled_from(KINDS),
        st.integers(1, 3),
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(1, 3),
        st.booleans(),
    )
    def check(case, kq, kk, heads, head_dim, channels, batch, bias):
        keywords, input_grid = case
        layout = Layout(**keywords).at(input_grid)
        inner = heads * head_dim
        xq, wq, bq = tensors(layout, kq, channels, inner, layout.n_queries, batch, bias)
        xk, wk, bk = tensors(layout, kk, channels, inner, layout.n_keys, batch, bias)
        leaves = [xq, xk, wq, wk, bq, bk]
        present = layout.index >= 0

        def fast(xq, xk, wq, wk, bq, bk):
            return offset_scores(
                xq, xk, wq, wk, layout,
                heads=heads, bias_query=bq, bias_key=bk, scale=0.3, backend=backend,
            )  # fmt: skip

        def slow(xq, xk, wq, wk, bq, bk):
            return oracle.scores(xq, xk, wq, wk, layout.index, heads, bq, bk, 0.3)

        with backend_of(path) as backend:
            close(run_scores(fast, leaves, present), run_scores(slow, leaves, present))

    check()


@pytest.mark.parametrize("path", PATHS)
def test_mix_is_the_oracles(path):
    @settings(max_examples=20 if path == "torch" else 10)
    @given(
        layouts(most=3),
        st.sampled_from(KINDS),
        st.integers(1, 3),
        st.integers(1, 5),
        st.integers(1, 4),
        st.integers(1, 3),
        st.booleans(),
    )
    def check(case, kind, heads, head_dim, channels, batch, bias):
        keywords, input_grid = case
        layout = Layout(**keywords).at(input_grid)
        x, w, b = tensors(layout, kind, channels, heads * head_dim, layout.n_keys, batch, bias)
        a = torch.randn(batch, heads, layout.n_queries, layout.n_keys, dtype=torch.float64)
        up = torch.randn(batch, layout.n_queries, heads * head_dim, dtype=torch.float64)
        results = []
        with backend_of(path) as backend:
            for function in (
                lambda a, x, w, b: offset_mix(a, x, w, layout, bias_value=b, backend=backend),
                lambda a, x, w, b: oracle.mix(a, x, w, layout.index, b),
            ):
                leaves = graded([a, x, w, b])
                y = function(*leaves)
                results.append([y, *gradients(y, up, leaves)])
        close(*results)

    check()


def attend(layout, heads, xq, x, wq, wk, wv, mask=None):
    s = offset_scores(xq, x, wq, wk, layout, heads=heads, scale=0.5)
    return offset_mix(masked_softmax(s, mask, layout.may_be_empty), x, wv, layout)


GRADCHECK_LAYOUTS = {
    "1d": Layout(4),
    "causal": Layout(4, causal=True, prefix=1),
    "2d": Layout((2, 3), prefix=1),
    "3d": Layout((2, 1, 2)),
    "window": Layout((3, 3), window=1, dilation=(1, 2)),
    "buckets": Layout(7, buckets=2),
    "smaller": Layout((3, 3)).at((2, 1)),
    "prefix queries": Layout((2, 2), prefix=2, prefix_queries=True),
    "one query": Layout(5, causal=True).select(queries=[3], keys=range(4)),
}


@pytest.mark.parametrize("relative", SUBSETS)
@pytest.mark.parametrize("name", GRADCHECK_LAYOUTS)
def test_gradcheck(name, relative):
    layout, heads, channels = GRADCHECK_LAYOUTS[name], 2, 2
    sides = [
        tensors(layout, "table" if side in relative else "matrix", channels, 4, 1)[1]
        for side in "qkv"
    ]
    xq = torch.randn(1, layout.n_queries, channels, dtype=torch.float64)
    x = torch.randn(1, layout.n_keys, channels, dtype=torch.float64)
    leaves = graded([xq, x, *sides])
    assert torch.autograd.gradcheck(lambda *t: attend(layout, heads, *t), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_table", [False, True])
def test_lower_precision_stays_within_its_rounding(dtype, wide_table):
    """Of the float64 result on the same (rounded) numbers. The bound: each of q, k, v is rounded
    once on the way, and everything is summed in float32."""
    layout, heads = Layout((4, 5), prefix=1), 2
    xq, wq, _ = tensors(layout, "table", 16, 16, layout.tokens)
    _, wk, _ = tensors(layout, "table", 16, 16, layout.tokens)
    exact = [t.to(dtype).double() for t in (xq, wq, wk)]
    eps = torch.finfo(dtype).eps

    def run(x, wq, wk, wv):
        leaves = graded([x, wq, wk, wv])
        s = offset_scores(leaves[0], leaves[0], leaves[1], leaves[2], layout, heads=heads)
        y = offset_mix(s.softmax(-1), leaves[0], leaves[3], layout)
        return s, [s, y, *gradients(y, torch.ones_like(y), leaves)]

    table = torch.float32 if wide_table else dtype
    s, low = run(exact[0].to(dtype), *(exact[i].to(table) for i in (1, 2, 1)))
    _, high = run(exact[0], exact[1], exact[2], exact[1])
    assert s.dtype == torch.float32
    assert low[1].dtype == dtype
    assert low[3].dtype == table
    for got, want in zip(low, high, strict=True):
        assert torch.isfinite(got).all()
        error = (got.double() - want).norm() / want.norm()
        assert error < 8 * eps, f"{error / eps:.1f} eps"


def test_weight_gradients_are_summed_in_float32():
    """4096 equal small terms onto one class: a bfloat16 sum would stop growing at 256 of them."""
    layout = Layout(1)
    x = torch.ones(4096, 1, 1, dtype=torch.bfloat16)
    w = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    s = offset_scores(x, x, w, torch.ones_like(w), layout)
    s.backward(torch.ones_like(s))
    assert w.grad.item() == 4096


def test_autocast_computes_low_and_leaves_tables_wide():
    layout = Layout(6)
    x, w, _ = tensors(layout, "table", 8, 8, 6, dtype=torch.float32)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        s = offset_scores(x, x, w, w, layout)
        y = offset_mix(s.softmax(-1), x, w, layout)
    assert y.dtype == torch.bfloat16
    assert s.dtype == torch.float32
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32
    assert torch.isfinite(w.grad).all()


def test_non_contiguous_inputs():
    layout = Layout((2, 3))
    x = torch.randn(6, 4, 3, dtype=torch.float64).permute(2, 0, 1)
    w = torch.randn(4, layout.classes, 4, dtype=torch.float64).transpose(0, 1)
    a = torch.randn(6, 6, 3, 2, dtype=torch.float64).permute(2, 3, 0, 1)
    assert not any(t.is_contiguous() for t in (x, w, a))
    args = graded([x.contiguous(), w.contiguous(), a.contiguous()])
    apart = graded([x, w, a])
    assert not any(t.is_contiguous() for t in apart)
    results = []
    for x_, w_, a_ in (args, apart):
        s = offset_scores(x_, x_, w_, w_, layout, heads=2)
        y = offset_mix(a_, x_, w_, layout)
        results.append([s, y, *torch.autograd.grad((s.sum() + y.sum()), (x_, w_, a_))])
    close(*results)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("layout", [Layout(1), Layout((2, 2), prefix=1), Layout(3, causal=True)])
def test_batch_0_and_one_token(batch, layout):
    x, w, _ = tensors(layout, "table", 4, 4, layout.tokens, batch)
    x, w = graded([x, w])
    y = attend(layout, 2, x, x, w, w, w)
    assert y.shape == (batch, layout.tokens, 4)
    y.sum().backward()
    assert torch.isfinite(w.grad).all()
    if not batch:
        assert (w.grad == 0).all()


def test_only_what_is_asked_for_gets_a_gradient():
    layout = Layout((2, 2))
    x, w, _ = tensors(layout, "table", 4, 4, 4)
    frozen = w.clone()
    w.requires_grad_()
    offset_scores(x, x, w, frozen, layout).sum().backward()
    assert w.grad is not None
    assert frozen.grad is None
    assert x.grad is None


OPCHECK = [
    Layout((2, 2), prefix=1),
    Layout(4, causal=True),
]


@pytest.mark.parametrize("layout", OPCHECK)
@pytest.mark.parametrize("kinds", [("table", "table"), ("table", "none"), ("none", "table")])
def test_opcheck(layout, kinds):
    xq, wq, bq = tensors(layout, kinds[0], 4, 4, layout.tokens, bias=True)
    xk, wk, bk = tensors(layout, kinds[1], 4, 4, layout.tokens, bias=True)
    sides = graded([xq, xk, wq, wk, bq, bk])
    torch.library.opcheck(
        torch.ops.translution.offset_scores.default, (*sides, 2, 0.5, layout.spec, "auto")
    )
    a = torch.randn(2, 2, layout.tokens, layout.tokens, dtype=torch.float64)
    x, w, b = tensors(layout, "table", 4, 4, layout.tokens, bias=True)
    mix = graded([a, x, w, b])
    torch.library.opcheck(torch.ops.translution.offset_mix.default, (*mix, layout.spec, "auto"))
    torch.library.opcheck(torch.ops.translution.layout_index.default, (x, layout.spec))
    torch.library.opcheck(torch.ops.translution.layout_positions.default, (x, layout.spec))


def test_nothing_of_size_pairs_times_channels_is_held():
    """Peak bytes of forward + backward beside inputs, outputs and gradients, at a size where one
    q for all pairs would be 32 times the scores."""
    from translution.utils.measuring import peak_bytes

    layout, batch, heads, channels = Layout((12, 12)), 8, 2, 64
    x = torch.randn(batch, 144, channels, requires_grad=True)
    tables = [torch.randn(layout.classes, channels, channels, requires_grad=True) for _ in "qkv"]
    up = torch.randn(batch, 144, channels)

    def step():
        y = attend(layout, heads, x, x, *tables)
        torch.autograd.grad(y, [x, *tables], up)

    step()
    pairs = 144 * 144
    scores = batch * heads * pairs * 4
    per_pair = batch * pairs * channels * 4
    own = sum(t.numel() for t in tables) * 4 + 8 * x.numel() * 4
    extra = peak_bytes(step, torch.device("cpu")) - own
    assert extra < 10 * scores < per_pair, f"{extra / scores:.1f} times the scores"


def test_checkpointing_gives_the_same_gradients():
    layout = Layout((2, 3))
    x, w, _ = tensors(layout, "table", 4, 4, 6)
    results = []
    for wrap in (False, True):
        x_, w_ = graded([x, w])
        if wrap:
            y = torch.utils.checkpoint.checkpoint(
                lambda x, w: attend(layout, 2, x, x, w, w, w), x_, w_, use_reentrant=False
            )
        else:
            y = attend(layout, 2, x_, x_, w_, w_, w_)
        results.append([y, *torch.autograd.grad(y.sum(), (x_, w_))])
    close(*results)


def test_deterministic_to_the_bit():
    layout = Layout((4, 4), buckets=2)
    x, w, _ = tensors(layout, "table", 8, 8, 16, dtype=torch.float32)
    results = []
    for _ in range(2):
        x_, w_ = graded([x, w])
        y = attend(layout, 2, x_, x_, w_, w_, w_)
        results.append([y, *torch.autograd.grad(y.sum(), (x_, w_))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


X, W = torch.zeros(2, 4, 3), torch.zeros(7, 3, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: offset_scores(X[0], X, W, W, Layout(4)), r"x_query: got shape \(4, 3\)"),
        (lambda: offset_scores(X, X[:, :3], W, W, Layout(4)), r"x_key: .*want \(batch, 4,"),
        (lambda: offset_scores(X, X[:1], W, W, Layout(4)), "x_key: got a batch of 1"),
        (lambda: offset_scores(X.long(), X, W, W, Layout(4)), "x_query: got torch.int64"),
        (lambda: offset_scores(X, X.double(), W, W, Layout(4)), "x_key: got torch.float64"),
        (lambda: offset_scores(X, X, W[:6], W, Layout(4)), r"w_query: .*want \(classes 7, chan"),
        (lambda: offset_scores(X, X, W, W[..., :4], Layout(4)), "w_key: projects to 4"),
        (lambda: offset_scores(X, X, W[0, :2], W, Layout(4)), r"w_query: .*want \(channels 3"),
        (lambda: offset_scores(X, X, W, W, Layout(4), heads=4), "heads: got 4"),
        (lambda: offset_scores(X, X, W, W, Layout(4), bias_key=X[0, 0]), r"bias_key: got shape"),
        (lambda: offset_scores(X, X, None, W, Layout(4), bias_query=X), "bias_query: needs w_"),
        (lambda: offset_scores(X, X, W, W, Layout(4), backend="fast"), "backend: got 'fast'"),
        (lambda: offset_mix(X, X, W, Layout(4)), r"a: got shape \(2, 4, 3\)"),
        (lambda: offset_mix(torch.zeros(2, 4, 4, 4), X, W, Layout(4)), "a: got 4 heads"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_classes_in_parts(rows, monkeypatch):
    """A class with more rows than are computed at once, and two classes of equal size in a call."""
    layout = Layout((3, 3), prefix=1)
    leaves = [torch.randn(2, 10, 4, dtype=torch.float64)]
    leaves += [torch.randn(layout.classes, 4, 6, dtype=torch.float64) for _ in "qkv"]
    leaves += [torch.randn(layout.classes, 6, dtype=torch.float64) for _ in "qkv"]

    def run():
        x, wq, wk, wv, bq, bk, bv = live = graded(leaves)
        s = offset_scores(
            x, x, wq, wk, layout, heads=2, bias_query=bq, bias_key=bk, backend="torch"
        )
        y = offset_mix(s.softmax(-1), x, wv, layout, bias_value=bv, backend="torch")
        return [y, *torch.autograd.grad(y.square().sum(), live)]

    whole = run()
    monkeypatch.setattr(backends.torch.groups, "ROWS", rows)
    for module in (backends.torch.groups, backends.torch.offset):
        monkeypatch.setattr(module, "ELEMENTS", 1)
    close(run(), whole)


@pytest.mark.parametrize("table", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numbers", [1, 200, 1000])
def test_half_precision_in_calls_of_any_size(numbers, table, monkeypatch):
    """From one class in parts up to eight classes in a call: of the float64 result, as exact as
    the rounding of q, k, v and of what is returned."""
    layout = Layout((3, 4), prefix=1)
    exact = [torch.randn(3, 13, 8).bfloat16().double()]
    exact += [torch.randn(layout.classes, 8, 8).bfloat16().double() for _ in "qkv"]
    exact += [torch.randn(layout.classes, 8).bfloat16().double() for _ in "qkv"]

    def run(dtype, table):
        leaves = [t.to(table if i else dtype) for i, t in enumerate(exact)]
        x, wq, wk, wv, bq, bk, bv = live = graded(leaves)
        s = offset_scores(
            x, x, wq, wk, layout, heads=2, bias_query=bq, bias_key=bk, scale=0.1, backend="torch"
        )
        a = s.softmax(-1)
        y = offset_mix(a, x, wv, layout, bias_value=bv, backend="torch")
        return [s, y, *torch.autograd.grad(y, live, torch.ones_like(y))]

    want = run(torch.float64, torch.float64)
    monkeypatch.setattr(backends.torch.groups, "ROWS", 6)
    for module in (backends.torch.groups, backends.torch.offset):
        monkeypatch.setattr(module, "ELEMENTS", numbers)
    for got, w in zip(run(torch.bfloat16, table), want, strict=True):
        error = (got.double() - w).norm() / w.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps, error
