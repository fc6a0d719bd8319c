"""Saves models to folders and to the Hub, and loads them again.

A saved model is a folder with these files:

    <folder>/model.safetensors   the weights
            /config.json         the architecture and all its options, from which it is built, and
                                 the preprocessing of images and the names of the classes
            /README.md           the model card
            /preprocessor_config.json    with the preprocessing: names the class of transformers
                                 that applies it

A checkpoint of a training run, which has `checkpoint.json` instead of `config.json`, can be loaded
too. No file is unpickled. Saving and loading need safetensors, and the Hub needs huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .._version import __version__
from ..utils.files import write_whole
from ..utils.words import shortened
from .card import model_card
from .preprocessing import PROCESSOR, PROCESSOR_FILE, Preprocessing, file_entries
from .registry import create_model, current_options, families

__all__ = [
    "ABOUT",
    "CONFIG",
    "FORMAT",
    "PARTS",
    "WEIGHTS",
    "Pretrained",
    "find_checkpoint",
    "load_weights",
    "misfits",
    "newest",
    "read_about",
    "read_weights",
]

P = TypeVar("P", bound="Pretrained")

WEIGHTS, CONFIG, CARD, ABOUT = "model.safetensors", "config.json", "README.md", "checkpoint.json"
PARTS = "parts"  # replaces WEIGHTS in a checkpoint whose tables were divided over processes
FORMAT = "translution-checkpoint-1"
KIND, VERSION = "translution-model-", 1  # the entry "format" of config.json
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
    ) -> None:
        """Save weights, configuration and model card to a folder.

        Each file is written completely before it replaces an earlier one.

        Args:
            folder: the folder, which is created if it does not exist. Other files in it stay, and
                so does a README.md that was not written by this library.
            data: a description of the training data, for the card.
            results: measured numbers by name, such as {"accuracy, test": 0.97}, for the card.
            classes: the names of the classes in the order of the logits, for config.json. The
                default is those of the preprocessing.
            preprocessing: how an image becomes the model's input, for config.json. The default is
                `self.preprocessing`.

        Raises:
            ValueError: the weights do not fit the configuration (because tables are divided over
                processes, or a part of the model was replaced), the number of class names is
                wrong, or the preprocessing is that of another model.
            OSError: the folder cannot be written.
            ImportError: safetensors is not installed.
        """
        if not isinstance(data, str | None):
            raise ValueError(f"data: got {type(data).__name__}, want text")
        numbers = list(results.values()) if isinstance(results, Mapping) else [results]
        if results is not None and not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"results: got {results!r}, want a dict of numbers by name")
        save_file = _needed("safetensors.torch").save_file
        weights = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        with torch.device("meta"):
            plain = type(self)(self.config)
        if wrong := misfits(plain, weights):
            raise ValueError(f"model: does not fit its configuration: {shortened(wrong, '; ')}")
        images = file_entries(preprocessing or self.preprocessing, classes, self.config)
        config = {
            "format": f"{KIND}{VERSION}", "translution": __version__,
            "model_type": MODEL_TYPES.get(self.task), "architecture": self.family,
            "options": dataclasses.asdict(self.config), **images,
        }  # fmt: skip
        card = model_card(plain, self.family, self.task, data, results, images.get("classes"))
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / WEIGHTS
        write_whole(path, lambda to: save_file(weights, to, metadata={"format": "pt"}))
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / CONFIG, lambda to: to.write_text(text, "utf-8"))
        if "preprocessing" in images:
            write_whole(folder / PROCESSOR_FILE, lambda to: to.write_text(PROCESSOR, "utf-8"))
        path = folder / CARD
        if not path.exists() or MARK in path.read_text("utf-8", errors="replace"):
            write_whole(path, lambda to: to.write_text(card + f"\n{MARK}\n", "utf-8"))

    @classmethod
    def from_pretrained(cls: type[P], source: Path | str, **hub: Any) -> P:
        """Load a model from a folder or from the Hub.

        Args:
            source: a folder that `save_pretrained` wrote; the folder of a training run, of which
                the best checkpoint is loaded, or the last if there is no best one; the folder of a
                checkpoint; or "owner/name" on the Hub. A folder of that name takes precedence over
                the Hub.
            hub: revision, token, cache_dir, force_download, local_files_only, as in
                `huggingface_hub.snapshot_download`.

        Returns:
            the model in evaluation mode on the CPU, in the dtype in which it was saved.

        Raises:
            ValueError: there is no model, its architecture or format is unknown, its class is
                another one, or its weights do not fit (the message names them).
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
        if not (folder / CONFIG).is_file():
            folder = find_checkpoint(folder)
        model = cls._from_config(folder)
        weights = read_weights(folder)
        load_weights(model, weights, folder / WEIGHTS)
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
        hub = _needed("huggingface_hub")
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
    def _from_config(cls: type[P], folder: Path) -> P:
        """The model that a folder describes, with newly initialised weights."""
        if (folder / CONFIG).is_file():
            source, about = folder / CONFIG, read_config(folder)
            name, options = about["architecture"], about["options"]
            # JSON has no tuples
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        else:
            source, about = folder / ABOUT, read_about(folder)
            name, options = about["model"]["name"], about["model"]["options"]
        try:
            model = create_model(name, **current_options(name, options, saved=True))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name!r}: {error}") from None
        if not isinstance(model, cls) and issubclass(cls, type(model)):
            model = cls(model.config)
        if not isinstance(model, cls):
            raise ValueError(f"{source}: is a {type(model).__name__}, want a {cls.__name__}")
        model.preprocessing = Preprocessing.of_file(about, source, model.config)
        return model


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        ValueError: the file was not written by this library, or by a newer version of it.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        match = re.fullmatch(rf"{KIND}(\d+)", str(config["format"]))
        architecture, options = config["architecture"], config["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a translution model ({error!r})") from None
    if match is None or int(match[1]) > VERSION:
        raise ValueError(
            f"{path}: format {config['format']!r}, want {KIND}{VERSION}; a newer version of "
            "translution may be able to read it"
        )
    if not isinstance(architecture, str) or not isinstance(options, dict):
        raise ValueError(f"{path}: want an architecture's name, and a dict of options")
    return config


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
    if (path / ABOUT).is_file():
        return path
    folder = path / "checkpoints"
    checkpoint = newest(folder, "best") or newest(folder)
    if checkpoint is None:
        have = "is not a folder" if not path.is_dir() else "holds no checkpoint"
        if (path / CONFIG).is_file():
            have = "holds a saved model, but no checkpoint"
        elif (path / WEIGHTS).is_file():
            have = f"holds {WEIGHTS}, but neither {CONFIG} nor {ABOUT} beside it"
        raise ValueError(f"checkpoint: {path} {have}; want the folder of a run or of a checkpoint")
    return checkpoint


