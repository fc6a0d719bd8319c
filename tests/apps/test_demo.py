"""The demo without a browser: what is drawn, what models say, what stands in the cards."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nicegui")
pytest.importorskip("lightning")
from PIL import Image
from safetensors.torch import save_file

from translution import create_model
from translution.apps import cli
from translution.apps.config import load, parse
from translution.apps.data.digits import load_digits, place
from translution.apps.demo import server
from translution.apps.demo import train as training
from translution.apps.demo.cards import Look, Tally, digit_card, text_card, visible
from translution.apps.demo.listening import is_loopback, listen
from translution.apps.demo.live import Newest
from translution.apps.demo.models import Models, open_models, weights_folder
from translution.apps.demo.sketch import (
    MOST_BYTES,
    SIDE,
    bitmap,
    from_image,
    from_lines,
    reduced,
)
from translution.apps.training.config import Config
from translution.interop.images import normalised
from translution.models.description import CHECKPOINT, read_description
from translution.models.weights import WEIGHTS

DOCS = Path(__file__).parents[2] / "docs" / "demo.md"
OWN = weights_folder()


@pytest.fixture(scope="module")
def models():
    return open_models()


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# -- drawing and uploading -----------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_a_bitmap_is_counted_in_blocks(seed):
    bits = np.random.default_rng(seed).random((32, 32)) < 0.5
    found = reduced(bits)
    for y in range(8):
        for x in range(8):
            count = sum(bits[4 * y + i, 4 * x + j] for i in range(4) for j in range(4))
            assert found[y, x] * 16 == count


def test_a_bitmap_has_32_pixels_a_side():
    with pytest.raises(ValueError, match=r"bits: got \(8, 8\), want \(32, 32\)"):
        reduced(np.zeros((8, 8)))


@given(
    st.lists(st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)), min_size=2, max_size=8),
    st.floats(0, 0.5),
)
@settings(max_examples=15)
def test_where_and_how_large_one_draws_does_not_matter(points, shift):
    points = [[0.0, 0.0], *points, [0.4, 0.4]]
    there = [[x + shift, y + shift] for x, y in points]
    larger = [[2 * x, 2 * y] for x, y in points]
    found = from_lines([points])
    assert torch.allclose(found, from_lines([there]), atol=1 / 8)
    assert torch.allclose(found, from_lines([larger]), atol=1 / 8)


def test_a_vertical_line_fills_the_height():
    digit = from_lines([[[0.9, 0.2], [0.9, 0.6]]])
    assert (digit[:, 3:5].sum(1) > 0).all()
    assert digit[:, :2].sum() == digit[:, 6:].sum() == 0


def test_a_dot_stays_a_dot():
    assert 0 < from_lines([[[0.1, 0.1]]]).sum() < 3
    assert from_lines([]) is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([[[0.5, 1.5]]], "values 0 to 1"),
        ([[[0.5, float("nan")]]], "values 0 to 1"),
        ([[[0.5]]], "values 0 to 1"),
        ([[[0.5, 0.5]] * 30_000], "30000 points"),
    ],
)
def test_lines_that_are_refused(lines, said):
    with pytest.raises(ValueError, match=said):
        from_lines(lines)


def test_dark_on_light_is_light_on_dark():
    ink = np.zeros((60, 40), np.uint8)
    ink[10:50, 15:25] = 255
    light, dark = (from_image(encoded(Image.fromarray(i))) for i in (ink, 255 - ink))
    assert torch.equal(light, dark)
    assert torch.equal(light[:, 3:5], torch.ones(8, 2))
    assert light.sum() == 16


def test_an_uploaded_digit_is_recognised_as_before(models):
    """An image of a test digit, ten times as large, becomes about that digit."""
    data = load_digits()
    model = next(m for m in models.digits if m.mixer == "rotary" and not m.moved)
    same = 0
    for digit in data.test[:15]:
        large = Image.fromarray((digit * 255).byte().numpy()).resize((80, 80), Image.BILINEAR)
        framed = Image.new("L", (120, 100))
        framed.paste(large, (20, 10))
        again = from_image(encoded(framed))
        one, other = (model.answer(d, 10, 10).probabilities for d in (digit, again))
        same += int(np.argmax(one) == np.argmax(other))
    assert same >= 12


def bomb():
    """The header of a PNG of 60,000 pixels a side."""
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"not an image", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 40, "not a"),
        (b"0" * (MOST_BYTES + 1), "want at most 5,242,880"),
        (encoded(Image.new("L", (5000, 4000))), "5000×4000 pixels"),
        (bomb(), "pixels"),
        (encoded(Image.new("RGB", (30, 30), "red")), "one colour"),
        (encoded(Image.new("RGB", (30, 30), "red"), "EPS"), "of a known format"),
    ],
    ids=["empty", "text", "damaged", "bytes", "pixels", "bomb", "plain", "eps"],
)
def test_uploads_that_are_refused(content, said):
    with pytest.raises(ValueError, match=said):
        from_image(content)


def test_a_bitmap_of_nothing():
    with pytest.raises(ValueError, match="nothing to see"):
        bitmap(Image.new("L", (9, 9)))
    assert bitmap(Image.new("L", (3, 9), 255)).sum() == SIDE * round(SIDE / 3)


# -- models --------------------------------------------------------------------------------------


def test_the_demos_own_models(models):
    assert {path.name for path in OWN.iterdir()} == {planned.name for planned in training.PLAN}
    assert sum(f.stat().st_size for f in OWN.rglob("*") if f.is_file()) <= 8_000_000
    assert [m.moved for m in models.digits] == [True] * 6 + [False] * 3
    assert [m.mixer for m in models.text] == ["translution", "alpha", "attention", "rotary"]
    assert [m.mixer for m in models.digits[:3]] == ["translution", "alpha", "acmix"]
    for planned in training.PLAN:
        saved = read_description(OWN / planned.name)
        config = load(Config, training.RECIPES / planned.recipe, planned.changes)
        assert (
            parse(Config, saved.config, planned.name) == config
        )  # later options have their defaults
        assert saved.step == config.train.steps


def test_the_accuracies_that_are_told_are_true(models):
    for model in models.digits:
        if model.mixer != "rotary":
            continue
        data = load_digits()
        images = place(data.test, 28, torch.full((len(data.test), 2), 10))
        with torch.inference_mode():
            found = model.model(images * 2 - 1).argmax(-1)
        share = (found == data.test_labels).float().mean().item()
        assert share == pytest.approx(model.metrics["test_accuracy_centred"], abs=0.004)


def test_all_places_are_as_each(models):
    model, digit = models.digits[-1], load_digits().test[3]
    places = torch.tensor([[0, 0], [5, 20], [20, 20]])
    found = model.answers(digit, places).tolist()
    each = [int(np.argmax(model.answer(digit, *at).probabilities)) for at in places.tolist()]
    assert found == each


def test_text(models):
    model = models.text[-1]
    answer = model.answer("This PEP proposes to add")
    assert [answer.tokens[i].start for i in (0, -1)] == [0, len("This PEP proposes to")]
    assert "".join(t.text for t in answer.tokens) == "This PEP proposes to add"
    shares = [p for _, p in answer.top]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 10
    assert shares[0] == pytest.approx(answer.probabilities.max().item())
    assert model.answer("") is None
    likeliest = int(answer.probabilities.argmax())
    longer = model.continued("This PEP proposes to add", likeliest)
    assert longer == "This PEP proposes to add" + answer.top[0][0]


def test_a_long_prompt_is_cut_to_the_context(models):
    for model in models.text:
        assert len(model.answer("word " * 500).tokens) == model.model.config.context

    for prompt, unread in (("word " * 500, True), ("word", False)):
        answer = models.text[0].answer(prompt)
        assert bool(answer.unread) == unread
        told = f"Only the last {len(answer.tokens)} of {len(answer.tokens) + answer.unread} tokens"
        assert (told in text_card(models.text[0], answer, Look(), None)) == unread


def test_bytes_of_a_character_are_told_as_such(models):
    for model in models.text:
        for text in ("é☃", "\xa0\x80 \U0001f600"):
            names = [model.text(token) for token in model.tokenizer.encode(text).ids]
            values = re.findall("⟨([0-9A-F]{2})⟩", "".join(names))
            assert bytes.fromhex("".join(values)) == text.replace(" ", "").encode()


def test_without_models_one_line_says_what_to_do(tmp_path, monkeypatch):
    """As installed by pip, where the package has no trained models."""
    monkeypatch.setattr("translution.apps.demo.models.__file__", str(tmp_path / "a/b/c/d/e.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"RUN: got none, .* --only digits' ") as raised:
        open_models()
    assert "\n" not in str(raised.value)
    (tmp_path / "demo-weights").mkdir()
    (tmp_path / "demo-weights" / "text-rotary").symlink_to(OWN.absolute() / "text-rotary")
    assert [m.mixer for m in open_models().text] == ["rotary"]
    assert [m.mixer for m in open_models([tmp_path / "demo-weights"]).text] == ["rotary"]


# -- runs of the user's --------------------------------------------------------------------------


def checkpoint(folder, data, name="vit", **options):
    """A checkpoint's folder, of a model with fresh weights."""
    folder.mkdir()
    model = create_model(name, **options)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / WEIGHTS)
    config = {"model": {"name": name, **options}, "data": data, "train": {"steps": 1}}
    about = {"format": "translution-checkpoint-1", "model": {"name": name, "options": options},
             "config": config, "classes": None, "step": 1, "metrics": {}}  # fmt: skip
    (folder / CHECKPOINT).write_text(json.dumps(about))
    return folder


