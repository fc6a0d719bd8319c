"""Compare the communication and memory of offset parallelism with those of FSDP and DDP.

`python -m translution.apps.bench.scaling` prints one table that is counted from shapes and one that
is measured; docs/scaling.md shows and explains both.
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
    """The shape of the attention layers of a model.

    Attributes:
        layers: the number of layers.
        tokens: the number of tokens of a sample.
        width: the number of channels of a token.
        heads: the number of heads of a layer.
    """

    layers: int
    tokens: int
    width: int
    heads: int


def offset_bytes(
    shape: Shape, batch: int, ranks: int, size: int, relative: str = "qkv", branch: int = 0,
    wide: int = 4,
) -> float:  # fmt: skip
    """Count the bytes that a process sends in a training step with offset parallelism.

    The processes all-reduce tensors as large as the tokens. In the forward pass this is the output
    of each layer's mix. In the backward pass it is the gradient of the tokens that enter the scores
    (one tensor if q and k are both relative, since they have the same input; otherwise one for each
    of q and k), and the gradient of the tokens that enter the mix. α-Translution sends all four
    tensors of its ordinary branch, and those of its relative branch. The softmax needs three
    numbers for each query and head. A last layer that only computes the class token sends less
    than is counted here.

    Args:
        shape: the shape of the model's attention layers.
        batch: the number of samples, which all processes share.
        ranks: the number of processes.
        size: the bytes of a number.
        relative: which of q, k and v are relative.
        branch: the number of channels of the relative branch of α-Translution; 0 for Translution.
        wide: the bytes of a number of the softmax.

    Returns:
        The number of bytes.
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
    """Count the bytes that a process sends in a training step with FSDP.

    FSDP gathers the parameters in the forward and in the backward pass, and reduces and scatters
    the gradients.

    Args:
        parameters: the number of parameters of the model.
        ranks: the number of processes.
        size: the bytes of a number.
    """
    gathered, scattered = (_ring(k, ranks) for k in ("_allgather_base_", "_reduce_scatter_base_"))
    return parameters * size * (2 * gathered + scattered)


def ddp_bytes(parameters: int, ranks: int, size: int) -> float:
    """Count the bytes that a process sends in a training step with DDP, to all-reduce gradients.

    Args:
        parameters: the number of parameters of the model.
        ranks: the number of processes.
        size: the bytes of a number.
    """
    return parameters * size * _ring("allreduce_", ranks)


def _ring(kind: str, ranks: int) -> float:
    """Return the bytes that each process sends in a ring, divided by the whole tensor's bytes."""
    return RINGS[kind] * (ranks - 1) / ranks


RINGS = {
    "allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1,
    "broadcast_": 1, "barrier": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A collective operation that ran.

    Attributes:
        kind: the name of the operation, a key of `RINGS`.
        bytes: the bytes of the whole tensor, gathered from all processes.
    """

    kind: str
    bytes: int

    def sent(self, ranks: int) -> float:
        """Return the bytes that each of `ranks` processes sends for it in a ring."""
        return self.bytes * _ring(self.kind, ranks)


class _Counting(TorchDispatchMode):
    """Records the collective operations that run while it is active."""

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
    """Return the bytes of a tensor or of a list of tensors, and 0 for anything else."""
    if isinstance(held, list | tuple):
        return sum(map(_bytes, held))
    return held.numel() * held.element_size() if isinstance(held, Tensor) else 0


@contextmanager
def counting() -> Iterator[list[Call]]:
    """Yield a list that collects the collective operations of this process."""
    with _Counting() as mode:
        yield mode.calls


# -- counting: models that are too large for this machine ------------------------------------------


def counted(name: str, batch: int) -> list[str]:
    """Return the lines of a table of GB sent per step and GB held, for 8 and 64 processes.

    Args:
        name: the name of a ViT.
        batch: the number of images of a step, all processes together.
    """
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


# -- measuring: processes on this machine ----------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A small model that this machine can train with a few processes.

    Attributes:
        mixer: the name of the mixer.
        dim: the number of channels of a token, a multiple of 64.
        depth: the number of blocks.
        grid: the number of patches along each axis.
        batch: the number of images of a step, all processes together.
        repeats: the number of timed steps.
    """

    mixer: str = "translution"
    dim: int = 192
    depth: int = 2
    grid: int = 6
    batch: int = 8
    repeats: int = 3

    def build(self) -> ViT:
        """Make the model, with random weights."""
        return vit(
            mixer=self.mixer, image_size=16 * self.grid, dim=self.dim, depth=self.depth,
            heads=self.dim // 64, num_classes=10, pool="mean",
        )  # fmt: skip


def measured(case: Small, processes: int) -> list[str]:
    """Return the lines of a table of the MB sent, the MB held and the seconds of a training step.

    Args:
        case: the model.
        processes: the number of processes to start.
    """
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
    """Make a training step with AdamW on the same images for every strategy, and the model.

    Args:
        case: the model.
        strategy: "offset", "fsdp" or "ddp".
    """
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
        run()  # the first step of DDP also sends how it groups the gradients
    return run, model


def main(arguments: list[str] | None = None) -> None:
    """Print both tables.

    Args:
        arguments: the command-line arguments; None takes those of this process.
    """
    prog = "python -m translution.apps.bench.scaling"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--model", default="translution_vit_base_patch16_224", help="the model that is counted"
    )
    parser.add_argument("--batch", type=int, default=64, help="images of the counted model")
    parser.add_argument("--processes", type=int, default=2, help="processes; 0 counts only")
    parser.add_argument("--mixer", default="translution", help="mixer of the measured model")
    parser.add_argument(
        "--grid", type=int, default=6, help="patches per axis of the measured model"
    )
    parser.add_argument("--images", type=int, default=8, help="its images, all processes together")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed steps; their median is reported"
    )
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
