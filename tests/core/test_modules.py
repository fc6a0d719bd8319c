"""The modules: against the oracle, the identities of the paper, and bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layouts import layouts
from torch import nn

import oracle
import translution
from translution import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    Convolution2d,
    Layout,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
)
from translution.functional import offset_mix

SUBSETS = ["".join(s) for n in range(4) for s in itertools.combinations("qkv", n)]
OPERATORS = {
    "Translution": {1: Translution1d, 2: Translution2d, 3: Translution3d},
    "Alpha": {1: AlphaTranslution1d, 2: AlphaTranslution2d},
}


def build(family, case, relative, init="independent", **more):
    keywords, input_grid = case
    keywords = dict(keywords)
    grid = keywords.pop("grid")
    make = OPERATORS[family][len(grid)]
    more = {"heads": 2, "head_dim": 4, "relative": relative, "init": init} | keywords | more
    module = make(6, grid[0] if len(grid) == 1 else grid, **more).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    layout = module.layout.at(input_grid)
    x = torch.randn(2, layout.tokens, 6, dtype=torch.float64)
    return module, layout, x, input_grid


def tail(module, a, y):
    return module.o_proj(y), a


def table_of(proj):
    """(weight [in, out] or [classes, in, out], bias) of a projection, shared or relative."""
    if isinstance(proj, nn.Linear):
        return proj.weight.t(), proj.bias
    return proj.weight, proj.bias


def slow_translution(module, layout, x, mask=None):
    index = layout.index
    query = x[:, : layout.prefix] if layout.prefix_queries else x
    (wq, bq), (wk, bk), (wv, bv) = (table_of(getattr(module, f"{name}_proj")) for name in "qkv")
    if module.position == "rotary":
        places = [None] * layout.prefix + [tuple(p) for p in layout.positions().tolist()]

        def turn(x, w, b, places):
            x = oracle.project(x, 0, w, b).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            return oracle.rotate(x, places).transpose(1, 2).flatten(2)

        query, wq, bq = turn(query, wq, bq, places[: query.shape[1]]), None, None
        key, wk, bk = turn(x, wk, bk, places), None, None
    else:
        key = x
    s = oracle.scores(query, key, wq, wk, index, module.heads, bq, bk, module.head_dim**-0.5)
    a = oracle.softmax(s, mask)
    return tail(module, a, oracle.mix(a, x, wv, index, bv))


def slow_alpha(module, layout, x, mask=None):
    index, heads, relative = layout.index, module.heads, module.relative
    query = x[:, : layout.prefix] if layout.prefix_queries else x
    s = oracle.scores(
        query, x, table_of(module.q_proj)[0], table_of(module.k_proj)[0], index, heads
    )
    scale = module.head_dim**-0.5

    def table(name):
        return table_of(getattr(module, f"{name}_table"))[0] if name in relative else None

    if set(relative) & set("qk"):
        s2 = oracle.scores(
            module.q_down(query), module.k_down(x), table("q"), table("k"), index, heads
        )
        s = (s + s2) / 2
    a = oracle.softmax(s * scale, mask)
    y = oracle.mix(a, x, table_of(module.v_proj)[0], index)
    if "v" in relative:
        low = oracle.mix(a, module.v_down(x), table("v"), index)
        y = (y + low @ module.v_up.weight.t()) / 2
    return tail(module, a, y)


SLOW = {"Translution": slow_translution, "Alpha": slow_alpha}


def same(got, want, tol=1e-10):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("family", OPERATORS)
@pytest.mark.parametrize("relative", SUBSETS)
@given(layouts(most=3), st.booleans(), st.booleans())
def test_equals_the_oracle(family, relative, case, masked, bias):
    if family == "Alpha" and len(case[0]["grid"]) == 3:
        return
    module, layout, x, grid = build(family, case, relative, qkv_bias=bias and family != "Alpha")
    mask = torch.rand(2, 1, layout.n_queries, layout.n_keys) > 0.4 if masked else None
    y, a = module(x, grid=grid, mask=mask, return_weights=True)
    want_y, want_a = SLOW[family](module, layout, x, mask)
    same(a, want_a)
    same(y, want_y)
    same(module(x, grid=grid, mask=mask), want_y)
    params = list(module.parameters())
    got = torch.autograd.grad(y.square().sum(), params, allow_unused=True)
    want = torch.autograd.grad(want_y.square().sum(), params, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        same(torch.zeros(()) if g is None else g, torch.zeros_like(g) if w is None else w, 1e-8)


@pytest.mark.parametrize("relative", ["", "v"])
@pytest.mark.parametrize("grid", [(5,), (2, 3)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_rotary_equals_the_oracle(relative, grid, prefix):
    case = ({"grid": grid, "prefix": prefix}, grid)
    module, layout, x, _ = build("Translution", case, relative, position="rotary")
    same(module(x, grid=grid), slow_translution(module, layout, x)[0])


# -- the paper's identities --------------------------------------------------------------------


@pytest.mark.parametrize("relative", SUBSETS)
def test_equal_entries_are_self_attention(relative):
    """Section 3: self-attention is Translution whose matrices do not depend on the offset."""
    module = Translution2d(8, (3, 4), heads=2, relative=relative, prefix=1).double()
    plain = SelfAttention(8, (3, 4), heads=2, prefix=1).double()
    with torch.no_grad():
        plain.o_proj.load_state_dict(module.o_proj.state_dict())
        for name in "qkv":
            weight = table_of(getattr(module, f"{name}_proj"))[0]
            one = weight if weight.ndim == 2 else weight[3]
            assert weight.ndim == 2 or (weight == one).all(), "init='equal' starts there"
            getattr(plain, f"{name}_proj").weight.copy_(one.t())
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    same(module(x), plain(x))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2)])
def test_attention_of_ones_on_a_window_is_convolution(kernel, dilation):
    """Section 3: convolution is Translution with a fixed attention of one on its kernel."""
    height, width, cin, cout = 6, 5, 3, 4
    conv = nn.Conv2d(
        cin, cout, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False
    ).double()
    layout = Layout((height, width), window=kernel // 2, dilation=dilation)
    assert layout.axis_classes == tuple(min(kernel, 2 * ((n - 1) // dilation) + 1) for n in (6, 5))
    # a class is the offset query - key; a kernel's tap reads at query + tap: opposite order
    table = conv.weight.flip(2, 3).permute(2, 3, 1, 0)
    rows = [(kernel - n) // 2 for n in layout.axis_classes]
    table = table[rows[0] : kernel - rows[0], rows[1] : kernel - rows[1]].flatten(0, 1)
    image = torch.randn(2, cin, height, width, dtype=torch.float64)
    x = image.flatten(2).transpose(1, 2)
    ones = torch.ones(2, 1, layout.tokens, layout.tokens, dtype=torch.float64)
    y = offset_mix(ones, x, table, layout)
    same(y.transpose(1, 2).unflatten(2, (height, width)), conv(image))


@pytest.mark.parametrize(
    "module",
    [
        Translution2d(8, 9, heads=2, window=1, init="independent"),
        AlphaTranslution2d(8, 9, heads=2, window=1, init="independent", rank=2),
        SelfAttention(8, 9, heads=2, window=1, position="bias"),
        SelfAttention(8, 9, heads=2, window=1, position="rotary", head_dim=4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_translation_equivariance_away_from_the_border(module):
    module = module.double()
    for p in module.parameters():
        nn.init.normal_(p)
    image = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    moved = image.roll((2, 1), (1, 2))
    out, out_moved = (module(i.flatten(1, 2)).unflatten(1, (9, 9)) for i in (image, moved))
    same(out.roll((2, 1), (1, 2))[:, 3:-1, 2:-1], out_moved[:, 3:-1, 2:-1])


CAUSAL = {
    "translution": lambda **k: Translution1d(8, 7, heads=2, causal=True, **k),
    "alpha": lambda **k: AlphaTranslution1d(8, 7, heads=2, causal=True, rank=2, **k),
    "none": lambda **k: SelfAttention(8, 7, heads=2, causal=True, **k),
    "rotary": lambda **k: SelfAttention(8, 7, heads=2, causal=True, position="rotary", **k),
    "bias": lambda **k: SelfAttention(8, 7, heads=2, causal=True, position="bias", **k),
}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("more", [{}, {"prefix": 2}, {"window": 2}], ids=str)
def test_the_future_does_not_leak(name, more):
    module = CAUSAL[name](**more).double()
    for p in module.parameters():
        nn.init.normal_(p)
    first = more.get("prefix", 0)
    x = torch.randn(1, first + 7, 8, dtype=torch.float64)
    y = module(x)
    for t in range(first, first + 7):
        changed = x.clone()
        changed[:, t] += 1
        moved = (module(changed) - y).abs().amax((0, 2))
        assert (moved[:t] < 1e-12).all()
        assert moved[t] > 1e-6, "a token sees itself"


@pytest.mark.parametrize("family", OPERATORS)
def test_a_smaller_input_is_a_cut_of_the_larger_table(family):
    big = OPERATORS[family][2](8, (4, 5), heads=2, prefix=1, init="independent").double()
    small = OPERATORS[family][2](8, (2, 3), heads=2, prefix=1).double()
    state = dict(big.state_dict())
    rows = [(dy + 3) * 9 + dx + 4 for dy in range(-1, 2) for dx in range(-2, 3)] + [63, 64, 65]
    for key, value in small.state_dict().items():
        if state[key].shape != value.shape:
            state[key] = state[key][rows]
    small.load_state_dict(state)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    same(big(x, grid=(2, 3)), small(x))


def test_a_shorter_sequence_is_the_start_of_a_longer_one():
    module = Translution1d(8, 9, heads=2, causal=True, init="independent").double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    same(module(x[:, :4]), module(x)[:, :4])


def test_buckets_take_sequences_longer_than_the_tables():
    module = Translution1d(8, 16, heads=2, causal=True, buckets=4)
    assert module.q_proj.weight.shape[0] == 5
    assert module(torch.randn(1, 40, 8)).shape == (1, 40, 8)
    with pytest.raises(ValueError, match="made for at most 16"):
        Translution1d(8, 16, heads=2)(torch.randn(1, 17, 8))


@pytest.mark.parametrize("family", OPERATORS)
def test_prefix_queries_are_the_prefix_of_all(family):
    """The last layer before a class token: fewer rows, the same answer for the prefix."""
    whole = OPERATORS[family][2](8, 3, heads=2, prefix=2, init="independent").double()
    last = OPERATORS[family][2](8, 3, heads=2, prefix=2, prefix_queries=True).double()
    own = torch.cat([torch.arange(25, 29), torch.arange(29, 31)])
    state = {
        key: whole.state_dict()[key][own] if value.shape != whole.state_dict()[key].shape
        else whole.state_dict()[key]
        for key, value in last.state_dict().items()
    }  # fmt: skip
    last.load_state_dict(state)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    assert last.layout.classes == 6
    same(last(x), whole(x)[:, :2])


# -- masks, weights, dropout -------------------------------------------------------------------

EVERY = {
    "translution": lambda: Translution2d(8, (2, 3), heads=2, prefix=1),
    "v rotary": lambda: Translution2d(
        8, (2, 3), heads=2, prefix=1, relative="v", position="rotary"
    ),
    "alpha": lambda: AlphaTranslution2d(8, (2, 3), heads=2, prefix=1, rank=2),
    "alpha rotary": lambda: AlphaTranslution2d(8, (2, 3), heads=2, prefix=1, position="rotary"),
    "none": lambda: SelfAttention(8, (2, 3), heads=2, prefix=1),
    "rotary": lambda: SelfAttention(8, (2, 3), heads=2, prefix=1, position="rotary"),
    "bias": lambda: SelfAttention(8, (2, 3), heads=2, prefix=1, position="bias"),
    "window": lambda: SelfAttention(8, (2, 3), heads=2, prefix=1, window=1),
    "grouped": lambda: SelfAttention(8, (2, 3), heads=2, prefix=1, kv_heads=1),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_mask(name):
    module = EVERY[name]().double()
    nn.init.zeros_(module.o_proj.bias)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 2, 7, 7) > 0.3
    mask[0, :, 2] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        y, a = module(x, mask=mask, return_weights=True)
        assert (a[~mask] == 0).all()
        assert (y[0, 2] == 0).all(), "a row that may look nowhere"
        fast = module(x, mask=mask)
        same(fast, y)
        fast.sum().backward()
    assert torch.isfinite(x.grad).all()
    one = torch.ones(7, dtype=torch.bool)
    one[3] = False
    same(module(x, mask=one), module(x, mask=one.expand(2, 2, 7, 7)))


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_what_was_mixed_with(name):
    module = EVERY[name]().double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    y, a = module(x, return_weights=True)
    assert a.shape == (2, 2, 7, 7)
    same(a.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
    same(module(x), y)


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_deepcopy_meta_half(name):
    module = EVERY[name]()
    x = torch.randn(2, 7, 8)
    same(copy.deepcopy(module)(x), module(x), 1e-6)
    other = EVERY[name]()
    other.load_state_dict(module.state_dict())
    same(other(x), module(x), 1e-6)
    with torch.device("meta"):
        empty = EVERY[name]()
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.randn(2, 7, 8, device="meta")).shape == (2, 7, 8)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_a_gradient(name):
    module = EVERY[name]()
    module(torch.randn(2, 7, 8)).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None, key
        if p.ndim == 3:
            dead = (p.grad.flatten(1) == 0).all(1)
            assert not dead.any(), f"{key}: rows {dead.nonzero().flatten().tolist()}"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(name, dynamic):
    torch._dynamo.reset()
    module = EVERY[name]()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 7, 8, requires_grad=True)
        y = compiled(x)
        same(y, module(x), 1e-5)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (want,) = torch.autograd.grad(module(x).sum(), x)
        same(grad, want, 1e-5)
    x = torch.randn(2, 3, 8)
    same(compiled(x, grid=(1, 2)), module(x, grid=(1, 2)), 1e-5)


def test_compile_with_inductor():
    torch._dynamo.reset()
    module = EVERY["translution"]()
    x = torch.randn(2, 7, 8)
    same(torch.compile(module, fullgraph=True)(x), module(x), 1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_export(name):
    module = EVERY[name]().eval()
    x = torch.randn(2, 7, 8)
    dim = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: dim},))
    more = torch.randn(5, 7, 8)
    same(program.module()(more), module(more), 1e-5)


def test_dropout_only_in_training():
    module = Translution1d(8, 6, heads=2, dropout=0.5)
    x = torch.randn(1, 6, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_inits():
    dim = 64
    for init, bound, distinct in [
        ("equal", 1 / 8, 1),
        ("independent", 1 / 8, 9),
        ("published", 1 / 64, 9),
    ]:
        weight = Translution1d(dim, 5, heads=2, init=init).v_proj.weight
        assert 0.9 * bound < weight.abs().max() <= bound
        assert len({float(w) for w in weight[:, 0, 0]}) == distinct


def test_convolution_is_conv2d():
    module = Convolution2d(4, (3, 5), 3).double()
    x = torch.randn(2, 15, 4, dtype=torch.float64)
    image = x.transpose(1, 2).unflatten(2, (3, 5))
    want = module.o_proj(module.conv(image).flatten(2).transpose(1, 2))
    same(module(x), want)
    assert module(torch.randn(1, 4, 4).double(), grid=(2, 2)).shape == (1, 4, 4)


# -- bad input ---------------------------------------------------------------------------------

T = torch.zeros(2, 6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Translution1d(0, 6), "dim: got 0"),
        (lambda: Translution1d(8, 6, heads=3), "heads: got 3, want a divisor of dim 8"),
        (lambda: Translution1d(8, 6, heads=2, head_dim=0), "head_dim: got 0"),
        (lambda: Translution1d(8, 6, relative="qx"), "relative: got 'qx'"),
        (lambda: Translution1d(8, 6, relative="qq"), "relative: got 'qq'"),
        (lambda: Translution1d(8, 6, relative=None), "relative: got None"),
        (lambda: Translution1d(8, 6, dropout=1.0), "dropout: got 1.0"),
        (lambda: Translution1d(8, 6, init="zeros"), "init: got 'zeros'"),
        (lambda: Translution1d(8, (2, 3)), r"grid: got \(2, 3\), want 1 sizes"),
        (lambda: Translution2d(8, (2, 3), causal=True), "causal: needs a grid of one axis"),
        (lambda: Translution1d(8, 6, position="rotary"), "position: got 'rotary' with relative"),
        (
            lambda: Translution2d(8, 6, head_dim=6, relative="v", position="rotary"),
            "head_dim: got 6",
        ),
        (lambda: AlphaTranslution1d(8, 6, rank=0), "rank: got 0"),
        (lambda: SelfAttention(8, 6, position="absolute"), "position: got 'absolute'"),
        (lambda: Convolution2d(8, 6, 2), "kernel_size: got 2"),
        (lambda: Convolution2d(8, 6)(T), r"x: got shape \(2, 6, 8\), want \(batch, 36"),
        (lambda: Translution1d(8, 6)(T[0]), r"x: got \(6, 8\), want \(batch, tokens, dim 8\)"),
        (lambda: Translution1d(8, 6)(T.long()), "x: got torch.int64"),
        (lambda: Translution1d(8, 6)([1]), "x: got list"),
        (lambda: Translution1d(8, 5)(T), "grid: got 6 tokens on axis 0"),
        (lambda: Translution2d(8, (2, 2))(T), r"x: got 6 tokens, want 4 for the grid \(2, 2\)"),
        (lambda: Translution2d(8, (2, 2))(T, grid=(2, 3)), "grid: got 3 tokens on axis 1"),
        (lambda: Translution2d(8, (2, 3))(T, grid=(6,)), r"grid: got \(6,\)"),
        (lambda: Translution1d(8, 6)(T, mask=torch.ones(6, 6)), "mask: got torch.float32"),
        (lambda: Translution1d(8, 6)(T, mask=T[0, :5, :6].bool()), r"mask: got shape \(5, 6\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (translution.Translution2d(8, 2, heads=2), (1, 4, 8)),
        (translution.SelfAttention(8, 4, heads=2), (1, 4, 8)),
        (translution.ReducedACmix2d(8, 2, heads=2), (1, 4, 8)),
        (translution.ACmix2d(8, 8, heads=2), (1, 8, 3, 3)),
        (translution.WindowACmix2d(8, heads=2), (1, 8, 3, 3)),
        (translution.PatchwiseACmix2d(8, 8, 2), (1, 8, 3, 3)),
    ],
)
def test_another_dtype_than_the_weights_is_named(module, shape):
    with pytest.raises(ValueError, match=r"x: got torch\.float64, want that of the weights"):
        module(torch.zeros(shape, dtype=torch.float64))
