"""Models of other libraries give the outputs that they gave, with tables in them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from translution import Translution1d
from translution.interop.conversion import (
    Converted,
    convert,
    make_relative,
    make_shared,
    resize_offsets,
)

load_model, save_model = (
    getattr(pytest.importorskip("safetensors.torch"), f"{verb}_model") for verb in ("load", "save")
)
transformers = pytest.importorskip("transformers")

VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
TEXT = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = TEXT | {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}


def shaken(model):
    """Biases and norms start at 0 and 1; weights small: nothing of them would be seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15))
    return model.eval()


def image_model(name):
    more = {"vit": {"intermediate_size": 32}, "deit": {"intermediate_size": 32}}.get(name, {})
    t, kind = transformers, {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
    kind = kind.get(name, "Dinov2WithRegisters")
    config = getattr(t, f"{kind}Config")(**VIT, **more)
    if kind == "ViT":
        return shaken(t.ViTForImageClassification(config))
    return shaken(getattr(t, f"{kind}Model")(config))


def text_model(name, **more):
    t = transformers
    encoders = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}
    if name in encoders:
        more = {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0} | more
        config = getattr(t, f"{encoders[name]}Config")(**TEXT, **more)
        return shaken(getattr(t, f"{encoders[name]}Model")(config))
    if name == "gpt2":
        c = t.GPT2Config(
            vocab_size=31, n_embd=24, n_layer=2, n_head=4, n_positions=64,
            scale_attn_by_inverse_layer_idx=True, bos_token_id=0, eos_token_id=30, **more,
        )  # fmt: skip
        return shaken(t.GPT2LMHeadModel(c))
    kinds = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "qwen2": "Qwen2"}
    kind = kinds[name]
    keywords = LLAMA | {"attention_bias": True} if name == "llama" else LLAMA
    keywords = keywords | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None} | more
    config = getattr(t, f"{kind}Config")(**keywords)
    return shaken(getattr(t, f"{kind}ForCausalLM")(config))


def first(out):
    return out[0]


def inputs(padded=False, length=11, side="right"):
    ids = torch.randint(2, 30, (2, length))
    mask = torch.ones(2, length, dtype=torch.int64)
    if padded:
        mask[1, slice(0, 4) if side == "left" else slice(length - 4, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same(model, given, kept=None, tolerance=2e-5, **keywords):
    """The outputs before and after; `kept` says which tokens are looked at."""
    with torch.no_grad():
        before = first(model(**given))
        plan = convert(model, **keywords)
        after = first(model(**given))
    kept = ... if kept is None else kept
    assert before[kept].std() > 0.05
    torch.testing.assert_close(after[kept], before[kept], rtol=tolerance, atol=tolerance)
    assert any(isinstance(m, Converted) for m in model.modules())
    return plan


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("to", "relative"), [("translution", "qkv"), ("alpha", "kv")])
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "registers"])
def test_image_models(name, to, relative, attention):
    model = image_model(name)
    model.set_attn_implementation(attention)
    plan = same(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, to=to, relative=relative)
    layout = plan.changes[0].layout
    prefix = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 5}[name]
    assert layout.grid == (4, 4)
    assert layout.prefix == prefix
    assert len(plan.changes) == 2


def test_images_of_another_shape():
    """The grid is that of the patches, also where its tokens would make a square."""
    model = image_model("dinov2")
    given = {"pixel_values": torch.randn(2, 3, 8, 32)}  # 1×4 patches, not 2×2
    same(model, given, relative="qkv")
    layer = next(m for m in model.modules() if isinstance(m, Converted))
    nn.init.normal_(layer.layer.v_proj.weight)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(layer.patches.grid))
    wide = torch.randn(1, 3, 8, 32)
    assert model(wide)[0].isfinite().all()
    assert model(wide.transpose(2, 3))[0].isfinite().all()
    assert seen == [(1, 4), (4, 1)]
    with pytest.raises(ValueError, match=r"grid: got 5 tokens on axis 1"):
        model(torch.randn(1, 3, 32, 40))


