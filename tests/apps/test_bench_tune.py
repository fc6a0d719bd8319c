"""`translution bench-tune`, in the interpreter."""

from __future__ import annotations

import json

import pytest
import torch

from translution.apps.bench import tune
from translution.apps.bench.tune_command import bench_tune
from translution.backends.triton.blocks import MEASURED, Blocks

pytest.importorskip("triton")
CPU = torch.device("cpu")
WORK = tune.Work((2, 2), False, 16, 2, 2, torch.float32, CPU)


@pytest.mark.parametrize("kind", tune.KINDS)
def test_every_kernel_is_launched(kind, monkeypatch):
    """A kernel runs with the blocks that are tried, and one that fails does not end it."""
    tries = [Blocks(16, 16, 0, 16, 4, 1), Blocks(3, 3, 0, 3, 4, 1), Blocks(32, 32, 0, 16, 4, 1)]
    monkeypatch.setattr(tune, "candidates", lambda *_: tries)
    found = list(tune.tried(WORK, kind, 1))
    assert [blocks for blocks, _, _ in found] == tries
    assert [taken is None for _, taken, _ in found] == [False, True, False]
    assert all(count > 0 for *_, count in found)


def test_the_usual_blocks_come_first():
    for table in MEASURED.values():
        for kind, usual in table.items():
            tries = tune.candidates(kind, usual)
            assert tries[0] == usual
            assert len(set(tries)) == len(tries) > 20


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "candidates", lambda kind, usual: [usual])
    out = tmp_path / "tuned.json"
    bench_tune("scores,table_grads", "3c", 16, 2, 2, "float32", 100.0, 1, "cpu", json_file=str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["scores", "table_grads"]
    assert all(row["seconds"] > 0 and row["matmul_share"] > 0 for row in rows)
    assert 'best: "scores": Blocks(rows=32' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kernel": "score"}, "kernel: .*'score'"),
        ({"heads": 5}, "heads: got 5, want a divisor of width 384"),
        ({"budget": 0.0}, "budget: got 0"),
        ({"repeats": 0}, "repeats: got 0, want at least 1"),
    ],
)
def test_bad_options(keywords, message):
    usual = {
        "kernel": "scores", "grid": "2x2", "width": 384, "heads": 0, "batch": 1,
        "dtype": "float32", "budget": 1.0, "repeats": 1, "device": "cpu", "json_file": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        bench_tune(**(usual | keywords))
