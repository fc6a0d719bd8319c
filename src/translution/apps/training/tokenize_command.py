"""The command `translution tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["tokenize"]


def tokenize(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML file of a model of text.")],
) -> None:
    """Tokenise the text of a configuration ahead: translution tokenize CONFIG [--key=value ...].

    Training does it too, where it has not been done; here it needs no accelerator to wait for it.
    Interrupted, it goes on where it was.
    """
    from ..config import load
    from ..data.text import Part, open_text
    from .config import Config, config_file

    found = load(Config, config_file(config), context.args)
    if found.data.kind != "text":
        raise ValueError(f"{config}: data.kind is {found.data.kind!r}, want 'text'")
    parts: list[Part] = ["train"]
    parts += ["valid"] if found.data.valid or found.data.holdout else []
    parts += ["test"] if found.data.test else []
    for part in parts:
        text = open_text(found.data, part, found.seed)
        typer.echo(
            f"{part}: {text.tokens:,} tokens of {text.bytes:,} bytes "
            f"({text.bytes / text.tokens:.3f} each), {text.documents:,} documents, "
            f"vocabulary {text.vocab_size:,}: {text.shards.folder}"
        )
