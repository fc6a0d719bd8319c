"""Grouped key and value heads: against a loop over heads, and against layers with all heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import layouts
from torch import nn

from translution import (
    AlphaTranslution1d,
    SelfAttention,
    Translution1d,
    Translution2d,
    create_model,
    gpt,
    register_mixer,
    vit,
)
from translution.models.generation import generate
from translution.models.pretrained import Pretrained
from translution.utils.measuring import multiply_adds

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "none": lambda **k: SelfAttention(12, 7, heads=4, causal=True, **k),
    "rotary": lambda **k: SelfAttention(
        12, 7, heads=4, head_dim=4, position="rotary", window=2, **k
    ),
    "bias": lambda **k: SelfAttention(12, 7, heads=4, position="bias", **k),
    "no tables": lambda **k: Translution1d(12, 7, heads=4, relative="", causal=True, **k),
    "q": lambda **k: Translution1d(12, 7, heads=4, relative="q", init="independent", **k),
    "alpha": lambda **k: AlphaTranslution1d(12, 7, heads=4, rank=2, init="independent", **k),
    "alpha rotary": lambda **k: AlphaTranslution1d(
        12, 7, heads=4, head_dim=4, rank=2, relative="v", position="rotary", causal=True, **k
    ),
}


def same(got, want, tol=1e-11):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def head_by_head(layer, layout, x, mask):
    """Ordinary attention with a loop over the query heads, each with its key and value head."""
    query = x[:, : layout.prefix] if layout.prefix_queries else x
    d, share = layer.head_dim, layer.heads // layer.kv_heads
    seen = layout.index >= 0
    seen = seen if mask is None else seen & mask
    heads = []
    for h in range(layer.heads):
        g = h // share
        q = query @ layer.q_proj.weight[h * d : (h + 1) * d].T
        k = x @ layer.k_proj.weight[g * d : (g + 1) * d].T
        v = x @ layer.v_proj.weight[g * d : (g + 1) * d].T
        e = (q @ k.mT / d**0.5).exp() * seen
        total = e.sum(-1, keepdim=True)
        heads.append(torch.where(total > 0, e / total.clamp(min=1e-300), 0.0) @ v)
    return layer.o_proj(torch.cat(heads, -1))


@settings(max_examples=30)
@given(layouts(most=3), st.sampled_from([(2, 1), (4, 2), (6, 2), (6, 3), (3, 3)]), st.booleans())
def test_equals_the_loop_over_heads(case, heads, masked):
    keywords, input_grid = case
    layer = SelfAttention(
        6, keywords["grid"], heads[0], 4, kv_heads=heads[1], **DOUBLE,
        **{name: value for name, value in keywords.items() if name != "grid"},
    )  # fmt: skip
    layout = layer.layout.at(input_grid)
    x = torch.randn(2, layout.tokens, 6, **DOUBLE)
    mask = torch.rand(2, layout.n_queries, layout.n_keys) > 0.4 if masked else None
    given_mask = None if mask is None else mask[:, None]
    want = head_by_head(layer, layout, x, mask)
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    slow, a = layer(x, grid=input_grid, mask=given_mask, return_weights=True)
    assert a.shape[1] == heads[0]
    for y in (slow, layer(x, grid=input_grid, mask=given_mask)):
        same(y, want)
        same(torch.autograd.grad(y.square().sum(), parameters), wanted, 1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_layer_whose_heads_are_repeated(name, kv_heads):
    layer, whole = LAYERS[name](kv_heads=kv_heads).double(), LAYERS[name]().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = layer.state_dict()
    d = layer.head_dim
    for key in ("k_proj.weight", "v_proj.weight"):
        assert state[key].shape == (kv_heads * d, 12)
        rows = [state[key][h // (4 // kv_heads) * d :][:d] for h in range(4)]
        state[key] = torch.cat(rows)
    whole.load_state_dict(state)
    x = torch.randn(2, 7, 12, **DOUBLE)
    y, want = layer(x), whole(x)
    same(y, want)
    same(layer(x, return_weights=True), whole(x, return_weights=True))
    up = torch.randn_like(y)
    got = dict(zip(state, torch.autograd.grad(y, list(layer.parameters()), up), strict=True))
    wanted = dict(zip(state, torch.autograd.grad(want, list(whole.parameters()), up), strict=True))
    for key, grad in wanted.items():
        if key in ("k_proj.weight", "v_proj.weight"):
            grad = grad.view(kv_heads, 4 // kv_heads, d, 12).sum(1).flatten(0, 1)
        same(got[key], grad, 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_all_heads_change_no_bit(name):
    x, made = torch.randn(2, 7, 12), []
    for more in ({}, {"kv_heads": 4}):
        torch.manual_seed(0)
        layer = LAYERS[name](**more)
        made.append([*layer.parameters(), layer(x), *layer(x, return_weights=True)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


MODELS = [
    {"mixer": "attention"},
    {"mixer": "attention", "position": "bias", "window": 3},
    {"mixer": "rotary"},
    {"mixer": "rotary", "buckets": 3, "dilation": 2},
    {"mixer": "bias", "buckets": 3},
    {"mixer": "translution", "relative": "q"},
    {"mixer": "alpha", "rank": 2},
]


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_generation_keeps_as_many_heads(options, kv_heads):
    sizes = {"context": 10, "vocab_size": 11, "dim": 8, "depth": 2, "heads": 4, "head_dim": 4}
    torch.manual_seed(0)
    model = gpt(kv_heads=kv_heads, **sizes, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids, caches = torch.randint(0, 11, (2, 10)), model.make_caches()
    parts = [model(part, caches) for part in ids.split([4, 1, 1, 3, 1], 1)]
    same(torch.cat(parts, 1), model(ids))
    for cache in caches:
        for name in "kv":
            _, rows = cache._buffers[name]
            assert rows.shape[-1] == kv_heads * 4
    made = [
        torch.stack(list(generate(model, ids[:, :3], 12, temperature=0, cache=cache)))
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_models_by_name_and_from_a_folder(tmp_path):
    model = create_model(
        "rotary_gpt_tiny", context=8, vocab_size=11, dim=16, depth=1, heads=4, kv_heads=2
    )
    ids = torch.randint(0, 11, (2, 8))
    model.save_pretrained(tmp_path / "text")
    again = Pretrained.from_pretrained(tmp_path / "text")
    assert again.config.kv_heads == 2
    assert torch.equal(again(ids), model(ids))
    images = vit(
        mixer="alpha", kv_heads=1, image_size=8, patch_size=4, dim=8, depth=2, heads=2,
        relative_depth=1, num_classes=3,
    )  # fmt: skip
    assert [block.mixer.k_proj.out_features for block in images.blocks] == [4, 4]
    assert images(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    with torch.device("meta"):
        counted = gpt(mixer="attention", context=8, vocab_size=11, dim=16, heads=4, kv_heads=2)
        fewer = multiply_adds(lambda: counted(ids.to("meta")))
        whole = gpt(mixer="attention", context=8, vocab_size=11, dim=16, heads=4)
        more = multiply_adds(lambda: whole(ids.to("meta")))
    assert more - fewer == ids.numel() * counted.config.depth * 2 * 16 * 8  # of k_proj and v_proj


def test_a_mixer_of_ones_own_has_its_own_option(own_names):
    register_mixer("mine", lambda dim, grid, heads, causal, **more: SelfAttention(
        dim, grid, heads, causal=causal, **more
    ))  # fmt: skip
    sizes = {"context": 8, "vocab_size": 11, "dim": 16, "heads": 4, "depth": 1}
    model = gpt(mixer="mine", mixer_options={"kv_heads": 2}, **sizes)
    assert model.blocks[0].mixer.kv_heads == 2
    with pytest.raises(ValueError, match="kv_heads: got 2, but the mixer 'mine' does not use it"):
        gpt(mixer="mine", kv_heads=2, **sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SelfAttention(8, 6, heads=4, kv_heads=3), "kv_heads: got 3, want a divisor of"),
        (lambda: SelfAttention(8, 6, heads=4, kv_heads=8), "kv_heads: got 8, want a divisor of"),
        (lambda: SelfAttention(8, 6, heads=4, kv_heads=0), "kv_heads: got 0, want an int"),
        (lambda: SelfAttention(8, 6, heads=4, kv_heads=2.0), r"kv_heads: got 2\.0, want an int"),
        (
            lambda: Translution2d(8, 6, heads=4, kv_heads=2),
            "kv_heads: got 2 with relative='qkv', but a table of keys or values has all 4 heads",
        ),
        (
            lambda: gpt(mixer="translution", relative="v", dim=8, heads=4, kv_heads=2),
            "kv_heads: got 2 with relative='v'",
        ),
        (
            lambda: vit(mixer="acmix", dim=8, heads=4, kv_heads=2),
            "kv_heads: got 2, but the mixer 'acmix' does not use it",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
