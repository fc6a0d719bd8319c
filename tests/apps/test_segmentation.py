"""The example in examples/segmentation: its scenes, its decoder, and a short run of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "segmentation"))

import segment
from scenes import BACKGROUND, Style, batches, draw, load_parts
from segment import Options, read_override, run_all
from segmenter import Segmenter, load_segmenter

CLEAN = Style(noise=0.0)
SMALL = {"in_channels": 1, "dim": 4, "depths": (1, 1, 1, 1), "heads": 2}
TINY = [
    "--steps=3", "--batch-size=2", "--canvas=32", "--digits=2", "--smallest=10", "--largest=14",
    "--validation=2", "--test=4", "--pictures=2", "--width=8", "--detail=4", "--device=cpu",
    "--override=dim=4", "--override=acmix_*:heads=2",
]  # fmt: skip


def command(monkeypatch, *arguments):
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["segment.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        segment.main()
    return exit_.value.code or 0


# -- scenes --------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_complete():
    parts = load_parts()
    counts = [len(images) for images, _ in (parts.train, parts.validation, parts.test)]
    assert counts == [1197, 240, 360]
    seen = [{tuple(d.flatten().tolist()) for d in p[0]} for p in vars(parts).values()]
    assert len(set.union(*seen)) == sum(len(s) for s in seen)
    for images, labels in vars(parts).values():
        assert images.shape[1:] == (8, 8)
        assert set(labels.tolist()) == set(range(10))


def test_scenes_are_repeatable():
    part = load_parts().test
    one, same, other = (list(batches(part, Style(), 2, 2, seed)) for seed in (3, 3, 4))
    for (image, classes), (again, classes_again) in zip(one, same, strict=True):
        assert torch.equal(image, again)
        assert torch.equal(classes, classes_again)
    assert not torch.equal(one[0][0], other[0][0])
    assert one[0][0].shape == (2, 1, 64, 64)
    assert one[0][1].shape == (2, 64, 64)
    assert one[0][0].min() >= 0
    assert one[0][0].max() <= 1


def test_classes_are_where_the_ink_is():
    """A digit of full ink everywhere is a square, brighter than all around it."""
    generator = torch.Generator().manual_seed(0)
    image, classes = draw(torch.ones(1, 8, 8), torch.tensor([7]), CLEAN, generator)
    inked = classes == 7
    assert set(classes.unique().tolist()) == {7, BACKGROUND}
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert height == width
    assert int(inked.sum()) >= 0.95 * height * width  # the corners are rounded
    assert image[0][inked].mean() > image[0][~inked].mean() + 0.2


def test_classes_are_the_labels_of_what_was_drawn():
    parts = load_parts()
    digits, labels = parts.train[0][:4], parts.train[1][:4]
    for seed in range(5):
        image, classes = draw(digits, labels, CLEAN, torch.Generator().manual_seed(seed))
        there = set(classes.unique().tolist())
        assert BACKGROUND in there
        assert there - {BACKGROUND} <= set(labels.tolist())
        assert len(there) >= 3
        for label in there - {BACKGROUND}:
            assert image[0][classes == label].mean() > image[0][classes == BACKGROUND].mean()


def test_digits_that_do_not_fit_are_left_out():
    style = Style(canvas=12, smallest=12, largest=12, noise=0.0)
    digits = torch.ones(3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    _, classes = draw(digits, torch.tensor([1, 2, 3]), style, generator)
    assert set(classes.unique().tolist()) <= {1, BACKGROUND}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"smallest": 7}, "smallest, largest: got 7 and 32"),
        ({"largest": 65}, "largest: got 24 and 65"),
        ({"smallest": 33}, "smallest, largest"),
        ({"digits": 0}, "digits: got 0"),
        ({"noise": -1.0}, "noise: got -1"),
    ],
)
def test_styles_that_cannot_be_drawn(options, named):
    with pytest.raises(ValueError, match=named):
        Style(**options)


# -- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet26", "acmix_resnet26"])
@pytest.mark.parametrize("size", [(64, 64), (65, 47), (33, 70), (9, 5)])
def test_logits_have_the_images_size(backbone, size):
    overrides = SMALL if backbone.startswith("acmix") else SMALL | {"heads": 1}
    model = Segmenter(backbone, overrides, width=8, detail=4).eval()
    image = torch.randn(2, 1, *size)
    logits = model(image)
    assert logits.shape == (2, 11, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["resnet26", "san10", "swin_tiny", "pvt_tiny"])
@pytest.mark.parametrize("prefix", ["", "acmix_"])
def test_every_family_is_made_small(prefix, family):
    model = Options().model(prefix + family).eval()
    assert sum(p.numel() for p in model.parameters()) < 2e6
    with torch.inference_mode():
        assert model(torch.rand(1, 1, 64, 64)).shape == (1, 11, 64, 64)


@pytest.mark.parametrize("detail", [0, 4])
def test_every_parameter_learns(detail):
    model = Segmenter("acmix_resnet26", SMALL, width=8, detail=detail)
    model(torch.randn(2, 1, 40, 56)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"backbone": "resnet27"}, "did you mean"),
        ({"backbone": "attention_vit_tiny_patch16_224"}, "cannot be used here.*features_only"),
        ({"backbone": "resnet26", "overrides": {"wide": 3}}, "got 'wide'"),
        ({"backbone": "resnet26", "width": 0}, "width, detail: got 0 and"),
        ({"backbone": "resnet26", "detail": -1}, "width, detail: got 24 and -1"),
    ],
)
def test_segmenters_that_cannot_be_made(arguments, named):
    with pytest.raises(ValueError, match=named):
        Segmenter(**arguments)


# -- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *TINY, "--seeds=2", "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text("utf-8"))


def test_a_run_writes_everything(finished, results):
    names = {path.name for path in finished.iterdir()}
    weights = {f"{b}-seed{s}.safetensors" for b in ("resnet26", "acmix_resnet26") for s in (0, 1)}
    assert names == weights | {"results.json", "report.html", "predictions.png", "iou.png"}
    for name in ("predictions.png", "iou.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert results["complete"]
    assert [(r["seed"], r["backbone"]) for r in results["runs"]] == [
        (0, "resnet26"), (0, "acmix_resnet26"), (1, "resnet26"), (1, "acmix_resnet26"),
    ]  # fmt: skip
    for run in results["runs"]:
        assert len(run["iou"]) == 11
        assert run["mean_iou"] == pytest.approx(sum(run["iou"]) / 11)
        assert [point["step"] for point in run["curve"]] == [1, 2, 3]
        assert run["parameters"] > run["backbone_parameters"] > 0
        assert run["multiply_adds"] > run["backbone_multiply_adds"] > 0
        assert run["overrides"]["dim"] == 4
        assert ("heads" in run["overrides"]) == (run["backbone"] == "acmix_resnet26")
    assert [row["mean_iou"]["n"] for row in results["summary"]] == [2, 2]


def test_the_report_stands_alone(finished):
    page = (finished / "report.html").read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in page
    # image, truth and two predictions of two scenes
    assert page.count("data:image/png") == 8
    assert page.count("<svg") == 2
    assert "Partial" not in page


def test_weights_give_the_model_back(finished, results):
    run = results["runs"][1]
    model = load_segmenter(finished / run["weights"])
    assert model.config["backbone"] == "acmix_resnet26"
    assert sum(p.numel() for p in model.parameters()) == run["parameters"]
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 11, 32, 32)


def test_ctrl_c_keeps_what_is_finished(tmp_path, monkeypatch):
    real, calls = segment.train, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(segment, "train", interrupted)
    assert command(monkeypatch, *TINY, "--out", tmp_path / "out") == 130
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert not found["complete"]
    assert [run["backbone"] for run in found["runs"]] == ["resnet26"]
    assert "Partial" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert (tmp_path / "out" / "resnet26-seed0.safetensors").exists()


def test_ctrl_c_before_anything_is_finished(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(segment, "train", interrupted)
    assert command(monkeypatch, *TINY, "--out", tmp_path / "out") == 130
    assert "No run was finished" in (tmp_path / "out" / "report.html").read_text("utf-8")
    # and another run may use the folder
    assert command(monkeypatch, *TINY, "--out", tmp_path / "out") == 130


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--backbone=resnet27"], "there is no model 'resnet27'"),
        (["--backbone="], "backbone: got ''"),
        (["--backbone=resnet26,resnet26"], "want different names"),
        (["--backbone=attention_vit_tiny_patch16_224"], "features_only"),
        (["--steps=0"], "steps: got 0"),
        (["--seed=-1"], "seed: got -1"),
        (["--learning-rate=0"], "learning_rate: got 0"),
        (["--override=dim"], "override: got 'dim'"),
        (["--override=dim=big"], "override: resnet26 with"),
        (["--override=acmix_*:heads=3"], "heads: got 3"),
        (["--smallest=80"], "smallest, largest: got 80"),
        (["--device=tpu"], "device: got 'tpu'"),
    ],
)
def test_bad_options_give_one_line(tmp_path, monkeypatch, capsys, arguments, named):
    assert command(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert named in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert command(monkeypatch, *TINY, "--out", tmp_path) == 2
    assert "want a new or empty folder" in capsys.readouterr().err
    assert command(monkeypatch, *TINY, "--out", tmp_path / "mine.txt") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_overrides():
    assert read_override("dim=16") == ("*", "dim", 16)
    assert read_override("acmix_*:depths=1,2,1,1") == ("acmix_*", "depths", (1, 2, 1, 1))
    assert read_override("mixer=acmix") == ("*", "mixer", "acmix")
    options = Options(overrides=("dim=24", "acmix_*:heads=8"))
    assert "heads" not in options.model("resnet26").config["overrides"]
    assert options.model("acmix_resnet26").config["overrides"]["heads"] == 8


def test_folder_of_an_earlier_run_is_replaced(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"format": segment.FORMAT, "runs": [{"weights": "old.safetensors"}]})
    )
    (tmp_path / "old.safetensors").write_text("old")
    segment.open_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="background: got 2"):
        run_all(str(tmp_path / "out"), Options(background=2.0))
    assert not (tmp_path / "out").exists()
