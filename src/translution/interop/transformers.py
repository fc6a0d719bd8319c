"""The door to Hugging Face's transformers; importing this module registers it.

    import translution.interop.transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer

    config = translution.interop.transformers.TranslutionImageConfig(
        architecture="alpha_vit_tiny_patch16_224", options={"image_size": 32}, num_labels=10
    )
    model = AutoModelForImageClassification.from_config(config)

Folders of `save_pretrained` are transformers' own there; `from_translution` takes a model of this
library with its weights, and `.model` is that model again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput

from ..models import GPT, create_model
from ..models.pretrained import Pretrained
from ..models.registry import current_options
from .generation_cache import TranslutionCache
from .image_processor import BACKENDS, TranslutionImageProcessor, entries_of, take_entries

__all__ = [
    "TranslutionCache",
    "TranslutionForCausalLM",
    "TranslutionForImageClassification",
    "TranslutionGPTConfig",
    "TranslutionImageConfig",
    "TranslutionImageProcessor",
]

M = TypeVar("M", bound="_Wrapped")


def _resolve(architecture: str, options: dict[str, Any]) -> Pretrained:
    """The model that they say, on the meta device: it checks them, and has all the options."""
    with torch.device("meta"):
        model = create_model(architecture, **current_options(architecture, options, saved=True))
    if not isinstance(model, Pretrained):
        raise ValueError(f"architecture: got {architecture!r}, want a model of this library")
    return model


class TranslutionImageConfig(PreTrainedConfig):
    """Of an image classifier.

    Args:
        architecture: one of `translution.list_models`; kept as its family, "vit" or a backbone's.
        options: of that model, as in `translution.create_model`; those not given are filled in.
            The number of classes is `num_labels` (or the length of `id2label`).
        preprocessing: how an image becomes the model's input, as `Preprocessing.to_dict` gives it.

    Raises:
        ValueError: an unknown architecture or option, values that don't fit, features_only, or a
            language model.
    """

    model_type = "translution-image"
    architecture: str = "vit"
    options: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        options = dict(self.options or {})
        given = options.pop("num_classes", None)
        take_entries(self, kwargs)
        if self.id2label is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = 1000 if given is None else given
        super().__post_init__(**kwargs)
        if given is not None and given != self.num_labels:
            raise ValueError(
                f"options: got num_classes {given}, but num_labels {self.num_labels}; want one"
            )
        model = _resolve(self.architecture, options | {"num_classes": self.num_labels})
        if isinstance(model, GPT) or getattr(model, "features_only", False):
            raise ValueError(
                f"architecture: got {self.architecture!r} with {options}, want an image classifier"
            )
        self.architecture, self.options = model.family, _plain(model.config)
        del self.options["num_classes"]  # num_labels alone says it

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written; transformers leaves out that there are 2 labels."""
        return super().to_diff_dict() | {"num_labels": self.num_labels}


class TranslutionGPTConfig(PreTrainedConfig):
    """Of a causal language model.

    Args:
        architecture: one of `translution.list_models("*gpt*")`; kept as "gpt".
        options: of that model, as in `translution.create_model`; those not given are filled in.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings: as
            transformers calls the options vocab_size, dim, depth, heads and context.

    Raises:
        ValueError: an unknown architecture or option, values that don't fit, an image model, or
            tie_word_embeddings=True: the models of this library have a head of their own.
    """

    model_type = "translution-gpt"
    architecture: str = "gpt"
    options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        take_entries(self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        _check_untied(self)
        model = _resolve(self.architecture, self.options or {})
        if not isinstance(model, GPT):
            raise ValueError(f"architecture: got {self.architecture!r}, want a language model")
        self.architecture, self.options = model.family, _plain(model.config)

    def _option(name: str) -> Any:
        def put(self: Any, value: Any) -> None:
            self.options[name] = value

        return property(lambda self: self.options[name], put)

    vocab_size = _option("vocab_size")
    hidden_size = _option("dim")
    num_hidden_layers = _option("depth")
    num_attention_heads = _option("heads")
    max_position_embeddings = _option("context")
    del _option


def _check_untied(config: Any) -> None:
    if getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            "tie_word_embeddings: got True, want False: the embedding and the head of this model "
            "have weights of their own"
        )


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's options as JSON has them."""
    options = dataclasses.asdict(config)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}


