"""Adapters for the attention modules of other libraries, one per family.

A module is recognised by the name of its Python class, so none of those libraries is imported here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Call", "Family", "Source", "family_of"]


class Call(NamedTuple):
    """The arguments of a forward call, in one form for all families.

    Attributes:
        x: the tokens [batch, tokens, dim].
        mask: boolean, True where a query sees a key, or numbers that are added to the scores;
            broadcastable to [batch, heads, queries, keys].
        rotation: cosine and sine [batch, tokens, head_dim] of rotary positions.
        cache: a cache of transformers.
    """

    x: Tensor
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    cache: Any = None


@dataclass
class Source:
    """The weights and options of an attention module.

    Attributes:
        dim: channels of a token.
        heads, head_dim: the number of query heads, and the channels of a head.
        matrices: for "q", "k" and "v", a weight [out, in] and a bias [out] or None.
        out: the output projection.
        scale: the factor of the scores.
        dropout: the probability with which an attention weight is dropped in training.
        kv_heads: the number of key and value heads if it is smaller than `heads`, else 0.
        causal: whether a query sees only keys at or before it.
        rotary: whether q and k get rotary positions.
        norms: a norm of each head of "q" or "k", by that name.
        between: modules between the heads and `out`: "norm" acts on the concatenated heads, and
            the sigmoid of "gate" applied to the input multiplies them.
        after: a dropout after `out`.
        index: the layer's number in a cache.
        attributes: further attributes of the module that the model reads.
    """

    dim: int
    heads: int
    head_dim: int
    matrices: dict[str, tuple[Tensor, Tensor | None]]
    out: nn.Module
    scale: float
    dropout: float
    kv_heads: int = 0
    causal: bool = False
    rotary: bool = False
    norms: dict[str, nn.Module] = field(default_factory=dict)
    between: dict[str, nn.Module] = field(default_factory=dict)
    after: nn.Module = field(default_factory=nn.Identity)
    index: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


def _no_preparation(module: nn.Module) -> None:
    """Do nothing. It is a function because a lambda cannot be pickled."""


@dataclass(frozen=True)
class Family:
    """The adapter for one kind of attention module.

    Attributes:
        describe: the `Source` of a module; raises ValueError if the module cannot be converted.
        read: makes a `Call` from the new module and the arguments of its forward, by name.
        result: makes the return value of forward from the new module, the arguments, the output
            tokens [batch, tokens, dim] and the attention weights.
        prepare: called once with the new module, after it has replaced the old one.
    """

    describe: Callable[[Any], Source]
    read: Callable[[Any, dict[str, Any]], Call]
    result: Callable[[Any, dict[str, Any], Tensor, Tensor], Any]
    prepare: Callable[[nn.Module], None] = _no_preparation

    @staticmethod
    def arguments(module: nn.Module) -> tuple[str, ...]:
        """The names of the arguments of the module's forward, in order."""
        return tuple(inspect.signature(module.forward).parameters)


def family_of(module: nn.Module) -> Family | None:
    """The family of a module, or None if it is not a supported self-attention."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind):  # a subclass that keeps forward computes the same
            for (library, name), family in FAMILIES.items():
                if kind.__name__ == name and f"{kind.__module__}.".startswith(f"{library}."):
                    return family
            return None
    return None


def linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a plain linear layer."""
    kind = type(module).__name__
    if kind not in ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D"):
        raise ValueError(f"a projection is a {kind}, want a plain nn.Linear (merge adapters first)")
    weight = module.weight.T if kind == "Conv1D" else module.weight
    if not weight.is_floating_point():
        raise ValueError(f"a projection is quantized ({weight.dtype}), want floating point")
    return weight, module.bias


