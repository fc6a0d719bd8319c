"""The command `translution generate`: text from a trained language model, shown as it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ...models.generation import generate as continued
from ...models.language_model import GPT
from .import_option import ImportOption

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextStream", "generate", "write_samples"]


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, or a checkpoint's, of a language model.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads standard input.")] = "",
    prompt_file: Annotated[str, typer.Option(help="A UTF-8 file with the text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(help="The largest number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from the k most likely tokens; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the most likely tokens that together reach this probability."),
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text, or at this token. Can be repeated."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="The seed of the first sample; the next has seed + 1.")
    ] = 0,
    samples: Annotated[int, typer.Option(help="The number of texts.")] = 1,
    slide: Annotated[
        int,
        typer.Option(
            help="How many tokens to forget when the context is full: 1 to all, or -1 for a "
            "quarter. 0 forgets none, for a model without a limit (with buckets or windows, and "
            "without absolute positions)."
        ),
    ] = -1,
    echo: Annotated[bool, typer.Option(help="Write the prompt before the text.")] = False,
    cache: Annotated[
        bool, typer.Option(help="Keep keys and values. Without, every token computes all again.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    imports: ImportOption = None,
) -> None:
    """Continue a text with a trained language model."""
    from .checkpoints import open_checkpoint
    from .devices import pick_device

    _check(
        samples=(samples, samples >= 1, "at least 1"),
        max_tokens=(max_tokens, max_tokens >= 0, "0 or more"),
        temperature=(temperature, 0 <= temperature < math.inf, "0 (the likeliest) or more"),
        top_k=(top_k, top_k >= 0, "0 (all) or more"),
        top_p=(top_p, 0 < top_p <= 1, "more than 0, at most 1 (all)"),
        slide=(slide, slide >= -1, "1 to the context, 0 (none) or -1 (a quarter)"),
        stop=("an empty text", "" not in (stop or []), "one character at least"),
        seed=(seed, seed >= -(2**63) and seed + samples <= 2**64, "an integer of 64 bits"),
    )
    for name, texts in (("prompt", [prompt]), ("stop", stop or [])):
        for given in texts:
            if not _is_unicode(given):
                raise ValueError(f"{name}: got {given!a}, want UTF-8")
    where = torch.device(pick_device(device))
    text = read_prompt(prompt, prompt_file)
    opened = open_checkpoint(checkpoint)
    model, tokenizer = opened.model, opened.tokenizer
    if not isinstance(model, GPT) or tokenizer is None:
        has = type(model).__name__ + ("" if tokenizer else " without a tokenizer")
        raise ValueError(f"{checkpoint}: holds a {has}, want a language model with its tokenizer")
    write_samples(
        model.to(where), tokenizer, text, sys.stdout.write, sys.stdout.flush,
        seeds=range(seed, seed + samples), stop=stop or [], echo=echo,
        max_new_tokens=max_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p,
        slide=None if slide == -1 else slide, cache=cache,
    )  # fmt: skip


def _check(**options: tuple[Any, bool, str]) -> None:
    """Check options before anything is loaded: name=(value, is it valid, what is wanted)."""
    for name, (got, right, want) in options.items():
        if not right:
            raise ValueError(f"{name}: got {got}, want {want}")


def _is_unicode(text: str) -> bool:
    """Whether a text of the command line was UTF-8: other bytes become surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_prompt(prompt: str, prompt_file: str) -> str:
    """Read the text to continue from the option, from standard input or from a file.

    Raises:
        ValueError: two sources or none, or a source that is empty or not UTF-8.
        OSError: a file that cannot be read.
    """
    if bool(prompt) == bool(prompt_file):
        raise ValueError("prompt: want one of --prompt TEXT, --prompt - and --prompt-file FILE")
    if prompt and prompt != "-":
        return prompt
    source = prompt_file or "stdin"
    data = Path(prompt_file).read_bytes() if prompt_file else sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}") from None
    if not text:
        raise ValueError(f"{source}: is empty, want a text to continue")
    return text


def write_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    write: Callable[[str], object],
    flush: Callable[[], object] = lambda: None,
    seeds: Iterable[int] = (0,),
    stop: Iterable[str] = (),
    echo: bool = False,
    **options: Any,
) -> None:
    """Write a continuation for each seed, piece by piece, with lines of --- between them.

    Args:
        model, tokenizer: a language model and its tokenizer.
        prompt: the text to continue.
        write: called with each piece of text.
        flush: called after each piece.
        seeds: one per continuation.
        stop: texts that end a continuation. If one is a token, that token ends it too.
        echo: whether to write the prompt first.
        options: further arguments of `translution.models.generation.generate`.

    Raises:
        ValueError: a prompt without tokens, an empty text in `stop`, or wrong options.
    """
    stops = list(stop)
    if "" in stops:
        raise ValueError("stop: got an empty text, want one character at least")
    ends = {token for text in stops if (token := tokenizer.token_to_id(text)) is not None}
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError(f"prompt: got {prompt!r}, which has no token, want one at least")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    for number, seed in enumerate(seeds):
        made = continued(model, tokens, seed=seed, stop=ends, **options)
        if number:
            write("\n\n---\n\n")
        if echo:
            write(prompt)
        for piece in TextStream(tokenizer, ids, stops).pieces(int(token) for token in made):
            write(piece)
            flush()
    write("\n")
    flush()


class TextStream:
    """Decodes tokens one by one into text.

    The bytes of a character may be spread over several tokens, and some decoders write a space only
    between two tokens. Therefore new tokens are decoded together with a few earlier ones. Their
    text is returned once it no longer ends in an incomplete character, and once it can no longer
    become a stop text.

    Args:
        tokenizer: decodes the tokens.
        before: the tokens in front of the first one.
        stop: texts that end the stream. They are not returned.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), stop: Iterable[str] = ()):
        self.tokenizer, self.stop = tokenizer, list(stop)
        self.known = list(before)[-CONTEXT:]  # tokens whose text has been returned
        self.fresh: list[int] = []

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of the tokens in pieces, up to the first stop text."""
        held = ""
        for token in tokens:
            self.fresh.append(token)
            held += self._text(whole=True)
            if (end := self._stopped(held)) is not None:
                yield held[:end]
                return
            out = len(held) - self._hold(held)
            if out:
                yield held[:out]
                held = held[out:]
        held += self._text(whole=False)
        held = held[: self._stopped(held)]
        if held:
            yield held

    def _text(self, whole: bool) -> str:
        """The text of the new tokens. With `whole`, it is "" while a character is incomplete."""
        known = self.tokenizer.decode(self.known)
        both = self.tokenizer.decode(self.known + self.fresh)
        if whole and both.endswith(BROKEN):
            return ""
        self.known, self.fresh = (self.known + self.fresh)[-CONTEXT:], []
        return both[len(known) :]

    def _stopped(self, text: str) -> int | None:
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)

    def _hold(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a stop text."""
        lengths = range(min(len(text), max(map(len, self.stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.stop)), 0)


BROKEN = "\ufffd"  # decoders write it for bytes that are not a character
CONTEXT = 8  # how many earlier tokens are decoded with the new ones
