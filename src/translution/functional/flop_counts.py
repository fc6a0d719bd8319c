"""How many floating-point operations the registered operators take, for torch's FlopCounterMode.

torch counts an operator that it has no formula for as nothing. The formulas here count matrix
products (two operations per multiplication with its addition) as torch does for its own operators.
What a backward pass recomputes is not counted.
"""

from __future__ import annotations

import functools
import importlib.machinery
import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ..layouts import Layout

__all__ = ["register_when_imported"]

COUNTER = "torch.utils.flop_counter"


@functools.lru_cache
def _pairs(layout: str) -> int:
    return int((Layout.parse(layout).index >= 0).sum())


def _scores(xq, xk, wq, wk, bq, bk, heads, scale, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    inner = xq[2] if wq is None else wq[2]
    relative = [x[2] for x, w in ((xq, wq), (xk, wk)) if w is not None]
    return 2 * xq[0] * _pairs(layout) * inner * (1 + sum(relative))


def _scores_backward(grad: Any, *given: Any, **_: Any) -> int:
    xq, xk, wq, wk, _, _, _, _, layout, _, wanted = given
    inner = xq[2] if wq is None else wq[2]
    products = 0
    for x, w, to_x, to_w in ((xq, wq, wanted[0], wanted[2]), (xk, wk, wanted[1], wanted[3])):
        products += bool(to_x or to_w)  # the gradient of the scores times the other side
        products += 0 if w is None else (to_x + to_w) * x[2]
    return 2 * xq[0] * _pairs(layout) * inner * products


def _mix(a, x, w, b, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * x[0] * _pairs(layout) * w[2] * (1 + x[2])


def _mix_backward(grad, a, x, w, b, layout, backend, wanted, **_) -> int:  # type: ignore[no-untyped-def]
    to_a, to_x, to_w, _ = wanted
    products = to_a + bool(to_x or to_w) + (to_x + to_w) * x[2]
    return 2 * x[0] * _pairs(layout) * w[2] * products


def _attention(query, key, value, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(query[:4]) * math.prod(kernel) * (key[4] + value[4])


def _attention_backward(grad, y, query, key, value, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * _attention(query, key, value, kernel)


def _neighborhood_mix(weights, value, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(weights) * (value[1] // weights[1])


def _neighborhood_mix_backward(grad, weights, value, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * _neighborhood_mix(weights, value)


FORMULAS = {
    "offset_scores": _scores,
    "offset_scores_backward": _scores_backward,
    "offset_mix": _mix,
    "offset_mix_backward": _mix_backward,
    "neighborhood_attention": _attention,
    "neighborhood_attention_backward": _attention_backward,
    "neighborhood_mix": _neighborhood_mix,
    "neighborhood_mix_backward": _neighborhood_mix_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.translution, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


class _Finder(MetaPathFinder):
    """Registers the formulas as soon as torch's counter is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute: Any = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Give torch's counter the formulas, now or when it is imported.

    Importing it here would import Triton, too, which most programs do without.
    """
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
