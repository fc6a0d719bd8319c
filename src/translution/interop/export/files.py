"""Writes programs to files, and runs those files again."""

from __future__ import annotations

import importlib.util
import io
import json
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

from ...models.preprocessing import Preprocessing
from ...utils.files import check_target, write_whole

__all__ = ["KINDS", "METADATA", "check_kind", "open_program", "save_program"]

KINDS = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
"""The kinds of files that a program can be saved as, with the suffix of each."""

METADATA = "preprocessing"
"""The name of the entry with the preprocessing in a file of a program."""

ONE_FILE = 2_000_000_000
"""The most bytes of weights in an ONNX file; larger weights are saved in a second file."""


def check_kind(kind: str, path: Path) -> None:
    """Check that this machine can write a file of this kind at this path.

    Raises:
        ValueError: the kind is unknown, the suffix does not fit it, the file cannot be written, or
            a needed package or compiler is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"to: got {kind!r}, want one of {list(KINDS)}")
    if path.suffix != KINDS[kind]:
        raise ValueError(f"out: got {path}, want a name that ends in {KINDS[kind]} for {kind!r}")
    check_target("out", path)
    needed = ("onnx", "onnxscript") if kind == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"to: got 'onnx', which needs {' and '.join(missing)} (pip install)")
    if kind == "aoti" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("to: got 'aoti', which needs a C++ compiler (g++ or clang++, or CXX=)")


def save_program(
    program: ExportedProgram,
    kind: str,
    path: Path | str,
    preprocessing: Preprocessing | None = None,
) -> int:
    """Write a program of `portable` to a file.

    In an ONNX file of a classifier or language model, the input is named "image" or "ids", and the
    output "logits".

    Args:
        program: the program.
        kind: "torch", which `torch.export.load` reads; "onnx"; or "aoti", which is compiled for
            this machine and which `torch._inductor.aoti_load_package` reads.
        path: the file, with the suffix that `KINDS` gives for the kind. ONNX weights of more than
            2 GB are written to a second file beside it, with ".data" added to the name.
        preprocessing: how an image becomes the input of the program. It is written into the file,
            as JSON under the name `METADATA`: in ONNX's metadata, in a file of torch's archive, or
            in the metadata of the compiled package.

    Returns:
        the bytes that were written.

    Raises:
        ValueError: the kind is unknown or cannot be written on this machine, the suffix does not
            fit it, or the folder does not exist.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_kind(kind, path)
    write = {"torch": _write_torch, "onnx": _write_onnx, "aoti": _write_aoti}[kind]
    metadata = {}
    if preprocessing is not None:
        metadata[METADATA] = json.dumps(preprocessing.to_dict(), ensure_ascii=False)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            write(program, Path(folder) / path.name, metadata)
            # move the program's file last, so that it exists only when the others do
            files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
            size = sum(file.stat().st_size for file in files)
            for file in files:
                write_whole(path.parent / file.name, lambda to, file=file: os.replace(file, to))
    except OSError as error:  # that of a full disk names no file
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    return size


def _write_torch(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    # torch's own writer ends the process if the disk is full
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=metadata)
    path.write_bytes(content.getbuffer())


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    # a program for any batch size has range constraints; name its dynamic axis
    named = ({0: "batch"},) if program.range_constraints else None
    inputs, outputs = _names(program)
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, dynamic_shapes=named, input_names=inputs,
        output_names=outputs,
    )  # fmt: skip
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    exported.save(path, external_data=size > ONE_FILE)


def _names(program: ExportedProgram) -> tuple[list[str] | None, list[str] | None]:
    """The names of a program's input and output; None keeps those that the exporter makes."""
    x = program.example_inputs[0][0]
    name = {(False, 2): "ids", (True, 4): "image"}.get((x.is_floating_point(), x.ndim))
    if name is None or len(program.graph_signature.user_outputs) != 1:
        return None, None
    return [name], ["logits"]


def _write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package

    options = {"aot_inductor.metadata": metadata}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def open_program(kind: str, path: Path | str) -> Callable[[Tensor], list[Tensor]]:
    """Load a program that `save_program` wrote, and run it on the CPU.

    Args:
        kind, path: as in `save_program`.

    Returns:
        a function from an input tensor to the list of output tensors.

    Raises:
        ValueError: the kind is unknown, or onnxruntime is needed and not installed.
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