def read_about(path: Path) -> dict[str, Any]:
    """Read the checkpoint.json of a folder.

    Raises:
        ValueError: the file does not describe a checkpoint, or has another format.
    """
    try:
        about = json.loads((path / ABOUT).read_text("utf-8"))
        format_name = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / ABOUT}: not a checkpoint's description ({error})") from None
    if format_name != FORMAT:
        raise ValueError(f"{path / ABOUT}: format {format_name!r}, want {FORMAT!r}")
    return about


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the model.safetensors of a folder: tensors by name, on the CPU.

    Raises:
        ValueError: the file is missing or incomplete.
    """
    broken, files = _needed("safetensors").SafetensorError, _needed("safetensors.torch")
    try:
        return files.load_file(path / WEIGHTS)
    except FileNotFoundError:
        where = "; `translution.apps.training.checkpoints.open_checkpoint` reads tables in parts"
        parts = where if (path / PARTS).is_dir() else ""
        raise ValueError(f"{path / WEIGHTS}: is missing{parts}") from None
    except broken as error:
        raise ValueError(f"{path / WEIGHTS}: not a whole safetensors file ({error})") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Load weights into a model, all or none of them.

    Args:
        model: the model.
        weights: tensors by their names in the model's state_dict.
        source: the file they come from, for the error message.

    Raises:
        ValueError: weights are missing, unexpected, or of another shape (the message names them).
    """
    if wrong := misfits(model, weights):
        raise ValueError(f"{source}: does not fit the model: {shortened(wrong, '; ')}")
    model.load_state_dict(dict(weights))


def misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """One line for each weight that is missing, unexpected, or of another shape."""
    have = model.state_dict()
    wrong = [f"{name} is missing" for name in have if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in have]
    return wrong + [
        f"{name} has shape {tuple(weights[name].shape)}, want {tuple(have[name].shape)}"
        for name in have
        if name in weights and weights[name].shape != have[name].shape
    ]


def _download(name: str, options: dict[str, Any]) -> Path:
    """Download a repository of the Hub, and return the folder of the local copy."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"source: {name} is not a folder, want one, or owner/name on the Hub")
    hub, errors = _needed("huggingface_hub"), _needed("huggingface_hub.errors")
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


def _needed(name: str) -> Any:
    """Import a module of an optional package, with an error that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(
            f"{package} is not installed; pip install 'translution[hub]'", name=package
        ) from None
