"""The models that the page shows: where they are read from, what they answer, where they attend.

The trained models that the repository holds in `demo-weights/` are ordinary checkpoints, stored in
float16 (`demo/train.py` makes them). The installed package does not contain them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...models import GPT, ViT, attention_weights
from ...models.description import CHECKPOINT
from ...models.preprocessing import Preprocessing
from ...models.pretrained import Pretrained
from ...utils.words import MIXER_TITLES
from ..config import parse
from ..data.digits import place
from ..data.images import ImageOptions
from ..data.text import TextOptions
from ..training.checkpoints import Checkpoint, open_checkpoint
from ..training.config import Config

__all__ = [
    "Answer", "DigitModel", "Models", "TextAnswer", "TextModel", "Token", "normalised",
    "open_models", "weights_folder",
]  # fmt: skip

WEIGHTS_FOLDER = "demo-weights"
MAKE_DIGITS = "python -m translution.apps.demo.train --only digits"
TOP = 10  # the number of tokens that are shown
# byte-level tokenizers name bytes by characters: printable ones by themselves, others from 256 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}

Map = Tensor | None  # weights [heads, queries, keys] of a layer; None: it has none


class Answer(NamedTuple):
    """Of one image: probabilities by class, and the attention of each layer."""

    probabilities: list[float]
    maps: list[Map]


class Token(NamedTuple):
    """A token as text, and the character of the prompt that it begins at."""

    text: str
    start: int


class TextAnswer(NamedTuple):
    """Of one prompt: the tokens that the model saw, the likeliest next ones with their
    probabilities, the probabilities of all, the attention of each layer, and how many tokens stood
    before what the model reads."""

    tokens: list[Token]
    top: list[tuple[str, float]]
    probabilities: Tensor
    maps: list[Map]
    unread: int


@dataclass(frozen=True, eq=False)
class DigitModel:
    """A classifier of scikit-learn's digits on a canvas. patch: a patch's side in pixels, 0
    without patches. prefix: tokens before the patches."""

    name: str
    mixer: str
    model: nn.Module
    preprocessing: Preprocessing
    canvas: int
    moved: bool
    metrics: dict[str, float]

    @property
    def patch(self) -> int:
        return self.model.config.patch_size[0] if isinstance(self.model, ViT) else 0

    def patch_at(self, row: float, column: float) -> int:
        """The patch, row-major, that has this pixel; 0 without patches."""
        side = self.patch or self.canvas
        return int(row // side) * (self.canvas // side) + int(column // side)

    @property
    def prefix(self) -> int:
        return self.model.prefix if isinstance(self.model, ViT) else 0

    @torch.inference_mode()
    def answer(self, digit: Tensor, row: int, column: int) -> Answer:
        """digit: [8, 8], values 0 to 1; its upper left pixel at (row, column) of the canvas."""
        image = place(digit[None], self.canvas, torch.tensor([[row, column]]))
        x = normalised(image, self.preprocessing)
        if isinstance(self.model, ViT):
            logits, weights = attention_weights(self.model, x)
        else:
            logits, weights = self.model(x), []
        return Answer(logits[0].softmax(-1).tolist(), _first(weights))

    @torch.inference_mode()
    def answers(self, digit: Tensor, places: Tensor) -> Tensor:
        """The class at each of the places [n, 2]: int64 [n]."""
        images = place(digit.expand(len(places), -1, -1), self.canvas, places)
        return self.model(normalised(images, self.preprocessing)).argmax(-1)


@dataclass(frozen=True, eq=False)
class TextModel:
    """A language model and its tokenizer."""

    name: str
    mixer: str
    model: GPT
    tokenizer: Tokenizer
    metrics: dict[str, float]

    @torch.inference_mode()
    def answer(self, prompt: str) -> TextAnswer | None:
        """What comes after the prompt, of which it sees the last context; None without a token."""
        encoded = self.tokenizer.encode(prompt)
        last = slice(-self.model.config.context, None)
        ids, offsets = encoded.ids[last], encoded.offsets[last]
        if not ids:
            return None
        logits, weights = attention_weights(self.model, torch.tensor([ids]))
        probabilities = logits[0, -1].float().softmax(-1)
        best = probabilities.topk(min(TOP, len(probabilities)))
        tokens = [Token(self.text(i), o[0]) for i, o in zip(ids, offsets, strict=True)]
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [(self.text(i), p) for i, p in found]
        return TextAnswer(tokens, top, probabilities, _first(weights), len(encoded.ids) - len(ids))

    def text(self, token: int) -> str:
        """A token's text; a special one's by its name; bytes of a part of a character as ⟨C3⟩."""
        text = self.tokenizer.decode([token], skip_special_tokens=True)
        if text and "\ufffd" not in text:
            return text
        name = self.tokenizer.id_to_token(token) or ""
        if not text or not all(symbol in BYTES for symbol in name):
            return name
        values = [BYTES[symbol] for symbol in name]
        return "".join(chr(b) if b < 128 else f"⟨{b:02X}⟩" for b in values)

    def continued(self, prompt: str, token: int) -> str:
        """The prompt with a token after it."""
        ids = self.tokenizer.encode(prompt).ids
        before, after = self.tokenizer.decode(ids), self.tokenizer.decode([*ids, token])
        return prompt + after[len(before) :] if after.startswith(before) else after


class Models(NamedTuple):
    """All that a page can show."""

    digits: list[DigitModel]
    text: list[TextModel]


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images [n, 1, h, w] with values 0 to 1, as the model with this preprocessing takes them."""
    values = preprocessing.mean, preprocessing.std
    mean, std = (torch.tensor(v)[:, None, None] for v in values)
    return (images - mean) / std


