"""The patch grid of an image belongs to the call that processes the image."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from translution.interop.conversion import Converted, convert, patch_grid

transformers = pytest.importorskip("transformers")

WIDE, TALL, WHOLE = (2, 4), (4, 2), (4, 4)


def images(grid):
    return torch.randn(2, 3, *(8 * n for n in grid))


def model_of_any_size():
    """A converted DINOv2 whose tables differ from offset to offset."""
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.Dinov2Model(config).eval()
    convert(model, relative="qkv")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def blocks_of(model):
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_sizes_before_one_backward_with_checkpointing(use_reentrant):
    """The model's own checkpointing computes the inside of a block again, in the backward pass."""
    model, batches = model_of_any_size(), [images(grid) for grid in (WIDE, TALL, WHOLE)]
    gradients = []
    for checkpointing in False, True:
        whole = copy.deepcopy(model).train()
        if checkpointing:
            kwargs = {"use_reentrant": use_reentrant}
            whole.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        sum(whole(x)[0].pow(3).sum() for x in batches).backward()
        gradients.append([p.grad for p in whole.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks(use_reentrant):
    """Blocks that the user checkpoints, also several at once."""
    model = model_of_any_size()
    batches, gradients = [images(WIDE), images(TALL)], []
    for checkpointing in False, True:
        model.zero_grad()
        loss = 0
        for x in batches:
            tokens, blocks = model.embeddings(x), blocks_of(model)
            if checkpointing:
                tokens = checkpoint(through, blocks, tokens, use_reentrant=use_reentrant)
            else:
                tokens = through(blocks, tokens)
            loss = loss + tokens.pow(3).sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_threads_with_images_of_different_sizes():
    model, wrong = model_of_any_size(), []
    batches = [images(WIDE), images(TALL)]
    with torch.no_grad():
        want = [model(x)[0] for x in batches]

    def work(x, y):
        with torch.no_grad():
            wrong.extend(i for i in range(20) if not torch.equal(model(x)[0], y))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(batches * 2, want * 2, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_parts_that_are_called_alone():
    """Embeddings of two images, then the blocks on each; the tokens say which image they are of."""
    model = model_of_any_size()
    wide, tall = images(WIDE), images(TALL)
    want = [model(x)[0] for x in (wide, tall)]
    tokens = [model.embeddings(x) for x in (wide, tall)]
    for x, y in zip(tokens, want, strict=True):
        assert torch.equal(model.layernorm(through(blocks_of(model), x)), y)
    block = blocks_of(model)[0]
    unknown = tokens[0].clone()
    with pytest.raises(ValueError, match=r"fit the grids \[\(2, 4\), \(4, 2\)\] after"):
        block(unknown)
    with patch_grid(model, WIDE):
        assert torch.equal(block(unknown), block(tokens[0]))
    tokens[0].copy_(tokens[1])  # other tokens in the same memory
    with pytest.raises(ValueError, match="nothing says which grid this image has"):
        block(tokens[0])
    whole = model.embeddings(images(WHOLE))  # only one grid has so many tokens
    assert torch.equal(block(whole.clone()), block(whole))


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind():
    model = model_of_any_size()
    unknown = model.embeddings(images(TALL)).clone()
    with pytest.raises(ValueError, match="grid: got 5 tokens"):
        model(images((5, 4)))
    with pytest.raises(ValueError, match="nothing says"):
        blocks_of(model)[0](unknown)


@torch.no_grad()
def test_copies_and_whole_programs():
    model = model_of_any_size()
    batches = [images(WIDE), images(TALL), images(WIDE)]
    want = [model(x)[0] for x in batches]
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert all(torch.equal(other(x)[0], y) for x, y in zip(batches, want, strict=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x, y in zip(batches, want, strict=True):
        torch.testing.assert_close(compiled(x)[0], y, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_a_second_conversion_and_a_model_within_another():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner.forward(x)[0]  # not by calling the module

    model = model_of_any_size()
    names = [name for name, m in model.named_modules() if isinstance(m, Converted)]
    config = model.config
    outer = Outer(transformers.Dinov2Model(config).eval())
    x = images(WIDE)
    y = outer(x)
    convert(outer, layers=[f"inner.{names[0]}"], relative="qk")
    convert(outer, relative="v")
    torch.testing.assert_close(outer(x), y, rtol=1e-5, atol=1e-5)


def test_patch_grid_says_what_it_wants():
    with pytest.raises(ValueError, match="model: got Linear, want an image model"):
        patch_grid(nn.Linear(2, 2), (2, 2)).__enter__()
    with pytest.raises(ValueError, match="grid: got 0, want 2 ints of at least 1"):
        patch_grid(model_of_any_size(), 0).__enter__()
