"""What both parts of the page have: elements of our own, choosing models, layer and head."""

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
REST = 0.5  # seconds


class Pad(ui.element, component="pad.js"):
    """The canvas; see pad.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["label"] = label

    def show(self, **props: Any) -> None:
        """Change what pad.js lists as props."""
        self._props.update(props)
        self.update()


class Sketch(ui.element, component="sketch.js"):
    """The square to draw in; see sketch.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["label"], self.blank = label, 0
        self._props["blank"] = 0

    def clear_lines(self) -> None:
        self.blank += 1
        self._props["blank"] = self.blank
        self.update()


class Card(ui.element, component="card.js"):
    """What a model answers; see card.js."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._props["aria-label"] = label

    def show(self, content: str) -> None:
        self._props["content"] = content
        self.update()


class Status:
    """A line that is read out. It changes once nothing new was said for half a second: who moves a
    digit hears where it came to rest."""

    def __init__(self, name: str) -> None:
        self.label = ui.label().classes("status")
        self.label.props(f'role=status aria-live=polite data-name="{name}"')
        self.waiting: asyncio.TimerHandle | None = None

    def say(self, text: str) -> None:
        self.stop()
        loop = asyncio.get_running_loop()
        self.waiting = loop.call_later(REST, self.label.set_text, text)

    def stop(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()


def problem() -> ui.label:
    """A line for what went wrong, read out at once."""
    return ui.label().classes("status problem").props("role=alert")


def legend(names: Mapping[str, str], more: str) -> None:
    """What each colour means. names: of `COLOURS`."""
    with ui.element("p").classes("legend help"):
        for colour, name in names.items():
            ui.html(f'<i class="swatch {colour}"></i>{name}', sanitize=False, tag="span")
        ui.html(more, sanitize=False, tag="span")


class Chosen:
    """A box to tick for each model, and a card for each that is ticked.

    models: whose boxes stand there now; those in view are `ticked`.
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
        self.grid = ui.element("div").classes("cards")

    @property
    def ticked(self) -> list[Any]:
        return [model for model in self.models if model not in self.off]

    def offer(self, models: Sequence[DigitModel | TextModel]) -> None:
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
        """Put content into a model's card, if there is one (it may have been unticked since)."""
        if (card := self.cards.get(model)) is not None:
            card.show(content)


class Heads:
    """Which layer and head are shown."""

    def __init__(self, change: Callable[[], None]):
        self.layer = ui.select({0: "layer 1"}, value=0, label="Layer", on_change=change)
        self.head = ui.select({-1: "mean of heads"}, value=-1, label="Head", on_change=change)

    def offer(self, maps: Sequence[Sequence[Map]]) -> None:
        """All layers and heads that any of the models has."""
        layers = max((len(one) for one in maps), default=1) or 1
        heads = max((len(m) for one in maps for m in one if m is not None), default=0)
        alone = {  # one asks, many answer
            i for one in maps for i, m in enumerate(one)
            if m is not None and m.shape[-2] == 1 < m.shape[-1]
        }  # fmt: skip
        told = {i: " (class token alone asks)" if i in alone else "" for i in range(layers)}
        self._set(self.layer, {i: f"layer {i + 1}{told[i]}" for i in range(layers)})
        names = {-1: "mean of heads"} | {i: f"head {i + 1}" for i in range(heads)}
        self._set(self.head, names)

    @staticmethod
    def _set(select: ui.select, options: dict[int, str]) -> None:
        if select.options != options:
            value = select.value if select.value in options else next(iter(options))
            select.set_options(options, value=value)

    def look(self, patch: int = 0) -> Look:
        head = int(self.head.value)
        return Look(int(self.layer.value), None if head < 0 else head, patch)
