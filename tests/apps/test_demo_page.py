"""The demo's page in a real browser, Debian's chromium."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("nicegui")
pytest.importorskip("lightning")
pytest.importorskip("playwright.sync_api")
from PIL import Image
from playwright import sync_api

from translution.apps import cli
from translution.apps.data.digits import load_digits

expect = sync_api.expect
expect.set_options(timeout=20_000)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
CARDS = "article.card:visible"
STRANGER = "stranger.example"  # a name that somebody else lets stand for this machine


def command(*arguments):
    code = "from translution.apps.cli import main; main()"
    return [sys.executable, "-c", code, "demo", "--no-open", *arguments]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser with one profile for all tests: it loads and compiles scripts only once."""
    if CHROMIUM is None:
        reason = "no chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        args = ["--no-sandbox", f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1"]
        started = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=args
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(browser):
    """The address of the command as a user starts it; it ends well when it is told to."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("--port=0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
        # where the tests run in the background, Ctrl-C is ignored unless it is asked for
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "translution demo: starting\n"
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + process.stderr.read()
        yield found[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors == ""


@pytest.fixture
def window(browser, server):
    """Opens windows; what a page complains of is an error of the test."""
    opened, complaints = [], []

    def open_window(width=1280, height=720, **media):
        page = browser.new_page()
        opened.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(**media)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if _foreign(r.url, server) else None)
        page.goto(server)
        expect(page.locator("[data-said]").first).to_be_visible()
        return page

    yield open_window
    for page in opened:
        page.close()
    assert complaints == []


@pytest.fixture
def page(window):
    return window()


def _foreign(url, server):
    return not url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))


def status(page, name="answers"):
    return page.locator(f'[data-name="{name}"]')


def pad(page):
    return page.get_by_role("application", name="Canvas with the digit")


def option(page, label, name):
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=name, exact=True).click()


def strokes(page, *lines):
    """Draw lines of (x, y) from 0 to 1 into the square."""
    square = page.get_by_role("img", name="Square to draw")
    square.scroll_into_view_if_needed()
    box = square.bounding_box()
    for line in lines:
        for i, (x, y) in enumerate(line):
            at = box["x"] + x * box["width"], box["y"] + y * box["height"]
            page.mouse.move(*at)
            if i == 0:
                page.mouse.down()
        page.mouse.up()


def test_a_test_digit_is_answered_by_all_mixers(page):
    expect(page.locator(CARDS)).to_have_count(6)
    expect(page.locator("[data-said]:visible")).to_have_count(6)
    told = r"test image 0 \(a 7\), upper left pixel at row 11, column 11: \d of 6 models are right."
    expect(status(page)).to_have_text(re.compile(told + r" Patch \(4, 4\) is chosen."))
    expect(page.locator(f"{CARDS} .bars tr")).to_have_count(60)
    number = page.get_by_role("spinbutton", name="Test image, 0 to 359")
    number.fill("7")
    number.press("Enter")
    label = int(load_digits().test_labels[7])
    expect(status(page)).to_contain_text(f"test image 7 (a {label}), upper left")
    expect(page.get_by_role("combobox", name="The digit is a")).to_have_value(str(label))
    expect(page.locator(".verdict:visible")).to_have_count(6)


def test_a_number_of_no_test_image_is_told(page):
    field = page.get_by_role("spinbutton", name="Test image")
    for number in ("360", "-1", "3.5"):
        field.fill(number)
        told = f"Test image: got {number}, want a whole number from 0 to 359; this is still the"
        problem = page.get_by_role("alert").filter(has_text=told)
        expect(problem).to_be_visible()
        field.press("Tab")
        expect(field).to_have_value("0")
        expect(problem).to_be_visible()
    page.get_by_role("button", name="Any").click()
    expect(problem).to_have_count(0)
    expect(field).not_to_have_value("0")


def test_it_is_told_where_a_digit_comes_to_rest(page):
    expect(status(page)).to_contain_text("row 11, column 11")
    page.evaluate("""() => {
      window.seen = [];
      const line = document.querySelector('[data-name="answers"]');
      const all = { childList: true, characterData: true, subtree: true };
      new MutationObserver(() => window.seen.push(line.textContent)).observe(line, all);
    }""")
    for _ in range(6):
        pad(page).press("ArrowLeft")
    expect(status(page)).to_contain_text("row 11, column 5")
    assert len(page.evaluate("window.seen")) <= 2


def test_keys_move_the_digit_and_choose_the_patch(page):
    pad(page).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    expect(status(page)).to_contain_text("row 10, column 13")
    for key in ("Shift+ArrowLeft", "Shift+ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator('.look[data-look="30"]')).to_have_count(5)
    expect(status(page)).to_contain_text("Patch (5, 3) is chosen")
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    expect(status(page)).to_contain_text("row 10, column 21")  # the border
    page.get_by_role("button", name="Centre").click()
    expect(status(page)).to_contain_text("row 11, column 11")


def test_the_pointer_drags_the_digit_and_chooses_the_patch(page):
    box = pad(page).locator("canvas").bounding_box()
    each = box["width"] / 28

    def at(row, column):
        return box["x"] + column * each, box["y"] + row * each

    page.mouse.move(*at(14, 14))
    page.mouse.down()
    page.mouse.move(*at(10, 9), steps=4)
    page.mouse.move(*at(5, 8), steps=4)
    page.mouse.up()
    expect(status(page)).to_contain_text("row 2, column 5")
    page.mouse.move(*at(27, 27))
    expect(page.locator('.look[data-look="48"]')).to_have_count(5)
    expect(status(page)).to_contain_text("row 2, column 5")  # let go


def test_drawing(page):
    strokes(page, [(0.5, 0.2), (0.5, 0.5), (0.5, 0.8)])
    expect(status(page)).to_contain_text("drawn digit, upper left pixel at row 11")
    expect(page.locator(".verdict:visible")).to_have_count(0)  # nobody knows what it is
    page.get_by_role("button", name="All positions").click()
    told = page.get_by_role("alert").filter(has_text="All positions: first choose which")
    expect(told).to_be_visible()
    option(page, "The digit is a", "1")
    expect(page.locator(".verdict:visible")).to_have_count(6)
    page.get_by_role("button", name="Clear").click()
    expect(status(page)).to_contain_text("test image 0 (a 7)")
    assert inked(page) == 0
    strokes(page, [(0.2, 0.2), (0.8, 0.2), (0.4, 0.8)])
    expect(page.locator(".verdict:visible")).to_have_count(0)
    number = page.get_by_role("spinbutton", name="Test image")
    expect(number).to_have_value("")
    number.fill("0")
    expect(page.locator(".verdict:visible")).to_have_count(6)
    expect(status(page)).to_contain_text("test image 0")
    assert inked(page) == 0


def test_what_is_drawn_outside_leaves_no_ink(page):
    strokes(page, [(0.5, 0.5), (0.6, 0.5), (1.5, 0.5), (1.5, 1.5), (0.5, 1.5), (0.5, 0.6)])
    expect(status(page)).to_contain_text("drawn digit")
    assert 0 < inked(page) < 0.06


def inked(page):
    """The share of the sketch's pixels that are light."""
    return page.get_by_role("img", name="Square to draw").evaluate("""(canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return data.filter((v, i) => i % 4 === 0 && v > 127).length / (data.length / 4);
    }""")


