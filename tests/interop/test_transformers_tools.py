"""What transformers' own tools do with the models: padding, caches, what lies inside, pipelines."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from test_transformers_door import BACKBONES as SOME_BACKBONES
from test_transformers_door import GPT, VIT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedTokenizerFast,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from translution import attention_weights, convert, create_model, load_converted
from translution.interop.transformers import (
    ConvertedCallback,
    TranslutionForCausalLM,
    TranslutionForImageClassification,
    TranslutionGPTConfig,
    TranslutionImageConfig,
)
from translution.models.blocks import IMAGE_MIXERS, MIXERS

BACKBONES = SOME_BACKBONES | {
    "swin_tiny": {"dim": 8, "heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
}
CAUSAL = [mixer for mixer in MIXERS if mixer not in IMAGE_MIXERS]


def writer(mixer="translution", seed=0, **more):
    """A model with large random weights, so that texts differ."""
    torch.manual_seed(seed)
    model = create_model("gpt", mixer=mixer, **(GPT | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return TranslutionForCausalLM.from_translution(model)


def classifier(architecture="alpha_vit_tiny_patch16_224", options=VIT, **more):
    torch.manual_seed(0)
    config = TranslutionImageConfig(architecture=architecture, options=options, **more)
    return AutoModelForImageClassification.from_config(config).eval()


def ids(batch=3, length=8):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(text, lengths, side):
    """The texts with what is beyond their lengths as padding, and the mask."""
    mask = torch.zeros_like(text)
    for row, length in zip(mask, lengths, strict=True):
        (row[:length] if side == "right" else row[len(row) - length :]).fill_(1)
    return text.where(mask > 0, 7), mask


# -- configurations -------------------------------------------------------------------------------


def test_the_names_that_transformers_has_for_options(tmp_path):
    config = TranslutionGPTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=13,
        max_position_embeddings=16, options={"mixer": "rotary"},
    )  # fmt: skip
    want = TranslutionGPTConfig(options=GPT | {"mixer": "rotary"})
    assert config.to_dict() == want.to_dict()
    image = TranslutionImageConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    assert (
        image.to_dict()
        == TranslutionImageConfig(options=VIT | {"in_channels": 1}, num_labels=3).to_dict()
    )
    image.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, num_channels=3)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    assert [getattr(again, name) for name in names] == [12, 2, 2, 8, 4]
    assert again.num_channels == again.options["in_channels"] == 3
    again.hidden_size = 24
    assert AutoModelForImageClassification.from_config(again).model.config.dim == 24
    oblong = TranslutionImageConfig(image_size=(8, 12), patch_size=4)
    assert oblong.image_size == [8, 12]
    for wrong, message in (
        ({"vocab_size": 12, "options": GPT}, r"vocab_size: got 12, but options have vocab_size 13"),
        ({"max_position_embeddings": 8, "options": GPT}, "options have context 16; want one"),
    ):
        with pytest.raises(ValueError, match=message):
            TranslutionGPTConfig(**wrong)


def test_grouped_heads(tmp_path):
    config = TranslutionGPTConfig(
        num_attention_heads=2, num_key_value_heads=1, options=GPT | {"mixer": "rotary"}
    )
    assert config.options["kv_heads"] == config.num_key_value_heads == 1
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_key_value_heads == 1
    text = torch.tensor([[3, 1, 4]])
    made = [m.generate(text, max_new_tokens=6, do_sample=False) for m in (model, again)]
    made.append(model.generate(text, max_new_tokens=6, do_sample=False, use_cache=False))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    whole = TranslutionGPTConfig(options=GPT | {"mixer": "rotary"})
    assert whole.options["kv_heads"] is None
    assert whole.num_key_value_heads == whole.num_attention_heads == 2
    with pytest.raises(ValueError, match="kv_heads: got 3, want a divisor of heads 2"):
        TranslutionGPTConfig(num_key_value_heads=3, options=GPT | {"mixer": "rotary"})


def test_of_a_backbone():
    config = TranslutionImageConfig(architecture="acmix_resnet26", num_channels=1)
    assert config.hidden_size == 2048
    assert config.num_channels == 1
    assert not hasattr(config, "image_size")
    assert not hasattr(config, "num_hidden_layers")
    with pytest.raises(ValueError, match="hidden_size: got 12, but 'acmix_resnet26' has stages"):
        TranslutionImageConfig(architecture="acmix_resnet26", hidden_size=12)


# -- what lies inside -----------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["translution", "attention"])
def test_inside_a_writer(mixer):
    model, text = writer(mixer), ids()
    out = model(text, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, model(text).logits)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.model.head(out.hidden_states[-1]), out.logits)
    first = model.model.embed(text)
    if mixer == "attention":
        first = first + model.model.positions[:, :8]
    assert torch.equal(out.hidden_states[0], first)
    assert torch.equal(model.model.blocks[0](first, (8,)), out.hidden_states[1])
    for found, want in zip(out.attentions, attention_weights(model.model, text)[1], strict=True):
        assert torch.equal(found, want)
    assert model(text).hidden_states is model(text).attentions is None
    model.config.output_hidden_states = True
    assert len(model(text).hidden_states) == 3
    model.config.output_hidden_states = False
    made = model.generate(
        text, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert torch.equal(made.sequences, model.generate(text, max_new_tokens=3, do_sample=False))
    assert [step[0].shape[1] for step in made.hidden_states] == [8, 1, 1]
    assert [step[1].shape for step in made.attentions] == [(3, 2, n, 8 + i) for i, n in
                                                          enumerate((8, 1, 1))]  # fmt: skip
    whole = model(made.sequences, output_attentions=True).attentions[1]
    assert torch.allclose(made.attentions[2][1], whole[:, :, 9:10, :10], atol=1e-5)


def test_inside_a_classifier():
    model, x = classifier(num_labels=3), torch.randn(2, 3, 8, 8)
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, model(x).logits)
    assert [s.shape for s in out.hidden_states] == [(2, 5, 12), (2, 5, 12), (2, 1, 12)]
    assert torch.equal(model.model.head(model.model.norm(out.hidden_states[-1]))[:, 0], out.logits)
    assert [a.shape for a in out.attentions] == [(2, 2, 5, 5), (2, 2, 1, 5)]
    assert len(model(x, output_hidden_states=True, return_dict=False)) == 2
    model.train()
    model(x, output_hidden_states=True).hidden_states[1].sum().backward()
    assert model.model.embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_inside_a_backbone(name):
    model, x = classifier(name, BACKBONES[name]), torch.randn(2, 3, 32, 32)
    states = model(x, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert all(len(state) == 2 for state in states)
    with pytest.raises(ValueError, match="output_attentions: got True for the backbone"):
        model(x, output_attentions=True)


def test_blocks_recompute():
    text = ids()
    model = writer().train()
    model(text, labels=text).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert [block.activation_checkpointing for block in model.model.blocks] == ["full", "full"]
    model(text, labels=text).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=0, atol=1e-6)
    inside = model(text, output_attentions=True, output_hidden_states=True)
    (inside.attentions[1][..., 0].sum() + inside.hidden_states[1].sum()).backward()
    model.activation_checkpointing_disable()
    assert [block.activation_checkpointing for block in model.model.blocks] == ["none", "none"]
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [block.activation_checkpointing for block in model.model.blocks] == ["full", "none"]
    with pytest.raises(ValueError, match="got use_reentrant=True, want none but"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="offload: got True, want False"):
        model.activation_checkpointing_enable(offload=True)
    with pytest.raises(ValueError, match="got ResNet, whose batch norms would count each batch"):
        classifier("acmix_resnet26", BACKBONES["acmix_resnet26"]).activation_checkpointing_enable()


@pytest.mark.parametrize("name", ["swin_tiny", "acmix_pvt_tiny"])
def test_blocks_of_a_backbone_recompute(name):
    model, x = classifier(name, BACKBONES[name]).train(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)  # of the drop paths
        model(x, labels=torch.tensor([0, 1])).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert model.is_activation_checkpointing
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_blocks_recompute_by_the_earlier_name():
    model = classifier()
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    assert [block.activation_checkpointing for block in model.model.blocks] == ["full", "full"]


def test_the_attention_is_the_mixers():
    model = writer()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation: got 'sdpa', want None"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: got 'flash_attention_2', want"):
        AutoModelForCausalLM.from_config(model.config, attn_implementation="flash_attention_2")


# -- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_padded_text_has_its_own_logits(mixer, side):
    model, text, lengths = writer(mixer).train(), ids(), (8, 5, 1)
    for dropless in model.modules():
        assert getattr(dropless, "p", 0) == 0
    given, mask = padded(text, lengths, side)
    out = model(given, attention_mask=mask, labels=given.where(mask > 0, -100))
    for row, length, whole in zip(out.logits, lengths, given, strict=True):
        own = slice(0, length) if side == "right" else slice(8 - length, 8)
        alone = model(whole[None, own]).logits[0]
        torch.testing.assert_close(row[own], alone, rtol=0, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("mixer", ["translution", "alpha", "attention", "bias"])
def test_padded_texts_go_on_as_alone(mixer, options):
    model, lengths = writer(mixer), (8, 5, 1)
    given, mask = padded(ids(), lengths, "left")
    greedy = {"max_new_tokens": 6, "do_sample": False} | options
    made = model.generate(given, attention_mask=mask, **greedy)
    for row, length, whole in zip(made, lengths, given, strict=True):
        alone = model.generate(whole[None, 8 - length :], **greedy)[0]
        assert torch.equal(row[8 - length :], alone)


@pytest.mark.parametrize("geometry", [{"window": 3}, {"buckets": 3}, {"window": 2, "dilation": 2}])
def test_padding_with_windows_and_buckets(geometry):
    model, lengths = writer(**geometry), (8, 3)
    given, mask = padded(ids(2), lengths, "left")
    made = model.generate(given, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, length, whole in zip(made, lengths, given, strict=True):
        alone = model.generate(whole[None, 8 - length :], max_new_tokens=20, do_sample=False)[0]
        assert torch.equal(row[8 - length :], alone)


def test_padding_that_is_refused():
    model, text = writer(), ids(2, 5)
    hole = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="attention_mask: got padding within a text, want it on"):
        model(text, attention_mask=hole)
    _, right = padded(text, (5, 3), "right")
    with pytest.raises(
        ValueError, match=r"got padding after a text that is continued, want .*left"
    ):
        model.generate(text, attention_mask=right, max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids: got None, want int64"):
        model(inputs_embeds=torch.randn(1, 3, 12))


# -- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("mixer", ["translution", "attention", "rotary"])
def test_a_text_ends_at_the_context(mixer, options):
    model, text = writer(mixer), ids(2, 5)
    greedy = {"do_sample": False} | options
    with pytest.warns(UserWarning, match="end after 17 tokens, where the context of 16 is full"):
        made = model.generate(text, max_new_tokens=30, **greedy)
    assert made.shape == (2, 17)
    assert torch.equal(made, model.generate(text, max_new_tokens=12, **greedy))
    with pytest.raises(ValueError, match="input_ids: got a text of 17 tokens, want at most 16 in"):
        model.generate(made, max_new_tokens=1)


def test_a_text_goes_on_where_the_model_has_no_limit():
    model, text = writer(buckets=3), ids(2, 5)
    made = model.generate(text, max_new_tokens=30, do_sample=False)
    assert made.shape == (2, 35)
    assert torch.equal(made[:, -1], model(made[:, :-1]).logits[:, -1].argmax(-1))
    with pytest.warns(UserWarning, match="model-agnostic default"):  # of 20 more tokens
        assert model.generate(made, do_sample=False).shape == (2, 55)


@pytest.mark.parametrize("geometry", [{}, {"window": 3}, {"buckets": 3}], ids=str)
@pytest.mark.parametrize("mixer", ["translution", "attention"])
def test_an_assistant_changes_no_text(mixer, geometry):
    model, helper = writer(mixer, **geometry), writer("rotary", seed=1, depth=1, **geometry)
    text = ids(1, 5)
    for length in (4, 10):
        greedy = {"max_new_tokens": length, "do_sample": False}
        want = model.generate(text, **greedy)
        for assistant in (helper, model):
            assert torch.equal(model.generate(text, assistant_model=assistant, **greedy), want)
        assert torch.equal(model.generate(text, prompt_lookup_num_tokens=3, **greedy), want)
    limited = not model.model.unbounded
    with pytest.warns(UserWarning, match="end after") if limited else nullcontext():
        made = model.generate(text, prompt_lookup_num_tokens=3, max_new_tokens=20, do_sample=False)
    want = model.generate(text, max_new_tokens=made.shape[1] - 5, do_sample=False)
    assert torch.equal(made, want)
    if limited:
        with pytest.warns(UserWarning, match="end after 17 tokens"):
            made = model.generate(text, assistant_model=helper, max_new_tokens=20, do_sample=False)
        assert torch.equal(made, model.generate(text, max_new_tokens=12, do_sample=False))
        with pytest.raises(ValueError, match="want at most 7 in the context of 16"):
            model.generate(ids(1, 8), prompt_lookup_num_tokens=10, max_new_tokens=2)


def test_an_assistant_with_a_shorter_context():
    model, helper = writer(), writer("rotary", context=8)
    with pytest.raises(ValueError, match=r"assistant_model: got a text of 9 tokens, want .* of 8"):
        model.generate(ids(1, 5), assistant_model=helper, max_new_tokens=9, do_sample=False)


def test_caches():
    model, text = writer(), ids(2, 5)
    want = model.generate(text, max_new_tokens=3, do_sample=False)
    kept = model.generate(
        text, max_new_tokens=3, do_sample=False, cache_implementation="dynamic",
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(kept.sequences, want)
    more = model.generate(
        want, max_new_tokens=2, do_sample=False, past_key_values=kept.past_key_values
    )
    assert torch.equal(more, model.generate(text, max_new_tokens=5, do_sample=False))
    for kind in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match=f"cache_implementation: got '{kind}', want 'dynamic'"):
            model.generate(text, max_new_tokens=3, cache_implementation=kind)
    like_llama = transformers.LlamaConfig(hidden_size=12, num_attention_heads=2)
    with pytest.raises(ValueError, match="past_key_values: got StaticCache, want a Translution"):
        model(text, past_key_values=StaticCache(config=like_llama, max_cache_len=9))


def test_other_vocabularies(tmp_path):
    model, text = writer(), ids()
    before = model(text).logits
    for size in (20, 13):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size == model.config.options["vocab_size"]
        assert torch.allclose(model(text).logits[..., :13], before, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(again(text).logits, model(text).logits, atol=1e-6)
    assert model.resize_token_embeddings(14, pad_to_multiple_of=8).num_embeddings == 16


# -- pipelines ------------------------------------------------------------------------------------


def tokenizer_of_bytes():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def test_a_pipeline_writes(tmp_path):
    """A folder as `translution share` writes it, then one with a padding token for batches."""
    model = writer(vocab_size=257).model
    model.save_pretrained(tmp_path)
    tokenizer_of_bytes().save(str(tmp_path / "tokenizer.json"))
    greedy = {"max_new_tokens": 5, "do_sample": False}
    write = transformers.pipeline("text-generation", str(tmp_path))
    alone = [write(text, **greedy)[0]["generated_text"] for text in ("Once", "Once upo")]
    assert all(text.startswith("Once") for text in alone)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of_bytes(), pad_token="<pad>", padding_side="left"
    )
    fast.save_pretrained(tmp_path)
    write = transformers.pipeline("text-generation", str(tmp_path))
    both = write(["Once", "Once upo"], batch_size=2, **greedy)
    assert [one[0]["generated_text"] for one in both] == alone


# -- Trainer --------------------------------------------------------------------------------------


def trainer(model, samples, folder, callbacks=None, **more):
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **{"learning_rate": 1e-2} | more,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=samples, eval_dataset=samples[:4], callbacks=callbacks
    )


def texts():
    each = torch.randint(0, 13, (24, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": text, "attention_mask": torch.ones(10).long(), "labels": text}
            for text in each]  # fmt: skip


def pictures():
    each = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(each)]


def new_writer():
    config = TranslutionGPTConfig(options=GPT | {"dropout": 0.1})
    return AutoModelForCausalLM.from_config(config)


def new_classifier():
    config = TranslutionImageConfig(options=VIT | {"dropout": 0.1}, num_labels=3)
    return TranslutionForImageClassification(config)


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize(("make", "data"), [(new_writer, texts), (new_classifier, pictures)])
def test_a_trainer_resumes_to_the_same_weights(tmp_path, make, data, more):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    whole = trainer(make(), data(), tmp_path, **more)
    whole.train()
    torch.manual_seed(1)
    resumed = trainer(make(), data(), tmp_path, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert resumed.model.is_activation_checkpointing == bool(more)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def converted(seed, relative="v"):
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    convert(model, relative=relative)
    return model


def test_a_trainer_resumes_a_converted_model(tmp_path):
    pytest.importorskip("accelerate")
    callbacks = [ConvertedCallback()]
    whole = trainer(converted(0), pictures(), tmp_path, callbacks=callbacks)
    whole.train()
    resumed = trainer(converted(1), pictures(), tmp_path, callbacks=callbacks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    again = load_converted(tmp_path / "checkpoint-6")
    x = pictures()[0]["pixel_values"][None]
    assert torch.equal(again(x).logits, whole.model.eval()(x).logits)
    other = trainer(converted(1, relative="kv"), pictures(), tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"model: is converted in another way than .*checkpoint-3"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    best = trainer(
        converted(0), pictures(), tmp_path / "best", callbacks=callbacks, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=1.0,
    )  # fmt: skip
    best.train()
    chosen = load_converted(best.state.best_model_checkpoint).state_dict()
    for name, weight in best.model.state_dict().items():
        assert torch.equal(chosen[name], weight), name


def test_what_is_overridden_exists():
    """Private methods of transformers: where one is gone, generation would pass by the model's."""
    for name in (
        "_check_and_adjust_attn_implementation", "_prepare_cache_for_generation",
        "_prepare_generated_length", "_set_gradient_checkpointing",
        "_supports_default_dynamic_cache",
    ):  # fmt: skip
        above = (transformers.PreTrainedModel, transformers.GenerationMixin)
        assert any(hasattr(kind, name) for kind in above), name
        assert getattr(TranslutionForCausalLM, name).__module__.startswith("translution"), name
