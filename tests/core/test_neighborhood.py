"""Neighbourhoods, attention over them and mixing by given weights, against slow implementations.

The attention is tested for each backend. Without a GPU, Triton's kernels run in its interpreter, on
smaller maps and with fewer examples, since each takes it about half a second.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from translution.apps.bench.flex import flex_neighborhood
from translution.functional import neighborhood_attention, neighborhood_mix
from translution.neighborhoods import Neighborhood, reflect
from translution.utils.measuring import peak_bytes

HALVES = [torch.bfloat16, torch.float16]
CUDA = torch.cuda.is_available()
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
)
BACKENDS = ["torch", TRITON]


def twos(values):
    return st.tuples(values, values)


@st.composite
def areas(draw, most=12):
    return Neighborhood(
        draw(twos(st.integers(1, most))),
        draw(twos(st.sampled_from([1, 3, 5, 7]))),
        draw(twos(st.integers(1, 3))),
        draw(twos(st.integers(1, 3))),
    )


# -- geometry -------------------------------------------------------------------------------------


@given(st.data(), areas())
def test_index_is_what_torch_pads_and_unfolds(data, area):
    down, right = (d * (k - 1) // 2 for d, k in zip(area.dilation, area.kernel, strict=True))
    # torch reflects once only
    size = tuple(data.draw(st.integers(r + 1, r + 6)) for r in (down, right))
    area = Neighborhood(size, area.kernel, area.stride, area.dilation)
    x = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
    wide = F.pad(x, (right, right, down, down), "reflect")
    patches = F.unfold(wide, area.kernel, area.dilation, 0, area.stride)
    assert torch.equal(area.index.T.float(), patches[0])


@given(areas())
def test_index_position_by_position(area):
    """Maps of any size, also those that torch cannot reflect."""
    index = area.index.view(*area.out, *area.kernel)
    assert area.out == tuple(-(-n // s) for n, s in zip(area.size, area.stride, strict=True))

    def walked(place, size):
        """Step by step along the line, turning round at its ends."""
        at, way = 0, 1
        for _ in range(abs(place)):  # the line is its own mirror image
            if size == 1:
                return 0
            way = 1 if at == 0 else -1 if at == size - 1 else way
            at += way
        return at

    for i, j in itertools.product(*map(range, area.out)):
        for a, b in itertools.product(*map(range, area.kernel)):
            row = i * area.stride[0] + (a - area.kernel[0] // 2) * area.dilation[0]
            column = j * area.stride[1] + (b - area.kernel[1] // 2) * area.dilation[1]
            want = walked(row, area.size[0]) * area.size[1] + walked(column, area.size[1])
            assert index[i, j, a, b] == want


def test_reflect():
    line = [reflect(place, 4) for place in range(-7, 11)]
    assert line == [1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert {reflect(place, 1) for place in range(-3, 4)} == {0}


@given(areas())
def test_tiles_hold_each_query_once_and_each_pair_as_often_as_it_is(area):
    tiles = area.tiles(torch.device("cpu"), torch.float64)
    queries = tiles.query_index.view(tiles.count, tiles.queries)
    keys = tiles.key_index.view(tiles.count, tiles.keys)
    times = torch.zeros(area.out[0] * area.out[1], area.size[0] * area.size[1])
    used = torch.ones(queries.numel()) if tiles.used is None else tiles.used.flatten()
    for (tile, row), at in zip(
        itertools.product(range(tiles.count), range(tiles.queries)), used.tolist(), strict=True
    ):
        if at:
            times[queries[tile, row]].index_add_(
                0, keys[tile], tiles.log_times[tile, row].exp().float()
            )
    want = torch.zeros_like(times)
    want.scatter_add_(1, area.index, torch.ones_like(area.index, dtype=torch.float32))
    torch.testing.assert_close(times, want)
    slots = tiles.query_slot
    assert torch.equal(tiles.query_index[slots], torch.arange(len(slots)))


@pytest.mark.parametrize("side", ["queries", "keys"])
@given(areas(), st.sampled_from([1, 4, 16]), st.sampled_from([1, 16]))
def test_blocks_hold_each_position_once_and_each_pair_as_often_as_it_is(side, area, rows, step):
    blocks = area.blocks(side, rows, step)
    assert blocks.rows.shape[1] <= rows
    assert blocks.times.shape == (*blocks.rows.shape, blocks.others.shape[1])
    queries, places = area.out[0] * area.out[1], area.size[0] * area.size[1]
    want = torch.zeros(queries, places)
    want.scatter_add_(1, area.index, torch.ones_like(area.index, dtype=torch.float32))
    want = want if side == "queries" else want.T
    times, met = torch.zeros_like(want), []
    for tile, row in (blocks.rows >= 0).nonzero().tolist():
        place = int(blocks.rows[tile, row])
        met.append(place)
        times[place].index_add_(0, blocks.others[tile], blocks.times[tile, row])
    assert sorted(met) == list(range(len(want)))
    torch.testing.assert_close(times, want)


@pytest.mark.parametrize("side", ["queries", "keys"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_blocks_share_what_they_see(side, stride, dilation):
    """A tile of 8×8 meets 10×10 of the other side, and more or fewer by the stride."""
    blocks = Neighborhood.of(64, 3, stride, dilation).blocks(side, 64, 32)
    step = stride // math.gcd(stride, dilation)
    each = (8 + 2) * step if side == "queries" else (8 + 2) // step
    assert blocks.others.shape[1] <= each**2


# -- the operators --------------------------------------------------------------------------------


def attention(q, k, v, area, scale=None):
    """In float64 (or what comes), with a copy of every neighbourhood."""
    index = area.index
    k, v = (x.flatten(2, 3)[:, :, index] for x in (k, v))  # [batch, heads, queries, taps, channels]
    flat = q.flatten(2, 3)
    s = (flat[..., None, :] * k).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (s.softmax(-1)[..., None] * v).sum(-2).unflatten(2, area.out)


def mix(weights, value, area):
    """In float64 (or what comes), with a copy of every neighbourhood."""
    groups = weights.shape[1]
    seen = value.flatten(2)[:, :, area.index].transpose(2, 3)  # [batch, channels, taps, queries]
    w = weights.flatten(3)[:, torch.arange(value.shape[1]) % groups]
    return (w * seen).sum(2).unflatten(2, area.out)


def library(operator, area):
    return lambda *x, **more: operator(
        *x, area.kernel, stride=area.stride, dilation=area.dilation, **more
    )


def attention_inputs(area, batch=2, heads=2, dim=3, channels=4, dtype=torch.float64):
    return [
        torch.randn(batch, heads, *size, c, dtype=torch.float64).to(dtype)
        for size, c in ((area.out, dim), (area.size, dim), (area.size, channels))
    ]


def mix_inputs(area, batch=2, groups=2, each=2, dtype=torch.float64):
    return [
        torch.randn(batch, groups, area.taps, *area.out, dtype=torch.float64).to(dtype),
        torch.randn(batch, groups * each, *area.size, dtype=torch.float64).to(dtype),
    ]


def run(call, leaves):
    """The output and every gradient, from one random upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = call(*leaves)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, leaves, up.to(y))]


