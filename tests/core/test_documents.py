"""Several documents in one row: each has the logits and the gradients that it has alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import CAUSAL, GEOMETRY, VOCAB, model_of
from torch import nn

from translution import gpt, register_mixer

CONTEXT = 12


def same(got, want, tol=1e-11):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@st.composite
def rows(draw):
    """The lengths of the documents of each row; the rows are equally long."""
    length = draw(st.integers(1, CONTEXT))
    cuts = [sorted(draw(st.sets(st.integers(1, length)))) for _ in range(draw(st.integers(1, 3)))]
    edges = [sorted({0, *cut, length}) for cut in cuts]
    return [[b - a for a, b in itertools.pairwise(edge)] for edge in edges]


def numbers(draw, lengths):
    """A number for each token. Those of neighbouring documents differ, and others may be equal."""
    found, last = [], None
    for length in lengths:
        last = draw(st.integers(-2, 2).filter(lambda number, last=last: number != last))
        found += [last] * length
    return found


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("mixer", CAUSAL)
@settings(max_examples=4)
@given(data=st.data())
def test_documents_are_alone(mixer, geometry, data):
    model = model_of(mixer, context=CONTEXT, **geometry)
    lengths = data.draw(rows())
    ids = torch.randint(0, VOCAB, (len(lengths), sum(lengths[0])))
    documents = torch.tensor([numbers(data.draw, row) for row in lengths])
    y = model(ids, documents=documents)
    each = [text for row, of in zip(ids, lengths, strict=True) for text in row.split(of)]
    alone = torch.cat([model(text[None])[0] for text in each])
    same(y.flatten(0, 1), alone)
    up = torch.randn_like(alone)
    parameters = list(model.parameters())
    got = torch.autograd.grad((y.flatten(0, 1) * up).sum(), parameters)
    same(got, torch.autograd.grad((alone * up).sum(), parameters), 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": "rotary", "learned_positions": True, "kv_heads": 1},
        {"mixer": "translution", "relative": "v", "position": "rotary", "relative_depth": 1},
        {"mixer": "alpha", "learned_positions": True, "activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_further_options(options):
    model = model_of(context=CONTEXT, **options).train()
    ids = torch.randint(0, VOCAB, (2, 9))
    documents = torch.tensor([[0] * 4 + [1] * 5, [7] * 1 + [7] * 5 + [3] * 3])
    y = model(ids, documents=documents)
    same(y[0], torch.cat([model(ids[:1, :4])[0], model(ids[:1, 4:])[0]]))
    same(y[1], torch.cat([model(ids[1:, :6])[0], model(ids[1:, 6:])[0]]))


@torch.no_grad()
def test_programs():
    torch._dynamo.reset()
    model = model_of("attention", depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, documents = torch.randint(0, VOCAB, (2, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    same(compiled(ids, documents=documents), model(ids, documents=documents))


class WithoutMask(nn.Module):
    def forward(self, x, grid=None):
        return x


def test_bad_arguments_are_named(own_names):
    model, ids = model_of("rotary"), torch.zeros(2, 5, dtype=torch.int64)
    for documents, message in (
        (ids[:, :4], r"documents: got torch.int64 of shape \(2, 4\), want int64 .* \(2, 5\)"),
        (ids.double(), "documents: got torch.float64"),
        ([0], "documents: got list"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, documents=documents)
    with pytest.raises(ValueError, match="documents: got a mask as well"):
        model(ids, mask=ids == 0, documents=ids)
    with torch.no_grad(), pytest.raises(ValueError, match="documents: got caches as well"):
        model(ids, model.make_caches(), documents=ids)
    register_mixer("mine", lambda dim: WithoutMask(), causal=True)
    mine = gpt(mixer="mine", context=8, vocab_size=5, dim=8, depth=1, heads=2)
    for more in ({"documents": ids}, {"mask": ids == 0}):
        with pytest.raises(ValueError, match="got a tensor, want None: the mixer WithoutMask"):
            mine(ids, **more)
