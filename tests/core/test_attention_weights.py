"""Where a model looks: its attention weights, against the blocks walked one by one."""

import pytest
import torch

from translution import attention_weights, create_model
from translution.models.blocks import IMAGE_MIXERS, MIXERS


def vit(mixer, **options):
    return create_model(
        "vit", mixer=mixer, image_size=12, patch_size=4, in_channels=1, num_classes=10, dim=16,
        depth=2, heads=2, **options,
    ).eval()  # fmt: skip


def walked(model, x):
    """The first of two blocks is run, then the second one asked."""
    x = model.embed(x)
    if model.positions is not None:
        x = x + model.positions.flatten(1, 2)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
    grid, found = model.config.grid, []
    for block in model.blocks:
        ask = getattr(block.mixer, "weights", None) or (
            lambda x, grid, mixer=block.mixer: mixer(x, grid=grid, return_weights=True)[1]
        )
        found.append(ask(block.norm1(x), grid))
        x = block(x, grid)
    return found


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_of_an_image_model(mixer, pool):
    if mixer == "convolution" and pool == "cls":
        pytest.skip("a convolution has no class token")
    model, x = vit(mixer, pool=pool), torch.randn(3, 1, 12, 12)
    with torch.inference_mode():
        logits, weights = attention_weights(model, x)
        assert torch.equal(logits, model(x))
        if mixer == "convolution":
            assert weights == [None, None]
            return
        wanted = walked(model, x)
    keys = 10 if pool == "cls" else 9
    assert weights[0].shape == (3, 2, keys, keys)
    assert weights[1].shape == (3, 2, 1 if pool == "cls" else keys, keys)
    for found, want in zip(weights, wanted, strict=True):
        assert torch.allclose(found, want)
        assert torch.allclose(found.sum(-1), torch.ones(()))
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in IMAGE_MIXERS])
def test_of_a_language_model(mixer):
    model = create_model(
        "gpt", mixer=mixer, context=9, vocab_size=20, dim=16, depth=2, heads=2
    ).eval()
    ids = torch.randint(20, (2, 7))
    with torch.inference_mode():
        logits, weights = attention_weights(model, ids)
        assert torch.equal(logits, model(ids))
    for found in weights:
        assert found.shape == (2, 2, 7, 7)
        assert torch.allclose(found.sum(-1), torch.ones(()))
        assert (found.triu(1) == 0).all()


def test_hooks_are_gone_after_an_error():
    model = vit("translution")
    with pytest.raises(ValueError, match="image: got shape"):
        attention_weights(model, torch.randn(1, 3, 12, 12))
    assert not any(block.mixer._forward_pre_hooks for block in model.blocks)


def test_models_of_other_kinds_are_refused():
    model = create_model("resnet26", dim=8, num_classes=10, in_channels=1)
    with pytest.raises(ValueError, match="model: got ResNet, want a ViT or a GPT"):
        attention_weights(model, torch.randn(1, 1, 32, 32))
