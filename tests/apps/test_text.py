"""Text: where documents begin, what parts they form, and what is wrong with sources."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from translution.apps.config import as_yaml, parse
from translution.apps.data import documents as reading
from translution.apps.data.text import TextOptions, open_text
from translution.apps.data.tokenizers import (
    END,
    TokenizerOptions,
    end_token,
    hash_of,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
)

ANY = st.text(st.characters(codec="utf-8"))
LINES = ["alpha beta", "gamma, délta", "日本語", "epsilon\tzeta", "eta\r"]


@pytest.fixture
def corpus(tmp_path):
    """A folder of 40 small files."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    for i in range(40):
        text = f"document {i}\n" + "\n".join(LINES[i % 3 :]) + "\n"
        (folder / ("more" if i % 2 else ".") / f"{i}.txt").write_bytes(text.encode())
    return folder


def options(tmp_path, **content) -> TextOptions:
    content = {"context": 16, "shards": str(tmp_path / "shards"), "workers": 2} | content
    return parse(TextOptions, content, "test")


def text_of(windows) -> list[str]:
    """The documents of a part."""
    tokens = windows.shards.read(0, windows.tokens + 1).tolist()
    end = end_token(windows.tokenizer, windows.options.tokenizer.end)
    assert tokens[0] == tokens[-1] == end
    found, held = [], []
    for token in tokens[1:]:
        if token == end:
            found.append(windows.tokenizer.decode(held))
            held = []
        else:
            held.append(token)
    return found


# -- where documents are -------------------------------------------------------------------------


def test_files_of_a_folder(corpus, tmp_path):
    (corpus / "41.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    for name in ("picture.png", ".hidden.txt", "x.gz"):
        (corpus / name).write_bytes(b"\xff")
    train = open_text(options(tmp_path, train=str(corpus), holdout=0), "train", 0)
    found = text_of(train)
    assert len(found) == 41 == train.documents
    assert found[:2] == [(corpus / f"{i}.txt").read_bytes().decode() for i in (0, 2)]
    assert "packed" in found
    assert train.bytes == sum(len(text.encode()) for text in found)


def test_globs_and_lists(corpus, tmp_path):
    train = [str(corpus / "more" / "1*.txt"), str(corpus / "0.txt"), str(corpus / "more/11.txt")]
    (corpus / "code.c").write_text("main")
    got = open_text(
        options(tmp_path, train=[*train, str(corpus / "code.c")], holdout=0), "train", 0
    )
    numbers = [text.split("\n")[0] for text in text_of(got)]
    assert numbers == [f"document {i}" for i in (1, 11, 13, 15, 17, 19, 0)] + ["main"]
    only = options(tmp_path, train=str(corpus), suffixes=".c", holdout=0, context=2)
    assert text_of(open_text(only, "train", 0)) == ["main"]


@given(
    texts=st.lists(ANY.filter(lambda t: "#" not in t), min_size=1),
    block=st.integers(8, 30),
    piece=st.integers(1, 20),
)
def test_many_documents_in_a_file(texts, block, piece, tmp_path_factory):
    """However it is read, blocks and pieces only cut."""
    path = tmp_path_factory.mktemp("text") / "all.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        patch.setattr(reading, "PIECE", piece)
        for pattern, begin in (("#", "\n#"), ("#-+\n", "\n#--\n"), ("(?=# )", "\n# ")):
            path.write_bytes("".join(begin + text for text in texts).encode())
            chosen = options(path.parent, train=str(path), documents=pattern)
            (place,) = reading.places(chosen, "train")
            got = {}
            for one in reading.pieces(place):
                got.setdefault(one.document, []).append(one)
            assert all(
                [p.ends for p in of] == [False] * (len(of) - 1) + [True] for of in got.values()
            )
            want = ["\n"] + [text + "\n" for text in texts[:-1]] + texts[-1:]
            want = want[:1] + ["# " * (pattern == "(?=# )") + text for text in want[1:]]
            found = ["".join(p.text for p in of) for of in got.values()]
            assert list(got) == list(range(len(got)))
            assert found == [text for text in want if text]


def test_each_line_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo\x0c\u2028still\r\n\nfour".encode())
    chosen = options(tmp_path, train=str(tmp_path / "a.txt"), documents="", holdout=0)
    got = text_of(open_text(chosen, "train", 0))
    assert got == ["one\n", "two\x0c\u2028still\r\n", "\n", "four"]


def test_long_documents_are_cut_and_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 50)
    monkeypatch.setattr(reading, "BLOCK", 64)
    text = "".join(f"line {i} é\n" for i in range(100)) + "日本" * 200
    (tmp_path / "a.txt").write_bytes(text.encode())
    chosen = options(tmp_path, train=str(tmp_path / "a.txt"), holdout=0)
    (place,) = reading.places(chosen, "train")
    assert len(list(reading.pieces(place))) > 10
    assert text_of(open_text(chosen, "train", 0)) == [text]


