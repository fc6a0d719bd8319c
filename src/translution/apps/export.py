"""The command `translution export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .training.import_option import ImportOption

__all__ = ["export"]


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a run, a checkpoint, or a saved or converted model; or a model's name "
            "(untrained)."
        ),
    ],
    to: Annotated[str, typer.Option(help="Kind of program: torch, onnx or aoti.")],
    out: Annotated[
        Path, typer.Option(help="File to write: .pt2 for torch and aoti, .onnx for onnx.")
    ],
    quantise: Annotated[bool, typer.Option(help="Store the weights in eight bits.")] = False,
    batch: Annotated[
        str, typer.Option(help="Samples in a batch: a number, or dynamic for any number.")
    ] = "dynamic",
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width in pixels, or tokens. Default: those of the model."
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Run the file and compare it with the model.")] = True,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="Allowed difference, as a share of the largest output."),
    ] = 1e-3,
    imports: ImportOption = None,
) -> None:
    """Write a model as a program that runs without this library.

    The file is written whole or not at all. With --check it is then read and run on random input,
    and a difference from the model that exceeds the tolerance gives exit code 1.
    """
    import logging
    import time
    import warnings

    import torch
    from rich.console import Console

    from ..interop.conversion.saving import CONVERSION, load_converted
    from ..interop.export.files import check_kind, open_program, save_program
    from ..interop.export.programs import difference, example, portable
    from ..interop.export.quantization import quantise as quantised
    from ..interop.export.quantization import stored_bytes
    from ..models import create_model
    from ..models.description import CONFIG
    from ..models.pretrained import Pretrained

    check_kind(to, out)
    dynamic = batch == "dynamic"
    if not dynamic and not (batch.isdecimal() and int(batch) > 0):
        raise ValueError(f"batch: got {batch!r}, want 'dynamic' or a number of at least 1")
    original: torch.nn.Module
    folder = Path(model).expanduser()
    if (folder / CONVERSION).is_file():
        original = load_converted(folder)
        if hasattr(original.config, "use_cache"):  # a program returns no caches
            original.config.use_cache = False
    elif (folder / CONFIG).is_file():  # save_pretrained wrote it
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
        with Console(stderr=True).status("tracing the model") as status:
            program = portable(exported, x, dynamic)
            status.update(f"writing {out.name}")
            written = save_program(program, to, out, _preprocessing(original, x))
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
            # with a dynamic batch also another number of samples than the traced one
            inputs = [x, example(exported, 3, size)] if dynamic else [x]
            far = max(
                (difference(run(one), exported(one)) for one in inputs), key=lambda d: d.share
            )
            console.print(f"against the model: largest difference {far.largest:.2e}")
            if not far.share <= tolerance:
                console.print(f"translution: this is more than {tolerance:g} of the largest output")
                raise typer.Exit(1)


def _preprocessing(model: Any, x: Any) -> Any:
    """The preprocessing of a model for images of the size of `x`, or None if it has none."""
    from dataclasses import replace

    known = getattr(model, "preprocessing", None)
    return None if known is None else replace(known, image_size=tuple(x.shape[-2:]))
