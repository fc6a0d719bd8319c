"""Collects training runs into docs/training.json, and draws docs/images/training.png from it.

    python docs/curves.py RUNS      collect the runs cifar10-<mixer> and peps-<mixer>, and draw
    python docs/curves.py           draw from docs/training.json

Each run needs its metrics.csv, and the output of `translution evaluate --json` as test.json
(CIFAR-10) or valid.json (PEPs).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from translution.apps.experiments.figures import COLOURS
from translution.apps.training.callbacks import read_curves
from translution.apps.training.checkpoints import open_checkpoint
from translution.utils.files import write_whole

HERE = Path(__file__).parent
TASKS = {  # prefix of the runs: title, curve, label of the curve, and part that was evaluated
    "cifar10": ("CIFAR-10, 8×8 pixels a patch", "valid_accuracy", "validation accuracy, %", "test"),
    "peps": (
        "PEPs, BPE of 4,096, context 64",
        "valid_perplexity",
        "validation perplexity",
        "valid",
    ),
}


def collect(runs: Path) -> dict[str, Any]:
    """The curve, the speed and the final measurements of each run in a folder, by its name."""
    collected: dict[str, Any] = {}
    for task, (_, curve, _, part) in TASKS.items():
        for mixer in COLOURS:
            folder = runs / f"{task}-{mixer}"
            if not (folder / f"{part}.json").exists():
                continue
            rows = read_curves(folder)
            model = open_checkpoint(folder).model
            speed = sorted(v for row in rows for k, v in row.items() if k.endswith("_per_second"))
            collected[f"{task}-{mixer}"] = {
                "task": task,
                "mixer": mixer,
                "parameters": sum(p.numel() for p in model.parameters()),
                "curve": [[row["step"], row[curve]] for row in rows if curve in row],
                "per_second": speed[len(speed) // 2],
                "final": json.loads((folder / f"{part}.json").read_text("utf-8"))
                | {"checkpoint": "last"},
            }
    return collected


def draw(collected: dict[str, Any], file: Path) -> None:
    """Draw the curves of `collect`, with a panel for each task."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), dpi=110)
    for axes, (task, (title, _, label, _)) in zip(panels, TASKS.items(), strict=True):
        for run in collected.values():
            if run["task"] == task:
                steps, values = zip(*run["curve"], strict=True)
                scale = 100 if "%" in label else 1
                values = [scale * v for v in values]
                axes.plot(
                    steps, values, "o-", ms=3, color=COLOURS[run["mixer"]], label=run["mixer"]
                )
        axes.set(title=title, xlabel="steps", ylabel=label)
        if task == "peps":
            axes.set_yscale("log")
            ticks = [100, 150, 200, 300, 400]
            axes.set_yticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    write_whole(file, lambda to: figure.savefig(to, format="png"))


def main() -> None:
    data = HERE / "training.json"
    if len(sys.argv) > 1:
        text = json.dumps(collect(Path(sys.argv[1])), indent=1)
        write_whole(data, lambda to: to.write_text(text, "utf-8"))
    draw(json.loads(data.read_text("utf-8")), HERE / "images" / "training.png")


if __name__ == "__main__":
    main()
