"""Tokenizers of Hugging Face's `tokenizers`: making, training, loading and saving them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ...utils.files import write_whole
from ..config import Count, Options, Place

__all__ = [
    "TokenizerOptions",
    "end_token",
    "hash_of",
    "load_tokenizer",
    "make_tokenizer",
    "save_tokenizer",
    "token_bytes",
    "vocab_size",
]

END = "<|endoftext|>"
# The keys that a kind requires.
REQUIRED = {"bytes": (), "characters": (), "bpe": ("vocab_size",), "file": ("path",),
          "hub": ("name",)}  # fmt: skip


class TokenizerOptions(Options):
    """How text becomes tokens.

    kind: "bytes" (one token per byte of UTF-8), "characters" (one token per character of the
        training part, and bytes for other characters), "bpe" (a byte-level BPE that is trained on
        the training part), "file" (a tokenizer.json) or "hub" (by name, such as "gpt2").
    vocab_size: the size of a BPE's vocabulary, with the end token and the 256 bytes. A BPE that is
        trained on little text may be smaller.
    limit: a BPE is trained on about so many bytes, drawn from the whole training part.
    path: the file of kind "file". name, revision: which tokenizer of the hub.
    end: the token before and after each document. A "file" or "hub" must contain it.
    """

    kind: Literal["bytes", "characters", "bpe", "file", "hub"] = "bytes"
    vocab_size: int | None = Field(default=None, ge=257, le=2**24)
    limit: Count = 2**30
    path: Place | None = None
    name: Place | None = None
    revision: Place | None = None
    end: Place = END

    @model_validator(mode="after")
    def _check(self) -> TokenizerOptions:
        required = REQUIRED[self.kind]
        for key in required:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: is missing; kind {self.kind!r} needs it")
        allowed = set(required) | ({"revision"} if self.kind == "hub" else set())
        allowed |= set() if self.kind in ("bytes", "characters", "bpe") else {"end"}
        for key in ("vocab_size", "path", "name", "revision", "end"):
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and key not in allowed:
                raise ValueError(
                    f"{key}: got {getattr(self, key)!r}, but kind {self.kind!r} has no such key"
                )
        return self

    @property
    def is_trained(self) -> bool:
        """Whether the tokenizer is made from the training part."""
        return self.kind in ("characters", "bpe")


def make_tokenizer(options: TokenizerOptions, texts: Iterable[str] = ()) -> Tokenizer:
    """Make the tokenizer of these options.

    Args:
        texts: what a tokenizer of kind "characters" or "bpe" is trained on.

    Raises:
        ValueError: a file that is no tokenizer, a name that does not exist, or an `end` that is not
            in the vocabulary.
    """
    if options.kind == "bytes":
        return _bytes(options.end)
    if options.kind == "characters":
        return _characters(texts, options.end)
    if options.kind == "bpe":
        return _bpe(texts, int(options.vocab_size or 0), options.end)
    if options.kind == "file":
        tokenizer = load_tokenizer(Path(str(options.path)).expanduser())
    else:
        try:
            revision = options.revision or "main"
            tokenizer = _plain(Tokenizer.from_pretrained(str(options.name), revision=revision))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"tokenizer.name: {options.name}: {error}") from None
    end_token(tokenizer, options.end)
    return tokenizer


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer.json. A special token that is written out in a text is read as plain text.

    Raises:
        ValueError: a file that holds no tokenizer.
        OSError: a file that cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        return _plain(Tokenizer.from_buffer(content))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json."""
    write_whole(path, lambda to: to.write_text(tokenizer.to_str(pretty=True), "utf-8"))


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of rows that an embedding needs: one more than the largest token."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: Tokenizer, token: int) -> int:
    """The number of bytes of UTF-8 that a token stands for; 0 for special tokens."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    name = tokenizer.id_to_token(token) or ""
    if text and isinstance(tokenizer.decoder, decoders.ByteLevel):
        return len(name)  # a character for each byte
    return len(text.encode())


def end_token(tokenizer: Tokenizer, end: str) -> int:
    """The number of the token that separates documents.

    Raises:
        ValueError: a token that is not in the vocabulary.
    """
    token = tokenizer.token_to_id(end)
    if token is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        raise ValueError(
            f"tokenizer.end: got {end!r}, want a token that the tokenizer has; its special ones "
            f"are {special[:10]}"
        )
    return int(token)


def hash_of(tokenizer: Tokenizer) -> str:
    """The SHA-256 of a tokenizer's content, whatever the layout of its file."""
    content = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off truncation, padding and the reading of special tokens."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _with_end(tokenizer: Tokenizer, end: str) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return _plain(tokenizer)


def _bytes(end: str) -> Tokenizer:
    """Token b is byte b, and the end token is 256."""
    # ByteLevel writes printable bytes as themselves and the others as further characters, in order
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = {ord(c): c for c in alphabet if ord(c) < 256}
    others = iter(c for c in alphabet if ord(c) >= 256)
    vocab = {kept.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_end(tokenizer, end)


def _characters(texts: Iterable[str], end: str) -> Tokenizer:
    """Tokens 0 to 255 are bytes, for characters that the texts lack. Their characters follow."""
    characters = set[str]()
    for text in texts:
        characters.update(text)
    names = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(characters)
    vocab = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _with_end(tokenizer, end)


def _bpe(texts: Iterable[str], size: int, end: str) -> Tokenizer:
    """Token 0 is the end token. The bytes follow, and then the merged tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(end, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # otherwise every process that is forked later, such as a loader's, prints a warning
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _plain(tokenizer)
