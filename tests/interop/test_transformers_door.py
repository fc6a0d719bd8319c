"""The models as transformers' own: Auto classes, losses, generation, and its Trainer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from translution.interop.images import normalised, prepare
from translution.interop.transformers import (
    TranslutionCache,
    TranslutionForCausalLM,
    TranslutionForImageClassification,
    TranslutionGPTConfig,
    TranslutionImageConfig,
    TranslutionImageProcessor,
)
from translution.models import create_model
from translution.models.generation import generate
from translution.models.preprocessing import PROCESSOR, Preprocessing
from translution.models.pretrained import Pretrained

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VIT = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": 2, "heads": 2}
GPT = {"context": 16, "vocab_size": 13, "dim": 12, "depth": 2, "heads": 2}
BACKBONES = {
    "acmix_resnet26": {"dim": 8, "heads": 2},
    "acmix_pvt_tiny": {"depths": (1,) * 4, "dims": (8,) * 4, "heads": (1,) * 4, "image_size": 32},
}


def classifier(architecture="alpha_vit_tiny_patch16_224", options=VIT, **more):
    torch.manual_seed(0)
    config = TranslutionImageConfig(architecture=architecture, options=options, **more)
    return AutoModelForImageClassification.from_config(config).eval()


def writer(mixer="translution", **more):
    """A model of this library with large random weights, so that texts differ; and its wrapping."""
    torch.manual_seed(0)
    model = create_model("gpt", mixer=mixer, **(GPT | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, TranslutionForCausalLM.from_translution(model)


def ids(batch=2, length=5):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["alpha_vit_tiny_patch16_224", *BACKBONES])
def test_a_classifiers_round_trip(tmp_path, name):
    model = classifier(name, BACKBONES.get(name, VIT), id2label={0: "cat", 1: "dog", 2: "eel"})
    assert isinstance(model, TranslutionForImageClassification)
    size = 8 if "vit" in name else 32
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 2])
    out = model(pixel_values=x, labels=y)
    assert torch.equal(out.logits, model.model(x))
    assert torch.allclose(out.loss, F.cross_entropy(out.logits, y))
    assert torch.equal(model(x, return_dict=False)[0], out.logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(again(x).logits, out.logits, atol=1e-6)
    assert all(
        torch.equal(*two) for two in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "translution-image"
    assert config.architecture == model.model.family
    assert "num_classes" not in config.options
    assert config.to_dict() == again.config.to_dict()


def test_new_labels_are_a_new_head(tmp_path):
    model = classifier(num_labels=3)
    model.save_pretrained(tmp_path)
    more = {"num_labels": 5, "ignore_mismatched_sizes": True}
    again = AutoModelForImageClassification.from_pretrained(tmp_path, **more)
    assert again(torch.randn(1, 3, 8, 8)).logits.shape == (1, 5)
    assert torch.equal(again.model.embed.proj.weight, model.model.embed.proj.weight)
    assert 0 < again.model.head.weight.abs().max() < 0.2


def test_weights_start_as_they_do_here():
    """transformers' initialisation of every Linear does not reach them."""
    model = classifier(num_labels=3)
    torch.manual_seed(0)
    plain = create_model("alpha_vit_tiny_patch16_224", num_classes=3, **VIT)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name


