"""Measure the time and memory of a training step of a whole image model."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import Any, cast

import torch

from ...models import ViT, create_model, list_models
from ...utils.measuring import TrainingStep, captured_step, seconds

__all__ = ["Step", "measure_step", "published_bytes"]

TABLES = ("translution_", "alpha_")  # begin the names of models whose mixers have tables


@dataclass(frozen=True)
class Step:
    """A model and how it is trained, to measure one training step.

    Attributes:
        model: the name of a ViT, as `list_models()` has it.
        relative: which of q, k and v are relative, for models with tables.
        batch: the number of images.
        autocast: the dtype of the matrix products.
        weights: the dtype of weights and optimizer states.
        checkpoint: what activation checkpointing drops and computes again.
        options: other options of the model, such as (("depth", 2),).
    """

    model: str
    relative: str
    batch: int
    autocast: torch.dtype
    weights: torch.dtype
    checkpoint: str = "none"
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> ViT:
        """Make the model.

        Raises:
            ValueError: there is no such model, or it is not a ViT.
        """
        if "_vit_" not in self.model and self.model in list_models():
            raise ValueError(f"model: got {self.model!r}, want a ViT such as alpha_vit_tiny_...")
        has_tables = self.model.startswith(TABLES)
        options = dict(self.options) | ({"relative": self.relative} if has_tables else {})
        return cast(
            ViT, create_model(self.model, activation_checkpointing=self.checkpoint, **options)
        )


def published_bytes(model: ViT, batch: int) -> int:
    """Estimate the memory of a float32 training step with the published algorithm, from shapes.

    For each relative projection the algorithm saves, for the backward pass, the matrices that it
    gathered for every pair and copied for every sample, and the projections of every pair. One
    gradient of the size of these matrices exists at the same time. AdamW holds the weights, their
    gradients and two states.

    Args:
        model: the model; its weights may be on the meta device.
        batch: the number of images.

    Returns:
        The number of bytes.
    """
    c = model.config
    tokens = c.grid[0] * c.grid[1] + (0 if c.pool == "mean" else 1)
    inner = c.heads * c.head_dim
    layers = c.depth if c.relative_depth is None else c.relative_depth
    projections = layers * len(c.relative) if c.mixer == "translution" else 0
    pairs = batch * tokens * tokens
    gathered = pairs * c.dim * inner
    parameters = sum(p.numel() for p in model.parameters())
    kept = projections * (gathered + pairs * inner) + (gathered if projections else 0)
    return 4 * (kept + 4 * parameters)


def measure_step(case: Step, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure a training step with AdamW.

    Args:
        case: the model and how it is trained.
        device: the device that computes.
        repeats: the number of timed steps; their median is reported.

    Returns:
        The fields of the case, "parameters", and "seconds", "images_per_second" and "peak_bytes";
        or "error" if the step does not fit into memory. Translution also has "published_bytes". A
        CUDA device adds "graph_seconds", the time of the step in a CUDA graph, if that fits too.
    """
    with torch.device("meta"):
        shape = case.build()
    row: dict[str, Any] = {
        "model": case.model,
        "relative": shape.config.relative if case.model.startswith(TABLES) else None,
        "batch": case.batch,
        "autocast": str(case.autocast).removeprefix("torch."),
        "weights": str(case.weights).removeprefix("torch."),
        "checkpoint": case.checkpoint,
        "parameters": sum(p.numel() for p in shape.parameters()),
    }
    if case.model.startswith("translution_"):
        row["published_bytes"] = published_bytes(shape, case.batch)
    try:
        row |= _run(case, device, repeats)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        row["error"] = "out of memory"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _run(case: Step, device: torch.device, repeats: int) -> dict[str, Any]:
    with device:
        model = case.build().to(case.weights).train()
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), fused=cuda, capturable=cuda)
    height, width = model.config.image_size
    images = torch.randn(case.batch, model.config.in_channels, height, width, device=device)
    labels = torch.randint(model.config.num_classes, (case.batch,), device=device)
    autocast = None if case.autocast == case.weights else case.autocast
    step = TrainingStep(model, images.to(case.weights), labels, optimizer, autocast)
    taken = seconds(step, device, repeats)
    row = {
        "seconds": taken,
        "images_per_second": case.batch / taken,
        "peak_bytes": step.peak_bytes(),
    }
    if cuda:
        # a graph has memory of its own, for which a large model may leave no space
        with contextlib.suppress(torch.OutOfMemoryError):
            row["graph_seconds"] = seconds(captured_step(step), device, repeats)
    return row
