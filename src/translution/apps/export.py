"""The command `translution export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's, checkpoint's or saved model's folder, or a name (untrained)."
        ),
    ],
    to: Annotated[str, typer.Option(help="torch, onnx or aoti.")],
    out: Annotated[Path, typer.Option(help="File: .pt2 for torch and aoti, .onnx for onnx.")],
    quantise: Annotated[bool, typer.Option(help="Weights in eight bits.")] = False,
    batch: Annotated[str, typer.Option(help="A number, or dynamic: any.")] = "dynamic",
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels of a side, or tokens; default: made for."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Run the file and compare it with the model.")] = True,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference, as a share of the largest output.")
    ] = 1e-3,
) -> None:
    """Write a model as a program that needs nothing of this library to run.

    The file is whole or not there. With --check it is read again and run on random input; a
    difference beyond the tolerance is exit code 1.
    """
    import logging
    import time
    import warnings

    import torch
    from rich.console import Console

    from ..interop.export.files import check_kind, open_program, save_program
    from ..interop.export.programs import difference, example, portable
    from ..interop.export.quantise import quantise as quantised
    from ..interop.export.quantise import stored_bytes
    from ..models import create_model
    from ..models.pretrained import CONFIG, Pretrained

    check_kind(to, out)
    dynamic = batch == "dynamic"
    if not dynamic and not (batch.isdecimal() and int(batch) > 0):
        raise ValueError(f"batch: got {batch!r}, want 'dynamic' or a number of at least 1")
    original: torch.nn.Module
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():  # written by save_pretrained
        original = Pretrained.from_pretrained(folder)
    elif folder.exists():
        from .training.checkpoints import open_checkpoint

        original = open_checkpoint(folder).model
    else:
        original = create_model(model).eval()
    console = Console(highlight=False)
    exported = quantised(original) if quantise else original
    x = example(exported, 2 if dynamic else int(batch), size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        written = save_program(portable(exported, x, dynamic), to, out)
        seconds = time.perf_counter() - start
        console.print(f"{out}: {written / 1e6:,.1f} MB, {seconds:.1f} s", soft_wrap=True)
        if quantise:
            before, after = stored_bytes(original), stored_bytes(exported)
            far = difference(exported(x), original(x))
            console.print(
                f"eight bits: weights {before / 1e3:,.1f} -> {after / 1e3:,.1f} kB, "
                f"outputs {far.largest:.2e} off at most ({far.share:.2%} of the largest), "
                f"{far.mean:.2e} on average",
                soft_wrap=True,
            )
        if check:
            run = open_program(to, out)
            # another batch than the one that was traced
            inputs = [x, example(exported, 3, size)] if dynamic else [x]
            far = max(
                (difference(run(one), exported(one)) for one in inputs), key=lambda d: d.share
            )
            console.print(f"against the model: largest difference {far.largest:.2e}")
            if not far.share <= tolerance:
                console.print(f"translution: more than {tolerance:g} of the largest output")
                raise typer.Exit(1)
