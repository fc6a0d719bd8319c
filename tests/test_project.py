"""Facts of the whole: imports go one way, the core needs torch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import translution

ROOT = Path(translution.__file__).parent

# What each part may import from the library. A part not named here is a mistake.
MAY_IMPORT = {
    "caches": set(),
    "layouts": {"caches"},
    "neighborhoods": {"caches"},
    "backends": {"caches", "layouts", "neighborhoods"},
    "functional": {"layouts", "neighborhoods", "backends"},
    "modules": {"layouts", "neighborhoods", "functional"},
    "models": {"modules", "files", "measuring", "words"},
    "convert": {"layouts", "modules", "models"},
    "published": {"models", "modules"},
    "catalogue": {"models", "measuring"},
    "export": {
        "layouts",
        "neighborhoods",
        "functional",
        "modules",
        "models",
        "files",
        "measuring",
        "training",
    },
    "timm": {"models"},
    "transformers": {"models", "modules"},
    "measuring": {"layouts", "functional"},
    "files": set(),
    "words": set(),
    "config": {"words"},
    "data": {"config", "files", "words"},
    "bench": {
        "layouts",
        "neighborhoods",
        "backends",
        "functional",
        "modules",
        "models",
        "measuring",
        "files",
        "parallel",
    },
    "compare": {"layouts", "modules", "models", "measuring", "files", "data", "training"},
    "demo": {"config", "data", "files", "models", "modules", "training"},
    "parallel": {"layouts", "functional", "modules", "models"},
    "training": {"config", "data", "files", "measuring", "models", "modules", "parallel", "words"},
    "experiments": {"config", "data", "files", "measuring", "models", "training"},
    "cli": {"bench", "catalogue", "compare", "demo", "experiments", "export", "training"},
    "__main__": {"cli"},
}


def imported(path: Path) -> set[str]:
    """The parts of the library that a file imports."""
    found = set()
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = here[: len(here) - node.level] + tuple((node.module or "").split("."))
            parts = tuple(p for p in parts if p)
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("translution"):
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("translution.") for alias in node.names)
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    other = imported(path) - {part, "__version__"}
    assert other <= MAY_IMPORT[part], f"{path.name} imports {other - MAY_IMPORT[part]}"


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
from translution import cli
try:
    cli.main()
except SystemExit as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "typer is not installed; pip install 'translution[cli]'" in done.stdout


def test_no_file_is_long_without_reason():
    reasons = {"attention.py": "one skeleton and its three operators, read side by side"}
    for path in ROOT.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 400 or path.name in reasons, f"{path.name}: {lines} lines"


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
