"""What offset parallelism sends and holds beside FSDP and DDP: counted, and measured.

`python -m translution.apps.bench.scaling` prints both; docs/scaling.md keeps and explains the
tables.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...interop import parallel
from ...models import ViT, create_model, vit
from ...modules import RelativeLinear
from ...utils.measuring import TrainingStep, machine

__all__ = [
    "Call",
    "Shape",
    "Small",
    "counting",
    "ddp_bytes",
    "fsdp_bytes",
    "main",
    "offset_bytes",
    "prepared",
]

STRATEGIES = ("offset", "fsdp", "ddp")


class Shape(NamedTuple):
    """Of a model's attentions: how many, their tokens and channels, and heads."""

    layers: int
    tokens: int
    width: int
    heads: int


def offset_bytes(
    shape: Shape, batch: int, ranks: int, size: int, relative: str = "qkv", branch: int = 0,
    wide: int = 4,
) -> float:  # fmt: skip
    """Bytes that a process sends in a step: all-reduces of what is as large as the tokens.

    A layer's mix goes forward. Back go the gradients of the tokens that scores and mix took in:
    one where q and k are tables, which take the same tokens, else one for each of q and k, and one
    for v. α-Translution has all four of its ordinary branch, and those of its other one. Three
    numbers per query and head are the softmax's. A last layer that answers for a class token alone
    sends less.

    Args:
        shape: of the model.
        batch: of the group: all its processes see it.
        ranks: processes.
        size: bytes of a number; wide: of one of the softmax's.
        relative: which of "qkv" are tables.
        branch: channels of α-Translution's branch; 0 for Translution.
    """
    tokens = batch * shape.tokens
    if branch:
        scores, mixes = bool({"q", "k"} & set(relative)), "v" in relative
        channels = 4 * shape.width + 2 * branch * (scores + mixes)
    else:
        channels = (3 if {"q", "k"} <= set(relative) else 4) * shape.width
    layer = channels * tokens * size + 3 * tokens * shape.heads * wide
    return shape.layers * layer * _ring("allreduce_", ranks)


def fsdp_bytes(parameters: int, ranks: int, size: int) -> float:
    """The same of FSDP: parameters gathered forward and back, gradients reduced and scattered."""
    gathered, scattered = (_ring(k, ranks) for k in ("_allgather_base_", "_reduce_scatter_base_"))
    return parameters * size * (2 * gathered + scattered)


def ddp_bytes(parameters: int, ranks: int, size: int) -> float:
    """The same of DDP: gradients all-reduced."""
    return parameters * size * _ring("allreduce_", ranks)


def _ring(kind: str, ranks: int) -> float:
    """What each process sends by a ring, over the size of the whole (gathered) tensor."""
    return RINGS[kind] * (ranks - 1) / ranks


