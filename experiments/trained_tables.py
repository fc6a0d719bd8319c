"""What do the tables of a trained model look like?

    translution experiment experiments/screen-digits.yaml --rows "full tables qkv" --keep
    python experiments/trained_tables.py --folder=FOLDER --pictures=docs/images \\
        runs/experiments/screen-digits/steps-full-tables-qkv-0.002-0/run

Three questions are answered for each table. Which offsets have matrices of their own? Their
distance from the mean matrix of the table is measured. How many matrices does a table have? For
each head, the matrices of all offset classes are the rows of one matrix, whose singular values are
computed, and the model is tested again with the best approximations by M bases, without further
training. Are they rotations of one another, as in rotary positions? Each is approximated by the
matrix of offset 0 times a rotation, and times any matrix. Prints the numbers as JSON, and draws two
pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution import Layout
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


def approximated(u: Tensor, s: Tensor, v: Tensor, channels: int, bases: int) -> Tensor:
    """The best approximation of a table with so many bases per head, from its decomposition."""
    rows = (u[..., :bases] * s[:, None, :bases]) @ v[:, :bases]
    rows = rows.unflatten(-1, (channels, -1))  # [heads, classes, channels, head_dim]
    return rows.permute(1, 2, 0, 3).flatten(2)


def offsets_of(layout: Layout) -> Tensor:
    """The offset of each class, int64 [classes, axes]."""
    positions = layout.positions()
    offsets = positions[:, None] - positions[None]
    found = torch.zeros(layout.classes, offsets.shape[-1], dtype=torch.int64)
    found[layout.index.flatten()] = offsets.flatten(0, 1)
    return found


def on_grid(values: Tensor, offsets: Tensor) -> list[list[float]]:
    """One value per class as rows and columns of offsets, from the most negative one."""
    least = offsets.amin(0)
    grid = torch.zeros(*(offsets.amax(0) - least + 1).tolist())
    grid[tuple((offsets - least).T)] = values
    return [[round(float(x), 4) for x in row] for row in grid]


def from_mean(weight: Tensor) -> Tensor:
    """The distance of each class's matrix from their mean, relative to that mean, [classes]."""
    mean = weight.mean(0)
    return (weight - mean).flatten(1).norm(dim=1) / mean.norm()


def likeness(weight: Tensor, heads: int, offsets: Tensor) -> dict[str, list[float]]:
    """How much of a class's matrix follows from that of offset 0, by distance and kind of map.

    Returns:
        For "equal" (the same matrix), "rotated" (times the best orthogonal matrix of each head) and
        "mapped" (times the best matrix of each head), the share of the squared entries that is
        explained, for the distances 1, 2, ... (the larger one of the two axes).
    """
    one = weight.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).double()  # [heads, classes, c, d]
    start = one[:, (offsets == 0).all(1)]
    u, _, v = torch.linalg.svd(start.mT @ one)
    fits = {
        "equal": start.expand_as(one),
        "rotated": start @ u @ v,
        "mapped": start @ torch.linalg.lstsq(start.expand_as(one), one).solution,
    }
    distance = offsets.abs().amax(1)
    size = one.square().sum((0, 2, 3))
    found = {}
    for kind, fit in fits.items():
        share = 1 - (one - fit).square().sum((0, 2, 3)) / size
        found[kind] = [
            round(float(share[distance == d].mean()), 4) for d in range(1, int(distance.max()) + 1)
        ]
    return found


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
    parts = {}
    found: dict[str, Any] = {"whole": accuracy(model, data), "accuracy": {}, "energy": {}}
    found |= {"distance": {}, "likeness": {}}
    offsets = offsets_of(model.blocks[0].mixer.layout)
    for name, table in tables.items():
        weight = table.weight.detach()
        parts[name] = torch.linalg.svd(by_head(weight, heads), full_matrices=False)
        found["distance"][name] = on_grid(from_mean(weight), offsets)
        found["likeness"][name] = likeness(weight, heads, offsets)
        squares = parts[name].S ** 2  # [heads, values]
        share = (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).mean(0)
        found["energy"][name] = [round(float(x), 4) for x in share]
    for bases in BASES:
        for name, table in tables.items():
            table.weight.data = approximated(*parts[name], table.weight.shape[1], bases)
        found["accuracy"][bases] = accuracy(model, data)
    return found


