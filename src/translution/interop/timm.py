"""The door to timm; importing this module registers the image models there.

    import translution.interop.timm
    import timm

    model = timm.create_model("translution_alpha_vit_tiny_patch16_224", num_classes=10, img_size=64)
    maps = timm.create_model("translution_acmix_resnet26", features_only=True, out_indices=(1, 3))

timm knows them by their names here behind "translution_" (once, if they begin so), as "resnet26"
alone is timm's own; what follows a dot in timm's names are weights, of which there are none. The
models have the parts and weights that they have without timm, and `save_pretrained` too.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..models import PVT, SAN, Backbone, ResNet, Swin, ViT, create_model, list_models
from ..models.backbone import init_truncated_normal
from ..models.preprocessing import Preprocessing
from ..models.registry import families

__all__: list[str] = []  # timm adds the names of what it registers

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
        drop_rate: of what the head sees, in training.
    """

    config: Any
    head: nn.Module
    drop_rate: float = 0.0
    global_pool: str = "avg"
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

    def maps(self, x: Tensor) -> list[Tensor]:
        """[batch, channels, height, width], as `feature_info` has them."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(self.pooled(x), self.drop_rate, self.training)
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
    ) -> Any:
        """The maps, and with intermediates_only=False before them the features; all are computed.

        Raises:
            ValueError: norm or another output_fmt, which these models don't have.
        """
        if norm or output_fmt != "NCHW":
            raise ValueError(f"got norm={norm}, output_fmt={output_fmt!r}, want False and 'NCHW'")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        every = self.maps(x)
        maps = [every[i] for i in take]
        return maps if intermediates_only else (self.forward_features(x), maps)

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
        """A new head, or none for 0 classes: the model then returns what its head saw."""
        if global_pool not in (None, self.global_pool):
            raise ValueError(f"global_pool: got {global_pool!r}, want {self.global_pool!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes: got {num_classes}, want at least 0")
        like = next(self.parameters())
        self.num_classes, self.head = num_classes, nn.Identity()
        if num_classes:
            self.config = dataclasses.replace(self.config, num_classes=num_classes)
            self.head = nn.Linear(self.num_features, num_classes).to(like)
            init_truncated_normal(self.head)
        if self.preprocessing is not None:  # its names are those of the earlier classes
            self.preprocessing = dataclasses.replace(self.preprocessing, classes=None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise ValueError(f"{type(self).__name__}: has no activation checkpointing")

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
        self.global_pool = names.get(config.pool, config.pool)
        stride = max(config.patch_size)
        self._know(config.dim, [(config.dim, stride, f"blocks.{i}") for i in range(config.depth)])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.tokens(x)

    def pooled(self, x: Tensor) -> Tensor:
        return self.pool(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        grid = self.grid_of(x)
        if self.config.pool == "cls" and not self.config.full_last_block:
            raise ValueError(
                "full_last_block: got False, maps want a ViT made with True (or pool='mean')"
            )
        each: list[Tensor] = []
        self.tokens(x, each)
        return [t[:, self.prefix :].transpose(1, 2).unflatten(2, grid) for t in each]

    def keep_maps(self, take: list[int], last: int) -> None:
        self.blocks = self.blocks[: last + 1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for block in self.blocks:
            block.checkpoint = "full" if enable else "none"  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|positions|embed)", "blocks": blocks}


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

    def maps(self, x: Tensor) -> list[Tensor]:
        return self.feature_maps(self.checked(x))

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

    global_pool = "token"

    def forward_features(self, x: Tensor) -> Tensor:
        before = self._maps(self.checked(x), len(self.stages) - 1)[-1]
        tokens, _ = self.stages[-1](before, self.cls_token)
        return self.norm(tokens)

    def pooled(self, x: Tensor) -> Tensor:
        return x[:, 0]


_DOORS = {ViT: TimmViT, ResNet: TimmResNet, SAN: TimmSAN, Swin: TimmSwin, PVT: TimmPVT}


def _build(
    name: str,
    features_only: bool,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: Any = None,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    **options: Any,
) -> nn.Module:
    """The model of this name, from timm's keywords and any options of its own.

    Raises:
        ValueError: an option that it does not have, or values that don't fit.
    """
    with torch.device("meta"):
        kind = type(create_model(name))
    of_vit = kind is ViT
    options["in_channels"] = in_chans
    if img_size is not None and kind in (ViT, PVT):  # the others are for images of any size
        options["image_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
    if drop_path_rate is not None and kind in (Swin, PVT):
        options["drop_path_rate"] = drop_path_rate
    elif drop_path_rate:
        raise ValueError(f"drop_path_rate: got {drop_path_rate}, but {name!r} has no drop path")
    for wrong in ("attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"):
        if options.pop(wrong, 0):
            instead = "dropout=, of attention and MLPs" if of_vit else "drop_rate"
            raise ValueError(f"{wrong}: {name!r} has no such option, want {instead}")
    if global_pool is not None and of_vit:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool: got {global_pool!r}, want one of {list(POOLS)}")
        options["pool"] = POOLS[global_pool]
    if features_only:
        options["full_last_block" if of_vit else "features_only"] = True
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: got {drop_rate}, want at least 0 and less than 1")
    with torch.device("meta"):  # which costs nothing, and has all the options
        config: Any = create_model(name, **options, num_classes=max(num_classes, 1)).config
    model = _DOORS[kind](config)
    model.drop_rate = drop_rate
    if not features_only and num_classes < 1:
        model.reset_classifier(num_classes)
    if not features_only and global_pool not in (None, model.global_pool):
        raise ValueError(f"global_pool: got {global_pool!r}, want {model.global_pool!r}")
    return model


def _entrypoint(name: str, known_as: str) -> Callable[..., nn.Module]:
    def make(pretrained: bool = False, **keywords: Any) -> nn.Module:
        only = bool(keywords.get("features_only"))
        indices = 3 if "_vit_" in name else (0, 1, 2, 3)
        return build_model_with_cfg(
            functools.partial(_build, name, only), known_as, pretrained,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"}, **keywords,
        )  # fmt: skip

    make.__name__ = make.__qualname__ = known_as
    make.__doc__ = f"translution's {name!r}."
    return make


_NAMES = {
    f"translution_{name.removeprefix('translution_')}": name
    for name in list_models()
    if name not in families() and "_gpt_" not in name
}
# with timm's mean and std, those of ImageNet
default_cfgs = generate_default_cfgs(
    {
        known_as: {
            "input_size": (3, 224, 224), "crop_pct": 0.9, "classifier": "head",
            "fixed_input_size": "_vit_" in name,
        }
        for known_as, name in _NAMES.items()
    }
)  # fmt: skip
for _known_as, _name in _NAMES.items():
    globals()[_known_as] = register_model(_entrypoint(_name, _known_as))
