"""Generation: caches are exact, what is seen is defined, draws are repeatable, text is whole."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from translution import Layout, SelfAttention, Translution1d, Translution2d, gpt
from translution.functional import offset, single_query
from translution.models.blocks import IMAGE_MIXERS, MIXERS, TABLE_MIXERS
from translution.models.generation import generate, probabilities
from translution.modules.cache import Cache
from translution.operands import Operand

CAUSAL = [name for name in MIXERS if name not in IMAGE_MIXERS]
VOCAB = 11
SUBSETS = ["", "q", "k", "v", "qk", "qv", "kv", "qkv"]
GEOMETRY = [
    {}, {"window": 3}, {"window": 0}, {"dilation": 2}, {"window": 2, "dilation": 2},
    {"buckets": 3}, {"buckets": 2, "window": 5}, {"buckets": 2, "dilation": 3}, {"window": 40},
]  # fmt: skip


def model_of(mixer, seed=0, context=12, **more):
    """A small model whose every parameter matters."""
    torch.manual_seed(seed)
    sizes = {"dim": 8, "depth": 2, "heads": 2, "head_dim": 4} | more
    model = gpt(mixer=mixer, context=context, vocab_size=VOCAB, **sizes).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def in_parts(model, ids, sizes):
    caches, parts = model.make_caches(), ids.split(sizes, 1)
    return torch.cat([model(part, caches) for part in parts], 1), caches


@st.composite
def sizes_of(draw, total):
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("mixer", CAUSAL)
@settings(max_examples=8)
@given(data=st.data())
def test_parts_equal_the_whole(mixer, geometry, data):
    tables = {}
    if mixer in TABLE_MIXERS:
        tables["relative"] = data.draw(st.sampled_from(SUBSETS))
        tables["relative_depth"] = data.draw(st.sampled_from([None, 1]))
    model = model_of(mixer, **tables, **geometry)
    length = data.draw(st.integers(1, 20 if model.unbounded else 12))
    ids = torch.randint(0, VOCAB, (data.draw(st.integers(1, 3)), length))
    y, caches = in_parts(model, ids, data.draw(sizes_of(length)))
    torch.testing.assert_close(y, model(ids), rtol=1e-12, atol=1e-12)
    window = geometry.get("window", length) * geometry.get("dilation", 1)
    assert all(cache.held == min(length, window) for cache in caches)


@torch.no_grad()
@pytest.mark.parametrize("mixer", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(mixer, dtype):
    model = model_of(mixer)
    ids = torch.randint(0, VOCAB, (2, 12))
    y, _ = in_parts(model.to(dtype), ids, [5] + [1] * 7)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    whole = model(ids)
    assert (y - whole).abs().max() <= tolerance * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_one_query_in_one_call(geometry, bias):
    """The quick way for one query equals the primitives; where classes are shared it is them."""
    for n in (1, 2, 5, 9):
        given_ = Layout((9,), causal=True, **geometry)
        layout = given_.at(n).select(queries=(n - 1,))
        index = layout.index[0]
        if layout.single_query is not None:
            count, step = layout.single_query
            want = torch.full((n,), -1)
            for c in range(count):
                want[n - 1 - c * step] = c
            assert index.tolist() == want.tolist()
        else:
            present = index[index >= 0].tolist()
            assert len(set(present)) < len(present)
        xq, xk = torch.randn(2, 1, 6).double(), torch.randn(2, n, 6).double()
        tables = [torch.randn(layout.classes, 6, 6).double() for _ in range(3)]
        biases = [torch.randn(layout.classes, 6).double() if bias else None for _ in range(3)]
        for wq, bq, wk, bk in [
            (None, None, tables[1], biases[1]),
            (tables[0], biases[0], None, None),
            (tables[0], biases[0], tables[1], biases[1]),
        ]:
            query, key = Operand(xq, wq, bq), Operand(xk, wk, bk)
            want = offset.scores(query, key, layout, heads=2, scale=0.3)
            got = single_query.scores(query, key, layout, heads=2, scale=0.3)
            torch.testing.assert_close(got, want)
        a = torch.rand(2, 2, 1, n).double()
        value = Operand(xk, tables[2], biases[2])
        want, got = offset.mix(a, value, layout), single_query.mix(a, value, layout)
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_modules_with_biases_and_weights():
    """A layer by itself, with biased projections; the weights' keys are what is held and new."""
    x = torch.randn(2, 10, 8).double()
    layers = [
        Translution1d(8, 10, heads=2, relative=r, qkv_bias=True, causal=True) for r in SUBSETS
    ]
    layers += [SelfAttention(8, 10, heads=2, position=p, causal=True) for p in ("none", "rotary")]
    for layer in layers:
        layer = layer.double()
        y, a = layer(x, return_weights=True)
        cache = layer.make_cache()
        first, _ = layer(x[:, :6], return_weights=True, cache=cache)
        second, b = layer(x[:, 6:], return_weights=True, cache=cache)
        torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, a[:, :, 6:], rtol=1e-12, atol=1e-12)


