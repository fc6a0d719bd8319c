"""The grid and the prefix tokens of another library's model, as far as the model defines them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from .grids import check_sizes

__all__ = ["embedding_of", "geometry_of"]

TOKENS = ("cls_token", "distillation_token", "dist_token", "register_tokens", "reg_token")
BUCKETS = 8  # the default for text: few matrices, and inputs of any length


def embedding_of(model: nn.Module) -> nn.Conv2d | None:
    """The convolution that makes patches of an image, or None for a model without one."""
    ends = ("patch_embeddings.projection", "patch_embed.proj")
    embeddings = [
        module
        for name, module in model.named_modules()
        if _ends(name, ends) and isinstance(module, nn.Conv2d)
    ]
    if len(embeddings) > 1:
        raise ValueError(
            f"model: got {len(embeddings)} patch embeddings, want one; convert each part alone"
        )
    return embeddings[0] if embeddings else None


def geometry_of(
    model: Any, embedding: nn.Conv2d | None, grid: Any, prefix: int | None, buckets: Any
) -> tuple[tuple[int, ...], int, Any]:
    """The grid, the number of prefix tokens and the buckets, from the model if they are None.

    Raises:
        ValueError: an argument contradicts the model, or is None and the model does not define it.
    """
    if embedding is not None:
        dropping = [m for n, m in model.named_modules() if _ends(n, ("patch_drop",))]
        if not all(isinstance(m, nn.Identity) for m in dropping):
            raise ValueError("patch_drop: the model drops patches in training, want it to keep all")
        holder = _holder(model, embedding)
        host = _holder(model, holder)
        return _patches(holder, host, embedding, grid), _prefix(model, host, prefix), buckets
    prefix = 0 if prefix is None else prefix
    if grid is not None:
        axes = 2 if isinstance(grid, Sequence) and len(grid) != 1 else 1
        return check_sizes(grid, axes), prefix, buckets
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is None:
        raise ValueError("grid: got None, but the model does not define it; want tokens per axis")
    return (most,), prefix, BUCKETS if buckets is None else buckets


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _holder(model: nn.Module, part: nn.Module) -> nn.Module:
    """The module that has `part` as a child, or `part` itself if there is none."""
    return next((m for m in model.modules() if part in m.children()), part)


def _patches(
    holder: nn.Module, host: nn.Module, embedding: nn.Conv2d, grid: Any
) -> tuple[int, ...]:
    """Rows and columns of patches: those that the model was made for, or `grid` if it fits them."""
    made: Any = getattr(holder, "grid_size", None)
    image: Any = getattr(holder, "image_size", None)
    if made is None and image is not None:
        image = (image, image) if isinstance(image, int) else image
        steps = zip(image, embedding.kernel_size, strict=True)
        made = tuple(pixels // step for pixels, step in steps)
    if grid is None and made is None:
        raise ValueError("grid: got None, but the model does not define it; want rows and columns")
    sizes = check_sizes(made if grid is None else grid, 2)
    one_size = "interpolate_pos_encoding" in inspect.signature(host.forward).parameters
    one_size = getattr(holder, "strict_img_size", one_size)
    if made is not None and one_size and any(a < b for a, b in zip(sizes, made, strict=True)):
        raise ValueError(
            f"grid: got {sizes}, but the model's images have {tuple(made)} patches; want no fewer "
            "(for smaller images, resize_offsets afterwards)"
        )
    return sizes


def _prefix(model: nn.Module, host: nn.Module, prefix: int | None) -> int:
    """The number of tokens before the patches.

    Models of transformers and timm have exactly the tokens that are listed in TOKENS. Other models
    may add more, whose number only the caller can give.
    """
    tokens = {n: p.shape[1] for n, p in model.named_parameters() if _ends(n, TOKENS)}
    count = sum(tokens.values())
    if prefix is None:
        return count
    exact = type(host).__module__.partition(".")[0] in ("transformers", "timm")
    if not isinstance(prefix, int) or (prefix != count if exact else prefix < count):
        names = f" ({', '.join(tokens)})" if tokens else ""
        want = count if exact else f"at least {count}"
        raise ValueError(f"prefix: got {prefix!r}, but the model has {count}{names}; want {want}")
    return count if exact else prefix
