"""Text as a data set for language models: tokenised once, then read in windows of one context.

This and `documents`, `shards` are our own and not maps of Hugging Face's `datasets`, which starts a
shard again after an interruption and reads each document whole. Its messages name no position in a
broken file, and its cache took half as much disk again and half as much time again in a trial.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor

from ...utils.words import shortened
from .documents import ENCODING, Piece, Place, Scan, pieces, places, scan
from .order import seed_of
from .parts import Part
from .progress import ByteProgress
from .shards import FORMAT, INDEX, SHARD, Shards, index_tokens, write_shards
from .text_options import TextOptions
from .tokenizers import (
    end_token,
    hash_of,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    vocab_size,
)

__all__ = ["Part", "TextOptions", "Windows", "documents_of", "load_tokenizer", "open_text"]

IGNORED = -100  # the target at a position that has none


def open_text(
    options: TextOptions,
    part: Part,
    seed: int,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
) -> Windows:
    """Open a part of the text, and tokenise it first if that has not been done.

    The folder of the tokens follows from the content of the sources, the tokenizer and the options.
    If a source has changed, its part is tokenised again, and a warning names the source. Several
    processes may open the same part at the same time.

    Args:
        options: where the text comes from.
        part: the part to open. Without `options.valid`, "valid" is held out of the training text.
        seed: decides which documents are held out.
        progress: whether to draw a progress bar on a terminal.
        tokenizer: replaces that of the options, for example with that of a checkpoint.

    Raises:
        ValueError: wrong sources, tokenizer or shards; the message names them.
        OSError: a file that cannot be read or written.
    """
    if options.format == "tokens":
        tokenizer = tokenizer or make_tokenizer(options.tokenizer)
        folder = _tokens_of(options, part, tokenizer, progress)
        return Windows(options, part, seed, tokenizer, Shards(folder, tokenizer, options.verify))
    text = _documents_of(options, part, seed, progress)
    tokenizer = tokenizer or _tokenizer(options, seed, progress)
    end = end_token(tokenizer, options.tokenizer.end)
    folder = options.root / _key(text.content, hash_of(tokenizer), end, FORMAT, SHARD)
    with _locked(folder), ByteProgress(f"Tokenising {part}", text.bytes, progress) as advance:
        write_shards(
            folder,
            iter(text),
            tokenizer,
            end,
            text.documents,
            tuple(source.name for source in text.scan.good),
            options.workers or os.cpu_count() or 1,
            advance=advance,
            check=text.check_unchanged,
        )
    return Windows(options, part, seed, tokenizer, Shards(folder, tokenizer, options.verify))


def _tokens_of(options: TextOptions, part: Part, tokenizer: Tokenizer, progress: bool) -> Path:
    """The folder that describes a part's file of tokens, which is read if it has changed."""
    (name,) = getattr(options, part) or (None,)
    if name is None:
        raise ValueError(f"{part}: got none, want a file of tokens")
    file = Path(name).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{part}: there is no file {name}")
    end, state = end_token(tokenizer, options.tokenizer.end), file.stat()
    stamp = str(file), state.st_size, state.st_mtime_ns
    folder = options.root / _key(stamp, hash_of(tokenizer), end, FORMAT)
    title = f"Reading {part}"
    with _locked(folder), ByteProgress(title, state.st_size, progress) as advance:
        if not (folder / INDEX).exists():
            index_tokens(folder, file, tokenizer, end, advance)
    return folder


