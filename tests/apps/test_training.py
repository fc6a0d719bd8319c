"""Runs: the same numbers after any interruption, checkpoints that are whole, errors in one line."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("pydantic")
pytest.importorskip("kornia")
pytest.importorskip("typer")
from PIL import Image
from safetensors.torch import load_file, save_file

import forked
from translution.apps import cli
from translution.apps.config import as_yaml, load, parse
from translution.apps.training import callbacks, checkpoints, strategies
from translution.apps.training import run as run_module
from translution.apps.training.checkpoints import latest, open_checkpoint
from translution.apps.training.config import Config, TrainOptions, config_file
from translution.apps.training.data import Data
from translution.apps.training.devices import Diverged
from translution.apps.training.logs import MetricsFile
from translution.apps.training.predict import predict
from translution.apps.training.run import evaluate, train
from translution.apps.training.tasks import Classification, LanguageModel, MeanLoss, learning_rate
from translution.models import ViT, create_model
from translution.models.pretrained import Pretrained
from translution.utils import measuring

TINY = {
    "model": {"name": "vit", "mixer": "translution", "patch_size": 4, "dim": 16, "depth": 1,
              "heads": 2, "dropout": 0.1},
    "data": {"kind": "images", "format": "digits", "canvas": 12, "moved": True,
             "train_limit": 96, "valid_limit": 40, "augment": {"erasing": 0.5, "mixup": 0.8}},
    "train": {"steps": 12, "batch_size": 16, "accumulate": 2, "learning_rate": 3e-3, "warmup": 2,
              "ema": 0.8, "clip": 1.0, "validate_every": 4, "save_every": 3, "log_every": 2,
              "device": "cpu"},
}  # fmt: skip
MEASURED = {"seconds", "mfu", "memory_gb", "images_per_second"}  # differ from run to run


def config(*changes, **parts):
    return parse(Config, TINY | parts, "here", changes)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def weights(folder, kind="last"):
    return load_file(checkpoints.newest(folder / "checkpoints", kind) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    metrics = train(config(), folder)
    return folder, metrics


# -- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(finished):
    folder, metrics = finished
    assert load(Config, folder / "config.yaml") == config()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names[-1] == "last-000012"
    assert len(names) == 2
    assert any(path.name.startswith("events") for path in (folder / "tensorboard").iterdir())
    found = rows(folder)
    assert [int(row["step"]) for row in found if row["train_loss"]] == [2, 4, 6, 8, 10, 12]
    assert [int(row["step"]) for row in found if row["valid_loss"]] == [4, 8, 12]
    assert metrics["valid_loss"] == pytest.approx(float(found[-1]["valid_loss"]))
    whole = callbacks.read_curves(folder)
    assert {"mfu", "memory_gb", "images_per_second", "learning_rate"} <= whole[0].keys()


def test_the_checkpoint_is_the_averaged_model(finished):
    folder, metrics = finished
    checkpoint = open_checkpoint(folder / "checkpoints" / "last-000012")
    assert checkpoint.step == 12
    assert checkpoint.classes == [str(i) for i in range(10)]
    assert not checkpoint.model.training
    found = evaluate(folder / "checkpoints" / "last-000012", "valid", config())
    assert found["valid_loss"] == pytest.approx(metrics["valid_loss"], rel=1e-5)
    state = torch.load(folder / "checkpoints/last-000012/state.pt", weights_only=True)
    current = {k.removeprefix("model."): v for k, v in state["current_model_state"].items()}
    assert not same(current, weights(folder))
    best = open_checkpoint(folder)  # a run stands for its best
    losses = [float(row["valid_loss"]) for row in rows(folder) if row["valid_loss"]]
    assert best.metrics["valid_loss"] == pytest.approx(min(losses))


KILLS = [
    "between",
    "writing",
    "before renaming",
    "before removing",
    "validating",
    "SIGTERM",
    "Ctrl-C",
]


def killed(folder, moment):
    """Train there, and die at the second time of this moment."""
    times = [0]

    def die(how=signal.SIGKILL):
        times[0] += 1
        if times[0] == 2:
            os.kill(os.getpid(), how)

    def before(owner, name, how=signal.SIGKILL):
        real = getattr(owner, name)

        def dying(*args, **keywords):
            die(how)
            return real(*args, **keywords)

        setattr(owner, name, dying)

    if moment == "between":
        before(callbacks.Meter, "on_train_batch_end")
    elif moment == "writing":
        before(checkpoints.torch, "save")  # the weights are written, the state is not
    elif moment == "before renaming":
        before(checkpoints.os, "replace")
    elif moment == "before removing":
        before(checkpoints.Folders, "remove_checkpoint")
    elif moment == "validating":
        before(callbacks.Task, "validation_step")
    else:
        how = signal.SIGTERM if moment == "SIGTERM" else signal.SIGINT
        before(callbacks.Meter, "on_train_batch_end", how)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    train(config(), folder, resume=True)


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_resumed_is_the_same_run(finished, tmp_path, moment):
    folder = tmp_path / "run"
    code = forked.exit_code(killed, folder, moment)
    assert code == -signal.SIGKILL or moment in ("SIGTERM", "Ctrl-C")
    for left in (folder / "checkpoints").glob("*-*"):
        if not left.name.startswith("."):
            open_checkpoint(left)  # each is whole
    train(config(), folder, resume=True)
    whole, _ = finished
    assert same(weights(folder), weights(whole))
    assert same(weights(folder, "best"), weights(whole, "best"))
    assert rows(folder) == rows(whole)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("moment", ["SIGTERM", "Ctrl-C"])
def test_signals_save_first(tmp_path, moment):
    assert forked.exit_code(killed, tmp_path / "run", moment) != 0  # it has not finished
    assert latest(tmp_path / "run" / "checkpoints").name == "last-000001"


def test_workers_and_another_seed(finished, tmp_path):
    """Loader processes change nothing; a seed changes everything."""
    train(config("--train.workers=2"), tmp_path / "workers")
    assert same(weights(tmp_path / "workers"), weights(finished[0]))
    train(config("--seed=1"), tmp_path / "seed")
    assert not same(weights(tmp_path / "seed"), weights(finished[0]))


def test_accumulation_is_one_batch(tmp_path):
    """Without what is random, two halves are the whole."""
    plain = ["--model.dropout=0", "--data.augment={}", "--train.steps=3", "--train.ema=null"]
    train(config(*plain), tmp_path / "two")
    train(config(*plain, "--train.accumulate=1"), tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-4)


def test_it_learns(tmp_path):
    easy = ["--data.moved=false", "--data.augment={}", "--model.dropout=0", "--model.dim=32",
            "--data.train_limit=1000", "--train.steps=80", "--train.batch_size=64",
            "--train.accumulate=1", "--train.validate_every=80",
            "--train.save_every=80"]  # fmt: skip
    metrics = train(config(*easy), tmp_path / "run")
    assert metrics["valid_accuracy"] > 0.5


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_precision_and_compile(tmp_path, precision):
    metrics = train(config(f"--train.precision={precision}", "--train.steps=2"), tmp_path / "run")
    assert metrics["valid_loss"] > 0


def test_the_columns_of_the_metrics_are_in_order(finished):
    with (finished[0] / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    assert reader.fieldnames == [
        "step", "epoch", "seconds", "learning_rate",
        "train_loss", "train_accuracy", "train_accuracy_top5", "train_skipped",
        "valid_loss", "valid_accuracy", "valid_accuracy_top5", "valid_skipped",
        "images_per_second", "memory_gb", "mfu",
    ]  # fmt: skip
    assert [row["epoch"] for row in found if row["valid_loss"]] == ["0.6667", "1.3333", "2"]
    seconds = [float(row["seconds"]) for row in found]
    assert seconds == sorted(seconds)
    digits = [re.sub(r"e.*|\D|^0\.0*", "", value) for row in found for value in row.values()]
    assert max(map(len, digits)) <= 7


def test_metrics_of_an_earlier_version_are_continued(tmp_path):
    """With other columns, and a last line that was cut off."""
    (tmp_path / "metrics.csv").write_text(
        "mfu,step,train_loss,valid_loss\n0.5,2,1.25,\n,4,,1.5\n0.5,6,1.0,\n0.5,8"
    )
    file = MetricsFile(tmp_path, 4)
    file.log_metrics({"train_loss": 1 / 3, "epoch": 1.5}, 6)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train_loss,valid_loss,mfu", "2,,1.25,,0.5", "4,,,1.5,", "6,1.5,0.3333333,,",
    ]  # fmt: skip


def test_tensorboard_has_groups(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert {
        "train/loss", "train/learning_rate", "train/epoch", "valid/loss", "valid/accuracy",
        "speed/images_per_second", "speed/mfu", "speed/memory_gb", "speed/seconds",
    } <= set(events.Tags()["scalars"])  # fmt: skip


def test_seconds_go_on_in_a_resumed_run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = [row["seconds"] for row in callbacks.read_curves(folder)]
    train(config("--train.steps=14"), folder, resume=True)
    after = [row["seconds"] for row in callbacks.read_curves(folder)]
    assert after[: len(before)] == before
    assert after[len(before)] >= before[-1] > 0


def test_a_warmup_that_is_too_long_is_shortened_aloud(tmp_path, capsys):
    train(config("--train.steps=10", "--train.warmup=500", "--train.log_every=1"), tmp_path / "run")
    said = "warmup 1 steps, because train.warmup=500 is not shorter than the run"
    assert said in capsys.readouterr().out
    rates = [
        r["learning_rate"] for r in callbacks.read_curves(tmp_path / "run") if "train_loss" in r
    ]
    assert max(rates) == pytest.approx(3e-3, rel=0.05)


# -- errors --------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(finished, tmp_path):
    folder, metrics = finished
    with pytest.raises(ValueError, match=r"out: .* holds a run; --resume continues it"):
        train(config(), folder)
    with pytest.raises(ValueError, match=r"train.batch_size was 16, is 32"):
        train(config("--train.batch_size=32"), folder, resume=True)
    assert train(config(), folder, resume=True) == pytest.approx(metrics)  # it has ended
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="want a new or empty folder"):
        train(config(), tmp_path)


def test_checkpoints_that_do_not_fit(finished, tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"is not a folder"):
        open_checkpoint(tmp_path / "nothing")
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    path = latest(copy / "checkpoints")
    whole = load_file(path / "model.safetensors")
    wrong = {name: value for name, value in whole.items() if name != "norm.weight"}
    wrong |= {"head.weight": torch.zeros(3, 16), "other": torch.zeros(1)}
    save_file(wrong, path / "model.safetensors")
    told = r"norm.weight is missing.*other is not.*head.weight has shape \(3, 16\), want \(10, 16\)"
    with pytest.raises(ValueError, match=told):
        open_checkpoint(path)
    (path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_checkpoint(path)
    for state in (copy / "checkpoints").glob("*/state.pt"):
        state.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"no checkpoint of .* whole: .*state.pt: was changed"):
        train(config("--train.steps=14"), copy, resume=True)
    about = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(about | {"format": "other"}))
    with pytest.raises(ValueError, match="format 'other', want"):
        open_checkpoint(path)


def rewrite(checkpoint, **values):
    """Change keys of checkpoint.json; None removes one."""
    file = checkpoint / "checkpoint.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def flip(file, at=-1):
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
def test_a_damaged_file_is_named_and_the_other_checkpoint_used(finished, tmp_path, capsys, name):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    last, best = (checkpoints.newest(run / "checkpoints", kind) for kind in ("last", "best"))
    if name == "checkpoint.json":
        (last / name).write_text("{")
    else:
        flip(last / name)
    told = "not a translution model" if name == "checkpoint.json" else "was changed or damaged"
    train(config("--train.steps=14"), run, resume=True)
    out = capsys.readouterr().out
    assert f"cut    {last / name}: {told}" in out
    assert f"from   step {best.name[-2:].lstrip('0')}, {best}" in out
    assert latest(run / "checkpoints").name == "last-000014"
    assert checkpoints.damage(latest(run / "checkpoints")) is None


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
def test_a_damaged_best_checkpoint_is_not_used(finished, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    last, best = (checkpoints.newest(run / "checkpoints", kind) for kind in ("last", "best"))
    flip(best / name) if name == "model.safetensors" else (best / name).unlink()
    for read in (open_checkpoint, lambda run: evaluate(run, "valid", config())):
        with pytest.raises(ValueError, match=rf"{best / name}: .*; {last} is whole"):
            read(run)
    with pytest.raises(ValueError, match=str(best / name)):
        Pretrained.from_pretrained(run)
    (last / "state.pt").unlink()  # only a resumed run needs it
    assert open_checkpoint(last).step == 12


def wrong_keys():
    """Each key of checkpoint.json that is required, missing and of another type."""
    for key in ("architecture", "options", "config", "classes", "step", "metrics"):
        yield key, None
        yield key, True if key == "step" else 5
    yield "step", -1
    yield "files", ["a"]
    yield "tied", "head"
    yield "metrics", {"loss": "small"}
    yield "classes", ["one"]


@pytest.mark.parametrize(("key", "value"), list(wrong_keys()))
def test_a_wrong_key_of_a_description_is_named(finished, tmp_path, key, value):
    path = tmp_path / "copy"
    shutil.copytree(latest(finished[0] / "checkpoints"), path)
    rewrite(path, **{key: value})
    for read in (open_checkpoint, Pretrained.from_pretrained):
        with pytest.raises(ValueError, match=rf"checkpoint.json: {key}: ") as raised:
            read(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("dim", 10**12, "its option dim is 1000000000000"),
        ("depth", 10**9, "its option depth is 1000000000"),
        ("depth", 10**6, "the model has many more"),
        ("dim", 2**20, "has shape"),
        ("dim", "wide", "dim: got 'wide', want"),
        ("dim", None, "dim: got None, want"),
        ("depth", True, "depth: got True, want"),
        ("mlp_ratio", -1, "'vit': "),
        ("mlp_ratio", 1e300, "'vit': "),
        ("heads", 0, "'vit': heads"),
    ],
)
def test_sizes_are_compared_before_they_are_allocated(finished, tmp_path, option, value, told):
    path = tmp_path / "copy"
    shutil.copytree(latest(finished[0] / "checkpoints"), path)
    options = json.loads((path / "checkpoint.json").read_text())["options"]
    rewrite(path, options=options | {option: value})
    for read in (open_checkpoint, Pretrained.from_pretrained):
        with pytest.raises(ValueError, match=told) as raised:
            read(path)
        assert str(path) in str(raised.value)


def test_checkpoints_of_the_first_version_are_read(finished, tmp_path):
    """They named the model in another way, and had no hashes."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for path in (run / "checkpoints").iterdir():
        content = json.loads((path / "checkpoint.json").read_text())
        model = {"name": content["architecture"], "options": content["options"]}
        rewrite(
            path, format="translution-checkpoint-1", model=model, architecture=None, options=None,
            files=None,
        )  # fmt: skip
    last = latest(run / "checkpoints")
    assert same(open_checkpoint(last).model.state_dict(), weights(finished[0]))
    for model, told in (
        (None, "model: got None"), ({"name": 5, "options": {}}, "model.name: got 5"),
        ({"name": "vit"}, "model.options: got None"),
    ):  # fmt: skip
        shutil.copytree(last, tmp_path / "copy", dirs_exist_ok=True)
        rewrite(tmp_path / "copy", model=model)
        with pytest.raises(ValueError, match=f"checkpoint.json: {told}"):
            open_checkpoint(tmp_path / "copy")
    train(config("--train.steps=14"), run, resume=True)


