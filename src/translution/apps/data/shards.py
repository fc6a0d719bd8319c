"""Tokens on disk: one long sequence in files of equal length, which are mapped into memory.

A folder contains
    tokenizer.json    the tokenizer
    00000.bin …       the shards, little-endian uint16 or uint32
    index.json        a description; "whole" is true once the last shard is written
The only shard may also be a file elsewhere, which something else has written (`index_tokens`).
A file is written under a temporary name and renamed, so it is never there in part.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from tokenizers import Tokenizer

from ...utils.files import write_whole
from ..config import Options
from .documents import Piece
from .tokenizers import hash_of, save_tokenizer, token_bytes, vocab_size

__all__ = ["FORMAT", "INDEX", "SHARD", "Index", "Shard", "Shards", "index_tokens", "write_shards"]

FORMAT = 1
SHARD = 2**25  # tokens
INDEX, TOKENIZER = "index.json", "tokenizer.json"
BATCH = 2**17  # characters that a thread tokenises at once

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class Shard(Options):
    """One file of tokens.

    name: the file, in the folder or by its whole path. tokens: how many it has.
    sha256: a hash of its content.
    bytes: the size in UTF-8 of the pieces of text that begin in it.
    """

    name: str
    tokens: int
    bytes: int
    sha256: str


class Index(Options):
    """The description of a folder of shards.

    format: the version of this layout. dtype: that of the tokens.
    vocab_size, tokenizer: the size of the vocabulary and a hash of the tokenizer.
    end: the token before and after each document.
    names: the sources of the text. documents: how many there are.
    shard: the number of tokens in every shard except the last.
    pieces, written: how many pieces of text are complete, and how many tokens of the next piece
        are written. An interrupted call continues there.
    whole: whether the last shard is written.
    """

    format: int = FORMAT
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer: str
    end: int
    names: tuple[str, ...] = ()
    documents: int
    shard: int
    shards: tuple[Shard, ...] = ()
    pieces: int = 0
    written: int = 0
    whole: bool = False

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


# -- writing -------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    end: int,
    documents: int,
    names: tuple[str, ...] = (),
    workers: int = 1,
    shard: int = SHARD,
    advance: Callable[[int], object] = lambda bytes: None,
    check: Callable[[], object] = lambda: None,
) -> Index:
    """Tokenise pieces of text and write them as shards: end, document, end, document, …, end.

    A call that was interrupted continues after its last shard, if it gets the same pieces. The
    shards do not depend on the number of workers. Only one process may write a folder at a time.

    Args:
        folder: where to write; it is made if it is missing.
        pieces: the text.
        tokenizer: how it becomes tokens.
        end: the token before and after each document.
        documents: the number of documents that the pieces come from.
        names: the names of the sources, which the index keeps.
        workers: the number of threads. The tokenizer computes outside of Python's lock.
        shard: the number of tokens in every shard except the last.
        advance: called with the number of bytes of text that were just written.
        check: called before the index says that the folder is whole; it raises if it is not.

    Returns:
        The index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # otherwise every process that is forked later, such as a loader's, prints a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    vocab = vocab_size(tokenizer)
    index = Index(
        dtype="uint16" if vocab <= 2**16 else "uint32",
        vocab_size=vocab,
        tokenizer=hash_of(tokenizer),
        end=end,
        names=names,
        documents=documents,
        shard=shard,
    )
    if (folder / INDEX).exists():
        before = _read_index(folder)
        began = {"shards": (), "pieces": 0, "written": 0, "whole": False, "names": names}
        if before.model_copy(update=began) == index:
            index = before
    if index.whole:
        return index
    for remains in folder.glob(".*"):  # temporary files of a call that was killed
        remains.unlink()
    save_tokenizer(tokenizer, folder / TOKENIZER)
    dtype = _dtype(index)
    taken, written = index.pieces, index.written
    held = [] if index.shards else [np.array([end], dtype)]
    size, bytes_ = sum(map(len, held)), 0
    advance(index.bytes)

    def put(tokens: Tokens, pieces: int, written: int, whole: bool = False) -> Index:
        shards = index.shards
        if len(tokens):
            name = f"{len(shards):05d}.bin"
            write_whole(folder / name, lambda to: tokens.tofile(to))
            digest = hashlib.sha256(tokens.data).hexdigest()
            new = Shard(name=name, tokens=len(tokens), bytes=bytes_, sha256=digest)
            shards = (*shards, new)
        state = {"shards": shards, "pieces": pieces, "written": written, "whole": whole}
        changed = index.model_copy(update=state)
        text = changed.model_dump_json(indent=1)
        write_whole(folder / INDEX, lambda to: to.write_text(text, "utf-8"))
        return changed

    remaining = itertools.islice(pieces, taken, None)
    for tokens, length in _tokenised(remaining, tokenizer, end, dtype, workers):
        held.append(tokens[written:])
        size += len(tokens) - written
        bytes_ += 0 if written else length
        written = 0
        while size >= shard:
            flat = np.concatenate(held)
            held, size = [flat[shard:].copy()], size - shard
            if size:  # a part of this piece is left
                index = put(flat[:shard], taken, len(tokens) - size)
            else:
                index = put(flat[:shard], taken + 1, 0)
            bytes_ = 0
        taken += 1
        advance(length)
    check()
    return put(np.concatenate(held or [np.zeros(0, dtype)]), taken, 0, whole=True)


