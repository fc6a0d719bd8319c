"""Peak memory and table norms of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import ViT
from ...modules.projections import RelativeLinear
from ...utils.measuring import held_bytes, peak_bytes

__all__ = ["MEMORY", "peak_of_a_step", "table_norms"]

# How the peak was measured, by device.
MEMORY = {
    "cpu": (
        "weights, gradients, optimizer state and everything allocated during one training step, "
        "from PyTorch's profiler"
    ),
    "cuda": "torch.cuda.max_memory_allocated over the training",
    "mps": "memory held by the Metal driver for the process after the training",
}


def peak_of_a_step(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Most bytes held at once, on the CPU, by one training step of a copy of this model.

    A first step makes the optimizer's state; the profiler follows every allocation of the second.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    return held_bytes(model, optimizer) + peak_bytes(step, torch.device("cpu"))


@torch.no_grad()
def table_norms(model: ViT) -> list[dict[str, Any]]:
    """For each table with offsets: the norm of each entry, and of what sets it apart from the mean.

    "norm" and "apart" are [rows, columns] arranged over the offset, key to query.
    """
    found = []
    for number, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        for name, part in mixer.named_children():
            if not isinstance(part, RelativeLinear) or not mixer.layout.offset_classes:
                continue
            weight = part.weight[: mixer.layout.offset_classes].float().cpu()
            shape = mixer.layout.axis_classes
            found.append(
                {
                    "block": number,
                    "table": name.split("_")[0],
                    "norm": weight.flatten(1).norm(dim=1).view(shape),
                    "apart": (weight - weight.mean(0)).flatten(1).norm(dim=1).view(shape),
                }
            )
    return found
