"""Python files that register mixers or models, which a configuration or a command names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["import_files", "with_imports"]


def import_files(files: Sequence[str]) -> Sequence[str]:
    """Execute Python files, each once per process, and return their names.

    Args:
        files: the files, relative to the working directory.

    Raises:
        ValueError: a file that does not exist, or whose code fails.
    """
    for name in files:
        path = Path(name).expanduser().resolve()
        module_name = f"translution_import_{path.stem}"
        loaded = sys.modules.get(module_name)
        if loaded is not None and loaded.__file__ == str(path):
            continue
        if loaded is not None:
            raise ValueError(f"{name}: {loaded.__file__} has that name too, want another one")
        if not path.is_file():
            raise ValueError(f"{name}: there is no such file")
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{name}: got a file without the suffix .py, want Python")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            said = " ".join(str(error).split())
            raise ValueError(f"{name}: {type(error).__name__}: {said}") from None
    return files


def with_imports(content: dict[str, Any], files: list[Path] | None) -> dict[str, Any]:
    """Return the content of a configuration with further files in its key `imports`."""
    if not files:
        return content
    named = content.get("imports") or []
    if not isinstance(named, list):  # the configuration refuses it
        return content
    return content | {"imports": list(dict.fromkeys([*named, *map(str, files)]))}
