"""Attention modules of other libraries in this one's terms: an adapter per family.

Nothing here imports those libraries: their classes are known by name.
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
    """What a family's forward was asked for.

    x: [batch, tokens, dim]. mask: boolean (True = may look) or a number to add, broadcastable to
    [batch, heads, queries, keys]. turn: cosine and sine [batch, tokens, head_dim] of rotary
    positions. cache: of transformers.
    """

    x: Tensor
    mask: Tensor | None = None
    turn: tuple[Tensor, Tensor] | None = None
    cache: Any = None


@dataclass
class Source:
    """What an attention module holds.

    matrices: of "q", "k" and "v", a weight [out, in] and a bias [out] or None. norms: of each head
    of "q" or "k". out: what follows the heads. between: "norm", on the heads joined; "gate", whose
    sigmoid of the input multiplies them. after: a dropout behind `out`. index: the layer's number
    in a cache. tell: further attributes that its host asks for.
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
    tell: dict[str, Any] = field(default_factory=dict)


def _nothing(module: nn.Module) -> None:
    """(A lambda could not be pickled.)"""


@dataclass(frozen=True)
class Family:
    """How one kind of module is read and spoken for.

    describe: the module as a `Source`; a ValueError says why it can't be one. read: of what stands
    in the module's place, and its forward's arguments by name, the call. answer: of these, the
    tokens [batch, tokens, dim] and the weights, what that forward returns. placed: what its host
    needs to be done with the one in its place.
    """

    describe: Callable[[Any], Source]
    read: Callable[[Any, dict[str, Any]], Call]
    answer: Callable[[Any, dict[str, Any], Tensor, Tensor], Any]
    placed: Callable[[nn.Module], None] = _nothing

    @staticmethod
    def arguments(module: nn.Module) -> tuple[str, ...]:
        """The names of the forward's arguments, in their order."""
        return tuple(inspect.signature(module.forward).parameters)


def family_of(module: nn.Module) -> Family | None:
    """The family that a module is of; None where it is no self-attention that is known."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind):  # what is computed is decided here, under any subclass
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


def parts(weight: Tensor, bias: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Those of "q", "k" and "v" of one matrix for all three."""
    biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
    return dict(zip("qkv", zip(weight.chunk(3), biases, strict=True), strict=True))


# -- transformers ----------------------------------------------------------------------------------


def _hugging(module: Any, **given: Any) -> Source:
    """What its attentions have in common."""
    how = module.config._attn_implementation
    if how not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation is {how!r}, whose masks are not dense; want 'sdpa' or 'eager'"
        )
    causal = bool(module.is_causal)
    return Source(**given, causal=causal, scale=module.scaling, index=_number(module))


def _number(module: Any) -> int:
    return getattr(module, "layer_idx", None) or 0


