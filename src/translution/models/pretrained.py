"""Saves models to folders and to the Hub, and loads them again.

A saved model is a folder with these files:

    <folder>/model.safetensors   the weights
            /config.json         the description: the architecture and all its options, the
                                 preprocessing of images and the names of the classes
            /README.md           the model card
            /preprocessor_config.json    with the preprocessing: names the class of transformers
                                 that applies it

The checkpoint of a training run, which has `checkpoint.json` instead of `config.json`, and a folder
with divided tables can be loaded too. No file is unpickled. Saving and loading need safetensors,
and the Hub needs huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..utils.files import whole_files
from ..utils.words import shortened
from .card import model_card
from .description import (
    CHECKPOINT,
    CONFIG,
    DIVISION,
    Description,
    description_file,
    read_description,
    write_description,
)
from .preprocessing import PROCESSOR, PROCESSOR_FILE, Preprocessing, file_entries
from .registry import families
from .weights import (
    WEIGHTS,
    build,
    described_model,
    misfits,
    needed,
    read_weights,
    same_parameters,
    save_weights,
    tie,
)

__all__ = ["CARD", "Pretrained", "find_checkpoint", "newest"]

P = TypeVar("P", bound="Pretrained")

CARD = "README.md"
# what transformers calls the models of each task, so that its Auto classes find a folder's
MODEL_TYPES = {"image-classification": "translution-image", "text-generation": "translution-gpt"}
# A card with this line was written by this library and may be replaced; others are kept.
MARK = "<!-- Written by translution, and replaced at the next save unless this line goes. -->"


class Pretrained(nn.Module):
    """The base class of models that can be saved, shared on the Hub and loaded.

    `ViT.from_pretrained` loads a ViT only, and `Pretrained.from_pretrained` a model of any family.

    Attributes:
        config: the model's options, a dataclass of one of the registered families.
        task: the Hub's name for the model's task.
        preprocessing: how an image becomes the model's input, or None if that is not known.
    """

    config: Any
    preprocessing: Preprocessing | None = None
    task: ClassVar[str] = "image-classification"

    def save_pretrained(
        self,
        folder: Path | str,
        data: str | None = None,
        results: Mapping[str, float] | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        files: Mapping[str, Callable[[Path], object]] | None = None,
    ) -> None:
        """Save weights, configuration and model card to a folder.

        All files are written completely before the first of them replaces an earlier one.
        Parameters that are one and the same in the model are so again in the loaded one.

        Args:
            folder: the folder, which is created if it does not exist. Other files in it stay, and
                so does a README.md that was not written by this library.
            data: a description of the training data, for the card.
            results: measured numbers by name, such as {"accuracy, test": 0.97}, for the card.
            classes: the names of the classes in the order of the logits, for config.json. The
                default is those of the preprocessing.
            preprocessing: how an image becomes the model's input, for config.json. The default is
                `self.preprocessing`.
            files: further files, such as a tokenizer: for each name a function that writes the file
                at a path.

        Raises:
            ValueError: the weights do not fit the configuration (because tables are divided over
                processes, or a part of the model was replaced), weights are not finite, the number
                of class names is wrong, or the preprocessing is that of another model.
            OSError: the folder cannot be written.
            ImportError: safetensors is not installed.
        """
        if not isinstance(data, str | None):
            raise ValueError(f"data: got {type(data).__name__}, want text")
        numbers = list(results.values()) if isinstance(results, Mapping) else [results]
        if results is not None and not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"results: got {results!r}, want a dict of numbers by name")
        needed("safetensors")
        weights = self.state_dict()
        with torch.device("meta"):
            plain = type(self)(self.config)
        if wrong := misfits(plain, {name: tensor.shape for name, tensor in weights.items()}):
            raise ValueError(f"model: does not fit its configuration: {shortened(wrong, '; ')}")
        images = file_entries(preprocessing or self.preprocessing, classes, self.config)
        description = Description(
            self.family,
            dataclasses.asdict(self.config),
            **images,
            model_type=MODEL_TYPES.get(self.task),
            tied=same_parameters(self),
        )
        tie(plain, description.tied, Path(CONFIG))
        card = model_card(plain, self.family, self.task, data, results, description.classes)
        folder = Path(folder).expanduser()
        with whole_files(folder) as new:
            save_weights(weights, new / WEIGHTS)
            for name, write in (files or {}).items():
                write(new / name)
            write_description(new, CONFIG, description, [WEIGHTS, *(files or {})])
            if description.preprocessing is not None:
                (new / PROCESSOR_FILE).write_text(PROCESSOR, "utf-8")
            path = folder / CARD
            if not path.exists() or MARK in path.read_text("utf-8", errors="replace"):
                (new / CARD).write_text(card + f"\n{MARK}\n", "utf-8")

    @classmethod
    def from_pretrained(cls: type[P], source: Path | str, **hub: Any) -> P:
        """Load a model from a folder or from the Hub.

        Args:
            source: a folder that `save_pretrained` wrote; the folder of a training run, of which
                the best checkpoint is loaded, or the last if there is no best one; the folder of a
                checkpoint, or of divided tables; or "owner/name" on the Hub. A folder of that name
                takes precedence over the Hub.
            hub: revision, token, cache_dir, force_download, local_files_only, as in
                `huggingface_hub.snapshot_download`.

        Returns:
            the model in evaluation mode on the CPU, in the dtype in which it was saved.

        Raises:
            ValueError: there is no model, its architecture or format is unknown, its class is
                another one, a file was changed or damaged, or its weights do not fit (the message
                names them).
            OSError: a file or the Hub cannot be read.
            ImportError: safetensors is not installed, or huggingface_hub for the Hub.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), hub)
        elif hub:
            raise ValueError(
                f"{min(hub)}: {source} is a folder, which takes no arguments for the Hub (the "
                "model's options are in its configuration)"
            )
        if not any((folder / name).is_file() for name in (CONFIG, DIVISION)):
            folder = find_checkpoint(folder)
        description, source = read_description(folder), description_file(folder)
        model = build(
            lambda: cls._from_description(description, source), description.options, folder
        )
        weights = read_weights(folder, description)
        model.load_state_dict(weights)
        tie(model, description.tied, source)
        dtypes = {t.dtype for t in weights.values() if t.is_floating_point()}
        return (model.to(dtypes.pop()) if len(dtypes) == 1 else model).eval()

    def push_to_hub(
        self,
        name: str,
        data: str | None = None,
        results: Mapping[str, float] | None = None,
        classes: Sequence[str] | None = None,
        private: bool | None = None,
        token: str | None = None,
        preprocessing: Preprocessing | None = None,
        **commit: Any,
    ) -> str:
        """Save the model to a repository on the Hub, in one commit.

        The repository is created if it does not exist.

        Args:
            name: "owner/name" of the repository.
            data, results, classes, preprocessing: as in `save_pretrained`.
            private, token: as in `huggingface_hub.HfApi.create_repo`.
            commit: commit_message, revision (a branch), create_pr and other arguments of
                `huggingface_hub.HfApi.upload_folder`.

        Returns:
            the URL of the commit.

        Raises:
            ValueError: as in `save_pretrained`.
            ImportError: huggingface_hub or safetensors is not installed.
        """
        hub = needed("huggingface_hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, data, results, classes, preprocessing)
            api = hub.HfApi(token=token, library_name="translution")
            repo = api.create_repo(name, private=private, exist_ok=True).repo_id
            commit = {"commit_message": "A model made with translution"} | commit
            return str(api.upload_folder(repo_id=repo, folder_path=folder, **commit))

    @property
    def family(self) -> str:
        """The name of the model's family in the registry."""
        for name, kind in families().items():
            if type(self.config) is kind:
                return name
        raise ValueError(
            f"config: got {type(self.config).__name__}, want one of {list(families())}"
        )

    @classmethod
    def _from_description(cls: type[P], description: Description, source: Path) -> P:
        """The model that a folder describes, with new weights."""
        model = described_model(description, source)
        if not isinstance(model, cls) and issubclass(cls, type(model)):
            model = cls(model.config)
        if not isinstance(model, cls):
            raise ValueError(f"{source}: is a {type(model).__name__}, want a {cls.__name__}")
        content = {"preprocessing": description.preprocessing, "classes": description.classes}
        model.preprocessing = Preprocessing.of_file(content, source, model.config)
        return model


def newest(folder: Path, kind: str = "last") -> Path | None:
    """The checkpoint in a folder with the most steps, of the kind "last" or "best"; None if none.

    Args:
        folder: the folder "checkpoints" of a run.
        kind: "last" or "best".
    """
    checkpoints = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{kind}-(\d+)", path.name))
    ]
    return max(checkpoints)[1] if checkpoints else None


