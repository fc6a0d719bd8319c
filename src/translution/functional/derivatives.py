"""Derivatives of the registered operators: reverse and forward mode, of any order, and vmap.

The operators are multilinear: linear in each argument (a projection x W + b counts as one argument
with three tensors). For such an operator s, everything follows from s itself and from its gradient

    B(g, x) = ∂/∂x ⟨g, s(x)⟩,

which backends compute:

    the tangent of s along u        T(x; u) = Σ_t s(t), where each term t is x with one argument
                                    replaced by its tangent
    the gradient of ⟨w, B(g, x)⟩    with respect to g: T(x; w); with respect to x: H(g, x, w)
    the tangent of B along (h, u)   B(h, x) + H(g, x, u)

with H(g, x, u) = ∂/∂x ⟨g, T(x; u)⟩ = Σ_t B(g, t), where each B(g, t) keeps only the gradients for
the arguments that were not replaced in t.

For example, the scores s(q, k) = q · k have the tangent s(u_q, k) + s(q, u_k): two terms, each with
one argument replaced. Their gradient is B = (g k, g q). The tangent of the first part, g k, along
u_k is g u_k: that is B(g, (q, u_k)) for q, the argument that the second term did not replace.

So second derivatives need no dense intermediate either. The two classes below are made of each
other, and so the same is true of every higher derivative.

torch.compile and torch.export do not trace autograd functions with forward mode. There the
registered operators are called directly; these have their gradient and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Constants", "batched", "multilinear"]

Tensors = Sequence[Tensor | None]
Term = tuple[Tensors, tuple[bool, ...]]
"""The tensors of an operator with one argument replaced by its tangent, and which of the tensors
are still those of the operator itself."""


class Constants:
    """Arguments that are not tensors, wrapped because function transforms look inside lists."""

    def __init__(self, *values: Any):
        self.values = values


def multilinear(
    operator: Any,
    gradient: Any,
    count: int,
    terms: Callable[[Tensors, Tensors], Iterator[Term]],
    absent: Callable[..., Tensor | None] = lambda *_: None,
) -> Callable[..., Tensor]:
    """A function that calls a registered operator and has all its derivatives.

    Args:
        operator: `operator(*tensors, *options)` returns a tensor.
        gradient: `gradient(g, *tensors, *options, wanted)` returns a gradient per tensor, or an
            empty tensor where `wanted` is False.
        count: the number of tensors; an argument that is optional may be None.
        terms: the terms of the tangent, from the tensors and their tangents (None where zero).
        absent: from the result and the options, a mask of entries that do not depend on the tensors
            (such as the -inf of absent pairs), whose tangent is zero; or None.
    """

    def tangent(tensors: Tensors, along: Tensors, options: Constants) -> Tensor | None:
        """T(x; u), or None where it is zero."""
        total: Tensor | None = None
        for term, _ in terms(tensors, along):
            part = Forward.apply(*term, options)
            total = part if total is None else total + part
        mask = None if total is None else absent(total, *options.values)
        return total if total is None or mask is None else total.masked_fill(mask, 0.0)

    def second(
        g: Tensor, tensors: Tensors, along: Tensors, options: Constants, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """H(g, x, u), with None where it is zero or not wanted."""
        total: list[Tensor | None] = [None] * count
        for term, own in terms(tensors, along):
            needed = [
                want and own_ and t is not None
                for want, own_, t in zip(wanted, own, term, strict=True)
            ]
            if not any(needed):
                continue
            parts = Backward.apply(g, *term, options, Constants(*needed))
            for i, (part, need) in enumerate(zip(parts, needed, strict=True)):
                if need:
                    before = total[i]
                    total[i] = part if before is None else before + part
        return total

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*given: Any) -> Tensor:
            *tensors, options = given
            return operator(*tensors, *options.values)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.constants = inputs
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            wanted = ctx.needs_input_grad[:count]
            if grads[0] is None or not any(wanted):
                return (None,) * (count + 1)
            parts = Backward.apply(grads[0], *ctx.saved_tensors, ctx.constants, Constants(*wanted))
            return *(part if want else None for part, want in zip(parts, wanted, strict=True)), None

        @staticmethod
        def jvp(ctx: Any, *along: Any) -> Any:
            return tangent(ctx.saved_tensors, along[:count], ctx.constants)

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*given: Any) -> tuple[Tensor, ...]:
            *tensors, options, wanted = given
            return gradient(*tensors, *options.values, list(wanted.values))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *tensors, ctx.constants, ctx.wanted = inputs
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            g, *tensors = ctx.saved_tensors
            pairs = zip(cotangents, ctx.wanted.values, strict=True)
            along = [w if want else None for w, want in pairs]
            to_g = tangent(tensors, along, ctx.constants) if ctx.needs_input_grad[0] else None
            needed = ctx.needs_input_grad[1 : count + 1]
            return to_g, *second(g, tensors, along, ctx.constants, needed), None, None

        @staticmethod
        def jvp(ctx: Any, *along: Any) -> Any:
            g, *tensors = ctx.saved_tensors
            wanted = ctx.wanted.values
            total: list[Tensor | None] = [None] * count
            if along[0] is not None:
                first = Backward.apply(along[0], *tensors, ctx.constants, ctx.wanted)
                total = [p if want else None for p, want in zip(first, wanted, strict=True)]
            more = second(g, tensors, along[1 : count + 1], ctx.constants, wanted)
            sums = [
                (a if b is None else b) if a is None or b is None else a + b
                for a, b in zip(total, more, strict=True)
            ]
            # Every output needs a tangent: zeros where nothing changes, and an empty one (like the
            # output itself) where the gradient is not wanted.
            return tuple(
                (torch.zeros_like(t) if want and t is not None else g.new_zeros(0))
                if s is None
                else s
                for s, want, t in zip(sums, wanted, tensors, strict=True)
            )

    def call(*given: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return operator(*given)
        return Forward.apply(*given[:count], Constants(*given[count:]))

    return call


def batched(operator: Any, batch_arguments: Sequence[int]) -> None:
    """Register a vmap rule for an operator.

    Where all the tensors with a batch axis are mapped, and no other is, the mapped axis joins their
    batch axis. Everything else is a loop: with tables of their own, samples share no work.

    Args:
        operator: a registered operator that returns a tensor, or several.
        batch_arguments: the positions of the tensors whose first axis is the batch. None are given
            where a result is a sum over the batch, as the gradient of a table is.
    """

    def rule(info: Any, in_dims: Sequence[Any], *given: Any) -> Any:
        mapped = {i for i, dim in enumerate(in_dims) if isinstance(dim, int)}
        if batch_arguments and mapped == {i for i in batch_arguments if given[i] is not None}:
            folded = [
                t.movedim(in_dims[i], 0).flatten(0, 1) if i in mapped else t
                for i, t in enumerate(given)
            ]
            size = (info.batch_size, -1)
            results = operator(*folded)
            if isinstance(results, Tensor):
                return results.unflatten(0, size), 0
            return tuple(t.unflatten(0, size) for t in results), (0,) * len(results)
        each = [
            operator(*(t.select(in_dims[j], i) if j in mapped else t for j, t in enumerate(given)))
            for i in range(info.batch_size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])

    torch.library.register_vmap(operator, rule)
