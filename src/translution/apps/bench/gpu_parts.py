"""The parts of `translution bench-gpu`: the rows of operators, ACmix and training steps."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...backends.triton.blocks import small_as_wide
from ...functional import neighborhood_attention
from ...models.configuration import check_choice
from ...modules import acmix as acmix_module
from ...neighborhoods import Neighborhood
from ...utils.measuring import seconds
from .cases import OPERATORS, Built, Case
from .common import grid_text
from .gpu_check import checks
from .gpu_first import first_calls
from .gpu_rows import Record, Row, Setting, dtype_name, in_a_line
from .measure import chosen, measure, serving, step, timed
from .steps import Step, measure_step

__all__ = ["PARTS", "parts_named", "summary"]

HALF, FULL = torch.bfloat16, torch.float32


# -- operators -------------------------------------------------------------------------------------


def operators(dry: bool) -> list[Row]:
    """Return the rows of Translution and α: forward, and forward + backward."""
    if dry:
        cases = [(0, _case((2, 2), 16, 2, FULL, 2)), (1, _case((3,), 16, 2, HALF, 2))]
        cases.append((1, _case((2, 2), 16, 2, FULL, 2, "alpha")))
    else:
        batches = {192: 64, 384: 64, 768: 16}
        cases = []
        for kind in (HALF, FULL):
            late = 0 if kind == HALF else 2
            for width in (192, 384, 768):
                first = late if width < 768 else late + 1
                cases += [
                    (first, _case((14, 14), width, batches[width], kind)),
                    (late + 1, _case((7, 7), width, 256, kind)),
                    (late + 1, _case((1024,), width, 8, kind)),
                ]
                if width < 768:
                    cases.append((late + 1, _case((14, 14), width, 64, kind, operator="alpha")))
    rows = []
    for rank, case in cases:
        for backward in (False, True):
            name = _operator_name(case, backward)
            call = functools.partial(_operator, case, backward)
            # the first row compiles the kernels of wide heads, and plain torch takes seconds
            rows.append(Row("operator", name, call, rank, 20 if case.width == 768 else 12))
    return rows


def _case(
    grid: tuple[int, ...],
    width: int,
    batch: int,
    dtype: torch.dtype,
    heads: int = 0,
    operator: str = "translution",
) -> Case:
    return Case(operator, grid, len(grid) == 1, width, heads or width // 64, batch, dtype)


def _operator_name(case: Case, backward: bool) -> str:
    text = f"{case.operator} {grid_text(case.grid, case.causal)}, width {case.width}"
    text += f", batch {case.batch}, {dtype_name(case.dtype)}"
    return text + (", forward + backward" if backward else ", forward")


def _operator(case: Case, backward: bool, setting: Setting) -> Record:
    backend = setting.backend if case.operator == "translution" else "auto"
    case = Case(**{**vars(case), "backend": backend})
    rates = setting.rates("operator", case.dtype)
    if chosen(case, setting.device) == "triton":
        # kernels are compiled in threads, which would slow the calls that are timed
        built = OPERATORS[case.operator](case, setting.device)
        step(built.forward, built.leaves, backward)()
        _wait()
    found = measure(
        case, setting.device, backward, setting.repeats, rates=rates, patience=setting.patience
    )
    found["backend"] = chosen(case, setting.device)
    if case.operator == "alpha" and found["backend"] == "triton":
        built = OPERATORS["alpha"](case, setting.device)
        call = step(built.forward, built.leaves, backward)
        with small_as_wide():
            call()
            _wait()
            found["wide_seconds"] = seconds(call, setting.device, setting.repeats)
    return found


def _wait() -> None:
    """Wait for kernels that are being compiled in threads. (Without Triton there are none.)"""
    importlib.import_module("translution.backends.triton.ahead").wait()


# -- ACmix -----------------------------------------------------------------------------------------

Attend = Callable[..., Tensor]
"""Maps (query, key, value, kernel, stride, dilation) to the output of neighbourhood attention."""


def acmix(dry: bool) -> list[Row]:
    """Return the rows of the whole ACmix2d, with each way of computing its attention."""
    if dry:
        cases = [(0, Case("acmix", (4, 3), False, 16, 2, 2, FULL, kernel=3))]
    else:
        sizes = [((56, 56), 64), ((28, 28), 128), ((14, 14), 256), ((7, 7), 512)]
        cases = []
        for kind in (HALF, FULL):
            late = 0 if kind == HALF else 2
            for size, width in sizes:
                rank = late if width in (64, 256) else late + 1
                cases.append((rank, Case("acmix", size, False, width, 4, 64, kind)))
    rows = []
    for rank, case in cases:
        for backward in (False, True):
            name = f"{grid_text(case.grid)}, {case.width} channels, batch {case.batch}"
            name += f", {dtype_name(case.dtype)}"
            name += ", forward + backward" if backward else ", forward"
            rows.append(Row("acmix", name, functools.partial(_acmix, case, backward), rank, 30))
    return rows


def _acmix(case: Case, backward: bool, setting: Setting) -> Record:
    """Measure ACmix with each way of computing its attention.

    Returns:
        "ways", for each way its "seconds", its "peak_bytes" and its relative "difference" from the
        output of plain torch, or its "error"; "best", the name of the fastest way; "by", the time
        of the second fastest divided by that of the fastest.
    """
    torch.compiler.reset()  # torch stops compiling a function after a number of sizes
    built = OPERATORS["acmix"](case, setting.device)
    rates = setting.rates("acmix", case.dtype)
    flops = built.flops * (3 if backward else 1)
    ways: dict[str, Record] = {}
    answer = None
    for name, forward in _ways(built, setting.backend, case.grid[1] >= 28).items():
        try:
            with torch.no_grad():
                y = forward()
            answer = y if answer is None else answer
            call = step(forward, built.leaves, backward)
            taken, most = timed(call, setting.device, setting.repeats, setting.patience)
            asked = {"torch": "torch", "auto": setting.backend}.get(name)
            ways[name] = {
                "backend": asked and serving(asked, setting.device, case.dtype),
                "seconds": taken,
                "peak_bytes": most,
                "matmul_share": flops / taken / rates.matmul,
                "difference": _difference(y, answer),
            }
        except Exception as error:  # the other ways still count
            ways[name] = {"error": in_a_line(error)}
    record: Record = {
        "grid": list(case.grid), "width": case.width, "heads": case.heads, "batch": case.batch,
        "kernel": case.kernel, "dtype": dtype_name(case.dtype), "backward": backward,
        "flops": flops, "matmul_rate": rates.matmul, "ways": ways,
    }  # fmt: skip
    order = sorted((way["seconds"], name) for name, way in ways.items() if "seconds" in way)
    if not order:
        raise RuntimeError(f"every way failed: {ways}")
    record["best"] = order[0][1]
    if len(order) > 1:
        record["by"] = order[1][0] / order[0][0]
    return record


def _difference(y: Tensor, want: Tensor) -> float:
    return float((y.float() - want.float()).norm() / want.float().norm())


def _ways(built: Built, backend: str, tiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Return the ways of computing ACmix by name; "torch" is first, as the reference."""
    assert built.dense is not None
    ways = {
        name: _attending(built.forward, functools.partial(neighborhood_attention, backend=asked))
        for name, asked in (("torch", "torch"), ("auto", backend))
    }
    ways["unfold"] = built.dense
    for name, attend in _flex(tiled).items():
        ways[name] = _attending(built.forward, attend)
    return ways


