"""What only a GPU can show: `pytest -m gpu` there, under three minutes.

Few channels, head widths and dtypes, as each combination is compiled anew. Where there is no GPU,
GPU_DRY=1 runs these tests on tiny sizes in Triton's interpreter, to try the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

from translution import Layout
from translution.apps.bench.gpu_check import NeighborhoodCheck, OffsetCheck, check
from translution.apps.bench.gpu_first import captured, compilations, compiled
from translution.functional import neighborhood_attention, offset_mix, offset_scores

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DRY = not CUDA
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DRY and not os.environ.get("GPU_DRY"), reason="needs a GPU"),
]
BATCH, CHANNELS, HEADS = (2, 16, 2) if DRY else (16, 192, 3)
SIDE, LENGTH = (2, 4) if DRY else (14, 512)
LAYOUTS = {
    "grid": Layout((SIDE, SIDE)),
    "prefix": Layout((SIDE, SIDE), prefix=1),
    "prefix queries": Layout((SIDE, SIDE), prefix=1, prefix_queries=True),
    "window": Layout((SIDE, SIDE), window=(SIDE // 2, SIDE // 2)),
    "buckets": Layout((SIDE, SIDE), buckets=(2, 2)),
    "causal": Layout((LENGTH,), causal=True),
}


def passes(case):
    found = check(case, DEVICE, "triton")
    assert found["equal_bits"], "a second run gave other bits"
    assert found["passed"], found["errors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_beside_float64(name, dtype):
    passes(OffsetCheck(LAYOUTS[name], BATCH, CHANNELS, HEADS, dtype))


@pytest.mark.parametrize("factor", [2, 4])
def test_wider_models(factor):
    layout = LAYOUTS["prefix"]
    passes(OffsetCheck(layout, BATCH // 2, factor * CHANNELS, factor * HEADS, torch.bfloat16))


def test_biases():
    layout = LAYOUTS["prefix"]
    passes(OffsetCheck(layout, BATCH, CHANNELS, HEADS, torch.bfloat16, biases=True))


def test_half_precision_of_the_other_kind():
    passes(OffsetCheck(LAYOUTS["window"], BATCH, CHANNELS, HEADS, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("side", "channels", "heads", "stride"), [(56, 64, 4, 1), (28, 64, 4, 2), (7, 256, 4, 1)]
)
def test_neighborhoods_beside_float64(side, channels, heads, stride, dtype):
    if DRY:
        side, channels, heads = 4, 16, 2
    passes(NeighborhoodCheck((side, side), 4, channels, heads, dtype, 3 if DRY else 7, stride))


def test_neighborhoods_beside_the_tiling():
    """The two backends in one dtype: no further apart than rounding allows."""
    side, kernel = (4, 3) if DRY else (28, 7)
    leaves = [torch.randn(2, 2, side, side, 16, device=DEVICE, requires_grad=True) for _ in "qkv"]
    up = torch.randn(2, 2, side, side, 16, device=DEVICE)
    found = []
    for backend in ("triton", "torch"):
        y = neighborhood_attention(*leaves, kernel, backend=backend)
        found.append([y, *torch.autograd.grad(y, leaves, up)])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_another_batch_compiles_nothing():
    layout, kernel = LAYOUTS["grid"], 3 if DRY else 7
    weights = [torch.randn(layout.classes, 32, 32, device=DEVICE) for _ in "qkv"]
    wq, wk, wv = (w.div(32**0.5).to(torch.bfloat16).requires_grad_() for w in weights)

    def run(batch):
        x = torch.randn(batch, layout.tokens, 32, device=DEVICE, dtype=torch.bfloat16)
        x.requires_grad_()
        s = offset_scores(x, x, wq, wk, layout, heads=2, backend="triton")
        y = offset_mix(s.softmax(-1), x, wv, layout, backend="triton")
        torch.autograd.grad(y.sum(), [x, wq, wk, wv])
        q = x.view(batch, SIDE, SIDE, 2, 16).permute(0, 3, 1, 2, 4)
        y = neighborhood_attention(q, q, q, kernel, backend="triton")
        torch.autograd.grad(y.sum(), x)

    with compilations() as first:
        run(4)
    assert first or DRY, "the hook that counts compilations is not called"
    with compilations() as names:
        for batch in (8, 5, 2) if not DRY else (3,):
            run(batch)
    assert names == []


def test_a_step_is_captured_and_replayed():
    """In a CUDA graph, after one call that warms up."""
    found = captured(DEVICE, DRY)
    assert found["largest_difference"] < 1e-3, found


# torch itself captures an empty graph when it prepares for CUDA graphs
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_reduce_overhead():
    found = compiled(DEVICE, DRY)
    assert found["difference"] < 2e-2, found
