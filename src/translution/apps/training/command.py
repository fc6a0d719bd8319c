"""The commands `translution train` and `translution evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["evaluate", "train"]

# Devices are those of a run's training; to measure one is enough.
ALONE = ("train.devices=1", "train.nodes=1", "train.offset_ranks=1", "train.strategy=auto")


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
    from .config import Config, config_file

    found = load(Config, config_file(config), context.args)
    if show:
        typer.echo(as_yaml(found), nl=False)
        return
    from .run import train as run
    from .telling import leads, next_commands

    folder = config if config.is_dir() else found.folder(config)
    try:
        metrics = run(found, folder, resume)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command with --resume goes on: {folder}", err=True)
        raise
    if leads():
        typer.echo(f"{folder}:\n  {_line(metrics)}")
        typer.echo(next_commands(found, folder))


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint's.")],
    part: Annotated[str, typer.Option(help="valid or test.")] = "valid",
    json: Annotated[Path | None, typer.Option(help="Also write the metrics there.")] = None,
) -> None:
    """Measure a checkpoint: translution evaluate CHECKPOINT [--key=value ...].

    On the run's own data, or with keys such as --data.valid=... on others; on one device, unless
    --train.devices asks for more. A run's folder stands for its best checkpoint.
    """
    import json as json_module

    from ...models.configuration import check_choice
    from ...utils.files import write_whole
    from ..config import parse
    from .checkpoints import find_checkpoint, read_about
    from .config import Config
    from .run import evaluate as run
    from .telling import leads

    check_choice("part", part, ("valid", "test"))
    if own := [key for key in context.args if re.match(r"(--)?model\b", key)]:
        raise ValueError(
            f"model: a checkpoint has its own model, got {own[0]}; want keys of data and train"
        )
    path = find_checkpoint(checkpoint)
    about = read_about(path)
    found = parse(Config, about["config"], str(path), [*ALONE, *context.args])
    metrics = run(path, part, found)  # type: ignore[arg-type]
    if not leads():
        return
    typer.echo(f"{path}, step {about['step']}:\n  {_line(metrics)}")
    if json is not None:
        content = {"checkpoint": str(path), "step": about["step"], "part": part, **metrics}
        write_whole(json, lambda to: to.write_text(json_module.dumps(content, indent=1), "utf-8"))


def _line(metrics: dict[str, float]) -> str:
    told = {name: value for name, value in metrics.items() if value or "skipped" not in name}
    return ", ".join(f"{name} {value:.5g}" for name, value in told.items())
