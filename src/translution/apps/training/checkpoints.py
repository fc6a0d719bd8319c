"""Checkpoints, each a folder in the folder `checkpoints` of a run, such as last-000500.

A checkpoint contains
    model.safetensors   the weights; with `ema`, the averaged ones
    checkpoint.json     the name and options of the model, the preprocessing of images, the step
                        and the metrics
    tokenizer.json      the tokenizer of a language model
    parts               a folder instead of model.safetensors, if tables are divided over devices
    state.pt            what only a resumed run needs

A folder is written under a temporary name and then renamed, so the checkpoints of a run that is
killed can be loaded. Only tensors and plain values are unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from ..._version import __version__
from ...interop import parallel
from ...models import create_model
from ...models.preprocessing import Preprocessing
from ...models.pretrained import (
    ABOUT,
    FORMAT,
    PARTS,
    WEIGHTS,
    Pretrained,
    find_checkpoint,
    load_weights,
    newest,
    read_about,
    read_weights,
)
from ...models.registry import current_options
from ...utils.files import umask
from ..data.image_options import ImageOptions
from ..data.tokenizers import load_tokenizer, save_tokenizer

__all__ = [
    "PARTS",
    "PREFIX",
    "STATE",
    "TOKENIZER",
    "Checkpoint",
    "Folders",
    "clear_remains",
    "find_checkpoint",
    "is_whole",
    "latest",
    "load_weights",
    "newest",
    "open_checkpoint",
    "read_about",
]

STATE, TOKENIZER = "state.pt", "tokenizer.json"
PREFIX = "model."  # begins the names of the model's weights within the training task


@dataclass
class Checkpoint:
    """A model that was loaded from a checkpoint, in evaluation mode.

    path: the folder of the checkpoint.
    model: the model. Its `preprocessing` says how an image becomes its input.
    config: the configuration of the run, as plain values.
    step: the number of steps that the model was trained for.
    classes: the names of the classes, for a classifier.
    tokenizer: the tokenizer, for a language model.
    metrics: those of the last validation before it was saved.
    """

    path: Path
    model: nn.Module
    config: dict[str, Any]
    step: int
    classes: list[str] | None
    tokenizer: Tokenizer | None
    metrics: dict[str, float]

    def export(self, folder: Path | str) -> None:
        """Write a folder to share, as `save_pretrained` does.

        It also has the names of the classes or the tokenizer, and a model card with the data, the
        training and the metrics.

        Raises:
            ValueError: a model that is not of this library.
            OSError: a folder that cannot be written.
        """
        if not isinstance(self.model, Pretrained):
            raise ValueError(f"model: got {type(self.model).__name__}, want one of this library")
        training = {part: self.config[part] for part in ("data", "train")}
        text = yaml.safe_dump(training, sort_keys=False, allow_unicode=True)
        data = f"{self.step:,} steps of\n\n```yaml\n{text}```"
        self.model.save_pretrained(folder, data, self.metrics, self.classes)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder).expanduser() / TOKENIZER)


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, from which a run continues.

    One with an incomplete state, as an interrupted copy leaves it, is only used if there is no
    other.
    """
    return max(
        (path for kind in ("last", "best") if (path := newest(folder, kind))),
        key=lambda path: (is_whole(path), int(path.name.rpartition("-")[2])),
        default=None,
    )


