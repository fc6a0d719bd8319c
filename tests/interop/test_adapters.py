"""Layers that others put in the place of an nn.Linear: adapters, quantised layers, hooks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from translution import (
    ACmix2d,
    PatchwiseACmix2d,
    ReducedACmix2d,
    WindowACmix2d,
    convert,
    create_model,
)

VIT = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "num_classes": 3}
MIXERS = ["attention", "rotary", "bias", "acmix", "translution", "alpha"]


class LowRank(nn.Module):
    """A linear layer with a low-rank branch beside it, as peft's LoRA has one."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class EightBits(nn.Module):
    """A linear layer with an int8 weight that converts its input itself, as bitsandbytes has it."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.abs().amax(1, keepdim=True).detach() / 127
        self.weight = nn.Parameter(
            (layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replaced(model, kind, names=("q_proj", "k_proj", "v_proj")):
    """Replace the linear layers with these names; returns how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names and isinstance(layer, nn.Linear):
                setattr(parent, name, kind(layer))
                count += 1
    return count


def vit(mixer):
    relative = {"relative": "v"} if mixer == "translution" else {}
    return create_model("vit", mixer=mixer, **VIT, **relative).eval()


def converted():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        intermediate_size=32, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    convert(model, layers=[0], relative="v")
    convert(model, layers=[1], to="alpha", relative="qkv")
    return model


@pytest.mark.parametrize("mixer", [*MIXERS, "converted"])
def test_adapters_are_used_and_trained(mixer):
    size = 32 if mixer == "converted" else 8
    model, x = converted() if mixer == "converted" else vit(mixer), torch.randn(2, 3, size, size)

    def logits():
        out = model(x)
        return out if isinstance(out, torch.Tensor) else out.logits

    want = logits()
    tables = {"translution": 2, "converted": 1}  # which are no linear layers
    assert replaced(model, LowRank) == 6 - tables.get(mixer, 0)
    got = logits()
    assert not torch.allclose(got, want)
    got.sum().backward()
    for name, p in model.named_parameters():
        if ".up." in name or ".down." in name:
            assert p.grad is not None, name
            assert p.grad.any(), name


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_layers_with_integer_weights(mixer):
    model, x = vit(mixer), torch.randn(2, 3, 8, 8)
    want = model(x)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "head", "fc")
    assert replaced(model, EightBits, names)
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_torchs_dynamic_quantisation(mixer):
    model, x = vit(mixer), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        got = small(x)
    torch.testing.assert_close(got, model(x), rtol=0.1, atol=0.1)


def convolutions():
    """Every form of ACmix, with an input; in each the convolution may be folded into one."""
    image = torch.randn(1, 8, 6, 6)
    yield ACmix2d(8, 8, 2), image
    yield ACmix2d(8, 8, 2, learned_shifts=False), image
    yield WindowACmix2d(8, 2, 3), image
    yield PatchwiseACmix2d(8, 8, 8, group_size=2), image
    yield ReducedACmix2d(8, 6, 2), image.flatten(2).mT
    yield ReducedACmix2d(8, 6, 2, reduction=2), image.flatten(2).mT


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("how", ["adapter", "hook", "pruning", "parametrization"])
def test_the_convolution_path_calls_its_layer(case, how):
    layer, x = list(convolutions())[case]
    path = layer.convolution
    same = copy.deepcopy(layer)
    if how == "adapter":
        path.fc = LowRank(path.fc)
        with torch.no_grad():
            same.convolution.fc.weight += path.fc.up.weight @ path.fc.down.weight
    elif how == "hook":
        path.fc.register_forward_hook(lambda module, args, y: 2 * y)
        with torch.no_grad():
            for p in same.convolution.fc.parameters():
                p.mul_(2)
    elif how == "pruning":
        prune.l1_unstructured(path.fc, "weight", amount=0.5)
        prune.l1_unstructured(same.convolution.fc, "weight", amount=0.5)
        prune.remove(same.convolution.fc, "weight")
    else:
        parametrize.register_parametrization(path.fc, "weight", Doubled())
        with torch.no_grad():
            same.convolution.fc.weight.mul_(2)
    y = layer(x)
    torch.testing.assert_close(y, same(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in path.fc.parameters() if p.requires_grad)


@pytest.mark.parametrize("mixer", MIXERS)
def test_peft(mixer):
    peft = pytest.importorskip("peft")
    model, x = vit(mixer), torch.randn(2, 3, 8, 8)
    want = model(x)
    names = ["q_proj", "k_proj"] + ["fc"] * (mixer == "acmix")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    got = adapted(x)
    assert not torch.allclose(got, want)
    got.sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    torch.testing.assert_close(adapted.merge_and_unload()(x), got)
