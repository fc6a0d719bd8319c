"""Compiling the Triton kernels for an H100 on a machine that has none.

Triton asks its driver which device to compile for; `pretend` answers in its place. A process that
pretends must not use the interpreter (TRITON_INTERPRET=0), so the tests run `python
tests/without_gpu.py TASK` and read the JSON that it prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from translution import Layout
from translution.backends.triton import ahead, blocks, offset
from translution.backends.triton import launch as launching
from translution.backends.triton import small as small_path
from translution.operands import Operand

HALF = torch.bfloat16


class Driver:
    """What Triton asks of a driver before it launches."""

    launcher_cls = utils = None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def set_current_device(self, device):
        pass

    def is_active(self):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind


def run(task: str, *arguments: str, timeout: float = 600) -> Any:
    """What a task prints, run in a process of its own."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache,
               "PYTHONPATH": str(root / "src"), "PYTHONWARNINGS": "ignore",
               "OMP_NUM_THREADS": "1"}  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(Path(__file__)), task, *arguments],
            env=env, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Compiled:
    """The distinct kernels asked for, which are not compiled."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        triton.knobs.runtime.jit_cache_hook = self

    def __call__(self, *, key, repr, **_):
        self.keys.setdefault(str(key), repr)
        return True  # Triton then neither compiles nor launches

    def new(self) -> list[str]:
        """Those since the last time."""
        found, self.keys = sorted(self.keys.values()), {}
        return found


class Once(Compiled):
    """Each kernel counts only the first time that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.all: set[str] = set()

    def __call__(self, *, key, repr, **more):
        if str(key) not in self.all:
            self.all.add(str(key))
            super().__call__(key=key, repr=repr, **more)
        return True


def step(
    layout, batch=4, channels=192, heads=3, dtype=HALF, device="cpu", tables=HALF, strided=False
):
    """Both primitives in both directions; nothing is launched where nothing is compiled."""
    with torch.no_grad():
        many = 2 * channels if strided else channels
        x = torch.zeros(batch, layout.n_keys, many, dtype=dtype, device=device)[..., :channels]
        q = torch.zeros(batch, layout.n_queries, many, dtype=dtype, device=device)[..., :channels]
        if strided:  # a view that begins between two vectors of 16 bytes
            x, q = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, q))
        w = torch.zeros(layout.classes, channels, channels, dtype=tables, device=device)
        query, key = Operand(q, w), Operand(x, w)
        s = offset.scores(query, key, heads, 0.3, layout)
        y = offset.mix(s, key, layout)
        offset.mix_backward(y, s, key, layout, [True] * 4)
        offset.scores_backward(s, query, key, heads, 0.3, layout, [True] * 6)


LAYOUTS = {
    "more tokens": Layout((5, 6)),
    "many tokens": Layout((9, 9)),
    "prefix": Layout((3, 4), prefix=1),
    "causal": Layout(24, causal=True),
    "window": Layout((5, 5), window=1),
    "dilation": Layout(9, dilation=2),
    "buckets": Layout(30, buckets=4),
    "three axes": Layout((2, 2, 3)),
}


def recompilations() -> dict[str, list[str]]:
    """Which kernels each change of the input compiles anew, after one step."""
    counted, found = Once(), {}
    for name, channels, heads in (("wide", 192, 3), ("small", 24, 3)):
        step(Layout((3, 4)), channels=channels, heads=heads)
        found[f"{name}: first"] = counted.new()
        for batch in (1, 2, 3, 16, 37, 64, 256):
            step(Layout((3, 4)), batch, channels, heads)
            found[f"{name}: batch {batch}"] = counted.new()
        for kind, layout in LAYOUTS.items():
            step(layout, 5, channels, heads)
            found[f"{name}: {kind}"] = counted.new()
        step(Layout((3, 4)), 4, channels, heads, strided=True)
        found[f"{name}: strides"] = counted.new()
    return found


def ahead_of_time() -> dict[str, list[str]]:
    """What is compiled ahead, and what a step then still compiles."""
    counted, found = Once(), {}
    ahead._is_new = lambda x, key: True
    torch.cuda.device = lambda device: contextlib.nullcontext()
    layout = Layout((3, 4))
    for name, channels, tables in (
        ("wide", 192, HALF), ("small", 24, HALF), ("autocast", 192, torch.float32),
    ):  # fmt: skip
        x = torch.zeros(4, 12, channels, dtype=HALF, requires_grad=True)
        w = torch.zeros(
            layout.classes, channels, channels, dtype=tables, requires_grad=True
        )  # fmt: skip
        ahead.prepare_scores(Operand(x, w), Operand(x, w), 3, layout)
        found[f"{name}: scores"] = counted.new()
        a = torch.zeros(4, 3, 12, 12, requires_grad=True)
        ahead.prepare_mix(a, Operand(x, w), layout)
        found[f"{name}: mix"] = counted.new()
        step(layout, channels=channels, tables=tables)
        found[f"{name}: step"] = counted.new()
    return found


def resources(which: str) -> list[dict[str, Any]]:
    """Registers, spilled bytes and shared memory of the kernels of a step, compiled for an H100."""
    rows = []

    def compile_only(kernel, programs, *arguments, **constants):
        compiled = kernel.warmup(*arguments, grid=programs, **constants)
        if id(compiled) in seen:
            return
        seen[id(compiled)] = compiled
        found = assembler(compiled.asm["ptx"])
        modes = [n for n, v in constants.items() if v is True and n.isupper()]
        rows.append(
            {"kernel": kernel.__name__, "modes": modes, "shared": compiled.metadata.shared, **found}
        )

    seen: dict[int, Any] = {}
    launching.launch = small_path.launch = compile_only
    layout, (channels, heads, dtype) = Layout((14, 14)), json.loads(which)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    dtype = dtype.replace("tf32", "float32")
    step(layout, 64, channels, heads, getattr(torch, dtype), "meta", getattr(torch, dtype))
    return rows


def assembler(ptx: str) -> dict[str, int]:
    """What NVIDIA's assembler says of a kernel."""
    import triton.backends.nvidia as nvidia

    folder = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        # newer programs are written for the assembler of newer devices, which knows older ones
        for name in ("ptxas", "ptxas-blackwell"):
            command = [str(folder / name), "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True).stderr
            used = re.search(r"Used (\d+) registers", told)
            spilled = re.search(r"(\d+) bytes spill stores", told)
            if used and spilled:
                return {"registers": int(used[1]), "spilled": int(spilled[1])}
    raise RuntimeError(told)


def sizes() -> list[list[Any]]:
    """The sizes that have block sizes of their own."""
    wide = [[channels, channels // 64, "bfloat16"] for channels in blocks.MEASURED]
    small = [[c, h, kind] for c, h in ((24, 3), (64, 8)) for kind in ("bfloat16", "float32")]
    return [*wide, *small, [192, 3, "float32"], [192, 3, "tf32"], [256, 2, "bfloat16"]]


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
