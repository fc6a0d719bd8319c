"""Models divided over processes, against one process: in float64, to rounding.

Four processes are started once and run every case on groups of one, two and three of them (and two
by two); the tests look up what came of it.
"""

from __future__ import annotations

import copy
import json
import traceback
from datetime import timedelta
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

import forked
from translution import AlphaTranslution1d, Layout, Translution1d, Translution2d, gpt, vit
from translution.apps.bench import scaling
from translution.functional import offset_mix, offset_scores
from translution.interop import parallel
from translution.models import GPT, create_model
from translution.models.description import read_description
from translution.models.pretrained import Pretrained
from translution.models.weights import read_weights
from translution.modules import RelativeLinear

SUBSETS = ["".join(s) for s in chain.from_iterable(combinations("qkv", n) for n in range(4))]
SMALL_VIT = {
    "image_size": 12, "patch_size": 4, "dim": 8, "depth": 2, "heads": 2, "num_classes": 5,
}  # fmt: skip
SMALL_GPT = {"context": 7, "vocab_size": 11, "dim": 8, "depth": 2, "heads": 2}


def small_vit(**options):
    return vit(**(SMALL_VIT | options))


def small_gpt(**options):
    return gpt(**(SMALL_GPT | options))


class Alone(nn.Module):
    """One attention between two projections, so that gradients go through it both ways."""

    def __init__(self, attention, **call):
        super().__init__()
        self.before, self.attention = nn.Linear(6, 6), attention
        self.after, self.call = nn.Linear(6, 3), call

    def forward(self, x):
        y = self.attention(self.before(x), **self.call)
        if self.call.get("return_weights"):
            y, weights = y
            return self.after(y).sum(1) + weights.square().sum((1, 2, 3))[:, None]
        return self.after(y)


def masked(x):
    """A mask with a row that may look nowhere."""
    return torch.rand(1, 1, x, x, generator=torch.Generator().manual_seed(1)) > 0.6


def images():
    return torch.randn(2, 3, 12, 12)


def ids():
    return torch.randint(11, (2, 7))


def tokens(n):
    return lambda: torch.randn(2, n, 6)


MODELS = {
    **{f"vit {r}": (lambda r=r: small_vit(relative=r, init="independent"), images)
       for r in SUBSETS},
    **{f"alpha vit {r}": (lambda r=r: small_vit(mixer="alpha", relative=r, rank=2), images)
       for r in SUBSETS},
    "vit hybrid": (lambda: small_vit(relative_depth=1), images),
    "vit mean, window": (lambda: small_vit(pool="mean", window=1, dilation=(1, 2)), images),
    "vit all rows": (lambda: small_vit(full_last_block=True, buckets=1), images),
    "gpt": (lambda: small_gpt(init="independent"), ids),
    "gpt kv, window": (lambda: small_gpt(relative="kv", window=2), ids),
    "gpt buckets": (lambda: small_gpt(buckets=2), ids),
    "alpha gpt": (lambda: small_gpt(mixer="alpha", rank=2, init="published"), ids),
    "gpt selective": (lambda: small_gpt(activation_checkpointing="selective"), ids),
    "vit full": (lambda: small_vit(activation_checkpointing="full", relative="qv"), images),
    "alpha gpt selective": (
        lambda: small_gpt(mixer="alpha", activation_checkpointing="selective"), ids,
    ),
    "bias": (lambda: Alone(Translution2d(6, (2, 3), 2, prefix=2, qkv_bias=True)), tokens(8)),
    "bias kv": (
        lambda: Alone(Translution2d(6, (2, 3), 2, relative="kv", qkv_bias=True)), tokens(6),
    ),
    "alpha bias": (lambda: Alone(AlphaTranslution1d(6, 5, 2, rank=2, qkv_bias=True)), tokens(5)),
    "causal prefix": (lambda: Alone(Translution1d(6, 5, 2, prefix=1, causal=True)), tokens(6)),
    "rotary v": (lambda: Alone(Translution1d(6, 5, 1, relative="v", position="rotary")), tokens(5)),
    "mask": (lambda: Alone(Translution1d(6, 5, 2), mask=masked(5)), tokens(5)),
    "weights": (lambda: Alone(Translution1d(6, 5, 2), return_weights=True), tokens(5)),
    "dropout": (lambda: small_vit(dropout=0.3), images),
    "frozen": (lambda: freeze(small_vit(relative="qk")), images),
}  # fmt: skip


