"""Measure text generation: the time of a new token with and without caches, and the bytes read.

`python -m translution.apps.bench.decoding` prints the table that docs/generation.md shows and
explains.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...models import GPT, gpt
from ...models.configuration import check_choice
from ...models.generation import generate
from ...models.mixers import mixer_names
from ...modules import RelativeLinear
from ...modules.attention import check_relative
from ...modules.cache import Cache
from ...modules.positions import RelativeBias
from ...utils.measuring import copy_rate, seconds_in_turn
from ...utils.tables import console_table
from ..training.devices import pick_device
from ..training.imports import import_files
from .common import check_file, header, keep, machine_line

__all__ = ["Decoding", "bytes_per_token", "main", "measure_decoding", "mixers_named"]

DEFAULT = "attention,rotary,bias,alpha,translution:v,translution"
TABLES = ("translution", "alpha")  # mixers with tables of projections
VOCAB = 256  # the tokens are bytes


@dataclass(frozen=True)
class Decoding:
    """A language model to measure while it generates the last tokens of its context.

    Attributes:
        mixer: the name of a causal mixer.
        relative: which of q, k and v are relative, for mixers with tables.
        context: the number of tokens of a full context.
        dim: the number of channels of a token.
        depth: the number of blocks.
        heads: the number of heads, a divisor of dim.
        tokens: the number of generated tokens that are timed.
    """

    mixer: str
    relative: str = "qkv"
    context: int = 160
    dim: int = 128
    depth: int = 4
    heads: int = 4
    tokens: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.tokens < self.context:
            raise ValueError(
                f"tokens: got {self.tokens}, want 1 to {self.context - 1}, fewer than the context"
            )

    @property
    def prompt(self) -> int:
        """The number of tokens before those that are timed."""
        return self.context - self.tokens

    def build(self) -> GPT:
        """Make the model, with random weights."""
        return gpt(
            mixer=self.mixer, relative=self.relative, context=self.context, vocab_size=VOCAB,
            dim=self.dim, depth=self.depth, heads=self.heads,
        ).eval()  # fmt: skip


def mixers_named(text: str) -> list[tuple[str, str]]:
    """Read mixers from a text such as "rotary,translution:kv".

    Args:
        text: names of mixers, separated by commas. A mixer with tables may be followed by a colon
            and the projections that are relative; without them, q, k and v are.

    Returns:
        The (mixer, relative) pairs.

    Raises:
        ValueError: a mixer is unknown or cannot be causal, or has no tables but a colon.
    """
    found = []
    for part in text.split(","):
        mixer, _, relative = part.strip().partition(":")
        check_choice("mixers", mixer, mixer_names(causal=True))
        if relative and mixer not in TABLES:
            raise ValueError(f"mixers: got {part.strip()!r}, but only {list(TABLES)} have tables")
        found.append((mixer, check_relative(relative) or "qkv"))
    return found


# -- counting: the bytes that a new token reads ----------------------------------------------------


class _Counting(Cache):
    """A cache that counts the bytes that are read from it."""

    read = 0

    def extend(self, name: str, x: Tensor) -> Tensor:
        kept = super().extend(name, x)
        self.read += _bytes(kept)
        return kept


@torch.no_grad()
def bytes_per_token(model: GPT, prompt: int, tokens: int) -> dict[str, float]:
    """Count the bytes that a model reads for one new token.

    Args:
        model: the language model.
        prompt: the number of tokens of the prompt.
        tokens: the number of tokens that follow the prompt, over which the mean is taken.

    Returns:
        Bytes per token: "shared", the weights that every token uses and one row of each embedding;
        "tables", the matrices of the offset classes that occur between the new token and the
        tokens before it; "caches", everything that is read from the caches, including the new
        token.
    """
    device = model.embed.weight.device
    caches = [_Counting(cache.reach) for cache in model.make_caches()]
    model.hidden(torch.zeros(1, prompt, dtype=torch.int64, device=device), caches)
    for cache in caches:
        cache.read = 0
    for _ in range(tokens):
        model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=device), caches)
    shared, tables = _bytes(*model.parameters()), 0.0
    for block in model.blocks:
        rows = sum(_classes(block.mixer.layout, prompt + i) for i in range(1, tokens + 1))
        for part in block.modules():
            if isinstance(part, RelativeLinear | RelativeBias):
                whole = _bytes(*part.parameters())
                shared -= whole
                tables += rows / tokens * whole / part.classes
    shared -= _bytes(model.embed.weight[1:])
    if model.positions is not None:
        shared -= _bytes(model.positions[:, 1:])
    return {
        "shared": shared,
        "tables": tables,
        "caches": sum(cache.read for cache in caches) / tokens,
    }


def _classes(layout: Any, length: int) -> int:
    """Return the number of offset classes between the last of `length` tokens and all of them."""
    index = layout.at(length).select(queries=(length - 1,)).index
    return len(index[index >= 0].unique())


def _bytes(*held: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in held)


# -- measuring -------------------------------------------------------------------------------------


class _Text:
    """A greedy continuation of one prompt.

    `begin` reads the prompt, and `go_on` then generates the tokens that are timed. Both can be
    called repeatedly.
    """

    def __init__(self, case: Decoding, model: GPT, cache: bool):
        self.case, self.model, self.cache = case, model, cache
        device = model.embed.weight.device
        self.ids = torch.arange(case.prompt, device=device)[None] % VOCAB
        self.stream: Iterator[Tensor] = iter(())

    def begin(self) -> None:
        """Start again: read the prompt and generate the token after it."""
        count = self.case.tokens + 1
        self.stream = generate(self.model, self.ids, count, temperature=0, cache=self.cache)
        next(self.stream)

    def go_on(self) -> None:
        """Generate the timed tokens."""
        for _ in range(self.case.tokens):
            next(self.stream)


def measure_decoding(
    cases: list[Decoding], device: torch.device, repeats: int = 3
) -> list[dict[str, Any]]:
    """Measure the generation of text for each case, with and without caches.

    The calls of all cases alternate. Each repeat reads the prompt again and then times all `tokens`
    together, so that every repeat does the same work. No text is longer than the context.

    Args:
        cases: the models to measure.
        device: the device that computes.
        repeats: the number of timed repeats; medians are reported.

    Returns:
        A row for each case with its fields ("relative" is None for mixers without tables) and:

        - "parameters": the number of parameters;
        - "prompt_seconds": the time of the prompt and the token after it;
        - "cached_seconds": the time of a token with caches;
        - "whole_seconds": the time of a token without caches;
        - "bytes": the result of `bytes_per_token`;
        - "copy_rate": the bytes per second that a copy reads and writes;
        - "bytes_share": the time to read "bytes" at "copy_rate", divided by "cached_seconds".
    """
    texts, rows = [], []
    for case in cases:
        torch.manual_seed(0)
        model = case.build().to(device)
        texts += [_Text(case, model, cache) for cache in (True, False)]
        row = {**vars(case), "prompt": case.prompt, "device": device.type}
        row["relative"] = case.relative if case.mixer in TABLES else None
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["bytes"] = bytes_per_token(model, case.prompt, case.tokens)
        rows.append(row)
    calls: list[Callable[[], None]] = [call for text in texts for call in (text.begin, text.go_on)]
    rates = [copy_rate(device)]
    times = iter(seconds_in_turn(calls, device, repeats))
    rates.append(copy_rate(device))  # before and after, as the speed of a machine drifts
    for case, row in zip(cases, rows, strict=True):
        row["prompt_seconds"], cached, _, whole = (next(times) for _ in range(4))
        row["cached_seconds"], row["whole_seconds"] = cached / case.tokens, whole / case.tokens
        row["copy_rate"] = sum(rates) / 2
        row["bytes_share"] = sum(row["bytes"].values()) / row["cached_seconds"] / row["copy_rate"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Make the table that is printed from the rows of `measure_decoding`."""
    heads = ["mixer", "M", "prompt, ms", "cached, ms", "whole, ms", "ratio", "MB read", "share"]
    lines = []
    for row in rows:
        cached, whole = row["cached_seconds"], row["whole_seconds"]
        lines.append(
            [
                row["mixer"] + (f" ({row['relative']})" if row["relative"] else ""),
                f"{row['parameters'] / 1e6:.1f}", f"{row['prompt_seconds'] * 1e3:.1f}",
                f"{cached * 1e3:.2f}", f"{whole * 1e3:.2f}", f"{whole / cached:.1f}",
                f"{sum(row['bytes'].values()) / 1e6:.1f}", f"{row['bytes_share']:.2f}",
            ]
        )  # fmt: skip
    caption = (
        "cached, whole: time per token with and without caches. ratio: whole / cached. MB read: "
        "per token with caches. share: the time to copy that many MB, as a fraction of cached."
    )
    return console_table(heads, lines, left=("mixer",), caption=caption)


