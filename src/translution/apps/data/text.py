"""Text for language models: tokenised once, then read in windows of one context."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from tokenizers import Tokenizer
from torch import Tensor

from ...utils.words import some
from ..config import Options
from .documents import Piece, Place, Scan, pieces, places, scan
from .order import seed_of
from .progress import Bar
from .shards import FORMAT, SHARD, Shards, write_shards
from .tokenizers import (
    TokenizerOptions,
    end_token,
    hash_of,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    vocab_size,
)

__all__ = ["Part", "TextOptions", "Windows", "load_tokenizer", "open_text"]

Part = Literal["train", "valid", "test"]
IGNORED = -100  # a target that is none

# The keys that only some formats have.
KEYS = {
    "files": {"suffixes", "documents"},
    "parquet": {"text_column"},
    "hub": {"text_column", "name", "subset", "revision"},
}

Several = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class TextOptions(Options):
    """Where text comes from, and how it is read.

    format: "files" (of text, also gzip), "parquet" (with a column of documents), "hub" (a data set
        of the Hugging Face hub).
    train, valid, test: files, folders or globs, one or a list; of the hub, names of splits. Paths
        are relative to where the program runs. Without `valid`, the share `holdout` of train's
        documents is held out.
    suffixes: of the files that are taken from folders and globs, each also with .gz.
    documents: "file", or a regular expression for files with many documents: one begins at each
        line that begins with a match, and what it matches belongs to none. So "(?=Title: )" keeps
        the line, "-{5,}\\n" drops it, and "" makes each line a document.
    text_column: of Parquet and the hub. name, subset, revision: of a data set on the hub.
    context: tokens that a model sees.
    shards: the folder for tokens; null is translution/text in the user's cache.
    workers: threads that tokenise; null is one per core.
    windows: of an epoch of training. "disjoint" cuts the text into windows, from another place in
        each epoch; "random" takes `epoch_windows` from anywhere.
    bad: files that are not UTF-8 or empty (and rows without text) are refused, or left out.
    verify: check the hashes of the shards whenever they are opened.
    """

    kind: Literal["text"] = "text"
    format: Literal["files", "parquet", "hub"] = "files"
    train: Several
    valid: Several | None = None
    test: Several | None = None
    holdout: float = Field(0.1, ge=0, lt=1)
    suffixes: Several = (".txt", ".md", ".rst", ".py")
    documents: str = "file"
    text_column: str = "text"
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    context: PositiveInt
    tokenizer: TokenizerOptions = TokenizerOptions()
    shards: str | None = None
    workers: PositiveInt | None = None
    windows: Literal["disjoint", "random"] = "disjoint"
    epoch_windows: PositiveInt = 32_000
    bad: Literal["refuse", "skip"] = "refuse"
    verify: bool = False

    @model_validator(mode="after")
    def _check(self) -> TextOptions:
        if self.format == "hub" and self.name is None:
            raise ValueError("name: is missing; format 'hub' needs it")
        for key in sorted(set().union(*KEYS.values()) - KEYS[self.format]):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: got {value!r}, but format {self.format!r} has no such key"
                )
        for key, others in (("valid", self.train), ("test", self.train + (self.valid or ()))):
            if same := [value for value in getattr(self, key) or () if value in others]:
                raise ValueError(f"{key}: got {same[0]!r}, want other text than the parts before")
        if wrong := [s for s in self.suffixes if not s.startswith(".") or s != s.lower()]:
            raise ValueError(f"suffixes: got {wrong[0]!r}, want such as '.txt', in lower case")
        try:
            re.compile(self.documents)
        except re.error as error:
            raise ValueError(
                f"documents: got {self.documents!r}, want 'file' or a regular expression ({error})"
            ) from None
        return self

    @property
    def root(self) -> Path:
        if self.shards is not None:
            return Path(self.shards).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser() / "translution" / "text"


def open_text(
    options: TextOptions,
    part: Part,
    seed: int,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
) -> Windows:
    """A part of the text; tokenises it first where that has not been done.

    What is on disk goes by the content of the sources, the tokenizer and the options: changed
    sources are tokenised anew (with a warning that names them), and several processes may open
    the same. Where there is no `valid`, the seed decides what is held out. A tokenizer given here,
    such as a checkpoint's, takes the place of that of the options.

    Raises:
        ValueError: sources, a tokenizer or shards that are not what they should be, naming them.
        OSError: a file that cannot be read or written.
    """
    text = _read(options, part, seed, progress)
    tokenizer = tokenizer or _tokenizer(options, seed, progress)
    end = end_token(tokenizer, options.tokenizer.end)
    folder = options.root / _key(text.content, hash_of(tokenizer), end, FORMAT, SHARD)
    with _locked(folder), Bar(f"Tokenising {part}", text.bytes, progress) as advance:
        write_shards(
            folder,
            iter(text),
            tokenizer,
            end,
            text.documents,
            tuple(source.name for source in text.scan.good),
            options.workers or os.cpu_count() or 1,
            advance=advance,
            check=text.check,
        )
    return Windows(options, part, seed, tokenizer, Shards(folder, tokenizer, options.verify))


class Windows(torch.utils.data.Dataset[Tensor]):
    """Windows of one part; what is random in one depends on seed, epoch and index alone.

    In evaluation they lie end to end, so that each token is predicted once, given those before it
    in its window; the last window is filled up with -100.

    vocab_size: of the tokenizer. tokens: that can be predicted, ends of documents included. bytes:
    of UTF-8 that they stand for. So the mean loss over all windows of an evaluation times
    tokens / bytes is exactly the loss per byte; of a part of them, or of training, it is about it.
    """

    def __init__(
        self, options: TextOptions, part: Part, seed: int, tokenizer: Tokenizer, shards: Shards
    ) -> None:
        self.options = options
        self.part: Part = part
        self.seed = seed
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size(tokenizer)
        self.tokens = len(shards) - 1  # the first is an end, that begins the text
        self.bytes = shards.index.bytes
        self.documents = shards.index.documents
        self.shards = shards
        if part == "train" and self.tokens < options.context:
            raise ValueError(
                f"train: got {self.tokens} tokens, want at least one context of {options.context}"
            )

    def __len__(self) -> int:
        context = self.options.context
        if self.part != "train":
            return -(-self.tokens // context)
        if self.options.windows == "random":
            return self.options.epoch_windows
        # a context less, so that each epoch can begin anywhere in the first
        return max(1, (self.tokens + 1) // context - 1)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """(epoch, index) -> int64 [context + 1], each token but the first a target."""
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, want 0 to {len(self) - 1}")
        context = self.options.context
        start = index * context
        if self.part == "train" and self.options.windows == "random":
            start = seed_of(self.seed, epoch, index) % (self.tokens - context + 1)
        elif self.part == "train":
            shifts = min(context, self.tokens - len(self) * context + 1)
            start += seed_of(self.seed, epoch) % shifts
        stop = min(start + context, self.tokens) + 1
        window = torch.full((context + 1,), IGNORED, dtype=torch.int64)
        window[: stop - start] = torch.from_numpy(self.shards.read(start, stop))
        return window


# -- what a part consists of ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """The documents of a part; kept: which of those that the sources have, None is all."""

    options: TextOptions
    part: Part  # the sources'
    found: list[Place]
    scan: Scan
    kept: npt.NDArray[np.bool_] | None
    division: tuple[Any, ...]  # what `kept` follows from

    def __iter__(self) -> Iterator[Piece]:
        first = 0
        for place, source in zip(self.found, self.scan.good, strict=True):
            for piece in pieces(place):
                if self.kept is None or self.kept[first + piece.document]:
                    yield piece._replace(document=first + piece.document)
            first += source.documents

    @cached_property
    def content(self) -> str:
        """Of which the tokens are a function, given the tokenizer."""
        options = self.options
        texts = [source.sha256 for source in self.scan.good]
        return _key(texts, self.division, options.format, options.documents)

    @property
    def documents(self) -> int:
        return self.scan.documents if self.kept is None else int(self.kept.sum())

    @property
    def bytes(self) -> int:
        """About."""
        return self.scan.bytes * self.documents // self.scan.documents

    def check(self) -> None:
        """The sources are still those that were scanned."""
        now = {place.name: place.stamp for place in places(self.options, self.part)}
        changed = [place.name for place in self.found if now.get(place.name) != place.stamp]
        if changed:
            raise ValueError(f"{self.part}: {some(changed)} changed while being tokenised")


def _read(options: TextOptions, part: Part, seed: int, progress: bool) -> _Text:
    held = part == "valid" and options.valid is None
    if held and not options.holdout:
        raise ValueError("valid: got none and a holdout of 0, want one of them")
    source: Part = "train" if held else part
    found = places(options, source)
    if source != "train" and options.format != "hub":
        train = _real_paths(options, "train")
        if same := [place.name for place in found if os.path.realpath(place.name) in train]:
            raise ValueError(f"{part}: {some(same)} is in train too")
    names = [place.name for place in found]
    key = _key(names, options.documents, options.text_column, options.bad, FORMAT)
    file = options.root / "scans" / f"{key}.json"
    try:
        with _locked(file), Bar(f"Reading {source}", None, progress) as advance:
            whole, changed = scan(found, options.bad, file, advance)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if changed:
        warnings.warn(f"{source}: {some(changed)} changed; tokenised anew", stacklevel=3)
    if bad := [str(one.bad) for one in whole.sources if one.bad]:
        warnings.warn(f"{source}: left out: {some(bad)}", stacklevel=3)
    good = {one.name for one in whole.good}
    if not good:
        raise ValueError(f"{source}: there is no text in it: {some(bad)}")
    kept: npt.NDArray[np.bool_] | None = None
    division: tuple[Any, ...] = ()
    if source == "train" and options.valid is None and options.holdout:
        mask = _held_out(whole.documents, options.holdout, seed)
        kept, division = mask if held else ~mask, (held, options.holdout, seed)
    usable = [place for place in found if place.name in good]
    return _Text(options, source, usable, whole, kept, division)


def _real_paths(options: TextOptions, part: Part) -> set[str]:
    try:
        return {os.path.realpath(place.name) for place in places(options, part)}
    except ValueError:  # an evaluation can do without the training part
        return set()


def _held_out(documents: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """By hashes, which no version of a library changes: the parts must stay disjoint."""
    count = max(1, round(documents * share))
    if count >= documents:
        raise ValueError(
            f"train: got {documents} documents, want more than the {count} held out; name other "
            "text as valid, or divide the files with documents"
        )
    chosen = heapq.nsmallest(count, range(documents), key=lambda n: _uniform("held", seed, n))
    mask = np.zeros(documents, bool)
    mask[chosen] = True
    return mask


def _uniform(*of: Any) -> float:
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _tokenizer(options: TextOptions, seed: int, progress: bool) -> Tokenizer:
    """Made, loaded, or trained on the training part once."""
    chosen = options.tokenizer
    if not chosen.trained:
        return make_tokenizer(chosen)
    text = _read(options, "train", seed, progress)
    key = _key(text.content, chosen.model_dump())
    file = options.root / "tokenizers" / f"{key}.json"
    with _locked(file), Bar("Training the tokenizer", text.bytes, progress) as advance:
        if not file.exists():
            save_tokenizer(make_tokenizer(chosen, _texts(text, advance)), file)
        return load_tokenizer(file)


def _texts(text: _Text, advance: Callable[[int], object]) -> Iterator[str]:
    """What a tokenizer is trained on: all characters, or for a BPE about `limit` bytes."""
    chosen = text.options.tokenizer
    share = chosen.limit / text.bytes if chosen.kind == "bpe" else 1.0
    for n, piece in enumerate(text):
        if not n or share >= 1 or _uniform("tokenizer", n) < share:
            yield piece.text
        advance(len(piece.text))


# -- small things --------------------------------------------------------------------------------


def _key(*of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]


def _locked(path: Path) -> FileLock:
    """For one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")
