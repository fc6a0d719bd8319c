"""Elements that both pages use: the canvas, the cards, and the choice of models and heads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nicegui import ui

from .cards import Look
from .models import DigitModel, Map, TextModel

__all__ = [
    "NONE_CHOSEN", "Card", "Chosen", "Heads", "Pad", "Sketch", "Status", "legend", "problem",
]  # fmt: skip

NONE_CHOSEN = "No mixer is chosen."
REST = 0.5  # seconds without a new text before a status line changes


class Pad(ui.element, component="pad.js"):
    """The canvas on which a digit is moved; see pad.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["label"] = label

    def show(self, **props: Any) -> None:
        """Change properties of the canvas, which pad.js lists as props."""
        self._props.update(props)
        self.update()


class Sketch(ui.element, component="sketch.js"):
    """The square in which a digit is drawn; see sketch.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["label"], self.blank = label, 0
        self._props["blank"] = 0

    def clear_lines(self) -> None:
        """Remove all lines."""
        self.blank += 1
        self._props["blank"] = self.blank
        self.update()


class Card(ui.element, component="card.js"):
    """The card of a model; see card.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["aria-label"] = label

    def show(self, content: str) -> None:
        """Replace the content of the card, which is HTML."""
        self._props["content"] = content
        self.update()


class Status:
    """A line that screen readers read aloud.

    It changes when no new text has come for half a second, so that while a digit is moved only its
    last position is read.
    """

    def __init__(self, name: str) -> None:
        self.label = ui.label().classes("status")
        self.label.props(f'role=status aria-live=polite data-name="{name}"')
        self.waiting: asyncio.TimerHandle | None = None

    def say(self, text: str) -> None:
        """Show a text, unless another one follows within half a second."""
        self.stop()
        loop = asyncio.get_running_loop()
        self.waiting = loop.call_later(REST, self.label.set_text, text)

    def stop(self) -> None:
        """Drop a text that is not shown yet."""
        if self.waiting is not None:
            self.waiting.cancel()


def problem() -> ui.label:
    """Make a line for errors, which screen readers read immediately."""
    return ui.label().classes("status problem").props("role=alert")


def legend(names: Mapping[str, str], more: str) -> None:
    """Explain the colours of the page.

    Args:
        names: the meaning of each colour, by the names of `COLOURS`.
        more: a further sentence.
    """
    with ui.element("p").classes("legend help"):
        for colour, name in names.items():
            ui.html(f'<i class="swatch {colour}"></i>{name}', sanitize=False, tag="span")
        ui.html(more, sanitize=False, tag="span")


class Chosen:
    """A checkbox for each model, and a card for each model that is ticked.

    Args:
        label: the label of the checkboxes.
        change: called when the user ticks or unticks a model.
    """

    def __init__(self, label: str, change: Callable[[], None]):
        self.change = change
        self.off = set[Any]()
        self.cards = dict[Any, Card]()
        self.models: Sequence[Any] = []
        with ui.element("fieldset").classes("boxes"):
            with ui.element("legend"):
                ui.label(label)
            self.row = ui.row().classes("gap-x-4 gap-y-0")

    def place_cards(self) -> None:
        """Put the cards at this place of the page."""
        self.grid = ui.element("div").classes("cards")

    @property
    def ticked(self) -> list[Any]:
        """The models that are ticked."""
        return [model for model in self.models if model not in self.off]

    def offer(self, models: Sequence[DigitModel | TextModel]) -> None:
        """Show checkboxes for these models instead of earlier ones."""
        self.models = models
        self.row.clear()
        with self.row:
            for model in models:
                box = ui.checkbox(model.name, value=model not in self.off).props("dense")
                box.on_value_change(lambda event, model=model: self._tick(model, event.value))
        self._layout()

    def _tick(self, model: Any, on: bool) -> None:
        (self.off.discard if on else self.off.add)(model)
        self._layout()
        self.change()

    def _layout(self) -> None:
        self.grid.clear()
        self.cards = {}
        with self.grid:
            for model in self.ticked:
                self.cards[model] = Card(model.name)

    def show(self, model: Any, content: str) -> None:
        """Show content in the card of a model, unless the model has been unticked."""
        if (card := self.cards.get(model)) is not None:
            card.show(content)


class Heads:
    """The choice of the layer and the head whose attention is shown.

    Args:
        change: called when the user chooses another one.
    """

    def __init__(self, change: Callable[[], None]):
        self.layer = ui.select({0: "layer 1"}, value=0, label="Layer", on_change=change)
        self.head = ui.select({-1: "mean of heads"}, value=-1, label="Head", on_change=change)

    def offer(self, maps: Sequence[Sequence[Map]]) -> None:
        """Offer all layers and heads that at least one of the models has."""
        layers = max((len(one) for one in maps), default=1) or 1
        heads = max((len(m) for one in maps for m in one if m is not None), default=0)
        alone = {  # layers with one query and several keys
            i for one in maps for i, m in enumerate(one)
            if m is not None and m.shape[-2] == 1 < m.shape[-1]
        }  # fmt: skip
        notes = {i: " (query: class token only)" if i in alone else "" for i in range(layers)}
        self._set(self.layer, {i: f"layer {i + 1}{notes[i]}" for i in range(layers)})
        names = {-1: "mean of heads"} | {i: f"head {i + 1}" for i in range(heads)}
        self._set(self.head, names)

    @staticmethod
    def _set(select: ui.select, options: dict[int, str]) -> None:
        if select.options != options:
            value = select.value if select.value in options else next(iter(options))
            select.set_options(options, value=value)

    def look(self, patch: int = 0) -> Look:
        """Return the attention to show, for a query patch."""
        head = int(self.head.value)
        return Look(int(self.layer.value), None if head < 0 else head, patch)
