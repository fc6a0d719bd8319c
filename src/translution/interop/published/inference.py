"""Finds the model and the options that published weights belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .source import read

__all__ = ["PublishedModel", "infer_published"]

HEAD_DIM = 64  # of all ViTs and GPTs in the published code
KERNEL_SIZE = 7  # of ACmix's attention in its ResNets


@dataclass
class PublishedModel:
    """The model that published weights belong to.

    Attributes:
        name: the name of its family, for `create_model`.
        options: its options.
        image_size: the argument of `load_published`.
        assumed: one line for each option that the weights do not show.
    """

    name: str
    options: dict[str, Any]
    image_size: int = 224
    assumed: list[str] = field(default_factory=list)


def infer_published(
    source: Mapping[str, Any] | str | Path, given: Mapping[str, Any] | None = None
) -> PublishedModel:
    """Find the model and the options that published weights belong to, from names and shapes.

    Args:
        source: as in `load_published`.
        given: options that are known, such as heads. They replace those that would be inferred, and
            others follow from them.

    Returns:
        The model's name and options. They leave out what has its default.

    Raises:
        ValueError: the weights are not those of a published ViT, GPT, ResNet or Swin, or an option
            cannot be inferred; the message says which one has to be given.
        OSError: a file cannot be read.
    """
    weights, given = read(source), dict(given or {})
    for name, infer in (
        ("to_patch_embedding.2.weight", _vit),
        ("wte.weight", _gpt),
        ("layer1.0.conv1.weight", _resnet),
        ("patch_embed.proj.weight", _swin),
    ):
        if name in weights:
            found = infer(_Weights(weights), given)
            found.options |= given
            return found
    raise ValueError(
        "source: got weights without names of a published ViT, GPT, ResNet or Swin, such as "
        f"{sorted(weights)[:3]}"
    )


class _Weights(dict[str, Tensor]):
    """Weights by name. A missing one is an error that says what the weights are not."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"source: has no {name!r}, want all weights of a published model")

    def count(self, pattern: str) -> int:
        """The number of different numbers at the group of a pattern, as of layers."""
        return len({m[1] for name in self if (m := re.match(pattern, name))})

    def has(self, end: str) -> bool:
        return any(name.endswith(end) for name in self)


def _root(number: int, name: str, why: str) -> int:
    """The square root of a number.

    Raises:
        ValueError: it is not an integer, so the option `name` has to be given.
    """
    root = math.isqrt(number)
    if root * root != number:
        raise ValueError(f"{name}: cannot be inferred, because {why}; want it given")
    return root


