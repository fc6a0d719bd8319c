"""A run from its configuration to its last checkpoint, and its evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from ...models import create_model, model_options
from ...utils.files import write_whole
from ...utils.measuring import multiply_adds
from ...utils.words import some
from ..config import as_yaml, load
from ..data.images import Images
from ..data.text import Windows
from .callbacks import Curves, Keeper, Meter
from .checkpoints import (
    PARTS,
    STATE,
    Folders,
    clear_remains,
    is_whole,
    latest,
    newest,
    open_checkpoint,
    read_about,
)
from .config import Config, TrainOptions
from .data import Data, Part, Parts
from .engine import interruptible, pick_device, quiet
from .strategies import Offset, Sharded
from .tasks import Classification, LanguageModel, Task
from .telling import Cost, about_run, leads, progress

__all__ = ["evaluate", "train"]

LOCK = ".lock"  # in a run's folder
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
# What a resumed run may have otherwise than before.
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
    """Train into a folder; returns the metrics of the last validation.

    parts: of the data, kept open for other runs on the same. callbacks: further ones of Lightning.
    tensorboard: whether to write logs for TensorBoard too, which then has to be installed.

    Raises:
        ValueError: a configuration that does not fit the data, the machine or an earlier run there.
        OSError: a folder or checkpoint that cannot be written, data that cannot be read.
    """
    with _alone(folder) if leads() else nullcontext():
        return _train(config, folder, resume, parts, callbacks, tensorboard)


def _train(
    config: Config,
    folder: Path,
    resume: bool,
    parts: Parts | None,
    more: Sequence[Callback],
    tensorboard: bool,
) -> dict[str, float]:
    check_folder(config, folder, resume)
    data = Data(config, parts=parts)
    name, options = model_of(config, data)
    at = latest(folder / "checkpoints")
    about: dict[str, Any] = {"step": 0} if at is None else read_about(at)
    step = int(about["step"])
    if step > data.steps:
        raise ValueError(
            f"train.steps: got {data.steps}, but {folder} is already at step {step}; want at least "
            "that, or another out"
        )
    if at is not None and step == data.steps:
        _say(f"{folder} is already at step {step} of {data.steps}; more train.steps go on from it")
        return dict(about["metrics"])
    cost = _cost(name, options, data)
    _say(about_run(config, data, name, options, cost))
    if at is not None:
        for cut in _cut(folder, at):
            _say(f"cut    {cut / STATE} is not whole: the run goes on from the other checkpoint")
        _say(f"from   step {step}, {at}")
    if leads():
        write_whole(folder / "config.yaml", lambda to: to.write_text(as_yaml(config), "utf-8"))

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
    # going forward, and twice that back, in flops
    meter = Meter(config.train, 6.0 * cost.multiply_adds)
    keeper = Keeper(folder / "checkpoints", io, meter, data.steps)
    callbacks: list[Callback] = [meter, keeper, progress(), *more]
    if config.train.ema is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=config.train.ema))
    loggers: list[Logger] = [Curves(folder, step)]
    if tensorboard:
        board = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
        board.log_hyperparams(_flat(config))
        if leads():  # the logger leaves an earlier one as it is
            Path(board.log_dir, board.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        loggers.append(board)
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


def evaluate(
    path: Path | str, part: Part, config: Config, parts: Parts | None = None
) -> dict[str, float]:
    """The metrics of a checkpoint on a part of the data that the configuration names.

    parts: of the data, kept open for other runs on the same.

    Raises:
        ValueError: no checkpoint, or data that do not fit its model.
    """
    checkpoint = open_checkpoint(path)
    data = Data(config, checkpoint.tokenizer, parts)
    samples = data.part(part)
    if isinstance(samples, Images) and samples.classes != checkpoint.classes:
        raise ValueError(
            f"data: has the classes {some(samples.classes)}, but the checkpoint "
            f"{some(checkpoint.classes or [])}"
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
        precision=PRECISIONS[options.precision],
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
        val_check_interval=options.validate_every * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=options.validate_batches,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # `progress` is ours
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the run's folder, and be the only process there; a lock dies with its process.

    Raises:
        ValueError: another process is there, or something else than a run.
    """
    from filelock import FileLock, Timeout

    run = folder / "config.yaml"
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if folder.exists() and (not folder.is_dir() or (inside - {LOCK} and not run.exists())):
        raise ValueError(f"out: {folder} is there and no run's; want a new or empty folder")
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


def check_folder(config: Config, folder: Path, resume: bool) -> None:
    """That a run may begin or go on there. What never came to a checkpoint is begun anew.

    Raises:
        ValueError: there is a run, and `resume` is not wanted or its configuration is another.
    """
    if not leads():
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
    clear_remains(folder / "checkpoints")


def _cut(folder: Path, at: Path) -> list[Path]:
    """The checkpoints that were passed over for this one."""
    kept = [newest(folder / "checkpoints", kind) for kind in ("last", "best")]
    return [path for path in kept if path not in (None, at) and not is_whole(path)]


def _say(text: str) -> None:
    if leads():
        print(text, flush=True)


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


def _cost(name: str, options: dict[str, Any], data: Data) -> Cost:
    """Of the model, per image or token."""
    with torch.device("meta"):
        model = create_model(name, **options)
        if isinstance(data.part("train"), Images):
            facts = data.facts
            units, x = 1, torch.zeros(1, facts["in_channels"], *facts["image_size"])
        else:
            units, x = data.facts["context"], torch.zeros(1, data.facts["context"]).long()
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, multiply_adds(lambda: model.eval()(x)) / units)
