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

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput

from .generation_cache import TranslutionCache
from .image_processor import BACKENDS, TranslutionImageProcessor
from .trainer_callback import ConvertedCallback
from .transformers_base import Wrapped
from .transformers_configuration import (
    TranslutionGPTConfig,
    TranslutionImageConfig,
    check_untied,
)

__all__ = [
    "ConvertedCallback",
    "TranslutionCache",
    "TranslutionForCausalLM",
    "TranslutionForImageClassification",
    "TranslutionGPTConfig",
    "TranslutionImageConfig",
    "TranslutionImageProcessor",
]


class TranslutionForImageClassification(Wrapped):
    """A ViT or a backbone: pixel_values -> logits, and with labels the loss."""

    config_class = TranslutionImageConfig
    main_input_name = "pixel_values"
    _classes_option = "num_classes"

    def get_input_embeddings(self) -> nn.Module:
        """The part that turns pixels into the first tokens or the first map."""
        return getattr(self.model, "embed", None) or next(self.model.children())

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """
        Args:
            pixel_values: [batch, channels, height, width].
            labels: int64 [batch]; floats [batch, num_labels] for several at once
                (`problem_type`, as transformers has it).
            output_hidden_states: return the tokens before the first block of a ViT and after each
                block (of the last one the class token only, unless the model has
                `full_last_block`); of a backbone what each stage returns.
            output_attentions: return the attention weights of each block of a ViT, as
                `translution.attention_weights` does.

        Returns:
            ImageClassifierOutput: loss (with labels), logits [batch, num_labels], hidden_states
            and attentions; as a tuple with return_dict=False.

        Raises:
            ValueError: the attention weights of a backbone are asked for.
        """
        logits, states, weights = self.observed(
            lambda: self.model(pixel_values), output_hidden_states, output_attentions
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        made = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=states, attentions=weights
        )
        return made if self.as_dict(return_dict) else made.to_tuple()


