from __future__ import annotations

import copy

import pytest
import torch

from translution.models.backbone import ChannelNorm, DropPath, drop_path_rates
from translution.models.pyramid_transformer import PVT, PVTConfig, pvt
from translution.models.residual_network import resnet
from translution.models.swin_transformer import PatchMerging, Swin, SwinConfig, swin
from translution.utils.measuring import multiply_adds

SWIN = {
    "depths": (1, 2, 2, 1),
    "dim": 8,
    "heads": (2, 2, 4, 4),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
PYRAMID = {
    "depths": (1, 2, 1, 2),
    "dims": (8, 8, 12, 16),
    "heads": (1, 2, 3, 8),
    "mlp_ratios": (2, 2, 2, 2),
    "drop_path_rate": 0.0,
    "image_size": 64,
}


def small(kind, mixer, **more):
    common = {"mixer": mixer, "in_channels": 2, "num_classes": 5}
    if kind == "swin":
        return Swin(SwinConfig(**common | SWIN | more))
    return PVT(PVTConfig(**common | PYRAMID | more))


def stirred(model):
    """In float64, away from the start: while all channels have the same kernels, fc's bias is the
    same for all of them, and a layer norm takes that away."""
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.double()


MODELS = [
    ("swin", "attention", {}),
    ("swin", "acmix", {}),
    ("swin", "acmix", {"published": True}),
    ("swin", "acmix", {"learned_shifts": False}),
    ("pvt", "attention", {}),
    ("pvt", "acmix", {}),
    ("pvt", "acmix", {"full_last_block": True}),
]


@pytest.mark.parametrize(
    ("make", "size", "mixer", "parameters", "adds"),
    [
        # the published parents; ACmix-Swin as its published code counts
        (swin, "tiny", "attention", 28.29, 4.5),
        (swin, "small", "attention", 49.6, 8.7),
        (swin, "tiny", "acmix", 28.65, 4.65),
        (swin, "small", "acmix", 50.35, 8.99),
        (pvt, "tiny", "attention", 13.2, 1.9),
        (pvt, "small", "attention", 24.5, 3.8),
        # counted with fc and convolution always apart; they are one where that is cheaper
        (pvt, "tiny", "acmix", 13.40, 2.005),
        (pvt, "small", "acmix", 24.83, 3.950),
    ],
)
def test_counts(make, size, mixer, parameters, adds):
    more = {"full_last_block": True} if make is pvt else {}
    with torch.device("meta"):
        model, image = make(size, mixer, **more).eval(), torch.empty(1, 3, 224, 224)
        got = sum(p.numel() for p in model.parameters()) / 1e6
        assert got == pytest.approx(parameters, rel=0.003)
        assert multiply_adds(lambda: model(image)) / 1e9 == pytest.approx(adds, rel=0.02)


@pytest.mark.parametrize(
    ("size", "mixer", "saved_parameters", "saved_adds"),
    [
        # 49 tokens of 512 channels: the projections of query and output, and the MLP of 4;
        # with ACmix fc (24 -> 9) and 81 weights per channel as well
        ("tiny", "attention", 0, 49 * 512 * 512 * 10),
        (
            "small",
            "acmix",
            24 * 9 + 9 + 82 * 512 + 1,
            49 * (512 * 512 * 10 + 64 * 24 * 9 + 81 * 512),
        ),
    ],
)
def test_what_the_last_block_of_a_pvt_saves(size, mixer, saved_parameters, saved_adds):
    with torch.device("meta"):
        counts = []
        for full_last_block in (True, False):
            model, image = (
                pvt(size, mixer, full_last_block=full_last_block).eval(),
                torch.empty(1, 3, 224, 224),
            )
            adds = multiply_adds(lambda m=model, i=image: m(i))
            counts.append((sum(p.numel() for p in model.parameters()), adds))
        assert counts[0][0] - counts[1][0] == saved_parameters
        # and the attention of 49 queries to 50 keys
        assert counts[0][1] - counts[1][1] == saved_adds + 2 * 49 * 50 * 512


@pytest.mark.parametrize(("kind", "mixer", "more"), MODELS)
def test_small_models(kind, mixer, more):
    """Forward, gradients everywhere, state_dict, deepcopy, meta device, half precision."""
    model = stirred(small(kind, mixer, **more))
    x = torch.randn(2, 2, 131, 77, dtype=torch.float64)
    y = model(x)
    assert y.shape == (2, 5)
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        dead = p.grad.abs().max() < 1e-12
        assert dead == (name in dead_parameters(model, kind, mixer, more)), name
    model = model.float().eval()
    x = x.float()
    y = model(x)
    again = small(kind, mixer, **more).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), y)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    with torch.device("meta"):
        assert small(kind, mixer, **more)(x.to("meta")).shape == (2, 5)
    assert torch.isfinite(copy.deepcopy(model).bfloat16()(x.bfloat16())).all()


