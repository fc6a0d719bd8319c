"""The options of text data: where text comes from and how it becomes sequences of tokens."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..config import Count, Options, Place
from .tokenizers import TokenizerOptions

__all__ = ["TextOptions"]

# The keys that only some formats accept.
KEYS = {
    "files": {"suffixes", "documents"},
    "parquet": {"text_column"},
    "hub": {"text_column", "name", "subset", "revision"},
    "tokens": set[str](),
}

Several = Annotated[
    tuple[Place, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class TextOptions(Options):
    """Where text comes from, and how it becomes sequences of tokens.

    format: "files" (text files, also gzip), "parquet" (a column of documents), "hub" (a data set of
        the Hugging Face hub) or "tokens" (one file per part with tokens alone, uint16 and
        little-endian, such as nanoGPT's train.bin and val.bin). Tokens need `valid`, and the
        tokenizer that made them.
    train, valid, test: one or a list of files, folders or globs; for "hub", names of splits.
        Relative paths start at the working directory. Without `valid`, the share `holdout` of the
        training documents is held out for validation.
    suffixes: only files with these suffixes are taken from folders and globs, plain or with .gz.
    documents: "file" makes each file one document. A regular expression starts a new document at
        each line that begins with a match, and removes the match: "(?=Title: )" keeps the line,
        "-{5,}\\n" removes it, and "" makes every line a document.
    text_column: the column of documents. name, subset, revision: which data set of the hub.
    context: the number of tokens that the model sees at once.
    tokenizer: see `TokenizerOptions`.
    shards: the folder for tokens. null is translution/text in the user's cache.
    workers: threads that tokenise. null is one per core.
    document_mask: whether the tokens of a window see only their own document (the models of this
        library take it as `documents`). The end token before a document is its first token, so
        each token is still predicted once: the first one of a document from that end token, and
        the end token after it from the document.
    windows: how an epoch of training is made. "disjoint" cuts the text into windows without
        overlap, from another start in each epoch; "random" draws `epoch_windows` windows anywhere.
    bad: "refuse" stops at a file that is empty or not UTF-8 and at a row without text, "skip"
        leaves it out.
    verify: check the SHA-256 of all shards whenever they are opened.
    """

    kind: Literal["text"] = "text"
    format: Literal["files", "parquet", "hub", "tokens"] = "files"
    train: Several
    valid: Several | None = None
    test: Several | None = None
    holdout: float = Field(0.1, ge=0, lt=1)
    suffixes: Several = (".txt", ".md", ".rst", ".py")
    documents: str = "file"
    text_column: str = "text"
    name: Place | None = None
    subset: str | None = None
    revision: str | None = None
    context: int = Field(ge=1, le=2**24)
    tokenizer: TokenizerOptions = TokenizerOptions()
    shards: Place | None = None
    workers: int | None = Field(None, ge=1, le=1024)
    document_mask: bool = False
    windows: Literal["disjoint", "random"] = "disjoint"
    epoch_windows: Count = 32_000
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
        if self.format == "tokens":
            self._check_tokens()
        if wrong := [s for s in self.suffixes if not s.startswith(".") or s != s.lower()]:
            raise ValueError(f"suffixes: got {wrong[0]!r}, want such as '.txt', in lower case")
        try:
            re.compile(self.documents)
        except re.error as error:
            raise ValueError(
                f"documents: got {self.documents!r}, want 'file' or a regular expression ({error})"
            ) from None
        return self

    def _check_tokens(self) -> None:
        for key in ("train", "valid", "test"):
            files = getattr(self, key)
            if files is None and key == "valid":
                raise ValueError("valid: is missing; format 'tokens' has no documents to hold out")
            if files is not None and len(files) > 1:
                raise ValueError(f"{key}: got {list(files)}, want one file with format 'tokens'")
        if "tokenizer" not in self.model_fields_set or self.tokenizer.is_trained:
            raise ValueError(
                "tokenizer: want the one that made the tokens, of kind 'file', 'hub' or 'bytes', "
                "with format 'tokens'"
            )

    @property
    def root(self) -> Path:
        """The folder for everything that is derived from the text."""
        if self.shards is not None:
            return Path(self.shards).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser() / "translution" / "text"