def _tokenised(
    pieces: Iterable[Piece], tokenizer: Tokenizer, end: int, dtype: np.dtype[Any], workers: int
) -> Iterator[tuple[Tokens, int]]:
    """The tokens of each piece, in order, and its size in bytes."""

    def work(batch: list[Piece]) -> list[tuple[Tokens, int]]:
        texts = [piece.text for piece in batch]
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            (np.array(one.ids + [end] * piece.ends, dtype), len(piece.text.encode()))
            for one, piece in zip(encoded, batch, strict=True)
        ]

    waiting = deque[Any]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in _batches(pieces):
                waiting.append(pool.submit(work, batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def index_tokens(
    folder: Path,
    file: Path,
    tokenizer: Tokenizer,
    end: int,
    advance: Callable[[int], object] = lambda bytes: None,
) -> Index:
    """Describe a file of tokens as the only shard of a folder. The file stays where it is.

    Args:
        folder: where the description is written; it is made if it is missing.
        file: tokens, little-endian uint16.
        tokenizer: the one that made them. The bytes of text are counted with it.
        end: the token after each document.
        advance: called with the number of bytes of the file that were just read.

    Raises:
        ValueError: an empty file, one with half a token, or tokens that the tokenizer lacks.
        OSError: the file cannot be read.
    """
    vocab, size = vocab_size(tokenizer), file.stat().st_size
    dtype = np.dtype(np.uint16).newbyteorder("<")
    if not size or size % dtype.itemsize:
        raise ValueError(f"{file}: got {size} bytes, want tokens of {dtype.itemsize} bytes each")
    counts, digest = np.zeros(2**16, np.int64), hashlib.sha256()
    tokens: Tokens = np.memmap(file, dtype, "r")
    for start in range(0, len(tokens), SHARD):
        part = tokens[start : start + SHARD]
        counts += np.bincount(part, minlength=len(counts))
        digest.update(part.data)
        advance(part.nbytes)
    used = np.flatnonzero(counts)
    if used[-1] >= vocab:
        raise ValueError(
            f"{file}: got token {used[-1]}, want less than {vocab}; tokenizer must be the one that "
            "made the file"
        )
    shard = Shard(
        name=str(file.resolve()),
        tokens=len(tokens),
        bytes=sum(int(counts[token]) * token_bytes(tokenizer, int(token)) for token in used),
        sha256=digest.hexdigest(),
    )
    index = Index(
        dtype="uint16", vocab_size=vocab, tokenizer=hash_of(tokenizer), end=end, names=(str(file),),
        documents=max(1, int(counts[end])) if end < len(counts) else 1, shard=len(tokens),
        shards=(shard,), whole=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    text = index.model_dump_json(indent=1)
    write_whole(folder / INDEX, lambda to: to.write_text(text, "utf-8"))
    return index


# -- reading -------------------------------------------------------------------------------------


class Shards:
    """The sequence of tokens in a folder. A copy in another process maps the files again.

    Args:
        folder: where `write_shards` or `index_tokens` wrote.
        tokenizer: the tokenizer that the shards must come from.
        verify: also check the hash of every shard.

    Raises:
        ValueError: a shard that is missing, of another length or (with `verify`) of another
            content; another format or tokenizer. The message names the file.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, verify: bool = False):
        self.folder = folder
        self.index = index = _read_index(folder)
        again = f"remove {folder} to tokenise again"
        for what, got, want in (
            ("tokenizer", index.tokenizer, hash_of(tokenizer)),
            ("vocab_size", index.vocab_size, vocab_size(tokenizer)),
        ):
            if got != want:
                raise ValueError(f"{folder / INDEX}: {what} is {got}, want {want}; {again}")
        if not index.whole:
            raise ValueError(f"{folder / INDEX}: tokenising was interrupted and has to be finished")
        lengths = [shard.tokens for shard in index.shards]
        full = all(n == index.shard for n in lengths[:-1])
        if not lengths or not full or not 0 < lengths[-1] <= index.shard:
            raise ValueError(f"{folder / INDEX}: shards of {lengths}, want {index.shard}; {again}")
        for shard in index.shards:
            path = folder / shard.name
            if not path.exists():
                raise ValueError(f"{path}: this shard is missing; {again}")
            got, want = path.stat().st_size, shard.tokens * _dtype(index).itemsize
            if got != want:
                raise ValueError(f"{path}: got {got} bytes, want {want}; {again}")
            if verify:
                digest = hashlib.sha256(np.memmap(path, np.uint8, "r").data).hexdigest()
                if digest != shard.sha256:
                    raise ValueError(f"{path}: its content has changed (SHA-256); {again}")
        self._maps: dict[int, Tokens] = {}

    def __len__(self) -> int:
        return self.index.tokens

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The tokens from `start` up to but without `stop`, int64 [stop - start].

        Raises:
            ValueError: positions outside of the sequence, or a token outside of the vocabulary; the
                message then names the shard.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: got {start}, {stop}, want within 0 to {len(self)}")
        tokens = np.empty(stop - start, np.int64)
        at = start
        while at < stop:
            number, first = divmod(at, self.index.shard)
            part = self._map(number)[first : first + stop - at]
            if part.max() >= self.index.vocab_size:
                raise ValueError(
                    f"{self.folder / self.index.shards[number].name}: got token {part.max()}, want "
                    f"less than {self.index.vocab_size}; remove {self.folder} to tokenise again"
                )
            tokens[at - start : at - start + len(part)] = part
            at += len(part)
        return tokens

    def _map(self, number: int) -> Tokens:
        if number not in self._maps:
            path = self.folder / self.index.shards[number].name
            self._maps[number] = np.memmap(path, _dtype(self.index), "r")
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


def _dtype(index: Index) -> np.dtype[Any]:
    return np.dtype(index.dtype).newbyteorder("<")


def _read_index(folder: Path) -> Index:
    path = folder / INDEX
    if not path.exists():
        raise ValueError(f"{path}: this file is missing; remove {folder} to tokenise again")
    try:
        index = Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path}: not the index of shards ({key or 'JSON'}: {first['msg']}); remove {folder} "
            "to tokenise again"
        ) from None
    if index.format != FORMAT:
        raise ValueError(
            f"{path}: format is {index.format}, want {FORMAT}; remove {folder} to tokenise again"
        )
    return index
