"""The command `translution bench-gpu`, which checks and measures the library on a GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ...utils.words import shortened
from ..training.devices import pick_device
from .common import check_file, keep, machine_line
from .gpu_page import check_page, write_page
from .gpu_parts import PARTS, parts_named, summary
from .gpu_rows import DeviceLost, Record, Row, Setting, begin, in_order, measured, same

__all__ = ["bench_gpu"]


def bench_gpu(
    only: Annotated[
        str, typer.Option(help=f"One or more of {','.join(PARTS)}; none measures nothing.")
    ] = ",".join(PARTS),
    out: Annotated[
        str, typer.Option(help="The JSON file of all rows, written after each row.")
    ] = "gpu.json",
    docs: Annotated[
        str, typer.Option(help="A page whose section on GPUs is written from the file.")
    ] = "",
    budget: Annotated[float, typer.Option(help="Seconds for the whole run.")] = 480.0,
    again: Annotated[
        bool, typer.Option(help="Measure also the rows that the file has already.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls; their median is reported.")] = 5,
    device: Annotated[str, typer.Option(help="The device: auto or cuda; cpu with --dry.")] = "auto",
    dry: Annotated[
        bool,
        typer.Option(
            help="Try the command on the CPU with tiny sizes. With TRITON_INTERPRET=1 in the "
            "environment, the kernels run in Triton's interpreter."
        ),
    ] = False,
) -> None:
    """Check and measure the library on a GPU within a given time.

    The parts are: check compares values and gradients with float64, and the bits of a second run
    with the first. operator measures time, share of the matmul rate and memory, and compares them
    with plain torch and attention. acmix measures ACmix with each way of computing its attention.
    steps measures training steps of whole models. first measures first calls with an empty cache,
    CUDA graphs and torch.compile.

    The most important rows of every part come first. Rows for which the time is too short are
    skipped and listed. The file is written after each row, so that an interrupted run keeps its
    rows. With the same library and device, the next run continues where the last one ended. Rows
    that failed are measured again after all others.
    """
    wanted = parts_named(only)
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, want at least 1")
    if not budget >= 0:
        raise ValueError(f"budget: got {budget}, want seconds, at least 0")
    check_file("out", out)
    if docs:
        check_page(docs)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if wanted:
        end = time.monotonic() + budget
        where = torch.device(_gpu(device, dry))
        setting = Setting.of_dry(end) if dry else Setting(where, end, repeats=repeats)
        _run(console, setting, wanted, out, budget, again)
    record = read(out)
    if not wanted and not docs:
        raise ValueError("docs: got nothing, want a page, since --only=none measures nothing")
    if docs:
        write_page(docs, record)
        console.print(f"the section on GPUs of {docs} is written from {out}")


def read(file: str) -> Record:
    """Read the file of an earlier run.

    Args:
        file: the path of the file.

    Returns:
        The record of the run, with its "rows".

    Raises:
        ValueError: the file does not exist, or this command did not write it.
    """
    try:
        record = json.loads(Path(file).read_text("utf-8"))
        _ = record["program"], record["machine"]["torch"], record["date"]
        _ = [(row["part"], row["name"]) for row in record["rows"]]
    except FileNotFoundError:
        raise ValueError(
            f"out: got {file}, want a file that exists, since --only=none reads it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"out: {file} is not a file of this command: {error!r}") from None
    return dict(record)


def _run(
    console: Console, setting: Setting, wanted: list[str], out: str, budget: float, again: bool
) -> None:
    """Measure the rows of the wanted parts, and print a line for each."""
    start = time.monotonic()
    record = begin(setting, budget)
    earlier = read(out) if Path(out).exists() else None
    if earlier is not None and same(record, earlier):
        setting.rows += [row for row in earlier["rows"] if "error" not in row]
    elif earlier is not None:
        console.print(f"{out} was measured with another version or device, and is replaced")
    console.print(f"{machine_line(record['machine'])}, {budget:g} s")
    rows = in_order([PARTS[name](setting.dry) for name in wanted])
    if not again:
        measured_before = {(row["part"], row["name"]) for row in setting.rows}
        rows = [row for row in rows if (row.part, row.name) not in measured_before]
    # rows that failed before come last, as they may leave the device unusable
    bad = {(row["part"], row["name"]) for row in (earlier or record)["rows"] if "error" in row}
    rows.sort(key=lambda row: (row.part, row.name) in bad)
    skipped: list[Row] = []
    try:
        for number, row in enumerate(rows, 1):
            if not setting.fits(row):
                skipped.append(row)
                continue
            at = f"{time.monotonic() - start:.0f} s"
            console.print(f"{number}/{len(rows)}  {at}  {row.part}: {row.name}: ", end="")
            found = measured(row, setting)
            keep(record, out)
            console.print(summary(found))
    except DeviceLost as error:
        keep(record, out)
        raise ValueError(
            f"device: it no longer responds after {row.part}: {row.name} ({error}); the finished "
            f"rows are in {out}, and the same command continues with the others"
        ) from None
    for name in wanted:
        over = [row.name for row in skipped if row.part == name]
        if over:
            console.print(
                f"{name}: {len(over)} rows skipped, which need more than what is left of the "
                f"budget of {budget:g} s: {shortened(over, '; ', 3)}"
            )
    done = len(rows) - len(skipped)
    if done or earlier is None:
        keep(record, out)
    failed = sum("error" in row or row.get("passed") is False for row in setting.rows)
    console.print(
        f"{done} rows measured, {failed} failed, {len(skipped)} skipped; all are in {out}"
    )


def _gpu(name: str, dry: bool) -> str:
    """Return the type of the device to measure, or refuse one that is not available."""
    if dry:
        if name not in ("auto", "cpu"):
            raise ValueError(f"device: got {name!r}, want cpu with --dry")
        return "cpu"
    if name == "auto" and torch.cuda.is_available():
        return "cuda"
    where = pick_device(name)
    if where != "cuda":
        raise ValueError(
            f"device: got {name!r}, want a GPU that torch can use with CUDA (there is none, or "
            "another device was named); --dry tries the command on the CPU"
        )
    return where