def table(path: Path, texts: list, column: str = "text", kind=None) -> Path:
    path.parent.mkdir(exist_ok=True)
    columns = {"id": list(range(len(texts))), column: pyarrow.array(texts, kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 30)
    texts = [f"row {i}\n" * (i % 7) for i in range(30)]
    table(tmp_path / "d" / "0.parquet", texts[:20], "content", kind)
    table(tmp_path / "d" / "1.parquet", texts[20:], "content", kind)
    chosen = options(
        tmp_path, format="parquet", train=str(tmp_path / "d"), text_column="content", holdout=0
    )
    assert text_of(open_text(chosen, "train", 0)) == [text for text in texts if text]


def test_parquet_that_is_not_right(tmp_path):
    def opened(path, **more):
        chosen = options(tmp_path, format="parquet", train=str(path), holdout=0, **more)
        return open_text(chosen, "train", 0)

    path = table(tmp_path / "a.parquet", ["one long enough for a window", None, "three"])
    with pytest.raises(ValueError, match=r"a\.parquet: there is no column 'x'; .*\['id', 'text'\]"):
        opened(path, text_column="x")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' has int64, want strings"):
        opened(path, text_column="id")
    with pytest.raises(ValueError, match=r"train: .*a\.parquet: row 1 has no text; bad=skip"):
        opened(path)
    assert text_of(opened(path, bad="skip")) == ["one long enough for a window", "three"]
    broken = tmp_path / "b.parquet"
    broken.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable Parquet file"):
        opened(broken)


def test_the_hub_reads_what_datasets_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"row {i} of the data set" for i in range(20)]
    for split, some in (("train", texts[:15]), ("test", texts[15:])):
        table(tmp_path / "set" / f"{split}.parquet", some)
    chosen = options(
        tmp_path, format="hub", name=str(tmp_path / "set"), train="train", test="test", holdout=0
    )
    assert text_of(open_text(chosen, "train", 0)) == texts[:15]
    assert text_of(open_text(chosen, "test", 0)) == texts[15:]
    with pytest.raises(ValueError, match=r"test: .*\[nope\]: "):
        open_text(chosen.model_copy(update={"test": ("nope",)}), "test", 0)
    with pytest.raises(ValueError, match=r"\[train\]: there is no column 'x'; there are"):
        open_text(chosen.model_copy(update={"text_column": "x"}), "train", 0)


# -- what is wrong with sources ------------------------------------------------------------------


def test_places_that_are_none(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    for train, says in (
        (str(tmp_path / "absent"), "train: .*absent: there is no such file"),
        (str(tmp_path / "empty"), r"train: .*empty: no file in it ends in \.txt"),
        (str(corpus / "*.rtf"), r"train: .*rtf: there is no such file"),
    ):
        with pytest.raises(ValueError, match=says):
            open_text(options(tmp_path, train=train), "train", 0)
    with pytest.raises(ValueError, match="test: got none, want where its text is"):
        open_text(options(tmp_path, train=str(corpus)), "test", 0)
    with pytest.raises(ValueError, match="valid: got none and a holdout of 0"):
        open_text(options(tmp_path, train=str(corpus), holdout=0), "valid", 0)
    both = options(tmp_path, train=str(corpus), valid=str(corpus / "0.txt"))
    with pytest.raises(ValueError, match=r"valid: .*0\.txt is in train too"):
        open_text(both, "valid", 0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", b"good\n" * 9 + b"b\xe9d", r"x\.txt: not UTF-8: byte 0xe9 at position 46"),
        ("x.txt", b"cut \xe6\x97", r"x\.txt: not UTF-8: byte 0xe6 at position 4"),
        ("x.txt", b"", r"x\.txt: it is empty"),
        ("x.txt.gz", gzip.compress(b"text", mtime=0)[:-9], r"x\.txt\.gz: not a whole gzip file"),
        ("x.txt.gz", b"text", r"x\.txt\.gz: not a whole gzip file"),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_bad_files_are_refused_or_left_out(
    corpus, tmp_path, name, content, says, block, monkeypatch
):
    monkeypatch.setattr(reading, "BLOCK", block)
    (corpus / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"train: .*{says}.*; bad=skip leaves such out"):
        open_text(options(tmp_path, train=str(corpus)), "train", 0)
    with pytest.warns(UserWarning, match=f"left out: .*{says}"):
        train = open_text(options(tmp_path, train=str(corpus), bad="skip", holdout=0), "train", 0)
    assert train.documents == 40
    alone = options(tmp_path, train=str(corpus / name), bad="skip")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="train: there is no text in it"),
    ):
        open_text(alone, "train", 0)


