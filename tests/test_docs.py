"""The documentation: its code runs, its commands exist, and its site is whole.

A page's Python blocks run in order, as one program, in an empty folder; a `text` block right below
one is what it prints. A block with a title is a file in that folder instead. A block under
`<!-- not run: why -->` is only compiled: the comment says what it needs that a test can't have.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import translution

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
REPOSITORY = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


class Block(NamedTuple):
    """A fenced block: its language, text, first line in the file, and why it is not run."""

    language: str
    file: str | None  # its title: the name of the file that it is
    text: str
    line: int
    not_run: str | None
    shown: str | None  # what it prints


FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<file>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$"
    r"(?:\n+```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(
            m["language"], m["file"], m["text"], text[: m.start("text")].count("\n"), m["why"],
            m["shown"],
        )
        for m in FENCE.finditer(text)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch, own_names):
    """Returns a function that goes to a folder with the files of a page."""
    files = []

    def enter(page: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        for block in blocks(page):
            if block.file:
                (tmp_path / block.file).write_text(block.text, "utf-8")
                files.append(block.file)

    yield enter
    for file in files:
        sys.modules.pop(Path(file).stem, None)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- code ------------------------------------------------------------------------------------------


CODE = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.mark.parametrize("page", CODE, ids=name)
def test_the_code_of_a_page_runs(page, folder):
    """(That of the README is run by test_project.py.)"""
    folder(page)
    scope = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python" or block.file:
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec")  # so errors name the line
        if block.not_run:
            assert block.shown is None, f"{page.name}, line {block.line}: not run, yet shows output"
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, scope)
        told = [line.rstrip() for line in out.getvalue().splitlines()]
        shown = [line.rstrip() for line in (block.shown or "").splitlines()]
        assert told == shown, f"{page.name}, line {block.line}: printed\n{out.getvalue()}"


@pytest.mark.parametrize("page", [p for p in CODE if any(b.file for b in blocks(p))], ids=name)
def test_the_code_of_a_page_runs_from_the_command_line(page, folder):
    """The commands of a page that has files of its own."""
    for needed in ("lightning", "typer", "sklearn", "matplotlib"):
        pytest.importorskip(needed)
    from test_first_run import command

    folder(page)
    for line, whole in commands(page):
        if whole:
            code, _, err = command(*shlex.split(line)[1:])
            assert code == 0, f"{line}: {err}"


def test_tutorials_run_whole():
    """In a tutorial everything is run; elsewhere what isn't says why."""
    for page in sorted((DOCS / "tutorials").glob("*.md")):
        assert any(b.language == "python" for b in blocks(page)), page
        assert not any(b.not_run for b in blocks(page)), page


# -- commands --------------------------------------------------------------------------------------

INLINE = re.compile(r"`((?:translution|python|make|pip|torchrun) [^`]*)`")