RINGS = {
    "allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1,
    "broadcast_": 1, "barrier": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A collective that ran: its kind and the bytes of its whole tensor."""

    kind: str
    bytes: int

    def sent(self, ranks: int) -> float:
        """Bytes that each of so many processes sends for it, by a ring."""
        return self.bytes * _ring(self.kind, ranks)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            kind = func.overloadpacket.__name__
            if kind not in RINGS:
                raise ValueError(f"collective: {kind!r} is not counted, want {list(RINGS)}")
            self.calls.append(Call(kind, max(_bytes(args[0]), _bytes(args[1]))))
        return func(*args, **(kwargs or {}))


def _bytes(held: Any) -> int:
    """Of a tensor, or of all in a list of them; of nothing else."""
    if isinstance(held, list | tuple):
        return sum(map(_bytes, held))
    return held.numel() * held.element_size() if isinstance(held, Tensor) else 0


@contextmanager
def counting() -> Iterator[list[Call]]:
    """A list that collects the collectives which this process takes part in meanwhile."""
    with _Counting() as mode:
        yield mode.calls


# -- counted: a model too large for this machine ---------------------------------------------------


def counted(name: str, batch: int) -> list[str]:
    """Lines of a table: GB sent per step and process, and held, for 8 and 64 processes."""
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, ViT)
    c = model.config
    rows = sum(p.numel() for p in _tables(model))
    every = sum(p.numel() for p in model.parameters())
    block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    branch = c.rank * c.heads if c.mixer == "alpha" else 0
    shape = Shape(c.depth, c.grid[0] * c.grid[1] + model.prefix, c.dim, c.heads)
    lines = [
        f"{name}: {every / 1e9:.2f} G parameters, {rows / every:.1%} of them in tables",
        "",
        "| processes | numbers | strategy | sent, GB | held, GB | images where FSDP sends less |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ranks in (8, 64):
        for kind, size in (("bfloat16", 2), ("float32", 4)):
            sent = {
                "offset": offset_bytes(shape, batch, ranks, size, c.relative, branch),
                "fsdp": fsdp_bytes(every, ranks, size),
                "ddp": ddp_bytes(every, ranks, size),
            }
            # weights, gradients and AdamW's two states; FSDP also gathers a block and its gradient
            held = {
                "offset": 4 * (every - rows + rows / ranks),
                "fsdp": 4 * every / ranks + 2 * block,
                "ddp": 4 * every,
            }
            equal = sent["fsdp"] / sent["offset"] * batch
            for strategy in STRATEGIES:
                even = f"{equal:,.0f}" if strategy == "offset" else ""
                lines.append(
                    f"| {ranks} | {kind} | {strategy} | {sent[strategy] / 1e9:.2f} | "
                    f"{held[strategy] * size / 1e9:.1f} | {even} |"
                )
    return lines


def _tables(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, RelativeLinear) for p in m.parameters()]


# -- measured: processes on this machine -----------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A model that this machine trains with a few processes, and how: `batch` images in all."""

    mixer: str = "translution"
    dim: int = 192
    depth: int = 2
    grid: int = 6
    batch: int = 8
    repeats: int = 3

    def build(self) -> ViT:
        return vit(
            mixer=self.mixer, image_size=16 * self.grid, dim=self.dim, depth=self.depth,
            heads=self.dim // 64, num_classes=10, pool="mean",
        )  # fmt: skip


def measured(case: Small, processes: int) -> list[str]:
    """Lines of a table: MB that the collectives of a training step sent, MB held, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (processes, case, folder), nprocs=processes)
        lines = (Path(folder) / "lines").read_text().splitlines()
    return lines


def _work(rank: int, processes: int, case: Small, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    lines = [
        "| strategy | collectives | sent, MB | held, MB | s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strategy in STRATEGIES:
        torch.manual_seed(0)
        run, model = prepared(case, strategy)
        with counting() as calls:
            run()  # also warms up
        taken = []
        for _ in range(case.repeats):
            dist.barrier()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        sent = sum(call.sent(processes) for call in calls)
        local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        held = 4 * sum(p.numel() * p.element_size() for p in local)
        lines.append(
            f"| {strategy} | {len(calls)} | {sent / 1e6:.2f} | {held / 1e6:.0f} | "
            f"{statistics.median(taken):.2f} |"
        )
    if rank == 0:
        (Path(folder) / "lines").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def prepared(case: Small, strategy: str) -> tuple[TrainingStep, nn.Module]:
    """A training step of AdamW, the same images in all, and the model."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model: nn.Module
    images, labels = torch.randn(case.batch, 3, *(16 * case.grid,) * 2), torch.arange(case.batch)
    if strategy == "offset":
        model = parallel.build(case.build)
    else:  # each process has a part of the images
        part = slice(dist.get_rank(), None, dist.get_world_size())
        images, labels = images[part], labels[part]
        model = case.build()
        if strategy == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            for part_of in (*model.blocks, model):
                fully_shard(part_of, mesh=mesh)
    run = TrainingStep(model, images, labels % 10)
    if strategy == "ddp":
        run()  # its first step also sends how it divides the gradients
    return run, model


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    prog = "python -m translution.apps.bench.scaling"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model", default="translution_vit_base_patch16_224", help="counted")
    parser.add_argument("--batch", type=int, default=64, help="of the counted model")
    parser.add_argument("--processes", type=int, default=2, help="0: count only")
    parser.add_argument("--mixer", default="translution", help="of the measured model")
    parser.add_argument("--grid", type=int, default=6, help="its patches per axis")
    parser.add_argument("--images", type=int, default=8, help="its batch, all processes together")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the median counts")
    given = parser.parse_args(arguments)
    print("\n".join(counted(given.model, given.batch)))
    if given.processes:
        case = Small(mixer=given.mixer, grid=given.grid, batch=given.images, repeats=given.repeats)
        about = machine("cpu")
        with torch.device("meta"):
            numbers = sum(p.numel() for p in case.build().parameters())
        print(f"\n{case}: {numbers:,} parameters, {given.processes} processes\n{about}\n")
        print("\n".join(measured(case, given.processes)))


if __name__ == "__main__":
    main()
