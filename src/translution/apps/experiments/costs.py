"""Measure the costs of the rows of an experiment: parameters, time and memory of a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ...models import create_model
from ...utils.measuring import TrainingStep, seconds_in_turn
from ..data.images import Images
from ..training.config import Config
from ..training.data import Data, Parts
from ..training.devices import pick_device
from ..training.run import cost_of, model_of

__all__ = ["costs_of", "data_of", "parameters_of", "parts_of", "step_multiply_adds", "widened"]

REPEATS = 5  # timed steps; their median is reported


@functools.lru_cache(4)
def _parts(data: str) -> Parts:
    """Return the open parts of the data with these options; runs with equal options share them."""
    return {}


def parts_of(config: Config) -> Parts:
    """Return the open parts of the data of a run, which runs with equal data share."""
    return _parts(f"{config.seed} {config.data.model_dump_json()}")


def data_of(config: Config) -> Data:
    """Return the data of a run."""
    return Data(config, parts=parts_of(config))


def _model_on(config: Config, device: str) -> tuple[torch.nn.Module, Data]:
    data = data_of(config)
    name, options = model_of(config, data)
    with torch.device(device):
        return create_model(name, **options), data


def parameters_of(config: Config, row: str = "") -> int:
    """Count the parameters of the model of a run.

    Args:
        config: the configuration of the run.
        row: the name of the row, for the message.

    Raises:
        ValueError: the model cannot be made; the message names the row.
    """
    try:
        return sum(p.numel() for p in _model_on(config, "meta")[0].parameters())
    except ValueError as error:
        raise ValueError(f"rows: {row}: {error}" if row else str(error)) from None


def step_multiply_adds(config: Config) -> float:
    """Count the multiply-adds of a training step: three times those of its forward pass."""
    data = data_of(config)
    name, options = model_of(config, data)
    units = data.facts.get("context", 1)  # the tokens of a text; an image is one unit
    return 3.0 * cost_of(name, options, data).multiply_adds * units * config.train.batch_size


def widened(config: Config, parameters: int) -> int:
    """Find the width with which a model has about a given number of parameters.

    Args:
        config: the configuration of a run.
        parameters: the number of parameters.

    Returns:
        The width, a multiple of 4 channels per head.
    """
    options = config.model.given
    step = 4 * int(options.get("heads", 1))

    def missed(dim: int) -> float:
        changed = config.model.model_copy(update={"dim": dim})
        found = parameters_of(config.model_copy(update={"model": changed}))
        return math.log(found / parameters)

    low, high = 1, 2
    while missed(high * step) < 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if missed(middle * step) < 0 else (low, middle)
    return step * min((low, high), key=lambda n: abs(missed(n * step)))


def costs_of(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Measure a training step of each configuration with one thread.

    The steps of all configurations alternate, so that a slow period of the machine affects all of
    them.

    Args:
        configs: the configurations of the runs.

    Returns:
        For each configuration the number of "parameters", the "multiply_adds" of a step (three
        times those of its forward pass), the median time of a step in milliseconds ("step_ms"), and
        its peak memory in bytes ("peak_bytes").
    """
    device = torch.device(pick_device(configs[0].train.device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            steps = [_step(config, device) for config in configs]
            times = seconds_in_turn(steps, device, REPEATS)
            return [
                {
                    "parameters": sum(p.numel() for p in step.model.parameters()),
                    "multiply_adds": step_multiply_adds(config),
                    "step_ms": round(1e3 * seconds, 2),
                    "peak_bytes": step.peak_bytes(),
                }
                for config, step, seconds in zip(configs, steps, times, strict=True)
            ]
    finally:
        torch.set_num_threads(threads)


def _step(config: Config, device: torch.device) -> TrainingStep:
    model, data = _model_on(config, "cpu")
    size = config.train.batch_size // config.train.accumulate
    if isinstance(data.part("train"), Images):
        facts = data.facts
        x = torch.randn(size, facts["in_channels"], *facts["image_size"], device=device)
        y = torch.zeros(size, dtype=torch.int64, device=device)
    else:
        x = y = torch.zeros(size, data.facts["context"], dtype=torch.int64, device=device)
    autocast = getattr(torch, config.train.precision)
    return TrainingStep(
        model.to(device), x, y, autocast=None if autocast == torch.float32 else autocast,
        accumulate=config.train.accumulate,
    )  # fmt: skip
