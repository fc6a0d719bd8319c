"""Python files that a configuration or a command imports, with models and mixers of one's own."""

from __future__ import annotations

import pytest
import yaml

pytest.importorskip("lightning")
pytest.importorskip("typer")

from test_first_run import command

from translution.apps.config import load
from translution.apps.training.config import Config
from translution.apps.training.imports import import_files

NEW = '''
from dataclasses import dataclass
from translution.models.configuration import configure
from translution.models.registry import register_family
from translution.models.vision_transformer import ViT, ViTConfig

@dataclass
class NewConfig(ViTConfig):
    """A ViT with another number."""
    number: int = 1

def make(**options):
    return ViT(configure(NewConfig, **options))

register_family("NAME", make, NewConfig)
'''
RECIPE = """
model: {mixer: attention, patch_size: 4, dim: 16, depth: 1, heads: 2, number: 3}
data: {kind: images, format: digits, canvas: 12, train_limit: 64, valid_limit: 20}
train: {steps: 2, batch_size: 16, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, own_names):
    """A recipe with a model of its own, in the working directory, and the name of the model."""
    monkeypatch.chdir(tmp_path)
    name = f"new_{abs(hash(tmp_path))}"  # the registry refuses a name that it has already
    (tmp_path / f"{name}.py").write_text(NEW.replace("NAME", name))
    content = yaml.safe_load(RECIPE)
    content["imports"] = [f"{name}.py"]
    content["model"]["name"] = name
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    return name


def test_a_recipe_with_a_model_of_its_own(recipe):
    code, out, err = command("train", "own.yaml", "--out=run")
    assert code == 0, err
    assert f"model  {recipe}, attention" in out
    assert command("evaluate", "run")[0] == 0
    assert load(Config, "run/config.yaml").model.given["number"] == 3


def test_refusals(tmp_path, monkeypatch, own_names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "other").mkdir()
    (tmp_path / "good.py").write_text("")
    (tmp_path / "other" / "good.py").write_text("")
    with pytest.raises(ValueError, match=r"^missing.py: there is no such file"):
        import_files(["missing.py"])
    with pytest.raises(ValueError, match=r"^broken.py: ModuleNotFoundError: No module named"):
        import_files(["broken.py"])
    with pytest.raises(ValueError, match=r"^text.txt: got a file without the suffix .py"):
        import_files(["text.txt"])
    assert import_files(["good.py", "good.py"]) == ["good.py", "good.py"]
    with pytest.raises(ValueError, match=r"^other/good.py: .*/good.py has that name too"):
        import_files(["other/good.py"])


def test_a_configuration_names_the_key(recipe, tmp_path):
    said = r"command line: imports: missing.py: there is no such file"
    with pytest.raises(ValueError, match=said):
        load(Config, "own.yaml", ["imports=[missing.py]"])


MIXER = '''
import torch
from torch import nn
from translution import register_mixer

class Mean(nn.Module):
    """Each token becomes the mean of those before it, or of all."""
    def __init__(self, dim, grid, heads, causal=False, gain=1.0):
        super().__init__()
        self.causal, self.gain = causal, gain
        self.proj = nn.Linear(dim, dim)
    def forward(self, x, grid=None):
        x = self.gain * self.proj(x)
        if not self.causal:
            return x.mean(1, keepdim=True).expand_as(x)
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]

register_mixer("mine", Mean, title="the mean")
'''
IMAGES = """
model: {name: vit, mixer: mine, mixer_options: {gain: 2}, patch_size: 4, dim: 8, depth: 1, heads: 2}
data: {kind: images, format: digits, canvas: 12, train_limit: 64, valid_limit: 20}
train: {steps: 2, batch_size: 16, device: cpu}
"""
TEXT = """
model: {name: gpt, mixer: mine, dim: 16, depth: 1, heads: 2}
data: {kind: text, train: words.txt, documents: "", context: 8, tokenizer: {kind: bytes},
       shards: shards}
