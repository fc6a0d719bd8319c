"""The command `translution predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .import_option import ImportOption

__all__ = ["predict"]


def predict(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a run, a checkpoint or a saved model.")
    ],
    images: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to give for each image.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="A file to write, .csv or .json. Default: a table.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    imports: ImportOption = None,
) -> None:
    """Classify images: translution predict CHECKPOINT IMAGE...

    An image that cannot be read is named, all others are classified, and the exit code is then 1.
    """
    import csv
    import json

    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from ...models.pretrained import CONFIG, Pretrained
    from ...utils.files import check_target, write_whole
    from ..data.transform import image_files
    from .checkpoints import open_checkpoint
    from .devices import pick_device
    from .predict import predict as run

    if output is not None and output.suffix not in (".csv", ".json"):
        raise ValueError(f"output: got {output}, want a name that ends in .csv or .json")
    if output is not None:
        check_target("output", output)
    files = image_files(images)
    saved = (checkpoint.expanduser() / CONFIG).is_file()  # save_pretrained wrote it
    model = Pretrained.from_pretrained(checkpoint) if saved else open_checkpoint(checkpoint)
    results = run(model, files, top, batch_size, pick_device(device))
    errors = Console(stderr=True)
    quiet = not errors.is_terminal  # elsewhere the bar would leave an empty line
    bar = track(results, "Classifying", len(files), console=errors, transient=True, disable=quiet)
    done = list(bar)
    good = [one for one in done if one.error is None]
    if output is None:
        table = Table("image", *[h for _ in range(top) for h in ("class", "probability")])
        for one in good:
            pairs = zip(one.classes, one.probabilities, strict=True)
            table.add_row(str(one.file), *[cell for c, p in pairs for cell in (c, f"{p:.4f}")])
        Console().print(table)
    elif output.suffix == ".json":
        content = [
            {"image": str(o.file), "classes": o.classes, "probabilities": o.probabilities}
            for o in good
        ]
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_whole(output, lambda to: to.write_text(text, "utf-8"))
    else:

        def save(to: Path) -> None:
            with to.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "rank", "class", "probability"])
                for one in good:
                    ranked = zip(one.classes, one.probabilities, strict=True)
                    for rank, (name, probability) in enumerate(ranked, 1):
                        writer.writerow([one.file, rank, name, probability])

        write_whole(output, save)
    for one in done:
        if one.error is not None:
            errors.print(f"translution: {one.error}", soft_wrap=True, highlight=False)
    if len(good) < len(done):
        raise typer.Exit(1)
