"""Time and peak memory of a call, and the machine they were taken on.

The timing is our own because ratios are what we report: calls that are compared are made in turn
within one process, so that a slow spell of the machine meets each of them, on the CPU as well as on
GPUs. `torch.utils.benchmark.Timer` and `triton.testing.do_bench` time one function after the other;
the first also makes two calls to warm up before each timed one, and the second needs a GPU.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .. import functional  # noqa: F401  (registers the operators)
from ..layouts import Layout

__all__ = [
    "TrainingStep",
    "commit_here",
    "copy_rate",
    "held_bytes",
    "known_matmul_rate",
    "machine",
    "matmul_rate",
    "multiply_adds",
    "now",
    "peak_bytes",
    "seconds",
    "seconds_in_turn",
]


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all that it was given so far."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median time of a call, after one to warm up."""
    return seconds_in_turn([function], device, repeats)[0]


def seconds_in_turn(
    functions: Sequence[Callable[[], object]], device: torch.device, repeats: int = 5
) -> list[float]:
    """The median times of calls made in turn, so that a slow spell of the machine meets each."""
    times = []
    for _ in range(repeats + 1):  # the first warms up
        row = []
        for function in functions:
            start = now(device)
            function()
            row.append(now(device) - start)
        times.append(row)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Floating-point operations per second of a plain large matrix product.

    Without a size, one is chosen that takes a fraction of a second: some CPUs multiply matrices of
    16 bits a hundred times more slowly than others.
    """
    if size is None and device.type != "cuda":
        size = 256
        while size < 2048 and size**3 / matmul_rate(dtype, device, size) < 0.01:
            size *= 2
    size = size or 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device, 5)


known_matmul_rate = functools.lru_cache(matmul_rate)
"""`matmul_rate`, measured once in a process: for programs that train many small models."""


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Bytes per second that a plain copy reads and writes."""
    size = size or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 5)


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's parameters and buffers and of its optimizer's state."""
    held = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


class TrainingStep:
    """A training step to be timed: logits, cross-entropy, gradients, and the optimizer's update.

    A call makes one step on inputs that stay the same, and returns the loss. It is for measuring;
    models are trained by `translution.apps.training`.

    Args:
        model: gives logits [..., classes].
        inputs: of the model.
        targets: int64, a class for each row of the logits.
        optimizer: of the model's parameters; None makes AdamW.
        autocast: the dtype of matrix products; None leaves that of the weights.
        accumulate: how many times the gradients are added up before an update.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Tensor,
        targets: Tensor,
        optimizer: torch.optim.Optimizer | None = None,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
    ):
        self.model, self.inputs, self.targets = model, inputs, targets.flatten()
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters())
        self.autocast, self.accumulate = autocast, accumulate

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        kind, dtype = self.inputs.device.type, self.autocast
        for _ in range(self.accumulate):
            # a cache of rounded weights would outlive the CUDA graph that it was filled in
            with torch.autocast(kind, dtype, dtype is not None, cache_enabled=False):
                logits = self.model(self.inputs)
            loss = F.cross_entropy(logits.float().flatten(0, -2), self.targets)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def peak_bytes(self) -> int:
        """The most bytes held at once: weights, gradients, optimizer state, and all that a step
        allocates. On mps, what the Metal driver holds for the process after a step."""
        self()  # makes the optimizer's state
        self.optimizer.zero_grad()
        if self.inputs.device.type == "mps":
            self()
            return torch.mps.driver_allocated_memory()
        return held_bytes(self.model, self.optimizer) + peak_bytes(self, self.inputs.device)


def multiply_adds(function: Callable[[], object]) -> int:
    """Multiplications (each with its addition) of matrix products, convolutions, attention and the
    library's operators in a call; it may run on the meta device."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def _flops_of_scores(xq, xk, wq, wk, bq, bk, heads, scale, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    pairs = _pairs(layout)
    inner = xq[2] if wq is None else wq[2]
    relative = [x[2] for x, w in ((xq, wq), (xk, wk)) if w is not None]
    return 2 * xq[0] * pairs * inner * (1 + sum(relative))


def _flops_of_mix(a, x, w, b, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * x[0] * _pairs(layout) * w[2] * (1 + x[2])


@functools.lru_cache
def _pairs(layout: str) -> int:
    return int((Layout.parse(layout).index >= 0).sum())


def _flops_of_attention(query, key, value, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    pairs = math.prod(query[:4]) * math.prod(kernel)
    return 2 * pairs * (key[4] + value[4])


def _flops_of_neighborhood_mix(weights, value, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(weights) * (value[1] // weights[1])


for _name, _formula in (
    ("offset_scores", _flops_of_scores),
    ("offset_mix", _flops_of_mix),
    ("neighborhood_attention", _flops_of_attention),
    ("neighborhood_mix", _flops_of_neighborhood_mix),
):
    register_flop_formula(getattr(torch.ops.translution, _name))(_formula)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most tensor memory that a call holds at once beyond what was there before it.

    On CUDA the allocator counts; on the CPU the profiler reports each allocation and release, and
    their running sum is taken. What `function` returns is dropped.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device: got {device}, peak memory is measured on cpu and cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _no_native_log(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        function()
    results = profiler.profiler.kineto_results
    changes = [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _no_native_log() -> Iterator[None]:
    """The profiler's native code writes lines to the standard error stream's descriptor."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def commit_here() -> str | None:
    """The commit this code is at, where it runs from a checkout of its own."""
    here = Path(__file__).resolve()
    try:
        for command in ("ls-files --error-unmatch", "describe --always --dirty --abbrev=10"):
            named = [here.name] if command.startswith("ls-files") else []
            told = subprocess.run(
                ["git", *command.split(), *named],
                cwd=here.parent, capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    from .._version import __version__

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "translution": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
