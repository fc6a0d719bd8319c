"""`translution models`: what models cost, counted from shapes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from translution import create_model, list_models
from translution.apps.catalogue import counts
from translution.apps.catalogue.command import models, parameters, short
from translution.apps.catalogue.table import counted, read_table
from translution.utils.measuring import multiply_adds, peak_bytes

SMALL = {"dim": 32, "depth": 2, "heads": 2}
MADE = {
    "vit": {"mixer": "rotary", "image_size": 32, "patch_size": 4, "num_classes": 10},
    "gpt": {"mixer": "attention", "context": 48, "vocab_size": 100},
}


def bare(make):
    """`counts.costs` of a model that `make` gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "create_model", lambda name: make())
        return counts.costs("any"), counts.entry("any")


class Known(nn.Module):
    """Counted by hand."""

    config = type("Config", (), {"mixer": "attention", "in_channels": 3, "image_size": (4, 4)})

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 8)
        self.register_buffer("table", torch.zeros(10))

    def forward(self, image):
        x = self.layer(image.flatten(1))  # [1, 8]: 32 bytes
        return (x * x).relu()  # two more of 32


def test_by_hand():
    found, entry = bare(Known)
    assert (entry.parameters, entry.input, entry.mixer) == (392, (3, 4, 4), "attention")
    assert found.multiply_adds == 48 * 8
    assert (found.weights, found.parameter_bytes) == (1608, 1568)
    assert found.activations == 96  # x, x * x and its relu
    assert found.saved == 192 + 32 + 32  # the image for the weight, x for x * x, relu's result
    assert found.inference(3) == 1608 + 3 * 96
    assert found.training(2) == 1608 + 3 * 1568 + 2 * 256


@pytest.mark.parametrize("family", MADE)
def test_against_real_runs(family):
    """About the memory that is measured."""

    def make():
        return create_model(family, **SMALL | MADE[family])

    found, entry = bare(make)
    model = make().eval()
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert entry.family == family
    x = torch.randn(4, *entry.input) if family == "vit" else torch.zeros(4, 48, dtype=torch.int64)
    out = []
    with torch.no_grad():
        real = peak_bytes(lambda: out.append(model(x)), torch.device("cpu"))
    assert 0.7 * real < 4 * found.activations < 1.3 * real
    model.train()
    real = peak_bytes(lambda: out.append(model(x)), torch.device("cpu"))
    assert 0.7 * real < 4 * found.saved < 1.3 * real


def test_multiply_adds_are_those_of_a_real_run():
    def make():
        return create_model("gpt", **SMALL | MADE["gpt"] | {"mixer": "translution"})

    with torch.no_grad():
        real = multiply_adds(lambda: make()(torch.zeros(1, 48, dtype=torch.int64)))
    assert bare(make)[0].multiply_adds == real


def test_all_names_have_entries():
    for name in [n for n in list_models() if "large" not in n and "base" not in n]:
        assert counts.entry(name).parameters > 1000
    assert counts.entry("acmix_resnet26").input == (3, 224, 224)
    with pytest.raises(ValueError, match="did you mean"):
        counts.entry("acmix_resnet27")


def test_the_stored_table_is_what_is_counted():
    stored = read_table()
    assert sorted(stored) == list_models()
    for name in ("acmix_resnet26", "gpt", "bias_vit_tiny_patch56_224"):
        assert stored[name] == counted(name)


@pytest.fixture
def command():
    app = Typer(pretty_exceptions_enable=False)
    app.command()(models)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_json_filters_and_order(command):
    words = ("*vit_tiny_patch56*", "--max-parameters", "5M", "--sort", "parameters", "--json")
    rows = json.loads(command(*words).stdout)
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes)
    assert max(sizes) <= 5e6
    assert {row["mixer"] for row in rows} >= {"attention", "acmix"}
    assert set(rows[0]) == {
        "name", "family", "mixer", "input", "parameters", "multiply-adds", "inference", "training",
    }  # fmt: skip
    (only,) = json.loads(command(*words, "--mixer", "bias").stdout)
    assert only["name"] == "bias_vit_tiny_patch56_224"
    (more,) = json.loads(command(*words, "--mixer", "bias", "--batch", "2").stdout)
    assert more["training"] > only["training"]
    assert more["parameters"] == only["parameters"]


def test_the_table(command):
    done = command("acmix_resnet26")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("acmix_resnet26")]
    assert "3×224×224" in row
    assert "10.5 M" in row
    assert "2.2 G" in row


@pytest.mark.parametrize(("width", "all_columns"), [(80, False), (120, True)])
def test_the_table_fits_a_terminal(width, all_columns, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    models(batch=1000)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    numbers = ["parameters", "multiply-adds", "inference", "training"]
    assert lines[0].split() == ["name", *(["mixer", "input"] if all_columns else []), *numbers]
    names = [line.split()[0] for line in lines[1 : len(read_table()) + 1]]
    assert names == sorted(read_table())  # a line each


def test_numbers():
    assert [short(n) for n in (0, 999, 1000, 28_651_000, 999_700_000, 1.5e12, 4e15)] == [
        "0", "999", "1 k", "28.7 M", "1,000 M", "1.5 T", "4,000 T",
    ]  # fmt: skip
    assert [parameters(text) for text in ("30M", "2.5G", "7")] == [30_000_000, 2_500_000_000, 7]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing*",), "pattern: got 'nothing*', which no model's name matches"),
        (("vit", "--sort", "size"), "sort: got 'size', want one of"),
        (("vit", "--mixer", "mean"), "mixer: got 'mean', want one of"),
        (("vit", "--max-parameters", "many"), "max-parameters: got 'many', want a number"),
        (("vit", "--max-parameters", "-3"), "max-parameters: got '-3', want a number"),
        (("vit", "--max-parameters", "nan"), "max-parameters: got 'nan', want a number"),
        (("vit", "--max-parameters", "M"), "max-parameters: got 'M', want a number"),
    ],
)
def test_bad_options(command, words, said):
    done = command(*words)
    assert isinstance(done.exception, ValueError)
    assert said in str(done.exception)