def test_a_cache_grows_rarely_and_stays_small():
    cache, copies, rows = Cache(), 0, None
    for i in range(300):
        got = cache.extend("k", torch.full((1, 1, 2), float(i)))
        assert got[0, :, 0].tolist() == list(range(i + 1))
        assert cache.extend("k", got[:, -1:].clone()).shape == got.shape, "repeating adds nothing"
        copies += rows is not None and got.untyped_storage().data_ptr() != rows
        rows = got.untyped_storage().data_ptr()
        cache.advance(1)
    assert copies < 12
    cache = Cache(reach=4)
    cache.extend("k", torch.arange(500.0).view(1, 500, 1))
    cache.advance(500)
    for i in range(500, 550):
        got = cache.extend("k", torch.full((1, 1, 1), float(i)))
        assert got.flatten().tolist() == list(range(i - 4, i + 1))
        assert got.untyped_storage().nbytes() <= 4 * 4 * 5
        cache.advance(1)


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("mixer", CAUSAL)
def test_padding_changes_nothing(mixer, geometry):
    """Before a text, after it and over all of it; whole and in parts."""
    model = model_of(mixer, **geometry)
    ids = torch.randint(0, VOCAB, (4, 12))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    texts = [(0, 12), (4, 12), (0, 9)]
    for text, (start, end) in zip(mask, texts, strict=False):
        text[start:end] = True
    y = model(ids, mask=mask)
    assert y.isfinite().all()
    for i, (start, end) in enumerate(texts):
        alone = model(ids[i : i + 1, start:end])
        torch.testing.assert_close(y[i : i + 1, start:end], alone, rtol=1e-12, atol=1e-12)
    caches, parts, seen = model.make_caches(), [], 0
    for part in ids.split([5, 1, 1, 3, 2], 1):
        seen += part.shape[1]
        parts.append(model(part, caches, mask[:, :seen]))
    torch.testing.assert_close(torch.cat(parts, 1)[mask], y[mask], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_tokens_are_taken_back(geometry):
    model = model_of("translution", **geometry)
    ids = torch.randint(0, VOCAB, (2, 12))
    want = model(ids)
    caches = model.make_caches()
    for cache in caches:
        cache.record()
    model(ids[:, :6], caches)
    for wrong in (1, 1, 1, 2):
        model(torch.randint(0, VOCAB, (2, wrong)), caches)
    for cache in caches:
        cache.crop(5)
    torch.testing.assert_close(model(ids[:, 6:9], caches), want[:, 6:9], rtol=1e-12, atol=1e-12)
    for cache in caches:
        cache.crop(2)
    torch.testing.assert_close(model(ids[:, 7:], caches), want[:, 7:], rtol=1e-12, atol=1e-12)
    if geometry == {"window": 3}:
        caches = model.make_caches()
        for token in ids.split(1, 1):
            model(token, caches)
        with pytest.raises(ValueError, match=r"a window has dropped .* want cache.record\(\)"):
            caches[0].crop(10)


def test_cache_errors():
    model = model_of("translution")
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, model.make_caches())
    with pytest.raises(ValueError, match="causal=False"):
        Translution2d(8, (2, 2), heads=2).make_cache()
    with pytest.raises(ValueError, match="1 prefix"):
        Translution1d(8, 4, heads=2, causal=True, prefix=1).make_cache()
    with torch.no_grad():
        with pytest.raises(ValueError, match="caches: got 1 that"):
            model(ids, model.make_caches()[:1])
        used = model.make_caches()
        model(ids, used)
        with pytest.raises(ValueError, match=r"have seen \[0, 3\]"):
            model(ids, [used[0], model.make_caches()[1]])
        with pytest.raises(ValueError, match="cache: holds"):
            model(ids.repeat(2, 1), used)
        with pytest.raises(ValueError, match="13 tokens on axis 0, but the tables"):
            model(torch.zeros(1, 10, dtype=torch.int64), used)
        assert {cache.length for cache in used} == {3}, "a refused call changes nothing"
        with pytest.raises(ValueError, match=r"mask: got .*\(1, 3\), want boolean .* \(1, 4\)"):
            model(ids[:, :1], used, torch.ones(1, 3).bool())
        with pytest.raises(ValueError, match=r"mask: got torch.int64 of shape \(1, 3\)"):
            model(ids, mask=torch.ones_like(ids))
        with pytest.raises(ValueError, match="tokens: got 4, want 0 to the 3"):
            used[0].crop(4)
        model = model_of("attention")
        used = model.make_caches()
        model(ids, used)
        with pytest.raises(ValueError, match="13 tokens, want at most the context 12"):
            model(torch.zeros(1, 10, dtype=torch.int64), used)


