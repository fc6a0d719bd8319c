"""A run from its configuration to its last checkpoint, and its evaluation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from ..config import as_yaml, load
from ..data.images import Images
from ..data.text import Windows
from ..files import write_whole
from ..measuring import multiply_adds
from ..models import create_model, model_options
from .callbacks import Curves, Keeper, Meter, progress
from .checkpoints import PARTS, Folders, clear_remains, latest, open_checkpoint, read_about
from .config import Config, TrainOptions
from .data import Data, Part
from .engine import interruptible, pick_device, quiet
from .strategies import Offset, Sharded
from .tasks import Classification, LanguageModel, Task

__all__ = ["evaluate", "train"]

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
# What a resumed run may have otherwise than before.
FREE = {
    "out", "train.steps", "train.epochs", "train.validate_every", "train.validate_batches",
    "train.save_every", "train.log_every", "train.device", "train.devices", "train.nodes",
    "train.strategy", "train.offset_ranks", "train.workers", "train.compile",
}  # fmt: skip


def train(config: Config, folder: Path, resume: bool = False) -> dict[str, float]:
    """Train into a folder; returns the metrics of the last validation.

    Raises:
        ValueError: a configuration that does not fit the data, the machine or an earlier run there.
        OSError: a folder or checkpoint that cannot be written, data that cannot be read.
    """
    begin(config, folder, resume)
    data = Data(config)
    name, options = model_of(config, data)
    at = latest(folder / "checkpoints")
    about: dict[str, Any] = {"step": 0} if at is None else read_about(at)
    step = int(about["step"])
    if at is not None and step >= data.steps:
        return dict(about["metrics"])
    flops = _flops(name, options, data)

    def make() -> nn.Module:
        torch.manual_seed(config.seed)
        return create_model(name, **options)

    strategy = _strategy(config.train, make, at)
    # with offset parallelism each device makes only its own tables, once there are processes
    with torch.device("meta") if isinstance(strategy, Offset) else nullcontext():
        model = make()
    if config.train.compile:
        model.compile()
    part = data.part("train")
    io = Folders(
        {
            "model": {"name": name, "options": options},
            "config": config.model_dump(mode="json"),
            "classes": part.classes if isinstance(part, Images) else None,
        },
        None if isinstance(part, Images) else part.tokenizer,
    )
    meter = Meter(config.train, flops)
    keeper = Keeper(folder / "checkpoints", io, meter, data.steps)
    callbacks: list[Callback] = [meter, keeper, progress()]
    if config.train.ema is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=config.train.ema))
    loggers = [Curves(folder, step), TensorBoardLogger(folder, name="", version="tensorboard")]
    with quiet(), interruptible():
        trainer = make_trainer(
            config, callbacks=callbacks, logger=loggers, plugins=[io], max_steps=data.steps,
            max_epochs=1, strategy=strategy,
        )  # fmt: skip
        task = make_task(model, config, part, data.steps)
        try:
            trainer.fit(task, datamodule=data, ckpt_path=at, weights_only=True)
        except SIGTERMException:  # it has saved, but not finished: no exit with 0
            raise KeyboardInterrupt from None
    return io.metrics


def evaluate(path: Path | str, part: Part, config: Config) -> dict[str, float]:
    """The metrics of a checkpoint on a part of the data that the configuration names.

    Raises:
        ValueError: no checkpoint, or data that do not fit its model.
    """
    checkpoint = open_checkpoint(path)
    data = Data(config, checkpoint.tokenizer)
    samples = data.part(part)
    if isinstance(samples, Images) and samples.classes != checkpoint.classes:
        raise ValueError(
            f"data: has the classes {_some(samples.classes)}, but the checkpoint "
            f"{_some(checkpoint.classes or [])}"
        )
    meter = Meter(config.train, 0.0)
    with quiet(), interruptible():
        trainer = make_trainer(config, callbacks=[meter, progress()], logger=False)
        task = make_task(checkpoint.model, config, samples, 1)
        run = trainer.test if part == "test" else trainer.validate
        run(task, datamodule=data, verbose=False)
    return meter.measured


def make_trainer(config: Config, **more: Any) -> Trainer:
    """Lightning's trainer, as the configuration asks for it."""
    options = config.train
    device = pick_device(options.device)
    started, wanted = int(os.environ.get("WORLD_SIZE", 1)), options.devices * options.nodes
    if started > 1 and started != wanted:
        raise ValueError(
            f"train.devices: got {options.devices} on {options.nodes} nodes, but torchrun started "
            f"{started} processes; want as many"
        )
    keywords: dict[str, Any] = dict(
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=options.devices,
        num_nodes=options.nodes,
        precision=PRECISIONS[options.precision],  # type: ignore[arg-type]
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
        val_check_interval=options.validate_every * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=options.validate_batches,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        **more,
    )
    try:
        return Trainer(**keywords)
    except MisconfigurationException as error:
        raise ValueError(f"train: {error}") from None


