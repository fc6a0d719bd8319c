"""What a model answers, as HTML: a card for each. Everything in it is escaped or a number."""

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

__all__ = ["COLOURS", "Look", "Tally", "digit_card", "named", "picture", "text_card", "visible"]

# one for each thing; page.css and pad.js have them as variables, such as --chosen
COLOURS = {
    "chosen": "#ff5fc8",  # the patch that asks
    "frame": "#ffffff",  # the digit's
    "looks": "#ffc21a",  # attention
    "right": "#3a86d6",
    "wrong": "#d9482b",
}
ABSENT = (0, 0, 0, 0)
NO_WEIGHTS = (
    "A convolution has no attention weights: it takes its neighbours in the same way everywhere, "
    "whatever they show."
)


@dataclass(frozen=True)
class Look:
    """Which attention is shown. layer: from 0. head: from 0; None is their mean. patch: that asks,
    row-major."""

    layer: int = 0
    head: int | None = None
    patch: int = 0

    def of(self, maps: Sequence[Map]) -> Tensor | None:
        """[queries, keys], or None where there is no such layer or head, or a convolution."""
        weights = maps[self.layer] if self.layer < len(maps) else None
        if weights is None or (self.head is not None and self.head >= len(weights)):
            return None
        return weights.mean(0) if self.head is None else weights[self.head]

    def __str__(self) -> str:
        head = "mean of heads" if self.head is None else f"head {self.head + 1}"
        return f"layer {self.layer + 1}, {head}"


@dataclass
class Tally:
    """Answers by place: right ones and all, [places, places] each."""

    side: int
    right: np.ndarray = field(init=False)
    all: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.right = np.zeros((self.side, self.side), int)
        self.all = np.zeros((self.side, self.side), int)

    def add(self, row: int, column: int, right: bool) -> None:
        self.right[row, column] += right
        self.all[row, column] += 1

    def __str__(self) -> str:
        right, total = int(self.right.sum()), int(self.all.sum())
        return f"{right} of {total} right ({100 * right / total:.0f} %)" if total else "none yet"


def picture(pixels: np.ndarray) -> str:
    """A data URI of a PNG; uint8 [h, w] (grey) or [h, w, 4]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def visible(text: str) -> str:
    """A token's text with what one cannot see made visible."""
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
    """image: uint8 [canvas, canvas]. session: the answers so far. everywhere: those to this digit
    at all places, where they were asked for."""
    likeliest = max(range(len(answer.probabilities)), key=answer.probabilities.__getitem__)
    right = label is not None and likeliest == label
    verdict = "" if label is None else "right" if right else f"wrong: it is a {label}"
    sure = f"{percent(answer.probabilities[likeliest])} %"
    rows = [(str(i), p, i == likeliest) for i, p in enumerate(answer.probabilities)]
    kind = "right" if right else "wrong"
    told = f'<span class="verdict {kind}">{escape(verdict)}</span>' if verdict else ""
    maps = _places("this session", session, place)
    maps += _places("this digit, all places", everywhere, place) if everywhere else ""
    return (
        f"{_title(model.name)}"
        f'<p class="said"><b data-said>{likeliest}</b> <span>{sure}</span> {told}</p>'
        f'<div class="two">{_attention(model, answer, image, look)}'
        f"{_bars('Probability of each digit, in percent', rows)}</div>"
        f'<div class="maps">{maps}</div>'
    )


def _title(name: str) -> str:
    return f"<h2>{escape(name)}</h2>"