def test_models_layers_and_heads_are_chosen(page):
    page.get_by_role("radio", name="centred digits").click()
    expect(page.locator(CARDS)).to_have_count(3)
    expect(page.locator("[data-said]:visible")).to_have_count(3)
    page.get_by_role("checkbox", name="Translution", exact=True).click()
    expect(page.locator(CARDS)).to_have_count(2)
    page.get_by_role("radio", name="digits anywhere").click()
    expect(page.locator("[data-said]:visible")).to_have_count(6)
    option(page, "Layer", "layer 2")
    option(page, "Head", "head 2")
    caption = page.get_by_role("article", name="Translution", exact=True).locator(".look")
    expect(caption).to_contain_text("layer 2, head 2: patch (4, 4) attends most to patch")
    option(page, "Layer", "layer 3 (query: class token only)")
    expect(caption).to_contain_text("class token (the only query of this layer)")
    convolution = page.get_by_role("article", name="convolution 3×3").locator(".look")
    expect(convolution).to_contain_text("A convolution has no attention weights")
    for name in page.get_by_role("checkbox").all():
        name.click()
    expect(page.locator(CARDS)).to_have_count(0)
    expect(status(page)).to_contain_text("No mixer is chosen.")


def test_answers_by_place(page):
    for name in ("convolution 3×3", "ACmix", "α-Translution", "Translution"):
        page.get_by_role("checkbox", name=name, exact=True).click()
    expect(page.locator(CARDS)).to_have_count(2)
    rotary = page.get_by_role("article", name="attention, rotary positions")
    expect(rotary).to_contain_text("this session: 1 of 1 right (100 %)")
    page.get_by_role("button", name="All positions").click()
    told = "Right predictions for test image 0 at all 441 positions: attention, learned positions"
    expect(status(page)).to_contain_text(told)
    expect(rotary.get_by_role("img", name="this digit at all positions")).to_be_visible()
    expect(rotary).to_contain_text(re.compile(r"all positions: \d+ of 441 right"))
    pad(page).press("ArrowUp")
    expect(rotary).to_contain_text(re.compile(r"this session: \d of 2 right"))
    page.get_by_role("button", name="Any").click()
    expect(rotary).not_to_contain_text("all positions")  # these were of the digit before
    page.get_by_role("button", name="Forget answers").click()
    expect(rotary).to_contain_text("this session: none yet")


