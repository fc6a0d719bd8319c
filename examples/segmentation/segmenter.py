"""A model that classifies every pixel: a backbone with `features_only`, and a small decoder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_model, save_file
from scenes import BACKGROUND, CLASSES
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassJaccardIndex

from translution import __version__, create_model
from translution.apps.training.devices import interruptible, quiet
from translution.apps.training.tasks import learning_rate
from translution.models.backbone import Backbone
from translution.utils.files import write_whole

__all__ = ["Segmenter", "Trained", "iou_per_class", "load_segmenter", "save_segmenter", "train"]

POINTS = 12  # the number of validations in a training, and so of points in its curve
WARM_UP = 0.05  # of the steps
WEIGHT_DECAY = 0.05


class Segmenter(nn.Module):
    """Computes logits per pixel from the maps of a backbone, with a feature pyramid.

    A 1×1 convolution reduces each map to `width` channels. Starting with the coarsest, each map is
    enlarged and added to the next finer one. The sum has a quarter of the image's height and width,
    and is enlarged to the size of the image. One of its pixels is about as wide as a stroke, so a
    5×5 convolution of the image itself adds detail, and two 1×1 convolutions compute the logits
    from both.

    Args:
        backbone: a name of `list_models()` whose model takes `features_only`.
        overrides: options for the backbone.
        classes: the number of classes.
        width: channels of the decoder.
        detail: channels of the 5×5 convolution; 0 leaves it out.

    Raises:
        ValueError: the name is unknown, an option does not fit, or the model has no maps.
    """

    def __init__(
        self,
        backbone: str,
        overrides: dict[str, Any] | None = None,
        classes: int = len(CLASSES),
        width: int = 24,
        detail: int = 8,
    ):
        super().__init__()
        if width < 1 or detail < 0:
            raise ValueError(
                f"width, detail: got {width} and {detail}, want at least 1 and at least 0"
            )
        self.config = {
            "backbone": backbone, "overrides": dict(overrides or {}), "classes": classes,
            "width": width, "detail": detail,
        }  # fmt: skip
        self.backbone = make_backbone(backbone, self.config["overrides"])
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in self.backbone.channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.detail: nn.Module | None = None
        if detail:
            self.detail = nn.Sequential(
                nn.Conv2d(self.backbone.in_channels, detail, 5, padding=2, bias=False),
                nn.BatchNorm2d(detail),
                nn.ReLU(),
            )
        self.decide = nn.Sequential(
            nn.Conv2d(width + detail, width, 1), nn.ReLU(), nn.Conv2d(width, classes, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits [batch, classes, height, width].

        Args:
            image: [batch, in_channels, height, width].
        """
        laterals = [
            lateral(y) for lateral, y in zip(self.laterals, self.backbone(image), strict=True)
        ]
        x = laterals.pop()
        while laterals:
            finer = laterals.pop()
            x = finer + F.interpolate(x, finer.shape[2:], mode="nearest")
        x = F.interpolate(self.smooth(x), image.shape[2:], mode="bilinear")
        if self.detail is not None:
            x = torch.cat([x, self.detail(image)], 1)
        return self.decide(x)


def make_backbone(name: str, overrides: dict[str, Any]) -> Backbone:
    """Create the named model so that it returns maps."""
    try:
        model = create_model(name, features_only=True, **overrides)
    except ValueError as error:
        raise ValueError(f"backbone: {name!r} cannot be used here: {error}") from None
    if not isinstance(model, Backbone):
        raise ValueError(f"backbone: {name!r} has no maps, want one that takes features_only")
    return model


# -- training ------------------------------------------------------------------------------------


@dataclass
class Trained:
    """A trained model.

    Attributes:
        model: the model, in evaluation mode.
        seconds: the training time without validations.
        curve: step, training loss and validation IoU at each validation.
    """

    model: Segmenter
    seconds: float
    curve: list[dict[str, float]]


