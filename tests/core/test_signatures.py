"""Public signatures: explicit and typed, with device and dtype; earlier names still work."""

import dataclasses
import importlib
import inspect
import pkgutil
import typing

import pytest
import torch
from torch import nn

import translution
from translution import functional, models, modules
from translution._renamed import current_arguments
from translution.models.registry import families

CLASSES = {
    name: thing
    for module in (modules, models)
    for name in module.__all__
    if inspect.isclass(thing := getattr(module, name))
    and thing not in (models.Pretrained, models.Backbone)  # these are made by their subclasses
}
SMALL = {
    "ACmix2d": (4, 4, 2),
    "LocalAttention2d": (4, 4, 2),
    "PatchwiseACmix2d": (4, 8, 2, 4),
    "PatchwiseAttention2d": (4, 8, 2, 4),
    "ConvolutionPath": (6, 2, 4),
    "RelativeLinear": (5, 4, 4),
    "WindowACmix2d": (4, 2, 2),
    "WindowAttention2d": (4, 2, 2),
    "Convolution2d": (4, 3),
}
"""Arguments of the modules that are not (dim, grid, heads)."""


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_arguments_are_named_and_typed(name):
    arguments = inspect.signature(CLASSES[name]).parameters
    configuration = dataclasses.is_dataclass(CLASSES[name])
    hints = typing.get_type_hints(CLASSES[name] if configuration else CLASSES[name].__init__)
    for argument in arguments.values():
        assert argument.kind is argument.POSITIONAL_OR_KEYWORD, argument
        if not issubclass(CLASSES[name], models.Pretrained):
            assert hints[argument.name] is not typing.Any, argument


@pytest.mark.parametrize("name", [name for name in modules.__all__ if name in CLASSES])
def test_device_and_dtype(name):
    make = getattr(modules, name)
    given = SMALL.get(name, (4, 3, 2))
    module = make(*given, device="meta", dtype=torch.float64)
    assert list(module.parameters())
    assert all(p.is_meta and p.dtype == torch.float64 for p in module.parameters())
    torch.manual_seed(0)
    there = make(*given, device="cpu", dtype=torch.float64)
    torch.manual_seed(0)
    plain = make(*given).double()
    assert {k: (v.shape, v.dtype) for k, v in there.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in plain.state_dict().items()
    }


def test_no_function_has_the_name_of_a_module_beside_it():
    for info in pkgutil.walk_packages(translution.__path__, "translution."):
        package, _, name = info.name.rpartition(".")
        beside = getattr(importlib.import_module(package), name, None)
        assert not inspect.isfunction(beside), f"{info.name} is a module and a function"


EARLIER = {
    "length": (
        lambda: modules.Translution1d(dim=4, length=5, heads=2),
        lambda: modules.Translution1d(dim=4, grid=5, heads=2),
    ),
    "bias": (
        lambda: modules.Translution2d(4, 3, 2, bias=True),
        lambda: modules.Translution2d(4, 3, 2, qkv_bias=True),
    ),
    "rotary": (
        lambda: modules.AlphaTranslution1d(4, 5, 2, rotary=True),
        lambda: modules.AlphaTranslution1d(4, 5, 2, position="rotary"),
    ),
    "attention_kernel, conv_kernel": (
        lambda: modules.ACmix2d(4, 4, 2, attention_kernel=3, conv_kernel=5),
        lambda: modules.ACmix2d(4, 4, 2, kernel_size=3, conv_kernel_size=5),
    ),
    "channels, window": (
        lambda: modules.WindowACmix2d(channels=4, heads=2, window=2, conv_kernel=5),
        lambda: modules.WindowACmix2d(dim=4, heads=2, window_size=2, conv_kernel_size=5),
    ),
    "share": (
        lambda: modules.PatchwiseAttention2d(4, 8, 2, share=2),
        lambda: modules.PatchwiseAttention2d(4, 8, 2, group_size=2),
    ),
    "all_rows, relative_layers": (
        lambda: models.vit(dim=8, heads=2, depth=2, relative_layers=1, all_rows=True),
        lambda: models.vit(dim=8, heads=2, depth=2, relative_depth=1, full_last_block=True),
    ),
    "published ViT": (
        lambda: models.vit(mixer="rotary", dim=8, heads=2, depth=1, published=True),
        lambda: models.vit(mixer="rotary", dim=8, heads=2, depth=1, learned_positions=True),
    ),
    "published ViT of another mixer": (
        lambda: models.vit(mixer="alpha", dim=8, heads=2, depth=1, published=True),
        lambda: models.vit(mixer="alpha", dim=8, heads=2, depth=1),
    ),
    "published GPT": (
        lambda: models.gpt(dim=8, heads=2, depth=1, published=True),
        lambda: models.gpt(dim=8, heads=2, depth=1, double_final_norm=True),
    ),
    "Swin": (
        lambda: models.swin(layers=(1, 1, 1, 1), width=12, window=4, drop_path=0.1),
        lambda: models.swin(depths=(1, 1, 1, 1), dim=12, window_size=4, drop_path_rate=0.1),
    ),
    "PVT": (
        lambda: models.pvt(
            layers=(1, 1, 1, 1), widths=(4, 4, 10, 8), patches=(4, 2, 2, 1), all_rows=True
        ),
        lambda: models.pvt(
            depths=(1, 1, 1, 1), dims=(4, 4, 10, 8), patch_sizes=(4, 2, 2, 1), full_last_block=True
        ),
    ),
    "SAN": (
        lambda: models.san(layers=(1,) * 5, kernels=(3,) * 5, width=16, share=2),
        lambda: models.san(depths=(1,) * 5, kernel_sizes=(3,) * 5, dim=16, group_size=2),
    ),
    "ResNet": (
        lambda: models.resnet(layers=(1,) * 4, width=8, attention_kernel=3),
        lambda: models.resnet(depths=(1,) * 4, dim=8, kernel_size=3),
    ),
}


