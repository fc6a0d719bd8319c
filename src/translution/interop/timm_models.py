"""The image models with what timm asks of them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..models import PVT, SAN, Backbone, ResNet, Swin, ViT
from ..models.backbone import DropPath, drop_path_rates, init_truncated_normal
from ..models.preprocessing import Preprocessing
from .conversion import resize_offsets

__all__ = [
    "POOLS",
    "TimmPVT",
    "TimmResNet",
    "TimmSAN",
    "TimmSwin",
    "TimmViT",
    "pretrained_cfg",
]

# The poolings by timm's names; backbones have one.
POOLS = {"token": "cls", "avg": "mean"}


def pretrained_cfg(preprocessing: Preprocessing) -> dict[str, Any]:
    """A model's preprocessing as timm's `pretrained_cfg`, which `timm.data` makes transforms from.

    timm's transforms do not place a digit on a canvas. For a model of digits a warning says that
    they need images that are on their canvas already.
    """
    if preprocessing.canvas is not None:
        side = preprocessing.canvas
        warnings.warn(
            f"timm's transforms place no digit on a canvas: give them images of {side}×{side} "
            "pixels with the digit in the centre",
            stacklevel=2,
        )
    size = preprocessing.channels, *preprocessing.image_size
    described = {
        "input_size": size, "mean": preprocessing.mean, "std": preprocessing.std,
        "crop_pct": preprocessing.crop, "crop_mode": "center",
        "interpolation": preprocessing.resample, "classifier": "head",
    }  # fmt: skip
    if preprocessing.classes is not None:
        names = preprocessing.classes
        described |= {"num_classes": len(names), "label_names": names}
    return described


class _Timm(nn.Module):
    """What timm asks of a model, beside the model.

    Attributes:
        num_classes, num_features, head_hidden_size, global_pool, feature_info: as in timm.
        pool_kind: the pooling that the model has; `global_pool` is that, or "" for none.
        drop_rate: of what the head sees, in training.
    """

    config: Any
    head: nn.Module
    drop_rate: float = 0.0
    pool_kind: str = "avg"
    preprocessing: Preprocessing | None

    @classmethod
    def from_pretrained(cls, source: Path | str, **hub: Any) -> Any:
        """As `Pretrained.from_pretrained`; the preprocessing becomes timm's `pretrained_cfg`."""
        model: Any = super().from_pretrained(source, **hub)
        if model.preprocessing is not None:
            described = {"num_classes": model.num_classes} | pretrained_cfg(model.preprocessing)
            model.pretrained_cfg = model.default_cfg = described
        return model

    def _know(self, num_features: int, maps: list[tuple[int, int, str]]) -> None:
        """maps: channels, pixels per place and module of each."""
        self.global_pool = self.pool_kind
        self.num_classes = self.config.num_classes
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": module}
            for channels, stride, module in maps
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """What `forward_head` pools."""
        raise NotImplementedError

    def pooled(self, x: Tensor) -> Tensor:
        """[batch, num_features]."""
        raise NotImplementedError

    def intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The features, and for each entry of `feature_info` a map [batch, channels, height,
        width], or the tokens of a ViT with its prefix; None for a last block without a map."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pooled(x) if self.global_pool else x
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The features, and the maps inside the model.

        Args:
            x: images.
            indices: which maps, as in timm: the last so many, or these; None is all.
            norm: apply the last norm of a ViT to its maps.
            stop_early: has no effect; `prune_intermediate_layers` leaves out what is not needed.
            output_fmt: "NCHW" for maps, "NLC" for tokens [batch, places, channels].
            intermediates_only: return the list of maps alone.
            return_prefix_tokens: of a ViT: with each map also its class token [batch, prefix, dim].
            output_dict: return a dict with image_features, image_intermediates and, if wanted,
                image_intermediates_prefix.

        Returns:
            (features, maps), or what the arguments say.

        Raises:
            ValueError: an argument does not fit the model, or a map of the last block is wanted
                that has only the class token.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, want 'NCHW' or 'NLC'")
        of_vit = isinstance(self, ViT)
        for name, value in (("norm", norm), ("return_prefix_tokens", return_prefix_tokens)):
            if value and not of_vit:
                raise ValueError(f"{name}: got True for {type(self).__name__}, want a ViT")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        features, every = self.intermediates(x)
        maps: list[Tensor] = []
        prefixes: list[Tensor] = []
        for i in take:
            each = every[i]
            if each is None:
                raise ValueError(
                    "full_last_block: got False, the last map wants a model made with True (or a "
                    "ViT with pool='mean')"
                )
            if isinstance(self, ViT):
                each = self.norm(each) if norm else each
                prefixes.append(each[:, : self.prefix])
                each = each[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid_of(x))
            maps.append(each if output_fmt == "NCHW" else each.flatten(2).transpose(1, 2))
        if output_dict:
            made = {} if intermediates_only else {"image_features": features}
            made["image_intermediates"] = maps  # type: ignore[assignment]
            if return_prefix_tokens:
                made["image_intermediates_prefix"] = prefixes  # type: ignore[assignment]
            return made
        pairs: Any = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return pairs if intermediates_only else (features, pairs)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps with these indices do not use, so that each parameter left gets a
        gradient. timm calls it with features_only=True.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: whether the norm of a ViT is removed too. Norms of single maps stay with
                them.
            prune_head: whether the head is removed too.

        Returns:
            the indices, counted from the first map.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.keep_maps(take, last)
        if prune_norm and isinstance(getattr(self, "norm", None), nn.LayerNorm):
            self.norm = nn.Identity()
        if prune_head and hasattr(self, "head"):
            self.reset_classifier(0)
        return list(take)

    def keep_maps(self, take: list[int], last: int) -> None:
        """Remove the layers after map number `last`, and norms of maps that are not in `take`."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none for 0 classes: the model then returns what its head saw.

        Without a head, global_pool="" also leaves out the pooling: the model returns its features.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes: got {num_classes}, want at least 0")
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in (self.pool_kind, "") or (num_classes and not pool):
            also = " (or '' without a head, num_classes=0)"
            raise ValueError(f"global_pool: got {pool!r}, want {self.pool_kind!r}{also}")
        self.global_pool = pool
        like = next(self.parameters())
        self.num_classes, self.head = num_classes, nn.Identity()
        if num_classes:
            self.config = dataclasses.replace(self.config, num_classes=num_classes)
            self.head = nn.Linear(self.num_features, num_classes).to(like)
            init_truncated_normal(self.head)
        if self.preprocessing is not None:  # its names are those of the earlier classes
            self.preprocessing = dataclasses.replace(self.preprocessing, classes=None)

    def set_input_size(self, img_size: Any = None, **others: Any) -> None:
        """Fit the model to images of this size, an int or (height, width).

        Tables and learned positions of a ViT are interpolated, as `translution.resize_offsets`
        does; make the optimizer afterwards. A backbone takes images of any size already.

        Raises:
            ValueError: a size that is not made of whole patches, or another argument.
        """
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name}: got {value}, but only img_size can be changed")
        if img_size is None or not isinstance(self, ViT):
            return
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        config = dataclasses.replace(self.config, image_size=size)  # which checks it
        resize_offsets(self, config.grid)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides those of one axis."""
        return {name for name, _ in self.named_parameters() if "positions" in name} | {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong together, for a learning rate per layer."""
        blocks: list[Any] = [(r"^stages\.(\d+)", (0,)), (r"^(?:norm|cls_token)", (99999,))]
        if not coarse:
            blocks.insert(0, (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None))
        return {"stem": r"^(?:stem|embed)", "blocks": blocks}


class TimmViT(_Timm, ViT):
    """Its features are tokens [batch, tokens, dim], of the last block: with a class token that one
    alone, unless full_last_block=True. Its maps are those of the blocks."""

    def __init__(self, config: Any):
        super().__init__(config)
        names = {pool: name for name, pool in POOLS.items()}
        self.pool_kind = names.get(config.pool, config.pool)
        stride = max(config.patch_size)
        self._know(config.dim, [(config.dim, stride, f"blocks.{i}") for i in range(config.depth)])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(x)

    def pooled(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        each: list[Tensor] = []
        features = self.tokens(x, each)
        return features, [tokens if tokens.shape[1] > self.prefix else None for tokens in each]

    def keep_maps(self, take: list[int], last: int) -> None:
        self.blocks = self.blocks[: last + 1]

    def drop_paths(self, rate: float) -> None:
        """Stochastic depth of both parts of a block; its rate rises from 0 to that of the last."""
        self.drop_path_rate = rate
        blocks: Any = self.blocks
        for block, each in zip(blocks, drop_path_rates(rate, len(blocks)), strict=True):
            block.mixer.drop_path = DropPath(each)
            block.mixer.register_forward_hook(_drop_path)
            block.mlp.append(DropPath(each))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        blocks: Any = self.blocks
        for block in blocks:
            block.activation_checkpointing = "full" if enable else "none"

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|positions|embed)", "blocks": blocks}


def _drop_path(mixer: Any, arguments: Any, result: Tensor) -> Tensor:
    return mixer.drop_path(result)


class _TimmBackbone(_Timm, Backbone):
    """Its features are the last map."""

    def __init__(self, config: Any):
        super().__init__(config)
        names = [name for name, _ in self.named_children()]
        outer = "norms" if "norms" in names else "stages"
        count = len(getattr(self, outer))  # SAN's first stage has no map
        each = zip(self.channels, self.strides, range(count - 4, count), strict=True)
        self._know(self.channels[-1], [(c, s, f"{outer}.{i}") for c, s, i in each])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.feature_maps(self.checked(x))[-1]

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        maps = self.feature_maps(self.checked(x))
        return maps[-1], [*maps]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recompute_blocks(enable)

    def keep_maps(self, take: list[int], last: int) -> None:
        parts: dict[str, Any] = dict(self.named_children())
        stages, norms = parts["stages"], parts.get("norms", ())
        before = len(stages) - len(self.feature_info)  # SAN's first stage has no map
        self.stages = stages[: before + last + 1]
        if norms:
            kept = [norm if i in take else nn.Identity() for i, norm in enumerate(norms)]
            self.norms = nn.ModuleList(kept[: last + 1])


class TimmResNet(_TimmBackbone, ResNet):
    pass


class TimmSAN(_TimmBackbone, SAN):
    pass


class TimmSwin(_TimmBackbone, Swin):
    pass


class TimmPVT(_TimmBackbone, PVT):
    """Its features are the tokens of the last stage, normed, the class token first and alone unless
    full_last_block=True."""

    pool_kind = "token"

    def intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        before = self._maps(self.checked(x), 3)
        maps: list[Tensor | None] = [*before]
        if len(self.stages) < 4:  # the last ones were pruned
            return before[-1], maps
        tokens, grid = self.stages[3](before[-1], None if self.features_only else self.cls_token)
        rows = tokens if self.features_only else tokens[:, 1:]
        last = rows.transpose(1, 2).unflatten(2, grid) if rows.shape[1] else None
        features = last if self.features_only and last is not None else self.norm(tokens)
        return features, [*maps, last]

    def forward_features(self, x: Tensor) -> Tensor:
        before = self._maps(self.checked(x), len(self.stages) - 1)[-1]
        tokens, _ = self.stages[-1](before, self.cls_token)
        return self.norm(tokens)

    def pooled(self, x: Tensor) -> Tensor:
        return x[:, 0]
