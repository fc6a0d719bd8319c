"""Options that the published models have: each is off by default, and has its effect."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from translution import gpt, vit
from translution.models import Pretrained, ResNet, resnet, swin
from translution.models.residual_network import INITS
from translution.modules import WindowACmix2d, WindowAttention2d

VIT = {"dim": 16, "depth": 2, "heads": 2, "image_size": 12, "patch_size": 4, "num_classes": 5}
GPT = {"dim": 16, "depth": 2, "heads": 2, "context": 9, "vocab_size": 11}
SWIN = {"depths": (2, 1, 1, 1), "dim": 8, "heads": (1, 1, 2, 2), "window_size": 2, "num_classes": 5,
        "drop_path_rate": 0.0}  # fmt: skip
RESNET = {"depths": (1, 1, 1, 1), "dim": 8, "heads": 2, "kernel_size": 3, "num_classes": 5}


def an_image(size=12):
    return torch.randn(2, 3, size, size)


def made_again(make, seed=0):
    torch.manual_seed(seed)
    return make()


# -- ViT and GPT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["translution", "attention", "alpha"])
def test_the_mean_of_class_token_and_patches(mixer):
    model = vit(mixer=mixer, pool="all", **VIT).eval()
    image = an_image()
    tokens = model.tokens(image)
    assert tokens.shape == (2, 10, 16)
    torch.testing.assert_close(model(image), model.head(tokens.mean(1)))
    model(image).sum().backward()
    assert model.cls_token.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="pool: got 'max', want one of"):
        vit(pool="max", **VIT)


@pytest.mark.parametrize("make", [lambda **o: vit(**VIT, **o), lambda **o: gpt(**GPT, **o)])
@pytest.mark.parametrize("option", ["embedding_dropout", "projection_dropout"])
def test_dropout(make, option):
    """It acts in training only, has no weights, and where the option says."""
    plain, dropped = (
        made_again(lambda p=p: make(mixer="attention", **{option: p})) for p in (0, 0.5)
    )
    assert plain.state_dict().keys() == dropped.state_dict().keys()
    text = hasattr(plain.config, "vocab_size")
    x = torch.randint(0, 11, (2, 9)) if text else an_image()
    torch.testing.assert_close(plain.eval()(x), dropped.eval()(x), rtol=0, atol=0)
    plain.train(), dropped.train()
    torch.testing.assert_close(plain(x), plain(x), rtol=0, atol=0)
    assert not torch.equal(dropped(x), dropped(x))
    seen = []
    where = dropped.blocks[0] if option == "embedding_dropout" else dropped.blocks[0].mixer_dropout
    hook = (lambda m, i, o=None: seen.append(i[0])) if option == "embedding_dropout" else (
        lambda m, i, o: seen.append(o)
    )  # fmt: skip
    where.register_forward_hook(hook)
    dropped(x)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"{option}: got {wrong}, want at least 0 and less"):
            make(**{option: wrong})


def test_learned_positions_beside_translution_in_a_gpt():
    model = gpt(mixer="translution", learned_positions=True, **GPT)
    assert model.positions.shape == (1, 9, 16)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    before = model(ids)
    with torch.no_grad():
        model.positions[:, 0] += torch.randn(16)
    assert not torch.allclose(model(ids), before)


def test_a_tied_head(tmp_path):
    own, tied = gpt(mixer="attention", **GPT), gpt(mixer="attention", tie_head=True, **GPT)
    assert own.head.weight is not own.embed.weight
    assert tied.head.weight is tied.embed.weight
    count = [sum(p.numel() for p in model.parameters()) for model in (own, tied)]
    assert count[0] - count[1] == 11 * 16
    ids = torch.randint(0, 11, (2, 9))
    tied(ids).logsumexp(-1).sum().backward()
    optimizer = torch.optim.SGD(tied.parameters(), 0.1)
    optimizer.step()
    assert tied.head.weight is tied.embed.weight
    tied.save_pretrained(tmp_path)
    again = Pretrained.from_pretrained(tmp_path).eval()
    assert again.head.weight is again.embed.weight
    torch.testing.assert_close(again(ids), tied.eval()(ids), rtol=0, atol=0)
    assert copy.deepcopy(tied).head.weight is not tied.head.weight


# -- Swin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["attention", "acmix"])
def test_qk_scale(mixer):
    """It is the same as other weights of the queries."""
    ours, scaled = (
        made_again(lambda s=s: swin(mixer=mixer, qk_scale=s, **SWIN)).eval() for s in (None, 0.7)
    )
    image = an_image(32)
    assert not torch.allclose(ours(image), scaled(image))
    kind, more = (WindowACmix2d, {}) if mixer == "acmix" else (WindowAttention2d, {})
    for shift in (0, 1):
        layer = made_again(lambda shift=shift: kind(8, 2, 2, shift, qk_scale=0.7, **more))
        other = made_again(lambda shift=shift: kind(8, 2, 2, shift, **more))
        x = torch.randn(2, 8, 5, 4)
        q, k, v = layer.project(x)
        torch.testing.assert_close(layer.attend(q, k, v), other.attend(0.7 * 2 * q, k, v))
    with pytest.raises(ValueError, match="qk_scale: got 0, want"):
        swin(qk_scale=0, **SWIN)


def test_qkv_bias_and_patch_norm():
    plain = swin(mixer="acmix", **SWIN)
    assert plain.stages[0][0].attention.q_proj.bias is not None
    assert isinstance(plain.embed.norm, nn.LayerNorm)
    bare = swin(mixer="acmix", qkv_bias=False, patch_norm=False, **SWIN).eval()
    names = set(plain.state_dict()) - set(bare.state_dict())
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "convolution", "norm"
    }  # fmt: skip
    image = an_image(32)
    torch.testing.assert_close(bare.embed(image), bare.embed.proj(image))
    assert bare(image).shape == (2, 5)


def test_absolute_positions():
    model = swin(absolute_positions=32, **SWIN).eval()
    assert model.positions.shape == (1, 8, 8, 8)
    assert model.config.absolute_positions == (32, 32)
    without = swin(**SWIN).eval()
    missing = without.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == ["positions"]
    image = an_image(32)
    assert not torch.allclose(model(image), without(image))
    with torch.no_grad():
        model.positions.zero_()
    torch.testing.assert_close(model(image), without(image))
    with torch.no_grad():
        model.positions.fill_(0.5)
    seen = []
    model.stages[0].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    other = torch.randn(1, 3, 20, 44)
    model(other)
    torch.testing.assert_close(seen[0], model.embed(other) + 0.5)
    model.train()(image).sum().backward()
    assert model.positions.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="absolute_positions: got"):
        swin(absolute_positions=(1, 2, 3), **SWIN)


# -- ResNet ----------------------------------------------------------------------------------------


def test_groups():
    plain, grouped = resnet(**RESNET), resnet(groups=4, **RESNET)
    assert plain.stages[1][0].conv2.groups == 1
    assert grouped.stages[1][0].conv2.weight.shape == (16, 4, 3, 3)
    assert grouped(an_image(32)).shape == (2, 5)
    with torch.device("meta"):  # the parameters that ResNeXt-50 32x4d and wide ResNet-50-2 have
        resnext, wide = resnet(groups=32, width_per_group=4), resnet(width_per_group=128)
    assert sum(p.numel() for p in resnext.parameters()) == 25_028_904
    assert sum(p.numel() for p in wide.parameters()) == 68_883_240
    acmix = resnet(mixer="acmix", width_per_group=12, **RESNET)
    assert acmix.stages[1][0].conv2.out_channels == 24
    assert acmix(an_image(32)).shape == (2, 5)
    for options, said in (
        ({"groups": 3}, "groups: got 3, want a divisor of dim 8"),
        ({"groups": 0}, "groups: got 0, want at least 1"),
        ({"width_per_group": 0}, "width_per_group: got 0, want at least 1"),
        ({"groups": 2, "mixer": "acmix"}, "groups: got 2, but the mixer 'acmix' has none"),
        ({"init": "best"}, "init: got 'best', want one of"),
    ):
        with pytest.raises(ValueError, match=said):
            resnet(**RESNET | options)


@pytest.mark.parametrize("mixer", ["convolution", "acmix"])
def test_a_last_norm_of_zero(mixer):
    """A block without a shortcut of its own then passes its input on."""
    options = RESNET | {"depths": (2, 1, 1, 1), "mixer": mixer}
    plain, zero = resnet(**options), resnet(zero_init_residual=True, **options)
    assert (plain.stages[0][1].norm3.weight == 1).all()
    x = torch.randn(2, 32, 6, 6).relu()
    torch.testing.assert_close(zero.stages[0][1](x), x)
    assert not torch.allclose(plain.stages[0][1](x), x)


@pytest.mark.parametrize("init", INITS)
def test_initialisations(init):
    """By the spread of the weights: how the numbers of inputs and outputs enter."""
    model = resnet(**RESNET | {"dim": 32, "mixer": "acmix", "init": init})
    block = model.stages[1][0]
    into, out = block.conv1.weight.shape[1], block.conv1.weight.shape[0]
    want = {
        "kaiming": (2 / out) ** 0.5, "published": (2 / out) ** 0.5,
        "xavier": (2 / (into + out)) ** 0.5, "torch": (1 / (3 * into)) ** 0.5,
    }[init]  # fmt: skip
    assert block.conv1.weight.std().item() == pytest.approx(want, rel=0.1)
    shifts = block.conv2.convolution.shifts
    assert bool(((shifts == 0) | (shifts == 1)).all()) == (init != "published")
    stem = model.stem[0].weight
    assert stem.std().item() == pytest.approx(
        (2 / (32 * 49)) ** 0.5 if init == "published" else (1 / (3 * 3 * 49)) ** 0.5, rel=0.05
    )
    if init == "kaiming":
        again = made_again(lambda: resnet(**RESNET))
        default = made_again(lambda: resnet(init="kaiming", **RESNET))
        for a, b in zip(again.parameters(), default.parameters(), strict=True):
            assert torch.equal(a, b)


# -- saved models of before ------------------------------------------------------------------------

NEW = {
    "mixer_options", "embedding_dropout", "projection_dropout", "tie_head", "qk_scale", "qkv_bias",
    "patch_norm", "absolute_positions", "groups", "width_per_group", "zero_init_residual",
}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: vit(mixer="attention", **VIT),
        lambda: gpt(mixer="attention", **GPT),
        lambda: swin(**SWIN),
        lambda: resnet(**RESNET),
    ],
)
def test_saved_models_of_before(make, tmp_path):
    model = make().eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    new = NEW | ({"init"} if isinstance(model, ResNet) else set())
    options = {k: v for k, v in content["options"].items() if k not in new}
    assert len(options) < len(content["options"])
    file.write_text(json.dumps(content | {"options": options}))
    again = Pretrained.from_pretrained(tmp_path).eval()
    assert dataclasses.asdict(again.config) == dataclasses.asdict(model.config)
    x = torch.randint(0, 11, (2, 9)) if "vocab_size" in options else an_image(12)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
