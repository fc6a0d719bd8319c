"""What a first call costs, and whether steps run as CUDA graphs and under torch.compile.

Each row is measured in a process of its own, `python -m translution.apps.bench.gpu_first NAME`, so
that its cache of compiled kernels is its own and a failed capture harms nothing else.
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
from ...utils.measuring import TrainingStep, now, seconds
from .cases import OPERATORS, Case
from .gpu_rows import Record, Row, Setting

__all__ = ["captured", "compilations", "compiled", "first_calls", "main", "new_shape"]

LEARNING_RATE = 0.01


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles, or takes from its cache on disk, while this is open."""
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
    """Seconds of the first forward and the first backward pass of Translution's operator, of the
    same at a second batch size, and the kernels that each compiled."""
    grid, width, batches = ((2, 2), 16, (2, 3)) if dry else ((14, 14), 192, (64, 48))
    dtype = torch.float32 if dry else torch.bfloat16
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # starts the device
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


# -- steps as a graph, and compiled ----------------------------------------------------------------


def _step(device: torch.device, dry: bool = False) -> TrainingStep:
    """A step of SGD, its products in bfloat16."""
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
    """A training step captured in a CUDA graph after one call, and replayed three times: whether
    losses and weights are those of three steps without it, and the time of both."""
    call = _step(device, dry)
    model = call.model
    start = [p.detach().clone() for p in model.parameters()]
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # the one that warms up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        call.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            held = call()

        def replay() -> Tensor:
            graph.replay()
            return held
    else:
        replay = call.__call__  # a dry run has no graphs
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
    """The same step with `torch.compile(model, mode="reduce-overhead")`: seconds until the first is
    done, the difference of its first loss to that without, and the time of a later one."""
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


# -- the part --------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., Record]] = {
    "new shape": new_shape,
    "CUDA graph": captured,
    "torch.compile": compiled,
}


def first_calls(dry: bool) -> list[Row]:
    """The rows of the part "first"."""
    return [
        Row("first", "new shape, empty cache", lambda s: _row("new shape", s), 0, 45),
        Row("first", "CUDA graph of a step", lambda s: _row("CUDA graph", s), 0, 45),
        Row("first", "torch.compile of a step", lambda s: _row("torch.compile", s), 1, 75),
        Row("first", "new shape, kept cache", _kept, 1, 60),
    ]


def _row(kind: str, setting: Setting) -> Record:
    """In a process of its own, with an empty cache of kernels, but for a dry run."""
    if setting.dry:
        more = {"backend": setting.backend} if kind == "new shape" else {}
        return KINDS[kind](setting.device, True, **more)
    with tempfile.TemporaryDirectory(prefix="translution-") as cache:
        return _elsewhere(kind, setting, cache)


def _kept(setting: Setting) -> Record:
    """The first calls of a second process, which finds the kernels of the first one compiled."""
    if setting.dry:
        return _row("new shape", setting)
    with tempfile.TemporaryDirectory(prefix="translution-") as cache:
        _elsewhere("new shape", setting, cache)
        return _elsewhere("new shape", setting, cache)


def _elsewhere(kind: str, setting: Setting, cache: str) -> Record:
    """The numbers that a process of its own prints."""
    command = [sys.executable, "-m", "translution.apps.bench.gpu_first", kind, str(setting.device)]
    command += ["dry"] * setting.dry
    kept = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
    try:
        done = subprocess.run(
            command, env={**os.environ, **kept}, capture_output=True, text=True,
            timeout=max(1.0, setting.left()), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError("it took longer than what was left of the budget") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing on its standard error"])[-1]
        raise RuntimeError(f"its process ended with {done.returncode}: {last}")
    return dict(json.loads(lines[-1]))


def main() -> None:
    """Measure one kind and print its numbers as a line of JSON."""
    kind, device, *dry = sys.argv[1:]
    print(json.dumps(KINDS[kind](torch.device(device), bool(dry))))


if __name__ == "__main__":
    main()
