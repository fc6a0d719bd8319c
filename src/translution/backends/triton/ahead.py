"""Compiling kernels before they are needed.

A kernel takes about a second to compile, and a forward and backward pass use eight of them. If each
was compiled when it is launched, the first step of a new model would wait for all of them in turn.
Here they are compiled at the same time, in threads (Triton's compiler releases Python's lock). This
begins with the first call of the forward pass: while it waits for its own kernels, those of the
backward pass are compiled as well.

Which kernels are needed is determined by running the operators on the meta device, where
`support.launch` compiles a kernel and does not launch it. So there is no second list of kernels and
flags that could differ from what is launched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from ...layouts import Layout
from ...operands import Operand
from ..torch.offset import sum_dtype
from . import offset
from .support import interpreted

__all__ = ["prepare_mix", "prepare_scores", "wait"]

THREAD = "translution-compile"

_prepared: set[Any] = set()


def prepare_scores(query: Operand, key: Operand, heads: int, layout: Layout) -> None:
    """Begin to compile the kernels of `scores` and its gradients for operands of this kind.

    Nothing happens if this has been done before. The mix that follows usually has a table of the
    same size, so its kernels are compiled as well.
    """
    tensors = (query.x, key.x, query.weight, key.weight, query.bias, key.bias)
    wanted = _wanted(tensors)
    if not _is_new(query.x, ("scores", heads, *map(_kind, tensors), *wanted)):
        return
    q, k = _meta(query), _meta(key)
    shape = (len(q.x), heads, layout.n_queries, layout.n_keys)
    s = torch.empty(shape, dtype=sum_dtype(query.x.dtype), device="meta")
    calls: list[Callable[[], Any]] = [lambda: offset.scores(q, k, heads, 1.5, layout)]
    if any(wanted):
        calls.append(lambda: offset.scores_backward(s, q, k, heads, 1.5, layout, wanted))
    if key.weight is not None:
        calls += _mix_calls(s, k, layout, [any(wanted), wanted[1], wanted[3], wanted[5]])
    _compile(query.x.device, calls)


def prepare_mix(a: Tensor, value: Operand, layout: Layout) -> None:
    """Begin to compile the kernels of `mix` and its gradients for operands of this kind.

    Nothing happens if this has been done before.
    """
    wanted = _wanted((a, *value))
    if _is_new(value.x, ("mix", a.shape[1], a.dtype, *map(_kind, value), *wanted)):
        weights = torch.empty_like(a, device="meta")
        _compile(value.x.device, _mix_calls(weights, _meta(value), layout, wanted))


def _mix_calls(
    a: Tensor, value: Operand, layout: Layout, wanted: list[bool]
) -> list[Callable[[], Any]]:
    """Calls of the mix on the meta device, and of its gradients if any is wanted."""
    calls: list[Callable[[], Any]] = [lambda: offset.mix(a, value, layout)]
    if any(wanted):
        grad = value.x.new_empty(len(value.x), layout.n_queries, value.inner)
        calls.append(lambda: offset.mix_backward(grad, a, value, layout, wanted))
    return calls


def _wanted(tensors: tuple[Tensor | None, ...]) -> list[bool]:
    """Which gradients the backward pass will need."""
    recording = torch.is_grad_enabled()
    return [recording and t is not None and t.requires_grad for t in tensors]


def _kind(t: Tensor | None) -> Any:
    """What kernels are compiled for. They do not depend on batch, tokens or classes."""
    return None if t is None else (t.shape[-1], t.dtype, t.ndim)


def _meta(operand: Operand) -> Operand:
    """An operand of the same shapes on the meta device."""
    x, weight, bias = (None if t is None else torch.empty_like(t, device="meta") for t in operand)
    assert x is not None
    return Operand(x, weight, bias)


def _is_new(x: Tensor, key: Any) -> bool:
    """Whether kernels are compiled here at all, and have not been compiled for this key."""
    if x.device.type != "cuda" or interpreted():
        return False
    key = (x.device.index, *key)
    if key in _prepared:
        return False
    _prepared.add(key)
    return hasattr(
        triton, "AsyncCompileMode"
    )  # older versions of Triton can only compile at the launch


def _compile(device: torch.device, calls: list[Callable[[], Any]]) -> None:
    """Compile the kernels of these calls in threads, and return when all of them have begun."""
    started = threading.Event()

    def start() -> None:
        try:
            # Leaving this mode waits for the compiler, so it runs in a thread of its own. The
            # calling thread continues; its launches take the kernels from Triton's cache, or wait
            # for them there.
            with (
                torch.cuda.device(device),
                ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as pool,
                triton.AsyncCompileMode(pool, ignore_errors=True),
            ):
                for call in calls:
                    call()
                started.set()
        except Exception:  # the launch will raise it again, where the user sees it
            pass
        finally:
            started.set()

    threading.Thread(target=start, name=THREAD, daemon=True).start()
    started.wait()


def wait() -> None:
    """Wait until all kernels whose compilation has begun are compiled, for example to time them."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