class Windows(torch.utils.data.Dataset[Tensor]):
    """The windows of one part. Where a window begins depends on the seed, the epoch and the index.

    In evaluation the windows follow each other without overlap, so every token is predicted once,
    from the tokens before it in its window. The last window is filled up with -100.

    The mean loss over all windows of an evaluation, times tokens / bytes, is exactly the loss per
    byte. Over some of the windows, or in training, it is an estimate.

    Attributes:
        vocab_size: the size of the tokenizer's vocabulary.
        tokens: the number of tokens that are predicted, with the ends of documents.
        bytes: the number of bytes of UTF-8 that these tokens stand for.
        documents: the number of documents.
        end: the token before and after each document.
    """

    def __init__(
        self, options: TextOptions, part: Part, seed: int, tokenizer: Tokenizer, shards: Shards
    ) -> None:
        self.options = options
        self.part: Part = part
        self.seed = seed
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size(tokenizer)
        self.tokens = len(shards) - 1  # the first token, an end, is never predicted
        self.bytes = shards.index.bytes
        self.documents = shards.index.documents
        self.end = shards.index.end
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
        # one context less, so that each epoch can begin anywhere in the first context
        return max(1, (self.tokens + 1) // context - 1)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """(epoch, index) -> int64 [context + 1]. Every token except the first is a target."""
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


def documents_of(tokens: Tensor, end: int) -> Tensor:
    """The document of each token of a window, as the models of this library take it.

    Args:
        tokens: int64 [..., length].
        end: the token between documents, which is the first token of the document after it.

    Returns:
        int64 [..., length], which rises by one at each end token.
    """
    return (tokens == end).cumsum(-1)


# -- the documents of a part -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """The documents of a part.

    part: the part that the sources belong to; held-out documents come from "train".
    places: the sources that are used.
    scan: what the sources contain.
    kept: which documents of the sources belong to this part, bool [documents]; None is all.
    division: the numbers that `kept` was computed from.
    """

    options: TextOptions
    part: Part
    places: list[Place]
    scan: Scan
    kept: npt.NDArray[np.bool_] | None
    division: tuple[Any, ...]

    def __iter__(self) -> Iterator[Piece]:
        first = 0
        for place, source in zip(self.places, self.scan.good, strict=True):
            for piece in pieces(place):
                if self.kept is None or self.kept[first + piece.document]:
                    yield piece._replace(document=first + piece.document)
            first += source.documents

    @cached_property
    def content(self) -> str:
        """A hash of everything, except the tokenizer, that the tokens depend on."""
        options = self.options
        texts = [source.sha256 for source in self.scan.good]
        return _key(texts, self.division, options.format, options.documents)

    @property
    def documents(self) -> int:
        return self.scan.documents if self.kept is None else int(self.kept.sum())

    @property
    def bytes(self) -> int:
        """The estimated size in bytes of UTF-8."""
        return self.scan.bytes * self.documents // self.scan.documents

    def check_unchanged(self) -> None:
        """Check that the sources are still those that were scanned.

        Raises:
            ValueError: a source has changed.
        """
        now = {place.name: place.stamp for place in places(self.options, self.part)}
        changed = [place.name for place in self.places if now.get(place.name) != place.stamp]
        if changed:
            raise ValueError(f"{self.part}: {shortened(changed)} changed while being tokenised")


def _documents_of(options: TextOptions, part: Part, seed: int, progress: bool) -> _Text:
    """Find the sources of a part, and read what has not been read before."""
    held_out = part == "valid" and options.valid is None
    if held_out and not options.holdout:
        raise ValueError("valid: got none and a holdout of 0, want one of them")
    source: Part = "train" if held_out else part
    found = places(options, source)
    if source != "train" and options.format != "hub":
        train = _real_paths(options, "train")
        if same := [place.name for place in found if os.path.realpath(place.name) in train]:
            raise ValueError(f"{part}: {shortened(same)} is in train too")
    names = [place.name for place in found]
    # the encoding makes files that were scanned before their byte order mark was removed new ones
    key = _key(names, options.documents, options.text_column, options.bad, FORMAT, ENCODING)
    file = options.root / "scans" / f"{key}.json"
    try:
        with _locked(file), ByteProgress(f"Reading {source}", None, progress) as advance:
            whole, changed = scan(found, options.bad, file, advance)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if changed:
        warnings.warn(f"{source}: {shortened(changed)} changed; tokenised again", stacklevel=3)
    if bad := [str(one.bad) for one in whole.sources if one.bad]:
        warnings.warn(f"{source}: left out: {shortened(bad)}", stacklevel=3)
    good = {one.name for one in whole.good}
    if not good:
        raise ValueError(f"{source}: there is no text in it: {shortened(bad)}")
    kept: npt.NDArray[np.bool_] | None = None
    division: tuple[Any, ...] = ()
    if source == "train" and options.valid is None and options.holdout:
        mask = _choose_held_out(whole.documents, options.holdout, seed)
        kept, division = mask if held_out else ~mask, (held_out, options.holdout, seed)
    usable = [place for place in found if place.name in good]
    return _Text(options, source, usable, whole, kept, division)


def _real_paths(options: TextOptions, part: Part) -> set[str]:
    try:
        return {os.path.realpath(place.name) for place in places(options, part)}
    except ValueError:  # evaluation needs no training part
        return set()


def _choose_held_out(documents: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose the documents to hold out, bool [documents], by hashes of their numbers."""
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
    """A number from 0 to 1 that depends on all of these values."""
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _tokenizer(options: TextOptions, seed: int, progress: bool) -> Tokenizer:
    """Make the tokenizer, or train it on the training part once and load it from then on."""
    chosen = options.tokenizer
    if not chosen.is_trained:
        return make_tokenizer(chosen)
    text = _documents_of(options, "train", seed, progress)
    key = _key(text.content, chosen.model_dump())
    file = options.root / "tokenizers" / f"{key}.json"
    with _locked(file), ByteProgress("Training the tokenizer", text.bytes, progress) as advance:
        if not file.exists():
            save_tokenizer(make_tokenizer(chosen, _texts(text, advance)), file)
        return load_tokenizer(file)


def _texts(text: _Text, advance: Callable[[int], object]) -> Iterator[str]:
    """The text that a tokenizer is trained on: all of it, or for a BPE about `limit` bytes."""
    chosen = text.options.tokenizer
    share = chosen.limit / text.bytes if chosen.kind == "bpe" else 1.0
    for n, piece in enumerate(text):
        if not n or share >= 1 or _uniform("tokenizer", n) < share:
            yield piece.text
        advance(len(piece.text))


# -- keys and locks ------------------------------------------------------------------------------


def _key(*of: Any) -> str:
    """A name for a file, as a hash of all of these values."""
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:24]


def _locked(path: Path) -> FileLock:
    """A lock on a path, which one process at a time can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")
