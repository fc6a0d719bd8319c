"""Training one model of a comparison, and testing it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from ..data.digits import Digits, Ring, place, rings, train_batches
from ..training.engine import interruptible, pick_device, quiet
from ..training.tasks import learning_rate
from .options import Options

__all__ = [
    "Batches",
    "Trained",
    "accuracies",
    "accuracy_by_distance",
    "train_one",
]

POINTS = 40  # of a training curve
WARM_UP = 0.05  # of the steps
WEIGHT_DECAY = 0.05

Tell = Callable[[int, float, float], None]  # step, loss, accuracy since the last point


@dataclass
class Trained:
    """A trained model and what its training took."""

    model: nn.Module
    seconds: float
    peak_bytes: int | None  # None: not measured here
    curve: list[dict[str, float]] = field(default_factory=list)


class Classifier(LightningModule):
    """Cross-entropy, AdamW, a short warm-up and then a cosine to zero."""

    def __init__(self, model: nn.Module, steps: int, learning_rate: float, tell: Tell):
        super().__init__()
        self.model, self.steps, self.learning_rate, self.tell = model, steps, learning_rate, tell
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy.update(logits.detach(), labels)
        self.losses.append(loss.detach())
        done = index + 1
        if done == self.steps or done % math.ceil(self.steps / POINTS) == 0:
            mean, right = float(torch.stack(self.losses).mean()), float(self.accuracy.compute())
            self.curve.append({"step": done, "loss": mean, "accuracy": right})
            self.accuracy.reset()
            self.losses.clear()
            self.tell(done, mean, right)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY
        )
        warm = max(1, round(self.steps * WARM_UP))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, self.steps, warm)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Batches(IterableDataset[Any]):
    def __init__(self, make: Callable[[], Iterator[Any]]):
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def train_one(
    options: Options, data: Digits, mixer: str, regime: str, seed: int, tell: Tell
) -> Trained:
    """Train one model. The seed decides its first weights, the batches and the places.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    device = pick_device(options.device)
    steps, size = options.steps or 0, options.batch_size or 0
    canvas, moved = options.canvas or 0, regime == "moved"
    torch.manual_seed(seed)
    module = Classifier(options.model(mixer), steps, options.learning_rate or 0.0, tell)
    dataset = Batches(lambda: train_batches(data, canvas, moved, size, steps, seed))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with quiet():
        trainer = Trainer(
            accelerator={"cuda": "gpu"}.get(device, device),
            devices=1,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.perf_counter()
        with interruptible():
            trainer.fit(module, DataLoader(dataset, batch_size=None))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    peak = None
    if device == "cuda":
        peak = int(torch.cuda.max_memory_allocated())
    elif device == "mps":
        peak = int(torch.mps.driver_allocated_memory())
    module.model.to(device).eval()
    return Trained(module.model, seconds, peak, module.curve)


@torch.inference_mode()
def _accuracy(model: nn.Module, data: Digits, canvas: int, places: Tensor) -> float:
    device = next(model.parameters()).device
    metric = MulticlassAccuracy(num_classes=10, average="micro").to(device)
    for some in torch.arange(len(data.test)).split(256):
        images = place(data.test[some], canvas, places[some])
        metric.update(model(images.to(device)), data.test_labels[some].to(device))
    return float(metric.compute())


def accuracy_by_distance(model: nn.Module, data: Digits, canvas: int) -> list[dict[str, Any]]:
    """The accuracy on all held-out digits, once in every ring of places.

    Each digit takes one place of each ring, the same ones for every model, and each place is taken
    about equally often. "share" is the ring's part of all places, so that the mean weighted with it
    is the accuracy on digits moved anywhere.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for ring in rings(data.size, canvas):
        places = _spread(ring, len(data.test), generator)
        right = _accuracy(model, data, canvas, places)
        found.append(
            {
                "from": ring.first, "to": ring.last, "share": ring.share,
                "images": len(places), "accuracy": right,
            }
        )  # fmt: skip
    return found


def _spread(ring: Ring, n: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(n, generator=generator)
    shuffled = ring.places[torch.randperm(len(ring.places), generator=generator)]
    return shuffled[order % len(shuffled)]


def accuracies(rings_: list[dict[str, Any]]) -> dict[str, float]:
    """On centred digits, and on digits moved anywhere."""
    return {
        "centred": rings_[0]["accuracy"],
        "moved": sum(ring["accuracy"] * ring["share"] for ring in rings_),
    }