def is_whole(path: Path) -> bool:
    """Whether the state of a checkpoint is complete, judged by its last bytes."""
    return zipfile.is_zipfile(path / STATE)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Load the model of a checkpoint.

    Args:
        path: the folder of a checkpoint, or that of a run, which stands for its best checkpoint.

    Raises:
        ValueError: no checkpoint, or weights that do not fit the model; the message names them.
        OSError: a file that cannot be read.
    """
    path = find_checkpoint(path)
    about = read_about(path)
    name, options = about["model"]["name"], about["model"]["options"]
    model = create_model(name, **current_options(name, options, warn=False))
    if (path / PARTS).is_dir():
        parallel.load(model, path / PARTS)
    else:
        load_weights(model, read_weights(path), path / WEIGHTS)
    if isinstance(model, Pretrained):
        model.preprocessing = _preprocessing(about, path / ABOUT, model)
    tokenizer = path / TOKENIZER
    return Checkpoint(
        path=path,
        model=model.eval(),
        config=about["config"],
        step=about["step"],
        classes=about["classes"],
        tokenizer=load_tokenizer(tokenizer) if tokenizer.exists() else None,
        metrics=about["metrics"],
    )


def _preprocessing(about: dict[str, Any], source: Path, model: Pretrained) -> Preprocessing | None:
    """The preprocessing in a checkpoint.json.

    Older ones do not have it. It then follows from the options of the data, if they fit the model;
    a model can be loaded without it.
    """
    if "preprocessing" in about:
        return Preprocessing.of_file(about, source, model.config)
    try:
        options = ImageOptions.model_validate(about["config"].get("data"))
        entry = {"preprocessing": options.preprocessing().entry()}
        return Preprocessing.of_file(about | entry, source, model.config)
    except ValueError:
        return None


class Folders(CheckpointIO):
    """Writes and reads the checkpoints of Lightning as the folders that are described above.

    Args:
        about: the content of checkpoint.json, without the step and the metrics.
        tokenizer: the tokenizer of a language model.
    """

    def __init__(self, about: dict[str, Any], tokenizer: Tokenizer | None):
        self.about, self.tokenizer = about, tokenizer
        self.metrics: dict[str, float] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        state = dict(checkpoint)
        weights = {
            name.removeprefix(PREFIX): tensor.detach().cpu().contiguous()
            for name, tensor in state.pop("state_dict").items()
            if name.startswith(PREFIX)
        }
        with whole_folder(path) as folder:
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            self._rest(state, folder)

    def _rest(self, state: dict[str, Any], folder: Path) -> None:
        """Write everything except the weights."""
        about = {"format": FORMAT, "translution": __version__, **self.about}
        about |= {"step": state["global_step"], "metrics": self.metrics}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (folder / ABOUT).write_text(text, "utf-8")
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder / TOKENIZER)
        torch.save(state, folder / STATE)

    @contextmanager
    def parts(self, checkpoint: dict[str, Any], path: Path, strategy: Any) -> Iterator[Path]:
        """A folder that all devices write their parts to; after the block it is a checkpoint."""
        with ExitStack() as stack:
            folder = None
            if strategy.is_global_zero:
                folder = stack.enter_context(whole_folder(path))
            folder = strategy.broadcast(folder)
            yield folder / PARTS
            strategy.barrier()
            if strategy.is_global_zero:
                state = {k: v for k, v in checkpoint.items() if k != "state_dict"}
                self._rest(state, folder)
        strategy.barrier()

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        try:
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            message = f"{path / STATE}: cannot be read as plain tensors ({reason})"
            raise ValueError(message) from None
        if (path / PARTS).is_dir():
            return state | {"parts": path / PARTS}
        weights = read_weights(path)
        return state | {"state_dict": {PREFIX + name: value for name, value in weights.items()}}

    def remove_checkpoint(self, path: Any) -> None:
        # it is renamed first, because a folder that is half removed must not look like a checkpoint
        gone = Path(tempfile.mkdtemp(dir=Path(path).parent, prefix=".old-"))
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` after the block, or removed after an error.

    Raises:
        OSError: the folder cannot be written, also if torch or safetensors raise other classes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    try:
        yield folder
        for file in folder.iterdir():
            if file.is_dir():
                continue
            file.chmod(0o666 & ~umask())
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        folder.chmod(0o777 & ~umask())
        os.replace(folder, path)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path}: cannot be written, the earlier checkpoints are whole: {reason}"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_remains(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run, and all but the newest of each kind."""
    if not folder.is_dir():
        return
    keep = {newest(folder, "last"), newest(folder, "best")}
    for path in folder.iterdir():
        half = path.name.startswith((".new-", ".old-"))
        if half or (re.fullmatch(r"(last|best)-\d+", path.name) and path not in keep):
            shutil.rmtree(path, ignore_errors=True)
