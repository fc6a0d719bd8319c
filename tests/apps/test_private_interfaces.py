"""Private names of other libraries that the data and the training rely on, each in one place.

A new version of a library may change them without notice; these tests then name what is missing.
"""

from __future__ import annotations

import ast
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("datasets")
import datasets
from lightning.pytorch.strategies import DDPStrategy

import translution
from translution.apps.data.documents import fingerprint

ROOT = Path(translution.__file__).parent
FOLDERS = ("apps/data", "apps/training", "interop/parallel", "interop/export/quantization.py")
# file -> the private names of others in it
KNOWN = {
    "apps/data/documents.py": {"_fingerprint"},
    "apps/training/devices.py": {"_processes"},
    "apps/training/strategies.py": {"_ddp_kwargs"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(file: Path) -> set[str]:
    """Private attributes and modules in a file that the file does not define itself."""
    tree = ast.parse(file.read_text("utf-8"))
    own = {"_replace", "_asdict", "_fields"}  # documented, of named tuples
    used = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in used - own if is_private(name)}


def test_all_are_known():
    files = [f for name in FOLDERS for f in ([ROOT / name] if name.endswith(".py") else
             sorted((ROOT / name).glob("*.py")))]  # fmt: skip
    found = {str(f.relative_to(ROOT)): names for f in files if (names := private_names(f))}
    assert found == KNOWN


def test_datasets_have_a_fingerprint():
    """`documents.fingerprint`: it changes with the content."""
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in "ab")
    assert fingerprint(one) != fingerprint(two)


def test_a_pool_has_its_processes():
    """`devices.terminate`."""
    with ProcessPoolExecutor(1) as pool:
        pool.submit(int).result()
        assert all(process.is_alive() for process in pool._processes.values())


def test_ddp_keeps_its_keywords():
    """`strategies.Offset` adds a process group to them."""
    assert DDPStrategy(bucket_cap_mb=1)._ddp_kwargs == {"bucket_cap_mb": 1}
