"""From a recipe to a program for elsewhere: everything typed as a user types it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("datasets")
pytest.importorskip("typer")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from translution.apps import cli
from translution.apps.training.checkpoints import open_checkpoint
from translution.interop.export import portable
from translution.models.preprocessing import Preprocessing

ROOT = Path(__file__).parents[2]


def command(*words):
    argv, out, code = sys.argv, io.StringIO(), 0
    try:
        sys.argv = ["translution", *map(str, words)]
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = argv
    assert code == 0, out.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = ("train.steps=3", "model.dim=16", "model.depth=1", "data.train_limit=200")
    command("train", ROOT / "recipes" / "tiny-digits.yaml", f"--out={folder}",
            "--train.device=cpu", *(f"--{key}" for key in small))  # fmt: skip
    return folder


@pytest.mark.parametrize(("kind", "quantise"), [("onnx", False), ("onnx", True), ("torch", True)])
def test_a_run_becomes_a_program(run, tmp_path, kind, quantise):
    file = tmp_path / f"model.{'onnx' if kind == 'onnx' else 'pt2'}"
    said = command("export", run, "--to", kind, "--out", file, *["--quantise"] * quantise)
    assert "against the model: largest difference" in said
    trained = open_checkpoint(run).model
    x = torch.randn(3, 1, 20, 20)
    with torch.no_grad():
        want = trained(x)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        (image,) = session.get_inputs()
        assert image.shape == ["batch", 1, 20, 20]
        (output,) = session.get_outputs()
        assert (image.name, output.name) == ("image", "logits")
        described = session.get_modelmeta().custom_metadata_map["preprocessing"]
        found = torch.from_numpy(session.run(None, {image.name: x.numpy()})[0])
    else:
        files = {"preprocessing": ""}
        found = torch.export.load(file, extra_files=files).module()(x)
        described = files["preprocessing"]
    assert Preprocessing.from_dict(json.loads(described)) == trained.preprocessing
    assert trained.preprocessing.classes == tuple("0123456789")
    assert (trained.preprocessing.digit_size, trained.preprocessing.canvas) == (8, 20)
    off = (found - want).abs()
    assert off.max() < (0.05 if quantise else 1e-4) * want.abs().max()
    if not quantise:
        assert "eight bits" not in said
        return
    told = re.search(
        r"weights ([\d.,]+) -> ([\d.,]+) kB, outputs (\S+) off at most \(\S+% of the largest\), "
        r"(\S+) on average",
        said,
    )
    before, after, largest, mean = map(float, told.groups())
    assert after < 0.5 * before
    assert 0 < mean < largest < 0.05 * float(want.abs().max())
    assert off.max() > 0  # it is the eight-bit one that was written


def test_a_shared_folder_becomes_a_program(run, tmp_path):
    command("share", run, tmp_path / "shared")
    command("export", tmp_path / "shared", "--to", "torch", "--out", tmp_path / "model.pt2")
    trained, x = open_checkpoint(run).model, torch.randn(3, 1, 20, 20)
    with torch.no_grad():
        want = trained(x)
        found = torch.export.load(tmp_path / "model.pt2").module()(x)
    torch.testing.assert_close(found, want)


def test_a_size_that_does_not_fit_is_one_line(run, tmp_path):
    with pytest.raises(AssertionError):
        command("export", run, "--to", "torch", "--out", tmp_path / "m.pt2", "--size", "99")
    with pytest.raises(ValueError, match="image: got shape"):
        portable(open_checkpoint(run).model, torch.randn(2, 1, 99, 99))
    assert not (tmp_path / "m.pt2").exists()
