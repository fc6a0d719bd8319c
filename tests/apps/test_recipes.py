"""The recipes, and the commands as a user types them."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml

pytest.importorskip("lightning")
pytest.importorskip("datasets")
pytest.importorskip("typer")
from PIL import Image

import forked
from translution import create_model
from translution.apps import cli
from translution.apps.config import load
from translution.apps.data.digits import load_digits
from translution.apps.data.text import Windows
from translution.apps.training import messages
from translution.apps.training.checkpoints import find_checkpoint, open_checkpoint
from translution.apps.training.config import Config
from translution.apps.training.predict import predict
from translution.models import model_options
from translution.models.blocks import IMAGE_MIXERS, MIXERS, SIZES
from translution.models.pretrained import Pretrained
from translution.utils.measuring import multiply_adds

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CIFAR10 = [path for path in RECIPES if path.stem.startswith("cifar10")]
FACTS = {"images": {"num_classes": 10}, "text": {"vocab_size": 4096}}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments):
    """A command in the checkout, but in this process: a new one takes seconds to import."""
    here, argv = Path.cwd(), sys.argv
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        os.chdir(ROOT)
        sys.argv = ["translution", *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os.chdir(here)
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model(path):
    config = load(Config, path)
    assert path.read_text().startswith("# ")
    options = config.model.given | FACTS[config.data.kind]
    if config.data.kind == "images":
        options |= {"image_size": config.data.image_size, "in_channels": config.data.channels}
    else:
        options |= {"context": config.data.context}
    known = model_options(config.model.name)
    with torch.device("meta"):
        create_model(config.model.name, **{k: v for k, v in options.items() if k in known})


@pytest.mark.parametrize("mixer", MIXERS)
def test_imagenet_for_each_mixer_and_size(mixer):
    for size in SIZES:
        changes = [f"model.mixer={mixer}", f"model.size={size}", "model.patch_size=56"]
        config = load(Config, ROOT / "recipes" / "imagenet.yaml", changes)
        with torch.device("meta"):
            create_model(config.model.name, **config.model.given)
    if mixer not in IMAGE_MIXERS:
        load(Config, ROOT / "recipes" / "openwebtext-1024.yaml", [f"model.mixer={mixer}"])


ON_A_CPU = {
    "my-photos", "my-text", "tiny-digits", "tiny-text", "cifar10-small", "text-small",
    "demo-digits", "demo-text",
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_for_a_gpu_says_so_at_its_top(path):
    head = " ".join(line.removeprefix("# ") for line in path.read_text("utf-8").splitlines()[:7])
    meant = "This is meant for a GPU" in head or "This is meant for several GPUs" in head
    assert meant != (path.stem in ON_A_CPU)


# The training samples of the data sets that the recipes for a GPU name.
SAMPLES = {"imagenet": 1_281_167, "cifar10": 45_000, "mnist": 60_000, "openwebtext": 32_000}


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem not in ON_A_CPU], ids=lambda path: path.stem
)
def test_a_recipe_for_a_gpu_says_so_when_it_starts(path, monkeypatch):
    """On a CPU that is as fast as 200 GFLOP/s."""
    config = load(Config, path, ["train.device=cpu"])
    images = config.data.kind == "images"
    kind = "imagenet" if path.stem.startswith("acmix") else path.stem.partition("-")[0]
    samples = SAMPLES.get(kind, 0)
    steps = config.train.steps or round(config.train.epochs * samples / config.train.batch_size)
    part = object() if images else object.__new__(Windows)
    facts = {} if images else {"context": config.data.context}
    data = SimpleNamespace(part=lambda _: part, steps=steps, facts=facts)
    options = config.model.given | FACTS[config.data.kind] | facts
    if images:
        options |= {"image_size": config.data.image_size, "in_channels": config.data.channels}
        x = torch.zeros(1, config.data.channels, *config.data.image_size, device="meta")
    else:
        x = torch.zeros(1, config.data.context, device="meta").long()
    known = model_options(config.model.name)
    with torch.device("meta"):
        made = create_model(config.model.name, **{k: options[k] for k in options if k in known})
    units = 1 if images else config.data.context
    cost = messages.Cost(0, multiply_adds(lambda: made.eval()(x)) / units)
    monkeypatch.setattr(messages, "matmul_rate", lambda *_: 2e11)
    assert "this run is meant for a GPU" in messages.too_slow(config, data, cost)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders as ImageNet's: two classes of images of several sizes, of one colour each."""
    folder = tmp_path_factory.mktemp("photos")
    for part, each in (("train", 12), ("val", 3)):
        for colour in ("green", "red"):
            (folder / part / colour).mkdir(parents=True)
            for i in range(each):
                image = Image.new("RGB", (70 + i, 66), colour)
                image.save(folder / part / colour / f"{i}.png")
    return folder


