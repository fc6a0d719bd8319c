"""The commands `translution import` and `translution export-published`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .training.import_option import ImportOption

__all__ = ["export_published", "import_published"]


def import_published(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Weights of the published code: .safetensors, or of torch.save.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write. It is made if it is missing.")],
    exchanged: Annotated[
        bool | None,
        typer.Option(
            "--exchanged/--not-exchanged",
            help="Whether they come from the 2-D code before 2025-11-29, which took q for k.",
        ),
    ] = None,
) -> None:
    """Make a saved model of published weights: translution import CHECKPOINT FOLDER.

    They are those of the code of Translution (ViT, GPT) or ACmix (ResNet, Swin). The options of the
    model follow from the names and shapes of the weights. What does not is assumed and said;
    any option can be given, such as --heads=3 or --image_size=224. `from_pretrained` and the other
    commands read the folder.
    """
    from pydantic import ConfigDict

    from ..interop.published import infer_published, load_published
    from ..interop.published.source import read
    from ..models import Pretrained, create_model
    from .config import Options, parse
    from .training.config import ModelOptions
    from .training.share_command import check_shared

    class Given(Options):
        """Options of a model whose name is not known yet."""

        model_config = ConfigDict(extra="allow")

    check_shared(folder)
    given: dict[str, Any] = parse(Given, {}, str(checkpoint), context.args).model_extra or {}
    weights = read(checkpoint)
    found = infer_published(weights, given)
    image_size = found.image_size
    if found.name == "swin" and "image_size" in found.options:
        image_size = found.options.pop("image_size")
        if not isinstance(image_size, int):
            raise ValueError(f"image_size: got {image_size!r}, want a number of pixels")
    options = parse(ModelOptions, {"name": found.name, **found.options}, "command line").given
    model = create_model(found.name, **options)
    assert isinstance(model, Pretrained)
    try:
        unused = load_published(model, weights, exchanged=exchanged, image_size=image_size)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    model.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    typer.echo(f"{folder}: {found.name} with {count:,} parameters ({shown})")
    for line in found.assumed:
        typer.echo(f"  assumed: {line}")
    for line in unused:
        typer.echo(f"  not used, as it changes no output: {line}")


def export_published(
    model: Annotated[Path, typer.Argument(help="Folder of a run, a checkpoint or a saved model.")],
    file: Annotated[Path, typer.Argument(help="File to write: .safetensors, .pth or .pt.")],
    exchanged: Annotated[
        bool,
        typer.Option("--exchanged", help="For the 2-D code before 2025-11-29, which took q for k."),
    ] = False,
    image_size: Annotated[
        int, typer.Option(min=1, help="Pixels of the published Swin, whose masks depend on them.")
    ] = 224,
    unused_rotations: Annotated[
        bool, typer.Option("--unused-rotations", help="Also write those of rope_translution.")
    ] = False,
    imports: ImportOption = None,
) -> None:
    """Write the weights of a model as the published code reads them.

    A model that has no counterpart there is refused, with the option that it differs in.
    """
    import torch
    from safetensors.torch import save_file

    from ..interop.published import export_published as export
    from ..models import Pretrained
    from ..models.description import CONFIG
    from ..utils.files import check_target, write_whole
    from .training.checkpoints import open_checkpoint

    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"FILE: got {file}, want a name that ends in .safetensors, .pth or .pt")
    check_target("FILE", file)
    saved = (model.expanduser() / CONFIG).is_file()  # save_pretrained wrote it
    trained = Pretrained.from_pretrained(model) if saved else open_checkpoint(model).model
    weights = export(
        trained, exchanged=exchanged, image_size=image_size, unused_rotations=unused_rotations
    )
    as_safetensors = file.suffix == ".safetensors"
    write_whole(
        file,
        lambda to: save_file(weights, to) if as_safetensors else torch.save(weights, to),
    )
    typer.echo(f"{file}: {len(weights)} tensors")
