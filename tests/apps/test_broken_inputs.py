"""Every command fails in one line. Each row of the tables is a broken input: the command ends with
an exit code, names the file or key in one line, leaves no traceback and nothing half-written, and
does not take long."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")
import datasets
import pyarrow
import pyarrow.parquet

import forked
from pictures import encoded, picture
from translution.apps import cli

SECONDS = 20  # a broken input is noticed long before; the limit only ends what hangs
DIGITS = """
model: {name: vit, mixer: attention, patch_size: 4, dim: 16, depth: 1, heads: 2}
data: {kind: images, format: digits, canvas: 12, train_limit: 64, valid_limit: 20}
train: {steps: 2, batch_size: 16, device: cpu}
"""
PHOTOS = """
model: {name: vit, mixer: attention, patch_size: 4, dim: 16, depth: 1, heads: 2}
data: {kind: images, format: folder, train: photos, image_size: 8, crop: 1}
train: {steps: 2, batch_size: 2, device: cpu}
"""
TABLE = PHOTOS.replace("format: folder, train: photos", "format: parquet, train: table.parquet")
TEXT = """
model: {name: gpt, mixer: attention, dim: 16, depth: 1, heads: 2}
data: {kind: text, train: a.txt, valid: b.txt, context: 8, shards: shards}
train: {steps: 2, batch_size: 2, device: cpu}
"""


def command(*words):
    """The exit code of a command, and what it wrote to standard error."""
    argv, err, code = sys.argv, io.StringIO(), 0

    def too_long(*_):
        raise AssertionError(f"{words}: more than {SECONDS} seconds")

    usual = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        sys.argv = ["translution", *map(str, words)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
        sys.argv = argv
    return code, err.getvalue()


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
    """What the tables name: configurations, data, and a run of images and one of text."""
    folder = tmp_path_factory.mktemp("made")
    for name, text in (("digits", DIGITS), ("photos", PHOTOS), ("table", TABLE), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(text)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(4):
            picture(8, 8, i).save(folder / "photos" / name / f"{i}.png")
    (folder / "a.txt").write_text("a text to learn from\n" * 20)
    (folder / "b.txt").write_text("another text to test with\n" * 5)
    images = {"image": [encoded(picture(8, 8, i)) for i in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(images).to_parquet(folder / "table.parquet")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("digits", "text"):
            code, said = command("train", f"{name}.yaml", f"--out={name}")
            assert code == 0, said
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(_made, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(_made, folder, symlinks=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(folder)
    return folder


def written(folder):
    """The files below a folder, without what a command may keep to save time."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path) for path in found if not {"shards", ".lock"} & set(path.parts)}


def refused(here, words, named, codes=(2,)):
    before = written(here)
    code, said = command(*words)
    assert code in codes, said
    (line,) = said.splitlines()
    assert line.startswith("translution: ")
    assert len(line) < 1500
    assert named in line
    assert written(here) == before


# -- values of a configuration -------------------------------------------------------------------

