"""What a comparison leaves in its folder: results.json and checkpoints, each written whole."""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save_file

from ..._version import __version__
from ...models import ViT, vit
from ...utils.files import write_whole
from ...utils.measuring import machine
from ..training.engine import pick_device
from .measure import MEMORY
from .options import REGIMES, Options

__all__ = ["Results", "load_checkpoint", "open_folder", "save_checkpoint"]

FORMAT = "translution-compare-1"
MEASURES = ("centred to centred", "centred to moved", "moved to moved")


def open_folder(folder: Path) -> None:
    """Make the folder, or clear what an earlier comparison wrote there.

    Raises:
        ValueError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    path = folder / "results.json"
    try:
        earlier = json.loads(path.read_text("utf-8"))
        if earlier["format"] != FORMAT:
            raise KeyError("format")
        names = [run["checkpoint"] for run in earlier["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"out: {folder} is not empty and not from an earlier compare; want a new or empty "
            "folder"
        ) from None
    for name in [*names, "report.html", "results.json"]:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)


def save_checkpoint(path: Path, model: ViT, config: dict[str, Any]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {"format": "pt", "translution": __version__, "vit": json.dumps(config)}
    write_whole(path, lambda to: save_file(tensors, to, metadata=metadata))


def load_checkpoint(path: Path | str) -> ViT:
    """The model of a checkpoint, ready to be used.

    Raises:
        ValueError: not a checkpoint of a comparison.
    """
    with safe_open(path, "pt") as file:
        config = (file.metadata() or {}).get("vit")
    if config is None:
        raise ValueError(f"{path}: has no 'vit' metadata, want a checkpoint written by compare")
    model = vit(**json.loads(config))
    load_model(model, path)
    return model.eval()


class Results:
    """The content of results.json as it grows."""

    def __init__(self, folder: Path, options: Options, command: str, digits: dict[str, Any]):
        self.folder = folder
        self.runs: list[dict[str, Any]] = []
        self.planned = len(options.mixers) * options.seeds * 2
        device = pick_device(options.device)
        self.head: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(device),
            "options": options.as_dict(),
            "data": digits,
            "memory": MEMORY[device],
        }
        self.order = options.mixers
        self.seconds = 0.0

    def add(self, run: dict[str, Any], seconds: float) -> None:
        self.runs.append(run)
        # runs may finish in another order than they were planned in
        self.runs.sort(key=self._place)
        self.seconds = seconds
        self.save()

    def _place(self, run: dict[str, Any]) -> tuple[int, int, int]:
        """Where a run stands in the plan: by seed, regime and mixer."""
        return run["seed"], REGIMES.index(run["regime"]), self.order.index(run["mixer"])

    def save(self) -> None:
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False)
        write_whole(self.folder / "results.json", lambda to: to.write_text(text, "utf-8"))

    def as_dict(self) -> dict[str, Any]:
        return self.head | {
            "complete": len(self.runs) == self.planned,
            "planned_runs": self.planned,
            "seconds": round(self.seconds, 2),
            "summary": summary(self.runs, self.order),
            "runs": self.runs,
        }


def summary(runs: list[dict[str, Any]], mixers: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per mixer: means and standard deviations over the seeds."""
    rows = []
    for mixer in mixers:
        mine = [run for run in runs if run["mixer"] == mixer]
        if not mine:
            continue
        row: dict[str, Any] = {
            "mixer": mixer,
            "parameters": mine[0]["parameters"],
            "peak_bytes": max(run["peak_bytes"] for run in mine),
            "seconds": spread([run["seconds"] for run in mine]),
        }
        for measure in MEASURES:
            regime, test = measure.split(" to ")
            values = [run["accuracy"][test] for run in mine if run["regime"] == regime]
            row[measure] = spread(values)
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None below two values) and how many."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }
