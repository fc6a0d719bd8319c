"""The command `translution bench-step`, which measures training steps of whole models."""

from __future__ import annotations

import datetime
import itertools
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ...models.blocks import ACTIVATION_CHECKPOINTING
from ...models.configuration import check_choice
from ...modules.attention import check_relative
from ...utils.tables import console_table
from ..training.devices import pick_device
from ..training.import_option import ImportOption
from .common import DTYPES, check_file, header, ints, keep, machine_line
from .steps import Step, measure_step

__all__ = ["bench_step"]

# the default (model, relative, batch) of each row
DEFAULTS = {
    "cpu": [
        ("attention_vit_tiny_patch56_224", "", 16),
        ("alpha_vit_tiny_patch56_224", "qkv", 16),
        ("translution_vit_tiny_patch56_224", "v", 16),
        ("translution_vit_tiny_patch56_224", "kv", 16),
        ("translution_vit_tiny_patch56_224", "qkv", 16),
    ],
    "cuda": [
        ("attention_vit_tiny_patch16_224", "", 256),
        ("alpha_vit_tiny_patch16_224", "qkv", 256),
        ("translution_vit_tiny_patch16_224", "kv", 256),
        ("translution_vit_tiny_patch16_224", "qkv", 256),
        ("attention_vit_small_patch16_224", "", 256),
        ("alpha_vit_small_patch16_224", "qkv", 256),
        ("translution_vit_small_patch16_224", "kv", 64),
        ("translution_vit_small_patch16_224", "qkv", 64),
    ],
}


def bench_step(
    model: Annotated[
        str, typer.Option(help="Names of ViTs, separated by commas; default by device.")
    ] = "",
    relative: Annotated[
        str, typer.Option(help="Relative projections, such as qkv,kv, of models with tables.")
    ] = "qkv",
    batch: Annotated[str, typer.Option(help="Images, such as 16,64; default by model.")] = "",
    autocast: Annotated[
        str, typer.Option(help="Dtype of matrix products; default float32, on cuda bfloat16.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Dtype of weights and optimizer states.")
    ] = "float32",
    checkpoint: Annotated[
        str, typer.Option(help=f"One or more of {','.join(ACTIVATION_CHECKPOINTING)}.")
    ] = "none",
    device: Annotated[str, typer.Option(help="The device: auto, cpu, cuda or mps.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed steps; their median is reported.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default.")] = 0,
    json_file: Annotated[
        str, typer.Option("--json", help="A file for the rows, written after each row.")
    ] = "",
    imports: ImportOption = None,
) -> None:
    """Measure the time and memory of one training step of whole image models.

    The optimizer is AdamW. The peak memory includes weights, gradients, optimizer states and
    activations. The column "published" is the memory that the published algorithm would take in
    float32, computed from its shapes.
    """
    where = torch.device(pick_device(device))
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, want at least 1")
    check_file("json", json_file)
    autocast = autocast or ("bfloat16" if where.type == "cuda" else "float32")
    kinds = [DTYPES[check_choice(n, v, list(DTYPES))] for n, v in
             (("autocast", autocast), ("weights", weights))]  # fmt: skip
    checkpoints = [
        check_choice("checkpoint", name.strip(), ACTIVATION_CHECKPOINTING)
        for name in checkpoint.split(",")
    ]
    if threads:
        torch.set_num_threads(threads)
    known = DEFAULTS["cuda" if where.type == "cuda" else "cpu"]
    if model:
        sides = [check_relative(part.strip()) for part in relative.split(",")]
        known = [
            (name.strip(), side, 16) for name, side in itertools.product(model.split(","), sides)
        ]
    cases = [
        Step(name, side, size, kinds[0], kinds[1], kept)
        for name, side, own in known
        for size in (ints("batch", batch) if batch else [own])
        for kept in checkpoints
    ]
    with torch.device("meta"):
        for case in cases:
            case.build()  # refuses unknown names before anything runs
    console = Console()
    record = header(where)
    rows = record["rows"]
    console.print(f"{machine_line(record['machine'])}, {datetime.date.today()}", highlight=False)
    with Live(console=console) as live:
        for case in cases:
            rows.append(measure_step(case, where, repeats))
            live.update(_table(rows))
            keep(record, json_file)
    if not console.is_terminal:
        console.print()
    if json_file:
        console.print(f"written to {json_file}")


def _table(rows: list[dict[str, Any]]) -> Table:
    several = len({row["checkpoint"] for row in rows}) > 1
    columns = ["model", "M", "batch", *["checkpoint"] * several, "s", "images/s", "GB", "published"]
    lines = []
    for row in rows:
        side = f" ({row['relative']})" if row["relative"] else ""
        cells = [row["model"] + side, f"{row['parameters'] / 1e6:.1f}", str(row["batch"])]
        cells += [row["checkpoint"]] * several
        if "error" in row:
            cells += [row["error"], "", ""]
        else:
            cells += [f"{row['seconds']:.2f}", f"{row['images_per_second']:.1f}"]
            cells += [f"{row['peak_bytes'] / 1e9:.2f}"]
        published = row.get("published_bytes")
        lines.append([*cells, "" if published is None else f"{published / 1e9:,.0f} GB"])
    caption = (
        "M: parameters in millions. GB: peak memory. published: the memory that the published "
        "algorithm would take."
    )
    return console_table(columns, lines, ("model", "checkpoint"), ("model",), caption)
