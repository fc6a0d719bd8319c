"""The model card (README.md) that is saved with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .configuration import input_shape

__all__ = ["model_card"]


def model_card(
    plain: Any,
    family: str,
    task: str,
    data: str | None = None,
    results: Mapping[str, float] | None = None,
    classes: Sequence[str] | None = None,
) -> str:
    """Write the text of a model card: architecture, cost, options, training data and results.

    Args:
        plain: the model on the meta device, where its multiply-adds are counted.
        family: the name of its architecture in the registry.
        task: the Hub's name for the model's task, such as "image-classification".
        data, results, classes: as in `Pretrained.save_pretrained`.

    Returns:
        the card in Markdown, with the Hub's header.
    """
    config, name = plain.config, type(plain).__name__
    mixer = config.mixer
    parameters = sum(p.numel() for p in plain.parameters())
    image, count = _cost(plain)
    call = f"{name}.from_pretrained(FOLDER_OR_NAME)"
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
        *(f"| {option} | {_cell(value)} |" for option, value in vars(config).items()),
        "",
        "## Training data",
        data or "Not given.",
        "",
        "## Results",
    ]
    if results:
        lines += ["| | |", "| --- | --- |"]
        lines += [f"| {_cell(key)} | {value:.6g} |" for key, value in results.items()]
    else:
        lines.append("Not given.")
    if classes is not None:
        shown = ", ".join(_cell(c) for c in classes[:50]) + (", …" if len(classes) > 50 else "")
        lines += ["", "## Classes", f"{len(classes)}: {shown}"]
    return "\n".join(lines) + "\n"


def _cost(plain: Any) -> tuple[str, int]:
    """A description of the input that is counted, and the multiply-adds of its forward pass."""
    from ..utils.measuring import multiply_adds  # which imports Triton, slowly

    shape = input_shape(plain.config)
    with torch.device("meta"), torch.no_grad():
        if len(shape) == 1:
            x, words = torch.zeros(1, *shape, dtype=torch.int64), f"a text of {shape[0]} tokens"
        else:
            x, words = torch.zeros(1, *shape), f"an image of {shape[1]}×{shape[2]}"
        return words, multiply_adds(lambda: plain.eval()(x))


def _cell(value: Any) -> str:
    """The text of a value in a cell of a Markdown table."""
    text = "×".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    return " ".join(text.replace("|", "\\|").split())