def _separate(module: Any) -> Source:
    """ViT, DeiT, DINOv2, Llama and its like: q_proj, k_proj, v_proj, o_proj."""
    config, norms = module.config, {}
    for name in "qk":
        if hasattr(module, f"{name}_norm"):
            norms[name] = getattr(module, f"{name}_norm")
    rotary = "position_embeddings" in Family.arguments(module)
    return _hugging(
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
    """The output projection of BERT is outside."""
    names = {"q": "query", "k": "key", "v": "value"}
    return _hugging(
        module,
        dim=module.query.weight.shape[1],
        heads=module.num_attention_heads,
        head_dim=module.attention_head_size,
        matrices={name: linear(getattr(module, long)) for name, long in names.items()},
        out=nn.Identity(),
        dropout=module.dropout.p,
    )


def _gpt2(module: Any) -> Source:
    return _hugging(
        module,
        dim=module.embed_dim,
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=parts(*linear(module.c_attn)),
        out=module.c_proj,
        dropout=module.attn_dropout.p,
        after=module.resid_dropout,
    )


def _read_hugging(module: Any, given: dict[str, Any]) -> Call:
    causal = module.layer.layout.causal
    if given.get("is_causal", causal) not in (causal, None):
        raise ValueError(f"is_causal: got {given['is_causal']}, want {causal}, as converted")
    cache = given.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and "DynamicCache" not in {kind.__name__ for kind in type(cache).__mro__}:
        raise ValueError(
            f"past_key_values: got a {type(cache).__name__}, but a relative key or value is made "
            "from the inputs, which only a DynamicCache can hold; or want use_cache=False"
        )
    return Call(
        given["hidden_states"],
        given.get("attention_mask"),
        given.get("position_embeddings"),
        cache,
    )


def _pair(_: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    return y, weights


class Recorder:
    """A forward hook that lets output_attentions find a module: transformers looks for modules of
    the classes it knows. Its own hook is a local function: pickled, this one makes it anew."""

    def __init__(self) -> None:
        capturing = sys.modules.get("transformers.utils.output_capturing")
        install = getattr(capturing, "install_output_capuring_hook", None)
        apart = nn.Module()
        if install is not None:
            install(apart, "attentions", 1)
        self.hooks = list(apart._forward_hooks.values())

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for hook in self.hooks:
            hook(module, args, output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recorder, ()


def _record(module: nn.Module) -> None:
    module.register_forward_hook(Recorder())


# -- timm ------------------------------------------------------------------------------------------


def _timm(module: Any) -> Source:
    def real(**named: nn.Module | None) -> dict[str, nn.Module]:
        return {k: m for k, m in named.items() if m is not None and not isinstance(m, nn.Identity)}

    return Source(
        dim=module.qkv.weight.shape[1],
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=parts(*linear(module.qkv)),
        out=module.proj,
        scale=module.scale,
        dropout=module.attn_drop.p,
        norms=real(q=module.q_norm, k=module.k_norm),
        between=real(norm=module.norm, gate=getattr(module, "gate", None)),
        after=module.proj_drop,
    )


def _read_timm(_: Any, given: dict[str, Any]) -> Call:
    x, mask = given["x"], given.get("attn_mask")
    if given.get("is_causal"):  # takes precedence, as there
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return Call(x, mask)


def _alone(_: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    return y


# -- torch.nn.MultiheadAttention -------------------------------------------------------------------


def _multihead(module: Any) -> Source:
    if not module._qkv_same_embed_dim:
        raise ValueError("kdim or vdim differ from embed_dim: it is cross-attention")
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("add_bias_kv or add_zero_attn add keys that have no place")
    # in_proj_bias None keeps TransformerEncoderLayer from its fused path, which reads the weights
    tell = {"batch_first": module.batch_first, "in_proj_bias": None, "_qkv_same_embed_dim": False}
    return Source(
        dim=module.embed_dim,
        heads=module.num_heads,
        head_dim=module.head_dim,
        matrices=parts(module.in_proj_weight, module.in_proj_bias),
        out=module.out_proj,
        scale=module.head_dim**-0.5,
        dropout=module.dropout,
        tell=tell | {"num_heads": module.num_heads, "embed_dim": module.embed_dim},
    )


def _read_multihead(module: Any, given: dict[str, Any]) -> Call:
    x = given["query"]
    if given["key"] is not x or given["value"] is not x:
        raise ValueError(
            f"{module.name}: key: got another tensor than query, want self-attention; leave this "
            "one out when converting (layers=)"
        )
    if x.ndim != 3:
        raise ValueError(f"query: got shape {tuple(x.shape)}, want a batch (three axes)")
    x = x if module.batch_first else x.transpose(0, 1)
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    if given.get("is_causal") and mask is None:
        raise ValueError("attn_mask: got None with is_causal=True, want the mask, as in torch")
    mask = None if mask is None else _added(mask, x)
    if mask is not None and mask.ndim == 3:  # [batch * heads, queries, keys]
        mask = mask.unflatten(0, (len(x), -1))
    if padding is not None:
        padding = _added(padding, x)[:, None, None]
        mask = padding if mask is None else mask + padding
    return Call(x, mask)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """torch's masks as numbers to add; its boolean ones are True where a pair may not look."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))


def _perhaps(module: Any, given: dict[str, Any], y: Tensor, weights: Tensor) -> Any:
    if not module.batch_first:
        y = y.transpose(0, 1)
    if not given.get("need_weights", True):
        return y, None
    return y, weights.mean(1) if given.get("average_attn_weights", True) else weights


SEPARATE = Family(_separate, _read_hugging, _pair, _record)
BERT = Family(_bert, _read_hugging, _pair, _record)
TIMM = Family(_timm, _read_timm, _alone)
FAMILIES = {  # by where the class is, as many libraries have an "Attention", and its name
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
    ("transformers.models.gpt2", "GPT2Attention"): Family(_gpt2, _read_hugging, _pair, _record),
    ("timm.layers.attention", "Attention"): TIMM,
    ("timm.models.vision_transformer", "Attention"): TIMM,
    ("torch.nn", "MultiheadAttention"): Family(_multihead, _read_multihead, _perhaps),
}