def _bars(caption: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    lines = (
        f'<tr{" class=first" if first else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'
        f"<td>{percent(share)}</td></tr>"
        for name, share, first in rows
    )
    return (
        f'<table class="bars"><caption class="unseen">{caption}</caption>{"".join(lines)}</table>'
    )


def _attention(model: DigitModel, answer: Answer, image: np.ndarray, look: Look) -> str:
    """The picture with the weights of one query drawn over it."""
    canvas = len(image)
    head = f'<svg viewBox="0 0 {canvas} {canvas}" role="img" aria-label='
    whole = f'<image href="{picture(image)}" width="{canvas}" height="{canvas}"/>'
    weights = look.of(answer.maps)
    if weights is None:
        why = f"no {look} here"
        if look.layer < len(answer.maps) and answer.maps[look.layer] is None:
            why = NO_WEIGHTS
        elif not answer.maps:
            why = "This model has no attention to show."
        svg = f'{head}"The digit on the canvas.">{whole}</svg>'
        return f'<figure class="look" data-look="none">{svg}<figcaption>{why}</figcaption></figure>'
    prefix, across = model.prefix, canvas // model.patch
    ask = prefix + look.patch
    patch, who = look.patch, f"patch {named(look.patch, across)}"
    if ask >= len(weights):  # the last layer answers for the class token alone
        ask, patch, who = 0, -1, "class token (it alone asks here)"
    row = weights[ask, prefix:]
    most, best = float(row.max()) or 1.0, int(row.argmax())
    boxes = "".join(
        _box(i, across, model.patch, f'fill-opacity="{0.8 * float(w) / most:.2f}"')
        for i, w in enumerate(row)
    )
    mark = _box(patch, across, model.patch, 'class="asks"') if patch >= 0 else ""
    told = f"{look}: {who} looks most at {named(best, across)}, {percent(most)} %"
    told += f"; at the class token {percent(float(weights[ask, 0]))} %" if prefix else ""
    svg = f'{head}"{told}">{whole}<g class="weights">{boxes}</g>{mark}</svg>'
    return f'<figure class="look" data-look="{patch}">{svg}<figcaption>{told}</figcaption></figure>'


def named(patch: int, across: int) -> str:
    """A patch, row-major, by its row and column, from 1."""
    return f"({patch // across + 1}, {patch % across + 1})"


def _box(patch: int, across: int, side: int, more: str) -> str:
    y, x = (n * side for n in divmod(patch, across))
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {more}/>'


def _places(title: str, tally: Tally, place: tuple[int, int]) -> str:
    """Right and wrong by place; where answers differ, what most of them were."""
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
    """start: the character whose token asks; None is the last token. Tokens are buttons, with
    their character in `data-start`."""
    if answer is None:
        return f"{_title(model.name)}<p>Type something.</p>"
    rows = [(visible(text), p, i == 0) for i, (text, p) in enumerate(answer.top)]
    weights = look.of(answer.maps)
    tokens = answer.tokens
    before = [i for i, token in enumerate(tokens) if start is not None and token.start <= start]
    ask = before[-1] if before else len(tokens) - 1
    shares = [0.0] * len(tokens) if weights is None else weights[ask].tolist()
    most = max(shares) or 1.0
    buttons = "".join(
        f'<button type="button" data-start="{token.start}" aria-pressed="{str(i == ask).lower()}" '
        f'title="{percent(share)} %" aria-label="{escape(visible(token.text))}, '
        f'{percent(share)} %" style="--share:{share / most:.2f}">{escape(visible(token.text))}'
        "</button>"
        for i, (token, share) in enumerate(zip(tokens, shares, strict=True))
    )
    told = f"no {look} here"
    if weights is not None:
        best = max(range(len(shares)), key=shares.__getitem__)
        told = (
            f"{look}: {visible(tokens[ask].text)!r} looks most at "
            f"{visible(tokens[best].text)!r}, {percent(shares[best])} %"
        )
    total = answer.unread + len(tokens)
    cut = f"Only the last {len(tokens)} of {total} tokens are read." if answer.unread else ""
    return (
        f"{_title(model.name)}"
        f"{_bars('Likeliest next tokens, in percent', rows)}"
        f"{f'<p class=told>{cut}</p>' if cut else ''}"
        f'<div class="tokens" role="group" aria-label="Tokens of the prompt">{buttons}</div>'
        f'<p class="told">{escape(told)}</p>'
    )
