"""The Triton backend: what it does differently from plain torch. Without a GPU it is interpreted.

`test_functional.py` compares all backends with the oracle over random layouts, `test_gpu.py` runs
on a GPU, and `test_triton_compiled.py` compiles the kernels for one.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layouts import layouts
from torch.utils._python_dispatch import TorchDispatchMode

from paths import backend_of
from translution import Layout, Translution2d, backends
from translution.backends import triton as backend
from translution.backends.triton import ahead, blocks, launch, small, support, tables
from translution.backends.triton import offset as primitives
from translution.functional import offset_mix, offset_scores
from translution.operands import Operand

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PATHS = ["triton", "triton, wide tables"]
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
    "a part of the classes": Layout((2, 3)).sharded(1, 2),
    "blocks of tokens": Layout((3, 4), prefix=1, window=1),
}


def leaves(layout, dtype, batch=2, channels=5, heads=2, width=3, bias=False, device=DEVICE):
    """xq, xk, wq, wk, wv (and bq, bk, bv) of one case."""
    g = torch.Generator().manual_seed(0)
    inner = heads * width
    shapes = [(batch, layout.n_queries, channels), (batch, layout.n_keys, channels)]
    shapes += [(layout.classes, channels, inner)] * 3 + [(layout.classes, inner)] * 3 * bias
    made = [torch.randn(s, generator=g) for s in shapes]
    made[2:5] = [w / channels**0.5 for w in made[2:5]]
    return [t.to(device, dtype).requires_grad_() for t in made]


def run(layout, tensors, path, heads=2):
    """Scores, output and all gradients."""
    xq, xk, wq, wk, wv, *biases = tensors
    bq, bk, bv = biases or (None,) * 3
    with backend_of(path) as name:
        s = offset_scores(
            xq, xk, wq, wk, layout, heads=heads, bias_query=bq, bias_key=bk, scale=0.4,
            backend=name,
        )  # fmt: skip
        a = s.masked_fill(s.isneginf(), -1e9).softmax(-1)
        y = offset_mix(a, xk, wv, layout, bias_value=bv, backend=name)
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads = torch.autograd.grad(y, tensors, up)
    return [s.masked_fill(s.isneginf(), 0.0), y, *grads]


def errors(got, want):
    """‖got − want‖ / ‖want‖ of each tensor."""
    norms = [w.double().norm().clamp(min=1e-12) for w in want]
    return [
        ((g.double().cpu() - w.double().cpu()).norm() / n.cpu()).item()
        for g, w, n in zip(got, want, norms, strict=True)
    ]


def agree(layout, tensors, path, heads=2, tolerance=1e-5):
    got, want = run(layout, tensors, path, heads), run(layout, tensors, "torch", heads)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for error in errors(got, want):
        assert error < tolerance


# -- Results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layout(name, path):
    layout = CASES[name]
    agree(layout, leaves(layout, torch.float32, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["prefix", "causal", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_plain_torch(name, dtype, path):
    """The error of both backends against float64, for the same rounded inputs."""
    layout = CASES[name]
    tensors = leaves(layout, dtype)
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    want = run(layout, exact, "torch")
    mine = errors(run(layout, tensors, path), want)
    plain = errors(run(layout, tensors, "torch"), want)
    for error, other in zip(mine, plain, strict=True):
        assert error <= 2 * other + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 8, 16, 17, 40, 128])
def test_head_dimensions(width, path):
    layout = Layout((1, 2))
    agree(layout, leaves(layout, torch.float32, channels=33, heads=1, width=width), path, 1, 1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("channels", "heads", "width"), [(64, 2, 16), (24, 3, 8), (70, 5, 12)])
def test_several_heads_to_a_tile(channels, heads, width, path):
    layout = Layout(2)
    tensors = leaves(layout, torch.float32, 3, channels, heads, width, bias=True)
    agree(layout, tensors, path, heads, 1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [0, 1, 3, 40])
def test_batches(batch, path):
    layout = Layout(3)
    agree(layout, leaves(layout, torch.float32, batch=batch, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sides", ["q", "k"])
def test_a_side_without_a_table(sides, path):
    layout = CASES["prefix"]
    xq, xk, wq, wk, wv = leaves(layout, torch.float32, channels=6)
    tensors = [xq, xk, wq if sides == "q" else None, wk if sides == "k" else None, wv]
    results = []
    for each in (path, "torch"):
        with backend_of(each) as name:
            s = offset_scores(*tensors[:4], layout, heads=2, backend=name)
            y = offset_mix(s.softmax(-1), xk, wv, layout, backend=name)
            live = [t for t in tensors if t is not None]
            results.append([s, y, *torch.autograd.grad(y.sin().sum(), live)])
    for error in errors(*results):
        assert error < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_only_the_wanted_gradients(path):
    """Each gradient alone is what it is among all of them."""
    layout = Layout(2)
    tensors = leaves(layout, torch.float32, bias=True)
    whole = run(layout, tensors, path)[2:]
    for i, want in enumerate(whole):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
        with backend_of(path) as name:
            xq, xk, wq, wk, wv, bq, bk, bv = alone
            s = offset_scores(
                xq, xk, wq, wk, layout, heads=2, bias_query=bq, bias_key=bk, scale=0.4,
                backend=name,
            )  # fmt: skip
            y = offset_mix(s.softmax(-1), xk, wv, layout, bias_value=bv, backend=name)
            up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            (got,) = torch.autograd.grad(y, alone[i], up)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_tables_wider_than_the_tokens(path):
    """As under autocast: tokens in half precision, tables and their gradients in float32."""
    layout = CASES["grid"]
    tensors = leaves(layout, torch.float32)
    for i in (0, 1):
        tensors[i] = tensors[i].detach().bfloat16().requires_grad_()
    agree(layout, tensors, path, tolerance=0.03)


@pytest.mark.parametrize("path", PATHS)
def test_equal_bits_on_every_run(path):
    layout = CASES["grid"]
    first, second = (run(layout, leaves(layout, torch.float32), path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- How the work is divided ----------------------------------------------------------------------


@pytest.mark.parametrize("bytes_held", [1, 300, 1 << 40])
def test_chunks_of_every_size(bytes_held, monkeypatch):
    """Class by class, a few classes at a time, all at once."""
    layout = Layout((2, 3))

    def held(problem, row_bytes):  # without the bytes of the scores, which are always allowed
        limit = max(1, bytes_held // (row_bytes * problem.batch))
        made = tables.chunks(layout, torch.device("cpu"), limit)
        seen.append(len(made.classes))
        return made

    seen = list[int]()
    monkeypatch.setattr(launch.Problem, "chunks", held)
    agree(layout, leaves(layout, torch.float32, bias=True), "triton, wide tables")
    assert (set(seen) == {layout.classes}) == (bytes_held == 1)
    assert (set(seen) == {1}) == (bytes_held == 1 << 40)


def test_rows_take_no_more_than_allowed(monkeypatch):
    problem = launch.Problem(Layout((4, 4)), torch.zeros(3, 16, 8), 2, 8)
    scores = 3 * 2 * 16 * 16 * 4
    for memory in (1, 100_000):
        monkeypatch.setattr(launch, "MEMORY", memory)
        rows = problem.rows(problem.chunks(32), torch.zeros(1))
        assert rows.numel() * 4 <= max(memory, scores)


@given(layouts(most=4), st.integers(1, 40))
def test_chunks_cover_the_classes(case, limit):
    keywords, input_grid = case
    layout = Layout(**keywords).at(input_grid)
    made = tables.chunks(layout, torch.device("cpu"), limit)
    starts = layout.pairs_on("cpu").starts
    if layout.classes:
        assert made.classes[0][0] == 0
        assert made.classes[-1][1] == layout.classes
    assert all(a[1] == b[0] for a, b in itertools.pairwise(made.classes))
    for (first, stop), (begin, end) in zip(made.classes, made.pairs, strict=True):
        assert (begin, end) == (starts[first], starts[stop])
        assert stop - first == 1 or end - begin <= limit
    assert made.most == max((b - a for a, b in made.pairs), default=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("parts", [2, 7])
def test_sums_made_in_parts(parts, path, monkeypatch):
    layout = CASES["blocks of tokens"]
    for module in (launch, small):
        monkeypatch.setattr(module, "split_evenly", lambda *_: parts)
    monkeypatch.setattr(small.SmallProblem, "_table_parts", lambda self: parts)
    agree(layout, leaves(layout, torch.float32, bias=True), path)


@pytest.mark.parametrize("path", PATHS)
def test_offsets_of_64_bits(path, monkeypatch):
    for module in (launch, small):
        monkeypatch.setattr(module, "long", lambda *_: True)
    layout = CASES["prefix"]
    agree(layout, leaves(layout, torch.float32, bias=True), path)


@given(layouts(most=4), st.booleans(), st.booleans(), st.integers(1, 9), st.integers(0, 30))
def test_groups_hold_every_pair_once(case, by_query, by_pair, most, limit):
    """In every chunk the entries of the groups are exactly its pairs, each with its class."""
    keywords, input_grid = case
    layout = Layout(**keywords).at(input_grid)
    pairs = layout.pairs_on("cpu")
    if not pairs.starts[-1]:
        return
    groups = tables.groups(layout, torch.device("cpu"), by_query, by_pair, most, limit)
    tokens = layout.n_queries if by_query else layout.n_keys
    members = groups.members[groups.members >= 0]
    assert sorted(members.tolist()) == list(range(tokens))
    assert groups.size <= most
    near, far = (pairs.query, pairs.key) if by_query else (pairs.key, pairs.query)
    spans = [(0, pairs.starts[-1])]
    if limit:
        spans = tables.chunks(layout, torch.device("cpu"), limit).pairs
    classes = [c for c in range(layout.classes) for _ in range(*pairs.starts[c : c + 2])]
    for chunk, (begin, end) in enumerate(spans):
        found = []
        for group, (first, stop) in enumerate(groups.spans[chunk].tolist()):
            for entry in range(first, stop):
                links = groups.links[entry].tolist()
                for token, link in zip(groups.members[group].tolist(), links, strict=False):
                    if link < 0:
                        continue
                    other = int(far[link]) if by_pair else link
                    if by_pair:
                        assert int(near[link]) == token
                    found.append((token, other, int(groups.classes[entry])))
        want = [(int(near[p]), int(far[p]), classes[p]) for p in range(begin, end)]
        assert sorted(found) == sorted(want)


def test_neighbors_share_a_group():
    """A group is a square of four tokens, which have more offsets in common than four in a row."""
    layout = Layout((6, 6))
    groups = tables.groups(layout, torch.device("cpu"), True, False, 4, 0)
    rows, columns = groups.members // 6, groups.members % 6
    assert groups.members.shape == (9, 4)
    assert (rows.max(1).values - rows.min(1).values == 1).all()
    assert (columns.max(1).values - columns.min(1).values == 1).all()


@given(st.integers(1, 1 << 20), st.integers(0, (1 << 31) - 1))
def test_division_by_multiplying(batch, row):
    multiplier, shift = tables.divisor(batch)
    assert 1 << 31 <= multiplier < 1 << 32
    assert (row * multiplier) >> shift == row // batch
    last = (
        (1 << 31) - 1 - ((1 << 31) - 1) % batch
    )  # the hardest cases: a multiple of the batch and the row before it
    for hard in (last, last - 1):
        assert (hard * multiplier) >> shift == hard // batch


def test_too_many_rows_are_refused():
    x = torch.zeros(1, 1, 1).expand(1 << 27, 4, 1)
    with pytest.raises(ValueError, match=r"got 16 pairs in a batch of 134217728, want fewer than"):
        launch.Problem(Layout(4), x, 1, 1)


# -- Block sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", blocks.KINDS)
def test_blocks_fit_every_size(kind, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "interpreted", lambda: False)
    for channels, heads, width in itertools.product(
        (16, 40, 96, 192, 320, 384, 768, 1024), (1, 3, 6, 12), (8, 24, 64, 65, 128, 300)
    ):
        by_head = kind not in ("token_grads", "table_grads")
        got = blocks.choose(kind, dtype, channels, heads * width, width if by_head else 0)
        head = blocks.power(width) if by_head else 1
        for size in (got.rows, got.n1, got.k):
            assert size >= 16
            assert size & (size - 1) == 0
        assert got.n1 % head == 0
        assert got.n2 % head == 0
        assert got.rows * (got.n1 + got.n2) <= 128 * 256


def test_measured_sizes_get_the_measured_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "interpreted", lambda: False)
    for channels, table in blocks.MEASURED.items():
        for kind, want in table.items():
            width = 64 if kind in ("scores", "mix", "score_grads", "mix_grads") else 0
            assert blocks.choose(kind, torch.bfloat16, channels, channels, width) == want


def test_blocks_that_are_tried():
    tried = blocks.Blocks(16, 16, 0, 16, 4, 1)
    usual = blocks.choose("mix", torch.float32, 64, 64, 16)
    with blocks.overridden("mix", tried):
        assert blocks.choose("mix", torch.float32, 64, 64, 16) == tried
    assert blocks.choose("mix", torch.float32, 64, 64, 16) == usual != tried


def test_which_tables_are_small():
    def path(channels, heads, width):
        w = torch.zeros(3, channels, heads * width)
        x = torch.zeros(1, 2, channels)
        return type(primitives._problem(Layout(2), x, heads, heads * width, w))

    assert path(24, 3, 8) is path(48, 6, 8) is path(64, 1, 64) is small.SmallProblem
    assert path(96, 12, 8) is path(192, 3, 64) is path(32, 5, 17) is launch.Problem


# -- Index tables ---------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Records the operators of torch that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", PATHS)
def test_a_second_call_computes_no_tables_and_does_not_synchronize(path, monkeypatch):
    """So that a step can be captured in a CUDA graph: nothing passes between host and device."""
    layout = CASES["blocks of tokens"]
    xq, xk, wq, wk, wv, bq, bk, bv = (t.detach() for t in leaves(layout, torch.float32, bias=True))

    def call():
        query, key, value = Operand(xq, wq, bq), Operand(xk, wk, bk), Operand(xk, wv, bv)
        s = primitives.scores(query, key, 2, 0.4, layout)
        a = torch.zeros_like(s)
        y = primitives.mix(a, value, layout)
        primitives.mix_backward(y, a, value, layout, [True] * 4)
        primitives.scores_backward(s, query, key, 2, 0.4, layout, [True] * 6)

    def nothing(*_, **__):
        pass

    with backend_of(path):
        call()
        for module in (launch, small):
            monkeypatch.setattr(module, "launch", nothing)
        with Calls() as calls:
            call()
    on_device = {
        "_to_copy", "_unsafe_view", "clone", "constant_pad_nd", "copy_", "empty_like", "fill_",
        "new_empty", "new_full", "new_zeros", "select", "slice", "split", "sum", "view", "zero_",
        "zeros_like",
    }  # fmt: skip
    assert set(calls.names) <= on_device


# -- Which backend is chosen -----------------------------------------------------------------------


def test_modules_run_on_it(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "torch", backend)
    layer = Translution2d(6, (2, 2), heads=2, prefix=1, qkv_bias=True).to(DEVICE)
    x = torch.randn(2, 5, 6, device=DEVICE, requires_grad=True)
    mine = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    monkeypatch.undo()
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_which_backends_are_available():
    code = """
import sys
import torch
from translution import backends
assert "triton" not in sys.modules
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


def test_why_a_gpu_is_not_used(monkeypatch):
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


def test_waiting_for_kernels_that_are_being_compiled():
    begun, finished = threading.Event(), threading.Event()

    def compiling():
        begun.set()
        time.sleep(0.05)
        finished.set()

    threading.Thread(target=compiling, name=ahead.THREAD, daemon=True).start()
    begun.wait()
    ahead.wait()
    assert finished.is_set()
    ahead.wait()  # there is nothing to wait for
