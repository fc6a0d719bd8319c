"""The commands `translution train` and `translution evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EXTRA", "evaluate", "train"]

# What a command does not know itself is a change of the configuration.
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the whole configuration and do nothing.")
    ] = False,
) -> None:
    """Train a model from a configuration: translution train CONFIG [--key=value ...].

    Any key of the configuration can be changed, such as --model.mixer=alpha --train.steps=2000
    --out=runs/alpha. The run's folder gets config.yaml, metrics.csv, TensorBoard's files and
    checkpoints; a folder of a run is a CONFIG too.
    """
    from ..config import as_yaml, load
    from .config import Config

    path = config / "config.yaml" if config.is_dir() else config
    found = load(Config, path, context.args)
    if show:
        typer.echo(as_yaml(found), nl=False)
        return
    from .run import train as run

    folder = config if config.is_dir() else found.folder(config)
    try:
        metrics = run(found, folder, resume)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command with --resume goes on: {folder}", err=True)
        raise
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0:
        typer.echo(f"{folder}: {_line(metrics)}")


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint's.")],
    part: Annotated[str, typer.Option(help="valid or test.")] = "valid",
    json: Annotated[Path | None, typer.Option(help="Also write the metrics there.")] = None,
) -> None:
    """Measure a checkpoint: translution evaluate CHECKPOINT [--key=value ...].

    On the run's own data, or with keys such as --data.valid=... on others. A run's folder stands
    for its best checkpoint.
    """
    import json as json_module

    from ..config import parse
    from ..files import write_whole
    from ..models.blocks import choose
    from .checkpoints import find_checkpoint, read_about
    from .config import Config
    from .run import evaluate as run

    choose("part", part, ("valid", "test"))
    path = find_checkpoint(checkpoint)
    about = read_about(path)
    found = parse(Config, about["config"], str(path), changes=context.args)
    metrics = run(path, part, found)  # type: ignore[arg-type]
    typer.echo(f"{path}, step {about['step']}: {_line(metrics)}")
    if json is not None:
        content = {"checkpoint": str(path), "step": about["step"], "part": part, **metrics}
        write_whole(json, lambda to: to.write_text(json_module.dumps(content, indent=1), "utf-8"))


def _line(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
