"""The models as timm's own.

timm lies apart, in a folder of the environment, with a torchvision whose compiled operators may not
load: a script of its own first says what those operators look like.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "timm"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is missing")

BEGIN = """
import contextlib
import torch
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # they are there
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
torch.set_num_threads(1)
import timm.optim
import timm
import translution.interop.timm
from translution import create_model

torch.manual_seed(0)
x = torch.randn(2, 3, 64, 64)
SMALL = {
    "translution_alpha_vit_tiny_patch16_224": dict(img_size=64, dim=12, depth=3, heads=2),
    "translution_acmix_resnet26": dict(width=8, heads=2),
    "translution_san10": dict(width=16, share=2),
    "translution_acmix_pvt_tiny": dict(widths=(8, 8, 16, 16), heads=(1, 1, 2, 2), img_size=64),
    "translution_swin_tiny": dict(width=8, heads=(1, 1, 2, 2), layers=(1, 1, 1, 1)),
}

def make(name="translution_alpha_vit_tiny_patch16_224", **more):
    return timm.create_model(name, **(SMALL[name] | more)).eval()

def refused(part, call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"want an error with {part}")
"""


def run(code, folder):
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, cwd=folder,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_models(tmp_path):
    """Names, logits, features and heads of each family, and weights to and fro."""
    code = """
