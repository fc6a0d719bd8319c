"""The command `translution bench-tune`, which measures block sizes of the kernels."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ...models.configuration import check_choice
from ...utils.measuring import matmul_rate
from ..training.devices import pick_device
from .common import DTYPES, check_file, header, keep, machine_line, parse_grid
from .tune import KINDS, Work, tried

__all__ = ["bench_tune"]


def bench_tune(
    kernel: Annotated[str, typer.Option(help=f"One or more of {', '.join(KINDS)}.")] = ", ".join(
        KINDS
    ),
    grid: Annotated[str, typer.Option(help="A grid, such as 14x14 or 1024c (causal).")] = "14x14",
    width: Annotated[int, typer.Option(help="Channels.")] = 384,
    heads: Annotated[int, typer.Option(help="Attention heads; 0 takes width / 64.")] = 0,
    batch: Annotated[int, typer.Option(help="Samples.")] = 64,
    dtype: Annotated[str, typer.Option(help=f"One of {','.join(DTYPES)}.")] = "bfloat16",
    budget: Annotated[float, typer.Option(help="Seconds for the whole run.")] = 300.0,
    repeats: Annotated[int, typer.Option(help="Timed calls; their median is reported.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu (Triton's interpreter) or cuda.")] = "auto",
    json_file: Annotated[
        str, typer.Option("--json", help="A file for the rows, written after each row.")
    ] = "",
) -> None:
    """Time the Triton kernels with other block sizes than those that the library uses.

    The operators look their block sizes up in a table that was measured on an H100. This command
    shows whether other block sizes are faster on another GPU. It tries the usual ones first, and
    prints the best ones in the form of src/translution/backends/triton/blocks.py. Kernels for which
    the time is too short are skipped and listed.
    """
    kinds = [check_choice("kernel", name.strip(), list(KINDS)) for name in kernel.split(",")]
    shape, causal = parse_grid(grid)
    for name, value in (("width", width), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    n = heads or max(1, width // 64)
    if n < 1 or width % n:
        raise ValueError(f"heads: got {heads}, want a divisor of width {width}")
    if not budget > 0:
        raise ValueError(f"budget: got {budget}, want seconds, more than 0")
    check_file("json", json_file)
    where = torch.device(pick_device(device))
    kind = DTYPES[check_choice("dtype", dtype, list(DTYPES))]
    from ... import backends

    reason = backends.explain(where, kind)["triton"]
    if reason is not None:
        raise ValueError(
            f"device: got {device!r} with {dtype}; which the Triton backend cannot use: {reason}"
        )
    work = Work(shape, causal, width, n, batch, kind, where)
    end = time.monotonic() + budget
    console = Console(highlight=False, markup=False, soft_wrap=True)
    record = header(where)
    rate = matmul_rate(kind, where)
    console.print(f"{machine_line(record['machine'])}, matmul {rate / 1e12:.3g} TFLOP/s")
    for name in kinds:
        best: tuple[float, Any] | None = None
        for blocks, taken, count in tried(work, name, repeats):
            row = {"kernel": name, "blocks": list(blocks), "seconds": taken}
            if taken is not None:
                row["matmul_share"] = 2 * count / taken / rate
                console.print(f"{name}  {taken * 1e3:.3f} ms  {row['matmul_share']:.2f}  {blocks}")
                best = min(best or (taken, blocks), (taken, blocks))
            record["rows"].append(row)
            keep(record, json_file)
            if time.monotonic() > end:
                break
        if best is not None:
            console.print(f'best: "{name}": {best[1]},')
        if time.monotonic() > end:
            rest = kinds[kinds.index(name) :]
            console.print(
                f"the budget of {budget:g} s ended at {name}; not finished: {', '.join(rest)}"
            )
            break
    if json_file:
        console.print(f"written to {json_file}")