def split_qkv(weight: Tensor, bias: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of "q", "k" and "v", split from one projection that computes all three."""
    biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
    return dict(zip("qkv", zip(weight.chunk(3), biases, strict=True), strict=True))


# -- transformers ----------------------------------------------------------------------------------


def _transformers_source(module: Any, **options: Any) -> Source:
    """A source with the options that all attention modules of transformers have in common."""
    implementation = module.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation is {implementation!r}, whose masks are not dense; want 'sdpa' or "
            "'eager'"
        )
    causal = bool(module.is_causal)
    return Source(**options, causal=causal, scale=module.scaling, index=_layer_number(module))


def _layer_number(module: Any) -> int:
    return getattr(module, "layer_idx", None) or 0


def _separate(module: Any) -> Source:
    """ViT, DeiT, DINOv2, Llama, Mistral and Qwen: q_proj, k_proj, v_proj and o_proj."""
    config, norms = module.config, {}
    for name in "qk":
        if hasattr(module, f"{name}_norm"):
            norms[name] = getattr(module, f"{name}_norm")
    rotary = "position_embeddings" in Family.arguments(module)
    return _transformers_source(
        module,
        dim=module.q_proj.weight.shape[1],
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=module.head_dim,
        matrices={name: linear(getattr(module, f"{name}_proj")) for name in "qkv"},
        out=module.o_proj,
        dropout=module.attention_dropout,
        rotary=rotary,
        norms=norms,
    )


def _bert(module: Any) -> Source:
    """BERT, RoBERTa and ELECTRA, whose output projection is outside the attention module."""
    names = {"q": "query", "k": "key", "v": "value"}
    return _transformers_source(
        module,
        dim=module.query.weight.shape[1],
        heads=module.num_attention_heads,
        head_dim=module.attention_head_size,
        matrices={name: linear(getattr(module, long)) for name, long in names.items()},
        out=nn.Identity(),
        dropout=module.dropout.p,
    )


def _gpt2(module: Any) -> Source:
    return _transformers_source(
        module,
        dim=module.embed_dim,
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=split_qkv(*linear(module.c_attn)),
        out=module.c_proj,
        dropout=module.attn_dropout.p,
        after=module.resid_dropout,
    )


def _read_transformers(module: Any, given: dict[str, Any]) -> Call:
    causal = module.layer.layout.causal
    if given.get("is_causal", causal) not in (causal, None):
        raise ValueError(f"is_causal: got {given['is_causal']}, want {causal}, as converted")
    cache = given.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and "DynamicCache" not in {kind.__name__ for kind in type(cache).__mro__}:
        raise ValueError(
            f"past_key_values: got a {type(cache).__name__}, want a DynamicCache (only it can hold "
            "the inputs that relative keys and values are made from), or use_cache=False"
        )
    return Call(
        given["hidden_states"],
        given.get("attention_mask"),
        given.get("position_embeddings"),
        cache,
    )


def _tokens_and_weights(_: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    return y, weights


class Recorder:
    """A forward hook that makes output_attentions=True of transformers work for a converted layer.

    transformers records the attention weights of its own classes only, through a hook that is a
    local function and cannot be pickled. This object holds that hook, and creates it again when it
    is unpickled.
    """

    def __init__(self) -> None:
        capturing = sys.modules.get("transformers.utils.output_capturing")
        install = getattr(capturing, "install_output_capuring_hook", None)
        carrier = nn.Module()
        if install is not None:
            install(carrier, "attentions", 1)
        self.hooks = list(carrier._forward_hooks.values())

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for hook in self.hooks:
            hook(module, args, output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recorder, ()


def _add_recorder(module: nn.Module) -> None:
    module.register_forward_hook(Recorder())


# -- timm ------------------------------------------------------------------------------------------


def _timm(module: Any) -> Source:
    def present(**named: nn.Module | None) -> dict[str, nn.Module]:
        return {k: m for k, m in named.items() if m is not None and not isinstance(m, nn.Identity)}

    return Source(
        dim=module.qkv.weight.shape[1],
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=split_qkv(*linear(module.qkv)),
        out=module.proj,
        scale=module.scale,
        dropout=module.attn_drop.p,
        norms=present(q=module.q_norm, k=module.k_norm),
        between=present(norm=module.norm, gate=getattr(module, "gate", None)),
        after=module.proj_drop,
    )


def _read_timm(_: Any, given: dict[str, Any]) -> Call:
    x, mask = given["x"], given.get("attn_mask")
    if given.get("is_causal"):  # takes precedence over a mask, as in timm
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return Call(x, mask)


def _tokens_only(_: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    return y


# -- torch.nn.MultiheadAttention -------------------------------------------------------------------


def _multihead(module: Any) -> Source:
    if not module._qkv_same_embed_dim:
        raise ValueError("kdim or vdim differ from embed_dim: it is cross-attention")
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("add_bias_kv or add_zero_attn add keys that have no position")
    # in_proj_bias None keeps TransformerEncoderLayer from its fused path, which reads the weights
    attributes = {
        "batch_first": module.batch_first, "in_proj_bias": None, "_qkv_same_embed_dim": False,
        "num_heads": module.num_heads, "embed_dim": module.embed_dim,
    }  # fmt: skip
    return Source(
        dim=module.embed_dim,
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=split_qkv(module.in_proj_weight, module.in_proj_bias),
        out=module.out_proj,
        scale=module.head_dim**-0.5,
        dropout=module.dropout,
        attributes=attributes,
    )


def _read_multihead(module: Any, given: dict[str, Any]) -> Call:
    x = given["query"]
    if given["key"] is not x or given["value"] is not x:
        raise ValueError(
            f"{module.name}: key: got another tensor than query, want self-attention; leave this "
            "layer out of the conversion (layers=)"
        )
    if x.ndim != 3:
        raise ValueError(f"query: got shape {tuple(x.shape)}, want a batch (three axes)")
    x = x if module.batch_first else x.transpose(0, 1)
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    if given.get("is_causal") and mask is None:
        raise ValueError("attn_mask: got None with is_causal=True, want the mask, as in torch")
    mask = None if mask is None else _additive_mask(mask, x)
    if mask is not None and mask.ndim == 3:  # [batch * heads, queries, keys]
        mask = mask.unflatten(0, (len(x), -1))
    if padding is not None:
        padding = _additive_mask(padding, x)[:, None, None]
        mask = padding if mask is None else mask + padding
    return Call(x, mask)


def _additive_mask(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of torch as numbers to add to scores; a boolean one is True where a key is hidden."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))


def _multihead_result(module: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    if not module.batch_first:
        y = y.transpose(0, 1)
    if not given.get("need_weights", True):
        return y, None
    return y, weights.mean(1) if given.get("average_attn_weights", True) else weights


SEPARATE = Family(_separate, _read_transformers, _tokens_and_weights, _add_recorder)
BERT = Family(_bert, _read_transformers, _tokens_and_weights, _add_recorder)
GPT2 = Family(_gpt2, _read_transformers, _tokens_and_weights, _add_recorder)
TIMM = Family(_timm, _read_timm, _tokens_only)
MULTIHEAD = Family(_multihead, _read_multihead, _multihead_result)
FAMILIES = {  # by the package and the name of the class, as many packages have an "Attention"
    ("transformers.models.vit", "ViTAttention"): SEPARATE,
    ("transformers.models.deit", "DeiTAttention"): SEPARATE,
    ("transformers.models.dinov2", "Dinov2Attention"): SEPARATE,
    ("transformers.models.dinov2_with_registers", "Dinov2WithRegistersAttention"): SEPARATE,
    ("transformers.models.llama", "LlamaAttention"): SEPARATE,
    ("transformers.models.mistral", "MistralAttention"): SEPARATE,
    ("transformers.models.qwen2", "Qwen2Attention"): SEPARATE,
    ("transformers.models.qwen3", "Qwen3Attention"): SEPARATE,
    ("transformers.models.bert", "BertSelfAttention"): BERT,
    ("transformers.models.roberta", "RobertaSelfAttention"): BERT,
    ("transformers.models.electra", "ElectraSelfAttention"): BERT,
    ("transformers.models.gpt2", "GPT2Attention"): GPT2,
    ("timm.layers.attention", "Attention"): TIMM,
    ("timm.models.vision_transformer", "Attention"): TIMM,
    ("torch.nn", "MultiheadAttention"): MULTIHEAD,
}
