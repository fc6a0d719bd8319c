"""The command line. Each command is a thin function here; the work is in its own package."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from .._version import __version__

__all__ = ["main"]

EXTRAS = {
    "datasets": "data",
    "filelock": "data",
    "pyarrow": "data",
    "PIL": "data",
    "pydantic": "data",
    "tokenizers": "data",
    "yaml": "data",
    "kornia": "train",
    "nicegui": "demo",
    "tensorboard": "train",
    "typer": "cli",
    "rich": "cli",
    "numpy": "data",
    "sklearn": "data",
    "matplotlib": "plots",
    "jinja2": "plots",
    "lightning": "train",
    "torchmetrics": "train",
    "safetensors": "train",
}


def main() -> None:
    """Run a command; bad input ends in one clear line and exit code 2, never in a traceback."""
    usual, warnings.formatwarning = warnings.formatwarning, _plainly
    try:
        _app()()
    except ModuleNotFoundError as error:
        sys.exit(_missing(error))
    except (ValueError, OSError) as error:
        print(f"translution: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = usual


def _plainly(message: Any, *_: Any, **__: Any) -> str:
    """A warning, without the line of the library that it came from."""
    return f"translution: {message}\n"


def _app() -> Any:
    import typer

    from .bench.command import bench
    from .bench.gpu_command import bench_gpu
    from .bench.steps_command import bench_step
    from .bench.tune_command import bench_tune
    from .catalogue.command import models
    from .compare.command import compare
    from .demo.command import demo
    from .experiments.command import experiment
    from .export import export
    from .training.command import EXTRA, evaluate, train
    from .training.generate_command import generate
    from .training.predict_command import predict
    from .training.share_command import share
    from .training.tokenize_command import tokenize

    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Attention with a sense of where: train, use and compare models, measure operators.",
    )

    def show_version(asked: bool) -> None:
        if asked:
            print(f"translution {__version__}")
            raise typer.Exit

    @app.callback()
    def _app(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=show_version, help="Print the version."
        ),
    ) -> None:
        pass

    app.command(context_settings=EXTRA)(train)
    app.command(context_settings=EXTRA)(evaluate)
    app.command(context_settings=EXTRA)(tokenize)
    app.command()(predict)
    app.command()(generate)
    app.command()(share)
    app.command()(models)
    app.command()(export)
    app.command()(compare)
    app.command()(demo)
    app.command(context_settings=EXTRA)(experiment)
    app.command()(bench)
    app.command()(bench_step)
    app.command()(bench_gpu)
    app.command()(bench_tune)
    return app


def _missing(error: ModuleNotFoundError) -> str:
    """What to install; a module that no extra brings is a mistake of ours, and stays an error."""
    missing = (error.name or "").split(".")[0]
    if missing not in EXTRAS:
        raise error
    return (
        f"translution: {missing} is not installed; pip install 'translution[{EXTRAS[missing]}]' "
        "brings it ('translution[all]' brings everything)"
    )