def find_checkpoint(path: Path | str) -> Path:
    """The folder of a checkpoint: `path` itself, or the best checkpoint of a run.

    Args:
        path: the folder of a checkpoint or of a run. If a run has no best checkpoint, the last one
            is returned.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = Path(path).expanduser()
    if (path / CHECKPOINT).is_file():
        return path
    folder = path / "checkpoints"
    checkpoint = newest(folder, "best") or newest(folder)
    if checkpoint is None:
        have = "is not a folder" if not path.is_dir() else "holds no checkpoint"
        if (path / CONFIG).is_file():
            have = "holds a saved model, but no checkpoint"
        elif (path / WEIGHTS).is_file():
            have = f"holds {WEIGHTS}, but neither {CONFIG} nor {CHECKPOINT} beside it"
        raise ValueError(f"checkpoint: {path} {have}; want the folder of a run or of a checkpoint")
    return checkpoint


def _download(name: str, options: dict[str, Any]) -> Path:
    """Download a repository of the Hub, and return the folder of the local copy."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"source: {name} is not a folder, want one, or owner/name on the Hub")
    hub, errors = needed("huggingface_hub"), needed("huggingface_hub.errors")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG], **options))
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"source: {name} is not a folder, and could not be downloaded from the Hub: {reason}"
        ) from None
