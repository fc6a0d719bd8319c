"""Strategies for several devices that share one model.

FSDP shards all parameters. Offset parallelism divides the tables by their classes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from ...interop import parallel
from ...models.weights import not_finite
from ...modules.projections import RelativeLinear
from .checkpoints import PREFIX, Folders
from .devices import REMEDY, Diverged

__all__ = ["Loopback", "Offset", "Sharded", "group_of_one", "is_started_elsewhere", "shard"]

# The environment variables of a group, which Lightning and `Loopback` set.
DESCRIBE_GROUP = (
    "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS",
)  # fmt: skip

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_started_elsewhere() -> bool:
    """Whether another program, such as torchrun or a cluster, starts the processes of a run."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
    return any(kind.detect() for kind in kinds)


class Loopback(LightningEnvironment):
    """Processes on one machine, which listen on the loopback interface only.

    torch's own store listens on all interfaces. Here the first process opens the store on a socket
    that is bound to the loopback address, and all processes are its clients, as those of torchrun
    are clients of the store of torchrun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store: TCPStore | None = None

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        if self.store is None and not self.creates_processes_externally:
            listening = socket.create_server((self.main_address, 0))
            self._main_port = listening.getsockname()[1]
            self.store = TCPStore(
                self.main_address, self._main_port, is_master=True, wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )  # fmt: skip
            names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", names[0])
        return super().main_port


@contextmanager
def group_of_one(processes: int) -> Iterator[None]:
    """Let nothing remain of the group of a single process after a block.

    Lightning leaves the group and the variables that describe it, and a library that trains
    afterwards in this process would wait for the others of that group. The processes of a larger
    group continue together after the block, so theirs remain.

    Args:
        processes: the number of processes of the group.
    """
    single = processes == 1 and not is_started_elsewhere()
    before = {name: os.environ.get(name) for name in DESCRIBE_GROUP}
    joined = dist.is_available() and dist.is_initialized()
    try:
        yield
    finally:
        if single:
            if dist.is_available() and dist.is_initialized() and not joined:
                dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard the parameters over a mesh: those of each block, and those of the rest."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Sharded(ModelParallelStrategy):
    """FSDP (`fully_shard`), with checkpoints of whole tensors in the order of the optimizer.

    All strategies write such checkpoints, so a run can continue with another strategy or another
    number of devices.

    Args:
        ranks: the number of processes.
    """

    def __init__(self, ranks: int):
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        # Lightning's own method refuses an existing folder, which a later rank finds
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return self.checkpoint_io.load_checkpoint(Path(self.broadcast(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=_WHOLE)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = _bare(optimizer)
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=_WHOLE)
        names = self._names(optimizer)
        if not state:  # only the first rank gets the state
            return {}
        places = {name: place for place, name in enumerate(names)}
        groups = [
            {k: v if k != "params" else [places[n] for n in v] for k, v in group.items()}
            for group in state["param_groups"]
        ]
        of = {places[name]: value for name, value in state["state"].items()}
        return {"state": dict(sorted(of.items())), "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for wrapped, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer = _bare(wrapped)
            names = self._names(optimizer)
            groups = [
                {k: v if k != "params" else [names[i] for i in v] for k, v in group.items()}
                for group in state["param_groups"]
            ]
            named = {names[i]: value for i, value in state["state"].items()}
            set_optimizer_state_dict(
                self.model, optimizer, {"state": named, "param_groups": groups}, options=_WHOLE
            )

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of the optimizer's parameters, in the order of the optimizer."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


class Offset(DDPStrategy):
    """Offset parallelism together with data parallelism.

    Groups of `each` devices divide the classes of the tables among them and see the same samples.
    Gradients are averaged over the groups.

    Each device writes its own rows of the tables to a checkpoint. Any number of devices can read
    it, and checkpoints of other strategies can be read too.

    Args:
        each: the number of devices in a group.
        make: makes the model.
    """

    def __init__(self, each: int, make: Callable[[], nn.Module]):
        super().__init__()
        self.each, self.make = each, make

    def setup_environment(self) -> None:
        super().setup_environment()
        sizes = (self.world_size // self.each, self.each)
        mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("data", "offset"))
        self.offset_group = mesh["offset"].get_group()
        self.data_group = mesh["data"].get_group()
        # the group exists only now, and Lightning has no public way to pass it this late
        self._ddp_kwargs["process_group"] = self.data_group

    def build(self) -> nn.Module:
        """Make the model with this device's rows of its tables."""
        return parallel.build(self.make, self.offset_group)

    @property
    def bare(self) -> nn.Module:
        """The model without the training task around it."""
        assert self.lightning_module is not None
        return self.lightning_module.model  # type: ignore[return-value]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # each device writes its own weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        io = self.checkpoint_io
        assert isinstance(io, Folders)
        optimizer = _bare(self.optimizers[0])
        if not self.reduce_boolean_decision(not not_finite(self.bare.state_dict())):
            step = checkpoint["global_step"]
            raise Diverged(f"weights: some are not finite at step {step}; {REMEDY}")
        with io.parts(checkpoint, Path(filepath), self) as folder:
            if self.global_rank < self.each:
                parallel.save(self.bare, folder, optimizer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return self.checkpoint_io.load_checkpoint(Path(self.broadcast(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if (parts := checkpoint.get("parts")) is not None:
            parallel.load(self.bare, parts)
            return
        own = self._own()
        held = self.bare.state_dict()
        for name, whole in checkpoint["state_dict"].items():
            name = name.removeprefix(PREFIX)
            held[name].copy_(whole[own[name]] if name in own else whole)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        optimizer = _bare(self.optimizers[0])
        if (parts := checkpoint.get("parts")) is not None:
            parallel.load(self.bare, parts, optimizer)
            return
        (state,) = checkpoint["optimizer_states"]
        own, names = self._own(), {id(p): name for name, p in self.bare.named_parameters()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for place, values in state["state"].items():
            if (rows := own.get(order[place])) is not None:
                for kind, value in values.items():
                    values[kind] = value[rows] if value.ndim else value
        optimizer.load_state_dict(state)

    def _own(self) -> dict[str, slice]:
        """The rows of each table that this device has, by the names of the parameters."""
        return {
            f"{name}.{kind}": table.own_classes
            for name, table in self.bare.named_modules()
            if isinstance(table, RelativeLinear)
            for kind, _ in table.named_parameters()
        }
