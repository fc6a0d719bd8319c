"""Facts of the whole: imports go one way, the core needs torch alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import translution
from translution import _moved

ROOT = Path(translution.__file__).parent


def test_imports_go_down_only():
    """The contracts in pyproject.toml: three floors, and layers within the core and above it."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ kept, 0 broken", done.stdout)


# Imports each old name in a process in which nothing of the library is imported yet. The processes
# are copies of one that has imported torch, which takes a second.
EACH_OLD_NAME = """
import importlib, json, os, sys, warnings
import torch

def check(old, new):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    assert module is importlib.import_module(new), module
    assert module.__spec__.name == new
    said = [str(w.message) for w in said if w.category is DeprecationWarning]
    assert f"{old} is now {new}" in said, said

codes = {}
for old, new in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        code = 1
        try:
            check(old, new)
            code = 0
        finally:
            sys.excepthook(*sys.exc_info()) if code else None
            os._exit(code)
    codes[old] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def imported():
    moved = {old: new for old, new in _moved.MOVED.items() if old != "translution.timm"}
    command = [sys.executable, "-W", "ignore", "-c", EACH_OLD_NAME, json.dumps(moved)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_old_import_paths_work(imported, old):
    """A module is the same one under its old name, which says where it is now."""
    if old == "translution.timm":
        pytest.skip("timm is installed apart")
    codes, errors = imported
    assert codes[old] == 0, errors


def test_old_paths_within_moved_packages():
    code = """
import translution
import translution.convert.resizing
import translution.interop.conversion.resizing as resizing
from translution.convert.converting import Plan
from translution.training.config import Config
from translution.apps.training import config
assert Config is config.Config
assert sys.modules["translution.convert.resizing"] is resizing
assert callable(translution.convert)
"""
    subprocess.run([sys.executable, "-c", "import sys" + code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "translution.bench.decoding", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "decoding" in done.stdout


def test_a_class_that_moved_is_found_at_its_old_place():
    from translution.modules import attention

    with pytest.warns(DeprecationWarning, match="is now translution.SelfAttention"):
        assert attention.SelfAttention is translution.SelfAttention


def test_the_core_needs_torch_alone():
    """With every package of the extras hidden, the operators and models import and run."""
    code = """
import sys
for name in ("numpy", "typer", "rich", "lightning", "sklearn", "matplotlib", "safetensors",
             "jinja2", "torchmetrics", "huggingface_hub"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
import torch, translution
model = translution.create_model("translution_vit_tiny_patch56_224", depth=1)
model(torch.randn(1, 3, 224, 224)).sum().backward()
from translution.apps import cli
try:
    cli.main()
except SystemExit as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "typer is not installed; pip install 'translution[cli]'" in done.stdout


def test_no_file_is_long_without_reason():
    reasons = {"layouts.py": "all geometry of tokens, with a line for each field"}
    for path in ROOT.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 400 or path.name in reasons, f"{path.name}: {lines} lines"


def test_the_wheel_is_small(tmp_path):
    """It has the code, the demo's recipes and no trained weights."""
    pytest.importorskip("hatchling")
    code = f"from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT.parents[1], check=True)
    (wheel,) = tmp_path.glob("translution-*.whl")
    assert wheel.name == f"translution-{translution.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith(".safetensors")]
    assert not [n for n in names if not n.startswith(("translution/", "translution-"))]
    for name in ("py.typed", "apps/demo/page.css", "apps/demo/recipes/demo-digits.yaml",
                 "apps/catalogue/models.json", "apps/compare/report.html.jinja"):  # fmt: skip
        assert f"translution/{name}" in names


def test_typed():
    assert (ROOT / "py.typed").exists()


def test_the_readmes_code_runs():
    """Everything in its python block, as it stands."""
    readme = ROOT.parents[1] / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.S)
    scope = {}
    exec(code, scope)
    assert scope["y"].shape == (8, 50, 192)
    assert scope["logits"].shape == (2, 10)


def test_the_command_line_names_its_version():
    command = [sys.executable, "-m", "translution", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"translution {translution.__version__}\n"


def test_the_workflow_runs_what_there_is():
    """Each step of .github/workflows is a target of the Makefile, or installs the browser."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT.parents[1] / ".github" / "workflows" / "ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    makefile = (ROOT.parents[1] / "Makefile").read_text()
    ran = set()
    for step in steps:
        if step.startswith("make "):
            ran.add(step.split()[1])
            assert re.search(rf"^{step.split()[1]}:", makefile, flags=re.M), step
        else:
            assert "apt-get install" in step
    assert ran == {"lint", "docs", "compare", "test"}
    versions = jobs["suite"]["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
