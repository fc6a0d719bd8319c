"""Converted models as programs that need neither this library nor transformers."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from translution.apps.export import export
from translution.interop.conversion import convert, save_converted
from translution.interop.export import difference, example, portable

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")


def original(name):
    t = transformers
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8,
            intermediate_size=32, num_labels=5,
        )  # fmt: skip
        return t.ViTForImageClassification(config).eval()
    config = t.GPT2Config(vocab_size=31, n_embd=24, n_layer=1, n_head=4, n_positions=12,
                          bos_token_id=0, eos_token_id=30)  # fmt: skip
    return t.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_a_folder_is_exported(tmp_path, name):
    model = original(name)
    convert(model, relative="v")
    save_converted(model, tmp_path / "saved")
    out = tmp_path / "a.pt2"
    app = typer.Typer()
    app.command()(export)
    words = [str(tmp_path / "saved"), "--to", "torch", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    program = torch.export.load(str(out))
    assert not any("translution" in str(node.target) for node in program.graph.nodes)
    x = example(model, 3)
    with torch.no_grad():
        assert difference(program.module()(x)[0], model(x)[0]).share < 1e-5


def test_the_model_keeps_its_caches():
    model = original("gpt2")
    convert(model, relative="v")
    portable(model, example(model, 2))
    assert model.config.use_cache
