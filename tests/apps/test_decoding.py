"""The benchmark of decoding counts what is read, times equal work, and refuses what it can't do."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from translution import gpt
from translution.apps.bench import decoding
from translution.apps.bench.decoding import (
    Decoding,
    bytes_per_token,
    main,
    measure_decoding,
    mixers_named,
)
from translution.models import GPT
from translution.models.blocks import TABLE_MIXERS
from translution.modules import RelativeLinear
from translution.modules.positions import RelativeBias

CPU = torch.device("cpu")
SMALL = {"context": 12, "dim": 8, "depth": 2, "heads": 2, "tokens": 4}
ARGUMENTS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
NAMED = mixers_named(decoding.DEFAULT + ",alpha:v,translution:q")


def names(cases):
    return [f"{mixer}-{relative}" for mixer, relative in cases]


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "relative"), NAMED, ids=names(NAMED))
@pytest.mark.parametrize("geometry", [{}, {"window": 3}, {"buckets": 4}], ids=str)
def test_rows_of_tables_that_are_not_counted_are_not_read(mixer, relative, geometry):
    """And those that are counted are."""
    sizes = {"context": 12, "vocab_size": 11, "dim": 8, "depth": 1, "heads": 2}
    tables = {"relative": relative} if mixer in TABLE_MIXERS else {}
    model = gpt(mixer=mixer, **tables, **sizes, **geometry).eval()
    tables = [m for m in model.modules() if isinstance(m, RelativeLinear | RelativeBias)]
    size = sum(4 * p.numel() // m.classes for m in tables for p in m.parameters())
    ids = torch.zeros(1, 6, dtype=torch.int64)
    caches = model.make_caches()
    model(ids[:, :5], caches)
    read = [0] * len(tables)
    for at, table in enumerate(tables):
        row = table.weight[0].clone()
        for c in range(table.classes):
            again = model.make_caches()
            model(ids[:, :5], again)
            table.weight[c] = math.nan
            read[at] += not model(ids[:, 5:], again).isfinite().all()
            table.weight[c] = row
    assert len(set(read)) <= 1
    assert bytes_per_token(model, 5, 1)["tables"] == (read[0] * size if read else 0)


def test_bytes_by_hand():
    model = Decoding("translution", "kv", **SMALL).build()
    found = bytes_per_token(model, 8, 4)
    mean = (9 + 10 + 11 + 12) / 4
    assert found["tables"] == 2 * 2 * mean * 8 * 8 * 4, "in two blocks: k, v, a row for each key"
    assert found["caches"] == 2 * 2 * mean * 8 * 4, "the inputs, for k and for v"
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert found["shared"] == whole - 2 * 2 * 12 * 8 * 8 * 4 - 255 * 8 * 4
    model = Decoding("attention", **SMALL).build()
    found = bytes_per_token(model, 1, 11)
    assert found["tables"] == 0
    assert found["caches"] == 2 * 2 * 7 * 8 * 4, "k and v, 2 to 12 of them"
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert found["shared"] == whole - (255 + 11) * 8 * 4


def test_a_repeat_does_what_is_told(monkeypatch):
    """The prompt apart, then so many tokens, the last of which sees a full context; no slide."""
    seen, hidden = {True: [], False: []}, GPT.hidden

    def spy(model, ids, caches=None):
        seen[caches is not None].append(ids.shape[1])
        return hidden(model, ids, caches)

    monkeypatch.setattr(GPT, "hidden", spy)
    (row,) = measure_decoding([Decoding("rotary", **SMALL)], CPU, repeats=1)
    assert seen[True] == [8, 1, 1, 1, 1] * 3, "counting, warming up, and timed"
    assert seen[False] == [8, 9, 10, 11, 12] * 2
    assert row["prompt"] == 8
    assert row["relative"] is None
    share = sum(row["bytes"].values()) / row["cached_seconds"] / row["copy_rate"]
    assert row["bytes_share"] == pytest.approx(share)


def test_the_program(capsys, tmp_path):
    file = tmp_path / "rows.json"
    main([*ARGUMENTS, "--repeats", "1", "--mixers", "rotary,translution:v", "--json", str(file)])
    out = capsys.readouterr().out
    assert "translution (v)" in out
    assert f"{file.name}" in out.replace("\n", "")
    told = json.loads(file.read_text())
    assert told["command"].endswith(f"--json {file}")
    assert [row["mixer"] for row in told["rows"]] == ["rotary", "translution"]
    for row in told["rows"]:
        assert row["context"] == 12
        assert all(row[f"{name}_seconds"] > 0 for name in ("prompt", "cached", "whole"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--tokens 12", "tokens: got 12, want 1 to 11"),
        ("--tokens 0", "tokens: got 0, want 1 to 11"),
        ("--repeats 0", "repeats: got 0, want at least 1"),
        ("--threads -1", "threads: got -1, want at least 0"),
        ("--heads 3", "heads: got 3, want a divisor of dim 8"),
        ("--depth 0", "depth: got 0, want at least 1"),
        ("--mixers attention,acmix", "mixers: got 'acmix'"),
        ("--mixers rotary:v", "mixers: got 'rotary:v', but only"),
        ("--mixers alpha:x", "relative: got 'x'"),
        ("--device tpu", "device: got 'tpu'"),
        ("--json absent/rows.json", "json: got absent/rows.json"),
    ],
)
def test_errors(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        main([*ARGUMENTS, *wrong.split()])
    assert message in capsys.readouterr().err


OWN = """
from translution import register_mixer
from translution.modules import SelfAttention

register_mixer("own", SelfAttention)
register_mixer("plain", lambda dim, causal: __import__("torch").nn.Linear(dim, dim))
"""


def test_a_mixer_of_ones_own(tmp_path, own_names, capsys):
    (tmp_path / "own.py").write_text(OWN)
    words = [*ARGUMENTS, "--repeats", "1", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*words, "--mixers", "own"])
    main([*words, "--mixers", "own", "--import", str(tmp_path / "own.py")])
    with pytest.raises(SystemExit):
        main([*words, "--mixers", "plain"])
    assert "cache: Linear has no make_cache" in capsys.readouterr().err


class Turned(TorchDispatchMode):
    """The rows of each cosine that is taken."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.cos:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_rotary_angles_are_those_of_new_tokens(window):
    """Taken once for queries and keys together; keys that are held were turned before."""
    model = gpt(mixer="rotary", context=12, vocab_size=11, dim=8, depth=2, heads=2, window=window)
    ids, caches = torch.randint(0, 11, (1, 12)), model.make_caches()
    with Turned() as turned:
        parts = [model(part, caches) for part in ids.split([7, 1, 3, 1], 1)]
    assert turned.rows == [7, 7, 1, 1, 3, 3, 1, 1]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids))
