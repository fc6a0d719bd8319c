"""Segmentation with backbones of the library: find the digit that each pixel belongs to.

    python examples/segmentation/segment.py --backbone acmix_resnet26 --out segmentation

This trains a small model on scenes of several handwritten digits (scenes.py), and tests it on
digits that are not in the training scenes. Without `--backbone` it trains `resnet26` and
`acmix_resnet26` with two seeds each, with the same decoder (segmenter.py), the same scenes and the
same number of steps, which takes about 5 minutes on 2 cores. Any name of `list_models()` whose
model takes `features_only` can be given. The backbones are made small by the options in `SMALL`
below. `--override` changes an option of all backbones, or of those whose names match a pattern:

    --override dim=24 --override "acmix_*:kernel_size=5"

The output folder gets results.json, the weights as safetensors (which `segmenter.load_segmenter`
reads), predictions.png, iou.png and report.html, which is complete in itself. After Ctrl-C, the
finished runs are kept. The example needs `pip install 'translution[all]'`.
"""

from __future__ import annotations

import ast
import datetime
import fnmatch
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pages import percent, seconds, spread, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scenes import BACKGROUND, CLASSES, Style, batches, load_parts
from segmenter import Segmenter, iou_per_class, save_segmenter, train

from translution.apps.training.devices import DEVICES, pick_device
from translution.models.configuration import check_choice
from translution.utils.files import write_whole
from translution.utils.measuring import machine, multiply_adds

__all__ = ["Options", "run_all"]

