"""Compiling the Triton kernels for an H100 on a machine without a GPU.

Triton asks its driver for which device it should compile. `Driver` answers in place of the real
one. Triton's interpreter must be off in such a process, while the tests use it, so a test calls
`run`: it starts `python tests/without_gpu.py TASK` and returns what the task prints as JSON.
"""

from __future__ import annotations

import contextlib
import io
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
from translution.backends.triton import ahead, blocks, neighborhood, offset
from translution.neighborhoods import Neighborhood
from translution.operands import Operand

HALF = torch.bfloat16


class Driver:
    """The part of a Triton driver that is used before a launch."""

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
    """Run a task in a process of its own, and return what it prints as JSON."""
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
    """Records which kernels would be compiled, and compiles none of them."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        triton.knobs.runtime.jit_cache_hook = self

    def __call__(self, *, key, repr, **_):
        self.keys.setdefault(f"{repr} {key}", repr)  # the key alone lacks the kernel's name
        return True  # Triton then neither compiles nor launches

    def new(self) -> list[str]:
        """The kernels since the last call of this method."""
        names, self.keys = sorted(self.keys.values()), {}
        return names


class Once(Compiled):
    """Records each kernel only the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.all: set[tuple[str, str]] = set()

    def __call__(self, *, key, repr, **more):
        if (repr, str(key)) not in self.all:
            self.all.add((repr, str(key)))
            super().__call__(key=key, repr=repr, **more)
        return True


def step(
    layout, batch=4, channels=192, heads=3, dtype=HALF, device="cpu", tables=HALF, strided=False
):
    """Call both primitives of Translution and their gradients."""
    with torch.no_grad():
        many = 2 * channels if strided else channels
        x = torch.zeros(batch, layout.n_keys, many, dtype=dtype, device=device)[..., :channels]
        q = torch.zeros(batch, layout.n_queries, many, dtype=dtype, device=device)[..., :channels]
        if strided:  # a view that begins at an address that is not a multiple of 16
            x, q = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, q))
        w = torch.zeros(layout.classes, channels, channels, dtype=tables, device=device)
        query, key = Operand(q, w), Operand(x, w)
        s = offset.scores(query, key, heads, 0.3, layout)
        y = offset.mix(s, key, layout)
        offset.mix_backward(y, s, key, layout, [True] * 4)
        offset.scores_backward(s, query, key, heads, 0.3, layout, [True] * 6)


def local_step(batch=2, heads=2, width=64, dtype=HALF, size=(6, 5), device="cpu"):
    """Call neighbourhood attention and its gradients."""
    area = Neighborhood.of(size, 3)
    q, k, v = torch.zeros(3, batch, heads, *size, width, dtype=dtype, device=device)
    y = neighborhood.neighborhood_attention(q, k, v, area, 0.3)
    neighborhood.neighborhood_attention_backward(y, y, q, k, v, area, 0.3)


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
    """The kernels that each change of the input compiles, after a first step."""
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
    local_step()
    found["local: first"] = counted.new()
    for change in ({"batch": 5}, {"heads": 3}, {"size": (16, 16)}, {"size": (9, 40)}):
        local_step(**change)
        found[f"local: {change}"] = counted.new()
    return found


def ahead_of_time() -> dict[str, list[str]]:
    """The kernels that are compiled ahead, and those that a step compiles after that."""
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


def resources() -> dict[str, list[dict[str, Any]]]:
    """Registers, spilled bytes and shared memory of all kernels, for each of the `sizes`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    compiled: dict[int, Any] = {}
    warmup = triton.JITFunction.warmup

    def record(kernel, *arguments, **constants):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            made = warmup(kernel, *arguments, **constants)
        if id(made) not in compiled:
            compiled[id(made)] = made
            used = re.search(r"Used (\d+) registers", log.getvalue())
            spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
            assert used, log.getvalue()
            assert spilled, log.getvalue()
            rows[name].append(
                {
                    "kernel": kernel.__name__,
                    "modes": [n for n, v in constants.items() if v is True and n.isupper()],
                    "shared": made.metadata.shared,
                    "registers": int(used[1]),
                    "spilled": int(spilled[1]),
                }
            )
        return made

    triton.JITFunction.warmup = record  # `support.launch` calls it for tensors on the meta device
    triton.knobs.nvidia.dump_ptxas_log = True  # what NVIDIA's assembler says of each kernel
    for name, (channels, heads, kind) in {str(size): size for size in sizes()}.items():
        rows[name] = []
        compiled.clear()
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = getattr(torch, kind.replace("tf32", "float32"))
        if heads:
            step(Layout((14, 14)), 64, channels, heads, dtype, "meta", dtype)
        else:
            local_step(width=channels, dtype=dtype, device="meta")
    return rows


def sizes() -> list[list[Any]]:
    """[channels, heads, dtype] with block sizes of their own.

    Without heads, it is neighbourhood attention with heads of that many channels.
    """
    wide = [[channels, channels // 64, "bfloat16"] for channels in blocks.MEASURED]
    small = [[c, h, kind] for c, h in ((24, 3), (64, 8)) for kind in ("bfloat16", "float32")]
    local = [[c, 0, kind] for c in (32, 128) for kind in ("bfloat16", "float32")]
    between = [[192, 3, "float32"], [192, 3, "tf32"], [256, 2, "bfloat16"]]
    return [*wide, *small, *between, *local]


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