def agree(got, want, rtol=1e-10):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        scale = float(w.detach().abs().max()) if w.numel() else 0.0
        torch.testing.assert_close(g.to(w), w, rtol=0, atol=rtol * max(scale, 1))


class Kind(NamedTuple):
    """An operator, a slow implementation, a maker of inputs, and how it is tested here."""

    operator: Any
    slow: Any
    make: Any
    most: int  # positions along a side of its maps
    examples: int = 20
    heads: int = 3  # at most
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-10

    def inputs(self, area, dtype=None, **shape):
        return [x.to(self.device) for x in self.make(area, dtype=dtype or self.dtype, **shape)]

    def agree(self, got, want, rtol=0.0):
        agree(got, want, max(rtol, self.rtol))


def attention_by(backend):
    call = functools.partial(neighborhood_attention, backend=backend)
    if backend == "torch":
        return Kind(call, attention, attention_inputs, 12)
    if CUDA:  # where it does not compute in float64
        return Kind(call, attention, attention_inputs, 12, 20, 3, "cuda", torch.float32, 1e-4)
    return Kind(call, attention, attention_inputs, 6, examples=8, heads=2)


KINDS = {
    "attention": attention_by("torch"),
    "attention by triton": attention_by("triton"),
    "mix": Kind(neighborhood_mix, mix, mix_inputs, 12),
}
NAMES = ["attention", pytest.param("attention by triton", marks=TRITON.marks), "mix"]


