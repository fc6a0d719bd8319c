"""Documents in text files, in Parquet files and on the Hugging Face hub, read piece by piece."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from pydantic import ValidationError

from ...utils.files import write_whole
from ..config import Options
from .parts import Part
from .progress import bars_on_terminals
from .text_options import TextOptions
from .transform import find

__all__ = ["ENCODING", "Piece", "Place", "Scan", "Source", "pieces", "places", "scan"]

PIECE = 2**17  # characters; a longer document is tokenised in pieces, and no token spans two pieces
BLOCK = 2**17  # bytes that are read at once; `documents` is matched against the first so many bytes
ENCODING = "utf-8-sig"  # UTF-8, of which a byte order mark at the beginning is not text

# The number of a document within its place, and a part of its text.
Fragment = tuple[int, str]


class Piece(NamedTuple):
    """A document, or a part of a long one. A part ends at the end of a line if possible.

    document: the number of the document within its place; empty documents are not counted.
    text: the text of the piece.
    ends: whether the piece is the last one of its document.
    """

    document: int
    text: str
    ends: bool


@dataclass(frozen=True)
class Place:
    """A file or table with documents.

    name: its path or the name of the data set.
    stamp: a text that changes when the content may have changed.
    read: reads the text. It raises ValueError, without the name, for content that is not text.
    """

    name: str
    stamp: str
    read: Callable[[], Iterator[Fragment]]


class Source(Options):
    """The content of a place, as one reading found it.

    name, stamp: those of the place.
    sha256: a hash of the text and of where its documents end.
    documents, bytes: how many documents there are, and how many bytes of UTF-8 they have.
    bad: why the place is not used, or None.
    """

    name: str
    stamp: str
    sha256: str = ""
    documents: int = 0
    bytes: int = 0
    bad: str | None = None


class Scan(Options):
    """The content of all places of a part."""

    sources: tuple[Source, ...]

    @property
    def good(self) -> list[Source]:
        """The sources that are used."""
        return [source for source in self.sources if source.bad is None]

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.good)

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.good)


def pieces(place: Place) -> Iterator[Piece]:
    """Read the documents of a place in order, with at most one piece in memory.

    Raises:
        ValueError: content that is not text; the message names the place.
    """
    try:
        for document, (_, group) in enumerate(itertools.groupby(place.read(), itemgetter(0))):
            held, size = list[str](), 0
            for _, text in group:
                if size >= PIECE:
                    yield Piece(document, "".join(held), False)
                    held, size = [], 0
                held.append(text)
                size += len(text)
            yield Piece(document, "".join(held), True)
    except ValueError as error:
        raise ValueError(f"{place.name}: {error}") from None


def scan(
    given: list[Place], bad: str, file: Path, advance: Callable[[int], object]
) -> tuple[Scan, list[str]]:
    """Read the places that have changed since `file` was written, and write the result there.

    Args:
        given: the places.
        bad: "refuse" or "skip", what happens to a place without text.
        file: keeps the result between runs.
        advance: called with the number of bytes that were just read.

    Returns:
        The content of all places, and the names of those whose text has changed.

    Raises:
        ValueError: a place without text, if `bad` is "refuse".
    """
    try:
        before = {s.name: s for s in Scan.model_validate_json(file.read_bytes()).sources}
    except (OSError, ValidationError):  # the file only saves time
        before = {}
    sources, changed = [], []
    for place in given:
        source = before.get(place.name)
        if source is None or source.stamp != place.stamp:
            source = _scanned(place, advance)
            if place.name in before and before[place.name].sha256 != source.sha256:
                changed.append(place.name)
        if source.bad and bad == "refuse":
            raise ValueError(f"{source.bad}; bad=skip leaves such out")
        sources.append(source)
    result = Scan(sources=tuple(sources))
    if sources != list(before.values()):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda to: to.write_text(result.model_dump_json(), "utf-8"))
    return result, changed


def _scanned(place: Place, advance: Callable[[int], object]) -> Source:
    digest, documents, size = hashlib.sha256(), 0, 0
    try:
        for piece in pieces(place):
            text = piece.text.encode()
            digest.update(text)
            size += len(text)
            if piece.ends:
                digest.update(b"\xff")  # a byte that UTF-8 never contains
                documents += 1
            advance(len(text))
    except ValueError as error:
        return Source(name=place.name, stamp=place.stamp, bad=str(error))
    if not documents:
        return Source(name=place.name, stamp=place.stamp, bad=f"{place.name}: it is empty")
    return Source(
        name=place.name,
        stamp=place.stamp,
        sha256=digest.hexdigest(),
        documents=documents,
        bytes=size,
    )


# -- places of text -------------------------------------------------------------------------------


def places(options: TextOptions, part: Part) -> list[Place]:
    """The places that the options name for a part, each once, in natural order (2 before 10).

    Raises:
        ValueError: a part without places, or one of another format; the message names the part.
    """
    given = getattr(options, part)
    if given is None:
        raise ValueError(f"{part}: got none, want where its text is")
    try:
        if options.format == "hub":
            return [_hub(options, split) for split in given]
        files = dict.fromkeys(file for pattern in given for file in _files(options, pattern))
        make = _parquet if options.format == "parquet" else _file
        return [make(options, file) for file in files]
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None


def _files(options: TextOptions, pattern: str) -> list[Path]:
    if options.format == "parquet":
        found = find(pattern, (".parquet",))
    else:
        found = find(pattern, (*options.suffixes, ".gz"))
    named = Path(pattern).expanduser()
    wanted = [
        file for file in found
        if file == named or options.format == "parquet"
        or file.name.lower().removesuffix(".gz").endswith(options.suffixes)
    ]  # fmt: skip
    if not wanted:
        raise ValueError(f"{pattern}: no file in it ends in {' '.join(options.suffixes)} (or .gz)")
    return [Path(os.path.abspath(file)) for file in wanted]


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _file(options: TextOptions, file: Path) -> Place:
    return Place(str(file), _stamp(file), partial(_read_file, file, options.documents))


def _read_file(file: Path, documents: str) -> Iterator[Fragment]:
    """Read a file that is one document, or that starts one at each matching line."""
    packed = file.suffix.lower() == ".gz"
    with cast(IO[bytes], gzip.open(file) if packed else open(file, "rb")) as opened:
        try:
            if documents == "file":
                yield from ((0, block) for block in _blocks(opened))
                return
            begins, number, at_start = re.compile(documents), 0, True
            for block in _blocks(opened):
                for line in io.StringIO(block, newline="\n"):
                    match = begins.match(line) if at_start else None
                    at_start = line.endswith("\n")
                    if match:
                        number += 1
                        line = line[match.end() :]
                    if line:
                        yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"not a whole gzip file ({error})") from None


def _blocks(file: IO[bytes]) -> Iterator[str]:
    """Read a file in blocks of text. A block ends at the end of a line unless the line is long."""
    decoder, read = codecs.getincrementaldecoder(ENCODING)(), 0
    while True:
        raw = file.read(BLOCK)
        if raw and not raw.endswith(b"\n"):
            raw += file.readline(BLOCK)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = read + len(raw) - len(error.object) + error.start
            byte = error.object[error.start]
            raise ValueError(f"not UTF-8: byte 0x{byte:02x} at position {at}") from None
        read += len(raw)
        if text:
            yield text
        if not raw:
            return


def _parquet(options: TextOptions, file: Path) -> Place:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from None
    _check_column(str(file), schema, options.text_column)

    def read() -> Iterator[Fragment]:
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                batches = opened.iter_batches(1024, columns=[options.text_column])
                yield from _rows((batch.column(0) for batch in batches), options.bad)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"not a readable Parquet file ({error})") from None

    return Place(str(file), _stamp(file), read)


def _hub(options: TextOptions, split: str) -> Place:
    import datasets

    bars_on_terminals()
    name, column = f"{options.name}[{split}]", options.text_column
    try:
        table = datasets.load_dataset(
            str(options.name), options.subset, split=split, revision=options.revision
        )
    except (datasets.exceptions.DatasetsError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from None
    _check_column(name, table.features.arrow_schema, column)

    def read() -> Iterator[Fragment]:
        batches = table.select_columns([column]).with_format("arrow").iter(1024)
        columns = (chunk for batch in batches for chunk in batch.column(0).chunks)
        return _rows(columns, options.bad)

    return Place(name, fingerprint(table), read)


def fingerprint(table: Any) -> str:
    """A text that changes with the content of a data set. `datasets` has no public name for it."""
    return f"{table._fingerprint} {len(table)}"


def _check_column(name: str, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise ValueError(f"{name}: there is no column {column!r}; there are {schema.names}")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{name}: column {column!r} has {kind}, want strings")


def _rows(columns: Iterable[Any], bad: str) -> Iterator[Fragment]:
    """Read each row as a document. A row without text is bad."""
    for row, value in enumerate(value for column in columns for value in column):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            text, why = None, f"row {row} is not UTF-8 (byte {error.start} of it)"
        else:
            why = f"row {row} has no text"
        if text is None and bad == "refuse":
            raise ValueError(why)
        yield from ((row, part) for part in _parts(text or ""))


def _parts(text: str) -> Iterator[str]:
    """Divide a long text. A part ends at the end of a line unless the line is long."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE - 1, start + 2 * PIECE) + 1
        if len(text) - start <= PIECE:
            end = len(text)
        yield text[start : (end := end or start + 2 * PIECE)]
        start = end
