"""Write figures, pages and results.json from the finished runs of an experiment."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from ...utils.files import write_whole
from ...utils.tables import markdown_table
from .config import MEASURES
from .figures import draw, draw_costs
from .results import Results

__all__ = ["store", "write_results"]


def write_results(name: str, command: str, results: Results, docs: Path) -> None:
    """Write an experiment's table, figure and numbers into results.md and results.json.

    In results.md only the text between the marks of the experiment is replaced. If it has no marks
    yet, a section is added at the end. Of a wide table it has the most important columns, and
    results-tables.md has all of them. It shows one figure, and links to the other.

    Args:
        name: the name of the experiment in the marks, in results.json and in the figure's file.
        command: the command that made it.
        results: the results.
        docs: the folder of results.md, results-tables.md and results.json.
    """
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "images").mkdir(exist_ok=True)
    store(docs / "results.json", name, {"command": command, **results.as_dict()})
    picture = docs / "images" / f"results-{name}.png"
    write_whole(picture, lambda to: draw(results, to))
    short = results.main_columns()
    parts, links = [markdown_table(*results.table(short))], []
    if len(short) < len(results.columns()):
        title = results.experiment.title
        whole = markdown_table(*results.table())
        _put(docs / "results-tables.md", TABLES, name, f"## {title}\n", whole)
        links.append(f"[All columns of this table]({_link(title)}).")
    figures = [(f"images/{picture.name}", alternative(results), "Every seed of each row")]
    buffer = io.BytesIO()
    if draw_costs(results, buffer):
        costs = docs / "images" / f"costs-{name}.png"
        write_whole(costs, lambda to: to.write_bytes(buffer.getvalue()))
        measure = MEASURES[results.experiment.measures[0]].title
        words = (
            f"{results.experiment.title}: {measure} of each row over the cost of its training; a "
            "line joins the rows that no cheaper row surpasses"
        )
        figures.append((f"images/{costs.name}", words, "The rows over the cost of their training"))
        if len(results.experiment.tests) == 1:  # else it shows one of several answers only
            figures.reverse()
    (shown, words, _), *others = figures
    parts.append(f"![{words}]({shown})")
    links += [f"[{title}]({image})." for image, _, title in others]
    parts += [" ".join(links)] if links else []
    block = "\n\n".join([*parts, f"`{command}`. {results.about()}"])
    e = results.experiment
    _put(docs / "results.md", "# Results\n", name, f"## {e.title}\n{e.asks}\n", block)


def store(path: Path, name: str, content: dict[str, Any]) -> None:
    """Write the content of one experiment into a JSON file, and keep those of the others."""
    whole = json.loads(path.read_text("utf-8")) if path.exists() else {}
    whole[name] = content
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    write_whole(path, lambda to: to.write_text(text + "\n", "utf-8"))


TABLES = """# All columns of the wide tables

The sections of [results](results.md) explain them.
"""


def _put(page: Path, empty: str, name: str, heading: str, block: str) -> None:
    """Write a block between the marks of an experiment, or under a new heading at the end.

    Args:
        page: the page; `empty` is its content if it does not exist yet.
        name: the name of the experiment in the marks.
        heading: what stands above the marks if they are new.
        block: the text between the marks.
    """
    old = page.read_text("utf-8") if page.exists() else empty
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    marked = f"{begin}\n{block}\n{end}"
    if begin in old:
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        new = re.sub(pattern, lambda _: marked, old, count=1, flags=re.S)
    else:
        new = f"{old.rstrip()}\n\n{heading}\n{marked}\n"
    write_whole(page, lambda to: to.write_text(new, "utf-8"))


def _link(heading: str) -> str:
    """The address of a section of results-tables.md."""
    words = re.sub(r"[^\w\s-]", "", heading).lower().split()
    return f"results-tables.md#{'-'.join(words)}"


def alternative(results: Results) -> str:
    """Describe the figure in words, for readers who do not see it."""
    e = results.experiment
    by = f" by {e.axis}" if e.axis else ""
    return f"{e.title}: {MEASURES[e.measures[0]].title} of each row{by}, a point for each seed"
