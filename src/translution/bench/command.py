"""The command `translution bench`: a benchmark and not a test."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..files import write_whole
from ..measuring import machine, matmul_rate, peak_bytes, seconds
from ..models.blocks import choose
from .cases import OPERATORS, Case, attention

__all__ = ["bench", "parse_grid"]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64
# grid: batches
DEFAULTS = {"7x7": (16, 64), "14x14": (8, 16)}


def bench(
    grid: Annotated[str, typer.Option(help="Such as 7x7,14x14 or 256 (1-D).")] = "7x7,14x14",
    width: Annotated[str, typer.Option(help="Channels, such as 192,384.")] = "192,384",
    batch: Annotated[
        str, typer.Option(help="Such as 16,64; default 16,64 for 7x7, 8,16 for others.")
    ] = "",
    heads: Annotated[int, typer.Option(help="0: width / 64.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    operator: Annotated[str, typer.Option(help=f"{', '.join(OPERATORS)}.")] = "translution",
    relative: Annotated[str, typer.Option(help="Which of qkv have tables.")] = "qkv",
    causal: Annotated[bool, typer.Option(help="1-D: only keys at or before.")] = False,
    dense: Annotated[bool, typer.Option(help="Also time the dense gather where it fits.")] = True,
    dense_limit: Annotated[float, typer.Option(help="GB the dense gather may take.")] = 8.0,
    repeats: Annotated[int, typer.Option(help="Timed calls; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="0: torch's own choice.")] = 0,
    json_file: Annotated[str, typer.Option("--json", help="Also write the rows here.")] = "",
    against: Annotated[str, typer.Option(help="An earlier --json file to compare with.")] = "",
) -> None:
    """Measure the operator: forward, and forward + backward.

    The matmul share is the operator's own flops (recomputation not counted) per second, over the
    rate of a plain large matrix product of the same dtype measured beside it. Attention is q, k, v
    projections and scaled_dot_product_attention on the same tokens. Memory is the peak during the
    call beyond what was there before it; gradients count, as they are made there.
    """
    choose("dtype", dtype, list(DTYPES))
    choose("operator", operator, list(OPERATORS))
    for name, value in (("repeats", repeats), ("heads", heads + 1), ("threads", threads + 1)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least {1 if name == 'repeats' else 0}")
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(_device(device))
    earlier = _earlier(against)
    cases = []
    for one in grid.split(","):
        for w in _ints("width", width):
            for b in _ints("batch", batch) if batch else DEFAULTS.get(one.strip(), (8, 16)):
                n = heads or max(1, w // 64)
                if w % n:
                    raise ValueError(f"heads: got {n}, want a divisor of width {w}")
                shape = parse_grid(one)
                cases.append(Case(operator, shape, causal, w, n, b, DTYPES[dtype], relative))
                cases[-1].layout  # noqa: B018  (bad shapes are refused before anything runs)
    console = Console()
    about = machine(where.type)
    console.print(
        f"{about.get('gpu', about['cpu'])}, {about['threads']} threads, torch {about['torch']}, "
        f"{dtype}, {datetime.date.today()}"
    )
    rows: list[dict[str, Any]] = []
    with console.status("") as status:
        for case in cases:
            for backward in (False, True):
                status.update(f"{case.name}, {'forward + backward' if backward else 'forward'}")
                allowed = dense_limit * 1e9 if dense else 0.0
                rows.append(measure(case, where, backward, repeats, allowed))
    console.print(table(rows, earlier))
    if json_file:
        command = " ".join(["translution", *sys.argv[1:]])
        told = {"machine": about, "command": command, "rows": rows}
        told["date"] = datetime.datetime.now().isoformat(timespec="seconds")
        write_whole(Path(json_file), lambda p: p.write_text(json.dumps(told, indent=1), "utf-8"))
        console.print(f"written to {json_file}")


def measure(
    case: Case, device: torch.device, backward: bool, repeats: int, dense_limit: float
) -> dict[str, Any]:
    """One row: times, rates, memory and ratios of a case in one direction."""
    built = OPERATORS[case.operator](case, device)
    call = step(built.forward, built.leaves, backward)
    rates = [matmul_rate(case.dtype, device)]
    taken = seconds(call, device, repeats)
    rates.append(matmul_rate(case.dtype, device))
    rate = sum(rates) / 2  # machines drift: measured before and after
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
        "backward": backward,
        "seconds": taken,
        "flops": flops,
        "bytes": built.bytes,
        "matmul_rate": rate,
        "matmul_share": flops / taken / rate,
        "peak_bytes": peak_bytes(call, device),
    }
    plain = attention(case, device)
    plain_call = step(plain.forward, plain.leaves, backward)
    row["attention_seconds"] = seconds(plain_call, device, repeats)
    row["attention_peak_bytes"] = peak_bytes(plain_call, device)
    if built.dense is not None and built.dense_bytes is not None:
        row["dense_bytes_by_shape"] = built.dense_bytes(backward)
        if row["dense_bytes_by_shape"] <= min(dense_limit, 0.8 * _free(device)):
            dense_call = step(built.dense, built.leaves, backward)
            row["dense_peak_bytes"] = peak_bytes(dense_call, device)
            row["dense_seconds"] = seconds(dense_call, device, 1)
    gc.collect()
    return row


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


def table(rows: list[dict[str, Any]], earlier: dict[str, Any]) -> Table:
    """The rows for the screen."""
    shown = Table(box=None, header_style="bold")
    heads = ["case", "ms", "matmul share", "peak MB", "× attention", "dense ÷ this", "its memory"]
    for head in heads + (["÷ earlier"] if earlier else []):
        shown.add_column(head, justify="left" if head == "case" else "right")
    for row in rows:
        name, taken = row["name"], row["seconds"]
        cells = [name, f"{taken * 1e3:.1f}", f"{row['matmul_share']:.2f}"]
        cells += [f"{row['peak_bytes'] / 1e6:.0f}", f"{taken / row['attention_seconds']:.1f}"]
        if "dense_seconds" in row:
            times = row["dense_seconds"] / taken
            memory = row["dense_peak_bytes"] / max(row["peak_bytes"], 1)
            cells += [f"{times:.0f} × slower", f"{memory:.0f} × larger"]
        elif "dense_bytes_by_shape" in row:
            cells += ["not run", f"{row['dense_bytes_by_shape'] / 1e9:.1f} GB by shape"]
        else:
            cells += ["", ""]
        if earlier:
            before = earlier.get(name)
            cells.append(f"{taken / before['seconds']:.2f}" if before else "")
        shown.add_row(*cells)
    return shown


def parse_grid(text: str) -> tuple[int, ...]:
    """ "7x7" -> (7, 7), "256" -> (256,)."""
    parts = text.strip().lower().replace("×", "x").split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"grid: got {text!r}, want sizes such as 7x7 or 256")
    return tuple(int(part) for part in parts)


def _ints(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name}: got {text!r}, want numbers such as 16,64")
    return [int(part) for part in parts]


def _device(name: str) -> str:
    choose("device", name, ["auto", "cpu", "cuda"])
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device here")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _earlier(file: str) -> dict[str, Any]:
    if not file:
        return {}
    try:
        rows = json.loads(Path(file).read_text("utf-8"))["rows"]
        return {row["name"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"against: {file} is not a --json file of this command: {error}") from None


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