# -- generate -------------------------------------------------------------------------------------


def listed(*arguments, **options):
    steps = list(generate(*arguments, **options))
    return torch.stack(steps, 1) if steps else None


def slowly(model, ids, count, slide):
    """Greedy, by the definition: each token from a whole pass over what is seen."""
    context = model.config.context
    with torch.no_grad():
        for _ in range(count):
            begin = 0
            while slide and ids.shape[1] - begin > context:
                begin += slide
            ids = torch.cat([ids, model(ids[:, begin:])[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


@pytest.mark.parametrize("mixer", CAUSAL)
@settings(max_examples=6)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 20), slide=st.integers(1, 7),
    buckets=st.sampled_from([None, 3]), window=st.sampled_from([None, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_generate(mixer, batch, length, slide, buckets, window, seed):
    """Greedy is the definition; draws don't depend on the cache; beyond the context too."""
    model = model_of(mixer, seed, context=7, buckets=buckets, window=window)
    ids = torch.randint(0, VOCAB, (batch, length))
    want = slowly(model, ids, 12, slide)
    for cache in (True, False):
        assert listed(model, ids, 12, temperature=0, cache=cache, slide=slide).equal(want)
    options = {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "slide": slide, "seed": seed}
    drawn = listed(model, ids, 12, **options)
    assert listed(model, ids, 12, **options, cache=False).equal(drawn)
    if model.unbounded:
        want = slowly(model, ids, 12, 0)
        for cache in (True, False):
            assert listed(model, ids, 12, temperature=0, cache=cache, slide=0).equal(want)


def test_the_model_never_sees_more_than_the_context(monkeypatch):
    model = model_of("translution", context=8)
    seen, hidden = [], model.hidden

    def spy(ids, caches=None):
        out = hidden(ids, caches)
        seen.append((ids.shape[1], caches[0].length if caches else ids.shape[1]))
        return out

    monkeypatch.setattr(model, "hidden", spy)
    listed(model, torch.zeros(1, 6, dtype=torch.int64), 8, slide=4)
    assert seen == [(6, 6), (1, 7), (1, 8), (5, 5), (1, 6), (1, 7), (1, 8), (5, 5)]
    seen.clear()
    listed(model, torch.zeros(1, 6, dtype=torch.int64), 5)  # a quarter of it
    assert seen == [(6, 6), (1, 7), (1, 8), (7, 7), (1, 8)]


def test_stop_repeats_until_all_have_ended():
    model = model_of("attention", context=30)
    ids = torch.tensor([[1], [2], [3]])
    free = listed(model, ids, 25, seed=3)
    ends = {int(free[0, 4])}
    got = listed(model, ids, 25, seed=3, stop=ends)
    lengths = []
    for row in got.tolist():
        hits = [i for i, token in enumerate(row) if token in ends]
        if hits:
            assert set(row[hits[0] :]) == {row[hits[0]]}
        lengths.append(hits[0] + 1 if hits else 25)
    assert got.shape[1] == max(lengths)
    assert lengths[0] <= 5
    assert got[0, : lengths[0]].tolist() == free[0, : lengths[0]].tolist()


def test_seeds():
    model = model_of("attention")
    ids = torch.tensor([[1], [2]])
    one = listed(model, ids, 10, seed=1)
    torch.rand(5)
    assert listed(model, ids, 10, seed=1).equal(one)
    assert not listed(model, ids, 10, seed=2).equal(one)
    generator = torch.Generator().manual_seed(1)
    assert listed(model, ids, 10, seed=generator).equal(one)
    assert not listed(model, ids, 10, seed=generator).equal(one), "it goes on"
    assert listed(model, ids, 0) is None


def test_grad_mode_is_left_alone():
    stream = generate(model_of("attention"), torch.tensor([[1]]), 3)
    next(stream)
    assert torch.is_grad_enabled()


def test_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    close = torch.testing.assert_close
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double()
    close(probabilities(logits), p, rtol=1e-6, atol=1e-6)
    close(probabilities(logits, 0.5), p**2 / (p**2).sum(), rtol=1e-6, atol=1e-6)
    close(probabilities(logits, top_k=2)[2:], torch.zeros(2).double())
    assert (probabilities(logits, top_k=9) > 0).all()
    assert (probabilities(logits, top_p=0.5) > 0).tolist() == [True, False, False, False]
    assert (probabilities(logits, top_p=0.51) > 0).tolist() == [True, True, False, False]
    both = probabilities(logits.flip(0), top_k=3, top_p=0.7)  # 0.5 and 0.3 of 0.95 reach it
    close(both, torch.tensor([0, 0, 0.375, 0.625]).double(), rtol=1e-6, atol=1e-6)
    close(probabilities(logits, 1e-300), torch.tensor([1.0, 0, 0, 0]).double())


def test_draws_follow_the_probabilities():
    model = model_of("attention")
    ids = torch.full((4000, 1), 3)
    with torch.no_grad():
        p = probabilities(model(ids[:1])[0, -1])
    (drawn,) = generate(model, ids, 1, seed=0)
    shares = torch.bincount(drawn, minlength=VOCAB) / 4000
    assert (shares - p).abs().max() < 0.03


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"stop": {11}}, "stop: got token 11, want 0 to 10"),
        ({"slide": 13}, "slide: got 13, want 1 to the context 12"),
        ({"slide": 0}, "slide: got 0, want 1"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"ids": torch.tensor([[11]])}, "ids: got token 11, want 0 to 10"),
        ({"ids": torch.tensor([[-1]])}, "ids: got token -1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, "ids: got torch.int64 of shape"),
        ({"model": model_of("attention").train()}, r"model.eval\(\)"),
    ],
)
def test_errors_come_at_once(wrong, message):
    arguments = {"model": model_of("attention"), "ids": torch.tensor([[1]]), "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        generate(**arguments | wrong)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte, and one that is special."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


@given(data=st.data())
def test_a_stream_gives_what_decoding_gives(tokenizer, data):
    from translution.apps.training.generate_command import BROKEN, TextStream

    text = data.draw(st.text(max_size=30))
    before = tokenizer.encode(data.draw(st.text(max_size=9))).ids
    tokens = tokenizer.encode(text).ids
    pieces = list(TextStream(tokenizer, before).pieces(tokens))
    assert "".join(pieces) == text
    assert "" not in pieces
    assert BROKEN in text or not any(BROKEN in piece for piece in pieces)
    if len(text) > 1 and BROKEN not in text:
        assert len(pieces) == len(text), "each character as soon as it is whole"
    stop = data.draw(st.text("ab", min_size=1, max_size=3))
    text = data.draw(st.text("ab", max_size=12))
    got = "".join(TextStream(tokenizer, before, [stop, "zz"]).pieces(tokenizer.encode(text).ids))
    assert got == text.split(stop)[0]


@given(st.lists(st.integers(0, 255), max_size=20), st.integers(0, 20))
def test_a_stream_of_any_bytes(tokenizer, tokens, cut):
    from translution.apps.training.generate_command import TextStream

    assert "".join(TextStream(tokenizer).pieces(tokens)) == tokenizer.decode(tokens)


def test_a_stream_keeps_the_spaces_of_words():
    tokenizers = pytest.importorskip("tokenizers")
    from translution.apps.training.generate_command import TextStream

    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "b": 1, "##c": 2}))
    made.decoder = tokenizers.decoders.WordPiece()
    assert list(TextStream(made, [0]).pieces([1, 2, 0])) == [" b", "c", " a"]


