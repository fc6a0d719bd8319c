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
from typing import Any, NamedTuple

import torch

from ..backends.torch import per_token
from ..layouts import Layout

__all__ = ["register_when_imported"]

COUNTER = "torch.utils.flop_counter"


class Rows(NamedTuple):
    """How many projected rows a layout needs, in each sample.

    Attributes:
        pairs: the present pairs.
        queries, keys: the rows that a table projects on either side: one per pair, or fewer where
            a token is projected once for all its pairs of one class.
    """

    pairs: int
    queries: int
    keys: int


MANY = 1 << 20
"""A batch in which calls cost nothing, so that the count of a sample is the same in every batch."""


@functools.lru_cache
def _rows(layout: str, query: per_token.Size, key: per_token.Size, heads: int) -> Rows:
    parsed, cpu = Layout.parse(layout), torch.device("cpu")
    pairs = int((parsed.index >= 0).sum())
    if not per_token.pays(parsed, query, key, heads, MANY, cpu):
        return Rows(pairs, pairs, pairs)
    counts = per_token.counts_of(parsed, cpu)
    return Rows(pairs, counts.queries, counts.keys)


def _size(table: Any) -> per_token.Size:
    return None if table is None else (table[1], table[2])


def _scores(xq, xk, wq, wk, bq, bk, heads, scale, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    inner = xq[2] if wq is None else wq[2]
    rows = _rows(layout, _size(wq), _size(wk), heads)
    queries = 0 if wq is None else rows.queries * xq[2]
    keys = 0 if wk is None else rows.keys * xk[2]
    return 2 * xq[0] * inner * (rows.pairs + queries + keys)


def _scores_backward(grad: Any, *given: Any, **_: Any) -> int:
    xq, xk, wq, wk, _, _, heads, _, layout, _, wanted = given
    inner = xq[2] if wq is None else wq[2]
    rows, products = _rows(layout, _size(wq), _size(wk), heads), 0
    for x, w, projected, to_x, to_w in (
        (xq, wq, rows.queries, wanted[0], wanted[2]),
        (xk, wk, rows.keys, wanted[1], wanted[3]),
    ):
        # the gradient of the scores times the other side
        products += bool(to_x or to_w) * rows.pairs
        products += 0 if w is None else (to_x + to_w) * x[2] * projected
    return 2 * xq[0] * inner * products


def _mix(a, x, w, b, layout, *_, **__) -> int:  # type: ignore[no-untyped-def]
    rows = _rows(layout, None, _size(w), a[1])
    return 2 * x[0] * w[2] * (rows.pairs + rows.keys * x[2])


def _mix_backward(grad, a, x, w, b, layout, backend, wanted, **_) -> int:  # type: ignore[no-untyped-def]
    (to_a, to_x, to_w, _), rows = wanted, _rows(layout, None, _size(w), a[1])
    products = (to_a + bool(to_x or to_w)) * rows.pairs + (to_x + to_w) * x[2] * rows.keys
    return 2 * x[0] * w[2] * products


def _attention(query, key, value, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(query[:4]) * math.prod(kernel) * (key[4] + value[4])


def _attention_backward(grad, y, query, key, value, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * _attention(query, key, value, kernel)


def _logsumexp(query, key, kernel, *_, **__) -> int:  # type: ignore[no-untyped-def]
    return 2 * math.prod(query) * math.prod(kernel)


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
    "neighborhood_logsumexp": _logsumexp,
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
