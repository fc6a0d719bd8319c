"""How many matrices does a trained table have? Each is a mixture of a few bases if few suffice.

    translution experiment experiments/screen-digits.yaml --rows "full tables qkv" --keep
    python experiments/spectrum.py --folder=FOLDER --picture=docs/images/spectrum.png \\
        runs/experiments/screen-digits/steps-full-tables-qkv-0.002-0/run

For each table and head, the matrices of all offset classes are the rows of one matrix, whose
singular values are computed. The tables are then replaced by their best approximation with M bases,
and the model is tested again without further training. Prints both as JSON, and draws a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.apps.config import load
from translution.apps.training.checkpoints import open_checkpoint
from translution.apps.training.config import Config
from translution.apps.training.data import Data
from translution.modules import RelativeLinear
from translution.utils.files import write_whole

BASES = (1, 2, 4, 8, 16, 32, 64)


def by_head(weight: Tensor, heads: int) -> Tensor:
    """[classes, channels, heads · head_dim] -> [heads, classes, channels · head_dim]."""
    return weight.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(2)


def approximated(weight: Tensor, heads: int, bases: int) -> Tensor:
    """The best approximation of a table with so many bases per head."""
    u, s, v = torch.linalg.svd(by_head(weight, heads), full_matrices=False)
    rows = (u[..., :bases] * s[:, None, :bases]) @ v[:, :bases]
    rows = rows.unflatten(-1, (weight.shape[1], -1))  # [heads, classes, channels, head_dim]
    return rows.permute(1, 2, 0, 3).flatten(2)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Data) -> float:
    """The share of test images that are classified correctly, in per cent."""
    part, right = data.part("test"), 0
    for start in range(0, len(part), 500):
        batch = part.__getitems__([(0, i) for i in range(start, min(start + 500, len(part)))])
        images = torch.stack([image for image, _ in batch]).float()
        labels = torch.tensor([label for _, label in batch])
        mean, std = (torch.tensor(getattr(part.options, name)) for name in ("mean", "std"))
        images = (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        right += int((model(images).argmax(-1) == labels).sum())
    return 100 * right / len(part)


def measure(run: Path, changes: list[str]) -> dict[str, Any]:
    """The spectrum of each table of a run, and the accuracy with fewer bases."""
    config = load(Config, run / "config.yaml", changes)
    model: Any = open_checkpoint(run).model.eval()
    data, heads = Data(config), model.config.heads
    tables = {n: m for n, m in model.named_modules() if isinstance(m, RelativeLinear)}
    whole = {name: table.weight.detach().clone() for name, table in tables.items()}
    found: dict[str, Any] = {"whole": accuracy(model, data), "accuracy": {}, "energy": {}}
    for name, weight in whole.items():
        squares = torch.linalg.svdvals(by_head(weight, heads)) ** 2  # [heads, values]
        share = (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).mean(0)
        found["energy"][name] = [round(float(x), 4) for x in share]
    for bases in BASES:
        for name, table in tables.items():
            table.weight.data = approximated(whole[name], heads, bases)
        found["accuracy"][bases] = accuracy(model, data)
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """A panel for the energy of each table, and one for the accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, energy in found["energy"].items():
        _, block, _, projection = name.split(".")
        style = {"q": ":", "k": "--", "v": "-"}[projection[0]]
        label = f"{projection[0]}, layer {int(block) + 1}"
        left.plot(range(1, len(energy) + 1), energy, style, color=f"C{block}", label=label)
    left.set(xscale="log", xlabel="bases per head", ylabel="share of the squared entries")
    left.set(ylim=(0, 1.02), title="A table's matrices as mixtures of bases")
    left.legend(fontsize=8)
    bases = list(found["accuracy"])
    right.plot(bases, list(found["accuracy"].values()), "o-", color="C2", label="M bases")
    right.axhline(found["whole"], color="grey", label="the whole tables")
    right.set(xscale="log", xlabel="bases per head", ylabel="accuracy on moved digits, %")
    right.set(ylim=(0, 100), title="The trained model with fewer bases")
    right.legend(fontsize=8)
    write_whole(file, lambda to: figure.savefig(to, dpi=130, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--folder", required=True, help="The folder of MNIST.")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    result = measure(given.run, [f"data.folder={given.folder}"])
    print(json.dumps(result, indent=1))
    if given.picture:
        draw(result, given.picture)
