"""The command `translution compare`: its options; the work is in the modules beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...models.blocks import MIXERS

__all__ = ["compare"]


def compare(
    out: Annotated[
        Path, typer.Option(help="Folder to write; a finished comparison there is replaced.")
    ] = Path("compare"),
    data: Annotated[str, typer.Option(help="digits or mnist.")] = "digits",
    data_dir: Annotated[
        str | None, typer.Option(help="Folder with MNIST's four files, downloaded if absent.")
    ] = None,
    mixers: Annotated[str, typer.Option(help=f"Some of {', '.join(MIXERS)}.")] = (
        "attention, convolution, acmix, alpha, translution"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed; makes a run repeatable.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Digits per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its largest value.")] = None,
    canvas: Annotated[int | None, typer.Option(help="Pixels per side of the canvas.")] = None,
    patch: Annotated[int | None, typer.Option(help="Pixels per side of a patch.")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels of a token.")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.")] = None,
    init: Annotated[
        str, typer.Option(help="How tables start: equal, independent or published.")
    ] = "equal",
    train_limit: Annotated[int | None, typer.Option(help="Use so many training digits.")] = None,
    test_limit: Annotated[int | None, typer.Option(help="Use so many test digits.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time; 0: on the CPU one for each core, else one.")
    ] = 0,
) -> None:
    """Train mixers on the same digits with one budget, and report how they cope with moving.

    Each is trained twice per seed, on centred digits and on digits moved anywhere on a canvas, and
    tested on both. Writes a folder with results.json, checkpoints and a report.html. Ctrl-C keeps
    the runs that are finished, and the same command then goes on with the others. Options without
    a default depend on the data.
    """
    try:
        from .comparison import comparison
        from .folder import compare_in
    except ModuleNotFoundError as error:
        raise ValueError(
            f"compare: {error.name} is not installed; pip install 'translution[all]' brings it"
        ) from None
    experiment = comparison(
        data, [m.strip() for m in mixers.split(",") if m], learning_rate, data_dir,
        seeds=seeds, seed=seed, steps=steps, batch_size=batch_size, canvas=canvas, patch=patch,
        dim=dim, depth=depth, heads=heads, init=init, train_limit=train_limit,
        test_limit=test_limit, device=device,
    )  # fmt: skip
    if not compare_in(str(out), experiment, " ".join(["translution", *sys.argv[1:]]), jobs):
        raise typer.Exit(130)
