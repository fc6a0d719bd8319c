"""SAN's patchwise attention, its ACmix, and the SAN backbones."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from translution.functional import shift_and_sum
from translution.models.self_attention_network import SANS, SANConfig, san
from translution.modules.patchwise import PatchwiseACmix2d, PatchwiseAttention2d
from translution.utils.measuring import multiply_adds

# -- the oracle: place by place, tap by tap, in float64 -------------------------------------------


def mirrored(place: int, size: int) -> int:
    """Walk back from the ends until inside."""
    while not 0 <= place < size:
        if size == 1:
            return 0
        place = -place if place < 0 else 2 * (size - 1) - place
    return place


def normalised(x, weight, bias, eps=1e-5):
    """Batch norm in training, x [batch, channels, places]."""
    mean = x.mean((0, 2), keepdim=True)
    spread = ((x - mean) ** 2).mean((0, 2), keepdim=True)
    return (x - mean) / (spread + eps) ** 0.5 * weight[:, None] + bias[:, None]


def linear(conv, x):
    """A 1×1 convolution of vectors [batch, channels, ...]."""
    y = torch.einsum("oi,bi...->bo...", conv.weight[:, :, 0, 0], x)
    return y if conv.bias is None else y + conv.bias.view(-1, *[1] * (x.ndim - 2))


def patchwise(module, x):
    """The answer of a PatchwiseAttention2d, from its parameters alone."""
    k, stride, dilation = module.kernel_size, module.stride, module.dilation
    height, width = x.shape[2:]
    query, key, value = (linear(p, x) for p in (module.q_proj, module.k_proj, module.v_proj))
    places = list(itertools.product(range(0, height, stride), range(0, width, stride)))

    def neighbors(y, x):
        for row, column in itertools.product(range(k), repeat=2):
            away = dilation * (row - k // 2), dilation * (column - k // 2)
            yield mirrored(y + away[0], height), mirrored(x + away[1], width)

    relations = []
    for place in places:
        around = torch.stack([key[:, :, a, b] for a, b in neighbors(*place)], 2)
        relations.append(torch.cat([query[:, :, place[0], place[1]], around.flatten(1)], 1))
    norm1, _, conv1, norm2, _, conv2 = module.to_weights
    w = normalised(torch.stack(relations, 2), norm1.weight, norm1.bias).clamp(min=0)
    w = normalised(linear(conv1, w), norm2.weight, norm2.bias).clamp(min=0)
    w = linear(conv2, w)
    rows = []
    for i, place in enumerate(places):
        channels = []
        for c in range(module.out_channels):
            group = c % (module.out_channels // module.group_size)
            total = 0
            for tap, (a, b) in enumerate(neighbors(*place)):
                total = total + w[:, group * k * k + tap, i] * value[:, c, a, b]
            channels.append(total)
        rows.append(torch.stack(channels, 1))
    out = len(range(0, height, stride)), len(range(0, width, stride))
    return torch.stack(rows, 2).unflatten(2, out)


def shaken(module):
    """Nothing at its start, so that nothing hides behind a one or a zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def both(module, function, x):
    """The output and all gradients of module and function."""
    found = []
    for call in (module, lambda x: function(module, x)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        found.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], up)])
    return found


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"),
    [
        ((5, 4), 3, 1, 1),
        ((3, 6), 5, 2, 1),  # reflected more than once
        ((7, 5), 3, 2, 2),
        ((2, 3), 3, 1, 3),
        ((4, 1), 7, 1, 1),
        ((5, 5), 1, 2, 1),
    ],
)
def test_patchwise_attention_is_the_oracle(size, kernel, stride, dilation):
    module = shaken(PatchwiseAttention2d(3, 4, 2, 2, kernel, stride, dilation))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    got, want = both(module, patchwise, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


def convolved(module, x):
    """The convolution path of a PatchwiseACmix2d: fc, learned shifts, sum, group by group."""
    path, r = module.convolution, module.relation_channels
    query, key, value = (linear(p, x) for p in (module.q_proj, module.k_proj, module.v_proj))
    outputs: list = [None] * module.out_channels
    for c in range(r):
        pieces = [query[:, c], key[:, c], *(value[:, i] for i in range(c, module.out_channels, r))]
        maps = torch.einsum("ts,bshw->bthw", path.fc.weight, torch.stack(pieces, 1))
        for i in range(module.out_channels // r):
            kernel = path.shifts[c * (module.out_channels // r) + i][None]
            reach = path.dilation * (path.kernel_size // 2)
            y = nn.functional.conv2d(maps, kernel, None, path.stride, reach, path.dilation)
            outputs[i * r + c] = y[:, 0] + path.bias[i * r + c]
    return torch.stack(outputs, 1)


@given(
    st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]),
    st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**31),
)  # fmt: skip
def test_acmix_is_the_sum_of_its_paths(
    height, width, kernel, conv_kernel_size, stride, dilation, seed
):
    torch.manual_seed(seed)
    # two places at least: a variance of nothing is all rounding
    x = torch.randn(2, 3, height + stride, width, dtype=torch.float64)
    module = shaken(PatchwiseACmix2d(3, 4, 2, 2, kernel, conv_kernel_size, stride, dilation))
    got, want = both(
        module, lambda m, x: m.alpha * patchwise(m, x) + m.beta * convolved(m, x), x
    )  # fmt: skip
    torch.testing.assert_close(got[0], want[0], rtol=1e-7, atol=1e-8)
    if height * width > 4:  # of nearly equal places batch norm's derivative is all rounding, too
        most = max(float(w.detach().abs().max()) for w in want)  # zeros come out as rounding of it
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-9 * most)


def test_alpha_and_beta_turn_a_path_off():
    module = shaken(PatchwiseACmix2d(3, 8, 2, 4, 5))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.fill_(0)
        module.beta.fill_(1)
        torch.testing.assert_close(module(x), module.convolve(*module.project(x)))
        torch.testing.assert_close(module(x), convolved(module, x))
        module.alpha.fill_(1)
        module.beta.fill_(0)
        torch.testing.assert_close(module(x), patchwise(module, x))


def test_a_new_acmix_shifts():
    """α = 0 and shift kernels: the maps of fc, shifted and summed."""
    module = PatchwiseACmix2d(3, 8, 2, 4, 5).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        module.alpha.fill_(0)
        module.beta.fill_(1)
        pieces = torch.cat([m.unflatten(1, (-1, 2)) for m in module.project(x)], 1)
        maps = torch.einsum("ts,bscij->btcij", module.convolution.fc.weight, pieces)
        torch.testing.assert_close(module(x), shift_and_sum(maps, 3).repeat(1, 4, 1, 1))
        plain = PatchwiseACmix2d(3, 8, 2, 4, 5, learned_shifts=False).double()
        assert "convolution.shifts" not in plain.state_dict()
        plain.load_state_dict(module.state_dict(), strict=False)
        torch.testing.assert_close(plain(x), module(x))


@pytest.mark.parametrize("kind", [PatchwiseAttention2d, PatchwiseACmix2d])
def test_half_precision_batches_and_compile(kind):
    torch._dynamo.reset()
    module = kind(4, 8, 2, 4, 3, stride=2).eval()
    x = torch.randn(2, 4, 7, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    again = x.clone().requires_grad_()
    module(again).square().sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-4, atol=1e-5)
    assert module(x[:0]).shape == (0, 8, 4, 3)
    torch.testing.assert_close(module(x[:, :, ::2]), module(x[:, :, ::2].contiguous()))
    low = copy.deepcopy(module).bfloat16()(x.bfloat16())
    torch.testing.assert_close(low.float(), module(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    torch.testing.assert_close(mixed.float(), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchwiseAttention2d(0, 8, 2), "in_channels: got 0, want an int of at least 1"),
        (lambda: PatchwiseAttention2d(4, 8, 2.0), "relation_channels: got 2.0"),
        (lambda: PatchwiseAttention2d(4, 8, 2, kernel_size=4), "kernel_size: got 4, want an odd"),
        (
            lambda: PatchwiseAttention2d(4, 12, 2),
            "group_size: got 8, want a divisor of out_channels 12",
        ),
        (lambda: PatchwiseAttention2d(4, 8, 2)(torch.zeros(1, 3, 4, 4)), r"x: got .* \(1, 3, 4, 4"),
        (lambda: PatchwiseAttention2d(4, 8, 2)(torch.zeros(4, 4, 4)), r"x: got .* \(4, 4, 4\)"),
        (lambda: PatchwiseACmix2d(4, 8, 3), "relation_channels: got 3, want a divisor"),
        (
            lambda: PatchwiseACmix2d(4, 8, 2, conv_kernel_size=2),
            "conv_kernel_size: got 2, want an odd",
        ),
        (lambda: san("50"), "size: got '50', want one of"),
        (lambda: san(mixer="acmixx"), "mixer: got 'acmixx'"),
        (lambda: san(depths=(1, 2, 3, 4)), "depths: got .* want five"),
        (lambda: san(kernel_sizes=(3, 7, 7, 7, 0)), "kernel_sizes: got .* want five"),
        (lambda: san(dim=40), "dim: got 40, want a multiple of 16"),
        (lambda: san(num_classes=0), "num_classes: got 0, want at least 1"),
        (lambda: san(depth=3), "option of SANConfig: got 'depth'"),
        (lambda: small("acmix")(torch.zeros(1, 1, 8, 8)), r"image: got shape \(1, 1, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the backbones --------------------------------------------------------------------------------

MIXERS = ["attention", "acmix"]


def small(mixer, **more):
    options = {"depths": (1, 1, 2, 1, 1), "dim": 16, "group_size": 4, "num_classes": 5}
    return san("10", mixer, **options | more)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_model(mixer):
    model = small(mixer)
    x = torch.randn(3, 3, 35, 40)
    y = model(x)
    assert y.shape == (3, 5)
    y.square().sum().backward()
    for key, p in model.named_parameters():
        # what batch norm subtracts again would get rounding, not zeros
        assert p.grad is not None, key
        assert p.grad.abs().max() > 1e-5, key
    again = small(mixer)
    again.load_state_dict(model.state_dict())
    model, again = model.eval(), again.eval()
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    with torch.device("meta"):
        assert small(mixer)(x.to("meta")).shape == (3, 5)
    low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(67, 45), (32, 64), (1, 9)])
def test_maps(mixer, size):
    model = small(mixer, features_only=True).eval()
    assert not hasattr(model, "head")
    maps = model(torch.randn(2, 3, *size))
    assert model.strides == (4, 8, 16, 32)
    for m, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert m.shape == (2, channels, *(-(-n // stride) for n in size))
        assert torch.isfinite(m).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiles(mixer):
    torch._dynamo.reset()
    model = small(mixer, depths=(1, 1, 1, 1, 1)).eval()
    x = torch.randn(2, 3, 17, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_acmix_stands_in_the_wide_stages_only():
    model = san("10", "acmix", dim=16, group_size=4)
    kinds = [{type(block.attention) for block in stage.blocks} for stage in model.stages]
    assert kinds == [{PatchwiseAttention2d}] + [{PatchwiseACmix2d}] * 4
    assert SANConfig().depths == SANS["19"]


def as_san_counts(model, x):
    """What SAN's paper counts beyond the convolutions, the linear layer and the weighted sums, and
    the biases that it has and we leave out: (numbers, parameters)."""
    numbers, parameters = [], []

    def visit(module, inputs, y):
        if isinstance(module, nn.BatchNorm2d):
            numbers.append(2 * y.numel())
        elif isinstance(module, nn.MaxPool2d):
            numbers.append(inputs[0].numel())
        elif isinstance(module, nn.ReLU) or getattr(module, "bias", None) is not None:
            numbers.append(y.numel() if y.ndim == 4 else 0)
        elif isinstance(module, nn.Conv2d) and module not in counted_without:
            numbers.append(y.numel())
            parameters.append(module.out_channels)
        if isinstance(module, PatchwiseACmix2d):
            # fc and the grouped convolution in two steps; fused they are one multiplication
            # per weight of the product, which is itself multiplied out once
            path, places = module.convolution, y.shape[2] * y.shape[3]
            slices, taps, r = path.slices, path.kernel_size**2, path.channels
            apart = slices * taps + taps * taps * path.outputs_per_group
            numbers.append((apart - slices * taps * path.outputs_per_group) * r * places)
            numbers.append(-path.out_channels * taps * taps * slices)

    # those without a bias in SAN's code, too: between stages, and between the weights' batch norms
    counted_without = {model.stem[0], *(stage.conv for stage in model.stages)}
    counted_without |= {
        block.attention.to_weights[2] for stage in model.stages for block in stage.blocks
    }
    hooks = [m.register_forward_hook(visit) for m in model.modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    return sum(numbers) + 2048 * 7 * 7, sum(parameters)  # the mean over the last map


@pytest.mark.parametrize(
    ("size", "mixer", "params", "published", "adds", "counted", "paper"),
    [
        ("10", "attention", 11.833, 11.8, 1.791, 1.865, 1.9),
        ("15", "attention", 16.168, 16.2, 2.478, 2.583, 2.6),
        ("19", "attention", 20.501, 20.5, 3.130, 3.259, 3.3),
        ("10", "acmix", 11.984, 11.99, 1.826, 1.925, 1.9),
        ("15", "acmix", 16.399, 16.41, 2.534, 2.678, 2.7),
        ("19", "acmix", 20.810, 20.83, 3.206, 3.389, 3.4),
    ],
)
def test_counts(size, mixer, params, published, adds, counted, paper):
    with torch.device("meta"):
        model, x = san(size, mixer).eval(), torch.empty(1, 3, 224, 224)
        count = sum(p.numel() for p in model.parameters())
        found = multiply_adds(lambda: model(x))
        more, biases = as_san_counts(model, x)
    assert count / 1e6 == pytest.approx(params, abs=6e-4)
    # the parents' counts have one digit in their paper, the others two where they were measured
    digits = 0.05 if mixer == "attention" else 5e-3
    assert (count + biases) / 1e6 == pytest.approx(published, abs=digits)
    assert found / 1e9 == pytest.approx(adds, abs=6e-4)
    assert (found + more) / 1e9 == pytest.approx(counted, abs=6e-4)
    assert counted == pytest.approx(paper, abs=0.05)