def freeze(model):
    model.blocks[0].mixer.q_proj.requires_grad_(False)
    model.embed.requires_grad_(False)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def own_of(model):
    """The rows that this process has of each parameter."""
    own = {}
    for name, part in model.named_modules():
        for kind, _ in part.named_parameters(recurse=False):
            rows = part.own_classes if isinstance(part, RelativeLinear) else slice(None)
            own[f"{name}.{kind}" if name else kind] = rows
    return own


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)


def step(model, optimizer, x, target, clip=None):
    optimizer.zero_grad()
    y = model(x)
    (y * target).sum().backward()
    norm = clip(model, 1.5) if clip else None
    optimizer.step()
    return y, norm


# -- what the processes run: (group, scratch folder) ----------------------------------------------


def same_as_one(name):
    def run(group, folder):
        make, inputs = MODELS[name]
        torch.manual_seed(3)
        one = make().double()
        x = [inputs() for _ in range(3)]
        x = [each.double() if each.is_floating_point() else each for each in x]
        target = torch.randn_like(one(x[0]))
        divided = parallel.divide(copy.deepcopy(one), group)
        own = own_of(divided)
        optimizers = optimizer_of(one), optimizer_of(divided)
        for each in x:
            torch.manual_seed(4)
            y, norm = step(one, optimizers[0], each, target, parallel.clip_grad_norm)
            torch.manual_seed(4)
            found, found_norm = step(divided, optimizers[1], each, target, parallel.clip_grad_norm)
            close(found, y)
            close(found_norm, norm)
            parameters = dict(one.named_parameters())
            for key, p in divided.named_parameters():
                want = parameters[key]
                assert (p.grad is None) == (want.grad is None), key
                if p.grad is not None:
                    close(p.grad, want.grad[own[key]])
                close(p, want[own[key]])
        with torch.no_grad():
            close(divided.eval()(x[0]), one.eval()(x[0]))

    return run


