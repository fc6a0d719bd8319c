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

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ..models import PVT, SAN, ResNet, Swin, ViT, create_model, list_models
from ..models.registry import families
from .timm_models import (
    POOLS,
    TimmPVT,
    TimmResNet,
    TimmSAN,
    TimmSwin,
    TimmViT,
)
from .timm_models import (
    pretrained_cfg as pretrained_cfg,
)

__all__: list[str] = []  # timm adds the names of what it registers

# timm's names of options, by family.
NAMES: dict[type, dict[str, str]] = {
    ViT: {"embed_dim": "dim", "num_heads": "heads"},
    PVT: {"embed_dims": "dims", "num_heads": "heads", "sr_ratios": "reductions"},
    Swin: {"embed_dim": "dim", "num_heads": "heads"},
    ResNet: {"num_heads": "heads"},
    SAN: {},
}


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
        kind: Any = type(create_model(name))
    of_vit = kind is ViT
    for theirs in NAMES[kind].keys() & options.keys():
        own, value = NAMES[kind][theirs], options.pop(theirs)
        if options.setdefault(own, value) != value:
            raise ValueError(f"{theirs}: got {value}, but {own}={options[own]}; want one")
    options["in_channels"] = in_chans
    if img_size is not None and kind in (ViT, PVT):  # the others are for images of any size
        options["image_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
    if drop_path_rate is not None and kind in (Swin, PVT):
        options["drop_path_rate"] = drop_path_rate
    elif drop_path_rate and not of_vit:
        raise ValueError(
            f"drop_path_rate: got {drop_path_rate}, but {name!r} has no drop path, want 0"
        )
    for wrong in ("attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"):
        if options.pop(wrong, 0):
            instead = "dropout=, of attention and MLPs" if of_vit else "drop_rate"
            raise ValueError(f"{wrong}: {name!r} has no such option, want {instead}")
    if global_pool and of_vit:
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
    if drop_path_rate and of_vit:
        model.drop_paths(drop_path_rate)
    if not features_only and (num_classes < 1 or global_pool not in (None, model.pool_kind)):
        model.reset_classifier(num_classes, global_pool)
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


def _parts(name: str) -> dict[str, Any]:
    """The name of the first layer, and the size of a backbone's last map for 224 pixels."""
    family = next(f for f in ("vit", "resnet", "san", "pvt", "swin") if f in name)
    first = {"vit": "embed.proj", "swin": "embed.proj", "pvt": "stages.0.embed"}
    parts: dict[str, Any] = {"first_conv": first.get(family, "stem.0")}
    return parts if family == "vit" else parts | {"pool_size": (7, 7)}


# with timm's mean and std, those of ImageNet
default_cfgs = generate_default_cfgs(
    {
        known_as: {
            "input_size": (3, 224, 224), "crop_pct": 0.9, "classifier": "head",
            "fixed_input_size": "_vit_" in name, **_parts(name),
        }
        for known_as, name in _NAMES.items()
    }
)  # fmt: skip
for _known_as, _name in _NAMES.items():
    globals()[_known_as] = register_model(_entrypoint(_name, _known_as))
