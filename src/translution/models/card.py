"""The model card: what a model is, costs, was trained on and reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..utils.measuring import multiply_adds
from .blocks import input_shape

__all__ = ["model_card"]


def model_card(
    plain: Any,
    family: str,
    task: str,
    data: str | None = None,
    results: Mapping[str, float] | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """A README.md for the Hub.

    Args:
        plain: the model on the meta device, where its cost is counted.
        family, task: its architecture's name, and what the Hub calls what it does.
        data, results, classes: as in `Pretrained.save_pretrained`.
    """
    config, name = plain.config, type(plain).__name__
    mixer = config.mixer
    parameters = sum(p.numel() for p in plain.parameters())
    image, count = _cost(plain)
    call = f"{name}.from_pretrained(FOLDER_OR_NAME)"
    told = vars(config).items()
    lines = [
        "---",
        "library_name: translution",
        f"pipeline_tag: {task}",
        f"tags: [translution, {family}, {mixer}]",
        "---",
        "",
        f"# {name} with the mixer {mixer}",
        "",
        "```python",
        f"from translution.models import {name}",
        "",
        f"model = {call}",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| architecture | {family} |",
        f"| parameters | {parameters:,} |",
        f"| multiply-adds, {image} | {count / 1e9:,.3g} G |",
        "",
        "## Options",
        "| | |",
        "| --- | --- |",
        *(f"| {option} | {_cell(value)} |" for option, value in told),
        "",
        "## Training data",
        data or "Not told.",
        "",
        "## Results",
    ]
    if results:
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| {_cell(key)} | {value:.6g} |" for key, value in results.items()]
    else:
        lines.append("Not told.")
    if classes is not None:
        shown = ", ".join(_cell(c) for c in classes[:50]) + (", …" if len(classes) > 50 else "")
        lines += ["", "## Classes", f"{len(classes)}: {shown}"]
    return "\n".join(lines) + "\n"


def _cost(plain: Any) -> tuple[str, int]:
    """What one call was counted for, and its multiply-adds."""
    shape = input_shape(plain.config)
    with torch.device("meta"), torch.no_grad():
        if len(shape) == 1:
            x, said = torch.zeros(1, *shape, dtype=torch.int64), f"a text of {shape[0]} tokens"
        else:
            x, said = torch.zeros(1, *shape), f"an image of {shape[1]}×{shape[2]}"
        return said, multiply_adds(lambda: plain.eval()(x))


def _cell(value: Any) -> str:
    """As it stands in a table."""
    text = "×".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return " ".join(text.replace("|", "\\|").split())
