"""Shards: written once, in any number of threads and after any interruption the same."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from translution.apps.data.documents import Piece
from translution.apps.data.shards import Shards, write_shards
from translution.apps.data.tokenizers import TokenizerOptions, end_token, make_tokenizer, vocab_size

TOKENIZER = make_tokenizer(TokenizerOptions())
END = end_token(TOKENIZER, "<|endoftext|>")


def documents(n: int, seed: int = 0) -> list[str]:
    words = random.Random(seed)
    return ["".join(words.choices("abc é\n", k=words.randrange(1, 40))) for _ in range(n)]


def as_pieces(texts: list[str]) -> list[Piece]:
    return [Piece(i, text, True) for i, text in enumerate(texts)]


def write(folder: Path, texts: list[str], **options):
    options.setdefault("shard", 64)
    return write_shards(folder, as_pieces(texts), TOKENIZER, END, len(texts), **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expected(texts: list[str]) -> list[int]:
    return [END, *(token for text in texts for token in (*text.encode(), END))]


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1)), shard=st.integers(1, 50))
def test_the_sequence_is_the_documents_between_ends(texts, shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    index = write(folder, texts, shard=shard)
    shards, want = Shards(folder, TOKENIZER, verify=True), expected(texts)
    assert shards.read(0, len(shards)).tolist() == want
    assert index.bytes == sum(len(text.encode()) for text in texts)
    assert [s.tokens for s in index.shards[:-1]] == [shard] * (len(index.shards) - 1)
    for start in range(0, len(want), 7):  # also across shards
        assert shards.read(start, min(start + 9, len(want))).tolist() == want[start : start + 9]


def test_documents_in_pieces_have_no_end_within(tmp_path):
    pieces = [Piece(0, "ab", False), Piece(0, "c", True), Piece(1, "d", True)]
    write_shards(tmp_path, pieces, TOKENIZER, END, 2, shard=3)
    assert Shards(tmp_path, TOKENIZER).read(0, 7).tolist() == [END, 97, 98, 99, END, 100, END]


def test_any_number_of_workers_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("translution.apps.data.shards.BATCH", 100)
    texts = documents(300)
    for workers in (1, 2, 5):
        write(tmp_path / str(workers), texts, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "5")


@given(stop=st.integers(0, 60), again=st.integers(0, 60), shard=st.integers(3, 100))
def test_interrupted_it_goes_on(stop, again, shard, tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("shards"), documents(60)
    write(folder / "whole", texts, shard=shard)

    def until(n):
        yield from as_pieces(texts)[:n]
        raise KeyboardInterrupt

    done = 0
    for n in (stop, again):
        with pytest.raises(KeyboardInterrupt):
            write_shards(folder / "parts", until(n), TOKENIZER, END, len(texts), shard=shard)
        now = len(list((folder / "parts").glob("*.bin")))
        assert now >= done
        done = now
    told = []
    write(folder / "parts", texts, shard=shard, advance=told.append)
    assert sum(told) == pytest.approx(sum(len(t.encode()) for t in texts), abs=40 * 2)
    assert files(folder / "parts") == files(folder / "whole")


def test_killed_it_goes_on(tmp_path):
    """By SIGKILL, at moments that the process does not choose."""
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_shards import END, TOKENIZER, as_pieces, documents, write_shards
from translution.apps.data import shards
shards.BATCH = 500
texts = documents(4000)
def slowly():
    for i, piece in enumerate(as_pieces(texts)):
        if i % 40 == 0: time.sleep(0.005)
        yield piece
write_shards(Path({str(tmp_path / "parts")!r}), slowly(), TOKENIZER, END, len(texts), shard=512)
"""
    code = code.replace(
        "import sys", "import translution.apps.data.shards as s; s.BATCH = 500; import sys"
    )
    parts, seen = tmp_path / "parts", 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code])
        until = time.monotonic() + 60
        while len(list(parts.glob("[0-9]*.bin"))) < seen + 10 and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        seen = len(list(parts.glob("[0-9]*.bin")))
        assert seen >= 10
    times = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9]*.bin")}
    listed = json.loads((parts / "index.json").read_text())
    assert not listed["whole"]
    with pytest.raises(ValueError, match=r"index\.json: tokenising was interrupted"):
        Shards(parts, TOKENIZER)
    texts = documents(4000)
    (parts / ".00099.bin.abc").write_bytes(b"half of it")
    write(parts, texts, shard=512)
    write(tmp_path / "whole", texts, shard=512)
    assert files(parts) == files(tmp_path / "whole")
    for one in listed["shards"]:  # those were not written again
        assert (parts / one["name"]).stat().st_mtime_ns == times[one["name"]]