VALUES = [
    ("digits", "seed=18446744073709551616", "seed"),
    ("digits", "seed=-1", "seed"),
    ("digits", "seed=" + "9" * 5000, "seed"),
    ("digits", "seed=0x" + "f" * 5000, "seed"),
    ("digits", 'out=""', "out"),
    ("digits", "train.steps=99999999999999999999", "train.steps"),
    ("digits", "train.steps=.inf", "train.steps"),
    ("digits", "train.steps=2026-99-99", "train.steps"),
    ("digits", "train.steps=!!int x", "train.steps"),
    ("digits", "train.steps=!!bool x", "train.steps"),
    ("digits", "train.steps=!!timestamp x", "train.steps"),
    ("digits", "train.learning_rate=1e300", "train.learning_rate"),
    ("digits", "train.learning_rate=.nan", "train.learning_rate"),
    ("digits", "train.min_learning_rate=1e300", "train.min_learning_rate"),
    ("digits", "train.weight_decay=1e300", "train.weight_decay"),
    ("digits", "train.clip=1e300", "train.clip"),
    ("digits", "train.warmup=99999999999999999999", "train.warmup"),
    ("digits", "train.batch_size=99999999999999999999", "train.batch_size"),
    ("digits", "train.batch_size=1000000000000", "train.batch_size"),
    ("digits", "train.accumulate=99999999999999999999", "train.accumulate"),
    ("digits", "train.workers=1000000", "train.workers"),
    ("digits", "train.validate_every=99999999999999999999", "train.validate_every"),
    ("digits", "train.validate_batches=99999999999999999999", "train.validate_batches"),
    ("digits", "train.save_every=99999999999999999999", "train.save_every"),
    ("digits", "train.log_every=99999999999999999999", "train.log_every"),
    ("digits", "train.betas=[.nan,0.9]", "train.betas"),
    ("digits", "train.devices=1000000000", "train.devices"),
    ("digits", "train.device=tpu", "train.device"),
    ("digits", "model.mlp_ratio=-1", "mlp_ratio"),
    ("digits", "model.mlp_ratio=.nan", "mlp_ratio"),
    ("digits", "model.mlp_ratio=1e300", "mlp_ratio"),
    ("digits", "model.dim=1e12", "dim"),
    ("digits", "model.dim=1000000000000", "dim"),
    ("digits", "model.dim=99999999999999999999", "dim"),
    ("digits", "model.dim=-16", "dim"),
    ("digits", "model.dim=0", "dim"),
    ("digits", "model.depth=1000000000", "depth"),
    ("digits", "model.heads=0", "heads"),
    ("digits", "model.heads=-2", "heads"),
    ("digits", "model.head_dim=99999999999999999999", "head_dim"),
    ("digits", "model.patch_size=0", "patch_size"),
    ("digits", "model.patch_size=-4", "patch_size"),
    ("digits", "model.patch_size=1000000000000", "patch_size"),
    ("digits", "model.dropout=-1", "dropout"),
    ("digits", "model.dropout=.nan", "dropout"),
    ("digits", "model.name=[]", "model.name"),
    ("digits", "model.name=vitt", "vitt"),
    ("digits", "model.num_classes=3", "num_classes"),
    ("digits", "model=3", "model"),
    ("digits", "data.canvas=1000000", "data.canvas"),
    ("digits", "data.canvas=99999999999999999999", "data.canvas"),
    ("digits", "data.moved=100", "moved"),
    ("digits", "data.moved=3", "moved"),
    ("digits", "data.image_size=1000000", "data.image_size"),
    ("digits", "data.image_size=[8]", "data.image_size"),
    ("digits", "data.train_limit=99999999999999999999", "data.train_limit"),
    ("digits", "data.mean=[.nan]", "data.mean"),
    ("digits", "data.mean=[1e300]", "mean"),
    ("digits", "data.std=[.inf]", "data.std"),
    ("digits", "data.std=[1e-300]", "std"),
    ("digits", "data.std=[0]", "std"),
    ("digits", "data.crop=.nan", "data.crop"),
    ("digits", "data.augment.pad=100000", "data.augment.pad"),
    ("digits", "data.augment.pad=100", "augment.pad"),
    ("digits", "data.augment.randaugment=[1000000000,9]", "randaugment"),
    ("digits", "data.augment.mixup=1e300", "mixup"),
    ("digits", "data.augment.mixup=1e-300", "mixup"),
    ("digits", "data.augment.ratio=[.nan,1]", "data.augment.ratio"),
    ("digits", "data.augment.flip=.nan", "data.augment.flip"),
    ("digits", "data.kind=sound", "data"),
    ("digits", "data.kind=a\nb", "data"),
    ("digits", "x" + ".y" * 3000 + "=1", "levels"),
    ("digits", "model.x=" + "[" * 3000 + "]" * 3000, "model.x"),
    ("digits", "model.x=[&a [*a]]", "model.x"),
    ("digits", "train.steps=" + "[" * 100 + "]" * 100, "train.steps"),
    ("photos", 'data.train=""', "data.train"),
    ("photos", "data.train=absent", "absent"),
    ("photos", "data.train=a.txt", "a.txt"),
    ("photos", "data.valid=photos/cat", "photos/cat"),
    ("table", "data.image_column=x", "'x'"),
    ("table", "data.label_column=x", "'x'"),
    ("table", "data.classes=[one]", "row 1: label"),
    ("text", "data.context=1000000000000", "data.context"),
    ("text", "data.context=2000", "context"),
    ("text", 'data.train=""', "data.train"),
    ("text", 'data.shards=""', "data.shards"),
    ("text", "data.documents=(", "documents"),
    ("text", "data.workers=100000", "data.workers"),
    ("text", "data.tokenizer={kind: bpe, vocab_size: 2147483648}", "data.tokenizer.vocab_size"),
    ("text", "data.tokenizer={kind: file, path: absent}", "absent"),
    ("text", "data.tokenizer={kind: file, path: a.txt}", "a.txt"),
    ("text", "data.tokenizer={kind: file, path: photos}", "photos"),
    ("text", 'data.tokenizer={kind: file, path: ""}', "data.tokenizer.path"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "change", "named"), VALUES, ids=lambda value: value[:40])