class _Wrapped(PreTrainedModel):
    """A model of this library behind transformers' interface, as `.model`."""

    config_class: ClassVar[Any]
    base_model_prefix = "model"  # the weights in a folder of this library lack it
    _no_split_modules: ClassVar[Any] = ["Block"]
    _classes_option: ClassVar[str | None] = None

    def __init__(self, config: Any):
        super().__init__(config)
        options = current_options(config.architecture, dict(config.options), saved=True)
        if self._classes_option:
            options[self._classes_option] = config.num_labels
        self.model = create_model(config.architecture, **options)
        self.model.preprocessing = TranslutionImageProcessor.described_by(config)
        for parameter in self.model.parameters():
            # the model has started its weights itself; on the meta device they are still to come
            parameter._is_hf_initialized = not parameter.is_meta
        self.post_init()

    @classmethod
    def from_translution(cls: type[M], model: Pretrained, **config: Any) -> M:
        """This model, with its weights, behind transformers' interface.

        Args:
            model: not copied.
            config: more of the configuration, such as id2label.
        """
        options = _plain(model.config)
        config = entries_of(model) | config
        made = cls.config_class(architecture=model.family, options=options, **config)
        with torch.device("meta"):
            wrapped = cls(made)
        wrapped.model = model
        return wrapped.train(model.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a folder lacks, such as the head for new labels. What has its values is marked so,
        and transformers leaves it."""
        super()._init_weights(module)
        own = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.LayerNorm)
        for parameter in () if own else module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.trunc_normal_(parameter, std=0.02)


class TranslutionForImageClassification(_Wrapped):
    """A ViT or a backbone: pixel_values -> logits, and with labels the loss."""

    config_class = TranslutionImageConfig
    main_input_name = "pixel_values"
    _classes_option = "num_classes"

    def get_input_embeddings(self) -> nn.Module:
        """The part that turns pixels into the first tokens or the first map."""
        return getattr(self.model, "embed", None) or next(self.model.children())

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> Any:
        """
        Args:
            pixel_values: [batch, channels, height, width].
            labels: int64 [batch]; floats [batch, num_labels] for several at once
                (`problem_type`, as transformers has it).

        Returns:
            ImageClassifierOutput: loss (with labels) and logits [batch, num_labels]; as a tuple
            with return_dict=False.
        """
        logits = self.model(pixel_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        made = ImageClassifierOutput(loss=loss, logits=logits)
        return made if _as_dict(self, return_dict) else made.to_tuple()


class TranslutionForCausalLM(_Wrapped, GenerationMixin):
    """A GPT: input_ids -> logits, and with labels the loss; `generate` uses the exact caches.

    Texts of a batch may be padded on the right in training, where no token sees the padding; the
    positions have no other way to skip a token, so padding elsewhere, and any in generation, is an
    error. Text ends at the context unless the model is `unbounded`; `translution generate` forgets
    the oldest tokens instead.
    """

    config_class = TranslutionGPTConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any):
        _check_untied(config)
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TranslutionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **loss: Any,
    ) -> Any:
        """
        Args:
            input_ids: int64 [batch, length]; after those that past_key_values have seen.
            attention_mask: [batch, length], with past_key_values the length of all tokens so far;
                1 for text and 0 for padding, which may be on the right only.
            past_key_values: of an earlier call with use_cache.
            labels: int64 [batch, length], input_ids again; -100 is not asked for.
            use_cache: return past_key_values; without gradients.
            logits_to_keep: only the last so many positions (0 is all), or those of an index.
            loss: for transformers' loss, such as num_items_in_batch.

        Returns:
            CausalLMOutputWithPast: loss (with labels), logits [batch, length, vocab_size], and
            past_key_values; as a tuple with return_dict=False.

        Raises:
            ValueError: padding elsewhere, an attention_mask of another shape, more tokens than the
                context, or unknown arguments.
        """
        unknown = set(loss) - {"num_items_in_batch", "ignore_index", "shift_labels"}
        if any(loss[name] is not None for name in unknown):
            raise ValueError(f"{min(unknown)}: this model has no such input")
        if past_key_values is not None and not isinstance(past_key_values, TranslutionCache):
            raise ValueError(
                f"past_key_values: got {type(past_key_values).__name__}, want a TranslutionCache"
            )
        if attention_mask is not None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            shape = input_ids.shape[0], seen + input_ids.shape[1]
            _check_padding(attention_mask, shape, past_key_values is not None)
        if past_key_values is None and use_cache:
            past_key_values = TranslutionCache(self.model)
        caches = None if past_key_values is None else past_key_values.caches
        hidden = self.model.hidden(input_ids, caches)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, keep])
        cost = None
        if labels is not None:
            more = {name: value for name, value in loss.items() if name not in unknown}
            cost = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **more)
        made = CausalLMOutputWithPast(loss=cost, logits=logits, past_key_values=past_key_values)
        return made if _as_dict(self, return_dict) else made.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """No padding, and no positions: these are where the tokens stand."""
        if attention_mask is not None:
            _check_padding(attention_mask, (len(input_ids), input_ids.shape[1]), True)
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[arg-type]
        return {name: value for name, value in made.items() if name != "position_ids"}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the model's own

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value
        self.model.config.vocab_size = len(value.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value


def _as_dict(model: _Wrapped, return_dict: bool | None) -> bool:
    return bool(model.config.return_dict if return_dict is None else return_dict)


def _check_padding(mask: Tensor, shape: tuple[int, ...], cached: bool) -> None:
    """Check that a mask changes nothing.

    Args:
        mask: 1 for text and 0 for padding.
        shape: the batch, and the number of tokens with those in the cache.
        cached: whether text is generated with caches, which allow no padding.
    """
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, want (batch, length) {shape}"
        )
    text = mask != 0
    if cached and not bool(text.all()):
        raise ValueError(
            "attention_mask: got padding in generation, want texts of one length (or one at a time)"
        )
    if bool((text[:, 1:] & ~text[:, :-1]).any()):
        raise ValueError(
            "attention_mask: got padding before or within a text, want it on the right "
            "(tokenizer.padding_side = 'right')"
        )


for _config, _auto, _model in (
    (TranslutionImageConfig, AutoModelForImageClassification, TranslutionForImageClassification),
    (TranslutionGPTConfig, AutoModelForCausalLM, TranslutionForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)
AutoImageProcessor.register(TranslutionImageConfig, image_processor_classes=BACKENDS)
