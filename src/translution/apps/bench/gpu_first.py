"""Measure first calls, training steps as CUDA graphs, and training steps under torch.compile.

Each row is measured in a new process, `python -m translution.apps.bench.gpu_first NAME`, so that it
has its own cache of compiled kernels, and a failed capture does not affect other rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models import create_model
from ...utils.measuring import TrainingStep, captured_step, now, seconds
from .cases import OPERATORS, Case
from .gpu_rows import Record, Row, Setting

__all__ = ["captured", "compilations", "compiled", "first_calls", "main", "new_shape"]

LEARNING_RATE = 0.01


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yield a list of the kernels that Triton compiles, or loads from its cache on disk."""
    import triton

    knobs, found = triton.knobs.runtime, list[str]()
    before = knobs.jit_post_compile_hook

    def noted(*arguments: Any, **keywords: Any) -> Any:
        found.append(str(keywords.get("repr", "")))
        return before(*arguments, **keywords) if before else None

    knobs.jit_post_compile_hook = noted
    try:
        yield found
    finally:
        knobs.jit_post_compile_hook = before


# -- first calls -----------------------------------------------------------------------------------


def new_shape(device: torch.device, dry: bool = False, backend: str = "auto") -> Record:
    """Measure the first forward and backward pass of Translution's operator at two batch sizes.

    Args:
        device: the device to measure.
        dry: whether to use tiny sizes.
        backend: the backend that computes.

    Returns:
        For "first" and "second_batch", the seconds of the forward pass ("first_forward_seconds")
        and of the backward pass, and the number of kernels that were compiled ("first_compiled").
    """
    grid, width, batches = ((2, 2), 16, (2, 3)) if dry else ((14, 14), 192, (64, 48))
    dtype = torch.float32 if dry else torch.bfloat16
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # initialises the device
    found: Record = {}
    for which, batch in zip(("first", "second_batch"), batches, strict=True):
        case = Case("translution", grid, False, width, width // 64 or 2, batch, dtype)
        built = OPERATORS["translution"](Case(**{**vars(case), "backend": backend}), device)
        with compilations() as names:
            start = now(device)
            y = built.forward()
            middle = now(device)
            torch.autograd.grad(y, built.leaves, torch.ones_like(y))
            found[f"{which}_forward_seconds"] = middle - start
            found[f"{which}_backward_seconds"] = now(device) - middle
        found[f"{which}_compiled"] = len(names)
    return found


# -- training steps as a CUDA graph and compiled ---------------------------------------------------


def _step(device: torch.device, dry: bool = False) -> TrainingStep:
    """Make a training step with SGD and matrix products in bfloat16."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth": 2}
    if dry:
        options |= {"image_size": 8, "patch_size": 4, "dim": 16, "heads": 2, "head_dim": 8}
    with device:
        model = create_model("translution_vit_tiny_patch16_224", num_classes=10, **options)
    side = 8 if dry else 224
    images = torch.randn(2 if dry else 32, 3, side, side, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    return TrainingStep(model, images, labels, optimizer, torch.bfloat16)


def captured(device: torch.device, dry: bool = False) -> Record:
    """Capture a training step in a CUDA graph, and compare it with the same step without a graph.

    Both make three steps from the same weights.

    Args:
        device: the device to measure.
        dry: whether to use tiny sizes; on a CPU there is no graph.

    Returns:
        "equal_bits", whether all losses and weights are equal; "largest_difference", the largest
        relative difference of them; "graph_seconds" and "eager_seconds", the time of a step.
    """
    call = _step(device, dry)
    model = call.model
    start = [p.detach().clone() for p in model.parameters()]
    replay = captured_step(call) if device.type == "cuda" else call.__call__  # a dry run
    _set(model, start)
    losses = [replay().clone() for _ in range(3)]
    weights = [p.detach().clone() for p in model.parameters()]
    replayed = seconds(replay, device, 1 if dry else 10)
    _set(model, start)
    wanted = [call().clone() for _ in range(3)]
    wanted += [p.detach() for p in model.parameters()]
    pairs = list(zip([*losses, *weights], wanted, strict=True))
    error = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
    return {
        "equal_bits": all(torch.equal(a, b) for a, b in pairs),
        "largest_difference": error,
        "graph_seconds": replayed,
        "eager_seconds": seconds(call, device, 1 if dry else 10),
    }


def _set(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)


def compiled(device: torch.device, dry: bool = False) -> Record:
    """Measure a training step with `torch.compile(model, mode="reduce-overhead")`.

    Args:
        device: the device to measure.
        dry: whether to use tiny sizes and the backend "eager".

    Returns:
        "first_seconds", the time of the first step with its compilation; "difference", the relative
        difference between its loss and that of the uncompiled step; "compiled_seconds", the time of
        a later step.
    """
    call = _step(device, dry)
    model = call.model
    start = [p.detach().clone() for p in model.parameters()]
    want = call()
    _set(model, start)
    keywords: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "reduce-overhead"}
    call.model = torch.compile(model, **keywords)  # type: ignore[assignment]
    began = now(device)
    loss = call().clone()
    taken = now(device) - began
    return {
        "first_seconds": taken,
        "difference": float((loss - want).abs() / want.abs()),
        "compiled_seconds": seconds(call, device, 1 if dry else 10),
    }


# -- the rows of this part -------------------------------------------------------------------------

KINDS: dict[str, Callable[..., Record]] = {
    "new shape": new_shape,
    "CUDA graph": captured,
    "torch.compile": compiled,
}


def first_calls(dry: bool) -> list[Row]:
    """Return the rows of the part "first"; `dry` takes tiny sizes."""
    return [
        Row("first", "new shape, empty cache", lambda s: _row("new shape", s), 0, 45),
        Row("first", "CUDA graph of a step", lambda s: _row("CUDA graph", s), 0, 45),
        Row("first", "torch.compile of a step", lambda s: _row("torch.compile", s), 1, 75),
        Row("first", "new shape, kept cache", _cached, 1, 60),
    ]


def _row(kind: str, setting: Setting) -> Record:
    """Measure in a new process with an empty cache of kernels; a dry run uses this process."""
    if setting.dry:
        more = {"backend": setting.backend} if kind == "new shape" else {}
        return KINDS[kind](setting.device, True, **more)
    with tempfile.TemporaryDirectory(prefix="translution-") as cache:
        return _elsewhere(kind, setting, cache)


def _cached(setting: Setting) -> Record:
    """Measure first calls in a process that finds all kernels in the cache of an earlier one."""
    if setting.dry:
        return _row("new shape", setting)
    with tempfile.TemporaryDirectory(prefix="translution-") as cache:
        _elsewhere("new shape", setting, cache)
        return _elsewhere("new shape", setting, cache)


def _elsewhere(kind: str, setting: Setting, cache: str) -> Record:
    """Measure in a new process and return the numbers that it prints."""
    command = [sys.executable, "-m", "translution.apps.bench.gpu_first", kind, str(setting.device)]
    command += ["dry"] * setting.dry
    caches = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env={**os.environ, **caches}, capture_output=True, text=True,
            timeout=max(1.0, setting.left()), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError("the row took longer than what was left of the budget") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing on its standard error"])[-1]
        raise RuntimeError(f"its process ended with {done.returncode}: {last}")
    return dict(json.loads(lines[-1]))


def main() -> None:
    """Measure the kind that the command line names, and print the numbers as a line of JSON."""
    kind, device, *dry = sys.argv[1:]
    print(json.dumps(KINDS[kind](torch.device(device), bool(dry))))


if __name__ == "__main__":
    main()
