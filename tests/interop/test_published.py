"""Weights of the published code: loaded, they give what it computes. The twins here are slow and
obvious, written from the facts alone: a matrix gathered for every pair, by the published index
maps, from entries by their published names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from translution import (
    ACmix2d,
    AlphaTranslution1d,
    AlphaTranslution2d,
    SelfAttention,
    Translution1d,
    Translution2d,
    Translution3d,
    ViTConfig,
    WindowACmix2d,
    WindowAttention2d,
    create_model,
    gpt,
    vit,
)
from translution.interop.published import export_published, load_published
from translution.models.residual_network import Bottleneck, ResNetConfig, resnet
from translution.models.swin_transformer import Block, swin

pytestmark = pytest.mark.filterwarnings("ignore:exchanged. got None:UserWarning")
SUBSETS = ["".join(s) for n in range(4) for s in itertools.combinations("qkv", n)]
DIM, HEADS, HEAD_DIM, RANK = 6, 2, 4, 3
INNER, LOW = HEADS * HEAD_DIM, HEADS * RANK


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Numbers of about the size that keeps activations, for names and shapes."""
    weights = {}
    for name, shape in shapes.items():
        fan = shape[-2] if name.endswith("unique_params") else math.prod(shape[1:])
        weights[name] = torch.randn(shape, dtype=torch.float64) / math.sqrt(max(fan, 1))
        if name.endswith("running_var"):
            weights[name] = weights[name].abs() + 0.5
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
    return weights


def near(prefix: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (DIM,), f"{prefix}.bias": (DIM,)}


def under(prefix: str, some: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in some.items()}


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}