FORMAT = "translution-segmentation-1"
WRITTEN = ("results.json", "report.html", "predictions.png", "iou.png")
# Options that make a backbone small enough to train in minutes on a CPU, by a pattern of its name.
SMALL: dict[str, dict[str, Any]] = {
    "*resnet*": {"dim": 16, "depths": (1, 1, 1, 1)},
    "*san*": {"dim": 16, "group_size": 4, "depths": (1, 1, 1, 1, 1)},
    "*swin*": {
        "dim": 32, "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "window_size": 4,
        "drop_path_rate": 0.0,
    },
    "*pvt*": {
        "image_size": 64, "dims": (32, 64, 128, 256), "depths": (1, 1, 2, 1),
        "heads": (1, 2, 4, 8), "drop_path_rate": 0.0,
    },
}  # fmt: skip
# Seeds of the validation and test scenes, which are the same for every run.
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Options:
    """All options on which the results depend.

    Attributes:
        backbones: names of models.
        overrides: options of the backbones, "name=value" or "pattern:name=value".
        seeds, seed: the number of seeds, and the first one.
        steps, batch_size, learning_rate: of the training; the batch size counts scenes.
        background: the weight of background pixels in the loss, where pixels of digits have 1. Five
            of six pixels are background, and with a weight of 1 the digits are learned much later.
        width, detail: channels of the decoder, as in `Segmenter`.
        style: how scenes are drawn.
        validation, test: the numbers of scenes.
        pictures: the number of test scenes in the figures.
        device: "auto", "cpu", "cuda" or "mps".
    """

    backbones: tuple[str, ...] = ("resnet26", "acmix_resnet26")
    overrides: tuple[str, ...] = ()
    seeds: int = 2
    seed: int = 0
    steps: int = 1200
    batch_size: int = 8
    learning_rate: float = 4e-3
    background: float = 0.3
    width: int = 24
    detail: int = 8
    style: Style = field(default_factory=Style)
    validation: int = 48
    test: int = 256
    pictures: int = 6
    device: str = "auto"

    def check(self) -> None:
        """Check all options, and build each backbone once.

        Raises:
            ValueError: naming the option, the value and what is wanted.
        """
        if not self.backbones or len(set(self.backbones)) < len(self.backbones):
            raise ValueError(
                f"backbone: got {','.join(self.backbones)!r}, want different names, at least one"
            )
        for name in ("seeds", "steps", "batch_size", "validation", "test", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, want 0 to 2**32 - 1")
        for name in ("learning_rate", "background"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want more than 0, at most 1")
        check_choice("device", self.device, DEVICES)
        pick_device(self.device)
        for backbone in self.backbones:
            self.model(backbone)

    def model(self, backbone: str) -> Segmenter:
        """The untrained model with this backbone."""
        options: dict[str, Any] = {"in_channels": 1}
        for pattern, small in SMALL.items():
            if fnmatch.fnmatch(backbone, pattern):
                options |= small
        for text in self.overrides:
            pattern, name, value = read_override(text)
            if fnmatch.fnmatch(backbone, pattern):
                options[name] = value
        try:
            return Segmenter(backbone, options, len(CLASSES), self.width, self.detail)
        except TypeError as error:  # an option has a type that the backbone does not accept
            raise ValueError(f"override: {backbone} with {options}: {error}") from None


def read_override(text: str) -> tuple[str, str, Any]:
    """Split "name=value" or "pattern:name=value" into pattern ("*" if absent), name and value."""
    left, equals, value = text.partition("=")
    pattern, colon, name = left.rpartition(":")
    if not equals or not name.isidentifier():
        raise ValueError(f"override: got {text!r}, want name=value or pattern:name=value")
    try:
        return pattern if colon else "*", name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return pattern if colon else "*", name, value


def open_folder(folder: Path) -> None:
    """Create the folder, or remove the files that an earlier run wrote into it.

    Raises:
        ValueError: the path is a file, or a folder with files that no earlier run wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file, want a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    try:
        earlier = json.loads((folder / "results.json").read_text("utf-8"))
        if earlier["format"] != FORMAT:
            raise KeyError("format")
        names = [run["weights"] for run in earlier["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"out: {folder} is not empty and not from an earlier run; want a new or empty folder"
        ) from None
    for name in (*names, *WRITTEN):
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)


def run_all(out: str, options: Options, command: str = "") -> bool:
    """Train and test all backbones, and write results and report into a folder.

    Args:
        out: the folder.
        options: all options.
        command: the command line, for the report.

    Returns:
        True if all runs were finished, False if Ctrl-C was pressed.

    Raises:
        ValueError: naming the option, the value and what is wanted.
        OSError: the folder cannot be written.
    """
    began = time.perf_counter()
    console = Console()
    parts = load_parts()
    finished = True
    with torch.random.fork_rng(devices=[]):
        options.check()
        folder = Path(out)
        open_folder(folder)
        results: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(pick_device(options.device)),
            "options": asdict(options),
            "classes": CLASSES,
            "digits": {name: len(part[1]) for name, part in vars(parts).items()},
            "planned_runs": len(options.backbones) * options.seeds,
            "runs": [],
        }
        test = scenes_of(parts.test, options, options.test, TEST_SEED)
        _save(folder, results, began)
        try:
            _runs(folder, options, parts, test, results, console, began)
        except KeyboardInterrupt:
            finished = False
            done = len(results["runs"])
            console.print(f"Stopped; {done} of {results['planned_runs']} runs are finished.")
    _save(folder, results, began)
    images, classes = (torch.cat(both) for both in zip(*test, strict=True))
    write_report(folder, results, images, classes)
    _print_table(console, results)
    console.print(
        f"{folder / 'report.html'}  ({time.perf_counter() - began:.0f} s)", soft_wrap=True
    )
    return finished


def scenes_of(part: Any, options: Options, count: int, seed: int) -> list[Any]:
    """Draw `count` scenes, and return them in batches of 32."""
    images, classes = next(batches(part, options.style, count, 1, seed))
    return list(zip(images.split(32), classes.split(32), strict=True))


def _runs(
    folder: Path,
    options: Options,
    parts: Any,
    test: list[Any],
    results: dict[str, Any],
    console: Console,
    began: float,
) -> None:
    validation = scenes_of(parts.validation, options, options.validation, VALIDATION_SEED)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
    # in the order of seeds, so that after Ctrl-C the backbones have about the same number of runs
    plan = [(options.seed + i, name) for i in range(options.seeds) for name in options.backbones]
    with Progress(
        TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("steps", total=len(plan) * options.steps, numbers="")
        for number, (seed, name) in enumerate(plan):
            title = f"{name}, seed {seed}"
            progress.update(task, description=title)

            def report(step: int, loss: float, iou: float, number: int = number) -> None:
                done = number * options.steps + step
                numbers = f"loss {loss:.3f} validation IoU {iou:.3f}"
                progress.update(task, completed=done, numbers=numbers)

            def scenes(seed: int = seed) -> Any:
                return batches(parts.train, options.style, options.batch_size, options.steps, seed)

            torch.manual_seed(seed)
            model = options.model(name)
            counts = _counts(model, test[0][0][:1])
            trained = train(
                model, scenes, validation, options.steps, options.learning_rate,
                options.background, pick_device(options.device), report,
            )  # fmt: skip
            iou = iou_per_class(trained.model, test)
            weights = f"{name}-seed{seed}.safetensors"
            save_segmenter(folder / weights, trained.model)
            run = {
                "backbone": name,
                "overrides": model.config["overrides"],
                "seed": seed,
                "iou": iou,
                "mean_iou": sum(iou) / len(iou),
                "mean_iou_digits": sum(iou[:BACKGROUND]) / BACKGROUND,
                **counts,
                "seconds": round(trained.seconds, 3),
                "curve": trained.curve,
                "weights": weights,
            }
            results["runs"].append(run)
            _save(folder, results, began)
            progress.console.print(
                f"{title}: mean IoU {run['mean_iou']:.3f}  ({trained.seconds:.1f} s)",
                highlight=False,
            )


def _counts(model: Segmenter, image: torch.Tensor) -> dict[str, int]:
    """Parameters, and multiply-adds for one image, of the model and of its backbone alone."""
    model.eval()
    with torch.inference_mode():
        counts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "backbone_parameters": sum(p.numel() for p in model.backbone.parameters()),
            "multiply_adds": multiply_adds(lambda: model(image)),
            "backbone_multiply_adds": multiply_adds(lambda: model.backbone(image)),
        }
    model.train()
    return counts


def _save(folder: Path, results: dict[str, Any], began: float) -> None:
    results["complete"] = len(results["runs"]) == results["planned_runs"]
    results["seconds"] = round(time.perf_counter() - began, 2)
    results["summary"] = summary(results["runs"])
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_whole(folder / "results.json", lambda to: to.write_text(text, "utf-8"))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per backbone: means and standard deviations over the seeds."""
    rows = []
    for name in dict.fromkeys(run["backbone"] for run in runs):
        mine = [run for run in runs if run["backbone"] == name]
        same = ("parameters", "backbone_parameters", "multiply_adds", "backbone_multiply_adds")
        rows.append(
            {"backbone": name, "overrides": mine[0]["overrides"]}
            | {key: mine[0][key] for key in same}
            | {k: spread([r[k] for r in mine]) for k in ("mean_iou", "mean_iou_digits", "seconds")}
            | {
                "iou": [
                    spread(list(values)) for values in zip(*(r["iou"] for r in mine), strict=True)
                ]
            }
        )
    return rows


def _print_table(console: Console, results: dict[str, Any]) -> None:
    table = Table("", "mean IoU %", "digits alone %", "parameters", "mult-adds", "seconds")
    table.columns[0].no_wrap = True
    for row in results["summary"]:
        table.add_row(
            row["backbone"], percent(row["mean_iou"]), percent(row["mean_iou_digits"]),
            f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.1f} M",
            seconds(row["seconds"]),
        )  # fmt: skip
    if results["summary"]:
        console.print(table)


def segment(
    out: Annotated[
        str, typer.Option(help="The output folder; files of an earlier run are replaced.")
    ] = "segmentation",
    backbone: Annotated[
        str, typer.Option(help="Models that take features_only, separated by commas.")
    ] = ",".join(Options.backbones),
    override: Annotated[
        list[str] | None,
        typer.Option(help="An option of the backbones, [pattern:]name=value; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = Options.seeds,
    seed: Annotated[int, typer.Option(help="The first seed.")] = Options.seed,
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = Options.steps,
    batch_size: Annotated[int, typer.Option(help="Scenes per step.")] = Options.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Largest learning rate of the schedule.")
    ] = Options.learning_rate,
    background: Annotated[
        float, typer.Option(help="Weight of background pixels in the loss.")
    ] = Options.background,
    width: Annotated[int, typer.Option(help="Channels of the decoder.")] = Options.width,
    detail: Annotated[
        int, typer.Option(help="Channels of the convolution at full resolution; 0 for none.")
    ] = Options.detail,
    canvas: Annotated[int, typer.Option(help="Pixels per side of a scene.")] = Style.canvas,
    digits: Annotated[int, typer.Option(help="Most digits in a scene.")] = Style.digits,
    smallest: Annotated[int, typer.Option(help="Pixels of the smallest digit.")] = Style.smallest,
    largest: Annotated[int, typer.Option(help="Pixels of the largest digit.")] = Style.largest,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise.")] = Style.noise,
    validation: Annotated[int, typer.Option(help="Validation scenes.")] = Options.validation,
    test: Annotated[int, typer.Option(help="Test scenes.")] = Options.test,
    pictures: Annotated[int, typer.Option(help="Test scenes in the figures.")] = Options.pictures,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = Options.device,
) -> None:
    """Train backbones with a small decoder to segment digits, and report the IoU of each class."""
    options = Options(
        tuple(name.strip() for name in backbone.split(",") if name.strip()), tuple(override or ()),
        seeds, seed, steps, batch_size, learning_rate, background, width, detail,
        Style(canvas, digits, smallest, largest, noise), validation, test, pictures, device,
    )  # fmt: skip
    command = " ".join(["python", "examples/segmentation/segment.py", *sys.argv[1:]])
    if not run_all(out, options, command):
        raise typer.Exit(130)


def main() -> None:
    """Run the command line. An error prints one line and exits with code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(segment)
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"segment: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