def test_the_patch_at_a_pixel(models):
    fine = models.digits[0]
    assert [fine.patch_at(*at) for at in ((0, 0), (3.5, 4), (27.5, 0.5), (14, 14))] == [
        0,
        1,
        42,
        24,
    ]


def test_a_model_without_patches(tmp_path):
    data = {"kind": "images", "format": "digits", "canvas": 32}
    options = {"dim": 8, "num_classes": 10, "in_channels": 1}
    run = checkpoint(tmp_path / "plain", data, "resnet26", **options)
    (model,) = open_models([run]).digits
    assert (model.name, model.patch, model.patch_at(9, 9)) == ("plain (resnet26)", 0, 0)
    answer = model.answer(load_digits().test[0], 0, 24)
    image = np.zeros((32, 32), np.uint8)
    text = digit_card(model, answer, image, (0, 24), 1, Look(), Tally(25), None)
    assert "no attention to show" in text


SMALL = {"in_channels": 1, "num_classes": 10, "dim": 8, "depth": 1, "heads": 2}


def test_the_preprocessing_is_the_models(tmp_path):
    """What is saved with the model decides, not the options of the data."""
    data = {"kind": "images", "format": "digits", "canvas": 20, "moved": True}
    run = checkpoint(tmp_path / "mine", data, image_size=20, patch_size=5, **SMALL)
    (derived,) = open_models([run]).digits
    saved = replace(derived.preprocessing, mean=(0.1,), std=(0.3,))
    about = json.loads((run / CHECKPOINT).read_text()) | {"preprocessing": saved.entry()}
    (run / CHECKPOINT).write_text(json.dumps(about))
    (found,) = open_models([run]).digits
    assert found.preprocessing == saved
    digit, places = load_digits().test[0], torch.tensor([[6, 6]])
    x = normalised(255 * place(digit[None], 20, places), saved)
    with torch.no_grad():
        want = found.model(x)[0].softmax(0)
    assert torch.tensor(found.answer(digit, 6, 6).probabilities).allclose(want, atol=1e-5)


