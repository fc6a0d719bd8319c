"""Tokenizers: what they make of any text, and their files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from translution.apps.data.tokenizers import (
    TokenizerOptions,
    end_token,
    hash_of,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    vocab_size,
)

ANY = st.text(st.characters(codec="utf-8"))

MADE = {
    "bytes": make_tokenizer(TokenizerOptions()),
    "characters": make_tokenizer(TokenizerOptions(kind="characters"), ["abc <|é", "日本"]),
    "bpe": make_tokenizer(
        TokenizerOptions(kind="bpe", vocab_size=300), ["the cat and the dog and the end of text"]
    ),
}


@pytest.mark.parametrize("kind", MADE)
@given(text=ANY)
def test_decoding_gives_the_text_back(kind, text):
    tokenizer = MADE[kind]
    text += "<|endoftext|> <0x41>Ġ\u2581" + text
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text
    assert end_token(tokenizer, "<|endoftext|>") not in tokens
    assert max(tokens) < vocab_size(tokenizer)


def test_vocabularies():
    assert MADE["bytes"].encode("aé").ids == list("aé".encode())
    assert vocab_size(MADE["bytes"]) == 257
    assert vocab_size(MADE["characters"]) == 256 + len(set("abc <|é日本")) + 1
    assert len(MADE["characters"].encode("日ж").ids) == 1 + 2
    assert 257 < vocab_size(MADE["bpe"]) <= 300
    assert end_token(MADE["bpe"], "<|endoftext|>") == 0


@pytest.mark.parametrize("kind", MADE)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(MADE[kind], path)
    loaded = load_tokenizer(path)
    assert hash_of(loaded) == hash_of(MADE[kind])
    assert hash_of(loaded) != hash_of(MADE["bytes" if kind != "bytes" else "bpe"])
    text = "the cat<|endoftext|>é"
    assert loaded.encode(text).ids == MADE[kind].encode(text).ids


def test_a_file_is_taken_without_what_is_for_sentences(tmp_path):
    tokenizer = Tokenizer.from_str(MADE["bpe"].to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "t.json"))
    chosen = TokenizerOptions(kind="file", path=str(tmp_path / "t.json"))
    assert make_tokenizer(chosen).encode("the cat and").ids == MADE["bpe"].encode("the cat and").ids


def test_tokenizers_that_are_none(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json: not a tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(OSError, match="absent"):
        load_tokenizer(tmp_path / "absent.json")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.end: got '<\|endoftext\|>', want a token"):
        make_tokenizer(TokenizerOptions(kind="file", path=str(path)))
    with pytest.raises(ValueError, match=r"tokenizer\.name: no/such: "):
        make_tokenizer(TokenizerOptions(kind="hub", name="no/such"))
