"""The command `translution compare`, which compares mixers on moving digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...models.mixers import MIXERS
from ..training.import_option import ImportOption

__all__ = ["compare"]


def compare(
    out: Annotated[
        Path,
        typer.Option(help="The folder to write; a finished comparison in it is replaced."),
    ] = Path("compare"),
    data: Annotated[str, typer.Option(help="The data set: digits or mnist.")] = "digits",
    data_dir: Annotated[
        str | None,
        typer.Option(help="The folder of MNIST's four files, which are downloaded if absent."),
    ] = None,
    mixers: Annotated[
        str, typer.Option(help=f"One or more of {', '.join(MIXERS)}, and those of --import.")
    ] = "attention, convolution, acmix, alpha, translution",
    seeds: Annotated[int, typer.Option(help="The number of seeds.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps of each run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Digits per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The largest learning rate of the schedule.")
    ] = None,
    canvas: Annotated[int | None, typer.Option(help="Pixels per side of the canvas.")] = None,
    patch: Annotated[int | None, typer.Option(help="Pixels per side of a patch.")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels of a token.")] = None,
    depth: Annotated[int | None, typer.Option(help="The number of blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="The number of attention heads.")] = None,
    init: Annotated[
        str, typer.Option(help="The initialisation of tables: equal, independent or published.")
    ] = "equal",
    train_limit: Annotated[
        int | None, typer.Option(help="The number of training digits to use.")
    ] = None,
    test_limit: Annotated[
        int | None, typer.Option(help="The number of test digits to use.")
    ] = None,
    device: Annotated[str, typer.Option(help="The device: auto, cpu, cuda or mps.")] = "auto",
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time; 0 takes one per core of a CPU.")
    ] = 0,
    imports: ImportOption = None,
) -> None:
    """Train mixers on the same digits with one budget, and report how they cope with moving.

    Each mixer is trained twice per seed: on centred digits, and on digits that are moved to random
    places of a canvas. Both models are tested on both kinds of digits. The command writes a folder
    with results.json, checkpoints and the page report.html. If it is stopped with Ctrl-C, finished
    runs are kept, and the same command continues with the others. The defaults of options for
    which none is shown depend on the data.
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
        test_limit=test_limit, device=device, imports=[str(file) for file in imports or []],
    )  # fmt: skip
    if not compare_in(str(out), experiment, " ".join(["translution", *sys.argv[1:]]), jobs):
        raise typer.Exit(130)
