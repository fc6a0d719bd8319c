"""What a user meets first: what a run says, two runs in one folder, a name without its file."""

from __future__ import annotations

import contextlib
import fcntl
import io
import multiprocessing
import os
import pty
import re
import shutil
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lightning")
pytest.importorskip("datasets")
pytest.importorskip("typer")
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import forked
from translution.apps import cli
from translution.apps.config import load
from translution.apps.training import messages, progress
from translution.apps.training.checkpoints import (
    find_checkpoint,
    latest,
    open_checkpoint,
    read_description,
)
from translution.apps.training.config import Config
from translution.apps.training.run import LOCK
from translution.models.pretrained import Pretrained

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {name: vit, mixer: attention, patch_size: 4, dim: 16, depth: 1, heads: 2}
data: {kind: images, format: digits, canvas: 12, train_limit: 64, valid_limit: 20}
train: {steps: 6, batch_size: 16, validate_every: 3, save_every: 3, log_every: 1, device: cpu}
"""


def command(*words):
    """Exit code, what it wrote, and its errors; in this process, as a new one takes seconds."""
    argv, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    try:
        sys.argv = ["translution", *map(str, words)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The recipe, the run's folder, and what `train` said."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "small.yaml").write_text(RECIPE)
    code, out, err = command("train", folder / "small.yaml", f"--out={folder / 'run'}")
    assert code == 0, err
    return folder / "small.yaml", folder / "run", out


def refused(*words):
    """The one line of an error."""
    code, _, err = command(*words)
    assert code == 2
    assert err.startswith("translution: ")
    assert len(err.splitlines()) == 1
    return err


# -- what a run says -----------------------------------------------------------------------------


def test_a_run_says_what_it_is_and_what_to_do_next(ended):
    _, run, out = ended
    assert out.startswith(
        "data   64 images to train, 20 images to validate; 10 classes; 12×12 pixels\n"
        "model  vit, attention: "
    )
    parameters = sum(p.numel() for p in open_checkpoint(run).model.parameters())
    assert f"{parameters:,} parameters" in out
    assert re.search(r"[\d.]+ k multiply-adds per image\non     cpu, 1 thread; float32\n", out)
    assert "steps  6 of 16 images (1.5 epochs); validation every 3\n" in out
    assert "Epoch" not in out
    assert re.search(r"step 3 of 6 \(epoch 0.75\): loss .*, valid loss .*, MFU \d+%", out)
    last = read_description(run / "checkpoints" / "last-000006")
    best = read_description(find_checkpoint(run))
    assert f"  last  step 6: valid_loss {last.metrics['valid_loss']:.5g}, " in out
    assert f"  best  step {best.step}: valid_loss {best.metrics['valid_loss']:.5g}, " in out
    assert "evaluate and the commands below use the best checkpoint" in out
    lines = out.splitlines()
    following = lines[lines.index("Next:") + 1 :]
    assert following[0] == f"  translution evaluate {run}"
    assert command(*following[0].split()[1:])[0] == 0  # as it stands


def test_text_has_a_vocabulary_and_a_context(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    (tmp_path / "b.txt").write_text("whether 'tis nobler in the mind to suffer. " * 40)
    (tmp_path / "text.yaml").write_text(f"""
model: {{name: gpt, mixer: attention, dim: 8, depth: 1, heads: 1}}
data: {{kind: text, train: {tmp_path / "a.txt"}, valid: {tmp_path / "b.txt"}, context: 8,
        shards: {tmp_path / "shards"}, tokenizer: {{kind: bytes}}}}