names = timm.list_models("translution_*", module="timm")
assert set(SMALL) <= set(names) and len(names) == len(set(names)) == 125, len(names)
assert not any("gpt" in name for name in names)
assert timm.create_model("resnet26").__class__.__module__ == "timm.models.resnet"
for name in SMALL:
    model = make(name, num_classes=7)
    assert model.default_cfg["mean"] == (0.485, 0.456, 0.406)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    logits, features = model(x), model.forward_features(x)
    assert logits.shape == (2, 7) and model.num_classes == 7
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(pooled), logits)
    # the same model as without timm
    plain = create_model(model.family, **vars(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(plain(x), logits, atol=1e-6)
    model.save_pretrained(name)
    again = make(name, num_classes=7, checkpoint_path=f"{name}/model.safetensors")
    assert torch.allclose(again(x), logits, atol=1e-6)
    assert torch.allclose(type(model).from_pretrained(name)(x), logits, atol=1e-6)
    # other heads
    model.reset_classifier(0)
    assert torch.allclose(model(x), pooled)
    model.reset_classifier(4, model.global_pool)
    assert model(x).shape == (2, 4)
    model.save_pretrained(name)
    assert type(model).from_pretrained(name)(x).shape == (2, 4)
    assert make(name, num_classes=0)(x).shape == (2, model.num_features)
    assert make(name, in_chans=1)(x[:, :1]).shape == (2, 1000)
    # a learning rate per layer: every parameter has its place
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len({group["lr_scale"] for group in groups}) > 3
"""
    run(code, tmp_path)


def test_maps(tmp_path):
    code = """
for name in SMALL:
    vit = "vit" in name
    model = make(name, features_only=True)
    maps = model(x)
    assert len(maps) == (3 if vit else 4)
    for each, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert each.shape == (2, channels, 64 // stride, 64 // stride), (name, each.shape)
    assert model.feature_info.reduction() == ([16] * 3 if vit else [4, 8, 16, 32])
    for module, channels in zip(
        model.feature_info.module_name(), model.feature_info.channels(), strict=True
    ):
        model.model.get_submodule(module)
    some = make(name, features_only=True, out_indices=(0, -1))
    some.load_state_dict(model.state_dict())
    every = model.model.maps(x)
    assert all(torch.equal(a, b) for a, b in zip(some(x), (every[0], every[-1]), strict=True))
    if not vit:
        plain = create_model(some.model.family, **vars(some.model.config)).eval()
        plain.load_state_dict(some.model.state_dict())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain(x), every, strict=True))

vit = make(full_last_block=True)
tokens, (last,) = vit.forward_intermediates(x, indices=1)
assert tokens.shape == (2, 17, 12) and last.shape == (2, 12, 4, 4)
rows = vit.norm(last.flatten(2).transpose(1, 2))
assert torch.allclose(rows, tokens[:, 1:], atol=1e-6)  # the grid's tokens, row by row
refused("want a ViT made with True", lambda: make().forward_intermediates(x))
refused("want False and 'NCHW'", lambda: vit.forward_intermediates(x, norm=True))
"""
    run(code, tmp_path)


def test_options(tmp_path):
    code = """
model = make(global_pool="avg", drop_rate=0.5)
assert model.config.pool == "mean" and model.forward_features(x).shape == (2, 16, 12)
assert torch.equal(model(x), model(x))
model.train()
dropped = model.forward_head(torch.ones(200, 16, 12), pre_logits=True)
assert 0.4 < (dropped == 0).float().mean() < 0.6
assert make("translution_swin_tiny", drop_path_rate=0.3).config.drop_path_rate == 0.3
assert make(dropout=0.1, relative="kv").config.dropout == 0.1
model = make().train()
model.set_grad_checkpointing()
model(x).sum().backward()
assert {block.checkpoint for block in model.blocks} == {"full"}
image = timm.data.resolve_model_data_config(make())["input_size"]
assert image[1:] in ((64, 64), (224, 224))

resnet = lambda **more: make("translution_acmix_resnet26", **more)
refused("drop_path_rate: got 0.1, but 'acmix_resnet26' has no", lambda: resnet(drop_path_rate=0.1))
resnet(drop_path_rate=0.0)
refused("attn_drop_rate: 'acmix_resnet26' has no such option", lambda: resnet(attn_drop_rate=0.1))
refused("global_pool: got 'max', want 'avg'", lambda: resnet(global_pool="max"))
refused("global_pool: got 'map', want one of ['token', 'avg']", lambda: make(global_pool="map"))
refused("want dropout=", lambda: make(proj_drop_rate=0.1))
refused("drop_rate: got 1.5", lambda: make(drop_rate=1.5))
refused("option of ViTConfig: got 'dmi'", lambda: make(dmi=3))
refused("image_size: got (50, 50)", lambda: make(img_size=50))
refused("image: got shape (2, 1, 64, 64)", lambda: resnet()(x[:, :1]))
refused("No pretrained weights exist", lambda: make(pretrained=True))
refused("has no activation checkpointing", lambda: resnet().set_grad_checkpointing())
refused("num_classes: got -1", lambda: make(num_classes=-1))
refused("global_pool: got 'avg', want 'token'", lambda: make().reset_classifier(3, "avg"))
"""
    run(code, tmp_path)


def test_preprocessing(tmp_path):
    """timm's transforms are made from what is saved with a model."""
    code = """
import warnings
import translution.interop.timm as door
from translution.models.preprocessing import Preprocessing

described = Preprocessing(
    (32, 32), 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 0.8, "bilinear", classes=("cat", "dog")
)
name = "translution_alpha_vit_tiny_patch16_224"
model = create_model(
    "alpha_vit_tiny_patch16_224", image_size=32, dim=12, depth=1, heads=2, num_classes=2
)
model.save_pretrained("shared", preprocessing=described)
again = door.TimmViT.from_pretrained("shared")
assert again.preprocessing == described
want = {
    "input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.8,
    "interpolation": "bilinear", "crop_mode": "center",
}
found = timm.data.resolve_data_config(model=again)
assert found == want, found
assert again.pretrained_cfg["num_classes"] == 2 and again.default_cfg is again.pretrained_cfg
# a model that timm makes, from the weights
cfg = door.pretrained_cfg(described)
made = timm.create_model(
    name, img_size=32, dim=12, depth=1, heads=2, num_classes=2, pretrained_cfg=cfg,
    checkpoint_path="shared/model.safetensors",
).eval()
assert timm.data.resolve_data_config(model=made) == want
x = torch.randn(2, 3, 32, 32)
assert torch.allclose(made(x), again(x), atol=1e-6)
# another head has other classes
again.reset_classifier(5)
again.save_pretrained("other")
assert door.TimmViT.from_pretrained("other").preprocessing.classes is None
assert door.TimmViT.from_pretrained("other").pretrained_cfg["num_classes"] == 5
# a digit's place on a canvas is none of timm's transforms
digits = Preprocessing((32, 32), 1, (0.5,), (0.5,), digit_size=8, canvas=32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert door.pretrained_cfg(digits)["input_size"] == (1, 32, 32)
assert "images of 32×32 pixels" in str(caught[0].message)
"""
    run(code, tmp_path)
