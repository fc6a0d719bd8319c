"""Measure one row of the benchmark: a case, and the operators with which it is compared."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...utils.measuring import copy_rate, matmul_rate, now, peak_bytes, seconds, seconds_in_turn
from .cases import BESIDE, OPERATORS, Built, Case

__all__ = [
    "Measured",
    "Rates",
    "chosen",
    "measure",
    "measure_dense",
    "peak",
    "serving",
    "step",
    "timed",
]

Measured = dict[tuple[Case, bool], dict[str, Any]]
"""Comparisons with the direct implementation made so far, by (case, backward)."""


class Rates(NamedTuple):
    """The rates of a device.

    Attributes:
        matmul: floating-point operations per second of a large matrix product.
        copy: bytes per second that a copy reads and writes.
    """

    matmul: float
    copy: float


def measure(
    case: Case,
    device: torch.device,
    backward: bool,
    repeats: int = 5,
    dense_limit: float = 0.0,
    done: Measured | None = None,
    rates: Rates | None = None,
    patience: float = math.inf,
) -> dict[str, Any]:
    """Measure the time and memory of a case, and of the operators with which it is compared.

    The direct implementation (a gather, or for ACmix an unfold) may need too much memory at the
    batch of the case. It is then compared at half, a quarter, ... of the batch.

    Args:
        case: the operator and its shapes.
        device: the device that computes.
        backward: whether to measure forward + backward instead of forward.
        repeats: the number of timed calls; their median is reported.
        dense_limit: the bytes that the direct implementation may take; 0 leaves it out.
        done: stores comparisons with the direct implementation, so that none is measured twice.
        rates: the rates of the device; None measures them before and after the case.
        patience: see `timed`.

    Returns:
        The fields of the row, as `translution bench --json` writes them.
    """
    built = OPERATORS[case.operator](case, device)
    call = step(built.forward, built.leaves, backward)
    if rates is None:
        before = matmul_rate(case.dtype, device)
        taken, most = timed(call, device, repeats, patience)
        rate = (before + matmul_rate(case.dtype, device)) / 2  # the speed of a machine drifts
    else:
        taken, most = timed(call, device, repeats, patience)
        rate = rates.matmul
    flops = built.flops * (3 if backward else 1)
    row: dict[str, Any] = {
        "name": f"{case.name}, {'both' if backward else 'forward'}",
        "operator": case.operator,
        "grid": list(case.grid),
        "causal": case.causal,
        "batch": case.batch,
        "width": case.width,
        "heads": case.heads,
        "dtype": str(case.dtype).removeprefix("torch."),
        "relative": case.relative,
        "rank": case.rank if case.operator == "alpha" else None,
        "kernel": case.kernel if case.operator == "acmix" else None,
        "stride": case.stride,
        "buckets": case.buckets,
        "device": device.type,
        "backward": backward,
        "seconds": taken,
        "flops": flops,
        "backend": case.backend,
        "bytes": built.bytes,
        "matmul_rate": rate,
        "matmul_share": flops / taken / rate,
        "peak_bytes": most,
    }
    # forward + backward reads and writes the tensors once more, and their gradients
    copied = _copy_rate(device) if rates is None else rates.copy
    row["bytes_share"] = built.bytes * (3 if backward else 1) / taken / copied
    if case.operator == "translution" and chosen(case, device) != "torch":
        plain_torch = OPERATORS[case.operator](dataclasses.replace(case, backend="torch"), device)
        other = step(plain_torch.forward, plain_torch.leaves, backward)
        found = timed(other, device, repeats, patience, cold=True)  # plain torch compiles nothing
        row["torch_seconds"], row["torch_peak_bytes"] = found
        del plain_torch, other
    row["beside"] = built.beside
    plain = BESIDE[built.beside](case, device)
    plain_call = step(plain.forward, plain.leaves, backward)
    row["beside_seconds"], row["beside_peak_bytes"] = timed(plain_call, device, repeats, patience)
    if built.dense_bytes is not None:
        row["dense_bytes_by_shape"] = built.dense_bytes(backward)
        del built, call, plain, plain_call
        dense = measure_dense(case, device, backward, repeats, dense_limit, done)
        if dense is not None:
            row["dense"] = dense
    gc.collect()
    return row


def chosen(case: Case, device: torch.device) -> str:
    """Return the name of the backend that computes a case."""
    return serving(case.backend, device, case.dtype)


def serving(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend that an option selects.

    Args:
        asked: the name of a backend, or "auto".
        device: the device that computes.
        dtype: the dtype of the operands.
    """
    found = backends.choose(asked, device, dtype)
    return next(name for name, backend in backends.BACKENDS.items() if backend is found)