def test_reloading_begins_anew(page):
    pad(page).press("ArrowUp")
    expect(status(page)).to_contain_text("row 10, column 11")
    page.reload()
    expect(status(page)).to_contain_text("row 11, column 11")
    pad(page).press("ArrowDown")
    expect(status(page)).to_contain_text("row 12, column 11")


def test_two_windows_are_independent(window):
    one, other = window(), window()
    pad(one).press("ArrowUp")
    pad(other).press("ArrowDown")
    one.get_by_role("radio", name="centred digits").click()
    expect(status(one)).to_contain_text("row 10, column 11")
    expect(status(other)).to_contain_text("row 12, column 11")
    expect(one.locator(CARDS)).to_have_count(3)
    expect(other.locator(CARDS)).to_have_count(6)


def upload(page, name, content):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def test_uploads(window):
    page = window(height=900)
    problem = page.locator('[role=alert]:below(:text("Upload an image"), 20)').first
    upload(page, "words.png", b"no image at all")
    expect(problem).to_have_text(re.compile("^words.png: not an image of a known format"))
    box = problem.bounding_box()
    assert page.evaluate("scrollY") == 0
    assert box["y"] + box["height"] <= 900
    upload(page, "large.png", b"0" * (5 * 2**20 + 1))
    expect(problem).to_contain_text("The file is refused: want an image of at most 5,242,880 bytes")
    file = io.BytesIO()
    Image.new("L", (5000, 5000)).save(file, "PNG")
    upload(page, "wide.png", file.getvalue())
    expect(problem).to_contain_text("wide.png: it has 5000×5000 pixels, want at most 16,000,000")
    expect(status(page)).to_contain_text("test image 0")  # still there
    ink, file = np.full((90, 60), 255, np.uint8), io.BytesIO()
    ink[10:80, 25:35] = 0
    Image.fromarray(ink).save(file, "PNG")
    upload(page, "<b>one.png", file.getvalue())
    expect(status(page)).to_contain_text("uploaded <b>one.png, upper left pixel at row 11")
    expect(problem).to_have_text("")


def test_text(page):
    page.get_by_role("tab", name="Text").click()
    cards = page.locator(CARDS)
    expect(cards).to_have_count(4)
    expect(cards.first.locator(".bars tr")).to_have_count(10)
    prompt = page.get_by_role("textbox", name="Prompt")
    prompt.fill("")
    expect(cards.first).to_contain_text("Type something.")
    expect(status(page, "tokens")).to_have_text("Type something.")
    page.get_by_role("button", name="Append likeliest").click()
    expect(page.get_by_role("alert").last).to_have_text("Append: want a prompt with a token.")
    prompt.fill("import sys<img src=x>")
    expect(cards.first.get_by_role("group", name="Tokens of the prompt")).to_contain_text("sys")
    tokens = cards.first.locator(".tokens button")
    expect(tokens.last).to_have_attribute("aria-pressed", "true")
    tokens.first.click()
    expect(tokens.first).to_be_focused()
    expect(tokens.first).to_have_attribute("aria-pressed", "true")
    expect(cards.last.locator(".tokens button").first).to_have_attribute("aria-pressed", "true")
    expect(cards.first).to_contain_text("'imp' attends most to 'imp', with a weight of 100.0")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")
    expect(tokens.nth(1)).to_be_focused()
    option(page, "Layer", "layer 2")
    expect(cards.first).to_contain_text("layer 2")
    option(page, "Model that writes", "Translution")
    likeliest = cards.first.locator(".bars th").first.inner_text()
    page.get_by_role("button", name="Append likeliest").click()
    expect(prompt).not_to_have_value("import sys<img src=x>")
    added = prompt.input_value().removeprefix("import sys<img src=x>")
    assert added.replace(" ", "␣").replace("\n", "⏎") == likeliest
    before = prompt.input_value()
    page.get_by_role("button", name="Append sampled").click()
    expect(prompt).not_to_have_value(before)
    assert prompt.input_value().startswith(before)