def _vit(weights: _Weights, given: dict[str, Any]) -> PublishedModel:
    found = PublishedModel("vit", {"num_classes": len(weights["mlp_head.weight"])})
    _transformer(weights, given, found)
    if "pos_embedding" in weights and found.options["mixer"] != "attention":
        found.options["learned_positions"] = True
    found.assumed.append("pool 'cls': the mean that published models can have is pool 'all'")
    pixels = weights["to_patch_embedding.2.weight"].shape[1]
    if "patch_size" not in given:
        channels = given.get("in_channels", 1 if pixels % 3 else 3)
        why = f"a patch of {channels} channels has {pixels} numbers, which is not a square"
        found.options["patch_size"] = _root(pixels // channels, "patch_size", why)
        found.options["in_channels"] = channels
    if "image_size" in given:
        return found
    patch = given.get("patch_size", found.options.get("patch_size"))
    if not isinstance(patch, int):
        raise ValueError(f"image_size: cannot be inferred with patch_size {patch}; want it given")
    tables = [w for name, w in weights.items() if name.endswith("unique_params")]
    if "pos_embedding" in weights:
        patches = weights["pos_embedding"].shape[1] - 1
        side = _root(patches, "image_size", f"{patches} patches are not a square")
    elif tables:
        rows = len(tables[0]) - 3
        side = _root(rows, "image_size", f"{rows} offsets are not those of a square") // 2 + 1
    else:
        raise ValueError("image_size: cannot be inferred without tables; want it given")
    found.options["image_size"] = side * patch
    found.assumed.append(f"image_size {side * patch}: the image is square")
    return found


def _gpt(weights: _Weights, given: dict[str, Any]) -> PublishedModel:
    vocabulary = len(weights["wte.weight"])
    found = PublishedModel("gpt", {"vocab_size": vocabulary, "double_final_norm": True})
    stem = _transformer(weights, given, found)
    if "wpe.weight" in weights and found.options["mixer"] != "attention":
        found.options["learned_positions"] = True
    found.options["context"] = weights[f"{stem}.layers.0.0.causal"].shape[-1]
    return found


def _transformer(weights: _Weights, given: dict[str, Any], found: PublishedModel) -> str:
    """Find the options that ViT and GPT share, and return the published name of the blocks."""
    stem = "translution" if "translution.norm.weight" in weights else "transformer"
    layer = f"{stem}.layers.0.0"
    depth = weights.count(rf"{stem}\.layers\.(\d+)\.")
    dim, inner = weights[f"{layer}.to_out.0.weight"].shape
    options = {"dim": dim, "depth": depth, "mixer": "attention"}
    low_rank = weights.has("2.unique_params")
    if stem == "translution":
        options["mixer"] = "alpha" if low_rank else "translution"
        tables = [n for n in "qkv" if f"{layer}.to_{n}{'2' * low_rank}.unique_params" in weights]
        options["relative"] = "".join(tables)
        last = weights.count(rf"{stem}\.layers\.(\d+)\.0\..*unique_params")
        if last < depth:
            options["relative_depth"] = last
        turned = low_rank and f"{layer}.rope.cos_cached" in weights
        if turned or f"{layer}.rotary_emb.cos_cached" in weights:
            options["position"] = "rotary"
    elif weights.has("rope.cos_cached") or weights.has("rotary_emb.cos_cached"):
        options["mixer"] = "rotary"
    heads, head_dim = given.get("heads"), given.get("head_dim")
    if heads is None:
        head_dim = HEAD_DIM if head_dim is None else head_dim
        if inner % head_dim:
            raise ValueError(
                f"heads: cannot be inferred, because {inner} channels are not heads of {head_dim}; "
                "want heads or head_dim given"
            )
        heads = inner // head_dim
        found.assumed.append(f"heads {heads}: a head has {head_dim} channels")
    options |= {"heads": heads, "head_dim": inner // heads}
    if low_rank:
        (one, *_) = (w for name, w in weights.items() if name.endswith("2.unique_params"))
        options["rank"] = one.shape[1] // heads
    options["mlp_ratio"] = len(weights[f"{stem}.layers.0.1.net.1.weight"]) / dim
    found.options |= options
    return stem


def _resnet(weights: _Weights, given: dict[str, Any]) -> PublishedModel:
    width, in_channels = weights["conv1.weight"].shape[:2]
    mixed = "layer1.0.conv2.rate1" in weights
    options: dict[str, Any] = {
        "mixer": "acmix" if mixed else "convolution",
        "depths": tuple(weights.count(rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
        "in_channels": in_channels,
        "num_classes": len(weights["fc.weight"]),
        "dim": width,
        "expansion": len(weights["layer1.0.conv3.weight"]) // width,
    }
    found = PublishedModel("resnet", options)
    if mixed:
        taps, slices = weights["layer1.0.conv2.fc.weight"].shape[:2]
        options |= {"published": True, "heads": slices // 3, "conv_kernel_size": math.isqrt(taps)}
        if "kernel_size" not in given:
            options["kernel_size"] = KERNEL_SIZE
            found.assumed.append(f"kernel_size {KERNEL_SIZE}: that of the attention")
        inside = width
    else:
        _, inside, options["conv_kernel_size"], _ = weights["layer1.0.conv2.weight"].shape
    channels = len(weights["layer1.0.conv1.weight"])
    groups = 1 if mixed else channels // inside
    if groups > 1 or channels != width:
        options |= {"groups": groups, "width_per_group": channels // groups}
    return found


def _swin(weights: _Weights, given: dict[str, Any]) -> PublishedModel:
    width, in_channels, patch = weights["patch_embed.proj.weight"].shape[:3]
    first = [f"layers.{stage}.blocks.0" for stage in range(4)]
    tables = [weights[f"{block}.attn.relative_position_bias_table"] for block in first]
    windows = [math.isqrt(len(table)) // 2 + 1 for table in tables]
    mixed = f"{first[0]}.attn.rate1" in weights
    window = given.get("window_size", max(windows))
    options: dict[str, Any] = {
        "mixer": "acmix" if mixed else "attention",
        "depths": tuple(weights.count(rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)),
        "in_channels": in_channels,
        "num_classes": len(weights["head.weight"]),
        "patch_size": patch,
        "dim": width,
        "heads": tuple(table.shape[1] for table in tables),
        "mlp_ratio": len(weights[f"{first[0]}.mlp.fc1.weight"]) / width,
        "window_size": window,
        "qkv_bias": f"{first[0]}.attn.qkv.bias" in weights,
        "patch_norm": "patch_embed.norm.weight" in weights,
    }
    if mixed:
        taps = weights[f"{first[0]}.attn.fc.weight"].shape[0]
        options |= {"published": True, "conv_kernel_size": math.isqrt(taps)}
    found = PublishedModel("swin", options)
    if "qk_scale" not in given:
        found.assumed.append("qk_scale None, which is 1 / sqrt(head_dim)")
    if (positions := weights.get("absolute_pos_embed")) is not None:
        found.image_size = math.isqrt(positions.shape[1]) * patch
        options["absolute_positions"] = found.image_size
        return found
    for stage, own in enumerate(windows):
        mask = weights.get(f"layers.{stage}.blocks.1.attn_mask")
        size = own if own < window else mask is not None and math.isqrt(len(mask)) * window
        if size:
            found.image_size = size * patch * 2**stage
            return found
    found.assumed.append(f"image_size {found.image_size}")
    return found
