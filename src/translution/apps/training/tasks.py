"""What a model is trained for: classifying images or predicting the next token. Loss, metrics and
optimizer."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ...interop import parallel
from ..data.augment import Augment
from ..data.images import ImageBatch
from ..data.order import seed_of
from ..data.parts import Part
from ..data.text import IGNORED, Windows, documents_of
from .config import Config
from .data import Data
from .strategies import Offset, Sharded, shard

__all__ = ["Classification", "LanguageModel", "Task", "learning_rate"]


POSITIONS = {"cls_token", "positions", "position_bias"}
"""The names of parameters, or of modules with them, that the rule "weights" does not decay."""


def learning_rate(
    step: int,
    steps: int,
    warmup: int,
    schedule: str = "cosine",
    least: float = 0.0,
    first: float | None = None,
) -> float:
    """The learning rate of a step as a share of its peak.

    It rises linearly over the warm-up, and then follows the schedule.

    Args:
        step: counted from 0.
        steps: the length of the run.
        warmup: the number of steps of the warm-up.
        schedule: "cosine" falls to `least` at the end, "constant" stays at the peak.
        least: the share at the end of the cosine.
        first: the share in the first step of the warm-up. None is 1 / (warmup + 1).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1) if first is None else first + (1 - first) * step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def is_decayed(name: str, parameter: nn.Parameter, rule: str) -> bool:
    """Whether a rule, as in `TrainOptions.decay`, applies weight decay to a parameter."""
    if rule == "all":
        return True
    return parameter.ndim > 1 and (rule == "matrices" or not POSITIONS & set(name.split(".")))


class MeanLoss(MeanMetric):
    """The mean loss of samples; one that is not a number makes the mean NaN.

    `MeanMetric` leaves such losses out, or ignores the weights if it is asked not to.
    """

    def update(self, value: Tensor, weight: Tensor | int) -> None:  # type: ignore[override]
        """Add the mean loss of a batch, with the number of its samples as the weight."""
        self.mean_value += value.to(self.dtype) * weight
        self.weight += weight


