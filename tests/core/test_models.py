from __future__ import annotations

import copy
import math

import pytest
import torch

import translution
from translution import create_model, gpt, list_models, vit
from translution.models.blocks import IMAGE_MIXERS, MIXERS
from translution.utils.measuring import peak_bytes

TINY = {"dim": 16, "depth": 2, "heads": 2, "head_dim": 8}


def tiny_vit(mixer, **more):
    options = {"image_size": 12, "patch_size": 4} | TINY | more
    return vit(mixer=mixer, num_classes=5, in_channels=1, **options)


def tiny_gpt(mixer, **more):
    return gpt(mixer=mixer, context=9, vocab_size=11, **TINY | more)


MODELS = {f"vit {mixer}": (lambda m=mixer: tiny_vit(m)) for mixer in MIXERS}
MODELS |= {f"vit {m} mean": (lambda m=m: tiny_vit(m, pool="mean")) for m in MIXERS}
MODELS |= {
    f"vit {stem} stem": (lambda s=stem: tiny_vit("translution", stem=s, patch_size=6))
    for stem in ("overlapping", "convolutional")
}
MODELS |= {f"vit {m} hybrid": (lambda m=m: tiny_vit(m, relative_depth=1)) for m in MIXERS}
MODELS |= {f"gpt {m}": (lambda m=m: tiny_gpt(m)) for m in MIXERS if m not in IMAGE_MIXERS}
MODELS |= {
    f"gpt {m} hybrid": (lambda m=m: tiny_gpt(m, relative_depth=1)) for m in ("translution", "alpha")
}


def inputs(model, batch=3):
    if isinstance(model, translution.GPT):
        return torch.randint(0, 11, (batch, 9))
    return torch.randn(batch, 1, 12, 12)


@pytest.mark.parametrize("name", MODELS)
def test_every_model(name):
    """Forward, gradients everywhere, state_dict, deepcopy, meta device, half precision."""
    model = MODELS[name]()
    x = inputs(model)
    y = model(x)
    assert y.shape == ((3, 9, 11) if name.startswith("gpt") else (3, 5))
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        if "proj.weight" in key and p.ndim == 3:
            dead = (p.grad.flatten(1) == 0).all(1)
            assert not dead.any(), f"{key}: rows {dead.nonzero().flatten().tolist()}"
    again = MODELS[name]()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), y)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    with torch.device("meta"):
        empty = MODELS[name]()
        assert empty(x.to("meta")).shape == y.shape
    low = copy.deepcopy(model).bfloat16()
    low_x = x if x.dtype == torch.int64 else x.bfloat16()
    assert torch.isfinite(low(low_x)).all()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("gpt")])
def test_no_gpt_sees_the_future(name):
    model = MODELS[name]().double()
    for block in model.blocks:
        for p in block.mixer.parameters():
            torch.nn.init.normal_(p, std=0.5)
    ids = torch.randint(0, 11, (1, 9))
    y = model(ids)
    for t in range(9):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 11
        moved = (model(changed) - y).abs().amax((0, 2))
        assert (moved[:t] < 1e-12).all()
        assert (moved[t:] > 0).all(), "each later token does see it"


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in IMAGE_MIXERS])
def test_a_shorter_text_is_a_prefix(mixer):
    model = tiny_gpt(mixer).double()
    ids = torch.randint(0, 11, (2, 9))
    torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :4])


@pytest.mark.parametrize("mixer", MIXERS)
def test_smaller_and_non_square_images(mixer):
    assert tiny_vit(mixer)(torch.randn(2, 1, 8, 12)).shape == (2, 5)


def test_the_last_block_holds_only_the_class_tokens_rows():
    lean, whole = tiny_vit("translution"), tiny_vit("translution", full_last_block=True)
    assert lean.blocks[-1].mixer.q_proj.weight.shape[0] == 2
    assert whole.blocks[-1].mixer.q_proj.weight.shape[0] == 28
    state = whole.state_dict()
    for key, value in lean.state_dict().items():
        if state[key].shape != value.shape:
            state[key] = state[key][25:27]
    lean.load_state_dict(state)
    x = inputs(lean)
    torch.testing.assert_close(lean(x), whole(x), rtol=1e-4, atol=1e-5)


def count(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("patch", "qkv", "kv", "v", "alpha", "attention", "base"),
    [
        (56, 38.526, 27.246, 15.965, 5.335, 4.688, 1176.0),
        (32, 116.923, 79.101, 41.278, 5.350, 3.465, 3719.0),
        (16, 488.065, 326.380, 164.694, 10.709, 3.047, 15608.0),
    ],
)
def test_published_parameter_counts_vit(patch, qkv, kv, v, alpha, attention, base):
    with torch.device("meta"):
        name = f"_vit_tiny_patch{patch}_224"
        for relative, want in (("qkv", qkv), ("kv", kv), ("v", v)):
            model = create_model("translution" + name, full_last_block=True, relative=relative)
            assert count(model) == pytest.approx(want, abs=6e-4)
        assert count(create_model("alpha" + name, full_last_block=True)) == pytest.approx(
            alpha, abs=6e-4
        )
        assert count(create_model("attention" + name)) == pytest.approx(attention, abs=6e-4)
        model = create_model(f"translution_vit_base_patch{patch}_224", full_last_block=True)
        assert count(model) == pytest.approx(base, rel=1e-3)


