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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from .. import __version__, parallel
from ..data.tokenizers import load_tokenizer, save_tokenizer
from ..files import umask
from ..models import create_model

__all__ = [
    "PARTS",
    "PREFIX",
    "Checkpoint",
    "Folders",
    "clear_remains",
    "find_checkpoint",
    "latest",
    "load_weights",
    "open_checkpoint",
    "read_about",
]

FORMAT = "translution-checkpoint-1"
WEIGHTS, ABOUT, STATE, TOKENIZER, PARTS = (
    "model.safetensors", "checkpoint.json", "state.pt", "tokenizer.json", "parts"
)  # fmt: skip
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


def newest(folder: Path, kind: str = "last") -> Path | None:
    """The checkpoint of this kind ("last" or "best") with the most steps."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{kind}-(\d+)", path.name))
    ]
    return max(found)[1] if found else None


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, from which a run goes on."""
    return max(
        (path for kind in ("best", "last") if (path := newest(folder, kind))),
        key=lambda path: int(path.name.rpartition("-")[2]),
        default=None,
    )


def find_checkpoint(path: Path | str) -> Path:
    """A checkpoint's folder itself, or the best of a run's (without a best one, the last).

    Raises:
        ValueError: there is none.
    """
    path = Path(path).expanduser()
    if (path / ABOUT).is_file():
        return path
    folder = path / "checkpoints"
    found = newest(folder, "best") or newest(folder)
    if found is None:
        have = "is no folder" if not path.is_dir() else "holds no checkpoint"
        raise ValueError(f"checkpoint: {path} {have}; want a run's folder or a checkpoint's")
    return found


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


def read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / ABOUT).read_text("utf-8"))
        found = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / ABOUT}: not a checkpoint's description ({error})") from None
    if found != FORMAT:
        raise ValueError(f"{path / ABOUT}: format {found!r}, want {FORMAT!r}")
    return about


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS}: not a whole safetensors file ({error})") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Put the weights into the model, all of them.

    Raises:
        ValueError: naming those that are missing, unexpected, or of another shape.
    """
    have = model.state_dict()
    wrong = [f"{name} is missing" for name in have if name not in weights]
    wrong += [f"{name} is not the model's" for name in weights if name not in have]
    wrong += [
        f"{name} has shape {tuple(weights[name].shape)}, want {tuple(have[name].shape)}"
        for name in have
        if name in weights and weights[name].shape != have[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source}: does not fit the model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(dict(weights))


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

    def load_checkpoint(  # type: ignore[override]
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