def parts_of(name: str) -> tuple[int, str]:
    """The layer, counted from 1, and the letter of the projection of a table's name."""
    _, block, _, projection = name.split(".")
    return int(block) + 1, projection[0]


def draw_offsets(found: dict[str, Any], file: Path) -> None:
    """A map over the offsets for each table: how far its matrices are from their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = len({parts_of(name)[0] for name in found["distance"]})
    figure, axes = plt.subplots(layers, 3, figsize=(8.6, 2.7 * layers), layout="constrained")
    most = max(max(map(max, grid)) for grid in found["distance"].values())
    for name, grid in found["distance"].items():
        layer, side = parts_of(name)
        panel = axes[layer - 1, "qkv".index(side)]
        reach = len(grid) // 2
        edges = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)  # the first row is on top
        shown = panel.imshow(grid, vmin=0, vmax=most, cmap="magma", extent=edges)
        title = {"q": "queries", "k": "keys", "v": "values"}[side]
        panel.set(
            title=f"{title}, layer {layer}", xticks=[-reach, 0, reach], yticks=[-reach, 0, reach]
        )
        if side == "q":
            panel.set_ylabel("query − key, down, patches")
        if layer == layers:
            panel.set_xlabel("query − key, across, patches")
    figure.colorbar(shown, ax=axes, label="distance from the mean matrix, relative", shrink=0.8)
    write_whole(file, lambda to: figure.savefig(to, dpi=130, format="png"))


def draw_forms(found: dict[str, Any], file: Path) -> None:
    """Panels for the energy of each table, the accuracy with M bases, and the fits by distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, energy in found["energy"].items():
        layer, side = parts_of(name)
        style = {"q": ":", "k": "--", "v": "-"}[side]
        label = f"{side}, layer {layer}"
        left.plot(range(1, len(energy) + 1), energy, style, color=f"C{layer - 1}", label=label)
    left.set(xscale="log", xlabel="bases per head", ylabel="share of the squared entries")
    left.set(ylim=(0, 1.02), title="A table's matrices as mixtures of bases")
    left.legend(fontsize=8)
    bases = [int(n) for n in found["accuracy"]]
    middle.plot(bases, list(found["accuracy"].values()), "o-", color="C2", label="M bases")
    middle.axhline(found["whole"], color="grey", label="the whole tables")
    middle.set(xscale="log", xlabel="bases per head", ylabel="accuracy on moved digits, %")
    middle.set(ylim=(0, 100), title="The trained model with fewer bases")
    middle.legend(fontsize=8)
    kinds = {"mapped": "times any matrix", "rotated": "times a rotation", "equal": "left as it is"}
    for place, (kind, title) in enumerate(kinds.items()):
        for sides, style in (("qk", "-"), ("v", "--")):
            rows = [
                fits[kind] for name, fits in found["likeness"].items() if parts_of(name)[1] in sides
            ]
            mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
            named = f"{title} ({'queries, keys' if sides == 'qk' else 'values'})"
            right.plot(range(1, len(mean) + 1), mean, style, color=f"C{place + 3}", label=named)
    right.set(xlabel="distance of the offset, patches", ylabel="share of the squared entries")
    right.set(ylim=(0, 1.02), title="How much follows from the matrix of offset 0")
    right.legend(fontsize=7, ncols=2, loc="lower center")
    write_whole(file, lambda to: figure.savefig(to, dpi=130, format="png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--folder", required=True, help="The folder of MNIST.")
    parser.add_argument("--pictures", type=Path, help="The folder for the two pictures.")
    given = parser.parse_args()
    result = measure(given.run, [f"data.folder={given.folder}"])
    print(json.dumps(result))
    if given.pictures:
        draw_offsets(result, given.pictures / "tables-offsets.png")
        draw_forms(result, given.pictures / "tables-forms.png")