def commands(page: Path) -> list[tuple[str, bool]]:
    """Each command of a page, and whether it stands in a block (there it is whole)."""
    text = page.read_text("utf-8")
    found = []
    for block in blocks(page):
        if block.language in ("sh", "bash", "shell"):
            joined = block.text.replace("\\\n", " ")
            found += [(line, True) for line in joined.splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return found + [(" ".join(m[1].split()), False) for m in INLINE.finditer(prose)]


@pytest.mark.parametrize("page", [p for p in REPOSITORY if commands(p)], ids=name)
def test_the_commands_of_a_page_exist(page, folder):
    pytest.importorskip("typer")
    folder(page)
    for line, whole in commands(page):
        words = shlex.split(line, comments=True)
        if not words or "…" in line:
            continue
        try:
            check_command(words, whole)
        except Exception as error:
            raise AssertionError(f"{name(page)}: {line}: {error}") from error


def check_command(words: list[str], whole: bool) -> None:
    first, *rest = words
    if first == "translution":
        check_translution(rest, whole)
    elif first == "torchrun":
        check_translution(rest[rest.index("translution") + 1 :], whole)
    elif first == "python":
        check_program(rest, whole)
    elif first == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets, f"no target {rest[0]}"
    elif first == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert all(one in extras for group in wanted for one in group.split(",")), "no such extra"
    else:
        assert first in ("tensorboard", "git"), f"what is {first}?"


def check_program(words: list[str], whole: bool) -> None:
    """A script or module, and that it knows the options."""
    module = words[0] == "-m"
    program, *rest = words[1:] if module else words
    if program == "translution":
        return check_translution(rest, whole)
    if module:
        found = importlib.util.find_spec(program)
        assert found, f"no module {program}"
    path = Path(found.origin) if module else ROOT / program
    assert path.is_file(), f"no file {program}"
    text = path.read_text("utf-8")
    for word in rest:
        option = word.lstrip("-").partition("=")[0].replace("-", "_")
        known = re.search(rf"\b{option}\b", text.replace("-", "_"))
        assert not word.startswith("--") or known, f"no option {word}"


def check_translution(words: list[str], whole: bool) -> None:
    """The command line's own parser takes it, and the configuration takes what is left."""
    import typer

    from translution.apps import cli
    from translution.apps.config import load
    from translution.apps.training.config import Config

    group = typer.main.get_command(cli._app())
    if words and words[0].startswith("--"):
        assert words[0] in {"--help", *(name for param in group.params for name in param.opts)}
        return
    command = group.commands[words[0]] if words else group
    try:
        context = command.make_context(words[0] if words else "translution", list(words[1:]))
    except Exception as error:  # of click, which some versions of typer carry within
        if type(error).__name__ != "MissingParameter" or whole:
            raise
        return  # in prose a command may be named without its arguments
    if context.args and words[0] in ("train", "tokenize", "evaluate"):
        given = ROOT / words[1]
        recipes = [given] if given.is_file() else sorted((ROOT / "recipes").glob("*.yaml"))
        errors = []
        for recipe in recipes:
            try:
                load(Config, recipe, context.args)
                return
            except ValueError as error:
                errors.append(str(error))
        raise AssertionError(errors[0])


def test_a_wrong_command_is_found():
    pytest.importorskip("typer")
    wrong = [
        "translution predict FOLDER",  # images are missing
        "translution export runs/x --to onnx --outt x.onnx",
        "translution train recipes/tiny-digits.yaml --model.mixr=alpha",
        "translution trian recipes/tiny-digits.yaml",
        "python -m translution.apps.bench.decodin",
        "python -m translution.apps.bench.decoding --thread-count 2",
        "python docs/no.py",
        "make docz",
        "pip install '.[everything]'",
        "curl somewhere",
    ]
    for line in wrong:
        with pytest.raises(BaseException):  # noqa: B017, PT011 (whatever says no)
            check_command(shlex.split(line), True)


# -- links, in the files as a code host shows them -------------------------------------------------

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def links(page: Path) -> list[tuple[bool, str, str]]:
    """(whether it is a picture, its text, where to) of each link of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", lambda m: "x" * len(m[0]), text)
    return [(m[1] == "!", m[2], m[3]) for m in LINK.finditer(text)]


def headings(page: Path) -> set[str]:
    """Their anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", REPOSITORY, ids=name)
def test_links_between_files(page):
    for picture, told, target in links(page):
        where = urlsplit(target)
        if where.scheme:
            assert not picture, f"a picture from elsewhere: {target}"
            continue
        file = page if not where.path else (page.parent / unquote(where.path)).resolve()
        assert file.exists(), f"no file {target}"
        if page.is_relative_to(DOCS):  # the site has no others
            assert file.is_relative_to(DOCS), f"{target} is not on the site"
        if where.fragment and not where.fragment.startswith("translution."):
            assert where.fragment in headings(file), f"no heading {target}"
        assert not picture or len(told) > 10, f"{target} wants a text for those who can't see it"


def test_pictures_are_shown_or_linked():
    used = {Path(target).name for page in REPOSITORY for _, _, target in links(page)}
    assert {path.name for path in (DOCS / "images").glob("*.png")} <= used


# -- pictures --------------------------------------------------------------------------------------


def script(file: Path):
    found = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    figures = script(DOCS / "figures.py")
    for file, draw in figures.PICTURES.items():
        found = draw(tmp_path / file)
        assert is_png(tmp_path / file)
        assert (DOCS / "images" / file).is_file(), f"{file} was never drawn"
        assert found is None or max(found) < 1e-5, "the parents are not what they were"
    assert script(DOCS / "decomposition.py").draw(tmp_path / "decomposition.png") < 1e-5
    assert is_png(tmp_path / "decomposition.png")


# -- the reference ---------------------------------------------------------------------------------

MODULES = [
    "translution",
    *(f"translution.{part}" for part in ("functional", "modules", "models", "models.generation")),
    *(f"translution.interop.{part}" for part in ("conversion", "published", "export", "parallel")),
    "translution.apps.config",
    *(f"translution.apps.training.{part}" for part in ("config", "tasks", "run", "predict")),
    *(f"translution.apps.data.{part}" for part in ("images", "text", "digits")),
    "translution.layouts",
    "translution.interop.transformers",
]
NOT_SHOWN = {"functional", "Part"}  # a page of its own; a name for "train", "valid", "test"


def identifiers() -> dict[str, str]:
    """What the reference shows: name and the whole path."""
    text = "\n".join(page.read_text("utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", text, re.M)}


def exported(module: str) -> list[str]:
    """`__all__`, read without importing."""
    path = ROOT / "src" / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} has no __all__")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    assert set(exported(module)) - NOT_SHOWN <= set(identifiers())