def test_a_deleted_configuration_is_restored(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config.yaml was missing, and is written again from"):
        train(config("--train.steps=14"), run, resume=True)
    (run / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config.yaml was missing"):
        assert config_file(run) == run / "config.yaml"
    assert load(Config, run / "config.yaml") == config("--train.steps=14")


def test_nothing_is_unpickled(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    for state in (copy / "checkpoints").glob("*/state.pt"):
        torch.save({"state": resource.getrusage}, state)
        rewrite(state.parent, files={})  # as earlier versions, which stored no hashes
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors"):
        train(config("--train.steps=14"), copy, resume=True)


def test_a_full_disk_leaves_the_earlier_checkpoints(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.copy(folder / "config.yaml", tmp_path / "tiny.yaml")
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    words = ("train", tmp_path / "tiny.yaml", f"--out={folder}", "--resume", "--train.steps=20")
    smaller = functools.partial(forked.full_disk, 40_000)  # than the weights
    code, _, err = forked.command(*words, before=smaller)
    assert code == 2
    told = err.splitlines()[-1]
    assert told.startswith("translution: ")
    assert "cannot be written, the earlier checkpoints are whole" in told
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before
    for path in (folder / "checkpoints").iterdir():
        open_checkpoint(path)


def test_a_full_disk_ends_share_in_one_line(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    smaller = functools.partial(forked.full_disk, 10_000)  # than the weights
    code, _, err = forked.command("share", run, tmp_path / "shared", before=smaller)
    assert code == 2
    (line,) = err.splitlines()
    assert "model.safetensors: cannot be written" in line
    assert not (tmp_path / "shared").exists()


def test_a_loss_that_is_not_a_number(tmp_path):
    with pytest.raises(Diverged, match=r"loss: is .* at step .*learning_rate"):
        train(config("--train.learning_rate=1e30", "--train.clip=null"), tmp_path / "run")


def test_the_mean_loss_is_that_of_samples():
    mean = MeanLoss()
    mean.update(torch.tensor(2.0), 3)
    mean.update(torch.tensor(6.0), torch.tensor(1))
    assert mean.compute() == 3
    mean.update(torch.tensor(math.nan), 1)
    mean.update(torch.tensor(1.0), 9)
    assert math.isnan(mean.compute())


def nan_loss(at, monkeypatch, part="train"):
    """Let the loss of one batch be NaN."""
    real, count = Classification.loss, [0]

    def loss(self, batch, meters):
        value = real(self, batch, meters)
        count[0] += meters is getattr(self, f"{part}ing_meters" if part == "train" else METERS)
        if count[0] == at:
            meters["loss"].update(torch.tensor(math.nan), 1)
        return value

    monkeypatch.setattr(Classification, "loss", loss)


METERS = "validation_meters"


@pytest.mark.parametrize(("part", "at"), [("train", 3), ("valid", 4)])
def test_one_loss_that_is_nan_stops_the_run(tmp_path, monkeypatch, part, at):
    """Also if later ones are finite; what was saved before stays as it is."""
    nan_loss(at, monkeypatch, part)
    with pytest.raises(Diverged, match="loss: is n"):
        train(config("--train.accumulate=1"), tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*"))
    assert kept == ([] if part == "train" else ["best-000004", "last-000006"])
    found = (tmp_path / "run" / "metrics.csv").read_text() if kept else ""
    assert "nan" not in found


def test_a_test_with_a_loss_that_is_nan(finished, monkeypatch):
    nan_loss(2, monkeypatch, "valid")
    for part in ("valid", "test"):
        with pytest.raises(Diverged, match=f"loss: is nan on data.{part}"):
            evaluate(finished[0], part, config())
        nan_loss(2, monkeypatch, "valid")


def test_the_commands_end_with_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(as_yaml(config()))
    words = ["train", str(tmp_path / "tiny.yaml"), f"--out={tmp_path / 'run'}",
             "--train.learning_rate=1e30", "--train.clip=null", "--train.warmup=0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["translution", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("translution: ")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def poison(self, trainer, task, *_):
        if trainer.global_step == 2:  # after the loss of the step, before the checkpoint
            with torch.no_grad():
                next(task.model.parameters()).view(-1)[0] = math.inf

    monkeypatch.setattr(callbacks.Meter, "on_train_batch_end", poison)
    changes = ("--train.accumulate=1", "--train.ema=null", "--train.save_every=1")
    with pytest.raises(Diverged, match=r"weights: .* are not finite at step 2; want"):
        train(config(*changes), tmp_path / "run")
    (kept,) = (tmp_path / "run/checkpoints").iterdir()
    assert kept.name == "last-000001"


def test_weights_that_are_not_finite_are_not_served(finished, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(latest(finished[0] / "checkpoints"), path)
    poisoned = load_file(path / "model.safetensors")
    poisoned["head.weight"][0, 0] = math.nan
    save_file(poisoned, path / "model.safetensors")
    with pytest.raises(ValueError, match="was changed or damaged"):
        open_checkpoint(path)
    rewrite(path, files={})
    with pytest.raises(ValueError, match=r"head.weight have values that are not finite"):
        open_checkpoint(path)
    poisoned["head.weight"][0, 0] = 3e38  # finite, but what it gives is not
    poisoned["head.weight"] *= 1e30
    poisoned["head.weight"].clamp_(-3e38, 3e38)
    poisoned["norm.weight"].fill_(1e30)
    save_file(poisoned, path / "model.safetensors")
    image = tmp_path / "a.png"
    Image.new("L", (12, 12), 99).save(image)
    with pytest.raises(ValueError, match=r"gives values that are not finite"):
        list(predict(open_checkpoint(path), [image]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--model.mixer=nothing", "mixer: got 'nothing'"),
        ("--model.name=vitt", "there is no model 'vitt'"),
        ("--model.depht=3", r"model: depht: 'vit' has no such option"),
        ("--model.dim=wide", r"dim: got 'wide', .*integer"),
        ("--model.num_classes=7", r"model.num_classes: got 7, but the data have 10"),
        ("--train.epochs=3", r"train: want steps or epochs, got 12 and 3"),
        ("--train.batch_size=15", r"batch_size: got 15, want a multiple of 2"),
        ("--train.min_learning_rate=1", r"min_learning_rate: got 1.0, want at most"),
        ("--train.betas=[0.9, 1]", r"betas: got"),
        ("--train.warmup_from=1", r"warmup_from: got 1.0, want at most learning_rate 0.003"),
        ("--train.momentum=0.8", r"momentum: got 0.8, but the optimizer 'adamw' does not use it"),
        ("--train.nesterov=true", r"nesterov: got True, but the optimizer 'adamw' does not use"),
        *(
            (f"--train.{key}", key.partition("=")[0])
            for key in (
                "steps=0",
                "epochs=.inf",
                "batch_size=0",
                "accumulate=3",
                "learning_rate=.inf",
                "min_learning_rate=-1",
                "warmup=-1",
                "warmup_from=-1",
                "optimizer=adam",
                "momentum=1",
                "nesterov=some",
                "schedule=linear",
                "weight_decay=.inf",
                "decay=none",
                "clip=.inf",
                "label_smoothing=1",
                "ema=1",
                "precision=int8",
                "compile=some",
                "validate_every=0",
                "validate_batches=0",
                "save_every=0",
                "log_every=0",
                "device=tpu",
                "devices=0",
                "nodes=0",
                "strategy=tp",
                "offset_ranks=2",
                "workers=-1",
            )
        ),
        ("--data.format=parquet", r"data\.image_size: is missing"),
        ("--train.strategy=fsdp", "ema"),
    ],
)
def test_bad_configurations(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        train(config(change), tmp_path / "run")


# A value of each option that changes the weights or what a run writes, from 3 steps of TINY.
MATTERS = {
    "steps": 2, "epochs": None, "batch_size": 8, "accumulate": 1, "learning_rate": 1e-4,
    "min_learning_rate": 1e-3, "warmup": 1, "warmup_from": 1e-4, "schedule": "constant",
    "optimizer": "sgd", "betas": [0.5, 0.5], "weight_decay": 10.0, "decay": "matrices",
    "clip": 0.01, "label_smoothing": 0.5, "ema": None, "precision": "bfloat16",
    "validate_every": 1, "validate_batches": 1, "save_every": 1, "log_every": 1,
}  # fmt: skip
OF_SGD = {"momentum": 0.5, "nesterov": True}
# These share the work between devices and processes, and must not change what is learned.
DEVICES = {"compile", "device", "devices", "nodes", "strategy", "offset_ranks", "workers"}


def trained(folder, *changes):
    """What a run leaves: its weights, its rows, and the names of the checkpoints that it wrote."""
    short = ("--train.steps=3", "--train.warmup=2", "--train.weight_decay=0.5")
    saved, save = [], checkpoints.Folders.save_checkpoint

    def counted(self, checkpoint, path, **more):
        saved.append(path.name)
        save(self, checkpoint, path, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Folders, "save_checkpoint", counted)
        train(config(*short, *changes), folder, tensorboard=False)
    return weights(folder), rows(folder), saved


def test_every_option_of_the_training_matters(tmp_path):
    assert MATTERS.keys() | OF_SGD.keys() | DEVICES == TrainOptions.model_fields.keys()
    plain = trained(tmp_path / "plain")
    for name, value in MATTERS.items():
        changes = [f"--train.{name}={json.dumps(value)}"]
        if name == "epochs":
            changes = ["--train.steps=null", "--train.epochs=0.3"]
        found = trained(tmp_path / name, *changes)
        assert not same(found[0], plain[0]) or found[1:] != plain[1:], name
    sgd = "--train.optimizer=sgd"
    plain = trained(tmp_path / "sgd", sgd)
    for name, value in OF_SGD.items():
        found = trained(tmp_path / name, sgd, f"--train.{name}={json.dumps(value)}")
        assert not same(found[0], plain[0]), name


def arguments_of_trainer(monkeypatch, *changes):
    """The arguments of Lightning's trainer for these options."""
    given = {}
    monkeypatch.setattr(run_module, "Trainer", lambda **arguments: given.update(arguments))
    options = config("train.ema=null", *changes)
    strategy = run_module._strategy(options.train, lambda: None, None)
    run_module.make_trainer(options, strategy=strategy)
    return given


def test_every_option_of_devices_matters(monkeypatch):
    """On one CPU most cannot act, so each is seen where it takes effect."""
    plain = arguments_of_trainer(monkeypatch)
    assert (plain["accelerator"], plain["devices"], plain["num_nodes"]) == ("cpu", 1, 1)
    assert (plain["strategy"], plain["plugins"]) == ("auto", [])
    two = arguments_of_trainer(monkeypatch, "train.devices=2")
    assert two["devices"] == 2
    assert isinstance(two["plugins"][0], strategies.Loopback)
    nodes = arguments_of_trainer(monkeypatch, "train.devices=2", "train.nodes=2")
    assert (nodes["num_nodes"], nodes["plugins"]) == (2, [])  # several machines need a network
    assert arguments_of_trainer(monkeypatch, "train.strategy=ddp")["strategy"] == "ddp"
    shared = arguments_of_trainer(monkeypatch, "train.strategy=fsdp", "train.devices=2")
    assert isinstance(shared["strategy"], strategies.Sharded)
    changes = "train.devices=4", "train.offset_ranks=2"
    divided = arguments_of_trainer(monkeypatch, *changes)["strategy"]
    assert isinstance(divided, strategies.Offset)
    assert divided.each == 2
    for device, accelerator, available in (
        ("cuda", "gpu", "torch.cuda.is_available"),
        ("mps", "mps", "torch.backends.mps.is_available"),
    ):
        monkeypatch.setattr(available, lambda: True)
        found = arguments_of_trainer(monkeypatch, f"train.device={device}")
        assert found["accelerator"] == accelerator
    data = Data(config("train.workers=2"))
    assert data.val_dataloader().num_workers == 2


def test_compile_compiles_the_model(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self)))
    train(config("train.compile=true"), tmp_path / "run", tensorboard=False)
    assert compiled == [ViT]


def test_a_group_of_one_leaves_nothing(tmp_path):
    """Another library that trains afterwards would wait for the others of the group."""
    before = dict(os.environ)
    train(config("train.strategy=ddp"), tmp_path / "run", tensorboard=False)
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def test_label_smoothing_of_text(tmp_path):
    """It changes the gradient; the measured loss is that of the text itself."""
    options = {"name": "gpt", "mixer": "rotary", "dim": 8, "depth": 1, "heads": 1}
    data = {"kind": "text", "train": str(tmp_path), "context": 8}
    text = config("--train.clip=null", model=options, data=data)
    smooth = config("--train.clip=null", "--train.label_smoothing=0.2", model=options, data=data)
    torch.manual_seed(0)
    model = create_model("gpt", mixer="rotary", dim=8, depth=1, heads=1, vocab_size=9, context=8)
    batch = torch.randint(9, (2, 9))
    losses, measured = [], []
    for one in (text, smooth):
        task = LanguageModel(model, one, 3).train()
        losses.append(task.loss(batch, task.training_meters))
        measured.append(task.training_meters["loss"].compute())
    logits = model(batch[:, :-1]).flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), label_smoothing=0.2)
    assert torch.equal(losses[1], want)
    assert not torch.equal(losses[0], want)
    torch.testing.assert_close(measured[0], measured[1])


@pytest.mark.parametrize("mixer", ["attention", "rotary", "translution"])
def test_documents_that_do_not_see_each_other(tmp_path, mixer):
    """The loss is the mean over all targets, each predicted from its own document alone."""
    options = {"name": "gpt", "mixer": mixer, "dim": 8, "depth": 1, "heads": 1}
    data = {"kind": "text", "train": str(tmp_path), "context": 8}
    text = config("--train.clip=null", model=options, data=data)
    model = create_model("gpt", mixer=mixer, dim=8, depth=1, heads=1, vocab_size=9, context=8)
    model.double()
    task = LanguageModel(model, text, 3, end=0)
    batch = torch.tensor([[5, 6, 0, 4, 4, 0, 0, 3, -100], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
    loss = task.loss(batch, task.training_meters)
    losses = []
    for start, stop in ((0, 2), (2, 5), (5, 6), (6, 8)):
        losses.append(cross_entropies(model, batch[0, start:stop], batch[0, start + 1 : stop + 1]))
    losses.append(cross_entropies(model, batch[1, :8], batch[1, 1:]))
    want = torch.cat(losses)
    assert len(want) == 7 + 8
    torch.testing.assert_close(loss, want.mean())
    together = LanguageModel(model, text, 3).loss(batch, task.training_meters)
    assert not torch.isclose(together, loss)


def cross_entropies(model, ids, targets):
    """Those of the targets that are there."""
    wanted = targets >= 0
    return torch.nn.functional.cross_entropy(
        model(ids[None])[0][wanted], targets[wanted], reduction="none"
    )


def test_the_option_for_documents_reaches_the_model(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n}\n" for n in range(60)))
    data = {
        "kind": "text", "train": str(tmp_path / "text.txt"), "documents": "", "context": 16,
        "shards": str(tmp_path / "shards"),
    }  # fmt: skip
    model = {"name": "gpt", "mixer": "rotary", "dim": 8, "depth": 1, "heads": 1}
    losses = []
    for on in (False, True):
        one = config(
            "--train.steps=2", "--train.warmup=1", model=model, data=data | {"document_mask": on}
        )
        losses.append(train(one, tmp_path / str(on), tensorboard=False)["valid_loss"])
        again = evaluate(tmp_path / str(on), "valid", one)["valid_loss"]
        assert again == pytest.approx(losses[-1], rel=1e-5)
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="document_mask: got True, want False: the model Linear"):
        LanguageModel(torch.nn.Linear(1, 1), one, 3, end=0)


# -- the schedule --------------------------------------------------------------------------------


def test_learning_rate():
    rates = [learning_rate(step, 100, 9, least=0.1) for step in range(101)]
    assert rates[:9] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert max(rates) == rates[9] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(9, 10, 0, "constant") == 1.0


def test_the_optimizer_follows_the_schedule_of_the_options():
    options = config("train.min_learning_rate=3e-4", "train.clip=null")
    task = Classification(torch.nn.Linear(2, 2), options, 6, classes=2, image_size=(1, 2))
    made = task.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(7):
        wanted = 3e-3 * learning_rate(step, 6, warmup=2, least=0.1)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(wanted)
        optimizer.step()
        schedule.step()


def test_a_warmup_from_a_given_rate():
    rates = [learning_rate(step, 100, 10, first=0.2) for step in range(11)]
    assert rates == pytest.approx([0.2 + 0.08 * i for i in range(11)])
    options = config("train.warmup_from=6e-4", "train.clip=null")
    task = Classification(torch.nn.Linear(2, 2), options, 6, classes=2, image_size=(1, 2))
    optimizer = task.configure_optimizers()["optimizer"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([6e-4])


def test_options_of_another_optimizer_and_of_no_warmup():
    with pytest.raises(ValueError, match=r"betas: got \(0.5, 0.9\), but the optimizer 'sgd'"):
        config("train.optimizer=sgd", "train.betas=[0.5, 0.9]")
    with pytest.raises(ValueError, match="nesterov: got True with a momentum of 0, want"):
        config("train.optimizer=sgd", "train.nesterov=true", "train.momentum=0")
    with pytest.raises(ValueError, match=r"warmup_from: got 0.0, but there is no warm-up"):
        config("train.warmup_from=0", "train.warmup=0")


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_sgd(nesterov):
    """Its steps are those of the formula: the decay is a part of the gradient."""
    options = config(
        "train.optimizer=sgd", f"train.nesterov={json.dumps(nesterov)}", "train.momentum=0.8",
        "train.weight_decay=0.1", "train.clip=null", "train.schedule=constant", "train.warmup=0",
    )  # fmt: skip
    layer = torch.nn.Linear(3, 2, bias=False)
    task = Classification(layer, options, 6, classes=2, image_size=(1, 3))
    optimizer = task.configure_optimizers()["optimizer"]
    want, velocity = layer.weight.detach().clone(), torch.zeros(2, 3)
    for _ in range(3):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient + 0.1 * want
        velocity = 0.8 * velocity + gradient
        want = want - 3e-3 * (gradient + 0.8 * velocity if nesterov else velocity)
        torch.testing.assert_close(layer.weight.detach(), want)


NO_WEIGHTS = {
    "attention_vit_tiny_patch56_224": {"cls_token", "positions"},
    "bias_vit_tiny_patch56_224": {"cls_token", "position_bias.weight"},
    "translution_vit_tiny_patch56_224": {"cls_token"},
    "attention_gpt_tiny": {"positions"},
    "swin_tiny": {"position_bias"},
    "acmix_swin_tiny": {"position_bias"},
    "acmix_resnet26": set(),
    "acmix_san10": set(),
    "acmix_pvt_tiny": {"cls_token", "positions"},
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_decays(name):
    """Besides what has one axis (norms, biases), only what says where a token is does not."""
    with torch.device("meta"):
        model = create_model(name)
    found = {}
    for rule in ("all", "matrices", "weights"):
        options = config(f"train.decay={rule}", "train.weight_decay=0.5")
        task = Classification(model, options, 6, classes=2, image_size=(1, 2))
        groups = task.configure_optimizers()["optimizer"].param_groups
        assert {group["weight_decay"] for group in groups} <= {0.0, 0.5}
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        found[rule] = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert found["all"] == {name for name, _ in model.named_parameters()}
    assert found["matrices"] == {name for name, p in model.named_parameters() if p.ndim > 1}
    without = found["matrices"] - found["weights"]
    assert found["weights"] <= found["matrices"]
    ends = NO_WEIGHTS[name]
    assert all(any(one.endswith(end) for end in ends) for one in without)
    assert all(any(one.endswith(end) for one in without) for end in ends)


def test_slow_matrix_products_are_measured_with_small_matrices(monkeypatch):
    """16 bits on some CPUs: nothing may be silent for a minute before the first step."""
    spent = []

    def slow(function, device, repeats):
        size = function().shape[0]
        spent.append(2 * size**3 / 1e9)  # as at 1 GFLOP per second
        return spent[-1]

    monkeypatch.setattr(measuring, "seconds", slow)
    assert measuring.matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(1e9)
    assert sum(spent) < 0.5
