"""Floating-point operations of the operators, as torch's FlopCounterMode counts them."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from translution import Layout, Translution2d
from translution.functional import (
    neighborhood_attention,
    neighborhood_mix,
    offset_mix,
    offset_scores,
)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_scores_and_mix_forward_and_backward():
    layout, batch, channels, inner = Layout((2, 3), window=1), 2, 4, 6
    pairs = int((layout.index >= 0).sum())
    x, q = (torch.randn(batch, 6, n, requires_grad=True) for n in (channels, inner))
    w = torch.randn(layout.classes, channels, inner, requires_grad=True)
    one = 2 * batch * pairs * inner  # of one product of a row and a column, per pair
    assert flops(lambda: offset_scores(q, x, None, w, layout, heads=2)) == one * (1 + channels)

    def both():
        offset_scores(q, x, None, w, layout, heads=2).masked_fill(
            layout.index < 0, 0
        ).sum().backward()

    # the scores' gradient times the other side, twice; and through the table to x and to w
    assert flops(both) == one * (1 + channels) + one * (2 + 2 * channels)
    a = torch.rand(batch, 2, 6, 6, requires_grad=True)
    assert flops(lambda: offset_mix(a, x, w, layout)) == one * (1 + channels)
    mixed = flops(lambda: offset_mix(a, x, w, layout).sum().backward())
    assert mixed == one * (1 + channels) + one * (2 + 2 * channels)


def test_classes_of_many_pairs_count_once_per_token():
    """With buckets a token is projected once per class, and the products of pairs stay."""
    layout, batch, dim = Layout(96, causal=True, buckets=2), 2, 64
    x = torch.randn(batch, 96, dim)
    w = torch.randn(layout.classes, dim, dim)
    index, pairs = layout.index, 96 * 97 // 2
    keys = sum(int((index == c).any(0).sum()) for c in range(layout.classes))
    mixed = flops(lambda: offset_mix(torch.rand(batch, 1, 96, 96), x, w, layout))
    assert keys <= mixed / (2 * batch * dim) / dim - pairs / dim <= layout.classes * 96
    assert mixed < 2 * batch * dim * pairs * (1 + dim) / 10


def test_neighborhoods():
    q, k, v = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 7)
    want = 2 * (2 * 3 * 4 * 5) * 9 * (6 + 7)
    assert flops(lambda: neighborhood_attention(q, k, v, 3)) == want
    more = flops(lambda: neighborhood_attention(q, k, v, 3, return_lse=True)) - want
    assert more == 2 * (2 * 3 * 4 * 5) * 9 * 6
    weights, value = torch.randn(1, 2, 9, 4, 5), torch.randn(1, 6, 4, 5)
    assert flops(lambda: neighborhood_mix(weights, value, 3)) == 2 * (2 * 9 * 4 * 5) * 3


ORDERS = [
    "import translution.functional\nfrom torch.utils import flop_counter",
    "from torch.utils import flop_counter\nimport translution.functional",
    "import torch, translution\nfrom translution import Translution2d\n"
    "from torch.utils import flop_counter",
]


@pytest.mark.parametrize("order", ORDERS)
def test_whichever_is_imported_first(order):
    code = (
        order
        + "\nimport torch\nprint(torch.ops.translution.offset_mix in flop_counter.flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_layer_without_the_rest_of_the_library():
    layer, x = Translution2d(8, (2, 2), 2), torch.randn(1, 4, 8)
    assert flops(lambda: layer(x)) == 2 * 16 * 8 * (1 + 16) + 2 * 16 * 8 * (1 + 8) + 2 * 4 * 64
