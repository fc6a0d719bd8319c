"""The command `translution bench`, which measures the operators."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ...models.configuration import check_choice
from ...modules.attention import check_relative
from ...utils.tables import console_table
from ..training.devices import pick_device
from .cases import OPERATORS, Case
from .common import DTYPES, check_file, header, ints, keep, machine_line, parse_grid
from .measure import Measured, chosen, measure

__all__ = ["bench"]

# The default (grid, width, batches) of each operator; those of "cpu" and "cuda" are Translution's.
Shapes = list[tuple[str, int, str]]
SHAPES: dict[str, Shapes] = {
    "acmix": [("56x56", 64, "8"), ("28x28", 128, "8"), ("14x14", 256, "8"), ("7x7", 512, "8")],
    "cpu": [
        ("7x7", 192, "16,64"), ("7x7", 384, "16,64"), ("14x14", 192, "8"), ("14x14", 384, "8"),
    ],
    "cuda": [
        (grid, width, batches)
        for grid, batches in (
            ("7x7", "64,256"), ("14x14", "8,64,256"), ("256c", "8,64"), ("1024c", "8"),
        )
        for width in (192, 384, 768)
    ],
}  # fmt: skip
# Two rows are the same measurement if these fields agree.
SAME = (
    "operator", "grid", "causal", "batch", "width", "heads", "dtype", "relative", "rank",
    "kernel", "stride", "buckets", "device", "backend", "backward",
)  # fmt: skip


def bench(
    grid: Annotated[
        str,
        typer.Option(
            help="Grids, such as 7x7, 256 (a sequence) or 256c (causal); default by operator."
        ),
    ] = "",
    width: Annotated[
        str, typer.Option(help="Channels, such as 192,384; default by operator.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Samples, such as 16,64; default by operator.")] = "",
    heads: Annotated[
        int, typer.Option(help="Attention heads; 0 takes width / 64, for acmix 4.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"One or more of {','.join(DTYPES)}; default float32, on cuda also bfloat16."
        ),
    ] = "",
    backend: Annotated[str, typer.Option(help="The backend: auto, torch or triton.")] = "auto",
    device: Annotated[str, typer.Option(help="The device: auto, cpu, cuda or mps.")] = "auto",
    operator: Annotated[str, typer.Option(help=f"One of {', '.join(OPERATORS)}.")] = "translution",
    relative: Annotated[str, typer.Option(help="Which of q, k and v are relative.")] = "qkv",
    rank: Annotated[int, typer.Option(help="The rank per head of alpha.")] = 8,
    kernel: Annotated[int, typer.Option(help="The odd size of acmix's window.")] = 7,
    stride: Annotated[int, typer.Option(help="The stride of acmix.")] = 1,
    buckets: Annotated[
        int,
        typer.Option(help="Matrices on each side of offset 0, per axis; 0 gives each its own."),
    ] = 0,
    dense: Annotated[
        bool, typer.Option(help="Also measure the direct implementation, at a batch that fits.")
    ] = True,
    dense_limit: Annotated[
        float, typer.Option(help="The memory that the direct implementation may take, in GB.")
    ] = 8.0,
    repeats: Annotated[int, typer.Option(help="Timed calls; their median is reported.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default.")] = 0,
    json_file: Annotated[
        str, typer.Option("--json", help="A file for the rows, written after each row.")
    ] = "",
    against: Annotated[str, typer.Option(help="A file that --json wrote, to compare with.")] = "",
) -> None:
    """Measure the time and memory of an operator: forward, and forward + backward.

    The matmul share divides the floating-point operations per second of the operator (without
    recomputation) by those of a large matrix product of the same dtype, measured before and after
    it. The peak memory is what the call allocates, including gradients, beyond the memory in use
    before it.

    Each operator is compared with q, k, v projections and scaled_dot_product_attention on the same
    tokens, and Translution also with the direct implementation, which gathers a matrix for every
    pair and sample. If that does not fit into memory at the batch of the row, both are compared at
    a smaller batch, and the table shows the bytes that it would take. With buckets, Translution is
    compared with itself where it projects a token once for each pair. The operator acmix is
    compared with a 3x3 convolution, and with an implementation that copies keys and values for
    every neighbour.
    """
    check_choice("operator", operator, list(OPERATORS))
    relative = check_relative(relative)
    least = {
        "repeats": (repeats, 1),
        "rank": (rank, 1),
        "heads": (heads, 0),
        "kernel": (kernel, 1),
        "stride": (stride, 1),
        "buckets": (buckets, 0),
        "threads": (threads, 0),
    }
    for name, (value, want) in least.items():
        if value < want:
            raise ValueError(f"{name}: got {value}, want at least {want}")
    if buckets and operator != "translution":
        raise ValueError(f"buckets: got {buckets} for {operator}, want 0 or translution")
    if kernel % 2 == 0:
        raise ValueError(f"kernel: got {kernel}, want an odd number")
    if not dense_limit >= 0:
        raise ValueError(f"dense-limit: got {dense_limit}, want GB, at least 0")
    check_file("json", json_file)
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(pick_device(device))
    earlier = _earlier(against)
    dtypes = dtype or ("bfloat16,float32" if where.type == "cuda" else "float32")
    kinds = [
        DTYPES[check_choice("dtype", name.strip(), list(DTYPES))] for name in dtypes.split(",")
    ]
    cases = []
    for (text, w, b), kind in itertools.product(
        _shapes(operator, where.type, grid, width, batch), kinds
    ):
        shape, causal = parse_grid(text)
        n = heads or (4 if operator == "acmix" else max(1, w // 64))
        if w % n:
            raise ValueError(f"heads: got {n}, want a divisor of width {w}")
        cases.append(
            Case(
                operator,
                shape,
                causal,
                w,
                n,
                b,
                kind,
                relative,
                rank,
                kernel,
                stride,
                backend,
                buckets or None,
            )
        )
        chosen(cases[-1], where)
        cases[-1].check()
    console = Console()
    record = header(where)
    about, rows = record["machine"], record["rows"]
    console.print(f"{machine_line(about)}, {dtypes}, {datetime.date.today()}", highlight=False)
    if earlier and machine_line(earlier["machine"]) != machine_line(about):
        console.print(f"earlier: {machine_line(earlier['machine'])}", highlight=False)
    done: Measured = {}
    with Live(console=console) as live:
        for case in cases:
            for backward in (False, True):
                allowed = dense_limit * 1e9 if dense else 0.0
                rows.append(measure(case, where, backward, repeats, allowed, done))
                live.update(table(rows, earlier["rows"] if earlier else []))
                keep(record, json_file)
    if not console.is_terminal:
        console.print()  # a live table ends its last line on terminals only
    if json_file:
        console.print(f"written to {json_file}")


def _shapes(
    operator: str, device: str, grid: str, width: str, batch: str
) -> list[tuple[str, int, int]]:
    """Return the (grid, width, batch) of each case.

    Options that are empty take the operator's own values from `SHAPES`.
    """
    own = SHAPES.get(operator, SHAPES["cuda" if device == "cuda" else "cpu"])
    grids = [g.strip() for g in grid.split(",")] if grid else list(dict(g[::2] for g in own))
    widths = ints("width", width) if width else []
    found = []
    for shape in grids:
        known = [(w, b) for g, w, b in own if g == shape] or [(own[0][1], "8")]
        for w in widths or [w for w, _ in known]:
            found += [(shape, w, n) for n in ints("batch", batch or known[0][1])]
    return found


def table(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> Table:
    """Make the table that is printed.

    Args:
        rows: the rows of `measure`.
        earlier: the rows of an earlier file, whose times are compared; may be empty.
    """
    before = {_same(row): row for row in earlier}
    dense = any("dense_bytes_by_shape" in row for row in rows)
    beside = {"attention": "self-attention", "convolution": "a 3×3 convolution"}[rows[0]["beside"]]
    short = rows[0]["beside"][:4] + "."
    other = any("torch_seconds" in row for row in rows)
    twin = "unfold" if rows[0]["operator"] == "acmix" else "dense"
    twin = "per pair" if rows[0].get("buckets") else twin
    kinds = len({row["dtype"] for row in rows}) > 1
    columns = ["grid", "width", "batch", *["dtype"] * kinds, "pass", "ms", "share", "copy", "MB"]
    columns += ["÷ torch"] * other
    columns += [f"× {short}"] + [twin] * dense + ["÷ earlier"] * bool(earlier)
    lines = []
    for row in rows:
        taken, peak = row["seconds"], row["peak_bytes"]
        cells = ["×".join(map(str, row["grid"])) + "c" * row["causal"]]
        cells += [str(row["width"]), str(row["batch"]), *[row["dtype"]] * kinds]
        cells += ["both" if row["backward"] else "forward", f"{taken * 1e3:.1f}"]
        cells += [f"{row['matmul_share']:.2f}", f"{row['bytes_share']:.2f}"]
        cells += ["" if peak is None else f"{peak / 1e6:.0f}"]
        cells += [f"{taken / row['torch_seconds']:.2f}" if "torch_seconds" in row else ""] * other
        cells += [f"{taken / row['beside_seconds']:.1f}"]
        if dense:
            cells.append(_dense_cell(row))
        if earlier:
            same = before.get(_same(row))
            cells.append(f"{taken / same['seconds']:.2f}" if same else "none")
        lines.append(cells)
    caption = (
        f"share: fraction of the matmul rate. copy: fraction of the copy rate. MB: peak memory. "
        f"× {short}: time divided by that of {beside}."
        + " ÷ torch: time divided by that of the torch backend."
        * other
    )
    left = ("grid", "dtype", "pass", twin)
    return console_table(columns, lines, left, (twin,), caption, rows[0]["operator"])


def _dense_cell(row: dict[str, Any]) -> str:
    """Say how much slower and larger the direct implementation is, or the memory it would take."""
    if "dense_bytes_by_shape" not in row:
        return ""
    found = row.get("dense")
    if found is None:
        return f"not run: {row['dense_bytes_by_shape'] / 1e9:.3g} GB"
    cell = f"×{found['seconds'] / found['own_seconds']:.0f} time"
    if found["peak_bytes"] is not None:
        cell += f", ×{found['peak_bytes'] / max(found['own_peak_bytes'], 1):.0f} bytes"
    if found["batch"] != row["batch"]:
        cell += f" (batch {found['batch']}; {row['dense_bytes_by_shape'] / 1e9:.3g} GB here)"
    return cell


def _same(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in SAME)


def _earlier(file: str) -> dict[str, Any]:
    """Read the file of an earlier run; return {} if no file is named."""
    if not file:
        return {}
    try:
        record = json.loads(Path(file).read_text("utf-8"))
        machine_line(record["machine"])
        for row in record["rows"]:
            row.setdefault("device", record["machine"]["device"])
            float(row["seconds"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"against: {file} is not a --json file of this command: {error}") from None
    return record