class Opened:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer


def run(monkeypatch, capsys, model, tokenizer, **options):
    from translution.apps.training import checkpoints
    from translution.apps.training.generate_command import generate as command

    monkeypatch.setattr(checkpoints, "open_checkpoint", lambda path: Opened(model, tokenizer))
    command("there", **{"device": "cpu", "prompt": "ab", "max_tokens": 20} | options)
    return capsys.readouterr().out


def test_the_command(monkeypatch, capsys, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = gpt(context=16, vocab_size=257, dim=8, depth=1, heads=2, relative="kv").eval()

    def out(**options):
        return run(monkeypatch, capsys, model, tokenizer, **options)

    ids = torch.tensor([tokenizer.encode("ab").ids])
    end = tokenizer.token_to_id("<end>")
    want = [tokenizer.decode([int(t) for t in generate(model, ids, 20, seed=s)]) for s in (5, 6)]
    assert out(seed=5) == want[0] + "\n"
    assert out(seed=5, samples=2, cache=False) == f"{want[0]}\n\n---\n\n{want[1]}\n"
    assert out(seed=5, echo=True) == f"ab{want[0]}\n"
    (tmp_path / "prompt").write_text("ab")
    assert out(seed=5, prompt="", prompt_file=str(tmp_path / "prompt")) == want[0] + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab")))
    assert out(seed=5, prompt="-") == want[0] + "\n"
    assert out(seed=5, stop=[want[0][3:5]]) == want[0][: want[0].index(want[0][3:5])] + "\n"
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[end] = 1.0
    assert out(temperature=0.0, stop=["<end>"]) == "\n"
    (tmp_path / "prompt").write_bytes(b"a\xff")
    for wrong, message in [
        ({"prompt": ""}, "prompt: want one of"),
        ({"prompt_file": "x"}, "prompt: want one of"),
        ({"prompt": "", "prompt_file": str(tmp_path / "prompt")}, "prompt: not UTF-8 at byte 1"),
        ({"samples": 0}, "samples: got 0"),
        ({"stop": [""]}, "stop: got an empty text"),
        ({"slide": 0}, "slide: got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            out(**wrong)
    with pytest.raises(ValueError, match="there: holds a GPT without a tokenizer"):
        run(monkeypatch, capsys, model, None)
    with pytest.raises(OSError, match="absent"):
        out(prompt="", prompt_file=str(tmp_path / "absent"))


def test_logits_that_are_not_finite_are_refused():
    model = gpt(mixer="rotary", dim=8, depth=1, heads=1, vocab_size=9, context=8).eval()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="model: got logits that are not finite"):
            list(generate(model, torch.zeros(1, 2).long(), 3, temperature=temperature))