def test_every_public_name_has_a_docstring():
    for one in translution.__all__:
        assert getattr(translution, one).__doc__, one


def test_the_index_of_the_reference_is_whole():
    text = (DOCS / "api" / "index.md").read_text("utf-8")
    assert set(translution.__all__) <= set(re.findall(r"`(\w+)`", text))


# -- the site --------------------------------------------------------------------------------------


class Found(HTMLParser):
    """What a page loads, where its links lead, its anchors, and pictures without a text."""

    LOADING = frozenset(
        {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload"}
    )

    def __init__(self, path: Path):
        super().__init__()
        self.loaded, self.links, self.ids, self.silent = [], [], set(), []
        self.classes = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = {key: value or "" for key, value in attributes}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        self.classes |= set(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and set(given.get("rel", "").split()) & self.LOADING:
            self.loaded.append(given["href"])
        elif tag != "a":
            self.loaded += [
                given[key] for key in ("src", "srcset", "poster", "data") if key in given
            ]
        if tag == "img" and not given.get("alt"):
            self.silent.append(given.get("src"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed, reason=f"the site needs {needed}: pip install '.[docs]'")
    to = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(to).as_posix(): Found(path) for path in to.rglob("*.html")}, to


def test_the_site_is_whole(site):
    pages, to = site
    for at, page in pages.items():
        assert not page.silent, f"{at}: pictures without a text: {page.silent}"
        for target in [*page.loaded, *page.links]:
            where = urlsplit(target)
            if where.scheme or at == "404.html":  # its links are from the root of a server
                continue
            file = (to / at).parent / unquote(where.path) if where.path else to / at
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{at}: no file {target}"
            there = pages.get(file.resolve().relative_to(to.resolve()).as_posix())
            if where.fragment and there is not None and where.fragment != "__skip":
                assert unquote(where.fragment) in there.ids, f"{at}: no anchor {target}"


def test_the_site_loads_nothing_from_elsewhere(site):
    pages, to = site
    for at, page in pages.items():
        outside = [one for one in page.loaded if urlsplit(one).scheme or one.startswith("//")]
        assert not [one for one in outside if not one.startswith("data:")], f"{at}: {outside}"
        assert "mermaid" not in page.classes, f"{at}: the theme would fetch mermaid for it"
    for sheet in to.rglob("*.css"):
        text = sheet.read_text("utf-8")
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", text), sheet


def test_the_site_can_be_searched_from_a_folder(site):
    """The index is a script there, and the search runs in a frame, as a worker cannot start."""
    pages, to = site
    assert (to / "search" / "search_index.js").is_file()
    assert all("iframe-worker.js" in str(page.loaded) for page in pages.values())


def test_the_site_has_every_page_and_name(site):
    pages, _ = site
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=Anything)

    def leaves(node):
        if isinstance(node, str):
            return {node}
        return {leaf for part in (node.values() if isinstance(node, dict) else node)
                for leaf in leaves(part)}  # fmt: skip

    assert leaves(config["nav"]) == {path.relative_to(DOCS).as_posix() for path in PAGES}
    ids = {one for page in pages.values() for one in page.ids}
    assert set(identifiers().values()) <= ids
    modules = {at for at, page in pages.items() if "doc-symbol-module" in page.classes}
    assert modules == {"api/doors.html"}, "a function and its module have one name there"


class Anything(yaml.SafeLoader):
    """Reads mkdocs.yml, whatever its tags make."""


Anything.add_multi_constructor("", lambda loader, tag, node: tag)
