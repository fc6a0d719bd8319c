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
    "translution_acmix_resnet26": dict(dim=8, heads=2),
    "translution_san10": dict(dim=16, group_size=2),
    "translution_acmix_pvt_tiny": dict(dims=(8, 8, 16, 16), heads=(1, 1, 2, 2), img_size=64),
    "translution_swin_tiny": dict(dim=8, heads=(1, 1, 2, 2), depths=(1, 1, 1, 1)),
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


SERVE = """
import os, sys, traceback
for line in sys.stdin:
    path = line.rstrip()
    child = os.fork()
    if not child:
        os.chdir(os.path.dirname(path))
        said = os.open(path + ".log", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 0
        try:
            exec(compile(open(path).read(), path, "exec"), globals())
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """Runs code in a fork of a process that has imported timm, as the import takes seconds."""
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    server = subprocess.Popen(
        [sys.executable, "-c", BEGIN + SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(code, folder):
        file = folder / "code.py"
        file.write_text(code)
        server.stdin.write(f"{file}\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        assert code == "0", file.with_name("code.py.log").read_text()[-3000:]

    yield run
    server.stdin.close()
    server.wait(30)
    server.stdout.close()


def test_models(run, tmp_path):
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


def test_maps(run, tmp_path):
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
    # what no map uses is pruned, as timm prunes it, so the weights may hold more
    assert not some.load_state_dict(model.state_dict(), strict=False).missing_keys
    every = model.model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(some(x), (every[0], every[-1]), strict=True))
    if not vit:
        plain = create_model(model.model.family, **vars(model.model.config)).eval()
        plain.load_state_dict(model.model.state_dict())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain(x), every, strict=True))

for name in SMALL:
    every = make(name, features_only=True, out_indices=(0, 1, 2) if "vit" in name else (0, 1, 2, 3))
    for indices in (0, 1), (1,), (2, 0), (-1,), 2:
        model = make(name, features_only=True, out_indices=indices)
        missing = model.load_state_dict(every.state_dict(), strict=False).missing_keys
        assert not missing, missing
        wanted = every(x)
        n = len(wanted)
        take = range(n - indices, n) if isinstance(indices, int) else indices
        maps = model(x)
        assert all(torch.equal(a, wanted[i]) for a, i in zip(maps, take, strict=True)), name
        model.train()
        sum(each.pow(2).sum() for each in model(x)).backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (name, indices, idle)

vit = make(full_last_block=True)
tokens, (last,) = vit.forward_intermediates(x, indices=1)
assert tokens.shape == (2, 17, 12) and last.shape == (2, 12, 4, 4)
rows = vit.norm(last.flatten(2).transpose(1, 2))
assert torch.allclose(rows, tokens[:, 1:], atol=1e-6)  # the grid's tokens, row by row
refused("the last map wants a model made with True", lambda: make().forward_intermediates(x))
_, (first,) = make().forward_intermediates(x, indices=[0])
assert first.shape == (2, 12, 4, 4)
normed, = vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
assert torch.allclose(normed.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)
pairs = vit.forward_intermediates(
    x, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
)
assert [(a.shape, b.shape) for a, b in pairs] == [((2, 16, 12), (2, 1, 12))] * 3
assert torch.allclose(torch.cat([pairs[-1][1], pairs[-1][0]], 1), tokens, atol=1e-6)
found = vit.forward_intermediates(x, indices=[1], output_dict=True, return_prefix_tokens=True)
assert torch.equal(found["image_features"], tokens)
assert found["image_intermediates_prefix"][0].shape == (2, 1, 12)
assert len(found["image_intermediates"]) == 1
refused("norm: got True for TimmResNet, want a ViT", lambda: make(
    "translution_acmix_resnet26").forward_intermediates(x, norm=True))
refused("output_fmt: got 'NHWC', want 'NCHW' or 'NLC'", lambda: vit.forward_intermediates(
    x, output_fmt="NHWC"))
"""
    run(code, tmp_path)


