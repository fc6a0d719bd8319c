"""Programs for elsewhere: plain operators, torch.export, ONNX, AOTInductor, eight bits."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from translution import Layout, Translution2d, create_model
from translution.apps.export import export
from translution.functional import (
    neighborhood_attention,
    neighborhood_mix,
    offset_mix,
    offset_scores,
)
from translution.interop.export import (
    difference,
    example,
    open_program,
    plain,
    portable,
    quantise,
    save_program,
    stored_bytes,
)
from translution.interop.export.quantization import quantised
from translution.models.preprocessing import Preprocessing
from translution.neighborhoods import Neighborhood

VIT = {"image_size": 12, "patch_size": 4, "in_channels": 1, "num_classes": 5}
GPT = {"context": 9, "vocab_size": 11}
TINY = {"dim": 16, "depth": 2, "heads": 2}
STAGES = {"in_channels": 1, "num_classes": 5}

MODELS = {
    "vit translution": ("vit", VIT | TINY | {"mixer": "translution", "relative_depth": 1}),
    "vit kv mean": ("vit", VIT | TINY | {"depth": 1, "relative": "kv", "pool": "mean"}),
    "vit acmix": ("vit", VIT | TINY | {"mixer": "acmix", "depth": 1}),
    "gpt alpha": ("gpt", GPT | TINY | {"mixer": "alpha", "depth": 1}),
    "gpt bias": ("gpt", GPT | TINY | {"mixer": "bias", "depth": 1}),
    "gpt rotary": ("gpt", GPT | TINY | {"mixer": "rotary", "depth": 1, "kv_heads": 1}),
    "resnet acmix": ("resnet", STAGES | {"depths": (1, 1, 1, 1), "dim": 8, "heads": 2}),
    "san acmix": (
        "san",
        STAGES | {"depths": (1,) * 5, "dim": 16, "group_size": 4, "kernel_sizes": (3, 3, 5, 3, 3)},
    ),
    "pvt acmix": (
        "pvt",
        STAGES | {"depths": (1,) * 4, "dims": (8,) * 4, "heads": (1, 1, 2, 2), "image_size": 32},
    ),
    "swin acmix": (
        "swin",
        STAGES | {"depths": (2, 1, 1, 1), "dim": 8, "heads": (2,) * 4, "window_size": 3},
    ),
}


def made(name, **more):
    """Away from its start: tables have different entries."""
    family, options = MODELS[name]
    model = create_model(family, **options | more).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@functools.cache
def traced(name):
    """A model and its program for any batch, made once: tracing takes seconds."""
    model = made(name)
    return model, portable(model, inputs(model, 2))


def inputs(model, batch):
    return example(model, batch, None if hasattr(model, "blocks") else 32)


def same(found, want, off=1e-5):
    assert difference(found, want).share < off


# -- the operators --------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    grid = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    causal = len(grid) == 1 and draw(st.booleans())
    prefix = draw(st.integers(0, 2))
    return Layout(
        grid,
        causal=causal,
        window=draw(st.none() | st.integers(0, 3)),
        buckets=draw(st.none() | st.integers(1, 3)),
        dilation=draw(st.integers(1, 2)),
        prefix=prefix,
        prefix_queries=bool(prefix) and draw(st.booleans()),
    )


@given(
    layouts(), st.sampled_from(["qk", "q", "k"]), st.booleans(), st.sampled_from([1, 40, 1 << 22])
)
def test_offset_operators(layout, relative, biased, numbers):
    batch, heads, channels, inner = 2, 2, 3, 4
    kept = plain.NUMBERS
    plain.NUMBERS = numbers  # groups of one class, of some, of all
    try:
        x = {n: torch.randn(batch, layout.n_keys, channels) for n in "kv"}
        x["q"] = torch.randn(batch, layout.n_queries, channels)
        w = {n: torch.randn(layout.classes, channels, inner) for n in "qkv"}
        b = {n: torch.randn(layout.classes, inner) if biased else None for n in "qkv"}
        for n in set("qk") - set(relative):
            x[n], w[n], b[n] = torch.randn(*x[n].shape[:2], inner), None, None
        want = offset_scores(
            x["q"], x["k"], w["q"], w["k"], layout, heads=heads, scale=0.3,
            bias_query=b["q"], bias_key=b["k"],
        )  # fmt: skip
        scores = plain.Scores(layout, heads, 0.3, inner, 12)
        found = scores(x["q"], x["k"], w["q"], w["k"], b["q"], b["k"])
        torch.testing.assert_close(found, want)
        a = torch.randn(batch, heads, layout.n_queries, layout.n_keys)
        want = offset_mix(a, x["v"], w["v"], layout, bias_value=b["v"])
        found = plain.Mix(layout, heads, inner, 12)(a, x["v"], w["v"], b["v"])
        torch.testing.assert_close(found, want)
    finally:
        plain.NUMBERS = kept


def test_groups_are_few_and_hold_each_pair_once():
    layout = Layout((14, 14), prefix=1)
    groups = plain.groups(layout, 64, 64)
    cells = torch.cat([group.flat for group in groups])
    real = cells[cells < 197 * 197]
    assert real.sort().values.equal(torch.arange(197 * 197))
    assert len(groups) < 12
    assert len(cells) < 2 * len(real)
    narrow = plain.groups(layout, plain.NUMBERS // 300, 64)
    assert max(len(group.flat) for group in narrow) <= 300
    tables = plain.groups(layout, 64, plain.TABLE // 5)
    assert max(len(group.classes) for group in tables) <= 5


def test_no_pairs():
    layout = Layout((3,)).select(queries=[])
    x = torch.randn(2, 3, 4)
    w = torch.randn(layout.classes, 4, 4)
    assert plain.Scores(layout, 1, 1.0, 4)(x[:, :0], x, w, w).shape == (2, 1, 0, 3)
    assert plain.Mix(layout, 1, 4, 16)(torch.randn(2, 1, 0, 3), x, w).shape == (2, 0, 4)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_neighborhood_operators(size, kernel, stride, dilation):
    area = Neighborhood.of(size, kernel, stride, dilation)
    q = torch.randn(2, 2, *area.out, 3)
    k, v = torch.randn(2, 2, *size, 3), torch.randn(2, 2, *size, 4)
    want, lse = neighborhood_attention(q, k, v, kernel, stride, dilation, return_lse=True)
    torch.testing.assert_close(plain.Attention(area, 3**-0.5)(q, k, v), want)
    torch.testing.assert_close(plain.LogSumExp(area, 3**-0.5)(q, k), lse)
    weights, value = torch.randn(2, 3, area.taps, *area.out), torch.randn(2, 6, *size)
    want = neighborhood_mix(weights, value, kernel, stride, dilation)
    torch.testing.assert_close(plain.NeighborhoodMix(area)(weights, value), want)


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_program_for_any_batch(name):
    model, program = traced(name)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if target.startswith("translution")]
    for batch in (1, 3):
        x = inputs(model, batch)
        same(program.module()(x), model(x))


def test_a_program_for_one_batch(tmp_path):
    model = made("vit kv mean").train()
    x = inputs(model, 1)
    program = portable(model, x, dynamic=False)
    assert model.training
    same(program.module()(x), model.eval()(x))
    with pytest.raises(ValueError, match="x: got a batch of 1, want at least 2"):
        portable(model, x)
    file = tmp_path / "model.pt2"
    assert save_program(program, "torch", file) == file.stat().st_size
    code = f"""
