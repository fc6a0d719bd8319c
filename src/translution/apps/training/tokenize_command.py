"""The command `translution tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .import_option import ImportOption
from .imports import with_imports

__all__ = ["tokenize"]


def tokenize(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML file of a language model.")],
    imports: ImportOption = None,
) -> None:
    """Tokenise the text of a configuration ahead: translution tokenize CONFIG [--key=value ...].

    Training does this too if it has not been done, but an accelerator then waits for it. After an
    interruption the command continues where it was.
    """
    from ..config import parse, read
    from ..data.text import Part, open_text
    from .config import Config, config_file

    file = config_file(config)
    loaded = parse(Config, with_imports(read(file), imports), str(file), context.args)
    if loaded.data.kind != "text":
        raise ValueError(f"{config}: data.kind is {loaded.data.kind!r}, want 'text'")
    parts: list[Part] = ["train"]
    parts += ["valid"] if loaded.data.valid or loaded.data.holdout else []
    parts += ["test"] if loaded.data.test else []
    for part in parts:
        text = open_text(loaded.data, part, loaded.seed)
        typer.echo(
            f"{part}: {text.tokens:,} tokens of {text.bytes:,} bytes "
            f"({text.bytes / text.tokens:.3f} each), {text.documents:,} documents, "
            f"vocabulary {text.vocab_size:,}: {text.shards.folder}"
        )
