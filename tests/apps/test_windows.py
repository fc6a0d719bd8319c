"""Windows of text: each token predicted once, or from anywhere; the same in any process."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from test_text import options
from torch.utils.data import DataLoader

from translution.apps.data.order import InOrder, Shuffled
from translution.apps.data.text import documents_of, open_text


def opened(tmp_path, n: int, part: str = "train", **content):
    """A text of n tokens that can be predicted, the documents' end among them."""
    path = tmp_path / f"{part}-{n}.txt"
    path.write_text("".join(chr(k % 100 + 20) for k in range(n - 1)))
    content = {"holdout": 0, "context": 10} | content
    if part != "train":
        content |= {"train": str(tmp_path / "none"), part: str(path)}
    else:
        content |= {"train": str(path)}
    windows = open_text(options(tmp_path, **content), part, content.get("seed", 3))
    assert windows.tokens == n
    return windows, windows.shards.read(0, n + 1).tolist()


@pytest.mark.parametrize("n", [2, 9, 10, 11, 35, 40])
def test_evaluation_predicts_each_token_once(tmp_path, n):
    windows, stream = opened(tmp_path, n, "valid")
    targets, inputs = [], []
    for batch in InOrder(len(windows), 3):
        for key in batch:
            window = windows[key]
            assert window.shape == (11,)
            assert window.dtype == torch.int64
            scored = window[1:] != -100
            targets += window[1:][scored].tolist()
            inputs += window[:-1][scored].tolist()
            assert (window[0] != -100).all()
    assert targets == stream[1:]
    assert inputs == stream[:-1]
    assert windows[7, 0].tolist() == windows[0, 0].tolist()
    assert windows.bytes == n - 1


@pytest.mark.parametrize("n", [10, 11, 19, 20, 21, 35, 200])
def test_training_windows_of_an_epoch_are_disjoint(tmp_path, n):
    windows, stream = opened(tmp_path, n)
    text = "".join(map(chr, stream))
    shifts = set()
    for epoch in range(60):
        starts = [
            text.index("".join(map(chr, windows[epoch, i].tolist()))) if n < 100 else None
            for i in range(len(windows))
        ]
        if n < 100:
            assert all(b - a == 10 for a, b in itertools.pairwise(starts))
            shifts.add(starts[0])
        else:
            got = torch.stack([windows[epoch, i] for i in range(len(windows))])
            assert got[:-1, -1].tolist() == got[1:, 0].tolist()
    if n < 100:
        assert shifts == set(range(min(10, n - len(windows) * 10 + 1)))
        if n >= 20:
            assert len(windows) == max(1, (n + 1) // 10 - 1)


def test_random_windows(tmp_path):
    windows, stream = opened(tmp_path, 50, windows="random", epoch_windows=500)
    assert len(windows) == 500
    text = "".join(map(chr, stream))
    starts = [text.index("".join(map(chr, windows[0, i].tolist()))) for i in range(500)]
    assert set(starts) == set(range(41))
    assert windows[0, 3].tolist() == windows[0, 3].tolist()
    epochs = [[windows[e, i].tolist() for i in range(20)] for e in range(2)]
    assert epochs[0] != epochs[1]
    other, _ = opened(tmp_path, 50, windows="random", epoch_windows=500)
    other.seed = 4
    assert [other[0, i].tolist() for i in range(20)] != epochs[0]


def test_indices_lie_within(tmp_path):
    windows, _ = opened(tmp_path, 50)
    with pytest.raises(IndexError, match="index: got 4, want 0 to 3"):
        windows[0, 4]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loaders_workers_read_the_same(tmp_path, context):
    windows, _ = opened(tmp_path, 200)
    order = Shuffled(len(windows), 4, 6, seed=0)
    alone = list(DataLoader(windows, batch_sampler=order))
    workers = DataLoader(
        windows, batch_sampler=order, num_workers=1, multiprocessing_context=context
    )
    assert all((a == b).all() for a, b in zip(alone, workers, strict=True))


def test_windows_survive_pickling(tmp_path):
    windows, _ = opened(tmp_path, 200)
    first = windows[0, 0]
    copy = pickle.loads(pickle.dumps(windows))
    assert (copy[0, 0] == first).all()
    assert copy.tokenizer.decode(first.tolist())


def test_a_document_begins_with_the_token_before_it(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("ab\nc\n")
    chosen = options(tmp_path, train=str(path), documents="", holdout=0, context=6)
    windows = open_text(chosen, "train", 3)
    end = windows.end
    tokens = torch.tensor([[end, 97, 98, 10, end, 99], [98, 10, end, 99, 10, end]])
    assert windows.shards.read(0, 8).tolist() == [end, 97, 98, 10, end, 99, 10, end]
    assert documents_of(tokens, end).tolist() == [[1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2]]