import sys, torch
program = torch.export.load({str(file)!r})
assert not [name for name in sys.modules if name.startswith("translution")]
print(tuple(program.module()(torch.zeros(1, 1, 12, 12)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "(1, 5)", done.stderr


@pytest.mark.parametrize("name", ["vit kv mean", "swin acmix"])
def test_compile_with_any_batch(name):
    torch._dynamo.reset()
    model = made(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = inputs(model, batch)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            same(compiled(x), model(x))


@pytest.mark.parametrize("name", ["vit kv mean", "gpt bias", "resnet acmix"])
def test_onnx(tmp_path, name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, program = traced(name)
    file = tmp_path / "model.onnx"
    size = save_program(program, "onnx", file)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    assert size == file.stat().st_size
    run = open_program("onnx", file)
    for batch in (1, 3):
        x = inputs(model, batch)
        same(run(x), model(x))
    session = onnxruntime.InferenceSession(file)
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    assert x.shape[0] == y.shape[0] == "batch"
    assert (x.name, y.name) == ("ids" if "gpt" in name else "image", "logits")
    assert not session.get_modelmeta().custom_metadata_map


def test_onnx_of_one_batch(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    program = portable(torch.nn.Linear(3, 2), torch.randn(4, 3), dynamic=False)
    save_program(program, "onnx", tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.get_inputs()[0].shape == [4, 3]


def test_large_onnx_lies_in_two_files(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("translution.interop.export.files.ONE_FILE", 10_000)
    model = torch.nn.Linear(64, 64)
    save_program(portable(model, torch.randn(2, 64)), "onnx", tmp_path / "a.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    x = torch.randn(3, 64)
    same(open_program("onnx", tmp_path / "a.onnx")(x), model(x))


@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs g++")
@pytest.mark.parametrize("name", ["vit kv mean", "gpt alpha"])
def test_aoti(tmp_path, name):
    """Whole models: of images, and causal."""
    model, program = traced(name)
    file = tmp_path / "model.pt2"
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        save_program(program, "aoti", file)
    run = open_program("aoti", file)
    for batch in (1, 3):
        x = inputs(model, batch)
        same(run(x), model(x))


# -- eight bits -----------------------------------------------------------------------------------


@given(st.sampled_from([(4, 6), (3, 5, 2)]), st.integers(-6, 6))
def test_rounding(shape, power):
    weight = torch.randn(shape) * 10.0**power
    weight[0] = 0  # a row of zeros stays one
    axes = tuple(range(1, len(shape)))
    values, scale = quantised(weight, axes)
    assert values.dtype == torch.int8
    assert values[1:].abs().amax(axes).eq(127).all()  # symmetric, nothing unused
    assert ((values * scale - weight).abs() <= scale * 0.5001).all()
    assert not values[0].any()


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits(name):
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = quantise(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    x = inputs(model, 3)
    assert difference(small(x), model(x)).share < 0.05
    assert not [m for m in small.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    # what the eight bits stand for, computed in the usual way
    whole = made(name)
    whole.load_state_dict({key: weight_of(small, key) for key in whole.state_dict()})
    same(small(x), whole(x), 1e-4)
    again = quantise(made(name))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def weight_of(small, key):
    path, _, name = key.rpartition(".")
    return getattr(small.get_submodule(path), name).data


def test_eight_bits_with_biases_and_size():
    layer = Translution2d(
        32, grid=(3, 3), heads=2, qkv_bias=True, prefix=1, init="independent"
    ).eval()
    for name in "qkv":
        torch.nn.init.normal_(getattr(layer, f"{name}_proj").bias)
    small, x = quantise(layer), torch.randn(2, 10, 32)
    assert difference(small(x), layer(x)).share < 0.03
    assert stored_bytes(small) < 0.3 * stored_bytes(layer)
    small = small.to(torch.bfloat16)
    assert difference(small(x.bfloat16()).float(), layer(x)).share < 0.1


def test_eight_bits_as_a_program(tmp_path):
    model = quantise(made("vit kv mean"))
    program = portable(model, inputs(model, 2))
    assert any(t.dtype == torch.int8 and t.ndim == 3 for t in program.state_dict.values())
    x = inputs(model, 3)
    same(program.module()(x), model(x))


def test_what_cannot_be_quantised():
    model = made("vit kv mean")
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: got weights that are not finite"):
        quantise(model)
    layer = Translution2d(8, grid=(2, 2), heads=2)
    layer.q_proj.shard = (0, 2)
    with pytest.raises(ValueError, match="model: got a table divided over 2 processes"):
        quantise(layer)


# -- files and the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("tflite", "a.pt2", "to: got 'tflite', want one of"),
        ("onnx", "a.pt2", "want a name that ends in .onnx"),
        ("torch", "none/a.pt2", "want a path in a folder that exists"),
    ],
)
def test_bad_files(tmp_path, kind, name, said):
    with pytest.raises(ValueError, match=said):
        save_program(None, kind, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"to: got 'aoti', which needs a C\+\+ compiler"):
        save_program(None, "aoti", tmp_path / "a.pt2")


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.pt2"
    file.write_text("old")

    def fail(program, path, metadata):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("translution.interop.export.files._write_torch", fail)
    with pytest.raises(OSError, match="disk full"):
        save_program(None, "torch", file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr("translution.models.create_model", lambda name: made(name))
    app = Typer(pretty_exceptions_enable=False)
    app.command()(export)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(command, tmp_path):
    file = tmp_path / "a.pt2"
    done = command("vit kv mean", "--to", "torch", "--out", file, "--quantise", "--check")
    assert done.exit_code == 0, done
    assert "largest difference" in done.stdout
    assert "eight bits: weights" in done.stdout
    assert open_program("torch", file)(torch.randn(4, 1, 12, 12))[0].shape == (4, 5)


def test_the_command_says_so_where_the_file_is_wrong(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "translution.interop.export.files.open_program", lambda *_: lambda x: torch.zeros(len(x), 5)
    )
    file = tmp_path / "a.pt2"
    done = command("vit kv mean", "--to", "torch", "--out", file, "--batch", 1)
    assert done.exit_code == 1
    assert "more than 0.001 of the largest output" in done.stdout


def test_the_command_refuses(command, tmp_path):
    for words, said in (
        (("--to", "torch", "--batch", "x"), "batch: got 'x', want 'dynamic'"),
        (("--to", "onnx"), "want a name that ends in .onnx"),
    ):
        done = command("vit kv mean", "--out", tmp_path / "a.pt2", *words)
        assert said in str(done.exception)


def test_examples():
    assert example(made("gpt bias"), 2).shape == (2, 9)
    assert example(made("gpt bias"), 2, 4).shape == (2, 4)
    assert example(made("vit kv mean"), 1).shape == (1, 1, 12, 12)
    anysize = made("resnet acmix")
    assert example(anysize, 1).shape == (1, 1, 224, 224)
    anysize.preprocessing = Preprocessing((32, 64), 1, (0.5,), (0.5,))
    assert example(anysize, 1).shape == (1, 1, 32, 64)
    assert example(anysize, 1, 96).shape == (1, 1, 96, 96)
    with pytest.raises(ValueError, match=r"found: got shape \(2,\), want \(3,\)"):
        difference(torch.zeros(2), torch.zeros(3))
    found = difference(
        [torch.tensor([1.0, 2]), torch.tensor([[4.0]])], [torch.zeros(2), torch.ones(1, 1)]
    )
    assert found == (3.0, 3.0, 2.0)  # largest, share, mean