class TranslutionForCausalLM(Wrapped, GenerationMixin):
    """A GPT: input_ids -> logits, and with labels the loss; `generate` uses the exact caches.

    Texts of a batch may be padded on the left, and where none is generated also on the right: no
    token sees the padding, and the logits of a text are those that it has alone. Padding within a
    text is an error. Generation ends at the context, with a warning, unless the model is
    `unbounded`; `translution generate` forgets the oldest tokens instead.
    """

    config_class = TranslutionGPTConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any):
        check_untied(config)
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TranslutionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **loss: Any,
    ) -> Any:
        """
        Args:
            input_ids: int64 [batch, length]; after those that past_key_values have seen.
            attention_mask: [batch, length], with past_key_values the length of all tokens so far;
                1 for text and 0 for padding before or after it.
            past_key_values: of an earlier call with use_cache.
            labels: int64 [batch, length], input_ids again; -100 is not asked for.
            use_cache: return past_key_values; without gradients.
            logits_to_keep: only the last so many positions (0 is all), or those of an index.
            output_hidden_states: return the tokens before the first block and after each block;
                the last ones are normed, as the head sees them.
            output_attentions: return the attention weights of each block, [batch, heads, length,
                keys]; with past_key_values the keys are those that a block still sees.
            loss: for transformers' loss, such as num_items_in_batch.

        Returns:
            CausalLMOutputWithPast: loss (with labels), logits [batch, length, vocab_size],
            past_key_values, hidden_states and attentions; as a tuple with return_dict=False.

        Raises:
            ValueError: padding within a text, an attention_mask of another shape, more tokens than
                the context, or unknown arguments.
        """
        if input_ids is None:
            raise ValueError("input_ids: got None, want int64 (batch, length)")
        unknown = set(loss) - {"num_items_in_batch", "ignore_index", "shift_labels"}
        if any(loss[name] is not None for name in unknown):
            raise ValueError(f"{min(unknown)}: this model has no such input")
        if past_key_values is not None and not isinstance(past_key_values, TranslutionCache):
            raise ValueError(
                f"past_key_values: got {type(past_key_values).__name__}, want a TranslutionCache"
            )
        mask = None
        if attention_mask is not None:
            before = 0 if past_key_values is None else past_key_values.get_seq_length()
            mask = _text(attention_mask, (input_ids.shape[0], before + input_ids.shape[1]))
        if past_key_values is None and use_cache:
            past_key_values = TranslutionCache(self.model)
        caches = None if past_key_values is None else past_key_values.caches
        hidden, states, weights = self.observed(
            lambda: self.model.hidden(input_ids, caches, mask),
            output_hidden_states,
            output_attentions,
        )
        if states is not None:
            states = (*states[:-1], hidden)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, keep])
        cost = None
        if labels is not None:
            more = {name: value for name, value in loss.items() if name not in unknown}
            cost = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **more)
        made = CausalLMOutputWithPast(
            loss=cost, logits=logits, past_key_values=past_key_values, hidden_states=states,
            attentions=weights,
        )  # fmt: skip
        return made if self.as_dict(return_dict) else made.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """No positions: these are where the tokens stand. No mask either, if it hides nothing."""
        if attention_mask is not None and attention_mask.shape == input_ids.shape:
            if bool(attention_mask.all()):
                attention_mask = None
            elif not bool(attention_mask[:, -1].all()):
                raise ValueError(
                    "attention_mask: got padding after a text that is continued, want it on the "
                    "left (tokenizer.padding_side = 'left')"
                )
        given: dict[str, Any] = {"attention_mask": attention_mask} | kwargs
        made = super().prepare_inputs_for_generation(input_ids, **given)  # type: ignore[arg-type]
        return {name: value for name, value in made.items() if name != "position_ids"}

    def _prepare_generated_length(  # type: ignore[override]
        self, generation_config: Any, has_default_max_length: bool, input_ids_length: int,
        **others: Any,
    ) -> Any:  # fmt: skip
        """Ends a text at the context: the last token is chosen there, and not seen any more."""
        default = has_default_max_length and generation_config.max_new_tokens is None
        length = generation_config.max_length
        made = super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length, **others,
        )  # fmt: skip
        if default:  # transformers counts it as new tokens, but takes the context for a limit
            made.max_length = length + input_ids_length
        context = self.config.max_position_embeddings
        # prompt lookup guesses so many tokens after a text that lacks two, and the model sees them
        looked_up = getattr(made, "prompt_lookup_num_tokens", None) or 1
        most = context + 2 - looked_up
        if self.model.unbounded or made.max_length <= most:
            return made
        helps = bool(getattr(made, "is_assistant", False))
        if input_ids_length >= most:
            name = "assistant_model" if helps else "input_ids"
            raise ValueError(
                f"{name}: got a text of {input_ids_length} tokens, want at most {most - 1} in the "
                f"context of {context}"
            )
        if not helps:
            warnings.warn(
                f"the texts end after {most} tokens, where the context of {context} is full; "
                "translution.models.generation.generate forgets the oldest tokens instead, "
                "and models with buckets or windows go on",
                stacklevel=4,
            )
        made.max_length = most
        return made

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any
    ) -> Any:
        """The model's own cache, which an assistant and its model can take tokens back from."""
        if model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: got {kind!r}, want 'dynamic': where keys or values depend "
                "on the offset, the caches hold what they are made of"
            )
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TranslutionCache(self.model)
            if getattr(generation_config, "is_assistant", False):
                model_kwargs["past_key_values"].activate_past_recording()
        return None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # but the model's own

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value
        self.model.config.vocab_size = len(value.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value


def _text(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """What is text, boolean [batch, tokens]; None if no token would see padding anyway.

    Args:
        attention_mask: 1 for text and 0 for padding.
        shape: the batch, and the number of tokens with those in the cache.

    Raises:
        ValueError: another shape, or padding within a text.
    """
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, want (batch, length) {shape}"
        )
    text = attention_mask != 0
    starts = text[:, :1].sum(1) + (text[:, 1:] & ~text[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        raise ValueError(
            "attention_mask: got padding within a text, want it on the left, or on the right of "
            "texts that are not continued (tokenizer.padding_side)"
        )
    return None if bool(text[:, 0].all()) else text


for _config, _auto, _model in (
    (TranslutionImageConfig, AutoModelForImageClassification, TranslutionForImageClassification),
    (TranslutionGPTConfig, AutoModelForCausalLM, TranslutionForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)
AutoImageProcessor.register(TranslutionImageConfig, image_processor_classes=BACKENDS)
