"""The cache of index tables: its bounds, CUDA graphs and threads."""

from __future__ import annotations

import threading

import pytest
import torch

from translution import Layout, caches

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def filled(cache, keys, numbers=1):
    """Get tables of `numbers` float32 numbers; return the keys whose tables had to be computed."""
    made = []
    for key in keys:
        cache.get(key, CPU, lambda key=key: made.append(key) or torch.zeros(numbers))
    return made


def test_the_least_recently_used_are_dropped():
    cache = caches.Cache(size=3 * 400)
    assert filled(cache, "abc", 100) == list("abc")
    assert filled(cache, "a", 100) == []
    # eight of the largest table are always allowed
    assert filled(cache, "defgh", 100) == list("defgh")
    assert cache.held == 8 * 400
    assert filled(cache, "i", 100) == ["i"]
    assert filled(cache, "acdefghi", 100) == []  # b was used before all others
    assert filled(cache, "b", 100) == ["b"]
    assert cache.held == 8 * 400


def test_bytes_are_bounded():
    cache = caches.Cache(size=10_000)
    filled(cache, range(1000), 100)
    assert cache.held <= 10_000
    assert len(cache) == 25
    filled(cache, ["large"], 10_000)
    assert cache.held == 40_000 + 25 * 400
    filled(cache, range(26), 10_000)
    assert cache.held == 8 * 40_000


def test_entries_are_bounded():
    cache = caches.Cache(entries=10)
    filled(cache, range(100))
    assert len(cache) == 10


def test_nested_tables_count():
    cache = caches.Cache()
    cache.get("a", CPU, lambda: (torch.zeros(10), (torch.zeros(5, dtype=torch.int64),), 3))
    assert cache.held == 40 + 40 + 32
    cache.clear()
    assert cache.held == len(cache) == 0


def test_tables_of_a_captured_graph_stay(monkeypatch):
    cache, capturing = caches.Cache(entries=1), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first = cache.get("a", CUDA, lambda: torch.zeros(1))
    capturing = True
    assert cache.get("a", CUDA, lambda: None) is first
    with pytest.raises(RuntimeError, match="call once before the capture"):
        cache.get("b", CUDA, lambda: torch.zeros(1))
    capturing = False
    cache.get("b", CUDA, lambda: torch.zeros(1))
    cache.clear()
    assert any(held is first for held in cache._captured.values())


def test_threads_make_a_table_once():
    cache, made, start = caches.Cache(), [], threading.Barrier(8)

    def ask():
        start.wait()
        cache.get("a", CPU, lambda: made.append(1) or torch.zeros(1))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_layouts_are_cached():
    """Equal layouts share their tables, and a hundred of them stay within the bound."""
    assert Layout((3, 4)).pairs_on("cpu") is Layout((3, 4)).pairs_on("cpu")
    for length in range(100, 200):
        Layout(length, causal=True).pairs_on("cpu")
    assert caches.TABLES.held <= caches.TABLES.size


def test_a_layout_is_looked_up_by_its_spec(monkeypatch):
    """Hashing a layout would hash all positions of its queries and keys, at every call."""
    keys = []
    monkeypatch.setattr(caches.TABLES, "get", lambda key, device, make: keys.append(key) or make())
    layout = Layout(5).select(queries=range(4))
    layout.pairs_on("cpu")
    assert layout.spec in keys[0]
    assert layout not in keys[0]
