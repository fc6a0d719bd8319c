"""The text that a run prints before it starts and after it ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...utils.measuring import matmul_rate
from ..data.images import Images
from ..data.text import Windows
from .checkpoints import newest, read_description
from .config import Config
from .data import Data, Part, Parts
from .devices import pick_device

__all__ = ["Cost", "metrics_line", "next_commands", "run_summary", "saved_metrics", "too_slow"]

SLOW = 3600.0  # seconds; a run on a CPU that takes longer is announced
PROMPT = 24  # characters of a suggested prompt


class Cost(NamedTuple):
    """The cost of a model: its parameters, and multiply-adds per image or per token."""

    parameters: int
    multiply_adds: float

    @property
    def training_flops(self) -> float:
        """Floating-point operations of a training step, per image or token.

        A multiply-add is two operations, and the backward pass costs twice the forward pass.
        """
        return 6.0 * self.multiply_adds


def run_summary(config: Config, data: Data, name: str, options: dict[str, Any], cost: Cost) -> str:
    """The data, the model, the device and the steps of a run, one line each."""
    train = config.train
    images = isinstance(data.part("train"), Images)
    mixer = f", {options['mixer']}" if "mixer" in options else ""
    device = pick_device(train.device)
    if train.devices * train.nodes > 1:
        device = f"{train.devices * train.nodes} × {device}"
    elif device == "cpu":
        threads = torch.get_num_threads()
        device += f", {threads} thread{'s' * (threads > 1)}"
    each = "images" if images else f"texts of {data.facts['context']:,} tokens"
    epochs = f"{data.epoch_of(data.steps):.3g} epochs"
    lines = {
        "data": f"{_sizes(data)}; {_kinds(data)}",
        "model": f"{name}{mixer}: {cost.parameters:,} parameters, "
        f"{_short(cost.multiply_adds)} multiply-adds per {'image' if images else 'token'}",
        "on": f"{device}; {train.precision}",
        "steps": f"{data.steps:,} of {train.batch_size:,} {each} ({epochs}); validation every "
        f"{train.validate_every:,}",
    }
    if (warmup := train.warmup_within(data.steps)) != train.warmup:
        lines["warmup"] = (
            f"{warmup:,} steps, because train.warmup={train.warmup} is not shorter than the run"
        )
    if slow := too_slow(config, data, cost):
        lines["time"] = slow
    return "\n".join(f"{key:6} {value}" for key, value in lines.items())


def too_slow(config: Config, data: Data, cost: Cost) -> str:
    """A warning that a run takes hours on this CPU, or "".

    The estimate is a lower limit: the operations of all steps, at the speed of a large matrix
    product.
    """
    train = config.train
    if pick_device(train.device) != "cpu":
        return ""
    units = train.batch_size * data.steps
    if isinstance(data.part("train"), Windows):
        units *= data.facts["context"]
    flops = cost.training_flops * units / (train.devices * train.nodes)
    if flops < SLOW * 1e9:  # no CPU is so slow: do not measure
        return ""
    seconds = flops / matmul_rate(torch.float32, torch.device("cpu"))
    if seconds < SLOW:
        return ""
    hours = seconds / 3600
    took = f"{hours:,.0f} hours" if hours < 72 else f"{hours / 24:,.0f} days"
    return f"more than {took} on this CPU; this run is meant for a GPU"


def _sizes(data: Data) -> str:
    def size(part: Part) -> str:
        opened = data.part(part)
        if not isinstance(opened, Images):
            return f"{opened.tokens:,} tokens"
        if opened.unreadable is None and opened.options.bad == "skip":
            return f"at most {len(opened):,} images"
        return f"{len(opened) - (opened.unreadable or 0):,} images"

    text = f"{size('train')} to train, {size('valid')} to validate"
    parts: tuple[Part, ...] = ("train", "valid")
    opened = [part for part in map(data.part, parts) if isinstance(part, Images)]
    if unreadable := sum(part.unreadable or 0 for part in opened):
        text += f" ({unreadable:,} unreadable left out)"
    return text


def _kinds(data: Data) -> str:
    train = data.part("train")
    if not isinstance(train, Images):
        return f"a vocabulary of {train.vocab_size:,}"
    height, width = data.facts["image_size"]
    return f"{len(train.classes):,} classes; {height}×{width} pixels"


def _short(number: float) -> str:
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics with five digits, without counts of skipped images that are 0."""
    shown = {name: value for name, value in metrics.items() if value or "skipped" not in name}
    return ", ".join(f"{name} {value:.5g}" for name, value in shown.items())


def saved_metrics(folder: Path) -> str:
    """The metrics of a run's last and best checkpoints, and which one the commands use."""
    last, best = (newest(folder / "checkpoints", kind) for kind in ("last", "best"))
    lines = []
    for kind, path in (("last", last), ("best", best)):
        if path is not None:
            saved = read_description(path)
            lines.append(f"  {kind}  step {saved.step}: {metrics_line(saved.metrics)}")
    if best is not None:
        lines.append("  evaluate and the commands below use the best checkpoint")
    return "\n".join(lines)


def next_commands(config: Config, folder: Path, parts: Parts) -> str:
    """The commands that use a run, one per line. A prompt is taken from the run's own text."""
    run = shlex.quote(str(folder))
    text = parts.get("valid") or parts.get("train")
    use = f"predict {run} IMAGES"
    if config.data.kind == "text":
        prompt = _prompt(text) if isinstance(text, Windows) else ""
        use = f"generate {run} --prompt {shlex.quote(prompt or 'Once')}"
    imported = "".join(f" --import {shlex.quote(file)}" for file in config.imports)
    commands = [f"evaluate {run}", use + imported, f"share {run} FOLDER{imported}"]
    return "\n".join(["Next:", *(f"  translution {command}" for command in commands)])


def _prompt(text: Windows) -> str:
    """The first words of a text."""
    tokens = text.shards.read(1, min(1 + 4 * PROMPT, len(text.shards)))
    decoded = text.tokenizer.decode(tokens.tolist())
    line = next((line.strip() for line in decoded.splitlines() if line.strip()), "")
    words = line[:PROMPT].rpartition(" ")[0] if len(line) > PROMPT else line
    return words if words.isprintable() and "\ufffd" not in words else ""
