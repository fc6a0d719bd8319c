"""The page about digits: a digit, its position on the canvas, and the predictions of models."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from nicegui import events, ui
from torch import Tensor

from ..data.digits import load_digits, place
from .cards import Tally, digit_card, named, percent
from .controls import NONE_CHOSEN, Chosen, Heads, Pad, Sketch, Status, legend, problem
from .guard import numbers
from .live import Newest, computed
from .models import Answer, DigitModel
from .sketch import MOST_BYTES, from_image, from_lines

__all__ = ["DigitsView"]

HELP = (
    "Drag the digit, or move it with the arrow keys. Point at a patch, or press Shift and an arrow "
    "key, to see what the patch attends to."
)
WORDS = (
    "Probability: the share that a model gives to one of the ten digits. Attention weight: the "
    "share of a token's attention that goes to another token. Both sum to 100 %. Head: a layer "
    "computes several attentions in parallel, which are called heads. Class token: an extra token "
    "from which the model computes its prediction."
)
KEY = {
    "chosen": "chosen patch",
    "frame": "the digit's frame",
    "looks": "attention (brightest: the largest weight, which the caption gives)",
    "right": "right",
    "wrong": "wrong",
}
BATCH = 63  # the number of positions that are computed at once
UNKNOWN = -1


@dataclass(frozen=True)
class Scene:
    """A digit that is shown.

    Attributes:
        digit: the digit, float32 [8, 8] from 0 to 1.
        label: the digit that it is; None if unknown.
        name: the name for messages.
        stamp: a number that is different for each scene.
        number: the number of the test image; None for other digits.
    """

    digit: Tensor
    label: int | None
    name: str
    stamp: int
    number: int | None = None


class Request(NamedTuple):
    """A request for the predictions of models for a digit at a position."""

    models: list[DigitModel]
    scene: Scene
    row: int
    column: int


class DigitsView:
    """The digits page of one browser window."""

    def __init__(self, models: list[DigitModel]):
        self.models, self.digits = models, load_digits()
        self.stamps = itertools.count()
        self.canvas = models[0].canvas
        self.row = self.column = self.most // 2
        self.scene, self.last = self._test(0), 0  # last: the number of the last test image
        self.summary = ""  # a sentence about the newest answers
        self.shown: Request | None = None  # the request of the newest answers
        self.answers = dict[DigitModel, Answer]()
        self.session = {m: Tally(m.canvas - 7) for m in models}
        self.counted = set[tuple[DigitModel, int, int, int]]()
        self.everywhere = dict[DigitModel, Tally]()
        self.everywhere_task: asyncio.Task[None] | None = None
        self.newest = Newest(_answers, self._answered, self._failed)
        self.sets = {(m.canvas, m.moved): self._set_name(m) for m in models}
        self._build()
        self._offer(next(iter(self.sets)))

    def _set_name(self, model: DigitModel) -> str:
        name = "digits anywhere" if model.moved else "centred digits"
        several = len({m.canvas for m in self.models}) > 1
        return f"{name}, {model.canvas}×{model.canvas}" if several else name

    # -- the elements of the page ------------------------------------------------------------

    def _build(self) -> None:
        with ui.element("section").classes("controls").props('aria-label="Models"'):
            with ui.element("fieldset").classes("boxes"):
                with ui.element("legend"):
                    ui.label("Trained on")
                self.trained = ui.radio(self.sets, value=next(iter(self.sets)))
                self.trained.props('inline dense aria-label="Trained on"')
                self.trained.on_value_change(lambda event: self._offer(event.value))
            self.chosen = Chosen("Mixers", self.ask)
            self.heads = Heads(self.draw)
            ui.label(WORDS).classes("help words")
        legend(KEY, "Patch (2, 3) is in row 2, column 3 of the patches; both count from 1.")
        with ui.element("div").classes("stage"):
            with ui.element("section").classes("side").props('aria-label="The digit"'):
                self._build_side()
            with ui.element("section").props('aria-label="Answers"').classes("grow"):
                self.chosen.place_cards()

    def _build_side(self) -> None:
        with ui.element("div").classes("inputs"):
            with ui.element("div"):
                ui.label("Drag the digit:").classes("help")
                self.pad = Pad("Canvas with the digit")
                self.pad.on("moved", self._moved)
                self.pad.on("looked", self._looked)
            with ui.element("div"):
                ui.label("Draw a digit:").classes("help")
                self.sketch = Sketch("Square to draw a digit in, with mouse, finger or pen")
                self.sketch.on("drawn", self._drawn)
            with ui.element("div").classes("actions"):
                ui.button("Any test image", on_click=self._any).props("outline")
                ui.button("Centre", on_click=self._centre).props("outline")
                ui.button("Clear", on_click=self._clear).props("outline")
        self.status = Status("answers")
        with ui.element("div").classes("more"):
            self._build_more()

    def _build_more(self) -> None:
        self.upload = ui.upload(
            on_upload=self._uploaded, on_rejected=self._rejected, auto_upload=True,
            max_file_size=MOST_BYTES,
        ).props('accept="image/*"').classes("hidden")  # fmt: skip
        ui.button("Upload an image").props("outline").on(
            "click", js_handler=f"() => getElement({self.upload.id}).$refs.qRef.pickFiles()"
        )
        self.refused = problem()
        self.number = ui.number(
            f"Test image, 0 to {len(self.digits.test) - 1}", value=0, step=1,
            on_change=lambda event: self._take_test(event.value),
        ).props("debounce=300 hide-bottom-space")  # fmt: skip
        self.number.on("blur", self._agree)
        self.no_number = problem()
        names = {UNKNOWN: "unknown"} | {i: str(i) for i in range(10)}
        self.label = ui.select(
            names, value=self.scene.label, label="The digit is a", on_change=self._named
        )
        with ui.row().classes("gap-2"):
            ui.button("All positions", on_click=self._start_everywhere)
            ui.button("Forget answers", on_click=self._forget).props("outline")
        self.message = problem()
        ui.label(HELP).classes("help").props("id=pad-help")

    # -- actions of the user ----------------------------------------------------------------

    def _offer(self, key: tuple[int, bool]) -> None:
        """Show the models that were trained on one kind of digits, and a canvas of their size."""
        mine = [m for m in self.models if (m.canvas, m.moved) == key]
        self.canvas = mine[0].canvas
        self.step = min((m.patch for m in mine if m.patch), default=0)  # pixels per side of a patch
        across = self.canvas // self.step if self.step else 1
        self.patch = across // 2 * (across + 1)
        self.chosen.offer(mine)
        self.row, self.column = min(self.row, self.most), min(self.column, self.most)
        self._show_pad()
        self._stop_everywhere()
        self.ask()

    @property
    def most(self) -> int:
        return self.canvas - 8

    def _test(self, n: int) -> Scene:
        label = int(self.digits.test_labels[n])
        return Scene(self.digits.test[n], label, f"test image {n}", next(self.stamps), n)

    def _take(self, scene: Scene, keep_lines: bool = False) -> None:
        self.scene = scene
        self.message.text = self.refused.text = self.no_number.text = ""
        if not keep_lines:
            self.sketch.clear_lines()
        if scene.number is not None:
            self.last = scene.number
        self._agree()
        self.label.set_value(UNKNOWN if scene.label is None else scene.label)
        self._stop_everywhere()
        self._show_pad()
        self.ask()

    def _take_test(self, number: float | None) -> None:
        if number is None or number == self.scene.number:
            return
        most = len(self.digits.test) - 1
        if float(number).is_integer() and 0 <= number <= most:
            self._take(self._test(int(number)))
        else:
            self.no_number.text = (
                f"Test image: got {number:g}, want a whole number from 0 to {most}; this is still "
                f"the {self.scene.name}"
            )

    def _agree(self) -> None:
        """Set the field to the number of the image that is shown."""
        self.number.value = self.scene.number

    def _any(self) -> None:
        others = [n for n in range(len(self.digits.test)) if n != self.scene.number]
        self._take(self._test(random.choice(others)))

    def _clear(self) -> None:
        self.sketch.clear_lines()
        if self.scene.number is None:
            self._take(self._test(self.last))

    def _centre(self) -> None:
        self.row = self.column = self.most // 2
        self._show_pad()
        self.ask()

    def _moved(self, event: events.GenericEventArguments) -> None:
        sent = numbers(event.args, "stamp", "row", "column")
        if sent is None or sent[0] != self.pad_stamp:  # the event belongs to an earlier digit
            return
        self.row, self.column = (min(max(value, 0), self.most) for value in sent[1:])
        self.ask()

    def _looked(self, event: events.GenericEventArguments) -> None:
        if (sent := numbers(event.args, "patch")) is None:
            return
        across = self.canvas // self.step if self.step else 1
        self.patch = min(max(sent[0], 0), across * across - 1)
        self.draw()
        self._summarise()

    def _drawn(self, event: events.GenericEventArguments) -> None:
        if numbers(event.args, "blank") != [self.sketch.blank]:
            return
        try:
            digit = from_lines(event.args.get("lines"))
        except (ValueError, TypeError) as error:
            self.refused.text = f"The drawing: {error}"
            return
        if digit is not None:
            self._take(Scene(digit, None, "drawn digit", next(self.stamps)), keep_lines=True)

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        self.upload.reset()
        name = event.file.name
        try:
            if event.file.size() > MOST_BYTES:
                raise ValueError(f"it has {event.file.size():,} bytes, want at most {MOST_BYTES:,}")
            digit = await asyncio.to_thread(from_image, await event.file.read())
        except ValueError as error:
            self.refused.text = f"{name}: {error}"
            return
        self._take(Scene(digit, None, f"uploaded {name}", next(self.stamps)))

    def _rejected(self) -> None:
        self.refused.text = f"The file is refused: want an image of at most {MOST_BYTES:,} bytes."

    def _named(self, event: events.ValueChangeEventArguments[Any]) -> None:
        label = None if event.value == UNKNOWN else int(event.value)
        if label != self.scene.label:
            self.scene = replace(self.scene, label=label, stamp=next(self.stamps))
            self._stop_everywhere()
            self.ask()

    def _forget(self) -> None:
        self.session = {m: Tally(m.canvas - 7) for m in self.models}
        self.counted.clear()
        self._stop_everywhere()
        self.draw()

    # -- predictions -------------------------------------------------------------------------

    def ask(self) -> None:
        """Request predictions for what is shown."""
        self.newest.ask(Request(self.chosen.ticked, self.scene, self.row, self.column))

    def _answered(self, request: Request, answers: dict[DigitModel, Answer]) -> None:
        self.answers.update(answers)
        self.shown = request
        scene = request.scene
        for model, answer in answers.items():
            key = (model, scene.stamp, request.row, request.column)
            if scene.label is not None and key not in self.counted:
                self.counted.add(key)
                right = int(np.argmax(answer.probabilities)) == scene.label
                self.session[model].add(request.row, request.column, right)
        self.heads.offer([answer.maps for answer in answers.values()])
        self.draw()
        said = Counter(int(np.argmax(answer.probabilities)) for answer in answers.values())
        known = "" if scene.label is None else f" (a {scene.label})"
        at = f"row {request.row + 1}, column {request.column + 1}"
        where = f"{scene.name}{known}, upper left pixel at {at}"
        if not answers:
            self.summary = f"{where}. {NONE_CHOSEN}"
        elif scene.label is not None:
            self.summary = f"{where}: {said[scene.label]} of {len(answers)} models are right."
        else:
            each = ", ".join(f"{n} predict {digit}" for digit, n in said.most_common())
            self.summary = f"{where}: of {len(answers)} models, {each}."
        self._summarise()
        self.pad.show(alt=where)

    def _summarise(self) -> None:
        patch = f" Patch {named(self.patch, self.canvas // self.step)} is chosen."
        self.status.say(self.summary + (patch if self.step else ""))

    def _failed(self, error: Exception) -> None:
        self.message.text = f"No answer: {error}"

    def draw(self) -> None:
        """Draw all cards from the newest answers."""
        if self.shown is None:
            return
        request = self.shown
        at = torch.tensor([[request.row, request.column]])
        if max(request.row, request.column) > self.most:
            return  # the canvas has changed; its answers will follow
        image = place(request.scene.digit[None], self.canvas, at)[0, 0]
        pixels = (image * 255).round().byte().numpy()
        across = self.canvas // self.step if self.step else 1
        middle = [(n + 0.5) * self.step for n in divmod(self.patch, across)]
        for model in self.chosen.ticked:
            if model in self.answers and model in request.models:
                look = self.heads.look(model.patch_at(*middle))
                self.chosen.show(model, digit_card(
                    model, self.answers[model], pixels, (request.row, request.column),
                    request.scene.label, look, self.session[model], self.everywhere.get(model),
                ))  # fmt: skip

    def _show_pad(self) -> None:
        self.pad_stamp = next(self.stamps)
        digit = [round(float(v), 3) for v in self.scene.digit.flatten()]
        scene = {"digit": digit, "side": 8, "row": self.row, "column": self.column}
        self.pad.show(
            size=self.canvas, patch=self.step, chosen=self.patch,
            scene=scene | {"stamp": self.pad_stamp},
        )  # fmt: skip

    # -- all positions -----------------------------------------------------------------------

    def _start_everywhere(self) -> None:
        self._stop_everywhere()
        if self.scene.label is None:
            self.message.text = "All positions: first choose which digit it is."
            return
        if not self.chosen.ticked:
            self.message.text = f"All positions: {NONE_CHOSEN}"
            return
        self.message.text = ""
        self.everywhere_task = asyncio.get_running_loop().create_task(self._everywhere())

    def _stop_everywhere(self) -> None:
        if self.everywhere_task is not None:
            self.everywhere_task.cancel()
            self.everywhere_task = None
        self.everywhere.clear()

    async def _everywhere(self) -> None:
        scene, axis = self.scene, torch.arange(self.most + 1)
        places = torch.cartesian_prod(axis, axis)
        for model in self.chosen.ticked:
            tally = Tally(self.most + 1)
            for batch in places.split(BATCH):
                classes = await computed(model.answers, scene.digit, batch)
                for (row, column), found in zip(batch.tolist(), classes.tolist(), strict=True):
                    tally.add(row, column, found == scene.label)
            self.everywhere[model] = tally
            self.draw()
        self.status.say(
            f"Right predictions for {scene.name} at all {len(places)} positions: "
            + ", ".join(
                f"{model.name} {percent(tally.right.sum() / tally.all.sum())}"
                for model, tally in self.everywhere.items()
            )
        )

    def stop(self) -> None:
        """Stop all work, because the window is closed."""
        self._stop_everywhere()
        self.newest.stop()
        self.status.stop()


def _answers(request: Request) -> dict[Any, Answer]:
    return {m: m.answer(request.scene.digit, request.row, request.column) for m in request.models}
