"""Mixers that a program registers, as a user would write and use them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from translution import attention_weights, create_model, gpt, list_models, register_mixer, vit
from translution.models import Pretrained
from translution.models.generation import generate
from translution.modules import SelfAttention

TINY = {"dim": 16, "depth": 2, "heads": 2, "image_size": 12, "patch_size": 4, "num_classes": 5}
TEXT = {"dim": 16, "depth": 2, "heads": 2, "context": 9, "vocab_size": 11}


class Mean(nn.Module):
    """Each token becomes the mean of all, or of those before it."""

    def __init__(self, dim: int, grid: tuple[int, ...], heads: int, causal: bool = False, gain=1.0):
        super().__init__()
        self.causal, self.gain, self.heads, self.grid = causal, gain, heads, grid
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        x = self.proj(x)
        if not self.causal:
            return self.gain * x.mean(1, keepdim=True).expand_as(x)
        return self.gain * x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def on_images(dim, grid, heads):
    return Mean(dim, grid, heads)


def takes_everything(dim, grid, heads, **options):
    return SelfAttention(dim, grid, heads=heads, **options)


def with_window(dim, window=None, *, size):
    module = nn.Linear(dim, dim)
    module.forward = lambda x, grid=None: nn.Linear.forward(module, x)
    module.seen = window, size
    return module


@pytest.fixture(autouse=True)
def _names(own_names):
    """The names that a test registers are gone after it."""


def test_a_mixer_by_name():
    register_mixer("mean", Mean)
    model = vit(mixer="mean", mixer_options={"gain": 2.0}, **TINY)
    first = model.blocks[0].mixer
    assert (first.gain, first.heads, first.grid, first.causal) == (2.0, 2, (3, 3), False)
    assert model.cls_token is None, "it takes no prefix"
    assert model.positions is None
    x = torch.randn(3, 3, 12, 12)
    assert model(x).shape == (3, 5)
    assert attention_weights(model, x)[1] == [None, None]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_of_models():
    register_mixer("mean", Mean)
    assert {"mean_vit_tiny_patch16_224", "mean_gpt_small"} <= set(list_models("mean_*"))
    register_mixer("images", on_images)
    assert list_models("images_gpt*") == []
    with torch.device("meta"):
        assert create_model("images_vit_mini_patch32_224").config.mixer == "images"


def test_a_causal_mixer_does_not_see_the_future():
    register_mixer("mean", Mean)
    model = gpt(mixer="mean", **TEXT).eval()
    assert model.blocks[0].mixer.causal
    ids = torch.randint(0, 11, (2, 9))
    torch.testing.assert_close(model(ids[:, :4]), model(ids)[:, :4])
    made = list(generate(model, ids[:, :3], 4, temperature=0, cache=False))
    assert len(made) == 4
    with pytest.raises(ValueError, match="cache: Mean has no make_cache, want False"):
        generate(model, ids[:, :3], 4)
    assert not model.unbounded


def test_everything_is_passed_to_a_function_with_options():
    register_mixer("all", takes_everything, causal=True, learned_positions=True)
    torch.manual_seed(1)
    own = vit(mixer="all", window=1, **TINY)
    torch.manual_seed(1)
    ours = vit(mixer="attention", window=1, **TINY)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(own(x), ours(x), rtol=0, atol=0)
    model = gpt(mixer="all", **TEXT).eval()
    ids = torch.randint(0, 11, (2, 3))
    cached = torch.stack(list(generate(model, ids, 5, temperature=0)))
    plain = torch.stack(list(generate(model, ids, 5, temperature=0, cache=False)))
    assert torch.equal(cached, plain)


def test_only_what_a_function_takes_is_passed():
    register_mixer("window", with_window)
    model = vit(mixer="window", mixer_options={"size": 7}, window=(1, 2), **TINY)
    assert model.blocks[1].mixer.seen == ((1, 2), 7)


def test_saved_and_loaded(tmp_path):
    register_mixer("mean", Mean)
    model = vit(mixer="mean", mixer_options={"gain": 3.0}, **TINY).eval()
    model.save_pretrained(tmp_path)
    again = Pretrained.from_pretrained(tmp_path)
    assert again.blocks[0].mixer.gain == 3.0
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(again.eval()(x), model(x), rtol=0, atol=0)


def test_loading_without_the_mixer_says_how(tmp_path, own_names):
    register_mixer("mean", Mean)
    vit(mixer="mean", **TINY).save_pretrained(tmp_path)
    own_names()
    with pytest.raises(ValueError, match=r"config.json: 'vit': mixer: got 'mean'.*--import FILE"):
        Pretrained.from_pretrained(tmp_path)


def test_a_file_of_before_has_no_mixer_options(tmp_path):
    model = vit(mixer="attention", **TINY)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["options"]["mixer_options"]
    file.write_text(json.dumps(content))
    assert Pretrained.from_pretrained(tmp_path).config == model.config


def test_the_same_function_registers_again():
    register_mixer("mean", Mean, title="the mean")
    register_mixer("mean", Mean, title="the mean")
    with pytest.raises(ValueError, match="name: 'mean' is registered already"):
        register_mixer("mean", on_images)


REFUSED = [
    (lambda: register_mixer("alpha", Mean), "name: 'alpha' is registered already"),
    (lambda: register_mixer("a mean", Mean), "name: got 'a mean', want letters"),
    (lambda: register_mixer("m", Mean, title="ACmix"), "title: another mixer is called 'ACmix'"),
    (
        lambda: register_mixer("m", lambda dim, window=3: Mean(dim, (), 1)),
        "make: has the default 3 for window, but models pass theirs, which is None",
    ),
    (lambda: register_mixer("m", lambda dim, /: None), "make: takes 'dim' by position only"),
    (lambda: vit(mixer="mena", **TINY), "mixer: got 'mena', want one of .*'mean'.*--import FILE"),
    (lambda: gpt(mixer="images", **TEXT), "mixer: 'images' mixes images only; .*causal=True"),
    (lambda: gpt(mixer="all", **TEXT), "mixer: 'all' mixes images only"),
    (lambda: vit(mixer="mean", pool="cls", **TINY), "'mean' mixes images without a class token"),
    (lambda: vit(mixer="mean", window=1, **TINY), "window: got 1, but the mixer 'mean' does not"),
    (lambda: vit(mixer="mean", rank=4, **TINY), "rank: got 4, but the mixer 'mean' does not"),
    (lambda: vit(mixer="mean", position="rotary", **TINY), "position: got 'rotary', want one of"),
    (
        lambda: vit(mixer="mean", mixer_options={"gian": 2}, **TINY),
        r"mixer_options: got 'gian', but the mixer 'mean' has the options \['gain'\]",
    ),
    (
        lambda: vit(mixer="mean", mixer_options={"heads": 2}, **TINY),
        "mixer_options: got 'heads', which the model passes itself",
    ),
    (
        lambda: vit(mixer="window", **TINY),
        r"mixer_options: got \[\], but the mixer 'window' needs \['size'\]",
    ),
    (
        lambda: vit(mixer="rotary", mixer_options={"gain": 2}, **TINY),
        "mixer_options: got {'gain': 2}, but the mixer 'rotary' does not use it",
    ),
    (lambda: vit(mixer="nothing", **TINY), "mixer: the function of 'nothing' returned NoneType"),
    (lambda: create_model("mean_vti"), "there is no model 'mean_vti'.*--import FILE"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call, message):
    register_mixer("mean", Mean)
    register_mixer("images", on_images)
    register_mixer("all", takes_everything)
    register_mixer("window", with_window)
    register_mixer("nothing", lambda dim: None)
    with pytest.raises(ValueError, match=message):
        call()
