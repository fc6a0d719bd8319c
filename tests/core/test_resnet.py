from __future__ import annotations

import copy

import pytest
import torch

from translution import create_model, list_models
from translution.models.residual_network import ResNet, ResNetConfig, resnet
from translution.utils.measuring import multiply_adds

SMALL = {"depths": (1, 2, 1, 1), "dim": 8, "num_classes": 5, "in_channels": 2, "heads": 2}


def small(mixer, **more):
    return ResNet(ResNetConfig(mixer=mixer, **SMALL | {"kernel_size": 3} | more))


@pytest.mark.parametrize(
    ("name", "parameters", "adds"),
    [
        ("acmix_resnet26", 10.49, 2.22),
        ("acmix_resnet38", 14.41, 2.86),
        ("acmix_resnet50", 18.33, 3.50),
        ("resnet26", 13.70, 2.34),
        ("resnet38", 19.63, 3.22),
        ("resnet50", 25.56, 4.09),
    ],
)
def test_counts(name, parameters, adds):
    """The paper says 10.6 / 14.6 / 18.6 M and 2.3 / 2.9 / 3.6 G; its published code has these."""
    with torch.device("meta"):
        model, image = create_model(name).eval(), torch.empty(1, 3, 224, 224)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
            parameters, abs=0.01
        )
        assert multiply_adds(lambda: model(image)) / 1e9 == pytest.approx(adds, rel=0.01)


@pytest.mark.parametrize("mixer", ["acmix", "convolution"])
def test_small_models(mixer):
    model = small(mixer)
    x = torch.randn(3, 2, 67, 45)
    y = model(x)
    assert y.shape == (3, 5)
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    model.eval()
    again = small(mixer).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    with torch.device("meta"):
        assert small(mixer)(x.to("meta")).shape == (3, 5)
    assert torch.isfinite(copy.deepcopy(model).bfloat16()(x.bfloat16())).all()


@pytest.mark.parametrize("mixer", ["acmix", "convolution"])
def test_features(mixer):
    model = small(mixer, features_only=True)
    maps = model(torch.randn(1, 2, 67, 45))
    assert model.strides == (4, 8, 16, 32)
    assert [m.shape[1] for m in maps] == list(model.channels) == [32, 64, 128, 256]
    sizes = [(-(-67 // s), -(-45 // s)) for s in model.strides]
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    assert not hasattr(model, "head")
    whole = small(mixer)
    whole.load_state_dict(
        model.state_dict() | {k: v for k, v in whole.state_dict().items() if "head" in k}
    )
    x = torch.randn(2, 2, 32, 32)
    torch.testing.assert_close(whole.eval()(x), whole.classify(model.eval()(x)[-1]))


def test_the_parent_differs_in_the_middle_alone():
    theirs = {k for k in small("convolution").state_dict() if "conv2" not in k}
    assert theirs == {k for k in small("acmix").state_dict() if "conv2" not in k}


def test_shifts_survive_the_models_initialisation():
    model = small("acmix")
    shifts = [v for k, v in model.state_dict().items() if k.endswith("shifts")]
    assert len(shifts) == 5
    assert all(((s == 0) | (s == 1)).all() and s.sum() == s.shape[0] * 9 for s in shifts)


def test_compile():
    torch._dynamo.reset()
    model = small("acmix", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 2, 33, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_names():
    assert {"acmix_resnet26", "acmix_resnet38", "acmix_resnet50"} <= set(list_models("acmix_*"))
    assert {"resnet26", "resnet38", "resnet50"} <= set(list_models("resnet*"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resnet("18"), "size: got '18'"),
        (lambda: resnet(mixer="attention"), "mixer: got 'attention'"),
        (lambda: small("acmix", depths=(1, 1)), "depths: got"),
        (lambda: small("acmix", heads=3), "heads: got 3, want a divisor"),
        (lambda: small("acmix", num_classes=0), "num_classes: got 0"),
        (lambda: resnet(depth=3), "option of ResNetConfig: got 'depth'"),
        (lambda: small("acmix")(torch.zeros(1, 3, 32, 32)), "image: got shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