Report = Callable[[int, float, float], None]
"""A function that is called at each validation with step, loss and mean IoU."""


class Training(LightningModule):
    """The training of a segmenter: cross-entropy per pixel, AdamW, a short warm-up, and a cosine
    schedule to zero. Mean IoU is the measure of a validation."""

    def __init__(
        self, model: Segmenter, steps: int, learning_rate: float, background: float, report: Report
    ):
        super().__init__()
        self.model, self.steps, self.learning_rate, self.report = (
            model,
            steps,
            learning_rate,
            report,
        )
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        classes = model.config["classes"]
        self.accuracy = MulticlassJaccardIndex(classes, average="macro")
        weight = torch.ones(classes)
        weight[BACKGROUND] = background
        self.register_buffer("weight", weight, persistent=False)
        self.validating = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self.model(images), classes, self.weight)
        self.losses.append(loss.detach())
        return loss

    def on_validation_start(self) -> None:
        self.began = time.perf_counter()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, classes = batch
        self.accuracy.update(self.model(images), classes)

    def on_validation_epoch_end(self) -> None:
        mean, iou = float(torch.stack(self.losses).mean()), float(self.accuracy.compute())
        self.curve.append({"step": self.global_step, "loss": mean, "iou": iou})
        self.losses.clear()
        self.accuracy.reset()
        self.validating += time.perf_counter() - self.began
        self.report(self.global_step, mean, iou)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY
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
    """Batches that a function makes anew for each pass."""

    def __init__(self, make: Callable[[], Iterator[Any]]):
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def train(
    model: Segmenter,
    scenes: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    validation: list[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    background: float,
    device: str,
    report: Report,
) -> Trained:
    """Train a model.

    Args:
        model: the model to train.
        scenes: a function that returns the training batches (images, classes), one per step.
        validation: the validation batches.
        steps: the number of training steps.
        learning_rate: the largest learning rate of the schedule.
        background: the weight of background pixels in the loss.
        device: "cpu", "cuda" or "mps".
        report: called at each validation.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    module = Training(model, steps, learning_rate, background, report)
    with quiet():
        trainer = Trainer(
            accelerator={"cuda": "gpu"}.get(device, device),
            devices=1,
            max_steps=steps,
            val_check_interval=math.ceil(steps / POINTS),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.perf_counter()
        with interruptible():
            trainer.fit(
                module,
                DataLoader(Batches(lambda: iter(scenes())), batch_size=None),
                DataLoader(validation, batch_size=None),
            )
        seconds = time.perf_counter() - began - module.validating
    return Trained(model.to(device).eval(), seconds, module.curve)


@torch.inference_mode()
def iou_per_class(model: Segmenter, scenes: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The intersection over union of each class, over the pixels of all scenes together.

    It is 0 for a class that is neither in the scenes nor in the predictions.
    """
    device = next(model.parameters()).device
    metric = MulticlassJaccardIndex(model.config["classes"], average=None).to(device)
    for images, classes in scenes:
        metric.update(model(images.to(device)), classes.to(device))
    return metric.compute().tolist()


# -- weights -------------------------------------------------------------------------------------


def save_segmenter(path: Path, model: Segmenter) -> None:
    """Save the weights of a model, and its options in the metadata of the file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {
        "format": "pt", "translution": __version__, "segmenter": json.dumps(model.config)
    }  # fmt: skip
    write_whole(path, lambda to: save_file(tensors, to, metadata=metadata))


def load_segmenter(path: Path | str) -> Segmenter:
    """Load a model that `save_segmenter` wrote, in evaluation mode.

    Raises:
        ValueError: the file was not written by `save_segmenter`.
    """
    with safe_open(path, "pt") as file:
        config = (file.metadata() or {}).get("segmenter")
    if config is None:
        raise ValueError(f"{path}: has no 'segmenter' metadata, want weights written by segment.py")
    model = Segmenter(**json.loads(config))
    load_model(model, path)
    return model.eval()
