"""Dividing the tables of a model over the processes of a group, and training such a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...modules.attention import Attention
from ...modules.projections import RelativeLinear, sharding
from .primitives import Divided

__all__ = [
    "Division",
    "build",
    "clip_grad_norm",
    "divide",
    "division_of",
    "same_random",
    "synchronize",
    "tables_of",
]

M = TypeVar("M", bound=nn.Module)


class Division:
    """The process group that the tables of a model are divided over.

    Args:
        group: a process group, such as `mesh["offset"].get_group()`; None is all processes.

    Attributes:
        rank, ranks: the rank of this process in the group, and the size of the group.
        shard: (rank, world size), as in `Layout.shard`; None for a group of one process.
        device: the device for small tensors that are sent within the group.

    Raises:
        ValueError: torch.distributed was not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group: torch.distributed has no processes yet, want "
                "torch.distributed.init_process_group to be called first"
            )
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: got one that this process is not in, want one with it")
        self.shard = (self.rank, self.ranks) if self.ranks > 1 else None
        on_cpu = "gloo" in dist.get_backend_config(self.group)
        self.device = torch.device("cpu" if on_cpu else "cuda")

    def __deepcopy__(self, memo: dict[int, Any]) -> Division:
        return self

    def from_first(self, x: Tensor) -> None:
        """Overwrite x with the x of the first process of the group."""
        dist.broadcast(x, dist.get_global_rank(self.group, 0), self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of a block for all processes. An error in one is an error in all.

        Raises:
            OSError: the block failed in another process.
        """
        try:
            yield
        except BaseException:
            self._all(False)
            raise
        if not self._all(True):
            raise OSError("another process of the group failed; see its own error")

    def _all(self, success: bool) -> bool:
        flag = torch.tensor(int(success), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, self.group)
        return bool(flag)


def divide(model: M, group: Any = None) -> M:
    """Divide the tables of a model in place, so that each process keeps its own rows.

    All processes take the values of the first process of the group. For a model on the meta device
    nothing is sent; call `model.to_empty(device=...)` and `load` afterwards. Make optimizers after
    this, because the tables become new parameters.

    Args:
        model: the same model in all processes, up to its values. Its tables must be in attentions
            of `translution.modules`.
        group: a process group; None is all processes.

    Returns:
        The model.

    Raises:
        ValueError: no process group, a model that is divided already, or a table outside of
            attention.
    """
    division = Division(group)
    if division_of(model) is not None:
        raise ValueError("model: got one that is divided already, want a whole one")
    _check_tables(model)
    synchronize(model, division)
    made: dict[nn.Parameter, nn.Parameter] = {}  # two tables may share a parameter
    for table in tables_of(model).values():
        table.shard = division.shard
        for name, whole in list(table.named_parameters()):
            if whole not in made:
                own = whole.detach()[table.own_classes].clone()
                made[whole] = nn.Parameter(own, whole.requires_grad)
            setattr(table, name, made[whole])
    return _connect(model, division)


def build(make: Callable[[], M], group: Any = None) -> M:
    """Make a divided model. No process ever has a whole table in memory.

    All processes use the random state of the first one. On the CPU the model is therefore the same
    as `make` gives in that process alone; on other devices the generators may differ.

    Args:
        make: makes the model, such as `lambda: create_model("translution_vit_base_patch16_224")`.
            It is called once in each process.
        group: a process group; None is all processes.

    Raises:
        ValueError: no process group, or a table outside the attentions of `translution.modules`.
    """
    division = Division(group)
    same_random(group)
    with sharding(division.shard):
        model = make()
    _check_tables(model)
    _connect(model, division)
    synchronize(model)
    return model


def division_of(model: nn.Module) -> Division | None:
    """How a model, or a model inside a wrapper, is divided; None if it is not divided."""
    for module in model.modules():
        found = getattr(module, "division", None)
        if isinstance(found, Division):
            return found
    return None


def tables_of(model: nn.Module) -> dict[str, RelativeLinear]:
    """The tables of a model by name, each once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, RelativeLinear)}


def synchronize(model: nn.Module, division: Division | None = None) -> None:
    """Copy parameters and buffers, except divided tables, from the first process to all others.

    They stay equal during training if equal inputs give equal results to the last bit.

    Args:
        model: a divided model.
        division: how it is divided; None looks it up.
    """
    division = division or division_of(model)
    if division is None or division.ranks == 1:
        return
    own = _own_rows(model)
    for held in (*model.parameters(), *model.buffers()):
        if held not in own and not held.is_meta:
            division.from_first(held.detach())


def same_random(group: Any = None) -> None:
    """Copy the random state of the first process of a group to all others.

    They then draw the same random numbers on the CPU and on the current CUDA device, which dropout,
    shuffling and augmentation need. With data parallelism, first seed each group by its rank.

    Raises:
        ValueError: no process group.
    """
    division = Division(group)
    get_sets: list[tuple[Callable[[], Tensor], Callable[[Tensor], Any]]]
    get_sets = [(torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_available():
        get_sets.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for get, put in get_sets:
        state = get().to(division.device)
        division.from_first(state)
        put(state.cpu())


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients so that their norm over the whole model is at most `max_norm`.

    Every parameter counts once, whether one process has it or all. A model that is not divided is
    clipped as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        model: a model after its backward pass. Every process of its group calls this.
        max_norm: the largest 2-norm; float("inf") changes nothing.

    Returns:
        The norm before clipping, as a tensor without axes; the same in all processes.

    Raises:
        ValueError: a `max_norm` that is not more than 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}, want more than 0")
    division, own = division_of(model), _own_rows(model)
    held = [p for p in model.parameters() if p.grad is not None]
    norms = [
        nn.utils.get_total_norm([p.grad for p in held if (p in own) == rows and p.grad is not None])
        for rows in (False, True)
    ]
    device = held[0].device if held else torch.device("cpu")
    shared, rows = (norm.to(device) for norm in norms)  # that of nothing is on the CPU
    if division is not None and division.ranks > 1:
        rows = rows.to(torch.promote_types(rows.dtype, shared.dtype)).square()
        dist.all_reduce(rows, group=division.group)
        rows = rows.sqrt()
    norm = torch.linalg.vector_norm(torch.stack([shared, rows]))
    nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm


def _own_rows(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that differ between processes: the divided tables."""
    return {
        p for table in tables_of(model).values() if table.shard is not None
        for p in table.parameters()
    }  # fmt: skip


def _check_tables(model: nn.Module) -> None:
    inside = {id(part) for a in _attentions(model) for part in a.modules()}
    for name, table in tables_of(model).items():
        if id(table) not in inside:
            raise ValueError(
                f"model: has a table {name!r} outside of attention, want tables only in the "
                "attentions of translution.modules, which can be divided"
            )


def _attentions(model: nn.Module) -> list[Attention]:
    return [part for part in model.modules() if isinstance(part, Attention)]


def _connect(model: M, division: Division) -> M:
    """Let its attentions with tables compute on their share."""
    for attention in _attentions(model):
        if division.shard is not None and tables_of(attention):
            attention.primitives = Divided(division.group, division.shard)
    model.division = division  # type: ignore[assignment]
    return model