def examples(name, number):
    """Runs a property on so many examples, or on a third of them in Triton's slow interpreter."""
    number = number // 3 if "triton" in name and not CUDA else number
    return lambda test: settings(max_examples=number)(given(st.data())(test))()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_the_oracle(backend):
    kind = attention_by(backend)

    @settings(max_examples=kind.examples)
    @given(
        areas(kind.most), st.integers(0, 2), st.integers(1, kind.heads), st.integers(1, 4),
        st.integers(1, 4), st.sampled_from([None, 0.0, 1.5]),
    )  # fmt: skip
    def check(area, batch, heads, dim, channels, scale):
        leaves = kind.inputs(area, batch=batch, heads=heads, dim=dim, channels=channels)
        kind.agree(
            run(lambda *x: library(kind.operator, area)(*x, scale=scale), leaves),
            run(lambda *x: attention(*x, area, scale), leaves),
        )

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dim", "channels"), [(16, 32), (33, 5), (1, 64)])
def test_heads_of_any_width(backend, dim, channels):
    kind, area = attention_by(backend), Neighborhood((4, 5), (3, 3))
    leaves = kind.inputs(area, batch=1, dim=dim, channels=channels)
    kind.agree(
        run(library(kind.operator, area), leaves), run(lambda *x: attention(*x, area), leaves)
    )


@given(areas(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3))
def test_mix_is_the_oracle(area, batch, groups, each):
    leaves = mix_inputs(area, batch, groups, each)
    agree(run(library(neighborhood_mix, area), leaves), run(lambda *x: mix(*x, area), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_no_worse_than_eager(name, dtype):
    kind = KINDS[name]

    @settings(max_examples=12 if kind.examples == 20 else 4)
    @given(areas(kind.most))
    def check(area):
        leaves = kind.inputs(area, dtype, batch=1)
        want = run(lambda *x: kind.slow(*x, area), [x.double() for x in leaves])
        eager = run(lambda *x: kind.slow(*x, area), leaves)
        got = run(library(kind.operator, area), leaves)
        for g, e, w in zip(got, eager, want, strict=True):
            assert g.dtype == dtype
            off, allowed = ((x.double() - w).abs().max() for x in (g, e))
            # The result is rounded, and so is y, which the backward pass reads. In float32 the two
            # terms of softmax's derivative are rounded as well; their difference may be zero, as
            # it is exactly in eager mode with one tap. (For half precision they are float32.)
            # Triton also rounds the weights and the scores' gradients before it multiplies them,
            # as flash attention does, and the largest terms may cancel.
            roundings = 20 if dtype not in HALVES else 8 if "triton" in name else 2
            bound = roundings * torch.finfo(dtype).eps * w.abs().max().clamp(min=1)
            assert off <= allowed + bound, (off, allowed, bound)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    kind, area = KINDS[name], Neighborhood((5, 4), (3, 3))
    leaves = kind.inputs(area, torch.float32)
    want = library(kind.operator, area)(*leaves)
    with torch.autocast(kind.device, torch.bfloat16):
        got = library(kind.operator, area)(*leaves)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name):
    kind, area = KINDS[name], Neighborhood((6, 5), (5, 3), (2, 1), (1, 2))
    one_head = {} if name == "mix" else {"heads": 1}
    operator, leaves = kind.operator, kind.inputs(area, **one_head)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in leaves]
    spread = [x.repeat_interleave(2, 0)[::2] for x in leaves]
    want = run(library(operator, area), leaves)
    for other in (turned, spread):
        live = [x.detach().requires_grad_() for x in other]
        y = library(operator, area)(*live)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        strided = up.to(y).transpose(-1, -2).contiguous().transpose(-1, -2)
        kind.agree([y, *torch.autograd.grad(y, live, strided)], want)
    # one number for all
    live = [x.detach().requires_grad_() for x in leaves]
    y = library(operator, area)(*live)
    ones = torch.ones_like(y)
    one_by_one = torch.autograd.grad(y.sum(), live, retain_graph=True)
    kind.agree(one_by_one, torch.autograd.grad(y, live, ones))


