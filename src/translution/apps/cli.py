"""The command line. Each command is a thin function here; the work is in its own package."""

from __future__ import annotations

import sys
import warnings
from typing import Any

__all__ = ["COMMANDS", "main"]

# name -> (module in apps, function, first sentence of its docstring). A command's module is
# imported only when the command is called.
COMMANDS = {
    "train": (
        "training.command",
        "train",
        "Train a model from a configuration: translution train CONFIG [--key=value ...].",
    ),
    "evaluate": (
        "training.command",
        "evaluate",
        "Measure a checkpoint: translution evaluate CHECKPOINT [--key=value ...].",
    ),
    "tokenize": (
        "training.tokenize_command",
        "tokenize",
        "Tokenise the text of a configuration ahead: translution tokenize CONFIG [--key=value ...].",  # noqa: E501
    ),
    "predict": (
        "training.predict_command",
        "predict",
        "Classify images: translution predict CHECKPOINT IMAGE...",
    ),
    "generate": (
        "training.generate_command",
        "generate",
        "Continue a text with a trained language model.",
    ),
    "share": (
        "training.share_command",
        "share",
        "Write a trained model as a folder to share: weights, configuration and model card.",
    ),
    "models": (
        "catalogue.command",
        "models",
        "List models with their parameters, multiply-adds and memory, without making them.",
    ),
    "export": (
        "export",
        "export",
        "Write a model as a program that runs without this library.",
    ),
    "import": (
        "published",
        "import_published",
        "Make a saved model of published weights: translution import CHECKPOINT FOLDER.",
    ),
    "export-published": (
        "published",
        "export_published",
        "Write the weights of a model as the published code reads them.",
    ),
    "compare": (
        "compare.command",
        "compare",
        "Train mixers on the same digits with one budget, and report how they cope with moving.",
    ),
    "demo": (
        "demo.command",
        "demo",
        "A page to try what the mixers do, on digits that move and on text: translution demo [RUN...]",  # noqa: E501
    ),
    "experiment": (
        "experiments.command",
        "experiment",
        "Train rows alike over several seeds: translution experiment FILE [--base.key=value ...].",
    ),
    "bench": (
        "bench.command",
        "bench",
        "Measure the time and memory of an operator: forward, and forward + backward.",
    ),
    "bench-step": (
        "bench.steps_command",
        "bench_step",
        "Measure the time and memory of one training step of whole image models.",
    ),
    "bench-gpu": (
        "bench.gpu_command",
        "bench_gpu",
        "Check and measure the library on a GPU within a given time.",
    ),
    "bench-tune": (
        "bench.tune_command",
        "bench_tune",
        "Time the Triton kernels with other block sizes than those that the library uses.",
    ),
}

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
        app = _app()
        from .lazy import USAGE_ERRORS, usage_error

        try:
            sys.exit(app(prog_name="translution", standalone_mode=False) or 0)
        except USAGE_ERRORS as error:
            raise ValueError(usage_error(error)) from None
    except ModuleNotFoundError as error:
        sys.exit(_missing(error))
    except (ValueError, OSError) as error:
        print(f"translution: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        print(f"translution: not enough memory{f': {reason}' if reason else ''}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = usual


def _plainly(message: Any, *_: Any, **__: Any) -> str:
    """Format a warning as one line without the file and line number that it came from."""
    return f"translution: {message}\n"


def _lacks_memory(error: Exception) -> bool:
    """Whether Python or torch could not allocate memory. torch has no class for it on the CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or named


def _app() -> Any:
    from .lazy import application

    return application(COMMANDS)


def _missing(error: ModuleNotFoundError) -> str:
    """Say which extra installs the missing module; re-raise the error if no extra does."""
    missing = (error.name or "").split(".")[0]
    if missing not in EXTRAS:
        raise error
    return (
        f"translution: {missing} is not installed; pip install 'translution[{EXTRAS[missing]}]' "
        "installs it ('translution[all]' installs everything)"
    )