def main(arguments: list[str] | None = None) -> None:
    """Measure the models, print the table, and write the rows to the file of --json.

    Args:
        arguments: the command-line arguments; None takes those of this process.
    """
    prog = "python -m translution.apps.bench.decoding"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--mixers", default=DEFAULT, help=f"mixers, such as rotary,translution:kv ({DEFAULT})"
    )
    for name, default, meaning in (
        ("context", 160, "tokens of the context"), ("dim", 128, "channels of a token"),
        ("depth", 4, "blocks"), ("heads", 4, "heads of each block"),
        ("tokens", 32, "timed tokens, the last ones of the context"),
        ("repeats", 3, "timed repeats; their median is reported"),
        ("threads", 0, "CPU threads; 0 leaves torch's default"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--device", default="auto", help="the device: auto, cpu, cuda or mps")
    parser.add_argument("--json", default="", metavar="FILE", help="a file for the rows")
    parser.add_argument(
        "--import", action="append", default=[], metavar="FILE", dest="imports",
        help="a Python file to execute first, which registers mixers; can be repeated",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        for name, least in (("repeats", 1), ("threads", 0)):
            if getattr(given, name) < least:
                raise ValueError(f"{name}: got {getattr(given, name)}, want at least {least}")
        check_file("json", given.json)
        import_files(given.imports)
        device = torch.device(pick_device(given.device))
        cases = [
            Decoding(
                mixer, relative, given.context, given.dim, given.depth, given.heads, given.tokens
            )
            for mixer, relative in mixers_named(given.mixers)
        ]
        with torch.device("meta"):
            for case in cases:
                case.build().make_caches()  # refuses what does not fit before anything runs
    except ValueError as error:
        parser.error(str(error))
    if given.threads:
        torch.set_num_threads(given.threads)
    console = Console()
    asked = sys.argv[1:] if arguments is None else arguments
    record = header(device, " ".join([prog, *asked]))
    console.print(f"{machine_line(record['machine'])}, {datetime.date.today()}", highlight=False)
    record["rows"] = rows = measure_decoding(cases, device, given.repeats)
    console.print(table(rows))
    rate = rows[0]["copy_rate"] / 1e9
    console.print(f"a plain copy reads and writes {rate:.1f} GB/s", highlight=False)
    keep(record, given.json)
    if given.json:
        console.print(f"written to {given.json}")


if __name__ == "__main__":
    main()