class Task(LightningModule):
    """A model in training. A subclass defines the loss and the metrics.

    `training_meters` and `validation_meters` average the metrics since they were last read. The
    training ones are read for the log, the others after each validation.

    Args:
        model: the model.
        config: the configuration of the run.
        steps: the number of steps of the run.
    """

    unit: str  # what speed counts per second: "images" or "tokens"

    def __init__(self, model: nn.Module, config: Config, steps: int):
        super().__init__()
        self.model, self.config, self.steps = model, config, steps
        self.options = config.train
        self.sharded = False
        self.training_meters = nn.ModuleDict(self.meters())
        self.validation_meters = nn.ModuleDict(self.meters())

    def meters(self) -> dict[str, nn.Module]:
        """New metrics by name."""
        raise NotImplementedError

    def loss(self, batch: Any, meters: nn.ModuleDict) -> Tensor:
        """Compute the mean loss of a batch, and update the meters."""
        raise NotImplementedError

    def size(self, batch: Any) -> int:
        """The number of images or tokens in a batch."""
        raise NotImplementedError

    def read(self, meters: nn.ModuleDict, part: Part) -> dict[str, float]:
        """Read the meters of a part of the data, and reset them."""
        values = {name: float(meter.compute()) for name, meter in meters.items()}
        for meter in meters.values():
            meter.reset()
        return values

    @property
    def data(self) -> Data:
        """The data of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded) and not self.sharded:
            shard(self.model, self.device_mesh["data_parallel"])  # type: ignore[index]
            self.sharded = True
        if isinstance(self.trainer.strategy, Offset) and not self.sharded:
            self.model = self.trainer.strategy.build()
            self.sharded = True
            for meter in self.modules():
                if isinstance(meter, Metric):  # devices with the same samples count once
                    meter.process_group = self.trainer.strategy.data_group

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if isinstance(self.trainer.strategy, Offset) and gradient_clip_val:
            parallel.clip_grad_norm(self.model, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        # dropout and augmentation depend only on the number of the batch, so a resumed run needs no
        # states of generators; ranks with different samples draw different numbers
        torch.manual_seed(seed_of(self.config.seed, index, self.data.share[0]))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch, self.training_meters)

    def validation_step(self, batch: Any, index: int) -> None:
        meters = self.validation_meters
        if not self.data.order.is_new(index):  # a repeated sample must not count
            meters = nn.ModuleDict(self.meters()).to(self.device)
        self.loss(batch, meters)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        options = self.options
        decayed, others = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decays = is_decayed(name, parameter, options.decay)
                (decayed if decays else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups, rate = [group for group in groups if group["params"]], options.learning_rate
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, lr=rate, betas=options.betas)
            if options.optimizer == "adamw"
            else torch.optim.SGD(
                groups, lr=rate, momentum=options.momentum, nesterov=options.nesterov
            )
        )
        warmup, first = options.warmup_within(self.steps), options.warmup_from
        least = options.min_learning_rate / rate
        rates = warmup, options.schedule, least, None if first is None else first / rate
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, self.steps, *rates)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["meters"] = {
            name: dict(meter.metric_state)  # type: ignore[arg-type]
            for name, meter in self.training_meters.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # lets a run that had ended continue with more steps
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        for name, states in checkpoint["meters"].items():
            meter = self.training_meters[name]
            for state, value in states.items():
                setattr(meter, state, value)


class Classification(Task):
    """Classification of images: cross-entropy, top-1 accuracy, and top-5 from ten classes on.

    Args:
        classes: the number of classes.
        image_size: (height, width) in pixels.
    """

    unit = "images"

    def __init__(self, model: nn.Module, config: Config, steps: int, classes: int, image_size: Any):
        self.classes = classes
        super().__init__(model, config, steps)
        data = config.data
        assert data.kind == "images"
        self.augment = Augment(data.augment, classes, image_size, data.mean, data.std)

    def meters(self) -> dict[str, nn.Module]:
        meters: dict[str, nn.Module] = {
            "loss": MeanLoss(),
            "accuracy": MulticlassAccuracy(self.classes, average="micro"),
        }
        if self.classes >= 10:
            meters["accuracy_top5"] = MulticlassAccuracy(self.classes, top_k=5, average="micro")
        return meters | {"skipped": SumMetric()}

    def size(self, batch: ImageBatch) -> int:
        return len(batch.labels)

    def loss(self, batch: ImageBatch, meters: nn.ModuleDict) -> Tensor:
        if not len(batch.labels):  # every image was unreadable and skipped
            meters["skipped"].update(batch.skipped)
            return sum((p.sum() for p in self.parameters()), torch.zeros(())) * 0.0
        images, targets = self.augment(batch.images, batch.labels)
        logits = self.model(images)
        smoothing = self.options.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        meters["skipped"].update(batch.skipped)
        meters["loss"].update(loss.detach(), len(images))
        for name in ("accuracy", "accuracy_top5"):
            if name in meters:
                meters[name].update(logits.detach(), batch.labels)
        return loss


class LanguageModel(Task):
    """Prediction of the next token: cross-entropy, perplexity per token, bits per byte of text.

    Args:
        end: the token between documents that do not see each other; None where all tokens of a
            window are one text.
    """

    unit = "tokens"

    def __init__(self, model: nn.Module, config: Config, steps: int, end: int | None = None):
        super().__init__(model, config, steps)
        self.end = end
        if end is not None and "documents" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"data.document_mask: got True, want False: the model {type(model).__name__} takes "
                "no documents"
            )

    def meters(self) -> dict[str, nn.Module]:
        return {"loss": MeanLoss()}

    def size(self, batch: Tensor) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, batch: Tensor, meters: nn.ModuleDict) -> Tensor:
        targets = batch[:, 1:]
        ids = batch[:, :-1].clamp(min=0)
        apart = {} if self.end is None else {"documents": documents_of(ids, self.end)}
        logits = self.model(ids, **apart)
        logits, targets = logits.flatten(0, 1), targets.flatten()
        smoothing = self.options.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing)
        measured = loss.detach()
        if smoothing:  # perplexity and bits per byte are those of the text itself
            measured = F.cross_entropy(logits.detach(), targets, ignore_index=IGNORED)
        meters["loss"].update(measured, (targets != IGNORED).sum())
        return loss

    def read(self, meters: nn.ModuleDict, part: Part) -> dict[str, float]:
        values = super().read(meters, part)
        text = self.data.part(part)
        assert isinstance(text, Windows)
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
        values["bits_per_byte"] = values["loss"] / math.log(2) * text.tokens / text.bytes
        return values