def same(got: dict[str, Tensor], want: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert set(got) == set(want)
    for name in want:
        assert got[name].shape == want[name].shape, name
        if name not in but:
            assert torch.equal(got[name], want[name].to(got[name].dtype)), name


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# -- the published layers of Translution ------------------------------------------------------


def index_maps(grid: tuple[int, ...], prefix: int) -> dict[str, Tensor]:
    """Which row of its table the first axis' token i uses with the second's j, for q, k, v, as the
    code gathers them; that of q is then read transposed."""
    if len(grid) == 1:
        n = grid[0]
        down = [[max(0, i - j) for j in range(n)] for i in range(n)]
        up = [[min(0, i - j) + n - 1 for j in range(n)] for i in range(n)]
        return {"q": torch.tensor(up).T, "k": torch.tensor(down), "v": torch.tensor(down)}
    height, width = grid
    rows = (2 * height - 1) * (2 * width - 1)
    tokens = ["class"] * prefix + list(itertools.product(range(height), range(width)))

    def row(a, b) -> int:
        if "class" in (a, b):
            return rows + (0 if a == b else 1 if a == "class" else 2)
        return (a[0] - b[0] + height - 1) * (2 * width - 1) + a[1] - b[1] + width - 1

    both = torch.tensor([[row(a, b) for b in tokens] for a in tokens])
    return {"q": both.T, "k": both, "v": both}


def rows_of(grid: tuple[int, ...], prefix: int) -> int:
    return grid[0] if len(grid) == 1 else (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * prefix


def layer_shapes(relative: str, grid, prefix=0, low_rank=False, norm=True) -> dict:
    table = rows_of(grid, prefix)
    shapes = near("norm") if norm else {}
    if low_rank:
        shapes["to_qkv.weight"] = (3 * INNER, DIM)
        for name in "qkv":
            scored = name in "qk" and set(relative) & set("qk")
            if scored or name in relative:
                shapes[f"to_{name}1.weight"] = (LOW, DIM)
            if name in relative:
                shapes[f"to_{name}2.unique_params"] = (table, LOW, LOW)
        if "v" in relative:
            shapes["to_v3.weight"] = (INNER, LOW)
    else:
        shared = "".join(name for name in "qkv" if name not in relative)
        if shared:
            shapes[f"to_{shared}.weight"] = (len(shared) * INNER, DIM)
        for name in relative:
            shapes[f"to_{name}.unique_params"] = (table, DIM, INNER)
    return shapes | {"to_out.0.weight": (DIM, INNER), "to_out.0.bias": (DIM,)}


def constants(grid, heads_dim=HEAD_DIM, rotary=False) -> dict[str, Tensor]:
    """What the code saves beside weights."""
    found = {}
    if len(grid) == 1:
        found["causal"] = torch.ones(grid[0], grid[0]).tril()[None, None]
    if rotary:
        axes = len(grid)
        each = heads_dim // (2 * axes)
        angles = torch.zeros(*grid, heads_dim)
        for place in itertools.product(*map(range, grid)):
            for axis, p in itertools.product(range(axes), range(each)):
                angle = place[axis] / 10000 ** (p / each)
                angles[place][axis * each + p] = angle
                angles[place][heads_dim // 2 + axis * each + p] = angle
        lead = (None,) if axes == 2 else (None, None)
        name = "rope" if axes == 2 else "rotary_emb"
        found |= {
            f"{name}.cos_cached": angles.cos()[lead],
            f"{name}.sin_cached": angles.sin()[lead],
        }
    return found


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def pairwise(x: Tensor, table: Tensor, index: Tensor, of_query: bool) -> Tensor:
    """[batch, heads, i, j, d]: token i (or j) times the pair's own matrix."""
    matrices = table[index]
    y = torch.einsum("bic,ijcd->bijd" if of_query else "bjc,ijcd->bijd", x, matrices)
    return y.unflatten(-1, (HEADS, -1)).permute(0, 3, 1, 2, 4)


def turned(x: Tensor, cos: Tensor, sin: Tensor, prefix: int) -> Tensor:
    cos, sin = (t.reshape(-1, t.shape[-1]).double() for t in (cos, sin))
    first, second = x[:, :, prefix:].chunk(2, -1)
    body = x[:, :, prefix:] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([x[:, :, :prefix], body], 2)


def layer_twin(w: dict[str, Tensor], x: Tensor, grid, prefix=0, relative="", low_rank=False):
    """What the published attention layer gives for its input."""
    if "norm.weight" in w:
        x = F.layer_norm(x, (DIM,), w["norm.weight"], w["norm.bias"])
    maps, n = index_maps(grid, prefix), x.shape[1]

    def shared(name: str) -> Tensor:
        (key,) = (k for k in w if k.startswith("to_") and k.endswith(".weight")
                  and set(k[3:-7]) <= set("qkv") and name in k[3:-7])  # fmt: skip
        names = key[3:-7]
        at = names.index(name) * INNER
        y = split(x @ w[key][at : at + INNER].T)
        for kind in ("rope", "rotary_emb"):
            if f"{kind}.cos_cached" in w and name in "qk":
                y = turned(y, w[f"{kind}.cos_cached"], w[f"{kind}.sin_cached"], prefix)
        return y

    def of(name: str) -> Tensor:
        """[batch, heads, i, j, d]"""
        if low_rank:
            y = x @ w[f"to_{name}1.weight"].T
            key = f"to_{name}2.unique_params"
        else:
            y, key = x, f"to_{name}.unique_params"
        if key in w:
            return pairwise(y, w[key], maps[name], of_query=name == "q")
        y = split(y) if low_rank else shared(name)
        return y.unsqueeze(3 if name == "q" else 2).expand(-1, -1, n, n, -1)

    if not low_rank:
        s = (of("q") * of("k")).sum(-1)
    else:
        s = shared("q") @ shared("k").mT
        if set(relative) & set("qk"):
            s = (s + (of("q") * of("k")).sum(-1)) / 2
    s = s / math.sqrt(HEAD_DIM)
    if "causal" in w:
        s = s.masked_fill(w["causal"] == 0, -math.inf)
    a = s.softmax(-1)
    if not low_rank:
        y = (a.unsqueeze(-1) * of("v")).sum(3).transpose(1, 2).flatten(2)
    else:
        y = (a @ shared("v")).transpose(1, 2).flatten(2)
        if "v" in relative:
            low = (a.unsqueeze(-1) * of("v")).sum(3).transpose(1, 2).flatten(2)
            y = (y + low @ w["to_v3.weight"].T) / 2
    return y @ w["to_out.0.weight"].T + w["to_out.0.bias"]


def make_layer(relative: str, grid, prefix=0, low_rank=False, norm=True, **more) -> nn.Module:
    kinds = {(1, False): Translution1d, (2, False): Translution2d}
    kinds |= {(1, True): AlphaTranslution1d, (2, True): AlphaTranslution2d}
    more |= {"rank": RANK} if low_rank else {}
    more |= {"causal": True} if len(grid) == 1 else {"prefix": prefix}
    size = grid[0] if len(grid) == 1 else grid
    kind = kinds[len(grid), low_rank]
    layer = kind(DIM, size, HEADS, head_dim=HEAD_DIM, relative=relative, **more)
    return (nn.Sequential(nn.LayerNorm(DIM), layer) if norm else layer).double()


def poison(module: nn.Module) -> nn.Module:
    """So that what is not loaded shows."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    return module.eval()


def loaded(module: nn.Module, weights: dict[str, Tensor], **more) -> nn.Module:
    load_published(poison(module), weights, **more)
    for name, tensor in module.state_dict().items():
        assert tensor.isfinite().all(), name
    return module


@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "low-rank"])
@pytest.mark.parametrize("relative", SUBSETS)
@pytest.mark.parametrize(("grid", "prefix"), [((5,), 0), ((3, 2), 1), ((2, 3), 0)])
def test_layers(grid, prefix, relative, low_rank):
    """Every variant: the published outputs, and back to the same entries."""
    weights = random(layer_shapes(relative, grid, prefix, low_rank)) | constants(grid)
    layer = make_layer(relative, grid, prefix, low_rank)
    assert load_published(poison(layer), weights) == []
    x = torch.randn(2, prefix + math.prod(grid), DIM, dtype=torch.float64)
    want = layer_twin(weights, x, grid, prefix, relative, low_rank)
    close(layer(x), want)
    same(export_published(layer), weights)


@given(
    st.sampled_from(SUBSETS), st.booleans(), st.booleans(),
    st.one_of(st.tuples(st.integers(1, 6)), st.tuples(st.integers(1, 3), st.integers(1, 3))),
)  # fmt: skip
def test_layers_of_any_size(relative, low_rank, prefix, grid):
    prefix = int(prefix and len(grid) == 2)
    weights = random(layer_shapes(relative, grid, prefix, low_rank, norm=False)) | constants(grid)
    layer = loaded(make_layer(relative, grid, prefix, low_rank, norm=False), weights)
    x = torch.randn(1, prefix + math.prod(grid), DIM, dtype=torch.float64)
    close(layer(x), layer_twin(weights, x, grid, prefix, relative, low_rank))
    same(export_published(layer), weights)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("relative", ["qk", "qkv"])
def test_exchanged(relative, low_rank):
    """Before December 2025: the query's table stands under the key's name, and the other way."""
    weights = random(layer_shapes(relative, (3, 2), 1, low_rank))
    old = {}
    for name, tensor in weights.items():
        head, _, tail = name.partition("_")
        swapped = {"q": "k", "k": "q"}.get(tail[:1], tail[:1])
        branch = name.startswith("to_") and tail[1:2] in (".", "1", "2")
        old[f"{head}_{swapped}{tail[1:]}" if branch else name] = tensor
    assert set(old) == set(weights)
    layer = loaded(make_layer(relative, (3, 2), 1, low_rank), old, exchanged=True)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(layer(x), layer_twin(weights, x, (3, 2), 1, relative, low_rank))
    same(export_published(layer, exchanged=True), old)
    load_published(layer, old)
    assert (layer(x) - layer_twin(weights, x, (3, 2), 1, relative, low_rank)).abs().max() > 1e-3


def test_exchanged_where_it_means_nothing():
    with pytest.raises(ValueError, match="no layer has tables for both q and k"):
        export_published(make_layer("kv", (2, 2)), exchanged=True)
    with pytest.raises(ValueError, match=r"(?s)exchanged.*causal.*key token alone"):
        export_published(make_layer("qkv", (4,)), exchanged=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("grid", "relative", "version"),
    [((3, 2), "qkv", "2025-11-29"), ((4,), "qk", "2025-12-19"), ((3, 2), "kv", None)],
)
def test_what_the_weights_do_not_show_is_said(grid, relative, version):
    layer = make_layer(relative, grid)
    weights = export_published(layer)
    if version is None:
        load_published(layer, weights)
    else:
        with pytest.warns(UserWarning, match=rf"exchanged: got None\..* before {version}"):
            load_published(layer, weights)
    load_published(layer, weights, exchanged=False)


@pytest.mark.parametrize(("grid", "prefix"), [((5,), 0), ((3, 2), 1), ((2, 3), 0)])
def test_rotary_attention(grid, prefix):
    weights = random(layer_shapes("", grid, prefix)) | constants(grid, rotary=True)
    attention = SelfAttention(
        DIM, grid, HEADS, HEAD_DIM, "rotary", causal=len(grid) == 1, prefix=prefix
    )
    layer = loaded(nn.Sequential(nn.LayerNorm(DIM), attention).double(), weights)
    x = torch.randn(2, prefix + math.prod(grid), DIM, dtype=torch.float64)
    # their constants are float32
    torch.testing.assert_close(layer(x), layer_twin(weights, x, grid, prefix), rtol=0, atol=1e-6)
    again = export_published(layer)
    kept = {name for name in weights if not name.endswith("cached")}
    same({n: again[n] for n in kept}, {n: weights[n] for n in kept})
    for name in set(weights) - kept:
        torch.testing.assert_close(again[name].float(), weights[name], rtol=0, atol=1e-6)


def test_rotary_low_rank():
    """The ordinary branch is turned."""
    weights = random(layer_shapes("v", (3, 2), 1, True)) | constants((3, 2), rotary=True)
    layer = loaded(make_layer("v", (3, 2), 1, True, position="rotary"), weights)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    want = layer_twin(weights, x, (3, 2), 1, "v", True)
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-6)
    assert set(export_published(layer)) == set(weights)


def test_rotations_that_turn_nothing():
    """Beside a table of v the published code makes a rotation, and goes on without it."""
    weights = random(layer_shapes("v", (3, 2), 1))
    there = weights | constants((3, 2), rotary=True)
    layer = make_layer("v", (3, 2), 1)
    told = load_published(poison(layer), there)
    assert told == [f"rope.{kind}_cached: all of it" for kind in ("cos", "sin")]
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    close(layer(x), layer_twin(weights, x, (3, 2), 1, "v"))
    same(export_published(layer), weights)
    whole = export_published(layer, unused_rotations=True)
    assert set(whole) == set(there)
    for name in whole:
        torch.testing.assert_close(whole[name].double(), there[name].double(), rtol=0, atol=1e-6)
    there["rope.cos_cached"] = there["rope.cos_cached"] + 0.1
    with pytest.raises(ValueError, match=r"constant: rope.cos_cached"):
        load_published(layer, there)
    with pytest.raises(ValueError, match=r"position: .*never applies"):
        export_published(make_layer("v", (3, 2), 1, position="rotary"))


# -- the published models of Translution ------------------------------------------------------


def feed_forward_shapes() -> dict:
    wide = 4 * DIM
    return near("net.0") | {
        "net.1.weight": (wide, DIM), "net.1.bias": (wide,),
        "net.4.weight": (DIM, wide), "net.4.bias": (DIM,),
    }  # fmt: skip


def norm(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, w[f"{name}.bias"])


def lin(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def stack_twin(w, x, stem, depth, **how) -> Tensor:
    """Blocks, then a norm."""
    for i in range(depth):
        own = part(w, f"{stem}.layers.{i}")
        relative = how["relative"]
        if i >= how.get("first", depth):
            relative = ""
        more = how | {"relative": relative}
        more["low_rank"] = how.get("low_rank", False) and bool(relative)
        more.pop("first", None)
        x = x + layer_twin(part(own, "0"), x, **more)
        x = x + lin(own, F.gelu(lin(own, norm(own, x, "1.net.0"), "1.net.1")), "1.net.4")
    return norm(w, x, f"{stem}.norm")


PATCH, GRID, CLASSES = (3, 2), (2, 3), 5


def vit_weights(stem, relative, low_rank=False, depth=2, first=2, positions=False) -> dict:
    pixels = 3 * math.prod(PATCH)
    shapes = {
        "cls_token": (1, 1, DIM),
        "to_patch_embedding.1.weight": (pixels,), "to_patch_embedding.1.bias": (pixels,),
        "to_patch_embedding.2.weight": (DIM, pixels), "to_patch_embedding.2.bias": (DIM,),
        "mlp_head.weight": (CLASSES, DIM), "mlp_head.bias": (CLASSES,),
    } | near("to_patch_embedding.3") | near(f"{stem}.norm")  # fmt: skip
    if positions:
        shapes["pos_embedding"] = (1, 1 + math.prod(GRID), DIM)
    fixed = {}
    for i in range(depth):
        base = f"{stem}.layers.{i}"
        own = relative if i < first else ""
        shapes |= under(f"{base}.0", layer_shapes(own, GRID, 1, low_rank and bool(own)))
        shapes |= under(f"{base}.1", feed_forward_shapes())
        if i >= first:
            fixed |= under(f"{base}.0", constants(GRID, rotary=True))
    return random(shapes) | fixed


def vit_twin(w, image, stem, mean=False, **how) -> Tensor:
    b = len(image)
    (ph, pw), (h, n) = PATCH, GRID
    patches = []
    for row, column in itertools.product(range(h), range(n)):
        cut = image[:, :, row * ph : (row + 1) * ph, column * pw : (column + 1) * pw]
        patches.append(cut.permute(0, 2, 3, 1).flatten(1))
    x = torch.stack(patches, 1)
    x = norm(w, lin(w, norm(w, x, "to_patch_embedding.1"), "to_patch_embedding.2"),
             "to_patch_embedding.3")  # fmt: skip
    x = torch.cat([w["cls_token"].expand(b, -1, -1), x], 1)
    x = x + w.get("pos_embedding", 0)
    x = stack_twin(w, x, stem, 2, grid=GRID, prefix=1, **how)
    return lin(w, x.mean(1) if mean else x[:, 0], "mlp_head")


def make_vit(mixer, **more) -> nn.Module:
    size = tuple(n * p for n, p in zip(GRID, PATCH, strict=True))
    return vit(
        mixer=mixer, image_size=size, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=2,
        heads=HEADS, head_dim=HEAD_DIM, **({"rank": RANK} if mixer == "alpha" else {}), **more,
    ).double()  # fmt: skip


def an_image() -> Tensor:
    return torch.randn(2, 3, *(n * p for n, p in zip(GRID, PATCH, strict=True))).double()


@pytest.mark.parametrize("first", [2, 1])
@pytest.mark.parametrize("mixer", ["translution", "alpha"])
@pytest.mark.parametrize("relative", ["qkv", "kv", "v"])
def test_vit(mixer, relative, first):
    """Whole, and as a hybrid with rotary attention after the first layers."""
    low_rank = mixer == "alpha"
    weights = vit_weights("translution", relative, low_rank, first=first)
    how = {"relative": relative, "low_rank": low_rank, "first": first}
    image, options = an_image(), {"relative": relative, "relative_depth": first}
    want = vit_twin(weights, image, "translution", **how)
    model = make_vit(mixer, **options, full_last_block=True)
    assert load_published(poison(model), weights) == []
    torch.testing.assert_close(model(image), want, rtol=0, atol=1e-9 if first == 2 else 1e-6)
    turned = tuple(name for name in weights if name.endswith("cached"))
    same(export_published(model), weights, but=turned)


@pytest.mark.parametrize("mixer", ["translution", "alpha"])
def test_vit_without_the_rows_that_nobody_reads(mixer):
    """The same logits, and a word on what was left out; they are zeros when written."""
    weights = vit_weights("translution", "qkv", mixer == "alpha")
    model, image = make_vit(mixer), an_image()
    rows, each = rows_of(GRID, 1), "2" if mixer == "alpha" else ""
    tables = [f"translution.layers.1.0.to_{n}{each}.unique_params" for n in "qkv"]
    told = load_published(poison(model), weights)
    assert told == [f"{name}: {rows - 2} of its {rows} rows" for name in tables]
    want = vit_twin(weights, image, "translution", relative="qkv", low_rank=mixer == "alpha")
    close(model(image), want)
    again = export_published(model)
    same(again, weights, but=tuple(tables))
    close(vit_twin(again, image, "translution", relative="qkv", low_rank=mixer == "alpha"), want)
    assert sum(int((again[tables[0]][r] != 0).any()) for r in range(rows)) == 2


def test_vit_baseline():
    """The class token's position becomes a part of the token."""
    weights = vit_weights("transformer", "", positions=True)
    model, image = loaded(make_vit("attention"), weights), an_image()
    want = vit_twin(weights, image, "transformer", relative="")
    close(model(image), want)
    again = export_published(model)
    same(again, weights, but=("cls_token", "pos_embedding"))
    close(vit_twin(again, image, "transformer", relative=""), want)
    same(export_published(loaded(model, again)), again)


def test_vit_mean():
    """The published mean includes the class token."""
    weights = vit_weights("translution", "kv")
    model, image = loaded(make_vit("translution", relative="kv", pool="all"), weights), an_image()
    want = vit_twin(weights, image, "translution", relative="kv", mean=True)
    close(model(image), want)
    same(export_published(model), weights)


def test_vit_rotary_baseline():
    """It has learned positions beside the rotation."""
    weights = vit_weights("transformer", "", first=0, positions=True)
    model, image = make_vit("rotary"), an_image()
    with pytest.raises(ValueError, match=r"positions: .*learned_positions=True"):
        export_published(model)
    if "published" in ViTConfig.__dataclass_fields__:
        model = make_vit("rotary", learned_positions=True)
    else:
        model.positions = nn.Parameter(torch.zeros(1, *GRID, DIM, dtype=torch.float64))
    loaded(model, weights)
    want = vit_twin(weights, image, "transformer", relative="")
    torch.testing.assert_close(model(image), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("relative", ["qkv", "kv", "v"])
def test_vit_rotary_low_rank(relative):
    """The published low-rank ViTs with rotary positions: the ordinary branch of each is turned."""
    weights = vit_weights("translution", relative, low_rank=True)
    for i in range(2):
        weights |= under(f"translution.layers.{i}.0", constants(GRID, rotary=True))
    model = make_vit("alpha", relative=relative, position="rotary", full_last_block=True)
    assert load_published(poison(model), weights) == []
    image = an_image()
    want = vit_twin(weights, image, "translution", relative=relative, low_rank=True)
    torch.testing.assert_close(model(image), want, rtol=0, atol=1e-6)
    same(export_published(model), weights, but=tuple(n for n in weights if n.endswith("cached")))
    plain = make_vit("alpha", relative=relative, full_last_block=True)
    with pytest.raises(ValueError, match=r"rope\.cos_cached"):
        load_published(plain, weights)


CONTEXT, WORDS = 5, 11


def gpt_weights(stem, relative="", low_rank=False, positions=False) -> dict[str, Tensor]:
    shapes = {"wte.weight": (WORDS, DIM), "output_head.weight": (WORDS, DIM)}
    shapes |= near("norm") | near(f"{stem}.norm")
    if positions:
        shapes["wpe.weight"] = (CONTEXT, DIM)
    fixed = {}
    for i in range(2):
        base = f"{stem}.layers.{i}"
        shapes |= under(f"{base}.0", layer_shapes(relative, (CONTEXT,), low_rank=low_rank))
        shapes |= under(f"{base}.1", feed_forward_shapes())
        fixed |= under(f"{base}.0", constants((CONTEXT,)))
    return random(shapes) | fixed


def gpt_twin(w, ids, stem, **how) -> Tensor:
    x = w["wte.weight"][ids] + w.get("wpe.weight", 0)
    x = stack_twin(w, x, stem, 2, grid=(CONTEXT,), **how)
    return lin(w, norm(w, x, "norm"), "output_head")


def make_gpt(mixer, double_final_norm=True, **more) -> nn.Module:
    return gpt(
        mixer=mixer, context=CONTEXT, vocab_size=WORDS, dim=DIM, depth=2, heads=HEADS,
        head_dim=HEAD_DIM, double_final_norm=double_final_norm,
        **({"rank": RANK} if mixer == "alpha" else {}), **more,
    ).double()  # fmt: skip


@pytest.mark.parametrize(
    ("mixer", "relative"),
    [(m, r) for m in ("translution", "alpha") for r in ("qkv", "kv", "k")] + [("attention", "")],
)
def test_gpt(mixer, relative):
    stem = "transformer" if mixer == "attention" else "translution"
    low_rank = mixer == "alpha"
    weights = gpt_weights(stem, relative, low_rank, positions=mixer == "attention")
    model = loaded(make_gpt(mixer, **({"relative": relative} if relative else {})), weights)
    ids = torch.randint(WORDS, (2, CONTEXT))
    close(model(ids), gpt_twin(weights, ids, stem, relative=relative, low_rank=low_rank))
    same(export_published(model), weights)


def test_gpt_that_cannot_be():
    with pytest.raises(ValueError, match=r"tie_head: got True, want False"):
        export_published(make_gpt("attention", tie_head=True))
    with pytest.raises(ValueError, match=r"two layer norms.*double_final_norm=True"):
        export_published(make_gpt("translution", double_final_norm=False))
    for first in (0, 1):
        with pytest.raises(ValueError, match=r"relative_depth.*no causal mask"):
            export_published(make_gpt("translution", relative_depth=first))


# -- the published code of ACmix --------------------------------------------------------------


def acmix_shapes(channels=8, heads=2) -> dict:
    each = channels // heads
    shapes = {"rate1": (1,), "rate2": (1,)}
    for i in (1, 2, 3):
        shapes |= {f"conv{i}.weight": (channels, channels, 1, 1), f"conv{i}.bias": (channels,)}
    return shapes | {
        "conv_p.weight": (each, 2, 1, 1), "conv_p.bias": (each,),
        "fc.weight": (9, 3 * heads, 1, 1), "dep_conv.weight": (channels, 9, 3, 3),
    }  # fmt: skip


def acmix_twin(w, x, heads=2, kernel=3, stride=1) -> Tensor:
    b, channels, height, width = x.shape[0], w["conv1.bias"].shape[0], *x.shape[2:]
    each = channels // heads
    q, k, v = (F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"]) for i in (1, 2, 3))
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    place = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])
    p = F.conv2d(place[None], w["conv_p.weight"], w["conv_p.bias"])[0]

    def around(m: Tensor, i: int, j: int) -> Tensor:
        """[channels, kernel²]: the neighbours, the borders reflected."""
        r = kernel // 2
        padded = F.pad(m[None], (r, r, r, r), mode="reflect")[0]
        return padded[:, i : i + kernel, j : j + kernel].flatten(1)

    out_rows, out_columns = range(0, height, stride), range(0, width, stride)
    attention = x.new_zeros(b, channels, len(out_rows), len(out_columns))
    for n, head in itertools.product(range(b), range(heads)):
        own = slice(head * each, (head + 1) * each)
        for (a, i), (c, j) in itertools.product(enumerate(out_rows), enumerate(out_columns)):
            keys = around(k[n, own], i, j) + p[:, i, j, None] - around(p, i, j)
            weight = (q[n, own, i, j] @ keys / math.sqrt(each)).softmax(0)
            attention[n, own, a, c] = around(v[n, own], i, j) @ weight
    return w["rate1"] * attention + w["rate2"] * convolution_twin(w, q, k, v, heads, stride)


def convolution_twin(w, q, k, v, heads, stride=1) -> Tensor:
    """Maps in the order channel · 9 + tap, and outputs as the grouped convolution gives them."""
    channels = q.shape[1]
    each = channels // heads
    slices = torch.cat([m.unflatten(1, (heads, each)) for m in (q, k, v)], 1)
    maps = torch.einsum("ts,bschw->bcthw", w["fc.weight"][:, :, 0, 0], slices)
    if "fc.bias" in w:
        maps = maps + w["fc.bias"][:, None, None]
    maps = maps.flatten(1, 2)
    return F.conv2d(maps, w["dep_conv.weight"], None, stride, 1, groups=each)


@pytest.mark.parametrize("stride", [1, 2])
def test_acmix(stride):
    weights = random(acmix_shapes())
    layer = ACmix2d(8, 8, 2, kernel_size=3, stride=stride, published=True).double()
    assert load_published(poison(layer), weights) == ["conv_p.bias: all of it"]
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    close(layer(x), acmix_twin(weights, x, stride=stride))
    again = export_published(layer)
    same(again, weights, but=("conv_p.bias",))
    assert not again["conv_p.bias"].any()


def batch_norm(name: str, channels: int) -> dict:
    shapes = {f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def bottleneck_shapes(before: int, width: int, shortcut: bool, mixer: str = "acmix") -> dict:
    after = 4 * width
    middle = acmix_shapes(width) if mixer == "acmix" else {"weight": (width, width, 3, 3)}
    shapes = {"conv1.weight": (width, before, 1, 1), "conv3.weight": (after, width, 1, 1)}
    shapes |= under("conv2", middle)
    for i, channels in ((1, width), (2, width), (3, after)):
        shapes |= batch_norm(f"bn{i}", channels)
    if shortcut:
        shapes |= {"downsample.0.weight": (after, before, 1, 1)}
        shapes |= batch_norm("downsample.1", after)
    return shapes


def bn(w, x, name) -> Tensor:
    w = part(w, name)
    return F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"])


def bottleneck_twin(w, x, stride, mixer="acmix") -> Tensor:
    y = bn(w, F.conv2d(x, w["conv1.weight"]), "bn1").relu()
    if mixer == "acmix":
        y = acmix_twin(part(w, "conv2"), y, stride=stride)
    else:
        y = F.conv2d(y, w["conv2.weight"], None, stride, 1)
    y = bn(w, F.conv2d(bn(w, y, "bn2").relu(), w["conv3.weight"]), "bn3")
    if "downsample.0.weight" in w:
        x = bn(w, F.conv2d(x, w["downsample.0.weight"], None, stride), "downsample.1")
    return (x + y).relu()


@pytest.mark.parametrize(("before", "stride"), [(8, 1), (32, 1), (16, 2)])
def test_bottleneck(before, stride):
    weights = random(bottleneck_shapes(before, 8, shortcut=before != 32))
    config = ResNetConfig("acmix", heads=2, kernel_size=3, published=True)
    block = Bottleneck(before, 8, 32, stride, config.middle).double()
    x = torch.randn(1, before, 4, 4, dtype=torch.float64)
    close(loaded(block, weights)(x), bottleneck_twin(weights, x, stride))
    same(export_published(block), weights, but=("conv2.conv_p.bias",))


@pytest.mark.parametrize("mixer", ["acmix", "convolution"])
def test_resnet(mixer):
    width = 2
    shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (CLASSES, 32 * width)}
    shapes |= {"fc.bias": (CLASSES,)} | batch_norm("bn1", width)
    before = width
    for s in range(4):
        for i in range(2 if s == 1 else 1):
            own = bottleneck_shapes(before, width * 2**s, not i, mixer)
            shapes |= under(f"layer{s + 1}.{i}", own)
            before = 4 * width * 2**s
    weights = random(shapes)
    model = resnet(
        mixer=mixer, depths=(1, 2, 1, 1), dim=width, heads=2, kernel_size=3,
        num_classes=CLASSES, published=True,
    ).double()  # fmt: skip
    loaded(model, weights)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    x = bn(weights, F.conv2d(image, weights["conv1.weight"], None, 2, 3), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for s in range(4):
        for i in range(2 if s == 1 else 1):
            stride = 2 if s and not i else 1
            x = bottleneck_twin(part(weights, f"layer{s + 1}.{i}"), x, stride, mixer)
    close(model(image), lin(weights, x.mean((2, 3)), "fc"))
    unread = tuple(name for name in weights if name.endswith("conv_p.bias"))
    same(export_published(model), weights, but=unread)


def window_shapes(channels: int, heads: int, window: int, mixed: bool) -> dict:
    shapes = {
        "qkv.weight": (3 * channels, channels), "qkv.bias": (3 * channels,),
        "proj.weight": (channels, channels), "proj.bias": (channels,),
        "relative_position_bias_table": ((2 * window - 1) ** 2, heads),
    }  # fmt: skip
    if mixed:
        shapes |= {
            "rate1": (1,), "rate2": (1,), "fc.weight": (9, 3 * heads, 1, 1), "fc.bias": (9,),
            "dep_conv.weight": (channels, 9, 3, 3),
        }  # fmt: skip
    return shapes


def window_index(window: int) -> dict[str, Tensor]:
    places = list(itertools.product(range(window), repeat=2))
    index = [
        [(a[0] - b[0] + window - 1) * (2 * window - 1) + a[1] - b[1] + window - 1 for b in places]
        for a in places
    ]
    return {"relative_position_index": torch.tensor(index)}


def shift_mask(size: int, window: int, shift: int) -> Tensor:
    """[windows, places, places]: 0 where places of the rolled map belong together, else -100."""

    def kind(p: int) -> int:
        return 0 if p < size - window else 1 if p < size - shift else 2

    masks = []
    for top, left in itertools.product(range(0, size, window), repeat=2):
        places = itertools.product(range(top, top + window), range(left, left + window))
        kinds = [(kind(i), kind(j)) for i, j in places]
        masks.append([[0.0 if a == b else -100.0 for b in kinds] for a in kinds])
    return torch.tensor(masks)


def window_twin(w, x, heads, window, mask=None) -> Tensor:
    """x [batch, height, width, channels], rolled already."""
    qkv = lin(w, x, "qkv")
    channels = x.shape[-1]
    out = torch.zeros_like(x)
    corners = itertools.product(range(0, x.shape[1], window), range(0, x.shape[2], window))
    index = window_index(window)["relative_position_index"]
    bias = w["relative_position_bias_table"][index].permute(2, 0, 1)
    for n, (i, j) in enumerate(corners):
        own = qkv[:, i : i + window, j : j + window].flatten(1, 2)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in own.chunk(3, -1))
        s = q @ k.mT / math.sqrt(channels // heads) + bias
        s = s if mask is None else s + mask[n].double()
        y = lin(w, (s.softmax(-1) @ v).transpose(1, 2).flatten(2), "proj")
        out[:, i : i + window, j : j + window] = y.unflatten(1, (window, window))
    if "rate1" not in w:
        return out
    maps = (t.permute(0, 3, 1, 2) for t in qkv.chunk(3, -1))
    return w["rate1"] * out + w["rate2"] * convolution_twin(w, *maps, heads).permute(0, 2, 3, 1)


@pytest.mark.parametrize("mixed", [False, True])
def test_window_layers(mixed):
    weights = random(window_shapes(6, 2, 2, mixed)) | window_index(2)
    layer = WindowACmix2d(6, 2, 2, published=True) if mixed else WindowAttention2d(6, 2, 2)
    layer = loaded(layer.double(), weights)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    close(layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), window_twin(weights, x, 2, 2))
    same(export_published(layer), weights)


def swin_block_shapes(channels: int, heads: int, window: int, mixed: bool) -> dict:
    shapes = {f"norm{i}.{k}": (channels,) for i in (1, 2) for k in ("weight", "bias")}
    shapes |= under("attn", window_shapes(channels, heads, window, mixed))
    wide = 4 * channels
    return shapes | {
        "mlp.fc1.weight": (wide, channels), "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (channels, wide), "mlp.fc2.bias": (channels,),
    }  # fmt: skip


def swin_block_twin(w, x, heads, window, shift) -> Tensor:
    y = norm(w, x, "norm1").roll((-shift, -shift), (1, 2))
    y = window_twin(part(w, "attn"), y, heads, window, w.get("attn_mask"))
    x = x + y.roll((shift, shift), (1, 2))
    return x + lin(w, F.gelu(lin(w, norm(w, x, "norm2"), "mlp.fc1")), "mlp.fc2")


def test_swin_block():
    weights = random(swin_block_shapes(6, 2, 2, True)) | under("attn", window_index(2))
    block = Block(6, 24, WindowACmix2d(6, 2, 2, published=True), 0.0).double()
    x = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    got = loaded(block, weights)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(got, swin_block_twin(weights, x, 2, 2, 0))
    same(export_published(block), weights)


@pytest.mark.parametrize(
    ("window", "sizes"),
    [(2, [16, 8, 4, 2]), (4, [16, 8, 4, 2]), (4, [8, 4, 2, 1])],
    ids=["window-2", "window-4", "window-4-small"],
)
@pytest.mark.parametrize("mixer", ["acmix", "attention"])
def test_swin(mixer, window, sizes):
    """A map that is not larger than a window has no shift, and a table of its own size."""
    width, heads, patch, image_size = 4, (1, 2, 2, 4), 2, 2 * sizes[0]
    windows = [min(window, size) for size in sizes]
    shifts = [window // 2 if size > window else 0 for size in sizes]
    shapes = {
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "patch_embed.norm.weight": (width,), "patch_embed.norm.bias": (width,),
        "norm.weight": (8 * width,), "norm.bias": (8 * width,),
        "head.weight": (CLASSES, 8 * width), "head.bias": (CLASSES,),
    }  # fmt: skip
    fixed = {}
    for s in range(4):
        channels = width * 2**s
        for i in range(2):
            name = f"layers.{s}.blocks.{i}"
            shapes |= under(
                name, swin_block_shapes(channels, heads[s], windows[s], mixer == "acmix")
            )
            fixed |= under(f"{name}.attn", window_index(windows[s]))
            if i and shifts[s]:
                fixed[f"{name}.attn_mask"] = shift_mask(sizes[s], window, shifts[s])
        if s < 3:
            four = 4 * channels
            shapes[f"layers.{s}.downsample.reduction.weight"] = (2 * channels, four)
            shapes |= {f"layers.{s}.downsample.norm.{k}": (four,) for k in ("weight", "bias")}
    weights = random(shapes) | fixed
    model = swin(
        mixer=mixer, depths=(2, 2, 2, 2), dim=width, heads=heads, window_size=window,
        patch_size=patch, num_classes=CLASSES, published=True,
    ).double()  # fmt: skip
    loaded(model, weights, image_size=image_size)
    image = torch.randn(1, 3, image_size, image_size, dtype=torch.float64)
    stem = part(weights, "patch_embed")
    x = F.conv2d(image, stem["proj.weight"], stem["proj.bias"], patch).permute(0, 2, 3, 1)
    x = norm(stem, x, "norm")
    for s in range(4):
        for i in range(2):
            own = part(weights, f"layers.{s}.blocks.{i}")
            x = swin_block_twin(own, x, heads[s], windows[s], shifts[s] if i else 0)
        if s < 3:
            own = part(weights, f"layers.{s}.downsample")
            four = [x[:, a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = lin(own, norm(own, torch.cat(four, -1), "norm"), "reduction")
    want = lin(weights, norm(weights, x, "norm").mean((1, 2)), "head")
    close(model(image), want)
    same(export_published(model, image_size=image_size), weights)
    with pytest.raises(ValueError, match=f"image_size: got {image_size - 2}"):
        export_published(model, image_size=image_size - 2)


def test_parameters_are_the_published_number():
    """Of the whole models, as counted there: nothing is left out but what is told."""
    for name, more, count in (
        ("translution_vit_tiny_patch56_224", {"full_last_block": True}, 38.526),
        ("alpha_vit_tiny_patch32_224", {"full_last_block": True}, 5.350),
        ("acmix_swin_tiny", {"published": True}, 28.65),
    ):
        entries = export_published(create_model(name, **more))
        fixed = ("relative_position_index", "attn_mask")
        total = sum(t.numel() for n, t in entries.items() if not n.endswith(fixed))
        assert total / 1e6 == pytest.approx(count, abs=0.005)


# -- what is refused --------------------------------------------------------------------------


def test_everything_that_differs_is_named():
    weights = random(layer_shapes("kv", (4,))) | constants((4,))
    layer = make_layer("kv", (4,))
    before = export_published(layer)
    weights["extra"] = weights.pop("to_q.weight")
    weights["to_k.unique_params"] = weights["to_k.unique_params"][1:]
    weights["causal"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_published(layer, weights)
    assert str(error.value).splitlines()[1:] == [
        "  missing: to_q.weight",
        "  unexpected: extra",
        "  constant: causal differs from its value for the module's options",
        "  shape: to_k.unique_params is (3, 6, 8), want (4, 6, 8)",
    ]
    same(export_published(layer), before)  # nothing was read


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "module: got Linear"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"got nn.Sequential of \['Linear'\]"),
        (lambda: Translution1d(4, 3, 2), "grid: .*want two axes, or a causal one"),
        (lambda: Translution3d(4, 2, 2), "grid: "),
        (lambda: Translution2d(4, 3, 2, window=1), "window: "),
        (lambda: Translution2d(4, 3, 2, dilation=2), "dilation: "),
        (lambda: Translution2d(4, 3, 2, relative="q", kv_heads=1), "kv_heads: "),
        (lambda: Translution2d(4, 3, 2, buckets=1), "buckets: "),
        (lambda: Translution2d(4, 3, 2, prefix=2), "prefix: .*want at most 1"),
        (lambda: Translution1d(4, 3, 2, causal=True, prefix=1), "prefix: .*at most 0"),
        (lambda: Translution2d(4, 3, 2, qkv_bias=True), "qkv_bias: "),
        (lambda: AlphaTranslution2d(4, 3, 2, qkv_bias=True), "qkv_bias: "),
        (lambda: Translution2d(4, 3, 1), "heads: .*output projection"),
        (lambda: SelfAttention(4, (2, 2), 2, position="bias"), "position: "),
        (lambda: make_vit("translution", pool="mean"), "pool: got 'mean'.*class token"),
        (lambda: make_vit("bias"), "mixer: got 'bias'"),
        (lambda: ACmix2d(8, 8, 2), "published: ACmix2d"),
        (lambda: ACmix2d(8, 8, 2, published=True, learned_shifts=False), "learned_shifts"),
        (lambda: ACmix2d(8, 8, 2, published=True, dilation=2), "dilation: got 2"),
        (lambda: resnet("26", published=True, features_only=True, dim=4), "features_only"),
        (lambda: create_model("san10", features_only=True), "module: got SAN"),
        (lambda: Translution2d(4, 3, 2).to("meta"), "meta device"),
    ],
)
def test_no_published_twin(make, message):
    with pytest.raises(ValueError, match=message):
        export_published(make())


@pytest.fixture
def saved(tmp_path):
    """A layer, its weights, and a place for files."""
    weights = random(layer_shapes("v", (2, 2), norm=False))
    return make_layer("v", (2, 2), norm=False), weights, tmp_path


@pytest.mark.parametrize("wrap", [dict, lambda w: {"epoch": 3, "state_dict": w},
                                  lambda w: {"model": w, "max_accuracy": 1.0}])  # fmt: skip
def test_files(saved, wrap):
    layer, weights, folder = saved
    torch.save(wrap(under("module", weights)), folder / "weights.pth")
    load_published(poison(layer), folder / "weights.pth")
    same(export_published(layer), weights)
    load_published(poison(layer), wrap(weights))
    same(export_published(layer), weights)


def test_safetensors(saved):
    from safetensors.torch import save_file

    layer, weights, folder = saved
    save_file(weights, folder / "weights.safetensors")
    load_published(poison(layer), str(folder / "weights.safetensors"))
    same(export_published(layer), weights)
    save_file(export_published(layer), folder / "again.safetensors")  # no memory is shared
    (folder / "half.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"half.safetensors: not a whole safetensors file"):
        load_published(layer, folder / "half.safetensors")


class Something:
    """What no file may bring along."""


def test_files_that_are_refused(saved):
    layer, weights, folder = saved
    torch.save({"model": weights, "config": Something()}, folder / "pickled.pth")
    with pytest.raises(ValueError, match=r"pickled.pth: holds more than .*weights_only=False"):
        load_published(layer, folder / "pickled.pth")
    (folder / "text.pth").write_text("hello, this is text")
    with pytest.raises(ValueError, match=r"text.pth: "):
        load_published(layer, folder / "text.pth")
    torch.save(weights, folder / "cut.pth")
    whole_file = (folder / "cut.pth").read_bytes()
    for size in (300, len(whole_file) // 2, len(whole_file) - 10):
        (folder / "cut.pth").write_bytes(whole_file[:size])
        with pytest.raises(ValueError, match=r"cut.pth: "):
            load_published(layer, folder / "cut.pth")
    (folder / "empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.pth: "):
        load_published(layer, folder / "empty.pth")
    with pytest.raises(OSError, match="none"):
        load_published(layer, folder / "none.pth")
    torch.save([1, 2], folder / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth: got list, want tensors by name"):
        load_published(layer, folder / "list.pth")
    with pytest.raises(ValueError, match=r"source: got a dict with 1 entries.*\['epoch'\]"):
        load_published(layer, {"epoch": 3})


def test_other_dtypes(saved):
    """The module's dtype stays; half precision in files is fine."""
    layer, weights, _ = saved
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    load_published(layer.float(), half)
    assert layer.o_proj.weight.dtype == torch.float32
    assert torch.equal(layer.o_proj.weight, half["to_out.0.weight"].float())