@pytest.mark.parametrize("block", [1, 2**17])
def test_a_byte_order_mark_is_not_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked \xef\xbb\xbf text\n" * 2)
    chosen = options(tmp_path, train=str(tmp_path / "a.txt"), holdout=0)
    (text,) = text_of(open_text(chosen, "train", 0))
    assert text == "marked \ufeff text\n\ufeffmarked \ufeff text\n"  # only the first is a mark


def test_too_little(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    chosen = options(tmp_path, train=str(tmp_path / "a.txt"), holdout=0)
    with pytest.raises(ValueError, match="train: got 6 tokens, want at least one context of 16"):
        open_text(chosen, "train", 0)
    assert len(open_text(chosen.model_copy(update={"context": 6}), "train", 0)) == 1
    chosen = options(tmp_path, train=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="train: got 1 documents, want more than the 1 held out"):
        open_text(chosen, "train", 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train": "a", "format": "hub"}, "name: is missing; format 'hub' needs it"),
        ({"train": "a", "name": "x"}, "name: got 'x', but format 'files' has no such key"),
        ({"train": "a", "format": "parquet", "documents": "#"}, "documents: got '#', but format"),
        ({"train": "a", "documents": "("}, "documents: got '\\(', want 'file' or a regular"),
        ({"train": ["a", "b"], "valid": "b"}, "valid: got 'b', want other text"),
        ({"train": "a", "valid": "b", "test": "b"}, "test: got 'b', want other text"),
        ({"train": "a", "suffixes": ["txt"]}, "suffixes: got 'txt', want such as '.txt'"),
        ({"train": []}, "train: got \\[\\]"),
        ({"train": "a", "context": 0}, "context: got 0"),
        ({"train": "a", "tokenizer": {"kind": "bpe"}}, "tokenizer: vocab_size: is missing"),
        ({"train": "a", "tokenizer": {"vocab_size": 300}}, "vocab_size: got 300, but kind 'bytes'"),
        ({"train": "a", "tokenizer": {"end": "e"}}, "end: got 'e', but kind 'bytes'"),
        ({"train": "a", "tokenizer": {"kind": "bpe", "vocab_size": 99}}, "vocab_size: got 99"),
    ],
)
def test_options_that_do_not_go(content, says):
    with pytest.raises(ValueError, match=says):
        parse(TextOptions, {"context": 16} | content, "x.yaml")


def test_options_survive_a_file(tmp_path):
    import yaml

    chosen = options(tmp_path, train=["a", "b"], tokenizer={"kind": "bpe", "vocab_size": 300})
    assert parse(TextOptions, yaml.safe_load(as_yaml(chosen)), "x") == chosen


# -- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_documents_are_not_trained_on(corpus, tmp_path, seed):
    chosen = options(tmp_path, train=str(corpus), holdout=0.2)
    train, valid = (text_of(open_text(chosen, part, seed)) for part in ("train", "valid"))
    assert len(valid) == 8
    assert len(train) == 32
    assert {*train, *valid} == {path.read_bytes().decode() for path in corpus.rglob("*.txt")}
    other = text_of(open_text(chosen, "valid", seed + 1))
    assert other != valid