def test_what_is_whole_is_not_written_again(tmp_path):
    write(tmp_path, documents(20))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def none():
        raise AssertionError
        yield

    write_shards(tmp_path, none(), TOKENIZER, END, 20, shard=64)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_other_documents_left_is_not_continued(tmp_path):
    with pytest.raises(RuntimeError):
        write(tmp_path, documents(30, seed=1), check=lambda: (_ for _ in ()).throw(RuntimeError))
    assert not json.loads((tmp_path / "index.json").read_text())["whole"]
    write(tmp_path, documents(20))
    assert Shards(tmp_path, TOKENIZER).read(0, 50).tolist() == expected(documents(20))[:50]


def test_wide_vocabularies_take_four_bytes(tmp_path):
    characters = "".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x13000)]))
    tokenizer = make_tokenizer(TokenizerOptions(kind="characters"), [characters])
    end = end_token(tokenizer, "<|endoftext|>")
    assert vocab_size(tokenizer) > 2**16
    index = write_shards(tmp_path, [Piece(0, characters, True)], tokenizer, end, 1)
    assert index.dtype == "uint32"
    tokens = Shards(tmp_path, tokenizer).read(1, len(characters) + 1).tolist()
    assert tokenizer.decode(tokens) == characters


def test_copies_map_anew(tmp_path):
    write(tmp_path, documents(50))
    shards = Shards(tmp_path, TOKENIZER)
    want = shards.read(0, 200)
    copied = pickle.dumps(shards)
    assert len(copied) < 10_000
    assert (pickle.loads(copied).read(0, 200) == want).all()
    assert want.dtype == np.int64
    assert torch.from_numpy(want).dtype == torch.int64


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("00001.bin", truncate, r"00001\.bin: got 126 bytes, want 128; .* to tokenise again"),
        ("00001.bin", Path.unlink, r"00001\.bin: this shard is missing; remove"),
        ("00001.bin", flip, r"00001\.bin: its content has changed"),
        ("index.json", Path.unlink, r"index\.json: this file is missing"),
        ("index.json", lambda p: p.write_text("{"), r"index\.json: not the index .*JSON"),
        ("index.json", lambda p: edit(p, dtype="int8"), r"index\.json: not the index .*dtype"),
        ("index.json", lambda p: edit(p, format=2), r"index\.json: format is 2, want 1"),
        ("index.json", lambda p: edit(p, vocab_size=9), r"vocab_size is 9, want 257"),
        ("index.json", lambda p: edit(p, tokenizer="x"), r"index\.json: tokenizer is x, want"),
        ("index.json", lambda p: edit(p, shards=[]), r"index\.json: shards of \[\], want 64"),
        ("index.json", lambda p: edit(p, shard=32), r"index\.json: shards of \[64, .*want 32"),
    ],
)
def test_damage_is_named(tmp_path, name, damage, says):
    write(tmp_path, documents(20))
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        Shards(tmp_path, TOKENIZER, verify=True)


def test_tokens_outside_the_vocabulary_are_named(tmp_path):
    write(tmp_path, documents(20))
    tokens = np.fromfile(tmp_path / "00001.bin", "<u2")
    tokens[5] = 300
    tokens.tofile(tmp_path / "00001.bin")
    shards = Shards(tmp_path, TOKENIZER)
    shards.read(0, 64)
    with pytest.raises(ValueError, match=r"00001\.bin: got token 300, want less than 257; remove"):
        shards.read(60, 80)


def test_reads_lie_within(tmp_path):
    write(tmp_path, documents(2))
    shards = Shards(tmp_path, TOKENIZER)
    with pytest.raises(ValueError, match=r"start, stop: got 0, 1000, want within 0 to"):
        shards.read(0, 1000)