def test_options(run, tmp_path):
    code = """
model = make(global_pool="avg", drop_rate=0.5)
assert model.config.pool == "mean" and model.forward_features(x).shape == (2, 16, 12)
assert torch.equal(model(x), model(x))
model.train()
dropped = model.forward_head(torch.ones(200, 16, 12), pre_logits=True)
assert 0.4 < (dropped == 0).float().mean() < 0.6
assert make("translution_swin_tiny", drop_path_rate=0.3).config.drop_path_rate == 0.3
assert make(dropout=0.1, relative="kv").config.dropout == 0.1
for name in "translution_alpha_vit_tiny_patch16_224", "translution_swin_tiny":
    model = make(name, drop_path_rate=0.0).train()
    want = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    kinds = [getattr(part, "activation_checkpointing", None) for part in model.modules()]
    assert kinds.count("full") == (3 if "vit" in name else 4), kinds
    got = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    model.set_grad_checkpointing(False)
    kinds = [getattr(part, "activation_checkpointing", None) for part in model.modules()]
    assert "full" not in kinds
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
refused("whose batch norms would count each", lambda: resnet().set_grad_checkpointing())
refused("num_classes: got -1", lambda: make(num_classes=-1))
refused("global_pool: got 'avg', want 'token'", lambda: make().reset_classifier(3, "avg"))
refused("want 'token' (or '' without a head", lambda: make().reset_classifier(3, ""))
refused("num_heads: got 3, but heads=2; want one", lambda: make(num_heads=3))
"""
    run(code, tmp_path)


def test_names_of_options_and_stochastic_depth(run, tmp_path):
    code = """
name = "translution_alpha_vit_tiny_patch16_224"
vit = timm.create_model(
    name, img_size=64, patch_size=16, embed_dim=12, depth=3, num_heads=2, mlp_ratio=2.0,
    drop_path_rate=0.6,
)
assert (vit.config.dim, vit.config.heads, vit.config.mlp_ratio) == (12, 2, 2.0)
swin = timm.create_model(
    "translution_swin_tiny", embed_dim=8, num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1)
)
assert swin.config.dim == 8
pvt = timm.create_model(
    "translution_pvt_tiny", embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2),
    sr_ratios=(4, 2, 1, 1),
)
assert tuple(pvt.config.reductions) == (4, 2, 1, 1)
# a block of rate 0.6 drops both of its parts, each for 0.6 of the images, and scales what is left
import copy
x = torch.randn(400, 3, 64, 64)
block = copy.deepcopy(vit).train().blocks[-1]
tokens = torch.randn(400, 17, 12)
torch.manual_seed(0)
with torch.no_grad():
    changed = block(tokens, (4, 4)) - tokens[:, :1]
    idle = (changed.abs().amax((1, 2)) == 0).float().mean()
    assert 0.28 < idle < 0.44, idle  # 0.6 twice
    block.mlp[-1].rate = 0.0
    block.mlp[3].weight.zero_(), block.mlp[3].bias.zero_()
    changed = block(tokens, (4, 4)) - tokens[:, :1]
    whole = block.eval()(tokens, (4, 4)) - tokens[:, :1]
    kept = changed.abs().amax((1, 2)) > 0
    assert 0.32 < kept.float().mean() < 0.48
    assert torch.allclose(changed[kept], whole[kept] / 0.4, atol=1e-4)
assert [block.mlp[-1].rate for block in vit.blocks] == [0.0, 0.3, 0.6]
# weights have the same names, and nothing is dropped in evaluation
plain = timm.create_model(name, img_size=64, embed_dim=12, depth=3, num_heads=2, mlp_ratio=2.0)
plain.load_state_dict(vit.state_dict())
assert torch.equal(plain.eval()(x[:2]), vit.eval()(x[:2]))
"""
    run(code, tmp_path)


