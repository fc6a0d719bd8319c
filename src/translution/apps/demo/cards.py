"""Cards: the prediction of each model as HTML, in which all text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from .models import Answer, DigitModel, Map, TextAnswer, TextModel

__all__ = [
    "COLOURS", "Look", "Tally", "digit_card", "named", "percent", "picture", "text_card", "visible",
]  # fmt: skip

# page.css and pad.js use them as variables, such as --chosen
COLOURS = {
    "chosen": "#ff5fc8",  # the query patch
    "frame": "#ffffff",  # around the digit
    "looks": "#ffc21a",  # attention
    "right": "#3a86d6",
    "wrong": "#d9482b",
}
ABSENT = (0, 0, 0, 0)
# how a card tells the measures of a description, by their names there
MEASURES = {
    "test_accuracy_centred": "Accuracy on scikit-learn's test digits in the centre: {}.",
    "test_accuracy_moved": "Accuracy on the same digits at random positions: {}.",
    "valid_accuracy": "Accuracy on the validation data: {}.",
    "valid_perplexity": "Perplexity per token on the validation text: {}.",
    "valid_bits_per_byte": "Bits per byte on the validation text: {}.",
}
NO_WEIGHTS = (
    "A convolution has no attention weights: it combines the neighbours of every patch in the same "
    "way, whatever they show."
)


@dataclass(frozen=True)
class Look:
    """The attention that is shown.

    Attributes:
        layer: the layer, counted from 0.
        head: the head, counted from 0; None takes the mean of all heads.
        patch: the query patch, counted row by row from 0.
    """

    layer: int = 0
    head: int | None = None
    patch: int = 0

    def of(self, maps: Sequence[Map]) -> Tensor | None:
        """Return the weights [queries, keys], or None if the layer or head has no attention."""
        weights = maps[self.layer] if self.layer < len(maps) else None
        if weights is None or (self.head is not None and self.head >= len(weights)):
            return None
        return weights.mean(0) if self.head is None else weights[self.head]

    def __str__(self) -> str:
        head = "mean of heads" if self.head is None else f"head {self.head + 1}"
        return f"layer {self.layer + 1}, {head}"


@dataclass
class Tally:
    """Counts the predictions at each position of a digit.

    Attributes:
        side: the number of positions along each axis.
        right: the number of right predictions, int [side, side].
        all: the number of all predictions, int [side, side].
    """

    side: int
    right: np.ndarray = field(init=False)
    all: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.right = np.zeros((self.side, self.side), int)
        self.all = np.zeros((self.side, self.side), int)

    def add(self, row: int, column: int, right: bool) -> None:
        """Count a prediction for a digit at a position."""
        self.right[row, column] += right
        self.all[row, column] += 1

    def __str__(self) -> str:
        right, total = int(self.right.sum()), int(self.all.sum())
        return f"{right} of {total} right ({100 * right / total:.0f} %)" if total else "none yet"


def picture(pixels: np.ndarray) -> str:
    """Return the data URI of a PNG.

    Args:
        pixels: uint8 [height, width] (grey) or [height, width, 4] (red, green, blue, opacity).
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def percent(share: float) -> str:
    """Write a fraction as a percentage with one decimal; no line break parts it from the sign."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def visible(text: str) -> str:
    """Return the text of a token with visible signs in place of white space."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


# -- digits --------------------------------------------------------------------------------------


