"""Files of Python that a configuration imports, so that it can name models of its own."""

from __future__ import annotations

import sys

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
def recipe(tmp_path, monkeypatch):
    """A recipe with a model of its own, in the working directory, and the name of the model."""
    monkeypatch.chdir(tmp_path)
    name = f"new_{abs(hash(tmp_path))}"  # the registry refuses a name that it has already
    (tmp_path / f"{name}.py").write_text(NEW.replace("NAME", name))
    content = yaml.safe_load(RECIPE)
    content["imports"] = [f"{name}.py"]
    content["model"]["name"] = name
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    yield name
    sys.modules.pop(f"translution_import_{name}", None)


def test_a_recipe_with_a_model_of_its_own(recipe):
    code, out, err = command("train", "own.yaml", "--out=run")
    assert code == 0, err
    assert f"model  {recipe}, attention" in out
    assert command("evaluate", "run")[0] == 0
    assert load(Config, "run/config.yaml").model.given["number"] == 3


def test_in_other_processes(recipe, tmp_path):
    """Two runs at a time, each in a process that knows the model from the configuration alone."""
    base = yaml.safe_load((tmp_path / "own.yaml").read_text())
    content = {
        "title": "Own", "asks": "Does it run?", "base": base,
        "rows": {"1": {}, "2": {"model.number": 2}}, "rates": [1e-3], "seeds": 1,
        "measures": ["accuracy"],
    }  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    code, _, err = command("experiment", "experiment.yaml", "--out=runs", "--docs=docs", "--jobs=2")
    assert code == 0, err
    assert len(list((tmp_path / "runs").glob("experiment/*/result.json"))) == 2


def test_refusals(tmp_path, monkeypatch):
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
    del sys.modules["translution_import_good"]


def test_a_configuration_names_the_key(recipe, tmp_path):
    said = r"command line: imports: missing.py: there is no such file"
    with pytest.raises(ValueError, match=said):
        load(Config, "own.yaml", ["imports=[missing.py]"])
