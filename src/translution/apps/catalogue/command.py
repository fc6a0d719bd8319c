"""The command `translution models`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

__all__ = ["models"]

COLUMNS = ("name", "parameters", "multiply-adds", "inference", "training")


def models(
    pattern: Annotated[str, typer.Argument(help='Names, such as "alpha_vit_*".')] = "*",
    max_parameters: Annotated[
        str, typer.Option(help="At most so many: 30M, 2.5G or 1000000.")
    ] = "",
    mixer: Annotated[str, typer.Option(help="Only models with this mixer.")] = "",
    sort: Annotated[str, typer.Option(help=f"One of {', '.join(COLUMNS)}.")] = "name",
    batch: Annotated[int, typer.Option(min=1, help="Samples that memory is for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, exact numbers.")] = False,
) -> None:
    """List models with their parameters, multiply-adds and memory, without making them.

    Multiply-adds: of one sample, forward. Memory, in float32, from shapes: for inference the
    weights and the most that a forward pass holds at once; for training with AdamW the weights,
    gradients, two states, and what a forward pass keeps for the way back. Working memory within an
    operator, and that of the backward pass, comes on top.
    """
    import fnmatch
    import json

    from rich.console import Console
    from rich.table import Table

    from .table import read_table

    table_of = read_table()
    _choose("sort", sort, COLUMNS)
    _choose("mixer", mixer, ["", *sorted({one["mixer"] for one in table_of.values()})])
    most = parameters(max_parameters) if max_parameters else None
    names = fnmatch.filter(table_of, pattern)
    if not names:
        raise ValueError(f"pattern: got {pattern!r}, which no model's name matches")
    rows: list[dict[str, Any]] = []
    for name in names:
        one = table_of[name]
        if mixer not in ("", one["mixer"]) or (most is not None and one["parameters"] > most):
            continue
        rows.append(
            {
                "name": name,
                "family": one["family"],
                "mixer": one["mixer"],
                "input": one["input"],
                "parameters": one["parameters"],
                "multiply-adds": one["multiply_adds"],
                "inference": one["weights"] + batch * one["passing"],
                "training": one["weights"] + 3 * one["trained"] + batch * one["kept"],
            }
        )
    rows.sort(key=lambda row: (row[sort], row["name"]))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        box=None, header_style="bold", pad_edge=False, caption_justify="left",
        caption=f"multiply-adds of one sample; memory in bytes for a batch of {batch}, float32, "
        "training with AdamW",
    )  # fmt: skip
    for column in ("name", "mixer", "input", *COLUMNS[1:]):
        left = column in ("name", "mixer", "input")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        told: Callable[[Any], str] = short
        size = "×".join(map(str, row["input"]))
        cells = [told(row[column]) for column in COLUMNS[1:]]
        table.add_row(row["name"], row["mixer"], size, *cells)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:  # as `models.blocks.choose`, which imports torch
        raise ValueError(f"{name}: got {value!r}, want one of {list(known)}")


UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def short(number: float) -> str:
    """Three digits and a unit: 28.7 M."""
    for unit, size in reversed(UNITS.items()):
        if number >= size:
            return (
                f"{number / size:.3g} {unit}"
                if number < 999.5 * size
                else f"{number / size:,.0f} {unit}"
            )
    return f"{number:.0f}"


def parameters(text: str) -> int:
    """Of "30M", "2.5G" or "1000000".

    Raises:
        ValueError: anything else.
    """
    try:
        number = float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ValueError(f"max-parameters: got {text!r}, want a number such as 30M or 1000000")
    return int(number)