def test_larger_images_after_resizing():
    model = image_model("vit")
    given = {"pixel_values": torch.randn(2, 3, 48, 48), "interpolate_pos_encoding": True}
    y = first(model(**given))
    convert(model, relative="qkv", layers=[1])
    with pytest.raises(ValueError, match="grid: got 6 tokens"):
        model(**given)
    resize_offsets(model, 6)
    torch.testing.assert_close(first(model(**given)), y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "to", "relative"),
    [
        ("bert", "translution", "qkv"),
        ("bert", "alpha", "qkv"),
        ("roberta", "translution", "k"),
        ("electra", "translution", "q"),
        ("gpt2", "translution", "qkv"),
        ("gpt2", "alpha", "v"),
        ("llama", "translution", "v"),
        ("llama", "alpha", "qkv"),
        ("mistral", "alpha", "q"),
        ("qwen2", "translution", "v"),
        ("qwen3", "translution", "v"),
        ("qwen3", "alpha", "qk"),
    ],
)
def test_texts(name, to, relative, attention):
    model = text_model(name)
    model.set_attn_implementation(attention)
    for side in "left", "right":
        given = inputs(padded=True, side=side)
        kept = given["attention_mask"].bool()
        plan = same(copy.deepcopy(model), given, kept, to=to, relative=relative)
    assert plan.changes[0].layout.buckets == (8,)
    same(model, inputs(length=40), to=to, relative=relative, grid=40)