def _strategy(options: TrainOptions, make: Callable[[], nn.Module], at: Path | None) -> Any:
    """How devices share the work, also that of a checkpoint that has the tables in parts."""
    offset = options.offset_ranks > 1 or (at is not None and (at / PARTS).is_dir())
    if not offset and options.strategy != "fsdp":
        return options.strategy
    for name in ("ema", "compile"):
        if getattr(options, name):
            way = "offset_ranks" if offset else "strategy 'fsdp'"
            raise ValueError(f"train.{name}: got {getattr(options, name)}, not with {way}")
    if not offset:
        return Sharded(options.devices * options.nodes)
    if options.strategy == "fsdp":
        raise ValueError("train.strategy: got 'fsdp' with offset_ranks, want 'auto' or 'ddp'")
    return Offset(options.offset_ranks, make)


def begin(config: Config, folder: Path, resume: bool) -> None:
    """Make the run's folder, or enter that of an earlier one. What never came to a checkpoint is
    begun anew.

    Raises:
        ValueError: there is a run (and `resume` is not wanted), another one, or something else.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    saved = folder / "config.yaml"
    if latest(folder / "checkpoints") is not None:
        if not resume:
            raise ValueError(f"out: {folder} holds a run; --resume continues it, or want another")
        before, now = _flat(load(Config, saved)), _flat(config)
        other = [k for k in sorted(before | now) if before.get(k) != now.get(k) and k not in FREE]
        if other:
            told = ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in other)
            raise ValueError(f"--resume: {saved} has another configuration: {told}")
    elif folder.exists() and not (
        folder.is_dir() and (saved.exists() or not any(folder.iterdir()))
    ):
        raise ValueError(f"out: {folder} is there and no run's; want a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    clear_remains(folder / "checkpoints")
    write_whole(saved, lambda to: to.write_text(as_yaml(config), "utf-8"))


def _flat(options: Config) -> dict[str, Any]:
    """The configuration with keys such as train.steps."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield key, value
            return
        for name, inner in value.items():
            yield from walk(inner, f"{key}.{name}" if key else name)

    return dict(walk(options.model_dump(mode="json"), ""))


def model_of(config: Config, data: Data) -> tuple[str, dict[str, Any]]:
    """The model's name and options, with what follows from the data.

    Raises:
        ValueError: an option that the data contradict.
    """
    name, options = config.model.name, config.model.given
    known = model_options(name)
    for option, value in data.facts.items():
        if option not in known:
            continue
        if option in options and _pair(options[option]) != _pair(value):
            raise ValueError(f"model.{option}: got {options[option]}, but the data have {value}")
        options[option] = value
    return name, options


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value, value]


def make_task(model: nn.Module, config: Config, part: Images | Windows, steps: int) -> Task:
    if isinstance(part, Images):
        return Classification(model, config, steps, len(part.classes), part.options.image_size)
    return LanguageModel(model, config, steps)


def _flops(name: str, options: dict[str, Any], data: Data) -> float:
    """Of a training step, per image or token: three times those of the model going forward."""
    with torch.device("meta"):
        model = create_model(name, **options)
        if isinstance(data.part("train"), Images):
            facts = data.facts
            units, x = 1, torch.zeros(1, facts["channels"], *facts["image_size"])
        else:
            units, x = data.facts["context"], torch.zeros(1, data.facts["context"]).long()
    return 6.0 * multiply_adds(lambda: model.eval()(x)) / units


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else f" ({len(names)})")