@pytest.mark.parametrize("numbers", [1, 30_000, 10**9])
@pytest.mark.parametrize("size", [(20, 17), (3, 2)])
def test_chunks_change_nothing(size, numbers, monkeypatch):
    """From one sample at a time to all at once."""
    area = Neighborhood(size, (5, 7), (1, 2), (2, 1))
    leaves = attention_inputs(area, batch=3, heads=2)
    want = run(library(neighborhood_attention, area), leaves)
    held = {"cpu": numbers, "cuda": numbers}
    monkeypatch.setattr("translution.backends.torch.neighborhood.ELEMENTS", held)
    agree(run(library(neighborhood_attention, area), leaves), want, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    kind, area = attention_by(backend), Neighborhood((7, 7), (5, 5))
    leaves = kind.inputs(area, batch=1, heads=1)
    leaves[0] = leaves[0] * 1e4
    got = run(library(kind.operator, area), leaves)
    if kind.dtype == torch.float32:  # scores of 1e4 have lost too many digits to compare
        assert all(x.isfinite().all() for x in got)
    else:
        agree(got, run(lambda *x: attention(*x, area), leaves), 1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_on_every_run(backend, dtype):
    kind, area = attention_by(backend), Neighborhood((7, 6), (5, 3), (1, 2))
    leaves = kind.inputs(area, dtype, heads=1)
    first, second = (run(library(kind.operator, area), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(backend, wanted):
    kind, area = attention_by(backend), Neighborhood((3, 4), (3, 3))
    leaves = kind.inputs(area, batch=1)
    _, *want = run(library(kind.operator, area), leaves)
    live = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
    y = library(kind.operator, area)(*live)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(up.to(y))
    for i, (x, w) in enumerate(zip(live, want, strict=True)):
        if i in wanted:
            kind.agree([x.grad], [w])
        else:
            assert x.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_opcheck(name):
    kind, area = KINDS[name], Neighborhood((3, 4), (3, 5), (2, 1), (1, 2))
    leaves = [x.requires_grad_() for x in kind.inputs(area, batch=1)]
    if kind.dtype == torch.float64:
        call = library(kind.operator, area)
        assert torch.autograd.gradcheck(call, leaves, fast_mode="triton" in name)
    more = [list(area.kernel), list(area.stride), list(area.dilation)]
    if name == "mix":
        raw = torch.ops.translution.neighborhood_mix.default
    else:
        raw = torch.ops.translution.neighborhood_attention.default
        more += [0.7, "triton" if "triton" in name else "torch"]
    torch.library.opcheck(raw, (*leaves, *more))


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    torch._dynamo.reset()
    kind = KINDS[name]
    for size in ((6, 5), (4, 7)):
        area = Neighborhood(size, (3, 3), (2, 2))
        leaves = kind.inputs(area)
        call = library(kind.operator, area)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        agree(run(compiled, leaves), run(call, leaves), 1e-12)


@pytest.mark.parametrize(
    ("operator", "make"),
    [(neighborhood_attention, attention_inputs), (neighborhood_mix, mix_inputs)],
)
def test_meta(operator, make):
    area = Neighborhood((5, 4), (3, 3), (2, 2))
    leaves = make(area)
    y = library(operator, area)(*leaves)
    assert library(operator, area)(*(x.to("meta") for x in leaves)).shape == y.shape


def test_no_copy_of_the_neighbourhoods():
    area = Neighborhood((28, 28), (7, 7))
    cpu = torch.device("cpu")

    def peak(kind):
        operator, make = KINDS[kind].operator, KINDS[kind].make
        shape = {"heads": 4, "dim": 32, "channels": 32} if kind == "attention" else {"each": 64}
        leaves = [x.requires_grad_() for x in make(area, dtype=torch.float32, **shape)]

        def step():
            library(operator, area)(*leaves).sum().backward()
            for x in leaves:
                x.grad = None

        step()  # tables of the geometry are made once
        return peak_bytes(step, cpu), sum(x.numel() for x in leaves[1:]) * 4

    found, keys_and_values = peak("attention")
    assert found < 49 * keys_and_values / 4
    found, values = peak("mix")
    assert found < 49 * values / 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (2, 4, 4, 3)}, r"query: got torch.float32 of shape \(2, 4, 4, 3\), want"),
        ({"query": (1, 2, 3, 4, 3)}, r"query: got shape \(1, 2, 3, 4, 3\), want \(1, 2, 4, 4, 3\)"),
        ({"query": (1, 2, 4, 4, 5)}, r"query: got shape \(1, 2, 4, 4, 5\), want \(1, 2, 4, 4, 3\)"),
        ({"key": torch.zeros(1, 2, 4, 4, 3).double()}, "key: got torch.float64"),
        ({"key": torch.zeros(1, 2, 4, 4, 3, dtype=torch.int64)}, "key: got torch.int64"),
        ({"value": (1, 2, 4, 5, 3)}, r"value: got shape \(1, 2, 4, 5, 3\), want \(1, 2, 4, 4\)"),
        ({"key": (1, 2, 0, 4, 3)}, "key: got a map of 0×4, want at least 1×1"),
        ({"kernel_size": 4}, "kernel_size: got 4, want odd sizes"),
        ({"kernel_size": (3, 0)}, r"kernel_size: got \(3, 0\), want an int of at least 1"),
        ({"kernel_size": True}, "kernel_size: got True"),
        ({"stride": 0}, "stride: got 0, want an int of at least 1"),
        ({"dilation": (1, 2, 3)}, "dilation: got"),
        ({"dilation": 1.5}, "dilation: got 1.5"),
        ({"backend": "fast"}, "backend: got 'fast' for torch.float32 on cpu: there is no such"),
    ],
)
def test_attentions_errors(change, message):
    arguments = dict.fromkeys(("query", "key", "value"), (1, 2, 4, 4, 3)) | {"kernel_size": 3}
    arguments |= change
    for name in ("query", "key", "value"):
        if isinstance(arguments[name], tuple):
            arguments[name] = torch.zeros(arguments[name])
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


