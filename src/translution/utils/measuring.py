"""Measure the time and the peak memory of a call, and describe the machine.

Why this module has its own timer: the benchmarks report ratios. Calls that are compared alternate
within one process, so that a period in which the machine is slow affects all of them. This works on
CPUs and on GPUs. `torch.utils.benchmark.Timer` and `triton.testing.do_bench` time one function
after the other; in addition, the first makes two warm-up calls before each timed call, and the
second needs a GPU.
"""

from __future__ import annotations

import functools
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
from torch.utils.flop_counter import FlopCounterMode

from .. import functional  # noqa: F401  (registers the operators and their counts)

__all__ = [
    "TrainingStep",
    "captured_step",
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
    """Return the time in seconds, after waiting until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of a call in seconds.

    Args:
        function: the call to time.
        device: the device that the call uses.
        repeats: the number of timed calls; one more call before them warms up.
    """
    return seconds_in_turn([function], device, repeats)[0]


def seconds_in_turn(
    functions: Sequence[Callable[[], object]], device: torch.device, repeats: int = 5
) -> list[float]:
    """Return the median times of several calls that alternate, in seconds.

    Each round makes every call once, so that a period in which the machine is slow affects all of
    them.

    Args:
        functions: the calls to time.
        device: the device that the calls use.
        repeats: the number of timed rounds; one more round before them warms up.

    Returns:
        The median time of each call, in the order of `functions`.
    """
    times = []
    for _ in range(repeats + 1):  # the first round warms up
        row = []
        for function in functions:
            start = now(device)
            function()
            row.append(now(device) - start)
        times.append(row)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int | None = None) -> float:
    """Measure how many floating-point operations per second a large matrix product reaches.

    Args:
        dtype: the dtype of the matrices.
        device: the device that computes the product.
        size: the side of the square matrices. None takes 8192 on a CUDA device, and elsewhere the
            largest up to 2048 that takes a fraction of a second: some CPUs multiply matrices of 16
            bits a hundred times more slowly than others.
    """
    if size is None and device.type != "cuda":
        size = 256
        while size < 2048 and size**3 / matmul_rate(dtype, device, size) < 0.01:
            size *= 2
    size = size or 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device, 5)


known_matmul_rate = functools.lru_cache(matmul_rate)
"""`matmul_rate`, measured once per process; for programs that train many small models."""


def copy_rate(device: torch.device, size: int | None = None) -> float:
    """Measure how many bytes per second a copy reads and writes.

    Args:
        device: the device whose memory is copied.
        size: the number of bytes that are copied; None takes 1 GiB on a CUDA device and 128 MiB
            elsewhere.
    """
    size = size or (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 5)


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of a model's parameters and buffers and of its optimizer's state."""
    held = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


class TrainingStep:
    """A training step for measurements: logits, cross-entropy, gradients and optimizer update.

    Each call makes one step on the same inputs and returns the loss. To train a model, use
    `translution.apps.training`.

    Args:
        model: a model that returns logits [..., classes].
        inputs: the inputs of the model.
        targets: int64, the class of each row of the logits.
        optimizer: the optimizer of the model's parameters; None makes AdamW.
        autocast: the dtype of matrix products; None keeps the dtype of the weights.
        accumulate: the number of backward passes whose gradients are added before an update.
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
            # A cache of rounded weights would outlive the CUDA graph in which it was filled.
            with torch.autocast(kind, dtype, dtype is not None, cache_enabled=False):
                logits = self.model(self.inputs)
            loss = F.cross_entropy(logits.float().flatten(0, -2), self.targets)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def peak_bytes(self) -> int:
        """Return the peak memory of a step in bytes.

        It includes the weights, the gradients, the optimizer's state and everything that the step
        allocates. On mps it is the memory that the Metal driver holds for the process after a step.
        """
        self()  # creates the optimizer's state
        self.optimizer.zero_grad()
        if self.inputs.device.type == "mps":
            self()
            return torch.mps.driver_allocated_memory()
        return held_bytes(self.model, self.optimizer) + peak_bytes(self, self.inputs.device)


def captured_step(step: TrainingStep) -> Callable[[], Tensor]:
    """Capture a training step in a CUDA graph, after one call that warms up.

    The graph has no work for the host, which otherwise limits the speed of small models.

    Args:
        step: a step on a CUDA device. Its optimizer must be one that can be captured, such as SGD,
            or AdamW with `capturable=True`.

    Returns:
        A function that replays the graph and returns its loss, which the next replay overwrites.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def multiply_adds(function: Callable[[], object]) -> int:
    """Count the multiply-adds of a call, which may run on the meta device.

    Counted are matrix products, convolutions, attention and the operators of this library.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Measure the peak tensor memory of a call, beyond the memory in use before it.

    On CUDA the allocator counts the bytes. On the CPU the profiler reports each allocation and each
    release, and the result is the largest running sum.

    Args:
        function: the call to measure; its result is dropped.
        device: a cpu or cuda device.

    Returns:
        The number of bytes.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA device.
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
    """Discard the lines that the profiler's native code writes to standard error."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def commit_here() -> str | None:
    """Return the git commit of this code, or None if the code does not run from a checkout."""
    here = Path(__file__).resolve()
    try:
        for command in ("ls-files --error-unmatch", "describe --always --dirty --abbrev=10"):
            named = [here.name] if command.startswith("ls-files") else []
            done = subprocess.run(
                ["git", *command.split(), *named],
                cwd=here.parent, capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions with which numbers were measured.

    Args:
        device: the type of the device that computed them: "cpu", "cuda" or "mps".

    Returns:
        The versions of Python, torch and this library, the system, the processor, its cores, the
        threads and the device; on "cuda" also the name of the GPU.
    """
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