def test_other_input_sizes(run, tmp_path):
    code = """
import translution
for mixer in "alpha", "translution", "attention":
    name = f"translution_{mixer}_vit_tiny_patch16_224".replace("translution_" * 2, "translution_")
    small = dict(dim=12, depth=2, heads=2)
    model = timm.create_model(name, img_size=64, **small).eval()
    want = create_model(model.family, **vars(model.config)).eval()
    want.load_state_dict(model.state_dict())
    translution.resize_offsets(want, (6, 8))
    model.set_input_size(img_size=(96, 128))
    image = torch.randn(2, 3, 96, 128)
    assert torch.equal(model(image), want(image))
    assert model.config.image_size == (96, 128)
    model.save_pretrained(mixer)
    assert torch.equal(type(model).from_pretrained(mixer).eval()(image), model(image))
    refused("image_size: got (50, 50)", lambda: model.set_input_size(50))
    refused("patch_size: got 8, but only img_size", lambda: model.set_input_size(96, patch_size=8))
for name in SMALL.keys() - {"translution_alpha_vit_tiny_patch16_224"}:
    model = make(name, num_classes=3)
    model.set_input_size(img_size=(96, 128))
    assert model(torch.randn(2, 3, 96, 128)).shape == (2, 3)
"""
    run(code, tmp_path)


def test_what_timm_expects_of_its_own(run, tmp_path):
    """Forward, backward, heads, features, names of layers, copies, export: of each family."""
    code = """
import copy
for name in SMALL:
    vit = "vit" in name
    model = make(name, num_classes=5)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["classifier"] + ".weight" in state and cfg["first_conv"] + ".weight" in state, name
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] in (3, 3 * 16 * 16)
    assert model.num_classes == 5 and model.num_features > 0 and model.head_hidden_size > 0
    # backward: a finite gradient for every parameter
    model.train()
    out = model(x)
    out.mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    model.eval()
    # no head, then no pooling either
    features = model.forward_features(x)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features) and model.global_pool == ""
    made = make(name, num_classes=0, global_pool="")
    assert made(x).shape == features.shape
    made.reset_classifier(4, made.pool_kind)
    assert made(x).shape == (2, 4)
    if cfg["pool_size"] and "pvt" not in name:  # whose features are tokens
        large = torch.randn(1, 3, 224, 224)
        assert make(name).forward_features(large).shape[2:] == cfg["pool_size"]
    # maps: all, and all but the last
    whole = make(name, **({"full_last_block": True} if vit or "pvt" in name else {}))
    count = len(whole.feature_info)
    features, maps = whole.forward_intermediates(x)
    assert torch.equal(features, whole.forward_features(x)) and len(maps) == count
    for each, info in zip(maps, whole.feature_info, strict=True):
        assert each.shape[1] == info["num_chs"] and each.shape[2] == 64 // info["reduction"]
    pruned = copy.deepcopy(whole)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    fewer = pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(fewer, maps, strict=False))
    # copies, half precision, channels last, and a program
    again = copy.deepcopy(whole)
    assert torch.equal(again(x), whole(x))
    assert whole.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(again.to(memory_format=torch.channels_last)(last), again(x), atol=1e-6)
    program = torch.export.export(again, (x,))
    assert torch.allclose(program.module()(x), again(x), atol=1e-5)
"""
    run(code, tmp_path)


def test_preprocessing(run, tmp_path):
    """timm's transforms are made from what is saved with a model."""
    code = """
import warnings
import translution.interop.timm as door
from translution.models.preprocessing import Preprocessing

described = Preprocessing(
    (32, 32), 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 0.8, "bilinear", classes=("cat", "dog")
)
name = "translution_alpha_vit_tiny_patch16_224"
small = dict(image_size=32, dim=12, depth=1, heads=2, num_classes=2)
model = create_model("alpha_vit_tiny_patch16_224", **small)
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
