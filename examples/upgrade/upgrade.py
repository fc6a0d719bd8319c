"""Converts the first layers of a trained ViT of transformers to Translution, and fine-tunes it.

    python examples/upgrade/upgrade.py FOLDER [--out upgrade] [--seeds 3]

FOLDER has CIFAR-10 as train.parquet and test.parquet. First, a small ViT is trained and saved in
the output folder; later calls load it. Then it is fine-tuned in several variants, with the same
number of steps and several seeds: unchanged, and with its first two layers converted, which does
not change its outputs at first. The results are written to results.json. A call that was
interrupted can be repeated, and continues with the runs that are missing.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from translution import convert
from translution.apps.data.images import ImageOptions, open_images
from translution.apps.data.order import seed_of
from translution.utils.files import write_whole

# The arguments of `convert` for the first two layers; None leaves the model unchanged.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "unconverted": None,
    "alpha, v": {"to": "alpha", "relative": "v"},
    "translution, v": {"to": "translution", "relative": "v"},
    "translution, qkv": {"to": "translution", "relative": "qkv"},
}


class Images(Dataset[dict[str, Any]]):
    """A dataset of the library in the form that transformers' Trainer takes.

    Args:
        options: where the images are.
        part: "train" or "test".
        flip: whether images are flipped at random.
    """

    def __init__(self, options: ImageOptions, part: Any, flip: bool):
        self.images, self.flip = open_images(options, part, seed=0), flip
        self.mean = torch.tensor(options.mean).view(-1, 1, 1)
        self.std = torch.tensor(options.std).view(-1, 1, 1)
        self.seen = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.images[0, index]
        assert sample is not None
        pixels, label = sample
        self.seen += 1
        if self.flip and seed_of(index, self.seen) % 2:
            pixels = pixels.flip(-1)
        return {"pixel_values": (pixels / 255 - self.mean) / self.std, "labels": label}


def fit(
    model: Any, train: Images, test: Images, out: Path, steps: int, rate: float, seed: int
) -> dict[str, float]:
    """Train a model.

    Args:
        model: a ViTForImageClassification.
        train, test: the images for training and for the accuracy.
        out: a folder for the Trainer.
        steps: the number of steps of 128 images.
        rate: the largest learning rate.
        seed: the seed of the training.

    Returns:
        the accuracy on the test images before and after, the training time in seconds, and the
        number of parameters.
    """
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=500,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.05,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )

    def accuracy(output: Any) -> dict[str, float]:
        return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return {
        "before": before,
        "after": trainer.evaluate()["eval_accuracy"],
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with train.parquet and test.parquet.")],
    out: Annotated[Path, typer.Option(help="Output folder for the model and results.json.")] = Path(
        "upgrade"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    first_steps: Annotated[int, typer.Option(min=1, help="Steps of the first training.")] = 700,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each fine-tuning.")] = 200,
    variants: Annotated[str, typer.Option(help="Variants to run, separated by ;")] = ";".join(
        VARIANTS
    ),
) -> None:
    """Train a small ViT, convert it in several ways, and fine-tune each variant."""
    options = ImageOptions(
        format="parquet", train=str(folder / "train.parquet"), test=str(folder / "test.parquet"),
        image_size=32, classes=tuple("0123456789"), holdout=0.0,
    )  # fmt: skip
    train, test = Images(options, "train", True), Images(options, "test", False)
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "first" / "config.json").exists():
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4,
                num_attention_heads=3, intermediate_size=384, num_labels=10,
            )
        )  # fmt: skip
        result = fit(model, train, test, out / "trainer", first_steps, 1e-3, 0)
        model.save_pretrained(out / "first")
        console.print(f"trained: {100 * result['after']:.1f} % in {result['seconds']:.0f} s")
    results = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text()) if results.exists() else []
    for seed in range(seeds):
        for name in variants.split(";"):
            if any(row["variant"] == name and row["seed"] == seed for row in rows):
                continue
            model = ViTForImageClassification.from_pretrained(out / "first")
            if (arguments := copy.deepcopy(VARIANTS[name])) is not None:
                convert(model, layers=[0, 1], **arguments)
            rows.append(
                {"variant": name, "seed": seed, "steps": steps}
                | fit(model, train, test, out / "trainer", steps, 5e-4, seed)
            )
            text = json.dumps(rows, indent=1)
            write_whole(results, lambda to, text=text: to.write_text(text))  # type: ignore[misc]
    table = Table("", "at conversion, %", "fine-tuned, %", "parameters", "seconds")
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            after = [100 * row["after"] for row in mine]
            spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
            table.add_row(
                name, f"{100 * mine[0]['before']:.2f}", f"{statistics.fmean(after):.1f}{spread}",
                f"{mine[0]['parameters']:,}", f"{statistics.fmean(r['seconds'] for r in mine):.0f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