def test_a_trained_tokenizer_knows_the_training_part_alone(corpus, tmp_path):
    for path in corpus.rglob("*.txt"):  # a character of its own in each
        path.write_text(path.read_text() + chr(0x1000 + int(path.stem)))
    for kind in ({"kind": "characters"}, {"kind": "bpe", "vocab_size": 280}):
        chosen = options(tmp_path, train=str(corpus), tokenizer=kind)
        train, valid = (open_text(chosen, part, 0) for part in ("train", "valid"))
        assert hash_of(train.tokenizer) == hash_of(valid.tokenizer)
        if kind["kind"] == "characters":
            known = set(train.tokenizer.get_vocab())
            assert all(text[-1] in known for text in text_of(train))
            assert not any(text[-1] in known for text in text_of(valid))
    again = open_text(chosen.model_copy(update={"shards": str(tmp_path / "2")}), "train", 0)
    assert hash_of(again.tokenizer) == hash_of(train.tokenizer)  # trained twice, the same
    given = open_text(chosen, "valid", 0, tokenizer=make_tokenizer(TokenizerOptions()))
    assert given.vocab_size == 257
    assert text_of(given.__class__(chosen, "valid", 0, given.tokenizer, given.shards))


def test_what_changed_is_tokenised_anew(corpus, tmp_path):
    chosen = options(tmp_path, train=str(corpus), holdout=0)
    before = open_text(chosen, "train", 0)
    path = corpus / "4.txt"
    content = path.read_bytes()
    path.write_bytes(content)  # another time, the same text
    assert open_text(chosen, "train", 0).shards.folder == before.shards.folder
    status = path.stat()
    path.write_bytes(content[::-1].decode(errors="replace").encode()[: len(content)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.warns(UserWarning, match=r"train: .*/4\.txt changed; tokenised again"):
        after = open_text(chosen, "train", 0)
    assert path.read_bytes().decode() in text_of(after)
    assert text_of(before) != text_of(after)
    path.unlink()
    assert open_text(chosen, "train", 0).documents == 39


def test_what_changes_meanwhile_is_refused(corpus, tmp_path, monkeypatch):
    chosen = options(tmp_path, train=str(corpus), holdout=0)

    def changing(place, read=reading.pieces):
        yield from read(place)
        (corpus / "0.txt").write_text("new")

    monkeypatch.setattr("translution.apps.data.text.pieces", changing)
    with pytest.raises(ValueError, match=r"train: .*/0\.txt changed while being tokenised"):
        open_text(chosen, "train", 0)


def test_a_moved_corpus_keeps_its_shards(corpus, tmp_path):
    before = open_text(options(tmp_path, train=str(corpus)), "valid", 0)
    corpus.rename(tmp_path / "elsewhere")
    after = open_text(options(tmp_path, train=str(tmp_path / "elsewhere")), "valid", 0)
    assert before.shards.folder == after.shards.folder


def test_several_processes_may_open_at_once(corpus, tmp_path):
    chosen = options(
        tmp_path, train=str(corpus), tokenizer={"kind": "bpe", "vocab_size": 300}
    ).model_dump_json()
    code = (
        "import sys\nfrom translution.apps.data.text import TextOptions, open_text\n"
        "w = open_text(TextOptions.model_validate_json(sys.argv[1]), 'train', 0)\n"
        "print(w.tokens, w.shards.folder.name, w[0, 1].tolist())"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", code, chosen], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate()[0] for process in many}
    assert len(said) == 1
    assert "[" in said.pop()


def test_verify_finds_a_flipped_byte(corpus, tmp_path):
    chosen = options(tmp_path, train=str(corpus))
    path = open_text(chosen, "train", 0).shards.folder / "00000.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    open_text(chosen, "train", 0)
    with pytest.raises(ValueError, match=r"00000\.bin: its content has changed"):
        open_text(chosen.model_copy(update={"verify": True}), "train", 0)


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    chosen = TextOptions(train="a", context=4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert chosen.root == tmp_path / "translution" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert chosen.root == Path.home() / ".cache" / "translution" / "text"


def test_the_index_says_what_it_is(corpus, tmp_path):
    windows = open_text(options(tmp_path, train=str(corpus / "more"), holdout=0), "train", 0)
    index = json.loads((windows.shards.folder / "index.json").read_text())
    assert index["names"][0] == str(corpus / "more" / "1.txt")
    assert index["tokenizer"] == hash_of(windows.tokenizer)
    assert sum(s["tokens"] for s in index["shards"]) == windows.tokens + 1
    loaded = load_tokenizer(windows.shards.folder / "tokenizer.json")
    assert hash_of(loaded) == hash_of(windows.tokenizer)


# -- files of tokens -------------------------------------------------------------------------------


@pytest.fixture
def token_files(tmp_path):
    """Files as nanoGPT's scripts write them: documents, each with an end token after it."""
    texts = [f"document {i}: délta, 日本語\n" for i in range(30)]
    tokenizer = make_tokenizer(TokenizerOptions(kind="bpe", vocab_size=300), texts)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    for name, part in (("train", texts[:25]), ("val", texts[25:])):
        ids = [i for t in part for i in [*tokenizer.encode(t).ids, tokenizer.token_to_id(END)]]
        np.array(ids, np.uint16).tofile(tmp_path / f"{name}.bin")
    return texts, {
        "format": "tokens",
        "train": str(tmp_path / "train.bin"), "valid": str(tmp_path / "val.bin"),
        "tokenizer": {"kind": "file", "path": str(tmp_path / "tokenizer.json")},
    }  # fmt: skip


def test_files_of_tokens(token_files, tmp_path):
    texts, content = token_files
    chosen = options(tmp_path, **content)
    train, valid = (open_text(chosen, part, 0) for part in ("train", "valid"))
    assert (train.documents, valid.documents) == (25, 5)
    assert train.bytes == sum(len(t.encode()) for t in texts[:25])
    flat = np.fromfile(tmp_path / "train.bin", "<u2").tolist()
    assert train.shards.read(0, train.tokens + 1).tolist() == flat
    assert train.tokenizer.decode(flat) == "".join(texts[:25])
    targets = [t for i in range(len(valid)) for t in valid[0, i][1:].tolist() if t >= 0]
    assert targets == np.fromfile(tmp_path / "val.bin", "<u2").tolist()[1:]
    assert len(list((tmp_path / "shards").rglob("*.bin"))) == 0, "nothing is copied"
    assert len(open_text(options(tmp_path, verify=True, **content), "train", 0)) == len(train)
    np.array(flat[:50], np.uint16).tofile(tmp_path / "train.bin")
    assert open_text(chosen, "train", 0).tokens == 49


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"valid": None}, "valid: is missing; format 'tokens' has no documents"),
        ({"train": ["a.bin", "b.bin"]}, "train: got .* want one file"),
        ({"tokenizer": {"kind": "characters"}}, "tokenizer: want the one that made the tokens"),
        ({"documents": ""}, "documents: got '', but format 'tokens' has no such key"),
        ({"train": "none.bin"}, "train: there is no file none.bin"),
        ({"train": "odd.bin"}, "odd.bin: got 3 bytes, want tokens of 2 bytes each"),
        ({"tokenizer": {"kind": "bytes"}}, r"train.bin: got token \d+, want less than 257"),
    ],
)
def test_files_of_tokens_that_are_refused(token_files, tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=says):
        open_text(options(tmp_path, **token_files[1] | change), "train", 0)


def test_a_file_of_tokens_needs_its_tokenizer(token_files, tmp_path):
    content = {k: v for k, v in token_files[1].items() if k != "tokenizer"}
    with pytest.raises(ValueError, match="tokenizer: want the one that made the tokens"):
        options(tmp_path, **content)


def test_a_run_on_files_of_tokens(token_files, tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("typer")
    from test_first_run import command

    data = {"kind": "text", "context": 16, "shards": str(tmp_path / "shards")} | token_files[1]
    model = {"name": "gpt", "mixer": "attention", "dim": 16, "depth": 1, "heads": 2}
    train = {"steps": 2, "batch_size": 4, "device": "cpu"}
    recipe, run = tmp_path / "tokens.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({"model": model, "data": data, "train": train}))
    for words in (("tokenize", recipe), ("train", recipe, f"--out={run}"), ("evaluate", run)):
        code, out, err = command(*words)
        assert code == 0, err
    assert "bits_per_byte" in out or "bits per byte" in out
    code, out, err = command("generate", run, "--prompt=document", "--max-tokens=3")
    assert code == 0, err
