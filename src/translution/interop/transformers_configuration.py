"""The configurations of the models in Hugging Face's transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..models import GPT, Backbone, create_model
from ..models.pretrained import Pretrained
from ..models.registry import current_options
from .image_processor import take_entries

__all__ = ["TranslutionGPTConfig", "TranslutionImageConfig", "check_untied", "plain"]

NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
"""What transformers calls options that ViT and GPT have in common."""

IMAGE_NAMES = NAMES | {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
}
TEXT_NAMES = NAMES | {"vocab_size": "vocab_size", "max_position_embeddings": "context"}


def _take_options(given: dict[str, Any], options: dict[str, Any], names: dict[str, str]) -> None:
    """Move what is given by transformers' names into the options.

    Raises:
        ValueError: an option has another value already.
    """
    for name in names.keys() & given.keys():
        value, own = given.pop(name), names[name]
        if options.setdefault(own, value) != value:
            raise ValueError(
                f"{name}: got {value}, but options have {own} {options[own]}; want one"
            )


def _option(name: str, default: str = "") -> Any:
    """An option of the model as an attribute of the configuration, where the model has it.

    Where the option is None, the attribute is the option `default`.
    """

    def get(self: Any) -> Any:
        if name not in self.options:
            raise AttributeError(f"the architecture {self.architecture!r} has no option {name!r}")
        value = self.options[name]
        value = self.options[default] if value is None and default else value
        square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return value[0] if square else value

    def put(self: Any, value: Any) -> None:
        self.options[name] = value

    return property(get, put)


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
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, image_size,
            patch_size, num_channels: as transformers calls the options dim, depth, heads, kv_heads,
            image_size, patch_size and in_channels of a ViT. They are also attributes, those of
            them that the model has. A backbone is made with `options` of its own; its hidden_size
            is the number of channels of its last map.

    Raises:
        ValueError: an unknown architecture or option, values that don't fit or contradict each
            other, features_only, or a language model.
    """

    model_type = "translution-image"
    architecture: str = "vit"
    options: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        options = dict(self.options or {})
        given = options.pop("num_classes", None)
        of_stages = sorted(NAMES.keys() & kwargs.keys())
        if of_stages and isinstance(_resolve(self.architecture, {}), Backbone):
            raise ValueError(
                f"{of_stages[0]}: got {kwargs[of_stages[0]]}, but {self.architecture!r} has "
                "stages, want options= of its own"
            )
        _take_options(kwargs, options, IMAGE_NAMES)
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
        self.architecture, self.options = model.family, plain(model.config)
        del self.options["num_classes"]  # num_labels alone says it

    @property
    def hidden_size(self) -> int:
        options = self.options or {}
        model: Any = _resolve(self.architecture, options)
        return model.channels[-1] if isinstance(model, Backbone) else options["dim"]

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        assert self.options is not None  # they are filled in
        self.options["dim"] = value

    num_hidden_layers = _option("depth")
    num_attention_heads = _option("heads")
    num_key_value_heads = _option("kv_heads", default="heads")
    image_size = _option("image_size")
    patch_size = _option("patch_size")
    num_channels = _option("in_channels")

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written; transformers leaves out that there are 2 labels."""
        return super().to_diff_dict() | {"num_labels": self.num_labels}


class TranslutionGPTConfig(PreTrainedConfig):
    """Of a causal language model.

    Args:
        architecture: one of `translution.list_models("*gpt*")`; kept as "gpt".
        options: of that model, as in `translution.create_model`; those not given are filled in.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            max_position_embeddings: as transformers calls the options vocab_size, dim, depth,
            heads, kv_heads and context. They are also attributes.

    Raises:
        ValueError: an unknown architecture or option, values that don't fit or contradict each
            other, an image model, or tie_word_embeddings=True: the models of this library have a
            head of their own.
    """

    model_type = "translution-gpt"
    architecture: str = "gpt"
    options: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        take_entries(self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        options = dict(self.options or {})
        _take_options(kwargs, options, TEXT_NAMES)
        super().__post_init__(**kwargs)
        check_untied(self)
        model = _resolve(self.architecture, options)
        if not isinstance(model, GPT):
            raise ValueError(f"architecture: got {self.architecture!r}, want a language model")
        self.architecture, self.options = model.family, plain(model.config)

    vocab_size = _option("vocab_size")
    hidden_size = _option("dim")
    num_hidden_layers = _option("depth")
    num_attention_heads = _option("heads")
    num_key_value_heads = _option("kv_heads", default="heads")
    max_position_embeddings = _option("context")


def check_untied(config: Any) -> None:
    if getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            "tie_word_embeddings: got True, want False: the embedding and the head of this model "
            "have weights of their own"
        )


def plain(config: Any) -> dict[str, Any]:
    """A configuration's options as JSON has them."""
    options = dataclasses.asdict(config)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
