"""What is no tensor, or has no pixels, is refused with the argument's name."""

from __future__ import annotations

import numpy
import pytest
import torch

from translution import (
    ACmix2d,
    Convolution2d,
    PatchwiseAttention2d,
    ReducedACmix2d,
    WindowACmix2d,
    create_model,
)


@pytest.mark.parametrize("x", [None, numpy.zeros((1, 4, 5, 5), "f4"), torch.zeros(1, 4, 0, 5)])
@pytest.mark.parametrize(
    "layer",
    [ACmix2d(4, 4, 2), WindowACmix2d(4, 2, 3), PatchwiseAttention2d(4, 4, 4, group_size=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_image(layer, x):
    with pytest.raises(ValueError, match=r"x: got .*\(batch, 4, height, width\)"):
        layer(x)


@pytest.mark.parametrize("x", [None, numpy.zeros((1, 3, 32, 32), "f4"), torch.zeros(1, 3, 0, 32)])
@pytest.mark.parametrize("name", ["acmix_resnet26", "swin_tiny", "alpha_vit_tiny_patch16_224"])
def test_what_is_no_image_for_a_model(name, x):
    with torch.device("meta"):
        model = create_model(name)
    with pytest.raises(ValueError, match=r"image: got .*\(batch, 3, "):
        model(x)


def test_what_is_no_text_or_no_tokens():
    with pytest.raises(ValueError, match="ids: got NoneType, want a tensor"):
        create_model("gpt", dim=8, depth=1, heads=2, context=4, vocab_size=5)(None)
    for layer in ReducedACmix2d(8, 2, 2), Convolution2d(8, 2):
        with pytest.raises(ValueError, match="x: got ndarray, want a tensor"):
            layer(numpy.zeros((1, 4, 8), "f4"))
