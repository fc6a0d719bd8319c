"""Models in folders and on the Hub: saving them, and loading them again.

    <folder>/model.safetensors   the weights
            /config.json         the architecture and all its options: alone enough for the model
            /README.md           the model card

A checkpoint of a training run (with `checkpoint.json` instead of `config.json`) is read, too.
Nothing is unpickled. Saving and loading need safetensors, and the Hub needs huggingface_hub.
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
from ..utils.words import some
from .card import model_card
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
PARTS = "parts"  # of a checkpoint, instead of WEIGHTS, where several devices divided the tables
FORMAT = "translution-checkpoint-1"
KIND, VERSION = "translution-model-", 1  # of config.json
# In a card that was written here; one without it is somebody's own, and kept.
MARK = "<!-- Written by translution, and replaced at the next save unless this line goes. -->"


class Pretrained(nn.Module):
    """A model that can be saved, shared and loaded.

    Its `config` is a dataclass of one of the registered families. `ViT.from_pretrained` loads a ViT
    only, and `Pretrained.from_pretrained` a model of any family.
    """

    config: Any
    task: ClassVar[str] = "image-classification"
    """The Hub's name for what the model does."""

    def save_pretrained(
        self,
        folder: Path | str,
        data: str | None = None,
        results: Mapping[str, float] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Write weights, configuration and model card; each file is there whole or not at all.

        Args:
            folder: made where it is missing. Other files in it stay, as does a README.md that was
                not written here.
            data: what the model was trained on, for the card.
            results: measured on what, such as {"accuracy, test": 0.97}, for the card.
            classes: names, in the order of the logits; kept in config.json.

        Raises:
            ValueError: weights that are not those of the configuration (tables divided over
                processes, a part replaced), or another number of classes.
            OSError: a folder that cannot be written.
            ImportError: safetensors is missing; it says how to install it.
        """
        if not isinstance(data, str | None):
            raise ValueError(f"data: got {type(data).__name__}, want text")
        numbers = list(results.values()) if isinstance(results, Mapping) else [results]
        if results is not None and not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"results: got {results!r}, want numbers by what was measured")
        save_file = _needed("safetensors.torch").save_file
        weights = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        with torch.device("meta"):
            plain = type(self)(self.config)
        if wrong := misfits(plain, weights):
            raise ValueError(f"model: is not what its configuration makes: {some(wrong, '; ')}")
        named = {} if classes is None else {"classes": self._classes(classes)}
        config = {
            "format": f"{KIND}{VERSION}", "translution": __version__, "architecture": self.family,
            "options": dataclasses.asdict(self.config), **named,
        }  # fmt: skip
        card = model_card(plain, self.family, self.task, data, results, classes)
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / WEIGHTS
        write_whole(path, lambda to: save_file(weights, to, metadata={"format": "pt"}))
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / CONFIG, lambda to: to.write_text(text, "utf-8"))
        path = folder / CARD
        if not path.exists() or MARK in path.read_text("utf-8", errors="replace"):
            write_whole(path, lambda to: to.write_text(card + f"\n{MARK}\n", "utf-8"))

    @classmethod
    def from_pretrained(cls: type[P], source: Path | str, **hub: Any) -> P:
        """The model of a folder or of the Hub, in eval mode, on the CPU, in the dtype it was saved
        in.

        Args:
            source: a folder that `save_pretrained` wrote, a training run's (its best checkpoint, or
                else its last), a checkpoint's, or "owner/name" on the Hub. A folder comes first.
            hub: revision, token, cache_dir, force_download, local_files_only, as in
                `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: nothing there, an unknown architecture or a newer format, a model of another
                class, or weights that do not fit, by name.
            OSError: a file, or the Hub, that cannot be read.
            ImportError: safetensors, or for the Hub huggingface_hub, is missing.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source), hub)
        elif hub:
            raise ValueError(
                f"{min(hub)}: {source} is a folder, want no arguments of the Hub with it (the "
                "model's own options are in its configuration)"
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
        **commit: Any,
    ) -> str:
        """Save to a repository on the Hub, in one commit; it is made where it is missing.

        Args:
            name: "owner/name".
            data, results, classes: as in `save_pretrained`.
            private, token: as in `huggingface_hub.HfApi.create_repo`.
            commit: commit_message, revision (a branch), create_pr and other arguments of
                `huggingface_hub.HfApi.upload_folder`.

        Returns:
            the commit's address.
        """
        hub = _needed("huggingface_hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, data, results, classes)
            api = hub.HfApi(token=token, library_name="translution")
            repo = api.create_repo(name, private=private, exist_ok=True).repo_id
            commit = {"commit_message": "A model of translution's"} | commit
            return str(api.upload_folder(repo_id=repo, folder_path=folder, **commit))

    @property
    def family(self) -> str:
        """The name of its family in the registry."""
        for name, kind in families().items():
            if type(self.config) is kind:
                return name
        raise ValueError(
            f"config: got {type(self.config).__name__}, want one of {list(families())}"
        )

    def _classes(self, names: Sequence[str]) -> list[str]:
        want = getattr(self.config, "num_classes", 0)
        if len(names) != want:
            raise ValueError(f"classes: got {len(names)}, but the model has {want}")
        return list(names)

    @classmethod
    def _from_config(cls: type[P], folder: Path) -> P:
        """The model that a folder describes, with new weights."""
        if (folder / CONFIG).is_file():
            source, config = folder / CONFIG, read_config(folder)
            name, options = config["architecture"], config["options"]
            # JSON has no tuples
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        else:
            source, about = folder / ABOUT, read_about(folder)["model"]
            name, options = about["name"], about["options"]
        try:
            model = create_model(name, **current_options(name, options, warn=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name!r}: {error}") from None
        if not isinstance(model, cls) and issubclass(cls, type(model)):
            model = cls(model.config)
        if not isinstance(model, cls):
            raise ValueError(f"{source}: is a {type(model).__name__}, want a {cls.__name__}")
        return model


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        ValueError: another program's, or a newer one.
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
            f"{path}: format {config['format']!r}, want {KIND}{VERSION}; a newer translution may "
            "read it"
        )
    if not isinstance(architecture, str) or not isinstance(options, dict):
        raise ValueError(f"{path}: want an architecture's name, and options by name")
    return config


def newest(folder: Path, kind: str = "last") -> Path | None:
    """The checkpoint of this kind ("last" or "best") with the most steps."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{kind}-(\d+)", path.name))
    ]
    return max(found)[1] if found else None


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
        if (path / CONFIG).is_file():
            have = "holds a saved model, but no checkpoint"
        elif (path / WEIGHTS).is_file():
            have = f"has {WEIGHTS}, but neither {CONFIG} nor {ABOUT} beside it"
        raise ValueError(f"checkpoint: {path} {have}; want a run's folder or a checkpoint's")
    return found


def read_about(path: Path) -> dict[str, Any]:
    """The checkpoint.json of a folder.

    Raises:
        ValueError: it is none, or of another format.
    """
    try:
        about = json.loads((path / ABOUT).read_text("utf-8"))
        found = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / ABOUT}: not a checkpoint's description ({error})") from None
    if found != FORMAT:
        raise ValueError(f"{path / ABOUT}: format {found!r}, want {FORMAT!r}")
    return about


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model.safetensors of a folder.

    Raises:
        ValueError: it is missing, or not whole.
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
    """Put the weights into the model, all of them.

    Raises:
        ValueError: naming those that are missing, unexpected, or of another shape.
    """
    if wrong := misfits(model, weights):
        raise ValueError(f"{source}: does not fit the model: {some(wrong, '; ')}")
    model.load_state_dict(dict(weights))


def misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps the weights from being the model's, a line each."""
    have = model.state_dict()
    wrong = [f"{name} is missing" for name in have if name not in weights]
    wrong += [f"{name} is not the model's" for name in weights if name not in have]
    return wrong + [
        f"{name} has shape {tuple(weights[name].shape)}, want {tuple(have[name].shape)}"
        for name in have
        if name in weights and weights[name].shape != have[name].shape
    ]


def _download(name: str, options: dict[str, Any]) -> Path:
    """A copy of a repository of the Hub."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"source: {name} is no folder, want one, or owner/name on the Hub")
    hub, errors = _needed("huggingface_hub"), _needed("huggingface_hub.errors")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG], **options))
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
    ) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"source: {name} is no folder, nor had from the Hub: {said}") from None


def _needed(name: str) -> Any:
    """A module of the extra packages that files and the Hub need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(
            f"{package} is not installed; pip install 'translution[hub]'", name=package
        ) from None