def test_values(here, config, change, named):
    refused(here, ["train", f"{config}.yaml", f"--{change}", *_out(change)], named)


def _out(change):
    return [] if change.startswith("out") else ["--out=new"]


# -- files ---------------------------------------------------------------------------------------


def laughs(levels=9):
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]")
    return "\n".join([*lines, DIGITS, f"out: *a{levels - 1}"])


CONFIGS = {
    "empty": (b"", "want keys and values"),
    "a list": (b"- 1", "want keys and values"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "nul": (b"out: \0", "not YAML"),
    "latin-1": (DIGITS.encode() + "out: \xe9".encode("latin-1"), "not UTF-8: byte 0xe9"),
    "utf-16": (DIGITS.encode("utf-16"), "not UTF-8: byte 0xff at position 0"),
    "utf-32": (DIGITS.encode("utf-32"), "not UTF-8"),
    "large": (b"#" * 10_000_001, "10,000,000 bytes"),
    "laughs": (laughs().encode(), "characters with its aliases"),
    "deep": (b"out: " + b"[" * 2000 + b"]" * 2000, "levels"),
    "deep aliases": (
        b"a0: &a0 []\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (n, n, n - 1) for n in range(1, 300)),
        "levels",
    ),
    "itself": (b"out: &a [*a]", "levels"),
    "an integer": (b"seed: " + b"9" * 5000, "5,000 digits"),
    "a date": (b"seed: 2026-99-99", "not YAML"),
    "a key twice": (b"seed: 1\nseed: 2", "there twice"),
    "a key of a key": (b"? {a: b}\n: 1", "not YAML"),
    "a tag": (b"seed: !!python/object/apply:os.getcwd []", "not YAML"),
    "numbers as keys": (b"1: 2", "wrong.yaml"),
    "tabs": (b"model:\n\tname: vit", "not YAML"),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("words", [("train", "--out=new"), ("experiment", "--docs=docs")])
def test_configurations(here, kind, words):
    content, named = CONFIGS[kind]
    (here / "wrong.yaml").write_bytes(content)
    name, *more = words
    before = written(here)
    code, said = command(name, "wrong.yaml", *more)
    assert code == 2
    line = said.splitlines()[0]
    assert line.startswith("translution: wrong.yaml: ")
    if named in ("wrong.yaml", "want keys and values") or name == "train":
        assert named in line
    # several wrong keys have a line each
    assert len(said.splitlines()) == 1 or kind in ("numbers as keys",), said
    assert written(here) == before


def test_a_byte_order_mark_is_no_fault(here):
    (here / "mark.yaml").write_bytes(b"\xef\xbb\xbf" + DIGITS.strip().encode())
    assert command("train", "mark.yaml", "--print") == (0, "")


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def remove(path):
    path.unlink()


def content(data):
    return lambda path: path.write_bytes(data)


def table(**columns):
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


EPS = encoded(picture(8, 8), "EPS")
PNG = encoded(picture(8, 8))
# the configuration, what is done to which file of its data, and what is named
DATA = {
    "an empty image": ("photos", "photos/cat/1.png", content(b""), "1.png: it is empty"),
    "text as image": ("photos", "photos/cat/1.png", content(b"text"), "1.png: not an image"),
    "half an image": ("photos", "photos/cat/1.png", content(PNG[:-30]), "1.png: not a readable"),
    "an EPS": ("photos", "photos/cat/1.png", content(EPS), "1.png: not an image"),
    "a dead link": ("photos", "photos/cat/9.png", lambda p: p.symlink_to("x"), "9.png"),
    "images beside": ("photos", "photos/9.png", content(PNG), "9.png"),
    "all classes": ("photos", "photos/all", lambda p: p.symlink_to("."), "'all'"),
    "no rows": (
        "table", "table.parquet",
        table(image=pyarrow.array([], "binary"), label=pyarrow.array([], "int64")),
        "table.parquet: it has no rows",
    ),
    "no columns": ("table", "table.parquet", table(), "table.parquet"),
    "an empty table": ("table", "table.parquet", content(b""), "table.parquet"),
    "no table": ("table", "table.parquet", content(b"PAR1" + b"0" * 40), "table.parquet"),
    "text labels": ("table", "table.parquet", table(image=[PNG] * 4, label=["a"] * 4), "label"),
    "gaps": ("table", "table.parquet", table(image=[PNG] * 4, label=[0, 5, 0, 5]), "label"),
    "no labels": ("table", "table.parquet", table(image=[PNG] * 4, label=[0, None, 1, 0]), "row 1"),
    "no image": ("table", "table.parquet", table(image=[PNG, b""], label=[0, 1]), "row 1"),
    "null image": ("table", "table.parquet", table(image=[PNG, None], label=[0, 1]), "row 1"),
    "a pipe as table": ("table", "table.parquet", pipe, "table.parquet"),
    "empty text": ("text", "a.txt", content(b""), "a.txt: it is empty"),
    "a mark alone": ("text", "a.txt", content(b"\xef\xbb\xbf"), "a.txt: it is empty"),
    "text of UTF-16": ("text", "a.txt", content("text".encode("utf-16")), "a.txt: not UTF-8"),
    "a pipe as text": ("text", "a.txt", pipe, "a.txt"),
    "no text": ("text", "a.txt", remove, "a.txt"),
    "the same text": ("text", "b.txt", lambda p: (p.unlink(), p.symlink_to("a.txt")), "b.txt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_data(here, kind):
    config, name, change, named = DATA[kind]
    change(here / name)
    refused(here, ["train", f"{config}.yaml", "--out=new"], named)
    if config == "text":
        refused(here, ["tokenize", f"{config}.yaml"], named)


# -- commands ------------------------------------------------------------------------------------

BAD = b"\xff".decode("utf-8", "surrogateescape")  # as Python reads such a byte of a command line
LONG = "x" * 300
# a command's words, and what is named; {run} and {text} are runs
COMMANDS = [
    ("train absent.yaml", "absent.yaml"),
    ("train ''", "CONFIG: got ''"),
    ("train photos", "photos"),
    ("train digits.yaml --out=a.txt", "a.txt"),
    ("train digits.yaml --out=photos", "photos"),
    (f"train digits.yaml --out={LONG}", "name too long"),
    ("train digits.yaml --out=digits", "digits holds a run"),
    ("train digits.yaml --out=digits --resume --model.dim=8", "model.dim"),
    ("evaluate absent", "absent"),
    ("evaluate ''", "CHECKPOINT: got ''"),
    ("evaluate photos", "photos"),
    ("evaluate digits --part=tset", "part"),
    ("evaluate digits --model.dim=8", "model"),
    ("evaluate digits --json=absent/x.json", "json"),
    ("evaluate digits --json=photos", "photos"),
    ("evaluate digits --json=''", "--json"),
    ("evaluate digits --data.crop=.nan", "data.crop"),
    ("evaluate text --data.valid=absent", "absent"),
    ("tokenize digits.yaml", "data.kind"),
    ("tokenize absent.yaml", "absent.yaml"),
    ("predict absent photos", "absent"),
    ("predict '' photos", "CHECKPOINT: got ''"),
    ("predict text photos", "text"),
    ("predict digits absent", "absent"),
    ("predict digits ''", "empty name"),
    ("predict digits a.txt", "a.txt: not an image"),
    ("predict digits pipe.png", "pipe.png"),
    ("predict digits eps.png", "eps.png: not an image"),
    ("predict digits photos --top=0", "--top"),
    ("predict digits photos --batch-size=0", "--batch-size"),
    ("predict digits photos --device=tpu", "device"),
    ("predict digits photos --output=x.txt", "x.txt"),
    ("predict digits photos --output=absent/x.csv", "absent"),
    ("predict digits photos --output=''", "--output"),
    ("generate absent --prompt=a", "absent"),
    ("generate '' --prompt=a", "CHECKPOINT: got ''"),
    ("generate digits --prompt=a", "digits"),
    ("generate text", "prompt"),
    (f"generate text --prompt={BAD}", "prompt: got '\\udcff', want UTF-8"),
    (f"generate text --prompt=a --stop={BAD}", "stop: got '\\udcff', want UTF-8"),
    ("generate text --prompt-file=absent", "absent"),
    ("generate text --prompt-file=photos/cat/0.png", "0.png"),
    ("generate text --prompt-file=photos", "photos"),
    ("generate text --prompt=a --seed=18446744073709551616", "seed"),
    ("generate text --prompt=a --samples=2 --seed=18446744073709551615", "seed"),
    ("generate text --prompt=a --seed=-99999999999999999999", "seed"),
    ("generate text --prompt=a --max-tokens=-1", "max_tokens"),
    ("generate text --prompt=a --temperature=nan", "temperature"),
    ("generate text --prompt=a --top-p=nan", "top_p"),
    ("generate text --prompt=a --slide=99", "slide"),
    ("share absent new", "absent"),
    ("share digits ''", "FOLDER: got ''"),
    ("share '' new", "CHECKPOINT: got ''"),
    ("share digits a.txt", "a.txt"),
    ("share digits a.txt/new", "a.txt"),
    ("share digits digits", "digits belongs to a run"),
    ("models nothing", "pattern"),
    ("models --batch=0", "--batch"),
    ("models --max-parameters=x", "max-parameters"),
    ("export absent --to=torch --out=x.pt2", "absent"),
    ("export digits --to=exe --out=x.pt2", "exe"),
    ("export digits --to=torch --out=x.onnx", "x.onnx"),
    ("export digits --to=torch --out=absent/x.pt2", "absent"),
    ("export digits --to=torch --out=folder.pt2", "folder.pt2"),
    ("export digits --to=torch --out=''", "--out: got ''"),
    ("export digits --to=torch --out=/proc/x.pt2", "out: /proc/x.pt2 cannot be written"),
    ("export digits --to=torch --out=x.pt2 --batch=0", "batch"),
    ("export digits --to=torch --out=x.pt2 --size=13", "13"),
    ("export digits --to=torch --out=x.pt2 --tolerance=-1", "--tolerance"),
    ("compare --out=a.txt", "a.txt"),
    ("compare --out=photos", "photos"),
    ("compare --out=''", "--out"),
    ("compare --mixers=x", "mixers"),
    ("compare --seeds=0", "seeds"),
    ("compare --seeds=99999999999999999999", "seeds"),
    ("compare --seed=18446744073709551616", "seed"),
    ("compare --steps=0", "steps"),
    ("compare --steps=99999999999999999999", "steps"),
    ("compare --batch-size=0", "batch_size"),
    ("compare --canvas=1000000", "canvas"),
    ("compare --dim=99999999999999999999", "dim"),
    ("compare --depth=1000000000", "depth"),
    ("compare --learning-rate=nan", "learning_rate"),
    ("compare --data=mnist --data-dir=photos", "photos"),
    ("experiment absent.yaml", "absent.yaml"),
    ("experiment a.txt", "a.txt"),
    ("experiment pipe.png", "pipe.png"),
    ("demo absent --port=0", "absent"),
    ("demo photos --port=0", "photos"),
    ("demo '' --port=0", "RUN: got ''"),
    ("demo photos.yaml --port=0", "photos.yaml"),
    ("demo digits --host=nowhere.invalid --port=0", "host"),
    ("demo digits --port=-1", "--port"),
    ("bench --grid=x", "grid"),
    ("bench --batch=\u00b2", "batch"),
    ("bench --dtype=int8", "int8"),
    ("bench --json=absent/x.json", "absent"),
    ("bench --against=a.txt", "a.txt"),
    ("bench-step --json=absent/x.json", "absent"),
    ("bench-gpu --out=absent/x.json", "absent"),
    ("bench-tune --json=absent/x.json", "absent"),
    ("nothing", "nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), COMMANDS, ids=lambda value: value[:60])
def test_commands(here, words, named):
    os.mkfifo(here / "pipe.png")
    (here / "eps.png").write_bytes(EPS)
    (here / "folder.pt2").mkdir()
    refused(here, shlex.split(words), named, codes=(1, 2))


# -- damaged runs --------------------------------------------------------------------------------

DAMAGE = {
    "no description": ("checkpoint.json", remove),
    "an empty description": ("checkpoint.json", content(b"")),
    "a description that is a list": ("checkpoint.json", content(b"[]")),
    "a description of another kind": ("checkpoint.json", content(b"{}")),
    "a description that is not text": ("checkpoint.json", content(bytes(range(256)))),
    "no weights": ("model.safetensors", remove),
    "empty weights": ("model.safetensors", content(b"")),
    "weights of text": ("model.safetensors", content(b"text" * 9)),
    "half the weights": (
        "model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-99]),
    ),
    "no tokenizer": ("tokenizer.json", remove),
    "an empty tokenizer": ("tokenizer.json", content(b"")),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "words",
    [
        "evaluate digits --json=x.json", "predict digits photos --output=x.csv",
        "share digits new", "export digits --to=torch --out=x.pt2", "demo digits --port=0",
        "evaluate text --json=x.json", "generate text --prompt=a", "share text new",
        "export text --to=torch --out=x.pt2",
    ],
    ids=lambda words: "-".join(words.split()[:2]),
)  # fmt: skip
def test_damaged_runs(here, kind, words):
    name, change = DAMAGE[kind]
    run = "digits" if "digits" in words else "text"
    if name == "tokenizer.json" and (run == "digits" or "generate" not in words):
        pytest.skip("it is not needed")
    for path in (here / run / "checkpoints").glob(f"*/{name}"):
        change(path)
    refused(here, words.split(), run, codes=(1, 2))


# -- in processes of their own ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "before", "named"),
    [
        (
            "export digits --to=torch --out=x.pt2 --no-check",
            functools.partial(forked.full_disk, 9000),
            "x.pt2",
        ),
        ("train digits.yaml --train.steps=99999999999999999999", None, "train.steps"),
        ("generate text --prompt=\udcff", None, "prompt"),
    ],
)
def test_in_processes(here, words, before, named):
    before_files = written(here)
    code, _, said = forked.command(*words.split(), before=before)
    assert code in (1, 2), (code, said)
    (line,) = said.splitlines()
    assert line.startswith("translution: ")
    assert named in line
    assert written(here) == before_files
