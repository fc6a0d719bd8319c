"""A new token of a text, with what layers hold of those before and without: time, and bytes read.

`python -m translution.apps.bench.decoding` prints the table that docs/generation.md keeps and
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
from ...models.blocks import IMAGE_MIXERS, MIXERS
from ...models.configuration import check_choice
from ...models.generation import generate
from ...modules import RelativeLinear
from ...modules.attention import check_relative
from ...modules.cache import Cache
from ...modules.positions import RelativeBias
from ...utils.measuring import copy_rate, seconds_in_turn
from ...utils.tables import console_table
from ..training.engine import pick_device
from .common import check_file, header, keep, machine_line

__all__ = ["Decoding", "bytes_per_token", "main", "measure_decoding", "mixers_named"]

DEFAULT = "attention,rotary,bias,alpha,translution:v,translution"
TABLES = ("translution", "alpha")
VOCAB = 256  # a text of bytes


@dataclass(frozen=True)
class Decoding:
    """One row of the table: a language model, and the last `tokens` of its full context.

    mixer: a causal one. relative: which of q, k, v have tables, where it has any. heads: a divisor
    of dim.
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
        """Tokens before those that are timed."""
        return self.context - self.tokens

    def build(self) -> GPT:
        return gpt(
            mixer=self.mixer, relative=self.relative, context=self.context, vocab_size=VOCAB,
            dim=self.dim, depth=self.depth, heads=self.heads,
        ).eval()  # fmt: skip


def mixers_named(text: str) -> list[tuple[str, str]]:
    """(mixer, relative) of names such as "rotary,translution:kv"; with tables and none named, qkv.

    Raises:
        ValueError: a mixer that is unknown or cannot be causal, or tables where it has none.
    """
    found = []
    for part in text.split(","):
        mixer, _, relative = part.strip().partition(":")
        check_choice("mixers", mixer, [name for name in MIXERS if name not in IMAGE_MIXERS])
        if relative and mixer not in TABLES:
            raise ValueError(f"mixers: got {part.strip()!r}, but only {list(TABLES)} have tables")
        found.append((mixer, check_relative(relative) or "qkv"))
    return found


# -- counted: what a new token reads ---------------------------------------------------------------


class _Counting(Cache):
    """A cache that counts the bytes it gives out."""

    read = 0

    def extend(self, name: str, x: Tensor) -> Tensor:
        kept = super().extend(name, x)
        self.read += _bytes(kept)
        return kept


@torch.no_grad()
def bytes_per_token(model: GPT, prompt: int, tokens: int) -> dict[str, float]:
    """Bytes that one new token reads, the mean over `tokens` that follow a prompt.

    Returns:
        "shared": all weights that every token takes, and one row of each embedding; "tables": of
        tables with a row per class, the rows whose class the token has pairs of; "caches": what
        they give out, the new token included, as often as they are asked.
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
    """How many different classes the last of so many tokens has pairs of."""
    index = layout.at(length).select(queries=(length - 1,)).index
    return len(index[index >= 0].unique())


def _bytes(*held: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in held)


# -- measured --------------------------------------------------------------------------------------


class _Text:
    """Greedy continuations of one prompt, begun anew by `begin`; `go_on` makes the timed tokens."""

    def __init__(self, case: Decoding, model: GPT, cache: bool):
        self.case, self.model, self.cache = case, model, cache
        device = model.embed.weight.device
        self.ids = torch.arange(case.prompt, device=device)[None] % VOCAB
        self.stream: Iterator[Tensor] = iter(())

    def begin(self) -> None:
        """Read the prompt, and make the token after it."""
        count = self.case.tokens + 1
        self.stream = generate(self.model, self.ids, count, temperature=0, cache=self.cache)
        next(self.stream)

    def go_on(self) -> None:
        for _ in range(self.case.tokens):
            next(self.stream)


def measure_decoding(
    cases: list[Decoding], device: torch.device, repeats: int = 3
) -> list[dict[str, Any]]:
    """A row for each case: median times of calls made in turn, all cases with and without caches.

    A repeat begins a text with a prompt, and then times its `tokens` together: they see prompt + 1
    to context tokens. So a repeat does the same work each time, and no slide is among it.

    Returns:
        the fields of each case ("relative" None without tables), its "parameters", seconds of the
        prompt and a token ("prompt_seconds"), of a token with caches ("cached_seconds") and without
        ("whole_seconds"), `bytes_per_token` as "bytes", the bytes per second of a plain copy
        ("copy_rate"), and "bytes_share": reading them at that rate over "cached_seconds".
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
    rates.append(copy_rate(device))  # machines drift: measured before and after
    for case, row in zip(cases, rows, strict=True):
        row["prompt_seconds"], cached, _, whole = (next(times) for _ in range(4))
        row["cached_seconds"], row["whole_seconds"] = cached / case.tokens, whole / case.tokens
        row["copy_rate"] = sum(rates) / 2
        row["bytes_share"] = sum(row["bytes"].values()) / row["cached_seconds"] / row["copy_rate"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """What is printed."""
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
    caption = "cached, whole: per token. share: of cached, what a copy of the MB read takes."
    return console_table(heads, lines, left=("mixer",), caption=caption)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and keep it if asked to."""
    prog = "python -m translution.apps.bench.decoding"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--mixers", default=DEFAULT, help="such as rotary,translution:kv")
    for name, default, meaning in (
        ("context", 160, "tokens of a full one"), ("dim", 128, "channels"), ("depth", 4, "blocks"),
        ("heads", 4, "of each block"), ("tokens", 32, "timed ones: the last of the context"),
        ("repeats", 3, "the median counts"), ("threads", 0, "0: torch's own choice"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", default="", metavar="FILE", help="also write the rows here")
    given = parser.parse_args(arguments)
    try:
        for name, least in (("repeats", 1), ("threads", 0)):
            if getattr(given, name) < least:
                raise ValueError(f"{name}: got {getattr(given, name)}, want at least {least}")
        check_file("json", given.json)
        device = torch.device(pick_device(given.device))
        cases = [
            Decoding(
                mixer, relative, given.context, given.dim, given.depth, given.heads, given.tokens
            )
            for mixer, relative in mixers_named(given.mixers)
        ]
        with torch.device("meta"):
            for case in cases:
                case.build()  # sizes that don't fit are refused before anything runs
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
