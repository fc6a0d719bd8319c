"""report.html: one file with everything in it, drawn from results.json and the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import torch

from ...models import attention_weights
from ...utils.files import write_whole
from ..data.digits import Digits, centre, place
from .figures import COLOURS, curves, distances, norms
from .measure import table_norms
from .options import REGIMES
from .results import MEASURES, load_checkpoint

__all__ = ["write_report"]

SAMPLES = 3


def write_report(folder: Path, results: dict[str, Any], data: Digits) -> None:
    """Write report.html into the folder of these results."""
    runs = results["runs"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "seconds": seconds}
    shown = _first_of_each(runs)
    page = environment.get_template("report.html.jinja").render(
        results=results,
        options=results["options"],
        measures=MEASURES,
        colours=COLOURS,
        curves=curves(runs) if runs else "",
        distances=distances(runs) if runs else "",
        tables=_tables(folder, shown),
        viewer=_script_json(_viewer(folder, results, shown, data)) if runs else "",
    )
    write_whole(folder / "report.html", lambda to: to.write_text(page, "utf-8"))


def percent(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "–"
    apart = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{apart}"


def seconds(value: dict[str, Any]) -> str:
    apart = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:.1f}{apart}"


def _first_of_each(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first seed's run of each mixer and regime."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        found.setdefault((run["mixer"], run["regime"]), run)
    return list(found.values())


def _tables(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    for run in runs:
        tables = table_norms(load_checkpoint(folder / run["checkpoint"]))
        if tables:
            title = f"{run['mixer']}, trained on {run['regime']} digits, seed {run['seed']}"
            name = f"norms-{run['mixer']}-{run['regime']}"
            label = f"Norm of each table entry over its offset: {title}"
            found.append({"title": title, "svg": norms(tables, name, label)})
    return found


def _viewer(
    folder: Path, results: dict[str, Any], runs: list[dict[str, Any]], data: Digits
) -> dict[str, Any]:
    """What the attention viewer draws: whole numbers, weights in thousandths."""
    canvas, patch = results["options"]["canvas"], results["options"]["patch"]
    digits, labels, places = _samples(data, canvas)
    images = place(digits, canvas, places)
    sets = []
    for run in runs:
        model = load_checkpoint(folder / run["checkpoint"])
        with torch.inference_mode():
            logits, weights = attention_weights(model, images)
        maps = [
            [None if w is None else (1000 * w[i]).round().int().tolist() for w in weights]
            for i in range(len(images))
        ]
        sets.append(
            {
                "mixer": run["mixer"], "regime": run["regime"], "seed": run["seed"],
                "prefix": model.prefix, "guesses": logits.argmax(1).tolist(), "maps": maps,
            }
        )  # fmt: skip
    middle = (canvas - data.size) // 2
    return {
        "canvas": canvas,
        "patch": patch,
        "regimes": [r for r in REGIMES if any(s["regime"] == r for s in sets)],
        "samples": [
            {
                "label": int(label),
                "moved": [int(p[0]) - middle, int(p[1]) - middle],
                "pixels": (255 * image[0]).round().int().flatten().tolist(),
            }
            for label, p, image in zip(labels, places, images, strict=True)
        ],
        "sets": sets,
    }


def _samples(data: Digits, canvas: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Test digits: one in the centre, the same one moved, and another one moved elsewhere."""
    most, size = canvas - data.size, data.size
    some = [0, 0, min(1, len(data.test) - 1)]
    places = centre(SAMPLES, size, canvas).clone()
    places[1] = torch.tensor([most // 8, most - most // 8])
    places[2] = torch.tensor([most - most // 4, most // 8])
    return data.test[some], data.test_labels[some], places


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