@functools.lru_cache
def _copy_rate(device: torch.device) -> float:
    return copy_rate(device)


def measure_dense(
    case: Case,
    device: torch.device,
    backward: bool,
    repeats: int,
    limit: float,
    done: Measured | None = None,
) -> dict[str, Any] | None:
    """Compare an operator with its direct implementation at the largest batch that fits.

    Args:
        case: the operator and its shapes.
        device: the device that computes.
        backward: whether to measure forward + backward instead of forward.
        repeats: the number of timed calls.
        limit: the bytes that the direct implementation may take.
        done: stores comparisons, so that none is measured twice.

    Returns:
        The "batch", the "seconds" and "peak_bytes" of the direct implementation, and those of the
        operator ("own_seconds", "own_peak_bytes"); None if no batch fits.
    """
    limit = min(limit, 0.8 * _free(device))
    built = OPERATORS[case.operator](dataclasses.replace(case, batch=1), device)
    while built.dense_bytes is not None and built.dense_bytes(backward, case.batch) > limit:
        if case.batch == 1:
            return None
        case = dataclasses.replace(case, batch=case.batch // 2)
    done = {} if done is None else done
    if (case, backward) not in done:
        done[case, backward] = _dense(
            OPERATORS[case.operator](case, device), case, device, backward, repeats
        )
    return done[case, backward]


def _dense(
    built: Built, case: Case, device: torch.device, backward: bool, repeats: int
) -> dict[str, Any]:
    assert built.dense is not None
    call = step(built.forward, built.leaves, backward)
    dense = step(built.dense, built.leaves, backward)

    def slow() -> None:
        with built.around():
            dense()

    # more calls would take minutes, and not make the result more precise
    start = now(device)
    slow()
    few = 1 if device.type == "cpu" and now(device) - start > 4 else repeats
    # the second of two calls counts: the first allocates memory that the slow call released
    times = seconds_in_turn([slow, call, call], device, few)
    return {
        "batch": case.batch,
        "seconds": times[0],
        "peak_bytes": peak(slow, device),
        "own_seconds": times[2],
        "own_peak_bytes": peak(call, device),
    }


def step(forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], Any]:
    """Return a call that computes forward, or forward and all gradients.

    Args:
        forward: computes the output.
        leaves: the tensors that get a gradient.
        backward: whether the call includes the backward pass.
    """
    if not backward:
        return torch.no_grad()(forward)
    up: Tensor | None = None

    def both() -> Any:
        nonlocal up
        y = forward()
        up = torch.randn_like(y) if up is None else up
        return torch.autograd.grad(y, leaves, up)

    return both


def timed(
    call: Callable[[], Any],
    device: torch.device,
    repeats: int,
    patience: float = math.inf,
    cold: bool = False,
) -> tuple[float, int | None]:
    """Measure the median time and the peak memory of a call.

    Args:
        call: the call to measure.
        device: the device that computes.
        repeats: the number of timed calls.
        patience: if the second call takes longer than this many seconds, its time is the result.
        cold: whether the first call may decide this already, since it compiles nothing.

    Returns:
        Seconds, and bytes (None on a device where memory cannot be measured).
    """
    if patience < math.inf:
        start = now(device)
        most = peak(call, device)
        if not cold or now(device) - start <= patience:
            start = now(device)
            call()
        once = now(device) - start
        if once > patience:
            return once, most
    return seconds(call, device, repeats), peak(call, device)


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Make a call and return its peak memory in bytes, or None on devices such as mps."""
    if device.type in ("cpu", "cuda"):
        return peak_bytes(call, device)
    call()
    return None


def _free(device: torch.device) -> float:
    """Return the bytes of memory that are available."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
