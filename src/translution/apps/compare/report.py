"""Write report.html, one self-contained file, from results.json and the checkpoints."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup, escape

from ...models import ViT, attention_weights
from ...modules.projections import RelativeLinear
from ...utils.files import write_whole
from ..data.digits import centre
from ..experiments.figures import colours_of
from ..experiments.results import Results
from ..training.callbacks import read_curves
from ..training.checkpoints import open_checkpoint
from ..training.config import Config
from .distances import as_seen, canvas_of, held_out
from .figures import Lines, curves, distances, norms

__all__ = ["table_norms", "write_report"]

Content = dict[str, Any]
"""The content of results.json, or of one of its runs."""

SAMPLES = 3
MEMORY = {
    "mps": "all memory that the Metal driver holds for the process after one training step",
    "": "weights, gradients, optimizer state and everything allocated during one training step",
}
"""What the peak memory includes, by device."""


def write_report(folder: Path, content: Content, results: Results | None, config: Config) -> None:
    """Write report.html into the folder of a comparison.

    Args:
        folder: the folder.
        content: the content of results.json.
        results: the results of the finished runs; None if there are none.
        config: the configuration of any run, for the options that all runs share.
    """
    runs = content["runs"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["bold"] = bold
    shown = _by_row(runs, lambda run: run)
    first = [found[0] for found in shown.values()]
    models = [open_checkpoint(folder / run["folder"]).model for run in first]
    heads, lines = ([], []) if results is None else results.table()
    page = environment.get_template("report.html.jinja").render(
        content=content,
        about="" if results is None else results.about(),
        memory=MEMORY.get(content["machine"]["device"], MEMORY[""]),
        train=config.train,
        data=config.data,
        model=config.model.given,
        heads=heads,
        lines=lines,
        colours=colours_of(list(content["experiment"]["rows"])),
        curves=curves(_by_row(runs, lambda run: _curve(folder / run["folder"]))) if runs else "",
        distances=distances(_by_row(runs, lambda run: run["by_distance"])) if runs else "",
        tables=_tables(first, models),
        viewer=_script_json(_viewer(content, config, first, models)) if runs else "",
    )
    write_whole(folder / "report.html", lambda to: to.write_text(page, "utf-8"))


def bold(cell: str) -> Markup:
    """Return a cell of a table as HTML; a cell between ** is bold."""
    plain = cell.strip("*")
    return escape(cell) if plain == cell else Markup("<strong>{}</strong>").format(plain)


def _by_row(runs: list[Content], part: Callable[[Content], Any]) -> Lines:
    """Collect a part of each run, by row and regime."""
    found: Lines = defaultdict(list)
    for run in runs:
        found[run["row"], run["regime"]].append(part(run))
    return dict(found)


def _curve(run: Path) -> list[dict[str, float]]:
    return [point for point in read_curves(run) if "train_loss" in point]


@torch.no_grad()
def table_norms(model: ViT) -> list[Content]:
    """Compute the norms of the matrices of each table of a model.

    Args:
        model: the model.

    Returns:
        For each table its "block", its name ("table"), the "norm" of each matrix, and the norm of
        the difference between each matrix and the mean of all ("apart"). Both are float32
        [rows, columns], arranged by the offset from key to query.
    """
    found = []
    for number, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        for name, part in mixer.named_children():
            layout = getattr(mixer, "layout", None)  # a mixer of one's own may have none
            if not isinstance(part, RelativeLinear) or not (layout and layout.offset_classes):
                continue
            weight = part.weight[: mixer.layout.offset_classes].float().cpu()
            shape = mixer.layout.axis_classes
            found.append(
                {
                    "block": number,
                    "table": name.split("_")[0],
                    "norm": weight.flatten(1).norm(dim=1).view(shape),
                    "apart": (weight - weight.mean(0)).flatten(1).norm(dim=1).view(shape),
                }
            )
    return found


def _tables(runs: list[Content], models: list[Any]) -> list[dict[str, str]]:
    found = []
    for number, (run, model) in enumerate(zip(runs, models, strict=True)):
        tables = table_norms(model)
        if tables:
            title = f"{run['row']}, trained on {run['regime']} digits, seed {run['seed']}"
            label = f"Norm of each table entry over its offset: {title}"
            found.append({"title": title, "svg": norms(tables, f"norms-{number}", label)})
    return found


def _viewer(content: Content, config: Config, runs: list[Content], models: list[Any]) -> Content:
    """Return the data of the attention viewer as whole numbers; weights are in thousandths."""
    canvas, patch = canvas_of(config), config.model.given["patch_size"]
    digits, labels = held_out(config)
    chosen, places = _samples(len(digits), digits.shape[-1], canvas)
    pixels, images = as_seen(config, digits[chosen], places)
    sets = []
    for run, model in zip(runs, models, strict=True):
        with torch.inference_mode():
            logits, weights = attention_weights(model, images)
        maps = [
            [None if w is None else (1000 * w[i]).round().int().tolist() for w in weights]
            for i in range(len(images))
        ]
        sets.append(
            {
                "mixer": run["row"], "regime": run["regime"], "seed": run["seed"],
                "prefix": model.prefix, "guesses": logits.argmax(1).tolist(), "maps": maps,
            }
        )  # fmt: skip
    middle = (canvas - digits.shape[-1]) // 2
    regimes = content["experiment"]["regimes"]
    return {
        "canvas": canvas,
        "patch": patch,
        "regimes": [r for r in regimes if any(s["regime"] == r for s in sets)],
        "samples": [
            {
                "label": int(label),
                "moved": [int(p[0]) - middle, int(p[1]) - middle],
                "pixels": (255 * image[0]).round().int().flatten().tolist(),
            }
            for label, p, image in zip(labels[chosen], places, pixels, strict=True)
        ],
        "sets": sets,
    }


def _samples(n: int, size: int, canvas: int) -> tuple[list[int], torch.Tensor]:
    """Choose a test digit in the centre, the same digit moved, and another digit moved."""
    most = canvas - size
    places = centre(SAMPLES, size, canvas).clone()
    places[1] = torch.tensor([most // 8, most - most // 8])
    places[2] = torch.tensor([most - most // 4, most // 8])
    return [0, 0, min(1, n - 1)], places


def _script_json(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
