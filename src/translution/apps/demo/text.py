"""The page about text: a prompt, and the next tokens that each model predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nicegui import events, ui

from .cards import percent, text_card
from .controls import NONE_CHOSEN, Chosen, Heads, Status, legend, problem
from .guard import numbers
from .live import Newest
from .models import TextAnswer, TextModel

__all__ = ["TextView"]

WORDS = (
    "Probability: the share that a model gives to one of its tokens. Attention weight: the share "
    "of a token's attention that goes to another token. Both sum to 100 %. Head: a layer computes "
    "several attentions in parallel, which are called heads."
)
PROMPT = "This PEP proposes to add a new"
MOST = 2_000  # the largest number of characters of a prompt
# reports the position of a token that was clicked
CLICKED = """(event) => {
  const token = event.target.closest("[data-start]");
  if (token) emit(Number(token.dataset.start));
}"""


class Request(NamedTuple):
    """A request for the predictions of models for a prompt."""

    models: list[TextModel]
    prompt: str


class TextView:
    """The text page of one browser window."""

    def __init__(self, models: list[TextModel]):
        self.answers = dict[TextModel, TextAnswer | None]()
        self.start: int | None = None
        self.newest = Newest(_answers, self._answered, self._failed)
        with ui.element("section").classes("controls").props('aria-label="Models"'):
            self.chosen = Chosen("Mixers", self._ticked)
            self.heads = Heads(self.draw)
            ui.label(WORDS).classes("help words")
        legend(
            {"looks": "attention (brightest: the card's largest weight, which its caption gives)"},
            "␣ is a space, ⏎ a new line, ⟨C3⟩ a byte of a character that is split into tokens.",
        )
        self.prompt = ui.textarea("Prompt", value=PROMPT, on_change=self._changed).classes("prompt")
        self.prompt.props(f"outlined autogrow hide-bottom-space maxlength={MOST} debounce=150")
        with ui.element("div").classes("writing"):
            self.writer = ui.select(_names(models), value=models[0], label="Model that writes")
            ui.button("Append likeliest", on_click=lambda: self._append(_likeliest))
            ui.button("Append sampled", on_click=lambda: self._append(_sampled)).props("outline")
        ui.label(
            "Choose a token in a card to see what it attends to; by default it is the last one."
        ).classes("help")
        self.status = Status("tokens")
        self.message = problem()
        self.chosen.place_cards()
        self.chosen.grid.on("click", self._clicked, js_handler=CLICKED)
        self.chosen.offer(models)
        self.ask()

    def ask(self) -> None:
        """Request predictions for the prompt."""
        self.newest.ask(Request(self.chosen.ticked, self._text()))

    def _text(self) -> str:
        """The prompt. The browser's limit on its length may have been evaded."""
        return str(self.prompt.value or "")[:MOST]

    def _ticked(self) -> None:
        """Let only the models that are ticked write."""
        ticked = self.chosen.ticked
        value = self.writer.value if self.writer.value in ticked else next(iter(ticked), None)
        self.writer.set_options(_names(ticked), value=value)
        self.ask()

    def _changed(self) -> None:
        self.start = None
        self.ask()

    def _clicked(self, event: events.GenericEventArguments) -> None:
        sent = numbers({"start": event.args}, "start")
        if sent is None:
            return
        self.start = max(0, sent[0])
        self.draw()

    def _append(self, choose: Callable[[torch.Tensor], int]) -> None:
        model = self.writer.value
        if model is None:
            self.message.text = f"Append: {NONE_CHOSEN}"
            return
        request = Request([model], self._text())

        def done(_: Request, answers: dict[Any, TextAnswer | None]) -> None:
            answer = answers[model]
            if answer is None:
                self.message.text = "Append: want a prompt with a token."
            elif request.prompt == self._text():  # the prompt has not changed since
                self.message.text = ""
                text = model.continued(request.prompt, choose(answer.probabilities))
                self.prompt.value = text[:MOST]

        Newest(_answers, done, self._failed).ask(request)

    def _answered(self, request: Request, answers: dict[Any, TextAnswer | None]) -> None:
        self.answers = answers
        self.message.text = ""
        self.heads.offer([answer.maps for answer in answers.values() if answer])
        self.draw()
        said = ", ".join(
            f"{m.name}: {a.top[0][0].strip() or 'white space'} ({percent(a.top[0][1])})"
            for m, a in answers.items()
            if a
        )
        if not answers:
            self.status.say(NONE_CHOSEN)
        else:
            told = f"Likeliest next token, and its probability: {said}"
            self.status.say(told if said else "Type something.")

    def _failed(self, error: Exception) -> None:
        self.message.text = f"No answer: {error}"

    def draw(self) -> None:
        """Draw all cards from the newest answers."""
        for model in self.chosen.ticked:
            if model in self.answers:
                card = text_card(model, self.answers[model], self.heads.look(), self.start)
                self.chosen.show(model, card)

    def stop(self) -> None:
        """Stop all work, because the window is closed."""
        self.newest.stop()
        self.status.stop()


def _names(models: list[TextModel]) -> dict[TextModel, str]:
    return {model: model.name for model in models}


def _answers(request: Request) -> dict[Any, TextAnswer | None]:
    return {model: model.answer(request.prompt) for model in request.models}


def _likeliest(probabilities: torch.Tensor) -> int:
    return int(probabilities.argmax())


def _sampled(probabilities: torch.Tensor) -> int:
    return int(torch.multinomial(probabilities, 1))
