"""The command `translution models`, which lists the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ..training.import_option import ImportOption

__all__ = ["models"]

COLUMNS = ("name", "parameters", "multiply-adds", "inference", "training")


def models(
    pattern: Annotated[
        str, typer.Argument(help='A pattern of names, such as "alpha_vit_*".')
    ] = "*",
    max_parameters: Annotated[
        str,
        typer.Option(help="Only models with at most this many parameters, such as 30M or 2.5G."),
    ] = "",
    mixer: Annotated[str, typer.Option(help="Only models with this mixer.")] = "",
    sort: Annotated[str, typer.Option(help=f"Sort by {', '.join(COLUMNS)}.")] = "name",
    batch: Annotated[
        int, typer.Option(min=1, help="The batch size for which memory is computed.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers.")] = False,
    imports: ImportOption = None,
) -> None:
    """List models with their parameters, multiply-adds and memory, without making them.

    Multiply-adds are those of the forward pass of one sample. Memory is computed from shapes, in
    float32. Inference needs the weights and the largest set of tensors that the forward pass holds
    at once. Training with AdamW needs the weights, the gradients, two optimizer states, and the
    tensors that the forward pass keeps for the backward pass. The working memory within an operator
    and that of the backward pass are not included. The models of --import are counted when they are
    listed.
    """
    import fnmatch
    import json

    from rich.console import Console

    from .table import counted, read_table

    stored = read_table()
    _choose("sort", sort, COLUMNS)
    if imports:
        from ...models import list_models

        stored |= {name: counted(name) for name in list_models(pattern) if name not in stored}
    if mixer:
        _choose("mixer", mixer, sorted({one["mixer"] for one in stored.values()}))
    most = parameters(max_parameters) if max_parameters else None
    names = fnmatch.filter(stored, pattern)
    if not names:
        raise ValueError(f"pattern: got {pattern!r}, which no model's name matches")
    rows: list[dict[str, Any]] = []
    for name in names:
        one = stored[name]
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
                "inference": one["weights"] + batch * one["activations"],
                "training": one["weights"] + 3 * one["parameter_bytes"] + batch * one["saved"],
            }
        )
    rows.sort(key=lambda row: (row[sort], row["name"]))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = _table(rows, ("name", "mixer", "input", *COLUMNS[1:]), batch)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if needed > console.width:
        table = _table(rows, COLUMNS, batch)
        table.caption = f"{table.caption}; a wider terminal also shows the mixer and the input"
    console.print(table)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], batch: int) -> Any:
    from rich.table import Table

    table = Table(
        box=None, header_style="bold", pad_edge=False, collapse_padding=True,
        caption_justify="left",
        caption=f"multiply-adds of one sample; memory in bytes for a batch of {batch} in float32, "
        "training with AdamW",
    )  # fmt: skip
    for column in columns:
        left = column in ("name", "mixer", "input")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        shown = {**row, "input": "×".join(map(str, row["input"]))}
        shown |= {column: short(row[column]) for column in COLUMNS[1:]}
        table.add_row(*(shown[column] for column in columns))
    return table


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:  # `models.blocks.choose` would import torch
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(known)}")


UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def short(number: float) -> str:
    """Write a number with three digits and a unit, such as 28.7 M."""
    for unit, size in reversed(UNITS.items()):
        if number >= size:
            return (
                f"{number / size:.3g} {unit}"
                if number < 999.5 * size
                else f"{number / size:,.0f} {unit}"
            )
    return f"{number:.0f}"


def parameters(text: str) -> int:
    """Read a number of parameters, such as "30M", "2.5G" or "1000000".

    Raises:
        ValueError: the text is not a number of at least 0.
    """
    try:
        number = float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ValueError(f"max-parameters: got {text!r}, want a number such as 30M or 1000000")
    return int(number)
