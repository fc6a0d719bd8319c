"""Tables of text cells for Markdown pages and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["console_table", "markdown_table"]

Cells = Sequence[Sequence[str]]


def markdown_table(heads: Sequence[str], rows: Cells) -> str:
    """Format a table in Markdown.

    Args:
        heads: the title of each column.
        rows: the cells of each row.

    Returns:
        The Markdown text: the heads, a rule, and one line for each row.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def console_table(
    heads: Sequence[str],
    rows: Cells,
    left: Sequence[str] = (),
    wrap: Sequence[str] = (),
    caption: str | None = None,
    title: str | None = None,
    tight: bool = False,
) -> Table:
    """Make a table for the terminal, without lines between its cells.

    A head that is wider than its column is wrapped at its spaces.

    Args:
        heads: the title of each column.
        rows: the cells of each row; text between two pairs of ** is shown in bold, as in Markdown.
        left: the heads of the columns that are aligned to the left; the others are aligned to the
            right.
        wrap: the heads of the columns whose cells may be wrapped at their spaces.
        caption: the text below the table.
        title: the text above the table.
        tight: whether each column is only as wide as its cells and the longest word of its head.

    Returns:
        A table that a rich console prints.
    """
    from rich.table import Table

    look: Any = {"box": None, "header_style": "bold", "pad_edge": False, "collapse_padding": True}
    look |= {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title, caption=caption, **look)
    for number, head in enumerate(heads):
        justify: Any = "left" if head in left else "right"
        column = [cells[number].replace("**", "") for cells in rows]
        if head in wrap:
            column = [word for cell in column for word in cell.split()]
        width = max(map(len, [*head.split(), *column]), default=0)
        fixed = width if tight and head not in wrap else None
        table.add_column(head, justify=justify, min_width=width, width=fixed)
    for cells in rows:
        table.add_row(*map(_bold, cells))
    return table


def _bold(cell: str) -> str:
    return re.sub(r"\*\*(.*?)\*\*", r"[bold]\1[/]", cell)
