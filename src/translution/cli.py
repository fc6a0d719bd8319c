"""The command line. Each command is a thin function here; the work is in its own package."""

from __future__ import annotations

import sys

__all__ = ["main"]

EXTRAS = {
    "datasets": "data",
    "PIL": "data",
    "pydantic": "data",
    "tokenizers": "data",
    "yaml": "data",
    "kornia": "train",
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
    try:
        import typer

        from .bench.command import bench
        from .bench.steps_command import bench_step
        from .compare.command import compare
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        extra = EXTRAS.get(missing, "all")
        sys.exit(
            f"translution: {missing} is not installed; pip install 'translution[{extra}]' "
            "brings it ('translution[all]' brings everything)"
        )
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Attention with a sense of where: compare mixers, measure operators.",
    )

    @app.callback()
    def _app() -> None:
        pass

    app.command()(compare)
    app.command()(bench)
    app.command()(bench_step)
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"translution: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