@pytest.mark.parametrize(
    ("weights", "value", "message"),
    [
        ((1, 2, 9, 4, 4), (4, 4, 4), r"value: got torch.float32 of shape \(4, 4, 4\), want"),
        ((1, 2, 8, 4, 4), (1, 4, 4, 4), r"weights: got .* \(1, 2, 8, 4, 4\), want .* taps 9, 4, 4"),
        ((2, 9, 4, 4), (1, 4, 4, 4), r"weights: got .* \(2, 9, 4, 4\), want"),
        ((1, 3, 9, 4, 4), (1, 4, 4, 4), "weights: got 3 groups, want a divisor of the 4 channels"),
        ((1, 0, 9, 4, 4), (1, 4, 4, 4), "weights: got 0 groups"),
        ((1, 2, 9, 4, 4), (1, 4, 4, 0), "value: got a map of 4×0, want at least 1×1"),
        ((1, 2, 9, 4, 4), torch.zeros(1, 4, 4, 4).double(), "weights: got torch.float32"),
    ],
)
def test_mixes_errors(weights, value, message):
    value = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        neighborhood_mix(torch.zeros(weights), value, 3)


# -- Triton's kernels as they are compiled --------------------------------------------------------


@TRITON.marks[0]
@pytest.mark.parametrize(("rows", "others"), [(16, 16), (16, 64), (64, 32)])
def test_other_block_sizes_change_nothing(rows, others, monkeypatch):
    from translution.backends.triton import neighborhood

    kind, area = attention_by("triton"), Neighborhood((9, 8), (5, 7), (1, 2), (2, 1))
    leaves = kind.inputs(area, batch=1)
    block = neighborhood.BlockSizes(rows, others, 4, 1)
    monkeypatch.setattr(neighborhood, "block_sizes", lambda *_: block)
    kind.agree(
        run(library(kind.operator, area), leaves), run(lambda *x: attention(*x, area), leaves)
    )


@TRITON.marks[0]
def test_many_reflections_count():
    """More than a byte holds, on maps that are reflected again and again."""
    kind, area = attention_by("triton"), Neighborhood((1, 2), (3, 131))
    leaves = kind.inputs(area, batch=1)
    kind.agree(
        run(library(kind.operator, area), leaves), run(lambda *x: attention(*x, area), leaves)
    )


# -- what it is compared with ---------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (2, 4)])
@pytest.mark.parametrize(
    "area",
    [
        Neighborhood((7, 9), (5, 3), (1, 2), (2, 1)),
        Neighborhood((2, 3), (7, 7)),
        Neighborhood((6, 5), (3, 3), (2, 2)),
    ],
    ids=["dilated", "tiny", "strided"],
)
def test_flex_attention_with_reflection_is_the_operator(area, tile):
    leaves = attention_inputs(area, dim=16, channels=16, dtype=torch.float32)
    want = library(neighborhood_attention, area)(*leaves)
    torch.testing.assert_close(flex_neighborhood(*leaves, area, tile=tile), want)
    want = library(neighborhood_attention, area)(*leaves, scale=0.7)
    torch.testing.assert_close(flex_neighborhood(*leaves, area, 0.7, tile), want)