train: {{steps: 2, batch_size: 2, device: cpu}}
""")
    code, out, err = command("train", tmp_path / "text.yaml", f"--out={tmp_path / 'run'}")
    assert code == 0, err
    assert re.search(r"data   [\d,]+ tokens to train, .*; a vocabulary of \d+\n", out)
    assert "multiply-adds per token" in out
    assert "of 2 texts of 8 tokens" in out
    assert f"translution generate {tmp_path / 'run'} --prompt 'whether '\"'\"'tis nobler" in out


def in_a_terminal(*words, until=b"\0", send=b""):
    """A command on a terminal of 80 columns: exit code and what it drew; `send` is typed after
    `until` was seen."""
    process, terminal = pty.fork()
    if not process:
        code = 1
        try:
            sys.argv = ["translution", *map(str, words)]
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal whose process has ended
        while some := os.read(terminal, 65536):
            drawn += some
            if send and until in drawn:
                os.write(terminal, send)
                send = b""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn.decode())  # colours; the rest moves the cursor
    return code, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", plain)


def test_the_bar_fits_a_terminal_of_80_columns(ended, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.chdir(tmp_path)
    code, drawn = in_a_terminal("train", ended[0], "--train.steps=30", "--out=run")
    assert code == 0, drawn
    assert max(map(len, drawn.splitlines())) <= 80
    bars = re.findall(r"^(?:train|valid) (\S+) ", drawn, flags=re.M)
    assert {len(bar) for bar in bars} == {10}  # nothing was squeezed for want of room
    assert "…" not in drawn
    assert re.search(
        r"train ━+ 30/30 \d:\d\d:\d\d left, loss \d\.\d{3}, \S+ steps/s, [\d,]+ images/s", drawn
    )
    assert re.search(r"step 30 of 30 \(epoch 7.5\): loss .*, valid loss .*, valid accuracy ", drawn)
    assert "Epoch" not in drawn


@pytest.mark.parametrize("width", [60, 70, 80, 90, 120])
@pytest.mark.parametrize("steps", [30, 100_000])
def test_the_bar_leaves_out_what_has_no_room(width, steps):
    bar = progress.ProgressBar()
    bar.console = Console(width=width, file=io.StringIO(), force_terminal=True)
    values = {"train_loss": 1234.5678, "images_per_second": 123456.7, "mfu": 0.5, "memory_gb": 11}
    trainer = SimpleNamespace(is_global_zero=True, global_step=7, progress_bar_metrics=values)
    bar.on_train_start(trainer, SimpleNamespace(steps=steps))
    bar.on_train_batch_end(trainer, SimpleNamespace(steps=steps))
    bar.teardown()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", bar.console.file.getvalue())
    last = text.strip().splitlines()[-1]
    assert re.match(
        rf"train \S{{10}} 7/{steps} -:--:-- left, loss 1234\.568", last
    )  # nothing squeezed
    assert len(last) <= width
    assert ("GB" in last) == (width == 120 or (width == 90 and steps == 30))


def test_ctrl_c_saves_where_it_is(ended, tmp_path):
    words = ["train", ended[0], f"--out={tmp_path / 'run'}", "--train.workers=1"]
    words += ["--train.steps=5000", "--train.validate_every=1000", "--train.save_every=5000"]
    code, drawn = in_a_terminal(*words, until=b"steps/s", send=b"\x03")
    assert code == 130, drawn
    assert "Traceback" not in drawn
    assert "Stopped. The same command with --resume continues the run" in drawn
    assert 0 < int(latest(tmp_path / "run" / "checkpoints").name.removeprefix("last-")) < 1000


def test_ctrl_c_while_it_is_imported(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_app", interrupted)
    assert command("train") == (130, "", "")


def test_tensorboard_has_the_configuration(ended):
    found = yaml.safe_load((ended[1] / "tensorboard" / "hparams.yaml").read_text())
    assert found["model.mixer"] == "attention"
    assert found["train.steps"] == 6


def test_unreadable_images_are_not_counted(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (12, 12), 10 * i).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "dog" / "3.png").write_bytes(b"no picture")
    folders = f"train: {tmp_path / 'images'}, valid: {tmp_path / 'other'}, bad: skip"
    (tmp_path / "images").rename(tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "images")
    (tmp_path / "other" / "dog" / "3.png").unlink()
    (tmp_path / "a.yaml").write_text(f"""
