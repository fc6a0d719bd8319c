from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace

import pytest
import torch

from translution import Layout, create_model, vit
from translution.apps import cli
from translution.apps.bench import command
from translution.apps.bench.cases import OPERATORS, Case
from translution.apps.bench.dense import dense_bytes, dense_translution
from translution.apps.bench.measure import measure, measure_dense, step
from translution.apps.bench.steps import published_bytes
from translution.apps.bench.unfold import unfold_acmix
from translution.backends.torch import per_token
from translution.functional import offset_mix, offset_scores
from translution.models import registry
from translution.modules import ACmix2d
from translution.utils import measuring
from translution.utils.measuring import peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit code, what it printed, its errors)."""
    monkeypatch.setattr("translution.apps.bench.measure.copy_rate", lambda device: 1e9)
    small = functools.partial(measuring.matmul_rate, size=64)
    monkeypatch.setattr("translution.apps.bench.measure.matmul_rate", small)

    def call(*arguments, command="bench"):
        monkeypatch.setattr(sys, "argv", ["translution", command, *arguments])
        monkeypatch.setenv("COLUMNS", "120")
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


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "acmix"])
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


@pytest.mark.parametrize(("stride", "published"), [(1, False), (2, True)])
def test_unfold_is_the_same_acmix(stride, published):
    layer = ACmix2d(3, 8, 2, 3, stride=stride, published=published).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    fast, slow = layer(x), unfold_acmix(layer, x)
    torch.testing.assert_close(fast, slow)
    up, leaves = torch.randn_like(fast), [x, *layer.parameters()]
    grads = [torch.autograd.grad(y, leaves, up) for y in (fast, slow)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_acmix_case(stride, backward):
    case = Case("acmix", (14, 12), False, 16, 2, 3, torch.float32, kernel=5, stride=stride)
    built = OPERATORS["acmix"](case, CPU)
    y = built.forward()
    assert y.shape == (3, 16, 14 // stride, 12 // stride)
    torch.testing.assert_close(built.dense(), y, rtol=1e-4, atol=1e-5)
    # once for a batch, and not counted: projecting the coordinates, folding fc into the shifts
    once = 2 * (14 * 12 * 2 * 8 + 16 * 9 * 9 * 6)
    assert built.flops == 2 * measuring.multiply_adds(built.forward) - once
    taken = peak_bytes(step(built.dense, built.leaves, backward), CPU)
    assert 0.7 < taken / built.dense_bytes(backward) < 2


@pytest.mark.parametrize("relative", ["qkv", "kv", ""])
def test_flops_of_products(relative):
    """A relative projection counts 2 · batch · pairs · width², a shared one tokens for pairs."""
    case = Case("translution", (2, 3), False, 8, 2, 5, torch.float32, relative)
    built = OPERATORS["translution"](case, CPU)
    unit = 2 * 5 * 8 * 8
    assert built.flops == unit * (36 * len(relative) + 6 * (3 - len(relative)))


def test_buckets_are_compared_with_a_projection_per_pair():
    case = Case("translution", (64,), True, 32, 2, 4, torch.float32, "v", buckets=2)
    built = OPERATORS["translution"](case, CPU)
    keys = sum(int((case.layout.index == c).any(0).sum()) for c in range(case.layout.classes))
    assert 2 * 4 * 32 * 32 * (keys + 2 * 64) <= built.flops < 2 * 4 * 32 * 32 * (case.pairs + 128)
    row = measure(case, CPU, True, repeats=1, dense_limit=1e9)
    assert row["buckets"] == 2
    assert row["dense"]["batch"] == 4
    assert not per_token._never
    with per_token.never():
        assert OPERATORS["translution"](case, CPU).flops == 2 * 4 * 32 * 32 * (case.pairs + 128)


def test_dense_is_compared_at_the_batch_that_fits():
    case = Case("translution", (2, 3), False, 8, 2, 12, torch.float32)
    done = {}
    limit = dense_bytes(3, 6, 8, 8, True)
    found = measure_dense(case, CPU, True, 1, limit, done)
    assert found["batch"] == 3
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    built = OPERATORS["translution"](replace(case, batch=3), CPU)
    call = step(built.forward, built.leaves, True)
    call()  # draws the gradient that it then keeps
    assert found["own_peak_bytes"] == peak_bytes(call, CPU)
    assert measure_dense(case, CPU, True, 1, limit, done) is found
    assert measure_dense(case, CPU, True, 1, 100.0, done) is None


SMALL = ("--grid", "2x3,4", "--width", "8", "--batch", "2", "--repeats", "1")


def test_command(tmp_path, run):
    file = tmp_path / "rows.json"
    code, out, err = run(*SMALL, "--json", str(file))
    assert code == 0, err
    assert "of the matmul rate" in out
    assert " time, ×" in out
    told = json.loads(file.read_text())
    assert told["machine"]["torch"] == torch.__version__
    assert "commit" in told["machine"]
    assert len(told["rows"]) == 4
    for row in told["rows"]:
        assert row["seconds"] > 0
        assert row["beside_seconds"] > 0
        assert row["peak_bytes"] > 0
        assert row["bytes"] > 0
        assert row["matmul_share"] == row["flops"] / row["seconds"] / row["matmul_rate"]
        assert row["dense"]["batch"] == 2
        assert row["dense"]["peak_bytes"] > 0
        assert row["dense_bytes_by_shape"] > 0
    assert [row["flops"] for row in told["rows"][:2]] == [3 * 2 * 2 * 36 * 64, 9 * 2 * 2 * 36 * 64]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_shapes_of_an_operator():
    def shapes(operator, grid="", width="", batch="", device="cpu"):
        return command._shapes(operator, device, grid, width, batch)

    assert shapes("acmix")[0] == ("56x56", 64, 8)
    assert shapes("acmix", "28x28,9", batch="2") == [("28x28", 128, 2), ("9", 64, 2)]
    assert len(shapes("translution")) == 6
    assert shapes("alpha", width="32", batch="1") == [("7x7", 32, 1), ("14x14", 32, 1)]
    assert ("1024c", 768, 8) in shapes("translution", device="cuda")
    assert command.parse_grid("256c") == ((256,), True)


def test_two_dtypes_and_another_backend(run):
    code, out, err = run(
        "--grid", "3c", "--width", "4", "--heads", "1", "--batch", "1", "--repeats", "1",
        "--dtype", "float32,bfloat16", "--backend", "triton",
    )  # fmt: skip
    assert code == 0, err
    assert "÷ torch" in out
    assert out.count("bfloat16") == 3
    assert "3c" in out


def test_acmix_in_the_command(run):
    code, out, err = run("--operator", "acmix", "--grid", "8x6", "--width", "8", "--kernel", "3")
    assert code == 0, err
    assert "unfold" in out
    assert "× conv." in out


def test_against_compares_equal_rows_alone(tmp_path, run):
    file = tmp_path / "rows.json"
    assert run(*SMALL, "--json", str(file), "--no-dense")[0] == 0
    told = json.loads(file.read_text())
    for row in told["rows"]:
        row["seconds"] = 1e9  # every ratio to it is 0.00
    told["machine"].update(cpu="another machine", gpu="another machine")
    file.write_text(json.dumps(told))
    _, out, err = run(*SMALL, "--against", str(file), "--no-dense")
    assert "÷ earlier" in out, err
    assert "earlier: another machine" in out
    ends = [
        line.split()[-1] for line in out.splitlines() if " forward " in line or " both " in line
    ]
    assert ends == ["0.00"] * 4
    _, out, err = run(*SMALL, "--against", str(file), "--no-dense", "--dtype", "float64")
    ends = [
        line.split()[-1] for line in out.splitlines() if " forward " in line or " both " in line
    ]
    assert ends == ["none"] * 4, err


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, run, monkeypatch):
    left = [1, 1]
    real = command.measure

    def stopping(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*arguments)

    monkeypatch.setattr(command, "measure", stopping)
    file = tmp_path / "rows.json"
    assert run(*SMALL, "--no-dense", "--json", str(file))[0] == 130
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_dense_that_does_not_fit_is_told_in_bytes(run):
    _, out, err = run(*SMALL, "--dense-limit", "1e-9")
    assert out.count("not run: ") == 4, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "7by7"], "grid: got '7by7'"),
        (["--width", "a"], "width: got 'a'"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--operator", "conv"], "operator: got 'conv'"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--device", "mps"], "device: got 'mps'"),
        (["--heads", "5"], "heads: got 5"),
        (["--heads", "-1"], "heads: got -1"),
        (["--batch", "0"], "batch: got '0'"),
        (["--repeats", "0"], "repeats: got 0"),
        (["--rank", "0"], "rank: got 0"),
        (["--relative", "qq"], "relative: got 'qq'"),
        (["--relative", "x"], "relative: got 'x'"),
        (["--dense-limit", "-1"], "dense-limit: got -1"),
        (["--dense-limit", "nan"], "dense-limit: got nan"),
        (["--json", "nowhere/rows.json"], "json: got nowhere/rows.json"),
        (["--json", "/"], "json: got the folder /"),
        (["--operator", "acmix", "--grid", "49"], "grid: got (49,), acmix wants two axes"),
        (["--operator", "acmix", "--stride", "0"], "stride: got 0"),
        (["--operator", "acmix", "--kernel", "4"], "kernel: got 4, want an odd"),
        (["--grid", "7x7c"], "causal: needs a grid of one axis"),
        (["--backend", "cudnn"], "backend: got 'cudnn'"),
        (["--against", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, run, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"rows": 3}', '{"machine": {}, "rows": []}'])
def test_against_something_else(content, tmp_path, run):
    file = tmp_path / "rows.json"
    file.write_text(content)
    code, _, err = run("--against", str(file))
    assert code == 2
    assert err.startswith("translution: against: ")
    assert len(err.strip().splitlines()) == 1


def test_published_bytes_are_those_of_the_paper():
    """118 GB for the smallest ViT at 224/16, batch 1, and 7 TB at batch 64."""
    with torch.device("meta"):
        model = create_model("translution_vit_tiny_patch16_224", full_last_block=True)
    assert published_bytes(model, 1) / 1e9 == pytest.approx(118, rel=0.01)
    assert published_bytes(model, 64) / 1e12 == pytest.approx(7, rel=0.01)


TINY_STEP = ("--batch", "2", "--repeats", "1")


@pytest.fixture
def tiny(monkeypatch):
    """The name of a model that exists during a test alone."""
    options = {
        "size": "tiny", "mixer": "translution", "image_size": 8, "patch_size": 4, "dim": 8,
        "depth": 2, "heads": 1, "head_dim": 8, "num_classes": 3,
    }  # fmt: skip
    monkeypatch.setitem(registry._MODELS, "translution_vit_test", (vit, options))
    return "translution_vit_test"


def test_bench_step(tmp_path, run, tiny):
    file = tmp_path / "rows.json"
    code, out, err = run(
        "--model", tiny, "--relative", "qkv,v", "--checkpoint", "none,full", *TINY_STEP,
        "--json", str(file), command="bench-step",
    )  # fmt: skip
    assert code == 0, err
    assert "images/s" in out
    rows = json.loads(file.read_text())["rows"]
    assert [(row["relative"], row["checkpoint"]) for row in rows] == [
        ("qkv", "none"), ("qkv", "full"), ("v", "none"), ("v", "full"),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0
        # weights, gradients and two states, and what the step holds beside them
        assert row["peak_bytes"] > 4 * 4 * row["parameters"]
        assert row["images_per_second"] == 2 / row["seconds"]
    assert rows[0]["published_bytes"] > rows[2]["published_bytes"]


def test_a_step_that_does_not_fit_is_a_row(run, tiny, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("translution.apps.bench.steps._run", full)
    code, out, err = run("--model", tiny, *TINY_STEP, command="bench-step")
    assert code == 0, err
    assert "out of memory" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--model", "resnet26"], "model: got 'resnet26', want a ViT"),
        (["--model", "alpha_gpt_tiny"], "model: got 'alpha_gpt_tiny', want a ViT"),
        (["--batch", "0"], "batch: got '0'"),
        (["--batch", "x"], "batch: got 'x'"),
        (["--checkpoint", "some"], "checkpoint: got 'some'"),
        (["--weights", "int8"], "weights: got 'int8'"),
        (["--json", "/"], "json: got the folder /"),
    ],
)
def test_bench_step_refuses_in_one_line(arguments, message, run):
    code, _, err = run(*arguments, command="bench-step")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