def _first(weights: list[Tensor | None]) -> list[Map]:
    """Of the one sample that there is."""
    return [None if w is None else w[0] for w in weights]


# -- opening -------------------------------------------------------------------------------------


def weights_folder() -> Path:
    """The folder of the demo's own models: `demo-weights`, which lies beside the sources in a
    checkout of the repository, and elsewhere in the current directory."""
    checkout = Path(__file__).parents[4] / WEIGHTS_FOLDER
    return checkout if checkout.is_dir() else Path(WEIGHTS_FOLDER)


def open_models(runs: Sequence[Path | str] = ()) -> Models:
    """Open the models of these runs or checkpoints; without any, those of `weights_folder`.

    A folder of several checkpoints, such as `demo-weights`, stands for all of them.

    Raises:
        ValueError: a run has no checkpoint or a model that the page cannot show, or no run is given
            and `weights_folder` does not exist.
    """
    models, paths = Models([], []), [Path(run).expanduser() for run in runs]
    if not paths and not (own := weights_folder()).is_dir():
        raise ValueError(
            f"RUN: got none, and the package has no trained models of its own; '{MAKE_DIGITS}' "
            f"trains some into {own}, and 'translution demo RUN' shows a run of 'translution train'"
        )
    for path in paths or [own]:
        several = _checkpoints_in(path)
        for one in several or [path]:
            model = _open(one, "" if several else path.resolve().name)
            (models.digits if isinstance(model, DigitModel) else models.text).append(model)  # type: ignore[arg-type]
    return models


def _checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints that lie directly in this folder, in the order of the page."""
    if not path.is_dir():
        return []
    found = (one for one in path.iterdir() if (one / CHECKPOINT).is_file())
    return sorted((one for one in found if not one.name.startswith(".")), key=_rank)


def _rank(path: Path) -> tuple[bool, int, str]:
    """Moved digits first, and mixers in the order of their titles: Translution is seen first."""
    mixer = path.name.rpartition("-")[2]
    order = list(MIXER_TITLES).index(mixer) if mixer in MIXER_TITLES else 99
    return "centred" in path.name, order, path.name


def _open(path: Path, name: str) -> DigitModel | TextModel:
    checkpoint: Checkpoint = open_checkpoint(path)
    # the model is made already, and a checkpoint's own imports are not executed
    config = parse(Config, checkpoint.config | {"imports": []}, str(path))
    data, model = config.data, checkpoint.model
    mixer = model.config.mixer if isinstance(model, ViT | GPT) else config.model.name
    title = MIXER_TITLES.get(mixer, mixer)
    name = f"{name} ({title})" if name else title
    if isinstance(data, TextOptions) and isinstance(model, GPT) and checkpoint.tokenizer:
        return TextModel(name, mixer, model, checkpoint.tokenizer, checkpoint.metrics)
    if isinstance(data, ImageOptions) and data.format == "digits" and data.channels == 1:
        canvas, preprocessing = data.canvas or 8, data.preprocessing()
        if isinstance(model, Pretrained) and model.preprocessing is not None:
            preprocessing = model.preprocessing
        if preprocessing.image_size == (canvas, canvas):
            return DigitModel(
                name, mixer, model, preprocessing, canvas, bool(data.moved), checkpoint.metrics
            )
    trained = f"{config.model.name!r} on {getattr(data, 'format', data.kind)!r}"
    raise ValueError(
        f"run: {path} is {trained}, want one on scikit-learn's digits (data.format: digits, in one "
        "channel) or a language model"
    )