@pytest.mark.parametrize(
    ("context", "qkv", "alpha", "attention"),
    [(160, 127.470, 23.735, 21.996), (1024, 700.779, 32.693, 22.162)],
)
def test_published_parameter_counts_gpt(context, qkv, alpha, attention):
    with torch.device("meta"):  # theirs apply one more layer norm at the end: 384 parameters
        for mixer, want in (("translution", qkv), ("alpha", alpha), ("attention", attention)):
            model = create_model(f"{mixer}_gpt_tiny", context=context)
            assert count(model) == pytest.approx(want, abs=1.5e-3)


def test_names():
    names = list_models()
    assert names == sorted(names)
    assert len(names) == 6 + 5 * (7 * 3 + 5) + 2 * (3 + 3 + 2 + 2)
    assert list_models("alpha_gpt_*") == [
        f"alpha_gpt_{size}" for size in ("base", "large", "mini", "small", "tiny")
    ]
    assert "rotary_vit_base_patch32_224" in names
    with pytest.raises(ValueError, match=r"did you mean .*translution_vit_tiny_patch16_224"):
        create_model("translution_vit_tinny_patch16_224")
    with pytest.raises(ValueError, match="registered already"):
        translution.register_model("alpha_gpt_tiny", gpt)


def test_every_name_builds():
    with torch.device("meta"):
        for name in list_models():
            if not name.startswith("translution") or "tiny" in name:
                assert count(create_model(name)) > 1


@pytest.mark.parametrize("mixer", ["translution", "alpha", "rotary"])
def test_compile_and_checkpoint(mixer):
    torch._dynamo.reset()
    for model in (tiny_vit(mixer), tiny_gpt(mixer)):
        x = inputs(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["translution", "alpha", "attention", "acmix"])
def test_checkpointing_forgets_and_gives_the_same(mixer):
    """Equal gradients; the more is forgotten, the less memory a step takes."""
    x = torch.randn(64, 1, 24, 24)
    found, peaks = [], []
    for checkpoint in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = vit(
            mixer=mixer, image_size=24, patch_size=4, num_classes=5, in_channels=1, depth=4, dim=32,
            heads=2, head_dim=16, activation_checkpointing=checkpoint, pool="mean",
        )  # fmt: skip

        def step(model=model):
            return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

        found.append(step())
        peaks.append(peak_bytes(step, torch.device("cpu")))
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0])
    assert peaks[2] < peaks[1] < peaks[0]
    model.eval()
    assert not model(x).grad_fn.name().startswith("Checkpoint")