def digit_card(
    model: DigitModel,
    answer: Answer,
    image: np.ndarray,
    place: tuple[int, int],
    label: int | None,
    look: Look,
    session: Tally,
    everywhere: Tally | None,
) -> str:
    """Return the card of a digit model as HTML.

    Args:
        model: the model.
        answer: its prediction.
        image: the canvas, uint8 [canvas, canvas].
        place: the row and column of the digit's upper left pixel.
        label: the digit that it is; None if unknown.
        look: the attention that is shown.
        session: the predictions of this session.
        everywhere: the predictions for this digit at all positions; None if they were not computed.
    """
    likeliest = max(range(len(answer.probabilities)), key=answer.probabilities.__getitem__)
    verdict = ""
    if label is not None:
        kind = "right" if likeliest == label else "wrong"
        told = "right" if likeliest == label else f"wrong: it is a {label}"
        verdict = f'<span class="verdict {kind}">{told}</span>'
    rows = [(str(i), p, i == likeliest) for i, p in enumerate(answer.probabilities)]
    maps = _places("Predictions of this session", session, place)
    if everywhere:
        maps += _places("Predictions for this digit at all positions", everywhere, place)
    return _card(
        model,
        _said("predicts", str(likeliest), answer.probabilities[likeliest], verdict),
        f'<div class="two">{_attention(model, answer, image, look)}'
        f"{_bars('Probability of each digit, %', rows)}</div>"
        f'<div class="maps">{maps}</div>',
    )


def _card(model: DigitModel | TextModel, said: str, more: str) -> str:
    """Return a card: the model's name and what it says, which unfold the rest."""
    parameters = sum(p.numel() for p in model.model.parameters())
    measured = "".join(
        " " + text.format(percent(value) if "accuracy" in name else f"{value:.2f}")
        for name, text in MEASURES.items()
        if (value := model.metrics.get(name)) is not None
    )
    return (
        f'<details aria-label="{escape(model.name)}, details">'
        f"<summary>{_title(model.name)}{said}</summary>{more}"
        f'<p class="caption facts">The model has {parameters:,} parameters.{measured}</p></details>'
    )


def _said(before: str, what: str, share: float, verdict: str = "") -> str:
    return (
        f'<span class="said">{before} <strong data-said>{escape(what)}</strong> '
        f"<span>with probability {percent(share)}</span> {verdict}</span>"
    )


def _title(name: str) -> str:
    return f"<h2>{escape(name)}</h2>"