def dead_parameters(model, kind, mixer, more):
    """Those whose gradient is zero, and why."""
    names = {name for name, _ in model.named_parameters()}
    if mixer == "attention":
        # the keys' bias is the same for all keys and cancels in the softmax
        return {name for name in names if name.endswith("k_proj.bias")}
    if kind == "swin":
        return set()
    last = "stages.3.blocks.1.attention."
    if more.get("full_last_block"):
        # nothing reads the places after the last block, and the class token has no convolution
        dead = {n for n in names if n.startswith((last + "convolution", last + "beta"))}
        return dead | {last + "k_proj.bias"}
    return {last + "k_proj.bias"}


@pytest.mark.parametrize("mixer", ["attention", "acmix"])
def test_the_class_token_alone_gives_the_same_logits(mixer):
    whole, lean = small("pvt", mixer, full_last_block=True), small("pvt", mixer)
    lean.load_state_dict(whole.state_dict(), strict=mixer == "attention")
    x = torch.randn(2, 2, 64, 64)
    torch.testing.assert_close(lean(x), whole(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "acmix"])
@pytest.mark.parametrize("kind", ["swin", "pvt"])
@pytest.mark.parametrize("size", [(67, 45), (64, 64), (32, 50), (1, 33)])
def test_features(kind, mixer, size):
    model = small(kind, mixer, features_only=True).eval()
    maps = model(torch.randn(1, 2, *size))
    assert model.strides == (4, 8, 16, 32)
    assert tuple(m.shape[1] for m in maps) == model.channels
    assert [tuple(m.shape[2:]) for m in maps] == [
        (-(-size[0] // s), -(-size[1] // s)) for s in model.strides
    ]
    assert all(torch.isfinite(m).all() for m in maps)
    assert not hasattr(model, "head")
    assert not hasattr(model, "cls_token")


@pytest.mark.parametrize("mixer", ["attention", "acmix"])
@pytest.mark.parametrize("kind", ["swin", "pvt"])
def test_every_parameter_of_a_feature_model_has_a_gradient(kind, mixer):
    model = stirred(small(kind, mixer, features_only=True))
    sum(m.square().mean() for m in model(torch.randn(2, 2, 131, 77).double())).backward()
    for name, p in model.named_parameters():
        dead = mixer == "attention" and name.endswith("k_proj.bias")
        assert (p.grad.abs().max() < 1e-12) == dead, name


def test_a_swins_classifier_and_features_share_their_names():
    whole, maps = small("swin", "acmix").eval(), small("swin", "acmix", features_only=True).eval()
    left = maps.load_state_dict(whole.state_dict(), strict=False)
    assert {k.split(".")[0] for k in left.unexpected_keys} == {"head"}
    assert {k[:7] for k in left.missing_keys} == {"norms.0", "norms.1", "norms.2"}
    x = torch.randn(2, 2, 45, 64)
    torch.testing.assert_close(whole(x), whole.classify(maps(x)[-1]))


@pytest.mark.parametrize("mixer", ["attention", "acmix"])
def test_pvt_positions_belong_to_the_image(mixer):
    """At the size that they are made for they are taken as they are; at another interpolated."""
    model = small("pvt", mixer, features_only=True, image_size=(64, 40)).eval()
    assert [tuple(s.positions.shape[2:]) for s in model.stages] == [
        (16, 10),
        (8, 5),
        (4, 3),
        (2, 2),
    ]
    with torch.no_grad():
        for stage in model.stages:  # a constant stays one, however it is interpolated
            stage.positions.copy_(torch.ones_like(stage.positions))
        x = torch.randn(1, 2, 100, 64)
        maps = model(x)
        for stage in model.stages:
            stage.positions = torch.nn.Parameter(torch.ones(1, stage.positions.shape[1], 1, 1))
        for a, b in zip(maps, model(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["swin", "pvt"])
def test_compile(kind):
    torch._dynamo.reset()
    model = small(kind, "acmix", depths=(1, 1, 1, 2)).eval()
    x = torch.randn(2, 2, 67, 45)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_every_second_block_is_shifted():
    model = swin("tiny", dim=12)
    shifts = [[b.attention.shift for b in s if hasattr(b, "attention")] for s in model.stages]
    assert shifts == [[0, 3], [0, 3], [0, 3] * 3, [0, 3]]
    rates = [b.drop_path.rate for s in model.stages for b in s if hasattr(b, "attention")]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])


def test_patch_merging_is_as_published():
    """The channels of the four neighbours: top left, bottom left, top right, bottom right."""
    merging = PatchMerging(2)
    merging.norm = torch.nn.Identity()
    torch.nn.init.eye_(weight := torch.empty(4, 8))
    x = torch.arange(24.0).reshape(1, 2, 4, 3)
    for half in (0, 1):
        merging.proj.weight.data = weight.roll(4 * half, 1)[:, :, None, None]
        want = [x[:, :, i, half] for i in (0, 1)]
        torch.testing.assert_close(merging(x)[..., 0, 0], torch.cat(want, 1))
    assert (merging(x)[..., 1] == 0).all(), "the column that fills up an odd width"


def test_drop_path():
    x = torch.ones(4000, 2, 3)
    path = DropPath(0.25)
    y = path(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))
    assert float(y.mean()) == pytest.approx(1, abs=0.05)
    assert path.eval()(x) is x
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_channel_norm():
    norm, x = ChannelNorm(3), torch.randn(2, 3, 4, 5) * 7 + 2
    y = norm(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 4, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 4, 5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["swin", "pvt"])
