"""Converted models save themselves with what was converted, and load again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from translution import Translution2d
from translution.interop.conversion import (
    Converted,
    convert,
    load_converted,
    make_relative,
    make_shared,
    resize_offsets,
    save_converted,
)

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 31, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4}
LLAMA = TEXT | {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip


def original(name):
    t = transformers
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8,
            intermediate_size=32, num_labels=5,
        )  # fmt: skip
        return t.ViTForImageClassification(config).eval()
    if name == "gpt2":  # the weights of its ends are tied
        config = t.GPT2Config(vocab_size=31, n_embd=24, n_layer=3, n_head=4, n_positions=64,
                              bos_token_id=0, eos_token_id=30)  # fmt: skip
        return t.GPT2LMHeadModel(config).eval()
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)).eval()
    if name == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**LLAMA)).eval()
    config = t.BertConfig(**TEXT, intermediate_size=32, max_position_embeddings=64)
    return t.BertModel(config).eval()


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": torch.randint(2, 30, (2, 11))}


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def several(model):
    """Converted in two ways, changed further, and some layers left as they are."""
    convert(model, layers=[0], relative="v")
    convert(model, layers=[2], to="alpha", relative="qv", rank=3)
    make_relative(model, "k")


def rotary_in_the_table(model):
    convert(model, layers=[1], relative="qk", grid=16)
    make_shared(model, "q")


CHANGES = [
    ("vit", several),
    ("vit", lambda model: (convert(model, layers=2, relative="qkv"), resize_offsets(model, 3))),
    ("vit", lambda model: (convert(model), make_shared(model, "v"))),
    ("vit", lambda model: (convert(model), resize_offsets(model, window=2))),
    ("bert", several),
    ("gpt2", several),
    ("llama", lambda model: convert(model, layers=2)),
    ("llama", lambda model: convert(model, to="alpha", relative="qkv", grid=20)),
    ("llama", rotary_in_the_table),
    ("llama", lambda model: (convert(model), make_shared(model, "v"))),  # heads in groups
    ("qwen3", lambda model: convert(model, relative="v")),
]


@pytest.mark.parametrize("given_original", [False, True])
@pytest.mark.parametrize(("name", "change"), CHANGES)
@torch.no_grad()
def test_round_trip(tmp_path, name, change, given_original):
    model = original(name)
    change(model)
    shaken(model)
    x = inputs(name)
    if name == "vit" and next(m for m in model.modules() if isinstance(m, Converted)):
        grid = next(m.layer.layout.grid for m in model.modules() if isinstance(m, Converted))
        x = {"pixel_values": torch.randn(2, 3, *(8 * n for n in grid))}
        x["interpolate_pos_encoding"] = True
    want = model(**x)[0]
    save_converted(model, tmp_path / "saved")
    again = load_converted(tmp_path / "saved", original(name) if given_original else None)
    assert not again.training
    assert torch.equal(again(**x)[0], want)
    assert again.state_dict().keys() == model.state_dict().keys()
    kinds = [[(n, str(m.layer)) for n, m in each.named_modules() if isinstance(m, Converted)]
             for each in (model, again)]  # fmt: skip
    assert kinds[0] == kinds[1]
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
    save_converted(again, tmp_path / "again")
    files = [tmp_path / folder / "conversion.json" for folder in ("saved", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_text_goes_on_and_trains(tmp_path):
    model = original("gpt2")
    convert(model, relative="kv")
    save_converted(shaken(model), tmp_path)
    again = load_converted(tmp_path)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(2, 30, (2, 5))
    assert torch.equal(again.generate(ids, **given), model.generate(ids, **given))
    assert again.lm_head.weight is again.transformer.wte.weight
    again(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in again.parameters())


def test_bfloat16_and_a_device_of_the_original(tmp_path):
    model = original("vit").to(torch.bfloat16)
    convert(model, relative="v")
    save_converted(model, tmp_path)
    assert {p.dtype for p in load_converted(tmp_path).parameters()} == {torch.bfloat16}
    wide = load_converted(tmp_path, original("vit").double().train())
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.training


def test_models_of_torch_need_the_original(tmp_path):
    def make():
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    model, x = make(), torch.randn(2, 9, 16)
    convert(model, grid=9, relative="kv")
    shaken(model)
    save_converted(model, tmp_path)
    with pytest.raises(ValueError, match=r"model: got None, but .* how to build the original"):
        load_converted(tmp_path)
    assert torch.equal(load_converted(tmp_path, make())(x), model(x))


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_the_hosts_own_loading_refuses_the_folder(tmp_path, name):
    model = original(name)
    convert(model)
    save_converted(model, tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        type(model).from_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "conversion.json", "converted.safetensors",
    ]  # fmt: skip


def broken(tmp_path, **changes):
    path = tmp_path / "conversion.json"
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(about))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model: got ViTForImage.*want one that `convert` has"):
        save_converted(original("vit"), tmp_path)
    with pytest.raises(ValueError, match="model: got int"):
        save_converted(3, tmp_path)
    with pytest.raises(ValueError, match=r"holds no conversion\.json"):
        load_converted(tmp_path)
    model = original("vit")
    convert(model, layers=[1])
    wrapped = copy.deepcopy(model)
    layer = next(m.layer for m in wrapped.modules() if isinstance(m, Converted))
    layer.q_proj = nn.Sequential(layer.q_proj)
    with pytest.raises(ValueError, match=r"layer\.q_proj: is a Sequential.*merge adapters first"):
        save_converted(wrapped, tmp_path)
    assert not list(tmp_path.iterdir())

    save_converted(model, tmp_path)
    with pytest.raises(ValueError, match="model: got nothing at vit"):
        load_converted(tmp_path, original("gpt2"))
    with pytest.raises(ValueError, match="model: got Converted at vit"):
        load_converted(tmp_path, model)
    other = original("vit")
    other.classifier = nn.Linear(24, 7)
    with pytest.raises(ValueError, match=r"classifier\.weight has shape \(5, 24\), want \(7, 24\)"):
        load_converted(tmp_path, other)
    assert not any(isinstance(m, Converted) for m in other.modules())

    kept = (tmp_path / "conversion.json").read_text()
    config = json.loads(kept)["host"]["config"]
    host = {"library": "transformers", "class": "ViTForImageClassification"}
    for changes, message in (
        ({"format": "translution-conversion-9"}, "format 'translution-conversion-9', want"),
        ({"format": "other-1"}, "format 'other-1', want"),
        ({"layers": [{}]}, "not a description of a converted model"),
        ({"layers": 3}, "not a description of a converted model"),
        ({"host": {"library": "os", "class": "system"}}, "names no model of transformers"),
        (
            {"host": host | {"config": config | {"num_hidden_layers": 10**9}}},
            "num_hidden_layers is 1000000000, but the folder holds only",
        ),
        (
            {"host": host | {"config": config | {"intermediate_size": 10**10}}},
            r"does not fit the model: .*want \(10000000000,",
        ),
    ):
        broken(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_converted(tmp_path)
        (tmp_path / "conversion.json").write_text(kept)

    weights = (tmp_path / "converted.safetensors").read_bytes()
    (tmp_path / "converted.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_converted(tmp_path)
    (tmp_path / "converted.safetensors").unlink()
    with pytest.raises(ValueError, match=r"converted\.safetensors: is missing"):
        load_converted(tmp_path)


def test_divided_tables_are_refused(tmp_path):
    from translution.modules.projections import sharding

    model = original("vit")
    convert(model, layers=[0], relative="q")
    layer = next(m for m in model.modules() if isinstance(m, Converted))
    with sharding((0, 2)):
        divided = Translution2d(24, (4, 4), heads=3, prefix=1, relative="q")
    layer.layer.q_proj = divided.q_proj
    with pytest.raises(ValueError, match="divided over processes, want whole ones"):
        save_converted(model, tmp_path)


@torch.no_grad()
def test_a_shared_table_of_grouped_heads_computes_the_same():
    model, x = original("llama"), inputs("llama")
    want = model(**x)[0]
    convert(model)
    make_shared(model, "v")
    torch.testing.assert_close(model(**x)[0], want, rtol=1e-5, atol=1e-5)
