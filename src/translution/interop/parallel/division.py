"""Dividing the tables of a model over the processes of a group, and what training then needs."""

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
    """Over which processes a model's tables are divided.

    Args:
        group: a process group, such as `mesh["offset"].get_group()`; None is all processes.

    Attributes:
        rank, ranks: which of its processes this is, and how many there are.
        shard: (rank, world size), as `Layout.shard`; None where there is one process.
        device: where its collectives take their tensors from, if these are not a model's.

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
        """Overwrite x with that of the group's first process."""
        dist.broadcast(x, dist.get_global_rank(self.group, 0), self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes finish before any goes on; where it fails in one, it is an
        error in all."""
        try:
            yield
        except BaseException:
            self._all(False)
            raise
        if not self._all(True):
            raise OSError("another process of the group failed; its own error says why")

    def _all(self, fine: bool) -> bool:
        flag = torch.tensor(int(fine), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, self.group)
        return bool(flag)


def divide(model: M, group: Any = None) -> M:
    """Divide the tables of a model, in place: each process keeps its own rows.

    All take the values of the group's first process, tables included. On the meta device nothing
    is sent: then come `model.to_empty(device=...)` and `load`. Optimizers are made afterwards, as
    tables are other parameters then.

    Args:
        model: with tables in attentions of `translution.modules`; equal in all processes, but for
            its values.
        group: a process group; None is all processes.

    Returns:
        The model.

    Raises:
        ValueError: no process group, a model that is divided already, or a table elsewhere.
    """
    division = Division(group)
    if division_of(model) is not None:
        raise ValueError("model: got one that is divided already, want a whole one")
    _check_tables(model)
    synchronize(model, division)
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that two tables have stays one
    for table in tables_of(model).values():
        table.shard = division.shard
        for name, whole in list(table.named_parameters()):
            if whole not in made:
                own = whole.detach()[table.own_classes].clone()
                made[whole] = nn.Parameter(own, whole.requires_grad)
            setattr(table, name, made[whole])
    return _connect(model, division)


def build(make: Callable[[], M], group: Any = None) -> M:
    """A divided model, made without ever holding a whole table.

    The processes take over the first one's random numbers, so that the model is the one that this
    would make alone, with its seed (on the CPU; elsewhere the generators may differ).

    Args:
        make: makes the model, such as `lambda: create_model("translution_vit_base_patch16_224")`;
            called once in each process.
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
    """How a model (or one inside this, as wrappers have it) is divided; None: not at all."""
    for module in model.modules():
        found = getattr(module, "division", None)
        if isinstance(found, Division):
            return found
    return None


def tables_of(model: nn.Module) -> dict[str, RelativeLinear]:
    """The tables of a model by name, each once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, RelativeLinear)}


def synchronize(model: nn.Module, division: Division | None = None) -> None:
    """Let what all processes hold, parameters and buffers but no rows of a divided table, be that
    of the first. It is equal after each step anyway, where equal inputs give equal bits."""
    division = division or division_of(model)
    if division is None or division.ranks == 1:
        return
    own = _own_rows(model)
    for held in (*model.parameters(), *model.buffers()):
        if held not in own and not held.is_meta:
            division.from_first(held.detach())


def same_random(group: Any = None) -> None:
    """Let the group's processes draw the same random numbers from here on: those of its first, on
    the CPU and, where there is CUDA, its current device.

    Dropout needs it, and so does whatever shuffles or augments the data. With data parallelism
    besides, seed by the place along its axis before this.

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
    """Scale the gradients so that their norm, over the whole model, is at most `max_norm`.

    Rows of tables count once, wherever they are, and so does what all processes hold. A model that
    is not divided is clipped as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        model: after its backward pass; each process of its group calls this.
        max_norm: the largest 2-norm; float("inf") changes nothing.

    Returns:
        The norm before, of no axes; the same in all processes.

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
