from __future__ import annotations

import functools
import json
import sys

import pytest
import torch

from translution import Layout, cli, measuring
from translution.bench.cases import OPERATORS, Case
from translution.bench.dense import dense_bytes, dense_translution
from translution.functional import offset_mix, offset_scores
from translution.measuring import peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit code, what it printed, its errors)."""
    small = functools.partial(measuring.matmul_rate, size=64)
    monkeypatch.setattr("translution.bench.command.matmul_rate", small)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["translution", "bench", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_peak_bytes_of_known_allocations():
    def call():
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(250_000)
        return second.sum()

    assert 4_000_000 <= peak_bytes(call, CPU) < 4_010_000
    assert peak_bytes(lambda: None, CPU) == 0


def test_dense_gather_is_the_same_operator():
    layout, heads = Layout((2, 3)), 2
    leaves = [torch.randn(2, 6, 4), *(torch.randn(layout.classes, 4, 6) for _ in "qkv")]
    leaves = [t.double().requires_grad_() for t in leaves]
    x, wq, wk, wv = leaves
    s = offset_scores(x, x, wq, wk, layout, heads=heads, scale=3**-0.5)
    fast = offset_mix(s.softmax(-1), x, wv, layout)
    slow = dense_translution(*leaves, layout.index, heads)
    torch.testing.assert_close(fast, slow)
    up = torch.randn_like(fast)
    grads = [torch.autograd.grad(y, leaves, up) for y in (fast, slow)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backward", [False, True])
def test_dense_bytes_is_what_it_takes(backward):
    layout, batch, channels = Layout((3, 3)), 4, 16
    leaves = [torch.randn(batch, 9, channels)]
    leaves += [torch.randn(layout.classes, channels, channels) for _ in "qkv"]

    def call():
        for t in leaves:
            t.requires_grad_(backward)
        y = dense_translution(*leaves, layout.index, 2)
        return torch.autograd.grad(y.sum(), leaves) if backward else y

    predicted = dense_bytes(batch, 9, channels, channels, backward)
    assert 0.8 < peak_bytes(call, CPU) / predicted < 1.4


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("grid", "causal"), [((2, 3), False), ((5,), True)])
def test_cases_run(operator, grid, causal):
    case = Case(operator, grid, causal, 8, 2, 3, torch.float32, rank=2)
    built = OPERATORS[operator](case, CPU)
    y = built.forward()
    assert y.shape == (3, case.layout.tokens, 8)
    torch.autograd.grad(y.sum(), built.leaves)
    if operator == "translution":
        assert case.pairs == (15 if causal else 36)
        assert built.flops == 3 * 2 * 3 * case.pairs * 8 * 8


def test_command(tmp_path, run):
    small = ("--grid", "2x3,4", "--width", "8", "--batch", "2", "--repeats", "1")
    file = tmp_path / "rows.json"
    code, out, err = run(*small, "--json", str(file))
    assert code == 0, err
    assert "matmul share" in out
    told = json.loads(file.read_text())
    assert told["machine"]["torch"] == torch.__version__
    assert len(told["rows"]) == 4
    for row in told["rows"]:
        assert row["seconds"] > 0
        assert row["matmul_share"] == row["flops"] / row["seconds"] / row["matmul_rate"]
        assert row["dense_peak_bytes"] > 0
    code, out, err = run(*small, "--against", str(file), "--no-dense")
    assert "÷ earlier" in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "7by7"], "grid: got '7by7'"),
        (["--width", "a"], "width: got 'a'"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--operator", "conv"], "operator: got 'conv'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--heads", "5"], "heads: got 5"),
        (["--causal"], "causal: needs a grid of one axis"),
        (["--against", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, run):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