SMALL = {
    "acmix-resnet": ("model.size=26", "model.dim=8"),
    # after 3 steps the statistics of so many norms are far from those of the batches
    "acmix-san": (
        "model.size=10", "model.depths=[1,1,1,1,1]", "model.dim=16", "model.group_size=2",
        "train.learning_rate=1e-3", "train.steps=25",
    ),
    "acmix-swin": ("model.dim=8", "model.depths=[1,1,2,1]", "model.heads=[1,2,2,4]"),
    "acmix-pvt": (
        "model.dims=[8,8,16,16]", "model.depths=[1,1,1,1]", "model.heads=[1,1,2,2]",
    ),
    "imagenet": ("model.dim=16", "model.depth=1", "model.heads=2", "model.mixer=alpha"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_for_imagenet_trains(name, photos, tmp_path):
    """With a small model, and few steps of small images."""
    changes = [f"--{change}" for change in SMALL[name]]
    done = run(
        "train", f"recipes/{name}.yaml", f"--out={tmp_path / 'run'}",
        f"--data.train={photos / 'train'}", f"--data.valid={photos / 'val'}",
        "--data.image_size=64", "--train.epochs=null", "--train.steps=3", "--train.batch_size=8",
        "--train.log_every=1", "--train.workers=0", "--train.device=cpu", *changes,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "valid_accuracy" in done.stdout
    assert open_checkpoint(tmp_path / "run").classes == ["green", "red"]


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("acmix-resnet", {"26": "resnet26", "38": "resnet38", "50": "resnet50"}),
        ("acmix-san", {"10": "san10", "15": "san15", "19": "san19"}),
        ("acmix-swin", {"tiny": "swin_tiny", "small": "swin_small"}),
        ("acmix-pvt", {"tiny": "pvt_tiny", "small": "pvt_small"}),
    ],
)
def test_the_sizes_of_a_family(name, models):
    for size, known in models.items():
        config = load(Config, ROOT / "recipes" / f"{name}.yaml", [f"model.size={size}"])
        with torch.device("meta"):
            made = create_model(config.model.name, **config.model.given)
            want = create_model(f"acmix_{known}")
        assert made.config == want.config


def test_my_photos(photos, tmp_path):
    """Of which one cannot be read."""
    shutil.copytree(photos / "train", tmp_path / "photos")
    (tmp_path / "photos" / "red" / "broken.jpg").write_bytes(b"no picture")
    folder = tmp_path / "run"
    done = run(
        "train", "recipes/my-photos.yaml", f"--data.train={tmp_path / 'photos'}",
        f"--data.test={photos / 'val'}", f"--out={folder}", "--train.steps=25",
        "--train.validate_every=25", "--train.save_every=25",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(1 unreadable left out); 2 classes; 64×64 pixels" in done.stdout
    assert evaluated(folder, tmp_path / "test.json")["test_accuracy"] == 1
    done = run("predict", folder, photos / "val" / "red", "--output", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["classes"] for one in found] == [["red"]] * 3


def test_my_text(tmp_path):
    """One file, of which paragraphs are held out."""
    source, folder = tmp_path / "mine.txt", tmp_path / "run"
    source.write_text("\n\n".join(f"abcdefgh {'abcdefgh ' * (5 + i % 7)}" for i in range(80)))
    done = run(
        "train", "recipes/my-text.yaml", f"--data.train={source}", f"--out={folder}",
        f"--data.shards={tmp_path / 'shards'}", "--train.steps=30", "--train.batch_size=16",
        "--data.context=32", "--train.validate_every=30", "--train.save_every=30",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a vocabulary of " in done.stdout
    done = run("generate", folder, "--prompt", "abcdefgh abc", "--max-tokens", "6",
               "--temperature", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "defgh" in done.stdout


def test_print_is_a_recipe_too(tmp_path):
    done = run("train", "recipes/tiny-digits.yaml", "--print", "--train.steps=7")
    assert done.returncode == 0, done.stderr
    (tmp_path / "whole.yaml").write_text(done.stdout)
    assert load(Config, tmp_path / "whole.yaml").train.steps == 7


@pytest.mark.parametrize(
    "change", ["size=tiny", "name=resnet26", "name=acmix_swin_tiny", "name=san10", "name=gpt"]
)
@pytest.mark.parametrize("path", CIFAR10, ids=lambda path: path.stem)
def test_print_has_the_defaults_of_the_model(path, change, tmp_path):
    """And stands for the same model."""
    given = yaml.safe_load(path.read_text("utf-8"))
    if change.startswith("name"):
        given["model"] = {}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    before = load(Config, tmp_path / "given.yaml", [f"model.{change}"])
    (tmp_path / "whole.yaml").write_text(before.print_complete())
    after = load(Config, tmp_path / "whole.yaml")
    assert after.data == before.data
    assert after.train == before.train
    with torch.device("meta"):
        models = [create_model(c.model.name, **c.model.given) for c in (before, after)]
    configs = [json.loads(json.dumps(vars(model.config))) for model in models]  # no tuples
    assert configs[0] == configs[1]
    missing = set(configs[0]) - set(yaml.safe_load(before.print_complete())["model"])
    assert missing <= {"image_size", "in_channels", "num_classes", "vocab_size", "context"}


def train_kill_resume(recipe, folder, *changes):
    """Start the command, kill it when it has a checkpoint, and let it go on to the end."""
    command = ["train", f"recipes/{recipe}.yaml", f"--out={folder}", *changes]
    process = forked.start(forked.main, command, functools.partial(os.chdir, ROOT))
    until = time.monotonic() + 200
    while not list((folder / "checkpoints").glob("last-*")) and process.is_alive():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.join()
    assert run(*command).returncode == 2  # it does not start over what is there
    done = run(*command, "--resume")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    few = ["--train.steps=60", "--train.validate_every=30", "--train.save_every=20"]
    told = train_kill_resume("tiny-digits", folder, *few, "--data.moved=false")
    return folder, told


def test_tiny_digits(digits):
    folder, told = digits
    assert "step 60 of 60" in told
    done = run("evaluate", folder, "--part", "test", "--json", folder / "test.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "test.json").read_text())
    assert found["part"] == "test"
    assert found["test_accuracy"] > 0.5


def test_predict(digits, tmp_path):
    data = load_digits()
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = torch.zeros(20, 20, dtype=torch.uint8)
        pixels[6:14, 6:14] = (data.test[i] * 255).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    done = run("predict", digits[0], tmp_path / "images", "--output", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    names = [Path(one["image"]).name for one in found]
    assert names == [f"{i}.png" for i in range(12)]
    right = [one["classes"] == [str(int(data.test_labels[i]))] for i, one in enumerate(found)]
    assert sum(right) >= 6
    assert all(0 < one["probabilities"][0] <= 1 for one in found)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG")
    done = run("predict", digits[0], tmp_path / "images/*.png", "--top", "2", "--output",
               tmp_path / "found.csv")  # fmt: skip
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert [row["rank"] for row in rows[:2]] == ["1", "2"]
    done = run("predict", digits[0], tmp_path / "images" / "3.png")
    assert done.returncode == 0
    assert "probability" in done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All test digits as PNG files of their own size, in a folder per class."""
    folder, data = tmp_path_factory.mktemp("written"), load_digits()
    for i, (digit, label) in enumerate(zip(data.test, data.test_labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        pixels = (digit * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


def accuracy(model, folder, output):
    done = run("predict", model, folder, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    return sum(one["classes"] == [Path(one["image"]).parent.name] for one in found) / len(found)


def evaluated(model, output, *changes):
    done = run("evaluate", model, "--part", "test", "--json", output, *changes)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_predict_is_as_right_as_evaluate(digits, written, tmp_path):
    """On image files in the digits' own size, from the run and from the folder that it shares."""
    want = evaluated(digits[0], tmp_path / "test.json")["test_accuracy"]
    assert want > 0.5
    assert accuracy(digits[0], written, tmp_path / "a.json") == pytest.approx(want)
    assert run("share", digits[0], tmp_path / "shared").returncode == 0
    assert accuracy(tmp_path / "shared", written, tmp_path / "b.json") == pytest.approx(want)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_evaluate_on_a_folder_places_digits_too(digits, written, tmp_path):
    want = evaluated(digits[0], tmp_path / "a.json")
    files = ("--data.format=folder", "--data.canvas=null", f"--data.train={written}",
             "--data.valid=nothing", f"--data.test={written}/.")  # fmt: skip
    found = evaluated(digits[0], tmp_path / "b.json", *files)
    assert found["test_loss"] == pytest.approx(want["test_loss"], rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(want["test_accuracy"])


def test_digits_of_another_size_are_made_a_digits_size(digits, written, tmp_path):
    want = evaluated(digits[0], tmp_path / "test.json")["test_accuracy"]
    for path in written.glob("*/*.png"):
        larger = Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)
        to = tmp_path / "larger" / path.relative_to(written)
        to.parent.mkdir(parents=True, exist_ok=True)
        larger.save(to)
    assert accuracy(digits[0], tmp_path / "larger", tmp_path / "a.json") > want - 0.05


def test_a_checkpoint_of_an_earlier_version_predicts_alike(digits, written, tmp_path):
    """Its preprocessing follows from the options of its data."""
    older = tmp_path / "older"
    shutil.copytree(find_checkpoint(digits[0]), older)
    about = json.loads((older / "checkpoint.json").read_text())
    described = about.pop("preprocessing")
    (older / "checkpoint.json").write_text(json.dumps(about))
    assert (described["digit_size"], described["canvas"]) == (8, 20)
    preprocessing = open_checkpoint(older).model.preprocessing
    assert preprocessing == open_checkpoint(digits[0]).model.preprocessing
    assert preprocessing.classes == tuple("0123456789")
    # but `from_pretrained` of the models does not know the options of data
    model = Pretrained.from_pretrained(older)
    with pytest.raises(ValueError, match="was saved without the preprocessing"):
        list(predict(model, [next(written.glob("*/*.png"))]))


def test_tiny_text(tmp_path):
    folder = tmp_path / "run"
    source = tmp_path / "text"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_text("abcdefgh " * 200)
    few = ["--train.steps=60", "--train.validate_every=30", "--train.save_every=20",
           f"--data.train={source}", f"--data.shards={tmp_path / 'shards'}",
           "--data.context=32"]  # fmt: skip
    told = train_kill_resume("tiny-text", folder, *few)
    assert "step 60 of 60" in told
    done = run("evaluate", folder)
    assert done.returncode == 0, done.stderr
    assert "valid_bits_per_byte" in done.stdout
    done = run("generate", folder, "--prompt", "abcdefgh abc", "--max-tokens", "9",
               "--temperature", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "defgh abc" in done.stdout
    done = run("predict", folder, source)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "nothing.yaml"], "nothing.yaml"),
        (["train", "recipes/tiny-digits.yaml", "--model.mixr=alpha"], "mixr"),
        (["train", "recipes/tiny-digits.yaml", "--train.step=3"], "did you mean steps?"),
        (["train", "recipes/cifar10.yaml", "--data.train=nothing.parquet"], "nothing.parquet"),
        (["train", "recipes/text.yaml", "--data.train=nothing"], "nothing"),
        (["train", "recipes/tiny-digits.yaml", "--out=README.md"], "README.md"),
        (["train", "recipes/tiny-digits.yaml", "--out=README.md/run"], "README.md/run"),
        (["evaluate", "docs"], "holds no checkpoint"),
        (["evaluate", "docs", "--part", "most"], "part: got 'most'"),
        (["predict", "docs", "nothing.png"], "nothing.png"),
        (["predict", "docs", "docs/images/*.png"], "holds no checkpoint"),
        (["generate", "docs", "--prompt", "a"], "holds no checkpoint"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, told, tmp_path):
    if arguments[0] == "train" and "--out" not in arguments[-1]:
        arguments = [*arguments, f"--out={tmp_path}"]
    done = run(*arguments)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("translution: ")
    assert told in last
