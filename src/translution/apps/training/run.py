"""Training a model from a configuration to its last checkpoint, and evaluating it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from ...models import create_model, model_options
from ...models.description import Description
from ...models.preprocessing import Preprocessing
from ...utils.files import write_whole
from ...utils.measuring import multiply_adds
from ...utils.words import shortened
from ..config import as_yaml, load
from ..data.images import Images
from ..data.text import Windows
from .callbacks import Keeper, Meter
from .checkpoints import (
    PARTS,
    Folders,
    clear_remains,
    newest,
    open_checkpoint,
    read_description,
    resumable,
)
from .config import Config, TrainOptions, config_file
from .data import Data, Part, Parts
from .devices import interruptible, is_main_process, pick_device, quiet
from .imports import import_files
from .logs import GroupedTensorBoard, MetricsFile
from .messages import Cost, run_summary
from .progress import progress
from .strategies import Loopback, Offset, Sharded, group_of_one, is_started_elsewhere
from .tasks import Classification, LanguageModel, Task

__all__ = ["evaluate", "train"]

LOCK = ".lock"  # a file in the folder of a run
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
# The keys that may change when a run is resumed.
FREE = {
    "out", "train.steps", "train.epochs", "train.validate_every", "train.validate_batches",
    "train.save_every", "train.log_every", "train.device", "train.devices", "train.nodes",
    "train.strategy", "train.offset_ranks", "train.workers", "train.compile",
}  # fmt: skip


def train(
    config: Config,
    folder: Path,
    resume: bool = False,
    parts: Parts | None = None,
    callbacks: Sequence[Callback] = (),
    tensorboard: bool = True,
) -> dict[str, float]:
    """Train a model.

    Args:
        config: the configuration of the run.
        folder: the folder of the run; it is made if it is missing.
        resume: continue the run in this folder from its last checkpoint, if there is one.
        parts: parts of the data that are open already; those that this run opens are added.
        callbacks: further callbacks of Lightning.
        tensorboard: whether TensorBoard logs are written, too, for which it must be installed.

    Returns:
        The metrics of the last validation.

    Raises:
        ValueError: a configuration that does not fit the data, the machine or the run in `folder`.
        OSError: a folder or checkpoint that cannot be written, or data that cannot be read.
    """
    with _locked(folder) if is_main_process() else nullcontext():
        return _train(config, folder, resume, parts, callbacks, tensorboard)


def _train(
    config: Config,
    folder: Path,
    resume: bool,
    parts: Parts | None,
    more: Sequence[Callback],
    tensorboard: bool,
) -> dict[str, float]:
    at, damaged = check_folder(config, folder, resume)
    data = Data(config, parts=parts)
    name, options = model_of(config, data)
    saved = None if at is None else read_description(at)
    step = 0 if saved is None else saved.step
    length = "train.steps" if config.train.steps is not None else "train.epochs"
    if step > data.steps:
        raise ValueError(
            f"{length}: got {data.steps} steps, but {folder} is already at step {step}; want at "
            "least that, or another out"
        )
    for reason in damaged:
        _say(f"cut    {reason}: the run continues from the other checkpoint")
    if saved is not None and step == data.steps:
        _say(
            f"{folder} is already at step {step} of {data.steps}; a larger --{length} continues it"
        )
        return dict(saved.metrics)
    cost = cost_of(name, options, data)
    _say(run_summary(config, data, name, options, cost))
    if at is not None:
        _say(f"from   step {step}, {at}")
    if is_main_process():
        write_whole(folder / "config.yaml", lambda to: to.write_text(as_yaml(config), "utf-8"))

    def make() -> nn.Module:
        torch.manual_seed(config.seed)
        return create_model(name, **options)

    strategy = _strategy(config.train, make, at)
    # with offset parallelism each process makes only its own rows of tables, after it has started
    with torch.device("meta") if isinstance(strategy, Offset) else nullcontext():
        model = make()
    if config.train.compile:
        model.compile()
    part = data.part("train")
    io = Folders(
        Description(
            name,
            options,
            classes=part.classes if isinstance(part, Images) else None,
            preprocessing=part.preprocessing.entry() if isinstance(part, Images) else None,
            config=config.model_dump(mode="json"),
        ),
        None if isinstance(part, Images) else part.tokenizer,
    )
    meter = Meter(config.train, cost.training_flops)
    keeper = Keeper(folder / "checkpoints", io, meter, data.steps)
    callbacks: list[Callback] = [meter, keeper, progress(), *more]
    if config.train.ema is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=config.train.ema))
    loggers: list[Logger] = [MetricsFile(folder, step)]
    if tensorboard:
        board = GroupedTensorBoard(folder, name="", version="tensorboard", default_hp_metric=False)
        board.log_hyperparams(_flat(config))
        if is_main_process():  # the logger would keep that of an earlier process
            Path(board.log_dir, board.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        loggers.append(board)
    processes = config.train.devices * config.train.nodes
    with quiet(), interruptible(), group_of_one(processes):
        trainer = make_trainer(
            config, callbacks=callbacks, logger=loggers, plugins=[io], max_steps=data.steps,
            max_epochs=1, strategy=strategy,
        )  # fmt: skip
        task = make_task(model, config, part, data.steps)
        try:
            trainer.fit(task, datamodule=data, ckpt_path=at, weights_only=True)
        except SIGTERMException:  # a checkpoint is saved, but the run has not finished
            raise KeyboardInterrupt from None
    return io.metrics


def evaluate(
    path: Path | str, part: Part, config: Config, parts: Parts | None = None
) -> dict[str, float]:
    """Measure a checkpoint.

    Args:
        path: the folder of a run, which stands for its best checkpoint, or that of a checkpoint.
        part: the part of the data.
        config: names the data, the batch size and the device.
        parts: parts of the data that are open already; those that are opened here are added.

    Returns:
        The metrics.

    Raises:
        ValueError: no checkpoint, or data that do not fit its model.
        OSError: data that cannot be read.
    """
    checkpoint = open_checkpoint(path)
    data = Data(config, checkpoint.tokenizer, parts, _preprocessing(config, checkpoint.model))
    samples = data.part(part)
    if isinstance(samples, Images) and samples.classes != checkpoint.classes:
        raise ValueError(
            f"data: has the classes {shortened(samples.classes)}, but the checkpoint has "
            f"{shortened(checkpoint.classes or [])}"
        )
    meter = Meter(config.train, 0.0)
    with quiet(), interruptible():
        trainer = make_trainer(config, callbacks=[meter, progress()], logger=False)
        task = make_task(checkpoint.model, config, samples, 1)
        run = trainer.test if part == "test" else trainer.validate
        run(task, datamodule=data, verbose=False)
    return meter.measured


def _preprocessing(config: Config, model: nn.Module) -> Preprocessing | None:
    """That of the configuration. Images of any format are placed on the canvas of a model of
    digits, as `predict` does."""
    if config.data.kind != "images":
        return None
    own, options = getattr(model, "preprocessing", None), config.data.preprocessing()
    if own is None or options.canvas is not None:
        return options
    return replace(options, digit_size=own.digit_size, canvas=own.canvas)


def make_trainer(config: Config, **more: Any) -> Trainer:
    """Make Lightning's trainer for a configuration. `more` are further arguments of it.

    Raises:
        ValueError: devices that this machine does not have, or options that exclude each other.
    """
    options = config.train
    device = pick_device(options.device)
    plugins = list(more.pop("plugins", ()))
    together = options.devices > 1 or more.get("strategy", "auto") != "auto"
    if together and options.nodes == 1 and not is_started_elsewhere():
        plugins.append(Loopback())
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
        precision=PRECISIONS[options.precision],
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
        val_check_interval=options.validate_every * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=options.validate_batches,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # `progress` replaces it
        plugins=plugins,
        **more,
    )
    try:
        return Trainer(**keywords)
    except MisconfigurationException as error:
        raise ValueError(f"train: {error}") from None


def _strategy(options: TrainOptions, make: Callable[[], nn.Module], at: Path | None) -> Any:
    """How devices share the work. A checkpoint with divided tables needs offset parallelism."""
    offset = options.offset_ranks > 1 or (at is not None and (at / PARTS).is_dir())
    if not offset and options.strategy != "fsdp":
        return options.strategy
    for name in ("ema", "compile"):
        if getattr(options, name):
            way = "offset_ranks" if offset else "strategy 'fsdp'"
            raise ValueError(f"train.{name}: got {getattr(options, name)}, want none with {way}")
    if not offset:
        return Sharded(options.devices * options.nodes)
    if options.strategy == "fsdp":
        raise ValueError("train.strategy: got 'fsdp' with offset_ranks, want 'auto' or 'ddp'")
    return Offset(options.offset_ranks, make)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of a run and lock it. The lock ends with the process.

    Raises:
        ValueError: another process holds the lock, or the folder has other content than a run.
    """
    from filelock import FileLock, Timeout

    run = folder / "config.yaml"
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    is_run = run.exists() or is_trained(folder)
    if folder.exists() and (not folder.is_dir() or (inside - {LOCK} and not is_run)):
        raise ValueError(f"out: {folder} exists and is not a run; want a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out: another process is training in {folder}; want another out, or wait for its end"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_folder(config: Config, folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """Check that a run may start or continue in a folder, and remove incomplete checkpoints.

    A run without a checkpoint starts again.

    Returns:
        as `resumable`: the checkpoint from which the run continues, and the damage of newer ones.

    Raises:
        ValueError: the folder has a run, and `resume` is false, its configuration differs, or none
            of its checkpoints is whole.
    """
    checkpoints = folder / "checkpoints"
    if is_trained(folder) and not resume and is_main_process():
        raise ValueError(
            f"out: {folder} holds a run; --resume continues it; want that, or another out"
        )
    at, damaged = resumable(checkpoints)
    if at is None and damaged:
        raise ValueError(
            f"out: no checkpoint of {folder} is whole: {'; '.join(damaged)}; want another out, or "
            "remove them to start again"
        )
    if at is not None and is_main_process():
        saved = config_file(folder)
        before, now = _flat(load(Config, saved)), _flat(config)
        other = [k for k in sorted(before | now) if before.get(k) != now.get(k) and k not in FREE]
        if other:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in other)
            raise ValueError(f"--resume: {saved} has another configuration: {changes}")
    if is_main_process():
        clear_remains(checkpoints)
    return at, damaged


def is_trained(folder: Path) -> bool:
    """Whether the folder of a run has a checkpoint, whole or not."""
    return any(newest(folder / "checkpoints", kind) for kind in ("last", "best"))


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _flat(options: Config) -> dict[str, Any]:
    """The configuration as one dict with keys such as "train.steps"."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield key, value
            return
        for name, inner in value.items():
            yield from walk(inner, f"{key}.{name}" if key else name)

    return dict(walk(options.model_dump(mode="json"), ""))


def model_of(config: Config, data: Data) -> tuple[str, dict[str, Any]]:
    """The name and options of the model, with those that follow from the data.

    Raises:
        ValueError: an option that contradicts the data.
    """
    import_files(config.imports)  # this may be another process than the one that read it
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
    """The task of a model: classification for images, prediction of the next token for text."""
    if isinstance(part, Images):
        return Classification(model, config, steps, len(part.classes), part.options.image_size)
    return LanguageModel(model, config, steps, part.end if part.options.document_mask else None)


def cost_of(name: str, options: dict[str, Any], data: Data) -> Cost:
    """Count the parameters of a model, and its multiply-adds per image or token."""
    with torch.device("meta"):
        model = create_model(name, **options)
        if isinstance(data.part("train"), Images):
            facts = data.facts
            units, x = 1, torch.zeros(1, facts["in_channels"], *facts["image_size"])
        else:
            units, x = data.facts["context"], torch.zeros(1, data.facts["context"]).long()
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, multiply_adds(lambda: model.eval()(x)) / units)
