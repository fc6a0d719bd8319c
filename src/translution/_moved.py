"""Import paths of earlier versions, which keep working.

A module that was moved is found under its old name too, as the same module, with a
DeprecationWarning that names the new one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MOVED", "install", "now"]

FLOORS = {
    "apps": "bench catalogue cli compare config data demo experiments training",
    "interop": "export parallel published timm transformers",
    "utils": "files measuring words",
}
RENAMED = {
    "apps.training.telling": "apps.training.messages",
    "convert": "interop.conversion",
    "interop.convert": "interop.conversion",
    "interop.published.entries": "interop.published.entry",
    "interop.export.quantise": "interop.export.quantization",
    "functional.row": "functional.single_query",
    "models.attention_weights": "models.inspection",
    "models.gpt": "models.language_model",
    "models.pvt": "models.pyramid_transformer",
    "models.resnet": "models.residual_network",
    "models.san": "models.self_attention_network",
    "models.swin": "models.swin_transformer",
    "models.vit": "models.vision_transformer",
    "modules.local": "modules.acmix",
}
MOVED = {
    f"translution.{name}": f"translution.{floor}.{name}"
    for floor, names in FLOORS.items()
    for name in names.split()
} | {f"translution.{old}": f"translution.{new}" for old, new in RENAMED.items()}
"""Where each moved module, with all that is in it, is now."""


def now(name: str) -> str | None:
    """The new name of a module; None where it has not moved."""
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None


class _Loader(Loader):
    """Gives the module at its new place."""

    def __init__(self, name: str):
        self.name = name
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importing by the old name has put that in its place

    def get_code(self, name: str) -> CodeType:
        """For `python -m`: run the module under its new name."""
        run = f"import runpy; runpy.run_module({self.name!r}, run_name='__main__', alter_sys=True)"
        return compile(run, name, "exec")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = now(fullname)
        found = None if name is None else importlib.util.find_spec(name)
        if name is None or found is None:
            return None
        warnings.warn(f"{fullname} is now {name}", DeprecationWarning, stacklevel=2)
        sys.modules[fullname.rpartition(".")[0]].__class__ = _Package
        package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, _Loader(name), is_package=package)


class _Package(ModuleType):
    """A package that has a public function with the old name of a module, such as `convert`.

    After importing a module the import system sets it as an attribute of its package. Here a moved
    module does not replace the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        moved = isinstance(value, ModuleType) and value.__name__ != f"{self.__name__}.{name}"
        if not (moved and name in getattr(self, "__all__", ())):
            super().__setattr__(name, value)


def install() -> None:
    """Let the import system find modules under their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # first: the folder of a moved package would otherwise be searched for its modules again
        sys.meta_path.insert(0, _Finder())