def test_a_run_of_ones_own(tmp_path):
    data = {"kind": "images", "format": "digits", "canvas": 20, "moved": True}
    run = checkpoint(tmp_path / "mine", data, image_size=20, patch_size=5, mixer="alpha", **SMALL)
    (model,) = open_models([run]).digits
    assert (model.name, model.canvas, model.patch) == ("mine (α-Translution)", 20, 5)
    assert len(model.answer(load_digits().test[0], 12, 0).probabilities) == 10


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"kind": "images", "format": "folder", "train": "images", "image_size": 8},
            "'vit' on 'folder'",
        ),
        ({"kind": "images", "format": "digits", "channels": 3}, "'vit' on 'digits'"),
        ({"kind": "text", "train": ["a"], "context": 8}, "'vit' on 'files'"),
    ],
)
def test_a_run_of_another_kind(tmp_path, data, said):
    run = checkpoint(tmp_path / "other", data, image_size=8, patch_size=4, **SMALL)
    with pytest.raises(ValueError, match=f"run: .*other is {said}, want one on scikit-learn's"):
        open_models([run])


def test_a_run_whose_description_is_broken(tmp_path):
    data = {"kind": "images", "format": "digits", "canvas": 3}
    run = checkpoint(tmp_path / "broken", data, image_size=8, patch_size=4, **SMALL)
    with pytest.raises(ValueError, match="broken: data") as raised:
        open_models([run])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--port=0"], "nowhere is not a folder"),
        (["--host=nowhere.invalid"], "host: got 'nowhere.invalid', want an address"),
        (["--host=192.0.2.7", "--port=0"], "host: got '192.0.2.7', want an address of this"),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["translution", "demo", "--no-open", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("host", "warned", "told", "seen_at"),
    [
        ("0.0.0.0", "0.0.0.0 can be reached from other machines", "<this machine>", "localhost"),
        ("127.0.0.1", "", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_other_addresses_are_warned_of(monkeypatch, capsys, host, warned, told, seen_at):
    opened, served = [], []
    monkeypatch.setattr(server, "open_in_browser", opened.append)
    monkeypatch.setattr(server, "serve", lambda *given: served.append(given) or given[2]())
    monkeypatch.setattr("sys.argv", ["translution", "demo", "--port=0", f"--host={host}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 0
    assert len(served[0][0].digits) == 9
    port = served[0][1].getsockname()[1] if served[0][1].fileno() >= 0 else opened[0].split(":")[2]
    assert opened == [f"http://{seen_at}:{port}"]
    starting, running = said.out.splitlines()
    assert starting == "translution demo: starting"
    assert running == f"translution demo: http://{told}:{port} (Ctrl-C ends it)"
    assert len(said.err.splitlines()) == bool(warned)
    assert warned in said.err


def test_listening():
    with listen("127.0.0.1", 0) as one:
        assert is_loopback(one)
        port = one.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: cannot listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as every:
        assert not is_loopback(every)
    if socket.has_ipv6:
        try:
            six = listen("::1", 0)
        except ValueError:  # this machine has none
            return
        with six:
            assert is_loopback(six)


# -- cards ---------------------------------------------------------------------------------------


def card(models, mixer="translution", look=Look(), label=3, **more):  # noqa: B008
    model = next(m for m in models.digits if m.mixer == mixer)
    digit = load_digits().test[0]
    image = (place(digit[None], 28, torch.tensor([[4, 9]]))[0, 0] * 255).byte().numpy()
    answer = model.answer(digit, 4, 9)
    session = more.pop("session", Tally(21))
    return digit_card(model, answer, image, (4, 9), label, look, session, more.pop("every", None))


def test_a_card_tells_what_the_picture_shows(models):
    text = card(models, look=Look(1, 0, 17))
    assert "Attention weights of layer 2, head 1: patch (3, 4) attends most to patch" in text
    assert text.count("<tr") == 10
    assert 'data-look="17"' in text
    assert "this session: none yet" in text


def test_every_number_of_a_card_has_a_name(models):
    metrics = {"test_accuracy_moved": 0.5, "valid_perplexity": 44.2782}
    digit, text = (replace(m, metrics=metrics) for m in (models.digits[0], models.text[0]))
    answer = text.answer("a b")
    cards = [card(Models([digit], []), every=Tally(21)), text_card(text, answer, Look(), None)]
    for model, one in zip((digit, text), cards, strict=True):
        said = " ".join(re.sub(r"<[^>]*>", " ", one).split())
        assert re.search(r"with probability \d+\.\d %", said)
        assert re.search(r"attends most to .*, with a weight of \d+\.\d %", said)
        count = sum(p.numel() for p in model.model.parameters())
        assert f"The model has {count:,} parameters." in said
        assert "on the same digits at random positions: 50.0 %." in said
        assert "Perplexity per token on the validation text: 44.28." in said
        assert re.search(r"Probability of (each digit|the likeliest next tokens), % \S+ \d", said)
    assert cards[1].count("attention weight") == 2 * len(answer.tokens)  # title and name


def test_the_last_layer_answers_for_the_class_token(models):
    assert "class token (the only query of this layer) attends most to" in card(
        models, look=Look(2)
    )


def test_layers_and_heads_that_are_not_there(models):
    assert "has no layer 9, mean of heads" in card(models, look=Look(8))
    assert "has no layer 1, head 5" in card(models, look=Look(0, 4))
    assert "whatever they show" in card(models, "convolution")


def test_without_a_label_nothing_is_right_or_wrong(models):
    assert "verdict" not in card(models, label=None)
    assert "verdict" in card(models)


def test_a_tally():
    tally = Tally(21)
    tally.add(0, 20, True)
    tally.add(0, 20, False)
    tally.add(3, 3, True)
    assert str(tally) == "2 of 3 right (67 %)"
    assert tally.all[0, 20] == 2
    assert tally.right[0, 20] == 1


def test_text_cards_escape_what_was_typed(models):
    model = models.text[0]
    text = text_card(model, model.answer('<b onclick="x">&amp;'), Look(), None)
    assert "<b" not in re.sub(r"<button", "", text).replace("<body", "")
    assert "onclick=&quot;" not in text or '"x"' not in text
    assert "Type something" in text_card(model, None, Look(), None)


def test_the_token_that_asks(models):
    model = models.text[0]
    answer = model.answer("def f(x):")
    pressed = [
        re.findall(r'data-start="(\d+)" aria-pressed="true"', text_card(model, answer, Look(), at))
        for at in (None, 0, answer.tokens[1].start)
    ]
    starts = [str(token.start) for token in answer.tokens]
    assert pressed == [[starts[-1]], [starts[0]], [starts[1]]]


def test_what_cannot_be_seen_is_made_visible():
    assert visible(" a\n\tb") == "␣a⏎⇥b"
    assert visible("") == "∅"


# -- beside the event loop -----------------------------------------------------------------------


def test_the_newest_request_is_next():
    begun, go_on, worked, done = threading.Event(), threading.Event(), [], []

    def work(request):
        worked.append(request)
        begun.set()
        assert go_on.wait(10)
        if request == "bad":
            raise ValueError("bad")
        return request * 2

    async def main():
        newest = Newest(work, lambda request, answer: done.append((request, answer)), done.append)
        newest.ask("a")
        await asyncio.to_thread(begun.wait, 10)  # the loop is free meanwhile
        for request in ("b", "c", "bad"):
            newest.ask(request)
        go_on.set()
        await newest._task
        newest.ask("d")
        await newest._task

    asyncio.run(main())
    assert worked == ["a", "bad", "d"]
    assert (done[0], str(done[1]), done[2]) == (("a", "aa"), "bad", ("d", "dd"))


# -- how they were trained -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-centred-rotary", "text-attention"])
def test_a_model_is_made_to_ship(tmp_path, name):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"PEP: {i}\nTitle: {i * i}\nAnd so on.\n" * 3 for i in range(300)))
    planned = next(p for p in training.PLAN if p.name == name)
    out = tmp_path / "out"
    out.mkdir()
    steps = ["train.steps=2", "train.batch_size=4", "train.validate_batches=1"]
    metrics = training.make(planned, out, [str(text)], *steps)
    assert read_description(out / name).metrics == metrics
    assert str(tmp_path) not in (out / name / CHECKPOINT).read_text()
    (model,) = [m for kind in open_models([out / name]) for m in kind]
    assert model.metrics == metrics
    assert next(model.model.parameters()).dtype == torch.float32  # in the file they are halves


def test_the_documents_tell_the_measures_of_what_ships():
    text = DOCS.read_text("utf-8")
    for planned in training.PLAN:
        metrics = read_description(OWN / planned.name).metrics
        (model,) = [m for kind in open_models([OWN / planned.name]) for m in kind]
        count = sum(p.numel() for p in model.model.parameters())
        if planned.name.startswith("digits"):
            shares = [metrics[f"test_accuracy_{where}"] for where in ("centred", "moved")]
            told = " | ".join(f"{100 * share:.1f}" for share in shares)
        else:
            told = f"{metrics['valid_perplexity']:.1f}"
        (line,) = [line for line in text.splitlines() if f"`{planned.name}`" in line]
        assert f"| {count:,} | {told} |" in line