def test_checkpointing_of_text_and_under_compile():
    torch._dynamo.reset()
    plain, forgetful = (
        tiny_gpt("translution"),
        tiny_gpt("translution", activation_checkpointing="selective"),
    )
    forgetful.load_state_dict(plain.state_dict())
    ids = inputs(plain)
    want = torch.autograd.grad(plain(ids).square().sum(), list(plain.parameters()))
    for model in (forgetful, torch.compile(forgetful, fullgraph=True, backend="aot_eager")):
        got = torch.autograd.grad(model(ids).square().sum(), list(forgetful.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


GOLDEN = {"vit": [1.8631, 0.4104, 0.1960], "gpt": [2.7380, 1.9806, 1.3856]}


@pytest.mark.parametrize("kind", ["vit", "gpt"])
def test_golden_loss_curve(kind):
    """A few steps of training land where they always did; a refactoring must not move them."""
    model = tiny_vit("translution") if kind == "vit" else tiny_gpt("translution")
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        x = torch.randn(8, 1, 12, 12, generator=generator)
        y = torch.randint(0, 5, (8,), generator=generator)
    else:
        x = torch.randint(0, 11, (8, 9), generator=generator)
        y = x.roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(21):
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[::10] == pytest.approx(GOLDEN[kind], rel=2e-3)
    assert losses[0] < 2 * math.log(11)


def test_head_dim_is_a_heads_share_unless_given():
    model = vit(mixer="acmix", image_size=8, patch_size=4, dim=32, heads=2, depth=1)
    assert model.config.head_dim == 16
    assert model.blocks[0].mixer.q_proj.weight.shape == (32, 32)
    with pytest.raises(ValueError, match="heads: got 3, want a divisor of dim 32"):
        vit(dim=32, heads=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vit("huge"), "size: got 'huge', want one of"),
        (lambda: vit(mixer="mamba"), "mixer: got 'mamba'"),
        (lambda: vit(image_size=225), r"image_size: got \(225, 225\), want a multiple"),
        (lambda: vit(pool="max"), "pool: got 'max'"),
        (lambda: vit(stem="conv"), "stem: got 'conv'"),
        (lambda: vit(activation_checkpointing="some"), "activation_checkpointing: got 'some'"),
        (lambda: vit("tiny", "acmix", position="rotary"), "position: got 'rotary', want one of"),
        (lambda: vit("tiny", "rotary", position="bias"), "position: got 'bias', want one of"),
        (lambda: vit(width=3), "option of ViTConfig: got 'width'"),
        (lambda: tiny_vit("convolution", pool="cls"), "mixer: 'convolution' mixes images without"),
        (lambda: tiny_vit("alpha", relative_depth=3), "relative_depth: got 3, want 0 to depth 2"),
        (
            lambda: tiny_vit("translution", position="rotary"),
            "position: got 'rotary' with relative",
        ),
        (lambda: gpt(mixer="convolution"), "mixer: got 'convolution'"),
        (lambda: gpt(mixer="acmix"), "mixer: got 'acmix'"),
        (lambda: tiny_gpt("alpha", context=0), "context"),
        (lambda: tiny_gpt("attention")(torch.zeros(1, 10, dtype=torch.int64)), "ids: got 10"),
        (lambda: tiny_gpt("attention")(torch.zeros(1, 10)), "ids: got torch.float32"),
        (lambda: tiny_vit("attention")(torch.zeros(1, 3, 12, 12)), r"image: got shape \(1, 3"),
        (lambda: tiny_vit("attention")(torch.zeros(1, 1, 16, 16)), "image: got shape"),
        (lambda: tiny_vit("translution")(torch.zeros(1, 1, 16, 16)), "grid: got 4 tokens on axis"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


USED_BY = {
    "relative": ("kv", {"translution", "alpha"}),
    "rank": (4, {"alpha"}),
    "init": ("independent", {"translution", "alpha"}),
    "window": (1, {"translution", "alpha", "attention", "rotary", "bias"}),
    "dilation": (2, {"translution", "alpha", "attention", "rotary", "bias"}),
    "buckets": (2, {"translution", "alpha", "attention", "rotary", "bias"}),
    "conv_kernel_size": (5, {"convolution", "acmix"}),
    "relative_depth": (1, set(MIXERS)),
    "dropout": (0.1, set(MIXERS)),
    "embedding_dropout": (0.1, set(MIXERS)),
    "projection_dropout": (0.1, set(MIXERS)),
    "mixer_options": ({"gain": 2}, set()),
    "activation_checkpointing": ("full", set(MIXERS)),
    "learned_positions": (True, set(MIXERS)),
}


@pytest.mark.parametrize("option", sorted(USED_BY))
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_option_that_the_mixer_does_not_use_is_refused(mixer, option):
    value, mixers = USED_BY[option]
    if mixer in mixers:
        assert getattr(tiny_vit(mixer, **{option: value}).config, option) == value
    else:
        with pytest.raises(ValueError, match=rf"{option}: got .* {mixer!r} does not use it"):
            tiny_vit(mixer, **{option: value})


def test_learned_positions_beside_any_mixer():
    for make in (tiny_vit, tiny_gpt):
        plain, with_positions = make("translution"), make("translution", learned_positions=True)
        assert plain.positions is None
        assert with_positions.positions is not None
        with_positions(inputs(with_positions)).sum().backward()
        assert with_positions.positions.grad.abs().sum() > 0
    assert tiny_vit("attention", learned_positions=False).positions is None
    assert tiny_vit("attention", position="rotary").positions is None


@pytest.mark.parametrize("patch", [4, 6, (2, 3)])
def test_stems_and_patches_that_are_shifted_as_a_whole(patch):
    """An image that moves by one patch moves the tokens by one, except near the border."""
    height, width = patch if isinstance(patch, tuple) else (patch, patch)
    image = torch.zeros(1, 1, 8 * height, 8 * width)
    image[:, :, 3 * height : 4 * height, 3 * width : 4 * width] = torch.randn(height, width)
    for stem in ("patches", "overlapping", "convolutional"):
        model = tiny_vit(
            "attention", image_size=(8 * height, 8 * width), patch_size=patch, stem=stem
        ).eval()
        moved = image.roll((height, width), (2, 3))
        tokens, after = (model.embed(x).unflatten(1, (8, 8))[:, 1:-1, 1:-1] for x in (image, moved))
        torch.testing.assert_close(after[:, 1:, 1:], tokens[:, :-1, :-1])
        near = (tokens[0] - tokens[0, 0, 0]).abs().amax(-1) > 1e-6  # differs from an empty place
        wide = {"patches": 1, "overlapping": 9, "convolutional": 9}[stem]
        assert 1 <= near.sum() <= wide, stem
        assert (near.sum() > 1) == (stem != "patches")