def test_only_a_mixer_that_is_chosen_writes(page):
    page.get_by_role("tab", name="Text").click()
    writer = page.get_by_role("combobox", name="Model that writes")
    boxes = page.get_by_role("region", name="Text").get_by_role("checkbox")
    expect(writer).to_have_value("Translution")
    boxes.first.click()
    expect(writer).to_have_value("α-Translution")
    for box in boxes.all()[1:]:
        box.click()
    expect(status(page, "tokens")).to_have_text("No mixer is chosen.")
    page.get_by_role("button", name="Append likeliest").click()
    expect(page.get_by_role("alert").last).to_have_text("Append: No mixer is chosen.")
    boxes.last.click()
    expect(writer).to_have_value("attention, rotary positions")


# -- for everyone --------------------------------------------------------------------------------

# (Quasar lets nobody name a tab's panel; in each lies a region with a name)
NAMED = {
    "button", "checkbox", "radio", "radiogroup", "combobox", "spinbutton", "textbox", "tab", "img",
    "application", "article", "image", "group", "table", "tablist", "region",
}  # fmt: skip


def nameless(page):
    """Elements of the accessibility tree that do something and have no name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = [n for n in nodes if not n["ignored"] and n.get("role", {}).get("value") in NAMED]
    assert len(found) > 40
    without = [n for n in found if not n.get("name", {}).get("value", "").strip()]
    return [(n["role"]["value"], n.get("properties")) for n in without]


def test_everything_has_a_name(page):
    assert nameless(page) == []
    page.get_by_role("tab", name="Text").click()
    expect(page.locator(".tokens button").first).to_be_visible()
    assert nameless(page) == []
    assert page.locator("html").get_attribute("lang") == "en-US"


def test_all_controls_are_reached_with_the_tab_key(page):
    """In the order that they are read in."""
    wanted = [
        "Digits",
        "digits anywhere",
        "Translution",
        "Layer",
        "Canvas",
        "Any",
        "Centre",
        "Clear",
        "Upload",
        "Test image",
        "The digit is a",
        "All positions",
        "Forget",
    ]
    told = """() => { const e = document.activeElement;
        return e.getAttribute("aria-label") || e.labels?.[0]?.innerText || e.innerText
            || e.closest("label")?.innerText || ""; }"""
    names = []
    for _ in range(24):
        page.keyboard.press("Tab")
        names.append(page.evaluate(told))
    at = [next((i for i, n in enumerate(names) if want in n), -1) for want in wanted]
    assert -1 not in at, (wanted, names)
    assert at == sorted(at), names


def colour(page, scheme):
    """Let the page be light or dark, and wait for its transitions to end."""
    page.emulate_media(color_scheme=scheme)
    page.evaluate("""async () => {
      await new Promise(requestAnimationFrame);
      await Promise.allSettled(document.getAnimations().map((one) => one.finished));
    }""")


def test_a_phone(window):
    page = window(width=360, height=640)
    for tab, squares in (("Digits", 2), ("Text", 0)):
        page.get_by_role("tab", name=tab).click()
        said = page.locator(".said:visible")
        expect(said).to_have_count(6 if tab == "Digits" else 4)
        seen = [e.bounding_box() for e in [*said.all(), *page.locator("canvas:visible").all()]]
        assert len(seen) == said.count() + squares
        assert all(box["y"] + box["height"] <= 640 for box in seen), seen  # without scrolling
        for card in page.locator(f"{CARDS} summary").all():
            card.click()
        expect(page.locator(f"{CARDS} .facts").last).to_be_visible()
        for width in (390, 360):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(SMALL) == []
        for scheme in ("light", "dark"):
            colour(page, scheme)
            assert page.evaluate(CONTRAST) == []
        page.set_viewport_size({"width": 360, "height": 640})


# controls of less than 44 pixels a side, and their sizes
SMALL = """() => {
  const controls = "button, summary, canvas, .q-tab, .q-checkbox, .q-radio, .q-field, .pad";
  return [...document.querySelectorAll(controls)].flatMap((e) => {
    const { width, height } = (e.closest(".q-field") || e).getBoundingClientRect();
    const seen = e.checkVisibility() && !e.closest(".q-uploader");
    return seen && Math.min(width, height) < 43.9 ? [`${e.className} ${width}×${height}`] : [];
  });
}"""


def test_fingers_drag_and_draw(window):
    page = window(width=390, height=844)
    session = page.context.new_cdp_session(page)

    def touch(canvas, *points):
        """One finger goes along points (x, y) from 0 to 1, while another one rests in a corner."""
        box = canvas.bounding_box()

        def at(finger, x, y):
            return {
                "x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": finger,
            }  # fmt: skip

        first, rest = [at(0, *point) for point in points], at(1, 0.05, 0.05)
        steps = [("touchStart", first[:1]), ("touchStart", [first[0], rest])]
        steps += [("touchMove", [one, rest]) for one in first[1:]] + [("touchEnd", [])]
        for kind, fingers in steps:
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch(pad(page).locator("canvas"), (0.5, 0.5), (0.6, 0.6), (20 / 28, 20 / 28))
    expect(status(page)).to_contain_text("row 17, column 17")
    touch(page.get_by_role("img", name="Square to draw"), (0.5, 0.2), (0.5, 0.5), (0.5, 0.8))
    expect(status(page)).to_contain_text("drawn digit")
    expect(page.locator("[data-said]:visible").first).to_have_text("1")
    assert 0 < inked(page) < 0.1  # a line, and none to the other finger
    assert page.evaluate("scrollY") == 0


def test_the_focus_is_seen_on_every_control(window):
    page = window()
    seen, faint = set(), []
    for tab, cards in (("Digits", 6), ("Text", 4)):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(".facts:visible")).to_have_count(cards)
        page.keyboard.press("Tab")  # what is focused after a key has a ring
        for scheme in ("light", "dark"):
            colour(page, scheme)
            for kind, problem in page.evaluate(RINGS):
                seen.add(kind)
                faint += [(scheme, kind, problem)] if problem else []
    assert faint == []
    assert seen >= {"q-tab", "q-radio", "q-checkbox", "q-field", "q-btn", "pad", "token", "SUMMARY"}


# every control as it has the focus, and what is wrong with its ring
RINGS = r"""() => {
 const ring = (e) => {
  const ringed = e.closest(".q-field") || e;
  const kind = ["q-tab", "q-radio", "q-checkbox", "q-field", "q-btn", "pad"].find(
    (name) => ringed.classList.contains(name)) || (e.dataset.start ? "token" : e.tagName);
  const style = getComputedStyle(ringed);
  const width = parseFloat(style.outlineWidth), out = parseFloat(style.outlineOffset) + width;
  if (style.outlineStyle !== "solid" || width < 3) return [kind, `no ring: ${style.outline}`];
  const light = (text) => {
    const [r, g, b] = text.match(/[\d.]+/g).map(Number).map(
      (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const both = [style.outlineColor, getComputedStyle(document.body).backgroundColor].map(light);
  const contrast = (Math.max(...both) + .05) / (Math.min(...both) + .05);
  if (contrast < 3) return [kind, `contrast ${contrast}`];
  const box = ringed.getBoundingClientRect();
  for (let p = ringed.parentElement; p !== document.body; p = p.parentElement) {
    if (getComputedStyle(p).overflow === "visible") continue;
    const around = p.getBoundingClientRect();
    if (box.left - out < around.left - .5 || box.right + out > around.right + .5 ||
        box.top - out < around.top - .5 || box.bottom + out > around.bottom + .5)
      return [kind, `clipped by ${p.className}`];
  }
  return [kind, ""];
 };
 const controls = ".q-tab, [tabindex='0'], button, input, textarea, summary";
 return [...document.querySelectorAll(controls)].filter((e) => {
   e.focus();
   return document.activeElement === e && e.checkVisibility();
 }).map((e) => { e.focus(); return ring(e); });
}"""


def test_who_wants_little_motion_gets_none(window):
    page = window(reduced_motion="reduce")
    moving = """() => [...document.querySelectorAll("*")].filter((e) => {
      const style = getComputedStyle(e);
      return Math.max(...`${style.transitionDuration}, ${style.animationDuration}`.split(",")
        .map(parseFloat)) > .001; }).map((e) => e.className)"""
    assert page.evaluate(moving) == []
    page.get_by_role("tab", name="Text").click()
    expect(page.locator(CARDS)).to_have_count(4)
    option(page, "Layer", "layer 2")


def test_a_thing_has_one_colour(page):
    border = page.locator(".swatch.chosen").evaluate("(e) => getComputedStyle(e).borderColor")
    stroke = page.locator(".asks").first.evaluate("(e) => getComputedStyle(e).stroke")
    assert border == stroke
    pixels = (
        pad(page)
        .locator("canvas")
        .evaluate("""(canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const found = new Set();
      for (let i = 0; i < data.length; i += 4) found.add(`rgb(${data.slice(i, i + 3).join(", ")})`);
      return [...found];
    }""")
    )
    assert border in pixels
    filled = [page.locator(f".{name}").first for name in ("swatch.looks", "weights rect")]
    looks = filled[0].evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert looks == filled[1].evaluate("(e) => getComputedStyle(e).fill")
    assert page.locator(CARDS).first.get_by_role("heading").inner_text() == "Translution"


# texts whose contrast to what is behind them is below 4.5, and the contrast
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(
    (n, i) => n * (text.startsWith("color(srgb") && i < 3 ? 255 : 1));
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0.5) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg")) continue;
    const [one, other] = [parse(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light);
    const contrast = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
    if (contrast < 4.5) found.push(`${e.className} ${e.textContent}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""


# -- the server ----------------------------------------------------------------------------------


def test_pages_of_other_sites_are_refused(browser, server):
    """By another name of this machine, and in a browser that shows another site's page."""
    port, page = server.rpartition(":")[2], browser.new_page()
    assert page.goto(f"http://{STRANGER}:{port}").status == 403
    other = f"http://localhost:{port}"  # it is answered, and it is another site than 127.0.0.1
    assert page.goto(other).status == 200
    answers = []
    page.on("response", lambda response: answers.append((response.url, response.status)))
    assert page.evaluate(REACH, server) == ["no answer", "no socket"]
    page.close()
    assert answers == [(server + path, 403) for path in ("/?fetched", "/?framed", "/?drawn")]


# what a page can try to reach another server
REACH = """async (server) => {
  const fetched = await fetch(`${server}/?fetched`, { mode: "no-cors" }).then(
    async (reply) => await reply.text() || "no answer", () => "no answer");
  for (const [tag, path] of [["iframe", "framed"], ["img", "drawn"]]) {
    const element = document.createElement(tag);
    element.src = `${server}/?${path}`;
    const over = new Promise((go) => { element.onload = element.onerror = go; });
    document.body.append(element);
    await over;
  }
  const path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket";
  const socket = new WebSocket(server.replace("http", "ws") + path);
  const opened = await new Promise((go) => {
    [socket.onopen, socket.onerror] = [() => go("a socket"), () => go("no socket")];
  });
  return [fetched, opened];
}"""


def test_it_listens_on_loopback_alone(server):
    port = int(server.rpartition(":")[2])
    with open("/proc/net/tcp") as file, open("/proc/net/tcp6") as six:
        lines = [line.split() for line in [*file, *six]]
    at = [x[1] for x in lines if x[1].endswith(f":{port:04X}") and x[3] == "0A"]
    assert at == [f"0100007F:{port:04X}"]


def test_a_taken_port_is_one_clear_line(server, monkeypatch, capsys):
    port = server.rpartition(":")[2]
    monkeypatch.setattr("sys.argv", ["translution", "demo", "--no-open", f"--port={port}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"translution: port: cannot listen on 127.0.0.1, port {port}")