@pytest.mark.parametrize("which", sorted(EARLIER))
def test_earlier_names_of_arguments_warn_and_mean_the_same(which):
    earlier, current = EARLIER[which]
    with pytest.warns(DeprecationWarning, match="the argument .* is now"):
        old = earlier()
    new = current()
    assert repr(old) == repr(new)
    assert getattr(old, "config", None) == getattr(new, "config", None)


@pytest.mark.filterwarnings("ignore:.*the argument .* is now:DeprecationWarning")
def test_an_argument_by_both_names():
    with pytest.raises(ValueError, match="bias: is the old name of qkv_bias, which is given"):
        modules.SelfAttention(4, 3, 2, bias=True, qkv_bias=True)


def test_every_earlier_name_leads_to_arguments_that_exist():
    for kind in (*CLASSES.values(), *families().values()):
        for old, new in getattr(kind, "_renamed", {}).items():
            arguments = inspect.signature(kind).parameters
            assert old not in arguments or isinstance(new, str), (kind, old)
            current = current_arguments(kind, {old: True, "mixer": "rotary"}, warn=False)
            for name in current.keys() - {"mixer"}:
                # a class that inherits a name but not its argument refuses it as any other
                assert name in arguments or old in ("length",), (kind, old, name)


def test_modules_of_tables_can_be_made_on_one_device_inside_a_context_of_another():
    with torch.device("meta"):
        layer = modules.ACmix2d(4, 4, 2, device="cpu")
    assert not any(p.is_meta for p in layer.parameters())
    assert isinstance(layer, nn.Module)


FOREIGN = [
    (lambda: modules.SelfAttention(8, 6, num_heads=2), "SelfAttention: got num_heads, want heads"),
    (lambda: modules.SelfAttention(embed_dim=8, grid=6), "got embed_dim, want dim"),
    (
        lambda: modules.Translution2d(8, 6, kernel_size=3),
        "Translution2d: .* want window, which",
    ),
    (lambda: modules.AlphaTranslution1d(8, 6, is_causal=True), "got is_causal, want causal"),
    (lambda: modules.SelfAttention(8, 6, rel_pos_bias=True), "want position='bias'"),
    (lambda: modules.Translution1d(8, 6, rel_pos_bias=True), "want relative, whose tables"),
    (lambda: modules.ACmix2d(dim=8, num_heads=2), "ACmix2d: got dim, want in_channels and out"),
    (lambda: modules.LocalAttention2d(4, 4, 2, rel_pos_bias=False), "want no argument: position"),
    (
        lambda: functional.neighborhood_attention(
            *[torch.zeros(1, 1, 3, 3, 2)] * 3, 3, is_causal=1
        ),
        "neighborhood_attention: got is_causal, want SelfAttention with causal=True",
    ),
]


@pytest.mark.parametrize(("call", "message"), FOREIGN)
def test_names_of_other_libraries_lead_to_ours(call, message):
    with pytest.raises(TypeError, match=message):
        call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'neighbours'"):
        modules.SelfAttention(8, 6, neighbours=3)