train: {steps: 2, batch_size: 4, device: cpu}
"""


@pytest.fixture
def mixer(tmp_path, monkeypatch, own_names):
    """Files of a mixer of one's own and of recipes; returns a function that forgets the mixer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MIXER)
    (tmp_path / "images.yaml").write_text(IMAGES)
    (tmp_path / "text.yaml").write_text(TEXT)
    (tmp_path / "words.txt").write_text("some words of a text, again and again\n" * 40)
    return own_names


def fine(*words):
    code, out, err = command(*words)
    assert code == 0, err
    return out


def test_commands_with_a_mixer_of_ones_own_for_images(mixer, tmp_path):
    code, _, err = command("train", "images.yaml", "--out=run")
    assert code == 2
    assert "one of your own: register_mixer, and on the command line --import FILE" in err
    out = fine("train", "images.yaml", "--import", "mine.py", "--out=run")
    assert "translution predict run IMAGES --import mine.py" in out
    saved = load(Config, "run/config.yaml")
    assert saved.imports == ("mine.py",)
    assert saved.model.given["mixer_options"] == {"gain": 2}
    Image = pytest.importorskip("PIL.Image")
    Image.new("L", (12, 12)).save("digit.png")
    (tmp_path / "mine.py").rename("moved.py")
    commands = [
        ("predict", "run", "digit.png"),
        ("export", "run", "--to=torch", "--out=run.pt2"),
        ("share", "run", "shared"),
        ("evaluate", "run"),
    ]
    for words in commands:
        mixer()
        code, _, err = command(*words)
        assert code == 2
        want = "mine.py: there is no such file" if words[0] == "evaluate" else "--import FILE"
        assert want in err
        fine(*words, "--import=moved.py")
    mixer()
    fine("predict", "shared", "digit.png", "--import=moved.py")


def test_commands_with_a_mixer_of_ones_own_for_text(mixer):
    fine("tokenize", "text.yaml", "--import=mine.py")
    fine("train", "text.yaml", "--import=mine.py", "--out=run")
    words = ("generate", "run", "--prompt=some", "--max-tokens=3")
    mixer()
    assert "--import FILE" in command(*words)[2]
    assert "Mean has no make_cache" in command(*words, "--import=mine.py")[2]
    fine(*words, "--no-cache", "--import=mine.py")


def test_the_demo_opens_a_mixer_of_ones_own(mixer):
    from translution.apps.demo.models import open_models

    fine("train", "images.yaml", "--import=mine.py", "--out=run")
    (shown,) = open_models(["run"]).digits
    assert "the mean" in shown.name


def test_compare_and_lists(mixer, tmp_path):
    pytest.importorskip("sklearn")
    assert "--import FILE adds those" in command("compare", "--mixers=mine")[2]
    small = (
        "--seeds=1",
        "--steps=2",
        "--train-limit=60",
        "--test-limit=20",
        "--dim=16",
        "--depth=1",
    )
    out = fine("compare", "--import=mine.py", "--mixers=attention,mine", *small, "--jobs=2")
    assert "the mean" in out
    assert (tmp_path / "compare" / "report.html").is_file()
    listed = fine("models", "mine_vit_tiny*56*", "--json", "--import=mine.py")
    assert "mine_vit_tiny_patch56_224" in listed
    words = ("bench-step", "--model=mine_vit_tiny_patch56_224", "--batch=1", "--repeats=1")
    assert "mine_vit_tiny" in fine(*words, "--device=cpu", "--import=mine.py")


def test_an_experiment_with_a_mixer_of_ones_own(mixer, tmp_path):
    content = {
        "title": "Own", "asks": "Does it run?", "base": yaml.safe_load(IMAGES),
        "rows": {"1": {}, "2": {"model.mixer_options": {"gain": 3}}}, "rates": [1e-3], "seeds": 1,
        "measures": ["accuracy"],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    words = ("experiment", "own.yaml", "--out=runs", "--docs=docs")
    assert "--import FILE" in command(*words)[2]
    fine(*words, "--import=mine.py")
    assert len(list((tmp_path / "runs").glob("own/*/result.json"))) == 2
