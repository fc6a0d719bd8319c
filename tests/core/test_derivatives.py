"""Forward mode, vmap and second derivatives of every operator, beside central differences."""

import contextlib

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from translution import (
    ACmix2d,
    AlphaTranslution2d,
    Layout,
    LocalAttention2d,
    PatchwiseACmix2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    WindowACmix2d,
)
from translution.functional import (
    neighborhood_attention,
    neighborhood_mix,
    offset_mix,
    offset_scores,
)

LAYOUTS = {
    "grid": Layout((2, 2)),
    "causal": Layout(3, causal=True),
    "prefix": Layout((1, 2), prefix=1),
    "window": Layout((2, 3), window=1),
    "buckets": Layout(5, buckets=1),
}


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def score_leaves(layout, query_table=True, key_table=True, bias=True):
    tokens, classes = layout.tokens, layout.classes
    sides = []
    for table in (query_table, key_table):
        sides += [
            leaf(2, tokens, 3 if table else 4),
            leaf(classes, 3, 4) if table else None,
            leaf(classes, 4) if table and bias else None,
        ]
    return sides


def scores_of(layout):
    def call(xq, wq, bq, xk, wk, bk):
        s = offset_scores(xq, xk, wq, wk, layout, heads=2, bias_query=bq, bias_key=bk, scale=0.3)
        return s.masked_fill(s.isneginf(), 0.0)  # what is absent is a constant

    return call


def checked(call, leaves, batched_forward=True):
    """Reverse, forward and batched derivatives, and the second ones, beside differences.

    batched_forward: torch checks it with a vmap of its own that few operations have rules for.
    """
    gradcheck(
        call, leaves, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=batched_forward, fast_mode=True,
    )  # fmt: skip
    gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores(name, kinds):
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    leaves = score_leaves(layout, *kinds, bias=name in ("prefix", "causal"))
    checked(scores_of(layout), leaves)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mix(name):
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    a = leaf(2, 2, layout.n_queries, layout.n_keys)
    leaves = [a, leaf(2, layout.n_keys, 3), leaf(layout.classes, 3, 4)]
    if name != "window":
        leaves.append(leaf(layout.classes, 4))
    checked(lambda a, x, w, b=None: offset_mix(a, x, w, layout, bias_value=b), leaves)


def test_neighborhoods():
    torch.manual_seed(0)
    q, k, v = leaf(1, 1, 2, 2, 2), leaf(1, 1, 3, 3, 2), leaf(1, 1, 3, 3, 1)
    checked(lambda q, k, v: neighborhood_attention(q, k, v, 3, stride=2), [q, k, v], False)
    weights, value = leaf(1, 1, 9, 2, 2), leaf(1, 2, 2, 2)
    checked(lambda w, v: neighborhood_mix(w, v, 3), [weights, value])


MODULES = {
    "Translution2d": (lambda: Translution2d(4, (2, 2), 2, init="independent"), (2, 4, 4)),
    "Translution1d, rotary values": (
        lambda: Translution1d(4, 3, 2, relative="v", position="rotary", causal=True), (2, 3, 4),
    ),
    "AlphaTranslution2d": (lambda: AlphaTranslution2d(4, (2, 2), 2, rank=2), (2, 4, 4)),
    "SelfAttention": (lambda: SelfAttention(4, 3, 2, position="bias"), (2, 3, 4)),
    "LocalAttention2d": (lambda: LocalAttention2d(2, 4, 2, 3), (2, 2, 3, 3)),
    "ACmix2d": (lambda: ACmix2d(2, 4, 2, 3), (2, 2, 3, 3)),
    "WindowACmix2d": (lambda: WindowACmix2d(4, 2, 2, 1), (2, 4, 3, 3)),
    "PatchwiseACmix2d": (lambda: PatchwiseACmix2d(2, 4, 2, 2, 3).eval(), (2, 2, 3, 3)),
}  # fmt: skip


@pytest.fixture
def plain_attention():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("name", MODULES)
def test_modules_under_function_transforms(name, plain_attention):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make().double()
    # torch's fused attention has no forward mode, and says so; its plain one has
    plain_attention.enter_context(sdpa_kernel(SDPBackend.MATH))
    x, u = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    y, tangent = jvp(module, (x,), (u,))
    step = 1e-6
    central = (module(x + step * u) - module(x - step * u)) / (2 * step)
    torch.testing.assert_close(tangent, central, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(jacfwd(module)(x), jacrev(module)(x))

    # per sample, and for several models at once
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        alone = grad(loss)(parameters, sample)
        for key, value in alone.items():
            torch.testing.assert_close(each[key][i], value)
    stacked = {key: torch.stack([value, 2 * value]) for key, value in parameters.items()}
    both = vmap(loss, (0, None))(stacked, x[0])
    want = [loss({k: v[i] for k, v in stacked.items()}, x[0]) for i in range(2)]
    torch.testing.assert_close(both, torch.stack(want))


def test_a_hessian_of_a_small_layer():
    torch.manual_seed(0)
    module = Translution1d(2, 2, 1, init="independent").double()
    x = torch.randn(1, 2, 2, dtype=torch.float64)

    def loss(x):
        return module(x).square().sum()

    found = hessian(loss)(x).reshape(4, 4)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found, jacrev(jacrev(loss))(x).reshape(4, 4))
