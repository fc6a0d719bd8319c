"""The commands `translution train` and `translution evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from .import_option import ImportOption
from .imports import with_imports

__all__ = ["evaluate", "train"]

# The devices of a run are those of its training; an evaluation needs one.
ONE_DEVICE = ("train.devices=1", "train.nodes=1", "train.offset_ranks=1", "train.strategy=auto")


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in recipes/.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, if there is one.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the configuration with all defaults and stop.")
    ] = False,
    imports: ImportOption = None,
) -> None:
    """Train a model from a configuration: translution train CONFIG [--key=value ...].

    Any key of the configuration can be changed, such as --model.mixer=alpha --train.steps=2000
    --out=runs/alpha. The run's folder gets config.yaml, metrics.csv, TensorBoard's files and
    checkpoints. CONFIG may also be the folder of a run.
    """
    from ..config import parse, read
    from .config import Config, config_file
    from .data import Parts

    file = config_file(config)
    loaded = parse(Config, with_imports(read(file), imports), str(file), context.args)
    if show:
        typer.echo(loaded.print_complete(), nl=False)
        return
    from .devices import Diverged, is_main_process
    from .messages import next_commands, saved_metrics
    from .run import train as run

    folder = config if config.is_dir() else loaded.folder(config)
    parts: Parts = {}
    try:
        run(loaded, folder, resume, parts)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command with --resume continues the run: {folder}", err=True)
        raise
    except Diverged as error:
        raise _exit(error) from None
    if is_main_process():
        typer.echo(f"{folder}:\n{saved_metrics(folder)}")
        typer.echo(next_commands(loaded, folder, parts))


def _exit(error: ValueError) -> typer.Exit:
    """Write a failure that is not due to wrong input, in one line, and give the exit code 1."""
    from .devices import is_main_process

    if is_main_process():
        typer.echo(f"translution: {error}", err=True)
    return typer.Exit(1)


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint's.")],
    part: Annotated[str, typer.Option(help="valid or test.")] = "valid",
    json: Annotated[Path | None, typer.Option(help="Also write the metrics to this file.")] = None,
    imports: ImportOption = None,
) -> None:
    """Measure a checkpoint: translution evaluate CHECKPOINT [--key=value ...].

    The data are those of the run, or others with keys such as --data.valid=FILES. One device is
    used, unless --train.devices asks for more. A run's folder stands for its best checkpoint.
    --import replaces the files that the run imported.
    """
    import json as json_module

    from ...models.configuration import check_choice
    from ...utils.files import check_target, write_whole
    from ..config import parse
    from .checkpoints import find_checkpoint, read_description
    from .config import Config
    from .devices import Diverged, is_main_process
    from .messages import metrics_line
    from .run import evaluate as run

    check_choice("part", part, ("valid", "test"))
    if json is not None:
        check_target("json", json)
    if own := [key for key in context.args if re.match(r"(--)?model\b", key)]:
        raise ValueError(
            f"model: a checkpoint has its own model, got {own[0]}; want keys of data and train"
        )
    path = find_checkpoint(checkpoint)
    saved = read_description(path)
    content = with_imports((saved.config or {}) | ({"imports": []} if imports else {}), imports)
    found = parse(Config, content, str(path), [*ONE_DEVICE, *context.args])
    try:
        metrics = run(path, part, found)  # type: ignore[arg-type]
    except Diverged as error:
        raise _exit(error) from None
    if not is_main_process():
        return
    typer.echo(f"{path}, step {saved.step}:\n  {metrics_line(metrics)}")
    if json is not None:
        content = {"checkpoint": str(path), "step": saved.step, "part": part, **metrics}
        write_whole(json, lambda to: to.write_text(json_module.dumps(content, indent=1), "utf-8"))