def test_a_missing_table_is_not_left_as_memory_was(tmp_path):
    from safetensors.torch import load_file, save_file

    model = classifier("translution_vit_tiny_patch16_224", num_labels=3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight") and weights[n].ndim == 3)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert 0 < again.state_dict()[name].abs().max() < 0.2  # conftest fills memory with NaN


@pytest.mark.parametrize("mixer", ["translution", "alpha", "rotary", "attention"])
def test_generate_is_that_of_the_library(mixer):
    model, wrapped = writer(mixer)
    want = torch.stack(list(generate(model, ids(), 9, temperature=0)), 1)
    for cached in (True, False):
        made = wrapped.generate(ids(), max_new_tokens=9, do_sample=False, use_cache=cached)
        assert torch.equal(made[:, 5:], want)
    assert len(set(want.flatten().tolist())) > 3


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_carry_their_caches(options):
    _, wrapped = writer()
    made = [
        wrapped.generate(ids(), max_new_tokens=9, do_sample=False, use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_each_token_sees_what_came_before_in_the_cache():
    model, wrapped = writer(buckets=3)
    text = ids(2, 12)
    cache, steps = None, []
    with torch.no_grad():
        for part in text.split([5, 1, 4, 2], 1):
            out = wrapped(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        whole = model(text)
    assert isinstance(cache, TranslutionCache)
    assert cache.get_seq_length() == 12
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    with torch.no_grad():
        after = wrapped(text[:, :1].flip(0), past_key_values=cache).logits
        want = model(torch.cat([text, text[:, :1]], 1).flip(0))[:, -1:]
    assert torch.allclose(after, want, atol=1e-5)
    with pytest.raises(ValueError, match="tokens: got 14, want 0 to the 13"):
        cache.crop(-14)
    cache.crop(-1)
    assert cache.get_seq_length() == 12
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_writers_round_trip(tmp_path):
    model, wrapped = writer()
    wrapped.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_type == "translution-gpt"
    assert again.config.vocab_size == 13
    assert again.config.max_position_embeddings == 16
    text = ids()
    out = again(input_ids=text, labels=text, logits_to_keep=0)
    want = model(text)
    assert torch.allclose(out.logits, want, atol=1e-6)
    loss = F.cross_entropy(want[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert torch.allclose(out.loss, loss)
    assert torch.allclose(again(text, logits_to_keep=1).logits, want[:, -1:], atol=1e-6)
    assert again(text).past_key_values is None
    assert again.model.config == model.config


def test_more_tokens():
    _, wrapped = writer()
    wrapped.resize_token_embeddings(20)
    assert wrapped.config.vocab_size == wrapped.model.config.vocab_size == 20
    assert wrapped(torch.tensor([[19]])).logits.shape == (1, 1, 20)


def test_masks():
    _, wrapped = writer()
    text = ids()
    for shape in (2, 1, 5, 5), (2, 4), (2, 9), (3, 5), (5,):
        with pytest.raises(ValueError, match=r"attention_mask: got shape .*want .* \(2, 5\)"):
            wrapped(text, attention_mask=torch.ones(shape))
    with torch.no_grad():
        out = wrapped(text, use_cache=True, attention_mask=torch.ones(2, 5))
        one, cache = text[:, :1], out.past_key_values
        wrapped(one, past_key_values=cache, attention_mask=torch.ones(2, 6))
        with pytest.raises(ValueError, match=r"got shape \(2, 1\), want .* \(2, 7\)"):
            wrapped(one, past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings: got True, want False"):
        TranslutionGPTConfig(options=GPT, tie_word_embeddings=True)
    config = TranslutionGPTConfig(options=GPT)
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings: got True, want False"):
        AutoModelForCausalLM.from_config(config)


def test_errors():
    _, wrapped = writer()
    text = ids()
    with pytest.raises(ValueError, match="token_type_ids: this model has no such input"):
        wrapped(text, token_type_ids=text)
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache, want"):
        wrapped(text, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="ids: got 17 tokens, want at most the context 16"):
        writer("attention")[1](ids(2, 17))
    with pytest.raises(ValueError, match="there is no model 'vti'"):
        TranslutionImageConfig(architecture="vti")
    with pytest.raises(ValueError, match="option of ViTConfig: got 'dmi'"):
        TranslutionImageConfig(options={"dmi": 3})
    with pytest.raises(ValueError, match="want an image classifier"):
        TranslutionImageConfig(architecture="acmix_resnet26", options={"features_only": True})
    with pytest.raises(ValueError, match="want a language model"):
        TranslutionGPTConfig(architecture="vit")
    with pytest.raises(ValueError, match="got num_classes 4, but num_labels 3"):
        TranslutionImageConfig(options=VIT | {"num_classes": 4}, num_labels=3)


def test_a_model_of_the_library_keeps_its_weights():
    plain = create_model("vit", **VIT, num_classes=3)
    wrapped = TranslutionForImageClassification.from_translution(
        plain, id2label={0: "a", 1: "b", 2: "c"}
    )
    assert wrapped.model is plain
    assert wrapped.config.label2id is None or wrapped.config.num_labels == 3
    assert not any(p.is_meta for p in wrapped.parameters())


def test_the_trainer_trains_a_classifier(tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    pixels = torch.randn(32, 3, 8, 8)
    labels = (pixels.mean((1, 2, 3)) > 0).long()
    samples = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3,
        logging_steps=5, save_steps=30, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        classifier(num_labels=2), arguments, train_dataset=samples, eval_dataset=samples
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-30")
    predicted = trainer.predict(samples).predictions
    assert torch.allclose(torch.from_numpy(predicted), again(pixels).logits, atol=1e-5)


def test_the_trainer_trains_a_writer(tmp_path):
    pytest.importorskip("accelerate")
    text = torch.arange(10) % 5
    samples = [{"input_ids": text, "attention_mask": torch.ones(10).long(), "labels": text}] * 8
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TranslutionGPTConfig(options=GPT))
    trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.2
    made = model.eval().generate(text[None, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(made[0], text)


# -- preprocessing -------------------------------------------------------------------------------

DIGITS = Preprocessing((20, 20), 1, (0.5,), (0.5,), digit_size=8, canvas=20, classes=("a", "b"))


def digits_model():
    model = create_model("vit", image_size=20, patch_size=5, in_channels=1, num_classes=2, dim=8,
                         depth=1, heads=1)  # fmt: skip
    model.preprocessing = DIGITS
    return model.eval()


@pytest.fixture
def shared(tmp_path):
    """A folder of this library with a model of digits, and an image beside it."""
    digits_model().save_pretrained(tmp_path / "shared")
    values = torch.randint(256, (8, 8), dtype=torch.uint8).numpy()
    image = Image.fromarray(values)
    image.save(tmp_path / "digit.png")
    return tmp_path / "shared", image


def test_the_auto_classes_read_a_folder_of_this_library(shared):
    folder, image = shared
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    plain = Pretrained.from_pretrained(folder)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.config.label2id == {"a": 0, "b": 1}
    assert not hasattr(model.config, "format")
    assert model.model.preprocessing == plain.preprocessing == DIGITS
    processor = AutoImageProcessor.from_pretrained(folder)
    assert isinstance(processor, TranslutionImageProcessor)
    assert processor.preprocessing == DIGITS
    x = processor(image).pixel_values
    assert torch.equal(x, normalised(prepare(image, DIGITS)[None], DIGITS))
    assert torch.allclose(model(x).logits, plain(x), atol=1e-6)
    # as a batch, and from arrays
    both = processor([image, np.asarray(image)], return_tensors="pt")["pixel_values"]
    assert torch.equal(both, x.expand(2, -1, -1, -1))


def test_a_pipeline_of_a_shared_folder(shared):
    folder, image = shared
    pipeline = transformers.pipeline("image-classification", str(folder))
    for given in (image, str(folder.parent / "digit.png")):
        found = {one["label"]: one["score"] for one in pipeline(given)}
        with torch.no_grad():
            x = normalised(prepare(image, DIGITS)[None], DIGITS)
            want = Pretrained.from_pretrained(folder)(x)[0].softmax(0)
        assert found == pytest.approx({"a": float(want[0]), "b": float(want[1])}, abs=1e-6)


def test_a_processor_saves_itself(shared, tmp_path):
    processor = TranslutionImageProcessor(DIGITS)
    processor.save_pretrained(tmp_path / "alone")
    assert TranslutionImageProcessor.from_pretrained(tmp_path / "alone").preprocessing == DIGITS
    assert AutoImageProcessor.from_pretrained(tmp_path / "alone").preprocessing == DIGITS
    # with transformers' own folder
    wrapped = TranslutionForImageClassification.from_translution(digits_model())
    wrapped.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert Preprocessing.from_dict(config.preprocessing) == dataclasses.replace(
        DIGITS, classes=None
    )
    assert config.id2label == {0: "a", 1: "b"}
    again = TranslutionForImageClassification.from_pretrained(tmp_path / "whole")
    assert again.model.preprocessing == DIGITS
    described = DIGITS.to_dict()
    del described["classes"]
    config = TranslutionImageConfig(
        options=again.config.options, preprocessing=described, num_labels=3
    )
    assert TranslutionForImageClassification(config).model.preprocessing.classes is None
    assert AutoImageProcessor.from_pretrained(tmp_path / "whole").preprocessing == DIGITS


def test_what_a_processor_refuses(tmp_path):
    with pytest.raises(ValueError, match="preprocessing: got None"):
        TranslutionImageProcessor()
    with pytest.raises(ValueError, match=r"preprocessing\.crop: got 2"):
        TranslutionImageProcessor(DIGITS.to_dict() | {"crop": 2})
    with pytest.raises(ValueError, match="size: the preprocessing of this model is fixed"):
        TranslutionImageProcessor(DIGITS)(Image.new("L", (8, 8)), size=5)
    with pytest.raises(ValueError, match=r"preprocessing\.crop: got 2"):
        TranslutionImageConfig(options=VIT, preprocessing=DIGITS.to_dict() | {"crop": 2})
    model = digits_model()
    model.preprocessing = None
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(PROCESSOR)
    with pytest.raises(ValueError, match=r"its config\.json has no preprocessing"):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_the_auto_class_reads_a_language_model_of_this_library(tmp_path):
    model, _ = writer()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(again(ids()).logits, model(ids()), atol=1e-6)


def test_quantised_loading(tmp_path):
    """In eight and four bits, by the libraries that transformers loads weights with."""
    model = classifier(options=VIT | {"dim": 32})
    model.save_pretrained(tmp_path)
    assert isinstance(model.get_input_embeddings(), torch.nn.Module)  # torchao asks for it
    x = torch.randn(2, 3, 8, 8)
    pytest.importorskip("bitsandbytes")
    for bits, off in (8, 0.1), (4, 0.5):
        how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        small = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=how)
        assert not small.model.blocks[0].mixer.q_proj.weight.is_floating_point()
        near = small(x.to(small.dtype)).logits
        assert (near - model(x).logits).abs().max() < off * model(x).logits.abs().max()
