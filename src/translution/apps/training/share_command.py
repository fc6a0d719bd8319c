"""The command `translution share`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .import_option import ImportOption

__all__ = ["check_shared", "share"]


def share(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint's.")],
    folder: Annotated[Path, typer.Argument(help="Where to write. It is made if it is missing.")],
    push: Annotated[
        str | None, typer.Option(help="Then upload the folder to the Hub as owner/name.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository there private.")] = False,
    imports: ImportOption = None,
) -> None:
    """Write a trained model as a folder to share: weights, configuration and model card.

    `from_pretrained` loads the model from it. A run's folder stands for its best checkpoint.
    """
    from .checkpoints import open_checkpoint

    check_shared(folder)
    opened = open_checkpoint(checkpoint)
    opened.export(folder)
    typer.echo(f"{opened.path}, step {opened.step}: written to {folder}")
    if push is not None:
        typer.echo(_send(folder, push, private))


def check_shared(folder: Path) -> None:
    """Check that a model may be saved into a folder.

    Raises:
        ValueError: it is a file, or belongs to a run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"FOLDER: got the file {folder}, want a folder")
    if (folder / "checkpoints").exists() or (folder / "checkpoint.json").exists():
        raise ValueError(f"FOLDER: {folder} belongs to a run, want another folder")


def _send(folder: Path, name: str, private: bool) -> str:
    """Upload the files that `Checkpoint.export` writes, in one commit. Returns its address."""
    import huggingface_hub

    from ...models.description import CONFIG
    from ...models.preprocessing import PROCESSOR_FILE
    from ...models.pretrained import CARD
    from ...models.weights import WEIGHTS
    from .checkpoints import TOKENIZER

    api = huggingface_hub.HfApi(library_name="translution")
    try:
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a model of translution",
            allow_patterns=[WEIGHTS, CONFIG, CARD, TOKENIZER, PROCESSOR_FILE],
        )  # fmt: skip
    except Exception as error:  # those of the library, and of the HTTP library that it uses
        said = " ".join(str(error).split())
        raise OSError(f"push: {name}: {said} ({folder} is written)") from None
    return str(commit)