def built_as_one(group, folder):
    for init in ("equal", "independent", "published"):
        torch.manual_seed(dist.get_rank(group) + 5)
        divided = parallel.build(lambda init=init: small_gpt(init=init), group)
        after = torch.rand(3)
        torch.manual_seed(5)
        one = small_gpt(init=init)
        assert torch.equal(torch.rand(3), after)
        own = own_of(divided)
        for (key, p), want in zip(divided.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(p, want[own[key]]), key
            assert p.untyped_storage().nbytes() == p.numel() * 4


def shared_from_first(group, folder):
    """Models that differ between processes become the first's."""
    torch.manual_seed(dist.get_rank(group))
    divided = parallel.divide(small_vit(), group)
    torch.manual_seed(0)
    own, one = own_of(divided), small_vit()
    for (key, p), want in zip(divided.named_parameters(), one.parameters(), strict=True):
        assert torch.equal(p, want[own[key]]), key
    with torch.no_grad():
        divided.head.weight += dist.get_rank(group)
    parallel.synchronize(divided)
    assert torch.equal(divided.head.weight, one.head.weight)


def files(group, folder):
    """Trained here, saved, and read by any number of processes, then trained on."""
    torch.manual_seed(6)
    one = small_vit(init="independent").double()
    x, target = images().double(), torch.randn(2, 5).double()
    divided = parallel.divide(copy.deepcopy(one), group)
    optimizers = optimizer_of(one), optimizer_of(divided)
    step(one, optimizers[0], x, target)
    step(divided, optimizers[1], x, target)
    ranks = dist.get_world_size(group)
    path = folder / f"of-{ranks}"
    parallel.save(divided, path, optimizers[1])
    assert {p.name for p in path.iterdir()} == {
        "division.json", "shared.safetensors",
        *(f"share-{r}-of-{ranks}.safetensors" for r in range(ranks)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"folder: got .* which exists"):
        parallel.save(divided, path)
    read = [small_vit().double()]
    for size in range(1, ranks + 1):
        if dist.get_rank() < size:
            with torch.device("meta"):
                empty = parallel.divide(small_vit().double(), GROUPS[size])
            read.append(empty.to_empty(device="cpu"))
    step(one, optimizers[0], x, target)
    for model in read:
        optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
        parallel.load(model, path, optimizer)
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        step(model, optimizer, x, target)
        own = own_of(model)
        for (key, p), want in zip(model.named_parameters(), one.parameters(), strict=True):
            close(p, want[own[key]])
    fresh = parallel.divide(small_vit().double(), group)
    parallel.load(fresh, path)  # the model alone
    for change, reports in (
        ({"depth": 1}, "has tables with rows"),
        ({"num_classes": 4}, "'head.weight' of shape"),
        ({"dim": 12}, "of shape"),
    ):
        with pytest.raises(ValueError, match=reports):
            parallel.load(parallel.divide(small_vit(**change), group), path)
    two = [{"params": list(fresh.embed.parameters())}, {"params": list(fresh.head.parameters())}]
    with pytest.raises(ValueError, match="optimizer: got groups of"):
        parallel.load(fresh, path, torch.optim.AdamW(two))


def a_failure_is_everyones(group, folder):
    """A share that one process cannot write is an error in all, and no folder is left."""
    import safetensors.torch as st

    divided = parallel.divide(small_gpt(), group)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    kept = st.save_file
    if rank == ranks - 1:
        st.save_file = lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    try:
        own = "disk full" if rank == ranks - 1 else "another process"
        with pytest.raises(OSError, match=own):
            parallel.save(divided, folder / f"never-{ranks}")
    finally:
        st.save_file = kept
    dist.barrier(group)
    assert not [p for p in folder.iterdir() if "never" in p.name]


def decoding(group, folder):
    """A text given token by token, with what was computed before remembered."""
    torch.manual_seed(7)
    one = small_gpt(init="independent").double().eval()
    divided = parallel.divide(copy.deepcopy(one), group)
    text = ids()
    with torch.no_grad():
        want, caches = one(text), divided.make_caches()
        found = [divided(text[:, :3], caches)]
        found += [divided(text[:, i : i + 1], caches) for i in range(3, 7)]
    close(torch.cat(found, 1), want)


def half_precision(group, folder):
    """autocast: what is sent is half as wide, and the result that of one process, roughly."""
    torch.manual_seed(8)
    one = small_vit(init="independent")
    divided, x = parallel.divide(copy.deepcopy(one), group), images()
    sent, results = [], []
    for model in (one, divided):
        with torch.autocast("cpu", torch.bfloat16), scaling.counting() as calls:
            results.append(model(x).float())
            results[-1].square().sum().backward()
        sent.append(sum(call.bytes for call in calls))
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.05)
    if dist.get_world_size(group) > 1:
        assert 0 < sent[1] < 2 * 3 * 2 * 2 * 10 * 8 * 2 * 2


def traffic(group, folder):
    """The formula of the docs counts what is sent, and no more; nothing goes out in a table's
    shape."""
    ranks = dist.get_world_size(group)
    for mixer, relative in (("translution", "qkv"), ("translution", "kv"), ("alpha", "qk")):
        options = {"mixer": mixer, "relative": relative, "pool": "mean"}
        options |= {"rank": 3} if mixer == "alpha" else {}
        divided = parallel.divide(small_vit(**options), group)
        with scaling.counting() as calls:
            divided(images()).sum().backward()
        shape = scaling.Shape(layers=2, tokens=9, width=8, heads=2)
        branch = 6 if mixer == "alpha" else 0
        want = scaling.offset_bytes(shape, 2, ranks, 4, relative=relative, branch=branch)
        if ranks > 1:
            assert sum(call.sent(ranks) for call in calls) == pytest.approx(want)


def errors(group, folder):
    divided = parallel.divide(small_gpt(), group)
    with pytest.raises(ValueError, match="model: got one that is divided already"):
        parallel.divide(divided, group)
    with pytest.raises(ValueError, match="has a table '0' outside"):
        parallel.divide(nn.Sequential(RelativeLinear(3, 2, 2)), group)
    with pytest.raises(ValueError, match="max_norm: got 0"):
        parallel.clip_grad_norm(divided, 0)
    assert copy.deepcopy(divided).division is divided.division  # as averaged copies are made
    other = torch.optim.SGD(small_gpt().parameters())
    with pytest.raises(ValueError, match="optimizer: has a parameter that is not the model's"):
        parallel.save(divided, folder / "other", other)


def two_by_two(mesh):
    """Data parallelism over one axis of a mesh, the tables divided over the other."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(9)
    one = small_vit().double()
    x, target = torch.randn(4, 3, 12, 12).double(), torch.randn(4, 5).double()
    divided = parallel.divide(copy.deepcopy(one), mesh["offset"].get_group())
    wrapped = DistributedDataParallel(divided, process_group=mesh["data"].get_group())
    part = slice(mesh["data"].get_local_rank(), None, 2)
    step(one, optimizer_of(one), x, target / 2, parallel.clip_grad_norm)
    step(wrapped, optimizer_of(divided), x[part], target[part], parallel.clip_grad_norm)
    own = own_of(divided)
    for (key, p), want in zip(divided.named_parameters(), one.named_parameters(), strict=True):
        close(p, want[1][own[key]])


def strategies(mesh):
    """What the table of the docs measures is what its formulas count."""
    case = scaling.Small(dim=64, depth=1, grid=2, batch=4)
    numbers = sum(p.numel() for p in case.build().parameters())
    want = {
        "offset": scaling.offset_bytes(scaling.Shape(1, 4, 64, 1), 4, PROCESSES, 4),
        "fsdp": scaling.fsdp_bytes(numbers, PROCESSES, 4),
        "ddp": scaling.ddp_bytes(numbers, PROCESSES, 4),
    }
    for strategy in scaling.STRATEGIES:
        run, _ = scaling.prepared(case, strategy)
        with scaling.counting() as calls:
            run()
        sent = sum(call.sent(PROCESSES) for call in calls)
        # FSDP pads each parameter to equal parts, and gathers the outer ones once
        assert sent == pytest.approx(want[strategy], rel=0.1 if strategy == "fsdp" else 1e-3)


def feature_maps(group, folder):
    """A backbone that returns feature maps has no parameter without a gradient, which DDP needs."""
    from torch.nn.parallel import DistributedDataParallel

    for name in ("acmix_resnet26", "acmix_swin_tiny", "acmix_pvt_tiny", "acmix_san10"):
        depths = (1,) * (5 if name == "acmix_san10" else 4)
        model = create_model(name, features_only=True, depths=depths)
        wrapped = DistributedDataParallel(model, process_group=group)
        for _ in range(2):  # the second forward pass fails if a gradient was missing in the first
            sum(y.sum() for y in wrapped(torch.randn(1, 3, 64, 64))).backward()


CASES = {
    **{name: same_as_one(name) for name in MODELS},
    "built as one": built_as_one,
    "shared from the first": shared_from_first,
    "files": files,
    "a failure is everyone's": a_failure_is_everyones,
    "decoding": decoding,
    "half precision": half_precision,
    "traffic": traffic,
    "errors": errors,
    "feature maps": feature_maps,
}
PROCESSES = 4
ON_ONE = ("vit qkv", "gpt", "built as one", "files", "decoding", "errors")  # nothing is divided
ON_TWO = ("feature maps",)
RUNS = [
    (name, size)
    for size in (1, 2, 3)
    for name in CASES
    if (size == 2 if name in ON_TWO else size > 1 or name in ON_ONE)
]
GROUPS = {}  # in the processes: the group of the first so many


def work(rank, folder):
    """One process: every case on every group that it is in, and what came of each in a file."""
    forked.as_in_tests()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES,
        timeout=timedelta(seconds=40),
    )  # fmt: skip
    GROUPS.update({size: dist.new_group(list(range(size))) for size in (1, 2, 3)})
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "offset"))
    reports = {"mesh": attempt(two_by_two, mesh), "strategies": attempt(strategies, mesh)}
    for name, size in RUNS:
        if rank < size and not any(reports.values()):  # after a failure the others wait in vain
            reports[f"{name}, {size}"] = attempt(CASES[name], GROUPS[size], Path(folder))
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(reports))


def attempt(case, *arguments):
    try:
        case(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    forked.CONTEXT.set_forkserver_preload(["translution.apps.bench.scaling", "torch._dynamo"])
    mp.start_processes(work, (str(folder),), PROCESSES, start_method="forkserver")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("name", "size"), RUNS)
def test_processes(reports, name, size):
    for rank in range(size):
        assert reports[rank].get(f"{name}, {size}", "not run: an earlier case failed") == "", rank


@pytest.mark.parametrize("name", ["mesh", "strategies"])
def test_all_processes(reports, name):
    assert [each[name] for each in reports] == [""] * PROCESSES


def test_scaling_counts_a_model_that_fits_nowhere(capsys):
    scaling.main(["--processes", "0"])
    reports = capsys.readouterr().out
    assert "14.32 G parameters" in reports
    assert "| 8 | float32 | offset | 2.48 |" in reports


# -- without processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ranks", [2, 7])
def test_parts_make_the_whole(backend, ranks):
    if backend == "triton":
        pytest.importorskip("triton")
    layout = Layout((2, 2), prefix=1, prefix_queries=ranks == 7)  # 2 classes: most are empty then
    x = torch.randn(2, layout.tokens, 4, dtype=torch.float64)
    query = x[:, : layout.n_queries].clone()
    wq, wk, wv = torch.randn(3, layout.classes, 4, 6, dtype=torch.float64)
    leaves = [query, x, wq, wk, wv]

    def run(of):
        q, k, *w = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        parts, mixes = [], []
        for part, rows in of:
            mine = [table[rows] for table in w]
            s = offset_scores(q, k, *mine[:2], part, heads=2, backend=backend)
            parts.append(s)
            a = s.exp()  # of another's pairs 0
            mixes.append(offset_mix(a, k, mine[2], part, backend=backend))
        s, y = torch.stack(parts).amax(0), sum(mixes)
        return [s, y, *torch.autograd.grad(y.square().sum(), [q, k, *w])]

    whole = run([(layout, slice(None))])
    found = run([(layout.sharded(r, ranks), slice(r, None, ranks)) for r in range(ranks)])
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layout", "ranks", "most"),
    [(Layout((14, 14), prefix=1), 8, 1.04), (Layout(1024, causal=True), 8, 1.01)],
)
def test_shares_are_balanced(layout, ranks, most):
    pairs = [int((layout.sharded(r, ranks).index >= 0).sum()) for r in range(ranks)]
    assert sum(pairs) == int((layout.index >= 0).sum())
    assert max(pairs) * ranks / sum(pairs) < most
    rows = [layout.sharded(r, ranks).classes for r in range(ranks)]
    assert sum(rows) == layout.classes
    assert max(rows) - min(rows) <= 1


def test_a_share_is_part_of_a_layout():
    layout = Layout((3, 2), prefix=1).sharded(1, 4)
    assert Layout.parse(layout.spec) == layout
    assert layout.at((2, 2)).shard == (1, 4)
    assert not layout.full
    for shard in ((4, 4), (-1, 2), (0, 0), 3, (0.0, 2)):
        with pytest.raises(ValueError, match="shard: got"):
            Layout(3, shard=shard)


def test_divided_files_are_described_and_read_whole(tmp_path):
    """By from_pretrained too; those of earlier versions had no format, model or hashes."""
    model = small_gpt()
    model(ids()).sum().backward()
    optimizer = optimizer_of(model)
    optimizer.step()
    parallel.save(model, tmp_path / "one", optimizer)
    share = tmp_path / "one" / "share-0-of-1.safetensors"
    again = Pretrained.from_pretrained(tmp_path / "one")
    assert isinstance(again, GPT)
    rows = {name: t for name, t in load_file(share).items() if not name.startswith("optimizer/")}
    for rank in range(3):  # as three processes write it
        kept = {name: t[rank::3].contiguous() for name, t in load_file(share).items()}
        save_file(kept, tmp_path / "one" / f"share-{rank}-of-3.safetensors")
    file = tmp_path / "one" / "division.json"
    content = json.loads(file.read_text())
    assert set(content["files"]) == {"shared.safetensors", share.name}
    content = {**content, "shares": 3, "files": {}}
    file.write_text(json.dumps(content))
    whole = read_weights(tmp_path / "one", read_description(tmp_path / "one"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(whole[name], tensor), name
    assert rows.keys() < whole.keys()
    old = {key: content[key] for key in ("shares", "tables", "optimizer")}
    file.write_text(json.dumps(old))
    other = small_gpt()
    parallel.load(other, tmp_path / "one", optimizer_of(other))
    assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"architecture: is missing"):
        Pretrained.from_pretrained(tmp_path / "one")
    for key, value in (("shares", 0), ("shares", "3"), ("tables", [1]), ("optimizer", {})):
        file.write_text(json.dumps(old | {key: value}))
        with pytest.raises(ValueError, match=rf"division.json: {key}: "):
            parallel.load(other, tmp_path / "one", optimizer_of(other))
    file.write_text(json.dumps({**old, "files": {"shared.safetensors": "0" * 64}}))
    with pytest.raises(ValueError, match=r"shared.safetensors: was changed or damaged"):
        parallel.load(small_gpt(), tmp_path / "one")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights: head.weight have values that are not finite"):
        parallel.save(model, tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_whole_models_alone(tmp_path):
    """Without processes a model is saved, read and clipped all the same; and refused division."""
    with pytest.raises(ValueError, match=r"group: torch.distributed has no processes yet"):
        parallel.divide(small_gpt())
    model, other = small_gpt(), small_gpt()
    parallel.save(model, tmp_path / "one")
    parallel.load(other, tmp_path / "one")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="optimizer: none was saved"):
        parallel.load(model, tmp_path / "one", optimizer_of(model))
    (tmp_path / "one" / "division.json").write_text("{")
    with pytest.raises(ValueError, match=r"division.json: not a translution model"):
        parallel.load(model, tmp_path / "one")
    with pytest.raises(OSError, match="nowhere"):
        parallel.load(model, tmp_path / "nowhere")
    parallel.save(model, tmp_path / "two")
    with torch.device("meta"):
        empty = small_gpt()
    with pytest.raises(ValueError, match="is on meta"):
        parallel.load(empty, tmp_path / "two")
    model(ids()).sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(parallel.clip_grad_norm(model, 0.1), norm)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(clipped, torch.tensor(0.1))
