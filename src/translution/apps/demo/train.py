"""Train the demo's own models: python -m translution.apps.demo.train --text FILES

Each model is a run of recipes/demo-digits.yaml or recipes/demo-text.yaml, trained as by
`translution train`. Its checkpoint is then written to `demo-weights/` with its tensors rounded to
float16, and its metrics are measured after the rounding. Existing models are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.description import CHECKPOINT, read_description, write_description
from ...models.weights import WEIGHTS, save_weights
from ..config import load
from ..data.digits import anywhere, centre, load_digits, place
from ..data.tokenizers import save_tokenizer
from ..training.checkpoints import TOKENIZER, Checkpoint, open_checkpoint, whole_folder
from ..training.config import Config
from ..training.run import evaluate, train
from .models import normalised, weights_folder

__all__ = ["PLAN", "Planned", "accuracies", "main", "make", "ship"]

CHECKOUT = Path(__file__).parents[4] / "recipes"
# the wheel has the two recipes inside the package (pyproject.toml)
RECIPES = CHECKOUT if CHECKOUT.is_dir() else Path(__file__).parent / "recipes"
PLACES = 8  # random places of each test digit that the accuracy on moved digits is measured at


class Planned(NamedTuple):
    """A model to train: its folder's name, its recipe, and the changes of the recipe."""

    name: str
    recipe: str
    changes: tuple[str, ...]


def _plan() -> Iterator[Planned]:
    for mixer in ("attention", "rotary", "convolution", "acmix", "alpha", "translution"):
        yield Planned(f"digits-moved-{mixer}", "demo-digits.yaml", (f"model.mixer={mixer}",))
    for mixer in ("attention", "rotary", "translution"):
        changes = (f"model.mixer={mixer}", "data.moved=false", "train.steps=400")
        yield Planned(f"digits-centred-{mixer}", "demo-digits.yaml", changes)
    for mixer in ("attention", "rotary", "alpha", "translution"):
        yield Planned(f"text-{mixer}", "demo-text.yaml", (f"model.mixer={mixer}",))


PLAN = tuple(_plan())


def make(planned: Planned, out: Path, text: list[str], *changes: str) -> dict[str, float]:
    """Train one model, write it to `out`, and return its metrics.

    Args:
        text: files, folders or globs to train a language model on instead of the recipe's.
        changes: further changes of the recipe, such as "train.steps=2".

    Raises:
        ValueError, OSError: for the reasons that `translution train` gives.
    """
    recipe = RECIPES / planned.recipe
    config = load(Config, recipe, [*planned.changes, *changes])
    with tempfile.TemporaryDirectory() as scratch:
        here = []  # settings of this machine only, which the checkpoint does not record
        if config.data.kind == "text":
            here = [f"data.shards={scratch}/shards"]
            here += [f"data.train={json.dumps(text)}"] if text else []
        local = load(Config, recipe, [*planned.changes, *changes, *here])
        run = Path(scratch, "run")
        train(local, run)
        ship(open_checkpoint(run), out / planned.name, config)
        metrics = _measured(out / planned.name, local)
        saved = open_checkpoint(out / planned.name)
        saved.metrics = metrics
        ship(saved, out / planned.name, config)
    return metrics


def ship(checkpoint: Checkpoint, folder: Path, config: Config) -> None:
    """Write a checkpoint in float16, without the state that only a resumed run needs."""
    description = replace(
        read_description(checkpoint.path),
        config=config.model_dump(mode="json"),
        metrics=checkpoint.metrics,
    )
    weights = {name: tensor.half() for name, tensor in checkpoint.model.state_dict().items()}
    with whole_folder(folder) as new:
        save_weights(weights, new / WEIGHTS)
        files = [WEIGHTS]
        if checkpoint.tokenizer is not None:
            save_tokenizer(checkpoint.tokenizer, new / TOKENIZER)
            files.append(TOKENIZER)
        write_description(new, CHECKPOINT, description, files)


def _measured(folder: Path, config: Config) -> dict[str, float]:
    if config.data.kind == "text":
        found = evaluate(folder, "valid", config)
    else:
        found = accuracies(open_checkpoint(folder).model, config)
    return {name: round(float(value), 4) for name, value in found.items()}


@torch.inference_mode()
def accuracies(model: nn.Module, config: Config) -> dict[str, float]:
    """The accuracy on all test digits: in the centre, and at random places of the canvas."""
    digits, generator = load_digits(), torch.Generator().manual_seed(0)
    options = config.data
    assert options.kind == "images"
    canvas = options.canvas or digits.size
    n = len(digits.test)

    def right(places: Tensor) -> float:
        images = normalised(place(digits.test, canvas, places), options.preprocessing())
        found = torch.cat([model(some).argmax(1) for some in images.split(64)])
        return float((found == digits.test_labels).float().mean())

    moved = [right(anywhere(n, digits.size, canvas, generator)) for _ in range(PLACES)]
    centred = right(centre(n, digits.size, canvas))
    return {"test_accuracy_centred": centred, "test_accuracy_moved": sum(moved) / PLACES}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's own models.")
    parser.add_argument("--text", nargs="+", default=[], help="files to use instead of data/text")
    parser.add_argument(
        "--out", type=Path, default=weights_folder(), help="folder to write to (%(default)s)"
    )
    parser.add_argument("--only", default="", help="train only models whose name contains this")
    parser.add_argument("--again", action="store_true", help="train existing models again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for planned in PLAN:
        if given.only not in planned.name:
            continue
        if (given.out / planned.name).exists():
            if not given.again:
                continue
            shutil.rmtree(given.out / planned.name)
        start = time.process_time()
        metrics = make(planned, given.out, given.text)
        measured = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{planned.name}: {measured}; {time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"translution: {error}")