def _flex(tiled: bool) -> dict[str, Attend]:
    """Return torch's flex attention over the same neighbourhoods, by name.

    It is empty if this version of torch has no flex attention.

    Args:
        tiled: whether to include the order of pixels tile by tile besides that row by row.
    """
    try:
        attend = importlib.import_module(".flex", __package__).flex_neighborhood
    except (ImportError, AttributeError):
        return {}

    def by(
        tile: tuple[int, int] | None, query: Tensor, key: Tensor, value: Tensor, *sizes: int
    ) -> Tensor:
        area = Neighborhood.of((int(key.shape[2]), int(key.shape[3])), *sizes)
        return attend(query, key, value, area, key.shape[4] ** -0.5, tile)

    ways: dict[str, Attend] = {"flex": functools.partial(by, None)}
    if tiled:
        ways["flex, tiled"] = functools.partial(by, (8, 16))
    return ways


def _attending(forward: Callable[[], Tensor], attend: Attend) -> Callable[[], Tensor]:
    """Return the forward pass of ACmix with another function for its attention."""

    def call() -> Tensor:
        with _in_place(attend):
            return forward()

    return call


@contextmanager
def _in_place(attend: Attend) -> Iterator[None]:
    module: Any = acmix_module
    usual = module.neighborhood_attention
    module.neighborhood_attention = attend
    try:
        yield
    finally:
        module.neighborhood_attention = usual


