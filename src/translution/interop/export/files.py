"""Programs as files, and those files run again to see that they agree."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from ...utils.files import write_whole

__all__ = ["KINDS", "check_kind", "open_program", "save_program"]

KINDS = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
"""What a program can be saved as, and how its file's name ends."""

ONE_FILE = 2_000_000_000
"""Bytes of weights beyond which an ONNX file cannot hold them; they then lie beside it."""


def check_kind(kind: str, path: Path) -> None:
    """That this machine can write such a file.

    Raises:
        ValueError: naming the argument, what came and what is wanted.
    """
    if kind not in KINDS:
        raise ValueError(f"to: got {kind!r}, want one of {list(KINDS)}")
    if path.suffix != KINDS[kind]:
        raise ValueError(f"out: got {path}, want a name that ends in {KINDS[kind]} for {kind!r}")
    if not path.parent.is_dir():
        raise ValueError(f"out: got {path}, but there is no folder {path.parent}")
    needed = ("onnx", "onnxscript") if kind == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"to: got 'onnx', which needs {' and '.join(missing)} (pip install)")
    if kind == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("to: got 'aoti', which needs a C++ compiler (g++ or clang++, or CXX=)")


def save_program(program: ExportedProgram, kind: str, path: Path | str) -> int:
    """Write a program of `portable`, and tell the bytes.

    Args:
        kind: "torch", for `torch.export.load`; "onnx"; or "aoti", compiled for this machine, for
            `torch._inductor.aoti_load_package`.
        path: its name ends as `KINDS` says. ONNX weights of more than 2 GB lie beside it, in a
            file with ".data" added to its name.

    Raises:
        ValueError: an unknown kind, one that this machine can't write, another ending, or a folder
            that is not there.
    """
    path = Path(path)
    check_kind(kind, path)
    write = {"torch": _write_torch, "onnx": _write_onnx, "aoti": _write_aoti}[kind]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        write(program, Path(folder) / path.name)
        # what lies beside the program first: the program's file says that all is there
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            write_whole(path.parent / file.name, lambda to, file=file: os.replace(file, to))
    return size


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    held = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
    named = ({0: "batch"},) if program.range_constraints else None  # of a program for any batch
    found = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=named)
    assert found is not None
    found.save(path, external_data=size > ONE_FILE)


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def open_program(kind: str, path: Path | str) -> Callable[[Tensor], list[Tensor]]:
    """The program in a file of `save_program`, as a function: input -> outputs, on the CPU.

    Raises:
        ValueError: an unknown kind, or one whose runtime is not installed.
    """
    if kind == "torch":
        module = torch.export.load(str(path)).module()
        return lambda x: tree_leaves(module(x))
    if kind == "aoti":
        from torch._inductor import aoti_load_package

        compiled: Any = aoti_load_package(str(path))
        return lambda x: tree_leaves(compiled(x))
    if kind != "onnx":
        raise ValueError(f"to: got {kind!r}, want one of {list(KINDS)}")
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError("check: got True for 'onnx', which needs onnxruntime (pip install)")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]
