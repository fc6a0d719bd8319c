"""The Triton backend: in the interpreter where there is no GPU, and on one where there is.

`test_functional.py` runs it against the oracle over random layouts; here is what is its own.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from translution import Layout, Translution2d, backends
from translution.backends import triton as backend
from translution.backends.triton import offset, support
from translution.functional import offset_mix, offset_scores

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CASES = {
    "grid": Layout((2, 3)),
    "prefix": Layout((2, 2), prefix=1),
    "prefix queries": Layout((2, 2), prefix=1, prefix_queries=True),
    "causal": Layout(5, causal=True),
    "window": Layout((3, 3), window=1),
    "dilation": Layout(6, window=1, dilation=2),
    "buckets": Layout(7, buckets=2),
    "three axes": Layout((2, 1, 2)),
    "shorter": Layout(6, causal=True).at((4,)),
    "one token": Layout(1),
    "one query": Layout(5, causal=True).select(queries=(4,)),
}


def leaves(layout, dtype, batch=2, channels=5, heads=2, width=3, seed=0, device=DEVICE):
    """xq, xk, wq, wk, wv of one case."""
    g = torch.Generator().manual_seed(seed)
    inner = heads * width
    shapes = [(batch, layout.n_queries, channels), (batch, layout.n_keys, channels)]
    shapes += [(layout.classes, channels, inner)] * 3
    made = [torch.randn(s, generator=g) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in made]


def run(layout, tensors, backend, heads=2):
    """Scores, output and all gradients."""
    xq, xk, wq, wk, wv = tensors
    s = offset_scores(xq, xk, wq, wk, layout, heads=heads, scale=0.4, backend=backend)
    a = s.masked_fill(s.isneginf(), -1e9).softmax(-1)
    y = offset_mix(a, xk, wv, layout, backend=backend)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, tensors, up)
    return [s.masked_fill(s.isneginf(), 0.0), y, *grads]


def errors(got, want):
    """‖got − want‖ / ‖want‖ of each tensor."""
    norms = [w.double().norm().clamp(min=1e-12) for w in want]
    return [
        float((g.double().cpu() - w.double().cpu()).norm() / n.cpu())
        for g, w, n in zip(got, want, norms, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layout(name):
    layout = CASES[name]
    mine, plain = (run(layout, leaves(layout, torch.float32), b) for b in ("triton", "torch"))
    for error in errors(mine, plain):
        assert error < 1e-5


@pytest.mark.parametrize("name", ["prefix", "causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_plain_torch(name, dtype):
    """Both backends beside float64, on the same rounded inputs."""
    layout = CASES[name]
    tensors = leaves(layout, dtype)
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    want = run(layout, exact, "torch")
    mine = errors(run(layout, tensors, "triton"), want)
    plain = errors(run(layout, tensors, "torch"), want)
    for error, other in zip(mine, plain, strict=True):
        assert error <= 2 * other + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("room", [0.0, 1.0])
def test_rows_in_parts(room, monkeypatch):
    """Class by class, or as many classes as fit the room of the scores."""
    layout = Layout((2, 2))
    tensors = leaves(layout, torch.float32)
    monkeypatch.setattr(offset, "ROOM", float("inf"))
    whole = run(layout, tensors, "triton")
    monkeypatch.setattr(offset, "ROOM", room)
    for a, b in zip(run(layout, tensors, "triton"), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_cover_the_classes():
    problem = offset._Problem(Layout((3, 3)), torch.zeros(2, 9, 4, device=DEVICE), 2, 6)
    for row_bytes in (1, 48, 10**9):
        chunks = list(problem.chunks(row_bytes))
        assert chunks[0].start == 0
        assert chunks[-1].stop == 25
        assert all(a.stop == b.start for a, b in itertools.pairwise(chunks))
    assert len(list(problem.chunks(10**9))) == 25


def test_equal_bits_on_every_run():
    layout = CASES["grid"]
    first, second = (run(layout, leaves(layout, torch.float32), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    layout = CASES["grid"]
    tensors = leaves(layout, torch.float32, batch=batch)
    for a, b in zip(run(layout, tensors, "triton"), run(layout, tensors, "torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 16, 17, 40])
def test_head_dimensions(width):
    layout = Layout((1, 2))
    tensors = leaves(layout, torch.float32, channels=33, heads=1, width=width)
    for a, b in zip(
        run(layout, tensors, "triton", 1), run(layout, tensors, "torch", 1), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tables_wider_than_the_tokens():
    """As under autocast: tokens in half precision, tables and their gradients in float32."""
    layout = CASES["grid"]
    tensors = leaves(layout, torch.float32)
    for i in (0, 1):
        tensors[i] = tensors[i].detach().bfloat16().requires_grad_()
    mine, plain = (run(layout, tensors, backend) for backend in ("triton", "torch"))
    assert [t.dtype for t in mine] == [t.dtype for t in plain]
    for error in errors(mine, plain):
        assert error < 0.03


def test_modules_run_on_it(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "torch", backend)
    layer = Translution2d(6, (2, 2), heads=2, prefix=1, bias=True).to(DEVICE)
    x = torch.randn(2, 5, 6, device=DEVICE, requires_grad=True)
    mine = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    monkeypatch.undo()
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_who_can_serve():
    code = """
import torch
from translution import backends
cpu = torch.device("cpu")
assert backends.choose("auto", cpu, torch.float32) is backends.BACKENDS["torch"]
print(backends.explain(cpu, torch.float32))
try:
    backends.choose("triton", cpu, torch.float32)
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PATH": ""},
    )  # fmt: skip
    assert "'torch': None" in done.stdout
    assert "it runs on cuda devices, not cpu" in done.stdout
    assert "want 'auto' or one of ['torch'] (known: ['torch', 'triton'])" in done.stdout


def test_why_a_gpu_is_passed_over(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(support, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in backend.unavailable(cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.unavailable(cuda, torch.float32) is None
    assert backends.choose("auto", cuda, torch.float32) is backend
    assert "not torch.float64" in backend.unavailable(cuda, torch.float64)
    assert backends.choose("auto", cuda, torch.float64) is backends.BACKENDS["torch"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable(cuda, torch.float32) == "triton is not installed"


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize(
    ("layout", "batch", "channels", "heads"),
    [
        (Layout((14, 14), prefix=1), 64, 192, 3),
        (Layout((14, 14), prefix=1), 8, 768, 12),
        (Layout(1024, causal=True), 2, 192, 3),
        (Layout((14, 14), window=3), 64, 384, 6),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(layout, batch, channels, heads, dtype):
    """Against plain torch in float64 on the same device, with fresh inputs, twice."""
    for seed in range(2):
        made = leaves(layout, dtype, batch, channels, heads, channels // heads, seed)
        tensors = [
            t.detach().div(channels**0.5 if t.ndim == 3 and i > 1 else 1).requires_grad_()
            for i, t in enumerate(made)
        ]
        mine = errors(run(layout, tensors, "triton", heads), run(
            layout, [t.detach().double().requires_grad_() for t in tensors], "torch", heads
        ))  # fmt: skip
        assert max(mine) < (1e-5 if dtype == torch.float32 else 2e-2)