# -- training steps --------------------------------------------------------------------------------


def steps(dry: bool) -> list[Row]:
    """Return the rows of training steps; attention is first, as the others are compared with it."""
    small = (
        ("image_size", 8), ("patch_size", 4), ("dim", 16), ("depth", 2), ("heads", 2),
        ("head_dim", 8), ("num_classes", 3),
    )  # fmt: skip
    wanted = [
        (0, "attention_vit_tiny_patch16_224", "", 256),
        (0, "translution_vit_tiny_patch16_224", "qkv", 256),
        (0, "alpha_vit_tiny_patch16_224", "qkv", 256),
        (1, "translution_vit_tiny_patch16_224", "v", 256),
        (1, "attention_vit_small_patch16_224", "", 64),
        (1, "translution_vit_small_patch16_224", "qkv", 64),
    ]
    rows = []
    for rank, model, relative, batch in wanted[:4] if dry else wanted:
        case = Step(model, relative, 2 if dry else batch, HALF, FULL, options=small if dry else ())
        name = model + f" {relative}" * bool(relative) + f", batch {case.batch}"
        rows.append(Row("steps", name, functools.partial(_step, case), rank, 20))
    return rows


def _step(case: Step, setting: Setting) -> Record:
    """Call `measure_step`, and add "attention_ratio" and "attention_graph_ratio".

    The ratios are the times divided by those of the attention model of the same size and batch.
    """
    found = measure_step(case, setting.device, setting.repeats)
    mixer, rest = case.model.split("_", 1)
    beside = setting.find("steps", model=f"attention_{rest}", batch=case.batch)
    if mixer != "attention" and beside is not None:
        for name in ("", "graph_"):
            if f"{name}seconds" in found and f"{name}seconds" in beside:
                ratio = found[f"{name}seconds"] / beside[f"{name}seconds"]
                found[f"attention_{name}ratio"] = ratio
    return found


# -- all parts -------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "check": checks,
    "operator": operators,
    "acmix": acmix,
    "steps": steps,
    "first": first_calls,
}
"""The parts by name, in the order in which rows of the same rank are measured.

A new part needs an entry here, a case in `summary` and a table in `gpu_page.py`.
"""


def parts_named(text: str) -> list[str]:
    """Read the names of parts, separated by commas; "none" names no part.

    Returns:
        The names, in the order of `PARTS`.

    Raises:
        ValueError: a name is unknown, or "none" is combined with other names.
    """
    if text.strip() == "none":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_choice("only", name, [*PARTS, "none"])
    if "none" in names:
        raise ValueError(f"only: got {text!r}, want none by itself, or some of {list(PARTS)}")
    return [name for name in PARTS if name in names]


def summary(row: Record) -> str:
    """Describe a finished row in a few words."""
    if "error" in row:
        return f"failed: {row['error']}"
    if row["part"] == "check":
        text = f"largest error {row['largest']:.1e} of {row['tolerance']:.0e}"
        equal = "equal bits" if row["equal_bits"] else "UNEQUAL BITS"
        return f"{'passed' if row['passed'] else 'FAILED'}, {text}, {equal}"
    if row["part"] == "acmix":
        ways = [
            f"{name} {way['seconds'] * 1e3:.2f} ms" if "seconds" in way else f"{name} failed"
            for name, way in row["ways"].items()
        ]
        return ", ".join(ways)
    if row["part"] == "steps":
        ratio = row.get("attention_ratio")
        text = f"{row['images_per_second']:,.0f} images/s, {row['peak_bytes'] / 1e9:.1f} GB"
        text += f", ×{ratio:.1f} of attention's time" if ratio else ""
        if "graph_seconds" not in row:
            return text
        text += f"; in a CUDA graph {row['graph_seconds'] * 1e3:.1f} ms"
        ratio = row.get("attention_graph_ratio")
        return text + (f", ×{ratio:.1f}" if ratio else "")
    if row["part"] == "first":
        return ", ".join(
            f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else
            f"{name.replace('_', ' ')} {value}"
            for name, value in row.items()
            if name not in ("part", "name", "took")
        )  # fmt: skip
    return f"{row['seconds'] * 1e3:.2f} ms, share {row['matmul_share']:.2f}"