def test_training_steps_lower_the_loss(kind):
    model = small(kind, "acmix", drop_path_rate=0.1)
    x, y = torch.randn(6, 2, 32, 32), torch.arange(6) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swin("huge"), "size: got 'huge', want one of"),
        (lambda: swin(mixer="convolution"), "mixer: got 'convolution'"),
        (lambda: swin(depth=3), "option of SwinConfig: got 'depth'"),
        (lambda: swin(heads=(1, 2)), r"heads: got \(1, 2\), want four"),
        (lambda: swin(dim=0), "dim: got 0"),
        (lambda: swin(dim=10), "heads: got 3, want a divisor of dim 10"),
        (lambda: swin(drop_path_rate=1.0), "drop_path_rate: got 1.0"),
        (lambda: pvt("huge"), "size: got 'huge'"),
        (lambda: pvt(mixer="rotary"), "mixer: got 'rotary'"),
        (lambda: pvt(window=3), "option of PVTConfig: got 'window'"),
        (lambda: pvt(image_size=0), "image_size: got 0"),
        (lambda: pvt(depths=(1, 1, 0, 1)), "depths: got"),
        (lambda: pvt(reductions=(1, 1, 1, 2)), "prefix: got 1, want 0 with a reduction of 2"),
        (lambda: small("pvt", "acmix").feature_maps(torch.zeros(1, 2, 8, 8)), "features_only: got"),
        (lambda: small("swin", "acmix")(torch.zeros(1, 3, 8, 8)), r"image: got shape \(1, 3"),
        (lambda: small("pvt", "acmix")(torch.zeros(2, 8, 8)), "image: got shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        call()


@pytest.mark.parametrize(("kind", "mixer"), [("swin", "acmix"), ("pvt", "attention")])
def test_blocks_recompute_to_the_same_gradients(kind, mixer):
    """With drop paths, whose draws are repeated; and in evaluation nothing is recomputed."""
    model = stirred(small(kind, mixer, drop_path_rate=0.5)).train()
    x = torch.randn(4, 2, 64, 64, dtype=torch.float64)
    found = []
    for enable in (False, True):
        model.recompute_blocks(enable)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(found[1], found[0])
    assert not model.eval()(x).grad_fn.name().startswith("Checkpoint")


@pytest.mark.parametrize("kind", ["swin", "pvt"])
def test_blocks_that_recompute_are_compiled_whole(kind):
    model = small(kind, "attention", drop_path_rate=0.5)
    model.recompute_blocks()
    x = torch.randn(4, 2, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    for size in (64, 32):  # the second one is traced with symbols for sizes
        compiled(x[..., :size, :size]).sum().backward()


def test_batch_norms_are_not_recomputed():
    model = resnet(dim=8)
    with pytest.raises(ValueError, match="got ResNet, whose batch norms would count each batch"):
        model.recompute_blocks()
    model.recompute_blocks(False)
