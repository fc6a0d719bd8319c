"""Checkpoints: folders that are there whole or not at all.

    <run>/checkpoints/last-000500/model.safetensors   the weights (the averaged ones, with `ema`)
                                 /checkpoint.json     the model's name and options, step, metrics
                                 /tokenizer.json      of a language model
                                 /parts               instead of model.safetensors, where several
                                                      devices divide the tables (`parallel.save`)
                                 /state.pt            what only a resumed run needs

A folder is written under another name and then renamed, so a run that is killed at any moment
leaves loadable ones. Nothing is unpickled but tensors and plain values.
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
from ...utils.files import umask
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
PREFIX = "model."  # of the model within the training module


@dataclass
class Checkpoint:
    """A model as it was saved, in eval mode.

    config: of the run, as plain values. classes: names, of a classifier. tokenizer: of a language
    model. metrics: the last that were measured before it was saved.
    """

    path: Path
    model: nn.Module
    config: dict[str, Any]
    step: int
    classes: list[str] | None
    tokenizer: Tokenizer | None
    metrics: dict[str, float]

    def export(self, folder: Path | str) -> None:
        """Write a folder to share, as `save_pretrained` does, with a card that tells the data, the
        training and the metrics; with the names of classes, or the tokenizer.

        Raises:
            ValueError: a model that is not of this library.
            OSError: a folder that cannot be written.
        """
        if not isinstance(self.model, Pretrained):
            raise ValueError(f"model: got {type(self.model).__name__}, want one of this library")
        told = {part: self.config[part] for part in ("data", "train")}
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
        data = f"{self.step:,} steps of\n\n```yaml\n{text}```"
        self.model.save_pretrained(folder, data, self.metrics, self.classes)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(folder).expanduser() / TOKENIZER)


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, from which a run goes on; one whose state is cut (by a
    copy, as none is saved so) only where there is no other."""
    return max(
        (path for kind in ("last", "best") if (path := newest(folder, kind))),
        key=lambda path: (is_whole(path), int(path.name.rpartition("-")[2])),
        default=None,
    )


def is_whole(path: Path) -> bool:
    """Whether a run can go on from this checkpoint, as far as its state's last bytes tell."""
    return zipfile.is_zipfile(path / STATE)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The model of a run's folder (its best checkpoint) or of one checkpoint's folder.

    Raises:
        ValueError: no checkpoint, or one that does not fit its model, naming what does not.
    """
    path = find_checkpoint(path)
    about = read_about(path)
    model = create_model(about["model"]["name"], **about["model"]["options"])
    if (path / PARTS).is_dir():
        parallel.load(model, path / PARTS)
    else:
        load_weights(model, read_weights(path), path / WEIGHTS)
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


class Folders(CheckpointIO):
    """Lightning's checkpoints as the folders above.

    about: what `checkpoint.json` says beside the step and the metrics.
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
        """All but the weights."""
        about = {"format": FORMAT, "translution": __version__, **self.about}
        about |= {"step": state["global_step"], "metrics": self.metrics}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (folder / ABOUT).write_text(text, "utf-8")
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder / TOKENIZER)
        torch.save(state, folder / STATE)

    @contextmanager
    def parts(self, checkpoint: dict[str, Any], path: Path, strategy: Any) -> Iterator[Path]:
        """A folder that all devices write parts to, and then a checkpoint."""
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
            said = str(error).splitlines()[0]
            raise ValueError(f"{path / STATE}: cannot be read as plain tensors ({said})") from None
        if (path / PARTS).is_dir():
            return state | {"parts": path / PARTS}
        weights = read_weights(path)
        return state | {"state_dict": {PREFIX + name: value for name, value in weights.items()}}

    def remove_checkpoint(self, path: Any) -> None:
        # under another name first: a folder half removed must not look like a checkpoint
        gone = Path(tempfile.mkdtemp(dir=Path(path).parent, prefix=".old-"))
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end, or leaves no trace.

    Raises:
        OSError: it cannot be written, also where torch or safetensors say so in other ways.
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
        said = str(error).splitlines()[0]
        raise OSError(
            f"{path}: cannot be written, the earlier checkpoints are whole: {said}"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_remains(folder: Path) -> None:
    """Remove what a killed run left half written, and all but the newest of each kind."""
    if not folder.is_dir():
        return
    keep = {newest(folder, "last"), newest(folder, "best")}
    for path in folder.iterdir():
        half = path.name.startswith((".new-", ".old-"))
        if half or (re.fullmatch(r"(last|best)-\d+", path.name) and path not in keep):
            shutil.rmtree(path, ignore_errors=True)