def _bars(caption: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    lines = (
        f'<tr{" class=first" if first else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'
        f"<td>{100 * share:.1f}</td></tr>"
        for name, share, first in rows
    )
    return f'<table class="bars"><caption>{caption}</caption>{"".join(lines)}</table>'


def _attention(model: DigitModel, answer: Answer, image: np.ndarray, look: Look) -> str:
    """Return the canvas with the attention weights of one query drawn over it."""
    canvas = len(image)
    head = f'<svg viewBox="0 0 {canvas} {canvas}" role="img" aria-label='
    whole = f'<image href="{picture(image)}" width="{canvas}" height="{canvas}"/>'
    weights = look.of(answer.maps)
    if weights is None:
        why = f"This model has no {look}."
        if look.layer < len(answer.maps) and answer.maps[look.layer] is None:
            why = NO_WEIGHTS
        elif not answer.maps:
            why = "This model has no attention to show."
        svg = f'{head}"The digit on the canvas.">{whole}</svg>'
        return f'<figure class="look" data-look="none">{svg}<figcaption>{why}</figcaption></figure>'
    prefix, across = model.prefix, canvas // model.patch
    ask = prefix + look.patch
    patch, who = look.patch, f"patch {named(look.patch, across)}"
    if ask >= len(weights):  # in the last layer the class token is the only query
        ask, patch, who = 0, -1, "class token (the only query of this layer)"
    row = weights[ask, prefix:]
    most, best = float(row.max()) or 1.0, int(row.argmax())
    boxes = "".join(
        _box(i, across, model.patch, f'fill-opacity="{0.8 * float(w) / most:.2f}"')
        for i, w in enumerate(row)
    )
    mark = _box(patch, across, model.patch, 'class="asks"') if patch >= 0 else ""
    caption = (
        f"Attention weights of {look}: {who} attends most to patch {named(best, across)}, "
        f"with a weight of {percent(most)}"
    )
    caption += f"; the class token has {percent(float(weights[ask, 0]))}" if prefix else ""
    svg = f'{head}"{caption}">{whole}<g class="weights">{boxes}</g>{mark}</svg>'
    caption = f"<figcaption>{caption}</figcaption>"
    return f'<figure class="look" data-look="{patch}">{svg}{caption}</figure>'


def named(patch: int, across: int) -> str:
    """Name a patch by its row and column, counted from 1, such as "(3, 4)"."""
    return f"({patch // across + 1}, {patch % across + 1})"


def _box(patch: int, across: int, side: int, more: str) -> str:
    y, x = (n * side for n in divmod(patch, across))
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {more}/>'


def _places(title: str, tally: Tally, place: tuple[int, int]) -> str:
    """Return a map of right and wrong predictions; each position shows its majority."""
    good = 2 * tally.right >= np.maximum(tally.all, 1)
    colours = np.where(good[..., None], _rgba("right"), _rgba("wrong")).astype(np.uint8)
    colours[tally.all == 0] = ABSENT
    side, (row, column) = tally.side, place
    return (
        f'<figure><svg class="places" viewBox="-1 -1 {side + 2} {side + 2}" role="img" '
        f'aria-label="{title}: {tally}"><image href="{picture(colours)}" width="{side}" '
        f'height="{side}"/><rect x="{column - 0.5}" y="{row - 0.5}" width="2" height="2"/></svg>'
        f"<figcaption>{title}: {str(tally).replace(' %', '&nbsp;%')}</figcaption></figure>"
    )


def _rgba(name: str) -> tuple[int, ...]:
    return *bytes.fromhex(COLOURS[name][1:]), 255


# -- text ----------------------------------------------------------------------------------------


def text_card(model: TextModel, answer: TextAnswer | None, look: Look, start: int | None) -> str:
    """Return the card of a text model as HTML.

    The tokens of the prompt are buttons; `data-start` is the position of their first character.

    Args:
        model: the model.
        answer: its prediction; None if the prompt is empty.
        look: the attention that is shown.
        start: the position of a character in the query token; None takes the last token.
    """
    if answer is None:
        return f"{_title(model.name)}<p>Type something.</p>"
    rows = [(visible(text), p, i == 0) for i, (text, p) in enumerate(answer.top)]
    weights = look.of(answer.maps)
    tokens = answer.tokens
    before = [i for i, token in enumerate(tokens) if start is not None and token.start <= start]
    ask = before[-1] if before else len(tokens) - 1
    shares = [0.0] * len(tokens) if weights is None else weights[ask].tolist()
    most = max(shares) or 1.0
    buttons = ""
    for i, (token, share) in enumerate(zip(tokens, shares, strict=True)):
        name, told = escape(visible(token.text)), f"attention weight {percent(share)}"
        buttons += (
            f'<button type="button" data-start="{token.start}" '
            f'aria-pressed="{str(i == ask).lower()}" title="{told}" aria-label="{name}, {told}" '
            f'style="--share:{share / most:.2f}">{name}</button>'
        )
    caption = f"This model has no {look}."
    if weights is not None:
        best = max(range(len(shares)), key=shares.__getitem__)
        caption = (
            f"Attention weights of {look}: {visible(tokens[ask].text)!r} attends most to "
            f"{visible(tokens[best].text)!r}, with a weight of {percent(shares[best])}"
        )
    total = answer.unread + len(tokens)
    cut = f"Only the last {len(tokens)} of {total} tokens are read." if answer.unread else ""
    return _card(
        model,
        _said("next", visible(answer.top[0][0]), answer.top[0][1]),
        f"{_bars('Probability of the likeliest next tokens, %', rows)}"
        f"{f'<p class=caption>{cut}</p>' if cut else ''}"
        f'<div class="tokens" role="group" aria-label="Tokens of the prompt">{buttons}</div>'
        f'<p class="caption">{escape(caption)}</p>',
    )
