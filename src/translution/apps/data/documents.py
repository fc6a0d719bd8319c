"""Text documents from files, Parquet and the Hugging Face hub, read as a stream, piece by piece."""

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
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from pydantic import ValidationError

from ...utils.files import write_whole
from ..config import Options
from .transform import find

if TYPE_CHECKING:
    from .text import Part, TextOptions

__all__ = ["Piece", "Place", "Scan", "Source", "pieces", "places", "scan"]

PIECE = 2**17  # characters; a longer document is tokenised in pieces, which no token joins
BLOCK = 2**17  # bytes that are read at once, and most that is seen of a line to find its document

# The number of a document within its place, and some of its text.
Fragment = tuple[int, str]


class Piece(NamedTuple):
    """A document, or of a long one a part that ends with a line where it can."""

    document: int  # its number within its place; empty documents do not count
    text: str
    ends: bool  # whether the document ends with it


@dataclass(frozen=True)
class Place:
    """A file or table that documents stand in.

    stamp: another one where the content may have changed.
    read: its text. Raises ValueError, without the name, for what is not text.
    """

    name: str
    stamp: str
    read: Callable[[], Iterator[Fragment]]


class Source(Options):
    """What a place was found to hold. sha256: of the text and where its documents end.
    bad: why none of it is used."""

    name: str
    stamp: str
    sha256: str = ""
    documents: int = 0
    bytes: int = 0
    bad: str | None = None


class Scan(Options):
    """All that a part's places hold."""

    sources: tuple[Source, ...]

    @property
    def good(self) -> list[Source]:
        return [source for source in self.sources if source.bad is None]

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.good)

    @property
    def bytes(self) -> int:
        return sum(source.bytes for source in self.good)


def pieces(place: Place) -> Iterator[Piece]:
    """The documents of a place in order, never more than a piece of one in memory.

    Raises:
        ValueError: naming the place.
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
    found: list[Place], bad: str, file: Path, advance: Callable[[int], object]
) -> tuple[Scan, list[str]]:
    """Read everything once, except what has the stamp that it had when `file` was written.

    Also returns the names of what was there before with another text. advance: is told of bytes.

    Raises:
        ValueError: a place without text or with something else, if bad is "refuse".
    """
    try:
        before = {s.name: s for s in Scan.model_validate_json(file.read_bytes()).sources}
    except (OSError, ValidationError):  # it only saves time
        before = {}
    sources, changed = [], []
    for place in found:
        source = before.get(place.name)
        if source is None or source.stamp != place.stamp:
            source = _scanned(place, advance)
            if place.name in before and before[place.name].sha256 != source.sha256:
                changed.append(place.name)
        if source.bad and bad == "refuse":
            raise ValueError(f"{source.bad}; bad=skip leaves such out")
        sources.append(source)
    all_of_it = Scan(sources=tuple(sources))
    if sources != list(before.values()):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda to: to.write_text(all_of_it.model_dump_json(), "utf-8"))
    return all_of_it, changed


def _scanned(place: Place, advance: Callable[[int], object]) -> Source:
    digest, documents, size = hashlib.sha256(), 0, 0
    try:
        for piece in pieces(place):
            text = piece.text.encode()
            digest.update(text)
            size += len(text)
            if piece.ends:
                digest.update(b"\xff")  # which no UTF-8 has
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


# -- where text stands ---------------------------------------------------------------------------


def places(options: TextOptions, part: Part) -> list[Place]:
    """What the key of this name says, in natural order (2 before 10), each once.

    Raises:
        ValueError: nothing is there, or it is not what the format says, naming the part.
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
    """Of a file that is one document, or has one at each line that begins with a match."""
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
    """A file's text in blocks that end where lines end, unless a line is very long."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
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

    return Place(name, f"{table._fingerprint} {len(table)}", read)


def _check_column(name: str, schema: Any, column: str) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise ValueError(f"{name}: there is no column {column!r}; there are {schema.names}")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise ValueError(f"{name}: column {column!r} has {kind}, want strings")


def _rows(columns: Iterable[Any], bad: str) -> Iterator[Fragment]:
    """A row is a document; one without text is bad."""
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
    """A long text in parts that end where lines end, unless a line is very long."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE - 1, start + 2 * PIECE) + 1
        if len(text) - start <= PIECE:
            end = len(text)
        yield text[start : (end := end or start + 2 * PIECE)]
        start = end