@pytest.mark.parametrize("relative", ["q", "k", "qk", "qkv"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 100.0},
        {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["default", "yarn"],
)
def test_rotary_positions_go_into_the_tables(relative, rope):
    model = text_model("llama", rope_parameters=rope)
    given = inputs(padded=True, side="left")
    same(model, given, given["attention_mask"].bool(), relative=relative, grid=16)
    assert model.model.layers[0].self_attn.layer.position == "none"


@pytest.mark.parametrize("relative", ["v", "kv"])
@pytest.mark.parametrize("to", ["translution", "alpha"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_generation_with_a_cache(name, to, relative):
    """Greedy text of a batch with padding, and the logits of every step, as without a cache."""
    more = {"sliding_window": 6} if name == "mistral" else {}
    model = text_model(name, **more)
    given = inputs(padded=True, side="left")
    asked = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    before = model.generate(**given, **asked)
    exact = to == "translution" and name != "gpt2" and relative == "kv"
    if exact and name == "mistral":
        pytest.skip("its grouped heads are those of llama")
    convert(model, to=to, relative=relative, grid=32 if exact else None)
    after = model.generate(**given, **asked)
    assert torch.equal(before.sequences, after.sequences)
    for a, b in zip(before.logits, after.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5)
    for m in model.modules():  # tables that differ by offset: the cache still changes nothing
        if isinstance(m, Converted):
            for p in m.layer.parameters():
                if p.ndim == 3:
                    p.data += torch.randn_like(p) * 0.1
    cached = model.generate(**given, **asked)
    plain = model.generate(**given, **asked, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits[-1], plain.logits[-1], rtol=5e-5, atol=5e-5)
    beams = [
        model.generate(**given, max_new_tokens=5, num_beams=2, pad_token_id=0, use_cache=use)
        for use in (True, False)
    ]
    assert torch.equal(*beams)


def test_other_caches_are_refused():
    model = text_model("gpt2")
    convert(model)
    with pytest.raises(ValueError, match=r"past_key_values: got a StaticCache.*use_cache=False"):
        model.generate(**inputs(), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_training(tmp_path):
    """Gradients reach the tables and α's branch, also with the host's checkpointing; what was
    saved loads; half precision works."""
    for to in "translution", "alpha":
        model = text_model("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        convert(model, to=to, relative="qkv")
        fresh = copy.deepcopy(model)
        given = inputs()
        grads = []
        for checkpointing in False, True:
            if checkpointing:
                model.activation_checkpointing_enable()
            model.train().zero_grad()
            model(**given, labels=given["input_ids"]).loss.backward()
            tables = [p for n, p in model.named_parameters() if p.ndim == 3 and "layer" in n]
            assert tables
            assert all(p.grad is not None for p in tables)
            grads.append([p.grad.clone() for p in tables])
            assert grads[-1][0].abs().max() > 0
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        torch.optim.SGD(model.parameters(), 0.05).step()
        torch.save(model.state_dict(), tmp_path / "model.pt")
        fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        out = first(model.eval()(input_ids=given["input_ids"]))
        torch.testing.assert_close(first(fresh(input_ids=given["input_ids"])), out)
        for dtype in torch.bfloat16, torch.float16:
            half = copy.deepcopy(model).to(dtype)
            near = first(half(**given))
            assert near.dtype == dtype
            assert (near - out).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize("to", ["translution", "alpha"])
@pytest.mark.parametrize("name", ["vit", "gpt2"])  # the weights of GPT-2's ends are tied
def test_saved_and_loaded(name, to, tmp_path):
    """As docs/upgrading.md says; and the model as a whole, for those who pickle it."""

    def make():
        model = image_model(name) if name == "vit" else text_model(name)
        convert(model, layers=[1], to=to, relative="qkv")
        return model

    model, given = (
        make(),
        {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else inputs(),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    out = first(model(**given))
    save_model(model, tmp_path / "model.safetensors")
    again = make()
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(first(again(**given)), out)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)  # of this test
    assert torch.equal(first(whole(**given)), out)
    whole.set_attn_implementation("eager")
    assert len(whole(**given, output_attentions=True).attentions) == 2


def test_torchs_own_are_pickled(tmp_path):
    model = Around(nn.MultiheadAttention(16, 4, batch_first=True))
    convert(model, grid=9)
    x = torch.randn(2, 9, 16)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(first(whole(x)), first(model(x)))


def test_conversion_without_gradients_still_trains():
    model = text_model("gpt2")
    model.transformer.h[1].attn.requires_grad_(False)
    with torch.no_grad():
        convert(model, relative="kv")
    one, two = (model.transformer.h[i].attn.layer for i in (0, 1))
    assert one.q_proj.weight.requires_grad
    assert one.k_proj.weight.requires_grad
    assert not two.q_proj.weight.requires_grad
    assert two.k_proj.weight.requires_grad


@pytest.mark.parametrize("which", ["attn_pdrop", "resid_pdrop"])
def test_dropout_is_the_hosts(which):
    rates = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = text_model("gpt2", **rates | {which: 0.5})
    for block in model.transformer.h:
        block.mlp.dropout.p = 0.0
    convert(model)
    given = inputs()
    assert torch.equal(first(model(**given)), first(model(**given)))
    model.train()
    assert not torch.equal(first(model(**given)), first(model(**given)))


@pytest.mark.parametrize("part", [False, True], ids=["model", "layer"])
def test_converted_models_change_hands(part):
    """The whole model, or one converted layer."""
    model, given = image_model("vit"), {"pixel_values": torch.randn(2, 3, 32, 32)}
    y = first(model(**given))
    names = [c.name for c in convert(model, relative="v").changes]
    layers = [model.get_submodule(name) for name in names]
    make_relative(layers[0] if part else model, "qk")
    assert [m.layer.relative for m in layers] == ["qkv", "v" if part else "qkv"]
    torch.testing.assert_close(first(model(**given)), y, rtol=2e-5, atol=2e-5)
    make_shared(layers[0] if part else model, "kv")
    assert [m.layer.relative for m in layers] == ["q", "v" if part else "q"]
    torch.testing.assert_close(first(model(**given)), y, rtol=2e-5, atol=2e-5)
    resize_offsets(layers[0] if part else model, 5)
    assert [m.layer.layout.grid for m in layers] == [(5, 5), (4, 4) if part else (5, 5)]
    torch.testing.assert_close(first(model(**given)), y, rtol=2e-5, atol=2e-5)


def test_norms_stay_on_what_is_shared():
    model = text_model("qwen3", num_key_value_heads=4)
    convert(model, relative="v")
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.layer: relative: got 'k', .*rotary"
    ):
        make_relative(model, "k")
    for m in model.modules():
        if isinstance(m, Converted):
            m.layer.position = "none"
    with pytest.raises(ValueError, match=r"layer: relative: got 'k', but q and k have norms"):
        make_relative(model, "k")
    make_shared(model, "v")
    make_relative(model, "v")
    assert first(model(**inputs())).isfinite().all()


# -- torch's own -----------------------------------------------------------------------------------


class Around(nn.Module):
    def __init__(self, attention, **asked):
        super().__init__()
        self.attention, self.asked = attention, asked

    def forward(self, x, **more):
        return self.attention(x, x, x, **self.asked, **more)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_multihead_attention(batch_first, boolean, average):
    inner = nn.MultiheadAttention(16, 4, bias=True, batch_first=batch_first)
    model = shaken(Around(inner, average_attn_weights=average))
    x = torch.randn(2, 9, 16)
    x = x if batch_first else x.transpose(0, 1)
    mask = torch.rand(8, 9, 9) > 0.7
    mask[:, range(9), range(9)] = False
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    if not boolean:
        mask, padding = torch.randn(9, 9), torch.randn(2, 9)
    given = {"attn_mask": mask, "key_padding_mask": padding}
    y, weights = model(x, **given)
    convert(model, relative="qkv", grid=(2, 4), prefix=1)
    got, found = model(x, **given)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)
    assert model(x, need_weights=False)[1] is None
    with pytest.raises(ValueError, match="attn_mask: got None"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match="want a batch"):
        model(x[0])
    with pytest.raises(ValueError, match=r"attention: key: .*want self-attention.*layers="):
        model.attention(x, x + 1, x)


@pytest.mark.parametrize("before", [True, False])
def test_transformer_encoder(before):
    """Torch's fused paths, which read weights that are no longer there, are left."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=before)
    model = shaken(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not before))
    x, padding = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        convert(model, relative="kv", to="alpha", grid=12)
        got = model(x, src_key_padding_mask=padding)
        alone = model.layers[0](x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], y[~padding], rtol=1e-5, atol=1e-5)
    assert alone.isfinite().all()
    with pytest.raises(ValueError, match="grid: got 13 tokens"):
        model(torch.randn(1, 13, 16))


def test_a_decoder_keeps_its_cross_attention():
    layer = nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True)
    model = shaken(nn.TransformerDecoder(layer, 2))
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    y = model(x, memory)
    assert len(convert(model, grid=5).changes) == 2
    torch.testing.assert_close(model(x, memory), y, rtol=1e-5, atol=1e-5)
    assert isinstance(model.layers[0].multihead_attn, nn.MultiheadAttention)


# -- what would change, and what can't -------------------------------------------------------------


def test_a_dry_run_changes_nothing_and_tells_the_truth():
    model = text_model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train().model.layers[0].self_attn.o_proj.eval()
    plan = convert(model, dry_run=True, layers=1)
    assert set(before) == {n for n, _ in model.named_parameters()}
    done = convert(model, layers=1)
    assert plan == done
    attention = model.model.layers[0].self_attn
    assert [attention.training, attention.layer.q_proj.training] == [True, True]
    assert not attention.layer.o_proj.training
    assert sum(p.numel() for p in model.parameters()) == (
        sum(p.numel() for p in before.values())
        + sum(c.parameters[1] - c.parameters[0] for c in done.changes)
    )
    text = str(plan)
    assert "model.layers.0.self_attn (LlamaAttention): grid 64, buckets (8,)" in text
    assert "9 classes" in text
    assert "1 layers" in text


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_attentions_are_recorded(name):
    model = image_model(name) if name == "vit" else text_model(name)
    model.set_attn_implementation("eager")
    given = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else inputs()
    before = copy.deepcopy(model)(**given, output_attentions=True).attentions
    convert(model, layers=[1])
    after = model(**given, output_attentions=True).attentions
    assert len(before) == len(after) == 2
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_another_direction_is_refused():
    model = text_model("gpt2")
    convert(model)
    with pytest.raises(ValueError, match="is_causal: got False"):
        model(**inputs(), is_causal=False)


def test_subclasses_that_compute_something_else_are_not_taken():
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **keywords):
            return args[0], None

    class Same(nn.MultiheadAttention):
        pass

    with pytest.raises(ValueError, match="want one with self-attention of a supported family"):
        convert(Around(Other(8, 2)), grid=4)
    convert(Around(Same(8, 2)), grid=4)


def test_layers_are_chosen():
    def names(**keywords):
        return [c.name for c in convert(text_model("gpt2"), dry_run=True, **keywords).changes]

    both = ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert names() == both
    assert names(layers=1) == both[:1]
    assert names(layers=[-1]) == both[1:] == names(layers=both[1:])
    for wrong in (0, 3, [5], ["lm_head"], [], "transformer.h.0.attn", True):
        with pytest.raises(ValueError, match="layers: got"):
            names(layers=wrong)
    with pytest.raises(ValueError, match=r"a GPT2MLP, which is not self-attention"):
        names(layers=["transformer.h.0.mlp"])


def test_converted_layers_count():
    """A layer keeps its number, however many are converted; those that are stay as they are."""
    model = text_model("gpt2", num_hidden_layers=3)
    given = inputs()
    before = first(model(**given))
    assert [c.name for c in convert(model, layers=[0]).changes] == ["transformer.h.0.attn"]
    done = model.transformer.h[0].attn
    for again in ([0], [-3], ["transformer.h.0.attn"], [1, 0]):
        with pytest.raises(
            ValueError, match=r"layers: got .*h\.0\.attn is converted already; make_"
        ):
            convert(model, layers=again)
    with pytest.raises(
        ValueError, match=r"layers: got 1, .*\(1 of 3 layers\) is converted already"
    ):
        convert(model, layers=1)
    with pytest.raises(ValueError, match="layers: got 3, want a number from 0 to 2"):
        convert(model, layers=[3])
    assert not isinstance(model.transformer.h[1].attn, Converted)
    plan = convert(model, layers=[1], to="alpha")
    assert [c.name for c in plan.changes] == ["transformer.h.1.attn"]
    assert [c.name for c in convert(model).changes] == ["transformer.h.2.attn"]
    assert model.transformer.h[0].attn is done
    torch.testing.assert_close(first(model(**given)), before, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"\(3 of 3 layers\) is converted already; make_relative"):
        convert(model)
    model = text_model("gpt2", num_hidden_layers=3)
    convert(model, layers=1)
    assert [c.name for c in convert(model, layers=2).changes] == ["transformer.h.1.attn"]


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("vit", {"prefix": 0}, r"prefix: got 0, but the model has 1 \(.*cls_token\); want 1"),
        ("vit", {"prefix": 5}, "prefix: got 5, but the model has 1"),
        ("vit", {"prefix": "1"}, "prefix: got '1', but the model has 1"),
        ("deit", {"prefix": 1}, "prefix: got 1, but the model has 2"),
        ("registers", {"prefix": 1}, "prefix: got 1, but the model has 5"),
        (
            "vit",
            {"grid": (3, 3)},
            r"grid: got \(3, 3\), but the model's images have \(4, 4\) patch",
        ),
        ("vit", {"grid": (5, 3)}, r"grid: got \(5, 3\), but.*resize_offsets"),
        ("vit", {"grid": (4, 4, 4)}, "grid: got"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_geometry_that_the_model_contradicts(name, keywords, message, dry_run):
    model = image_model(name)
    with pytest.raises(ValueError, match=message):
        convert(model, dry_run=dry_run, **keywords)
    assert not any(isinstance(m, Converted) for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Conv2d))


def test_geometry_that_the_model_leaves_open():
    """More patches than its images have; fewer where it takes images of any size; tokens that only
    its caller knows."""
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    same(image_model("vit"), images, grid=(5, 6), prefix=1)
    small = {"pixel_values": torch.randn(2, 3, 16, 24)}
    same(image_model("dinov2"), small, grid=(2, 3))

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
            self.prompt = nn.Parameter(torch.randn(1, 2, 16))
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            x = self.patch_embed.proj(x).flatten(2).mT
            front = torch.cat([self.cls_token, self.prompt], 1).expand(len(x), -1, -1)
            x = torch.cat([front, x], 1)
            return self.attention(x, x, x)

    with pytest.raises(ValueError, match="prefix: got 0, but the model has 1"):
        convert(Prompted(), grid=4, prefix=0)
    same(shaken(Prompted()), {"x": torch.randn(2, 3, 32, 32)}, grid=4, prefix=3)


def test_a_shared_layer_stays_shared():
    inner = Around(nn.MultiheadAttention(16, 4, batch_first=True), need_weights=False)
    model = nn.ModuleDict({"one": inner, "two": inner})
    model["three"] = Around(inner.attention)
    convert(model, grid=5)
    assert model["one"].attention is model["three"].attention
    assert isinstance(model["three"].attention, Converted)
    assert isinstance(model["two"].attention, Converted)


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "model: got Linear, want one with self-attention"),
        (lambda: 3, {}, "model: got int"),
        (lambda: nn.MultiheadAttention(8, 2), {"grid": 3}, "model: got an attention layer itself"),
        (lambda: text_model("gpt2"), {"to": "beta"}, "to: got 'beta'"),
        (lambda: text_model("gpt2"), {"relative": ""}, "relative: got ''"),
        (lambda: text_model("gpt2"), {"relative": "qx"}, "relative: got 'qx', want one or more of"),
        (lambda: text_model("gpt2"), {"relative": None}, "relative: got None, want one or more of"),
        (lambda: text_model("gpt2"), {"prefix": 1}, r"h\.0\.attn \(GPT2Attention\): prefix"),
        (lambda: text_model("gpt2"), {"to": "alpha", "rank": 0}, "rank: got 0"),
        (lambda: text_model("gpt2"), {"grid": (2, 2, 2)}, "grid: got"),
        (lambda: text_model("gpt2"), {"grid": 3.5}, "grid: got 3.5"),
        (lambda: text_model("bert"), {"grid": 8, "prefix": -1}, r"self \(BertSelf.*prefix: got -1"),
        (lambda: text_model("gpt2"), {"grid": (4, 4)}, "causal: needs a grid of one axis"),
        (
            lambda: text_model("llama"),
            {"relative": "q"},
            r"layers\.0\.self_attn \(LlamaAttention\): relative: q and k have rotary.*grid=",
        ),
        (
            lambda: text_model("qwen3"),
            {"relative": "k", "grid": 16},
            r"self_attn \(Qwen3Attention\): relative: 'k' is followed by a norm.*to='alpha'",
        ),
        (
            lambda: text_model(
                "llama",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            ),
            {"relative": "q", "grid": 16},
            "dynamic",
        ),
        (lambda: Around(nn.MultiheadAttention(8, 2)), {}, "grid: got None"),
        (
            lambda: Around(nn.MultiheadAttention(8, 2, kdim=4, vdim=4)),
            {"grid": 4},
            r"attention \(MultiheadAttention\): kdim or vdim",
        ),
        (
            lambda: Around(nn.MultiheadAttention(8, 2, add_bias_kv=True)),
            {"grid": 4},
            "add_bias_kv",
        ),
    ],
)
def test_refusals(make, keywords, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        convert(model, **keywords)
    if isinstance(model, nn.Module):
        assert not any(isinstance(m, Converted) for m in model.modules())


def test_other_attention_implementations_and_layers_are_refused():
    model = text_model("gpt2")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention'.*want 'sdpa' or 'eager'"):
        convert(model)
    model = text_model("llama")
    model.model.layers[1].self_attn.v_proj = nn.Sequential(model.model.layers[1].self_attn.v_proj)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*projection is a Sequential"):
        convert(model)
    convert(model, layers=1)
    layer = model.model.layers[0].self_attn.layer
    layer.q_proj = Translution1d(24, 64, heads=4, causal=True, buckets=8).q_proj
    with pytest.raises(ValueError, match="norm or rotary positions"):
        model(**inputs())


# -- timm, apart: its torchvision does not fit the CPU's torch -----------------------------------

TIMM = Path(sys.prefix) / "timm"
SCRIPT = """
import copy
import pickle
import torch
torch.set_num_threads(1)
for name in "nms", "qnms":  # what torchvision registers, and misses here
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float t) -> Tensor")
import timm
from timm.models.vision_transformer import VisionTransformer
from translution.interop.conversion import Converted, convert, patch_grid
torch.manual_seed(0)
small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
x = torch.randn(2, 3, 32, 32)
for more, prefix, relatives in (
    (dict(), 1, ("qkv", "v")),
    (dict(reg_tokens=4, qkv_bias=False), 5, ("kv",)),
    (dict(class_token=False, global_pool="avg"), 0, ("q",)),
    (dict(qk_norm=True, init_values=0.5, scale_attn_norm=True), 1, ("v",)),
):
    for fused in True, False:
        for to, relative in [("translution", r) for r in relatives] + [("alpha", "qkv")]:
            model = VisionTransformer(**small, **more).eval()
            for p in model.parameters():
                p.data += torch.randn_like(p) * 0.2
            for block in model.blocks:
                block.attn.fused_attn = fused
            y = model(x)
            plan = convert(model, to=to, relative=relative)
            assert plan.changes[0].layout.prefix == prefix, plan
            torch.testing.assert_close(model(x), y, rtol=3e-5, atol=3e-5)
            mask = torch.rand(16 + prefix, 16 + prefix) > 0.5
            model(x, attn_mask=mask), model(x, is_causal=True)
            model.train()(x).sum().backward()
            copy.deepcopy(model)
model = VisionTransformer(**small, qk_norm=True)
try:
    convert(model, relative="q")
except ValueError as error:
    assert "blocks.0.attn (Attention): relative: 'q' is followed by a norm" in str(error), error
else:
    raise AssertionError
for wrong in dict(prefix=0), dict(grid=3), dict(grid=(4, 2)):
    try:
        convert(model, **wrong)
    except ValueError as error:
        assert "but the model" in str(error), error
    else:
        raise AssertionError(wrong)
try:
    convert(VisionTransformer(**small, patch_drop_rate=0.5))
except ValueError as error:
    assert "patch_drop" in str(error), error
else:
    raise AssertionError
model = VisionTransformer(**small, dynamic_img_size=True).eval()
wide = torch.randn(2, 3, 16, 32)
y = model(wide)
convert(model, relative="qkv")
torch.testing.assert_close(model(wide), y, rtol=3e-5, atol=3e-5)
assert torch.equal(pickle.loads(pickle.dumps(model))(wide), model(wide))
torch.nn.init.normal_(model.blocks[0].attn.layer.v_proj.weight)
try:
    model.forward_features(wide)  # the model itself is not called, and 8 patches may be 2x4 or 4x2
except ValueError as error:
    assert "nothing says which grid" in str(error), error
else:
    raise AssertionError
with patch_grid(model, (2, 4)):
    features = model.forward_features(wide)
assert torch.equal(model.forward_head(features), model(wide))
model.set_grad_checkpointing()
grads = []
for checkpointing in False, True:
    model.set_grad_checkpointing(checkpointing)
    model.train().zero_grad()
    (model(wide).sum() + model(wide.mT).pow(2).sum()).backward()
    grads.append(model.blocks[0].attn.layer.v_proj.weight.grad.clone())
torch.testing.assert_close(*grads)
model = VisionTransformer(**small, dynamic_img_size=True).eval()
y = model(wide)
convert(model, relative="qkv", grid=(2, 4), prefix=1)  # takes any size: also fewer patches
torch.testing.assert_close(model(wide), y, rtol=3e-5, atol=3e-5)
print("fine")
"""


@pytest.mark.skipif(not TIMM.is_dir(), reason=f"timm is not in {TIMM}")
def test_timm():
    path = os.pathsep.join(filter(None, [str(TIMM), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout.endswith("fine\n"), done.stderr
