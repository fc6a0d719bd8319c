"""One row of the benchmark: a case in one direction, and what it is compared with."""

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
"""Comparisons with the dense gather made so far, by case and direction."""


class Rates(NamedTuple):
    """What a device can do: flops per second of a large matrix product, bytes per second copied."""

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
    """Times, rates, memory and ratios. `dense_limit`: bytes its obvious twin may take, 0 is none.

    Where the batch of the case does not fit, the twin (a dense gather, an unfold) is compared at
    the largest half, quarter, ... that does; `done` spares measuring the same comparison twice.
    `rates` are measured beside the case where they are not given; `patience` is that of `timed`.
    """
    built = OPERATORS[case.operator](case, device)
    call = step(built.forward, built.leaves, backward)
    if rates is None:
        before = matmul_rate(case.dtype, device)
        taken, most = timed(call, device, repeats, patience)
        rate = (before + matmul_rate(case.dtype, device)) / 2  # machines drift
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
    # what goes in and out once, and going back once more with its gradients
    copied = _copy_rate(device) if rates is None else rates.copy
    row["bytes_share"] = built.bytes * (3 if backward else 1) / taken / copied
    if case.operator == "translution" and chosen(case, device) != "torch":
        plain_torch = OPERATORS[case.operator](dataclasses.replace(case, backend="torch"), device)
        other = step(plain_torch.forward, plain_torch.leaves, backward)
        found = timed(other, device, repeats, patience, cold=True)  # it has nothing to compile
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
    """The name of the backend that computes a case."""
    return serving(case.backend, device, case.dtype)


def serving(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves where this one is asked for, such as "auto"."""
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
    """The operator and the dense gather at the largest fitting batch; None where none fits."""
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
    slow = step(built.dense, built.leaves, backward)
    # minutes of the slow one would measure it no better
    start = now(device)
    slow()
    few = 1 if device.type == "cpu" and now(device) - start > 4 else repeats
    # the second of two calls counts: the first takes memory anew that the slow one gave back
    times = seconds_in_turn([slow, call, call], device, few)
    return {
        "batch": case.batch,
        "seconds": times[0],
        "peak_bytes": peak(slow, device),
        "own_seconds": times[2],
        "own_peak_bytes": peak(call, device),
    }


def step(forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Callable[[], Any]:
    """A call of one direction."""
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
    """Median seconds and peak bytes. A call that takes more than `patience` seconds when it is made
    for the second time is not made again; where `cold`, for the first time."""
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
    """None where it cannot be measured (mps); the call is made all the same."""
    if device.type in ("cpu", "cuda"):
        return peak_bytes(call, device)
    call()
    return None


def _free(device: torch.device) -> float:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