model: {{name: vit, mixer: attention, patch_size: 4, dim: 8, depth: 1, heads: 1}}
data: {{kind: images, format: folder, {folders}, image_size: 12, channels: 1}}
train: {{steps: 1, batch_size: 4, device: cpu}}
""")
    code, out, err = command("train", tmp_path / "a.yaml", f"--out={tmp_path / 'a'}")
    assert code == 0, err
    assert "data   19 images to train, 19 images to validate (1 unreadable left out); " in out
    words = ("train", tmp_path / "a.yaml", f"--out={tmp_path / 'b'}", "--data.cache=false")
    assert "data   at most 20 images to train, at most 19 images to " in command(*words)[1]


def test_a_run_that_wants_a_gpu_says_so(monkeypatch):
    config = load(Config, ROOT / "recipes" / "cifar10.yaml", ["--train.device=cpu"])
    data = SimpleNamespace(part=lambda _: None, steps=35_000, facts={})
    monkeypatch.setattr(messages, "matmul_rate", lambda *_: 1e11)
    cost = messages.Cost(5_000_000, 4e8)
    said = messages.too_slow(config, data, cost)
    assert said == "more than 30 hours on this CPU; this run is meant for a GPU"
    data.steps = 350_000
    assert "more than 12 days on" in messages.too_slow(config, data, cost)
    data.steps = 35
    assert messages.too_slow(config, data, cost) == ""


# -- a folder and its run ------------------------------------------------------------------------


def holding(folder, ready):
    from filelock import FileLock

    with FileLock(folder / LOCK):
        ready.set()
        time.sleep(60)


def test_two_runs_in_one_folder(ended, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=holding, args=(folder, ready))
    other.start()
    assert ready.wait(30)
    told = refused("train", ended[0], f"--out={folder}")
    assert f"out: another process is training in {folder}" in told
    assert [path.name for path in folder.iterdir()] == [LOCK]
    os.kill(other.pid, signal.SIGKILL)  # a lock ends with its process
    other.join()
    assert command("train", ended[0], f"--out={folder}")[0] == 0


def test_a_run_holds_its_folder(ended, tmp_path, monkeypatch):
    from translution.apps.training import run

    def second(*_):
        monkeypatch.setattr(run, "model_of", first)
        said.append(refused("train", ended[0], f"--out={tmp_path / 'run'}"))
        return first(*_)

    first, said = run.model_of, []
    monkeypatch.setattr(run, "model_of", second)
    assert command("train", ended[0], f"--out={tmp_path / 'run'}")[0] == 0
    assert "another process is training" in said[0]


def test_resuming_what_has_ended(ended):
    recipe, run, _ = ended
    before = (run / "config.yaml").read_bytes(), (run / "config.yaml").stat().st_mtime_ns
    words = ("train", recipe, f"--out={run}", "--resume")
    code, out, _ = command(*words, "--train.log_every=5")
    assert code == 0
    assert out.startswith(f"{run} is already at step 6 of 6")
    assert "valid_loss" in out
    assert "; a larger --train.steps continues it" in out
    epochs = command(*words, "--train.steps=null", "--train.epochs=1.5")[1]
    assert "; a larger --train.epochs continues it" in epochs
    told = refused(*words, "--train.steps=4")
    assert f"train.steps: got 4 steps, but {run} is already at step 6" in told
    assert before == ((run / "config.yaml").read_bytes(), (run / "config.yaml").stat().st_mtime_ns)


def test_a_checkpoint_that_is_cut_is_passed_over_aloud(ended, tmp_path):
    recipe, run = ended[0], tmp_path / "run"
    command("train", recipe, f"--out={run}")
    last, best = (latest(run / "checkpoints"), run / "checkpoints" / "best-000006")
    state = last / "state.pt"
    assert last.name == "last-000006"
    state.write_bytes(state.read_bytes()[:1000])
    assert best.is_dir()
    words = ("train", recipe, f"--out={run}", "--resume", "--train.steps=8", "--train.save_every=8")
    code, out, err = command(*words)
    assert code == 0, err
    assert f"cut    {state}: was changed or damaged" in out
    assert f"from   step 6, {best}\n" in out
    assert latest(run / "checkpoints").name == "last-000008"


# -- commands ------------------------------------------------------------------------------------


def test_a_configuration_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny-digits.yaml").write_text(RECIPE)
    told = refused("train", "tiny-digit")
    assert told.endswith("no such file tiny-digit; did you mean recipes/tiny-digits.yaml?\n")
    assert "CONFIG: no such file recipes/nothing.yaml, want" in refused(
        "train", "recipes/nothing.yaml"
    )
    assert "is a folder without config.yaml" in refused("tokenize", tmp_path / "recipes")


def test_evaluation_has_the_checkpoints_model_and_one_device(ended):
    _, run, _ = ended
    for key in ("--model.dim=8", "model=other"):
        assert "model: a checkpoint has its own model, got" in refused("evaluate", run, key)
    about = next((run / "checkpoints").glob("best-*/checkpoint.json"))
    kept = about.read_text()
    try:
        about.write_text(re.sub(r'"devices": 1', '"devices": 16', kept))
        assert '"devices": 16' in about.read_text()
        code, out, err = command("evaluate", run)
        assert code == 0, err
        assert "valid_loss" in out
    finally:
        about.write_text(kept)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--top-k=-1", "top_k: got -1, want 0 (all) or more"),
        ("--top-p=0", "top_p: got 0.0, want more than 0, at most 1 (all)"),
        ("--slide=-2", "slide: got -2, want 1 to the context, 0 (none) or -1 (a quarter)"),
        ("--temperature=-1", "temperature: got -1.0, want 0 (the likeliest) or more"),
        ("--temperature=nan", "temperature: got nan, want"),
        ("--max-tokens=-1", "max_tokens: got -1, want 0 or more"),
        ("--samples=0", "samples: got 0, want at least 1"),
        ("--stop=", "stop: got an empty text, want one character at least"),
    ],
)
def test_options_of_generation_come_before_the_checkpoint(option, told):
    assert told in refused("generate", "no-such-folder", "--prompt=a", option)


def test_sharing(ended, tmp_path):
    _, run, _ = ended
    folder = tmp_path / "shared"
    code, out, err = command("share", run, folder)
    assert code == 0, err
    assert str(folder) in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    x, trained = torch.randn(2, 1, 12, 12), open_checkpoint(run).model
    with torch.no_grad():
        assert torch.equal(Pretrained.from_pretrained(folder)(x), trained(x))
    assert load_file(folder / "model.safetensors").keys() == trained.state_dict().keys()
    assert "FOLDER: " in refused("share", run, run)
    assert "holds a saved model, but no checkpoint" in refused("share", folder, tmp_path / "other")
    (tmp_path / "file").write_text("")
    assert "want a folder" in refused("share", run, tmp_path / "file")


def test_sharing_on_the_hub(ended, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, name, **keywords):
            calls.append((name, keywords["private"]))
            return type("Repo", (), {"repo_id": name})

        def upload_folder(self, repo_id, folder_path, **keywords):
            if repo_id == "me/none":
                raise RuntimeError("no\nroom")
            calls.append((repo_id, sorted(keywords["allow_patterns"])))
            return "https://here"

    monkeypatch.setattr(hub, "HfApi", Api)
    words = ("share", ended[1], tmp_path / "shared")
    code, out, err = command(*words, "--push", "me/model", "--private")
    assert code == 0, err
    assert out.splitlines()[-1] == "https://here"
    assert calls[0] == ("me/model", True)
    assert calls[1][1] == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json",
    ]  # fmt: skip
    assert "push: me/none: no room" in refused(*words, "--push", "me/none")


def test_a_warning_names_no_file_of_the_library(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words and more words. " * 30)
    (tmp_path / "text" / "b.txt").write_bytes(b"\xff\xfe broken")
    (tmp_path / "text.yaml").write_text(f"""
model: {{name: gpt}}
data: {{kind: text, train: {tmp_path / "text"}, holdout: 0.0, bad: skip, context: 8,
        shards: {tmp_path / "shards"}, tokenizer: {{kind: bytes}}}}
train: {{steps: 2}}
""")
    code, _, err = forked.command("tokenize", tmp_path / "text.yaml")
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "left out" in line]
    assert line.startswith("translution: train: left out: ")
    assert ".py" not in err
