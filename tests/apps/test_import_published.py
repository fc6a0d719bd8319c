"""`translution import` and `export-published`: published weights become saved models, and back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("lightning")

from test_first_run import command
from test_published import (
    CLASSES,
    DIM,
    GRID,
    HEADS,
    PATCH,
    an_image,
    gpt_weights,
    random,
    swin_block_shapes,
    vit_twin,
    vit_weights,
    window_index,
)

from translution import create_model
from translution.interop.published import export_published, infer_published, load_published
from translution.models import Pretrained

VIT = {"dim": 16, "depth": 2, "heads": 2, "head_dim": 64, "image_size": 12, "patch_size": 4,
       "num_classes": 5, "mlp_ratio": 2.0}  # fmt: skip
GPT = {"dim": 16, "depth": 2, "heads": 2, "head_dim": 64, "context": 7, "vocab_size": 11,
       "double_final_norm": True}  # fmt: skip
RESNET = {"depths": (1, 2, 1, 1), "dim": 8, "heads": 2, "num_classes": 5, "expansion": 2}
SWIN = {"depths": (2, 2, 1, 1), "dim": 12, "heads": (1, 2, 2, 4), "window_size": 4, "patch_size": 2,
        "num_classes": 5, "mlp_ratio": 2.0}  # fmt: skip
MODELS = [
    ("vit", VIT | {"mixer": "translution", "relative": "kv"}),
    ("vit", VIT | {"mixer": "translution", "relative": "v", "in_channels": 1}),
    ("vit", VIT | {"mixer": "translution", "relative_depth": 1}),
    ("vit", VIT | {"mixer": "alpha", "rank": 3}),
    ("vit", VIT | {"mixer": "alpha", "rank": 3, "relative": "q", "position": "rotary"}),
    ("vit", VIT | {"mixer": "attention"}),
    ("vit", VIT | {"mixer": "rotary", "learned_positions": True}),
    ("gpt", GPT | {"mixer": "translution", "relative": "qk"}),
    ("gpt", GPT | {"mixer": "alpha", "rank": 4}),
    ("gpt", GPT | {"mixer": "attention"}),
    ("resnet", RESNET | {"mixer": "acmix", "published": True}),
    ("resnet", RESNET | {"mixer": "convolution", "heads": 4}),
    ("swin", SWIN | {"mixer": "acmix", "published": True}),
    ("swin", SWIN | {"mixer": "attention"}),
    ("swin", SWIN | {"mixer": "attention", "qkv_bias": False, "patch_norm": False}),
    ("swin", SWIN | {"mixer": "acmix", "published": True, "absolute_positions": (64, 64)}),
    ("resnet", RESNET | {"mixer": "convolution", "heads": 4, "groups": 4, "width_per_group": 3}),
    ("resnet", RESNET | {"mixer": "acmix", "published": True, "width_per_group": 12}),
    ("gpt", GPT | {"mixer": "translution", "learned_positions": True}),
]


def an_input(model: nn.Module) -> torch.Tensor:
    if hasattr(model.config, "vocab_size"):
        return torch.randint(0, 11, (2, 7))
    return torch.randn(2, model.config.in_channels, *getattr(model.config, "image_size", (64, 64)))


@pytest.mark.filterwarnings("ignore:exchanged. got None:UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    MODELS,
    ids=[f"{n} {o['mixer']} {o.get('relative', '')}" for n, o in MODELS],
)
def test_there_and_back(name, options, tmp_path):
    """The model and its options follow from the weights; only defaults may be assumed."""
    model = create_model(name, **options).eval()
    weights = export_published(model, image_size=64)
    torch.save({"model": weights}, tmp_path / "weights.pth")
    code, out, err = command("import", tmp_path / "weights.pth", tmp_path / "saved")
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'saved'}: {name} with ")
    again = Pretrained.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    x = an_input(model)
    torch.testing.assert_close(again.eval()(x), model(x), rtol=0, atol=0)
    for file in ("back.safetensors", "back.pth"):
        words = ("export-published", tmp_path / "saved", tmp_path / file, "--image-size=64")
        code, out, err = command(*words)
        assert code == 0, err
        third = create_model(name, **options).eval()
        load_published(third, tmp_path / file, image_size=64)
        torch.testing.assert_close(third(x), model(x), rtol=0, atol=0)


def test_weights_of_the_published_code_with_options(tmp_path):
    """Patches that are not square and heads of 4 channels do not follow from the weights."""
    weights = vit_weights("translution", "kv")
    torch.save(weights, tmp_path / "weights.pth")
    words = ("import", tmp_path / "weights.pth", tmp_path / "saved", "--not-exchanged")
    for more, missing in (((), "heads"), ((f"--heads={HEADS}",), "patch_size")):
        code, _, err = command(*words, *more)
        assert code == 2
        assert f"{missing}: cannot be inferred" in err
    size = [n * p for n, p in zip(GRID, PATCH, strict=True)]
    words += (f"--heads={HEADS}", f"--patch_size={list(PATCH)}", f"--image_size={size}")
    code, out, err = command(*words, "--full_last_block=true")
    assert code == 0, err
    assert "assumed: pool 'cls'" in out
    image = an_image()
    want = vit_twin(weights, image, "translution", relative="kv")
    model = Pretrained.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(model(image.float()), want.float(), rtol=1e-3, atol=1e-4)
    code, out, _ = command(*words)
    assert "not used, as it changes no output: translution.layers.1.0.to_k.unique_params" in out


def test_inferred_from_names_and_shapes_alone():
    found = infer_published(gpt_weights("translution", "k"), {"heads": HEADS})
    assert (found.name, found.options["relative"], found.options["context"]) == ("gpt", "k", 5)
    assert found.options["mlp_ratio"] * DIM == math.floor(found.options["mlp_ratio"] * DIM)
    shapes = {"patch_embed.proj.weight": (4, 3, 2, 2), "head.weight": (CLASSES, 32)}
    for stage, window in enumerate((4, 4, 2, 1)):
        block = swin_block_shapes(4 * 2**stage, 2, window, mixed=True)
        shapes |= {f"layers.{stage}.blocks.0.{key}": value for key, value in block.items()}
    weights = random(shapes) | window_index(4)
    found = infer_published(weights)
    assert found.image_size == 2 * 2 * 4, "the third map has a window of its own size"
    assert (found.options["window_size"], found.options["mixer"]) == (4, "acmix")


def test_refusals(tmp_path):
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"wte.weight": torch.zeros(2, 4)}, tmp_path / "part.pth")
    good = export_published(create_model("vit", **VIT | {"mixer": "attention"}))
    torch.save(good, tmp_path / "good.pth")
    torch.save({k: v for k, v in good.items() if "1.net.0" not in k}, tmp_path / "less.pth")
    create_model("vit", **VIT | {"mixer": "bias"}).save_pretrained(tmp_path / "bias")
    for words, said in (
        (("other.pth", "to"), "source: got weights without names of a published"),
        (("part.pth", "to"), "source: has no"),
        (("less.pth", "to"), "less.pth: source: does not fit the module missing"),
        (("good.pth", "to", "--haeds=2"), "haeds: 'vit' has no such option"),
        (("good.pth", "to", "--depth=3"), "good.pth: source: does not fit the module"),
        (("good.pth", "other.pth"), "FOLDER: got the file"),
    ):
        first, *rest = (f"{tmp_path / word}" if "--" not in word else word for word in words)
        code, _, err = command("import", first, *rest)
        assert code == 2
        assert said in " ".join(err.split()), err
    code, _, err = command("export-published", tmp_path / "bias", tmp_path / "x.pth")
    assert (code, "mixer: got 'bias', want one of" in err) == (2, True)
    code, _, err = command("export-published", tmp_path / "bias", tmp_path / "x.txt")
    assert (code, "FILE: got" in err) == (2, True)


def test_the_published_mean(tmp_path):
    """It includes the class token, and weights do not show that they were trained for it."""
    weights = export_published(create_model("vit", **VIT | {"mixer": "alpha", "pool": "all"}))
    torch.save(weights, tmp_path / "weights.pth")
    words = ("import", tmp_path / "weights.pth", tmp_path / "saved", "--not-exchanged")
    code, out, err = command(*words, "--pool=all")
    assert code == 0, err
    assert Pretrained.from_pretrained(tmp_path / "saved").config.pool == "all"
    assert "not used" not in out, "all rows of the last block are"
