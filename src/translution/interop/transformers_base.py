"""A model of this library behind the interface of Hugging Face's transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..models import GPT, Backbone, ViT, create_model
from ..models.inspection import record_tokens, record_weights
from ..models.pretrained import Pretrained
from ..models.registry import current_options
from .image_processor import TranslutionImageProcessor, entries_of
from .transformers_configuration import plain

__all__ = ["Wrapped"]

M = TypeVar("M", bound="Wrapped")


class Wrapped(PreTrainedModel):
    """A model of this library behind transformers' interface, as `.model`."""

    config_class: ClassVar[Any]
    base_model_prefix = "model"  # the weights in a folder of this library lack it
    supports_gradient_checkpointing = True
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
        options = plain(model.config)
        config = entries_of(model) | config
        made = cls.config_class(architecture=model.family, options=options, **config)
        with torch.device("meta"):
            wrapped = cls(made)
        wrapped.model = model
        return wrapped.train(model.training)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *others: Any, **more: Any
    ) -> str:
        if attn_implementation not in (None, "eager"):
            raise ValueError(
                f"attn_implementation: got {attn_implementation!r}, want None (or 'eager'): the "
                "model's mixer has its own"
            )
        return "eager"

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """The blocks recompute in the backward pass, or do again what their configuration says."""
        function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
        keywords = getattr(gradient_checkpointing_func, "keywords", {})
        if function is not checkpoint:
            raise ValueError("offload: got True, want False: activations stay on their device")
        if unknown := {k for k, v in keywords.items() if (k, v) != ("use_reentrant", False)}:
            name = min(unknown)
            raise ValueError(
                f"gradient_checkpointing_kwargs: got {name}={keywords[name]!r}, want none but "
                "use_reentrant=False, which is always so here"
            )
        blocks: Any = getattr(self.model, "blocks", ())
        for i, block in enumerate(blocks):
            chosen = enable and i % every_n_layers == 0
            own = self.model.config.activation_checkpointing
            block.activation_checkpointing = "full" if chosen else own
        if isinstance(self.model, Backbone):
            if every_n_layers != 1:
                raise ValueError(f"every_n_layers: got {every_n_layers} for a backbone, want 1")
            self.model.recompute_blocks(enable)
        self.gradient_checkpointing = enable  # is_gradient_checkpointing looks for it

    def observed(
        self, call: Callable[[], Tensor], states: bool | None, weights: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Any]:
        """The result of a call of the model, its hidden states, and its attention weights.

        Args:
            call: calls the model.
            states, weights: whether the last two are wanted; None is what the configuration says.
        """
        states = bool(self.config.output_hidden_states if states is None else states)
        weights = bool(self.config.output_attentions if weights is None else weights)
        if not states and not weights:  # the usual case has no hooks, which programs cannot trace
            return call(), None, None
        if weights and not isinstance(self.model, ViT | GPT):
            raise ValueError(
                f"output_attentions: got True for the backbone {self.model.family!r}, want a ViT "
                "or a GPT"
            )
        record: Any = record_tokens if isinstance(self.model, ViT | GPT) else _record_stages
        with contextlib.ExitStack() as records:
            seen: Any = records.enter_context(record(self.model)) if states else ()
            found: Any = records.enter_context(record_weights(self.model)) if weights else ()
            result = call()
        return result, tuple(seen) if states else None, tuple(found) if weights else None

    def as_dict(self, return_dict: bool | None) -> bool:
        """Whether forward returns its results by name."""
        return bool(self.config.return_dict if return_dict is None else return_dict)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a folder lacks, such as the head for new labels. What has its values is marked so,
        and transformers leaves it."""
        super()._init_weights(module)
        own = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.LayerNorm)
        for parameter in () if own else module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.trunc_normal_(parameter, std=0.02)


@contextlib.contextmanager
def _record_stages(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, a call of a backbone puts what each stage returns into the list."""
    found: list[Tensor] = []

    def take(stage: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    stages: Any = model.stages
    with contextlib.ExitStack() as hooks:
        for stage in stages:
            hooks.callback(stage.register_forward_hook(take).remove)
        yield found
