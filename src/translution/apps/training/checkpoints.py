"""Checkpoints, each a folder in the folder `checkpoints` of a run, such as last-000500.

A checkpoint contains
    model.safetensors   the weights; with `ema`, the averaged ones
    checkpoint.json     the description: the name and options of the model, the configuration of the
                        run, the step, the metrics, and the SHA-256 of the other files
    tokenizer.json      the tokenizer of a language model
    parts               a folder instead of model.safetensors, if tables are divided over devices
    state.pt            what only a resumed run needs

A folder is written under a temporary name and then renamed, so the checkpoints of a run that is
killed can be loaded. Only tensors and plain values are unpickled.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import CheckpointIO
from tokenizers import Tokenizer
from torch import nn

from ...models.description import (
    CHECKPOINT,
    DIVISION,
    Description,
    check_file,
    description_file,
    read_description,
    write_description,
)
from ...models.preprocessing import Preprocessing
from ...models.pretrained import Pretrained, find_checkpoint, newest
from ...models.weights import (
    PARTS,
    WEIGHTS,
    build,
    described_model,
    not_finite,
    read_shapes,
    read_weights,
    save_weights,
)
from ...utils.files import umask
from ...utils.words import shortened
from ..data.image_options import ImageOptions
from ..data.tokenizers import load_tokenizer, save_tokenizer, vocab_size
from .devices import REMEDY, Diverged

__all__ = [
    "PARTS",
    "PREFIX",
    "STATE",
    "TOKENIZER",
    "Checkpoint",
    "Folders",
    "clear_remains",
    "damage",
    "find_checkpoint",
    "latest",
    "newest",
    "open_checkpoint",
    "read_description",
    "resumable",
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
        tokenizer, files = self.tokenizer, {}
        if tokenizer is not None:
            files[TOKENIZER] = lambda to: save_tokenizer(tokenizer, to)
        self.model.save_pretrained(folder, data, self.metrics, self.classes, files=files)


def resumable(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint from which a run continues, and what is wrong with newer ones.

    Args:
        folder: the folder "checkpoints" of a run.

    Returns:
        the whole checkpoint with the most steps, or None; and the damage of each other one that has
        as many steps or more.
    """
    found = [path for kind in ("last", "best") if (path := newest(folder, kind))]
    damaged = list[str]()
    for path in sorted(found, key=_step, reverse=True):
        reason = damage(path)
        if reason is None:
            return path, damaged
        damaged.append(reason)
    return None, damaged


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps, or the newest if none is whole."""
    found = [path for kind in ("last", "best") if (path := newest(folder, kind))]
    return resumable(folder)[0] or max(found, key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def damage(path: Path, state: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, or None if it is whole.

    Checkpoints of earlier versions have no SHA-256. Of these the lengths of the files are checked.

    Args:
        path: the folder of the checkpoint.
        state: whether a run must be able to continue from it; otherwise it is enough if the model
            can be loaded.
    """
    try:
        description = read_description(path)
        shapes = read_shapes(path)
        if not shapes:
            return f"{path}: has no weights"
        files = set(description.files) | ({STATE} if state else set())
        for name in files if state else files - {STATE}:
            check_file(path, name, description)
        if (path / PARTS).is_dir():
            parts = read_description(path / PARTS)
            for name in parts.files:
                check_file(path / PARTS, name, parts)
        if state and not zipfile.is_zipfile(path / STATE):
            return f"{path / STATE}: is not whole"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Load the model of a checkpoint.

    Args:
        path: the folder of a checkpoint, or that of a run, which stands for its best checkpoint.

    Raises:
        ValueError: no checkpoint, a file that was changed or damaged, weights that are not finite
            or do not fit the model (the message names them), or a tokenizer that is not the one
            of the training. If another checkpoint of the run is whole, the message names it.
        OSError: a file that cannot be read.
    """
    path = find_checkpoint(path)
    try:
        return _open(path)
    except ValueError as error:
        others = [newest(path.parent, kind) for kind in ("last", "best")]
        for other in others:
            if other is not None and other != path and damage(other, state=False) is None:
                raise ValueError(f"{error}; {other} is whole") from None
        raise


def _open(path: Path) -> Checkpoint:
    description, source = read_description(path), description_file(path)
    model = build(lambda: described_model(description, source), description.options, path)
    weights = read_weights(path, description)
    if wrong := not_finite(weights):
        raise ValueError(f"{path}: the weights {shortened(wrong)} have values that are not finite")
    model.load_state_dict(weights)
    if isinstance(model, Pretrained):
        model.preprocessing = _preprocessing(description, source, model)
    tokenizer = None
    if (path / TOKENIZER).exists() or TOKENIZER in description.files:
        check_file(path, TOKENIZER, description)
        tokenizer = load_tokenizer(path / TOKENIZER)
        rows = getattr(model.config, "vocab_size", None)
        if rows != vocab_size(tokenizer):
            raise ValueError(
                f"{path / TOKENIZER}: has {vocab_size(tokenizer)} tokens, but the model {rows}; "
                "want the tokenizer of the training"
            )
    return Checkpoint(
        path=path,
        model=model.eval(),
        config=description.config or {},
        step=description.step,
        classes=description.classes,
        tokenizer=tokenizer,
        metrics=description.metrics,
    )


def _preprocessing(
    description: Description, source: Path, model: Pretrained
) -> Preprocessing | None:
    """The preprocessing in a description.

    Older ones do not have it. It then follows from the options of the data, if they fit the model;
    a model can be loaded without it.
    """
    entry, classes = description.preprocessing, description.classes
    content: dict[str, Any] = {"preprocessing": entry, "classes": classes}
    if entry is not None:
        return Preprocessing.of_file(content, source, model.config)
    try:
        options = ImageOptions.model_validate((description.config or {}).get("data"))
        content["preprocessing"] = options.preprocessing().entry()
        return Preprocessing.of_file(content, source, model.config)
    except ValueError:
        return None


class Folders(CheckpointIO):
    """Writes and reads the checkpoints of Lightning as the folders that are described above.

    Args:
        description: that of the checkpoints, without the step, the metrics and the files.
        tokenizer: the tokenizer of a language model.
    """

    def __init__(self, description: Description, tokenizer: Tokenizer | None):
        self.description, self.tokenizer = description, tokenizer
        self.metrics: dict[str, float] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        state = dict(checkpoint)
        weights = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in state.pop("state_dict").items()
            if name.startswith(PREFIX)
        }
        if wrong := not_finite(weights):
            step = state["global_step"]
            raise Diverged(f"weights: {shortened(wrong)} are not finite at step {step}; {REMEDY}")
        with whole_folder(path) as folder:
            save_weights(weights, folder / WEIGHTS)
            self._rest(state, folder)

    def _rest(self, state: dict[str, Any], folder: Path) -> None:
        """Write everything except the weights."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder / TOKENIZER)
        torch.save(state, folder / STATE)
        description = replace(self.description, step=state["global_step"], metrics=self.metrics)
        names = (WEIGHTS, f"{PARTS}/{DIVISION}", TOKENIZER, STATE)
        files = [name for name in names if (folder / name).is_file()]
        write_description(folder, CHECKPOINT, description, files)

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
        description = read_description(path)
        check_file(path, STATE, description)
        try:
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            message = f"{path / STATE}: cannot be read as plain tensors ({reason})"
            raise ValueError(message) from None
        if (path / PARTS).is_dir():
            return state | {"parts": path / PARTS}
        weights = read_weights(path, description)
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
        OSError: the folder cannot be written, also if torch raises another class.
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
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
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
