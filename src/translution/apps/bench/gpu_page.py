"""The section on GPUs of docs/performance.md, written from a file of `translution bench-gpu`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...utils.files import write_whole
from ...utils.tables import markdown_table
from .common import DTYPES, grid_text
from .gpu_parts import PARTS
from .gpu_rows import PROGRAM, Record

__all__ = ["BEGIN", "END", "check_page", "section", "write_page"]

BEGIN = "<!-- written by bench-gpu: begin -->"
END = "<!-- written by bench-gpu: end -->"
Columns = Sequence[tuple[str, Callable[[Record], str]]]


def check_page(file: str) -> tuple[str, str]:
    """Split a page at the two marks of the section.

    Args:
        file: the path of the page.

    Returns:
        The text before the section and the text after it.

    Raises:
        ValueError: the page does not exist, or does not have each mark once, on its own line.
    """
    try:
        text = Path(file).read_text("utf-8")
    except OSError as error:
        raise ValueError(f"docs: got {file}, want a page that exists: {error}") from None
    before, begun, rest = text.partition(f"{BEGIN}\n")
    _, ended, after = rest.partition(f"{END}\n")
    if not begun or not ended or BEGIN in rest or END in before + after:
        raise ValueError(f"docs: got {file}, want a page with the lines {BEGIN} and {END}, once")
    return before, after


def write_page(file: str, record: Record) -> None:
    """Write the section between the marks of a page; the rest of the page stays as it is.

    Args:
        file: the path of the page.
        record: the record of a run.

    Raises:
        ValueError: the page does not have the two marks.
    """
    before, after = check_page(file)
    text = f"{before}{BEGIN}\n\n{section(record)}\n{END}\n{after}"
    write_whole(Path(file), lambda path: path.write_text(text, "utf-8"))


def section(record: Record) -> str:
    """Return the section of a run in Markdown, without its heading."""
    parts = [_wrapped(text) for text in [*record.get("notes", []), _head(record)]]
    for name, title, make in (
        ("check", "Correctness", _checks),
        ("operator", "The operators", _operators),
        ("acmix", "ACmix on a GPU", _acmix),
        ("steps", "A training step on a GPU", _steps),
        ("first", "First calls, graphs", _first),
    ):
        rows = [row for row in record["rows"] if row["part"] == name]
        if rows:
            measured = [row for row in rows if "error" not in row]
            failed = [f"- Failed: {row['name']}: {row['error']}" for row in rows if "error" in row]
            body = [make(measured)] if measured else []
            parts.append("\n\n".join([f"### {title}", *body, *["\n".join(failed)] * bool(failed)]))
    lacking = "" if record.get("dry") else _lacking(record)
    return "\n\n".join([*parts, *[lacking] * bool(lacking)]) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _head(record: Record) -> str:
    about = record["machine"]
    named = about.get("gpu") or about.get("cpu", "an unknown machine")
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    line = f"{named}, torch {about['torch']}, triton {about.get('triton')}{commit}, "
    line += f"{record['date'][:10]}."
    if record["program"] != PROGRAM:
        return line
    dry = " This was a dry run: tiny sizes, on the CPU." if record.get("dry") else ""
    return f"{line} Command: `{record['command']}`.{dry}"


def _lacking(record: Record) -> str:
    """List the rows that the file does not have, under the command that measures them."""
    lines = []
    for name, plan in PARTS.items():
        held = {_case(row["name"]) for row in record["rows"] if "error" not in row}
        kinds: dict[str, list[str]] = {}  # cases by dtype; "" for those without one
        for row in plan(False):
            kind = _case(row.name).rpartition(", ")[2]
            kinds.setdefault(kind if kind in DTYPES else "", []).append(_case(row.name))
        found = []
        for kind, cases in kinds.items():
            open_ = [case for case in dict.fromkeys(cases) if case not in held]
            if len(open_) == len(dict.fromkeys(cases)) and kind:
                found.append(f"all in {kind}")
            elif open_:
                found += open_
        if found:
            lines.append(f"- `translution bench-gpu --only {name}`: {'; '.join(found)}.")
    if not lines:
        return ""
    head = "### What was not measured\n\nThese commands measure it, with `--out` and `--docs`:"
    return "\n\n".join([head, "\n".join(lines)])


def _case(name: str) -> str:
    """Return the name of a row without its direction (forward, or forward + backward)."""
    return name.removesuffix(" + backward").removesuffix(", forward")


# -- tables ----------------------------------------------------------------------------------------


def _table(rows: Sequence[Record], columns: Columns) -> str:
    """Make a table in Markdown; columns whose cells are all empty are left out."""
    cells = [(title, [make(row) for row in rows]) for title, make in columns]
    cells = [(title, column) for title, column in cells if any(column)]
    return markdown_table(
        [title for title, _ in cells],
        list(zip(*(column for _, column in cells), strict=True)),
    )


def _number(name: str, form: str, factor: float = 1.0, sign: str = "") -> Callable[[Record], str]:
    """Return a function that formats a number of a row, or returns "" if the row lacks it."""

    def cell(row: Record) -> str:
        value = row.get(name)
        return "" if value is None else sign + format(value * factor, form)

    return cell


def _times(above: str, below: str) -> Callable[[Record], str]:
    """Return a function that formats the ratio of two numbers of a row."""

    def cell(row: Record) -> str:
        if not row.get(above) or not row.get(below):
            return ""
        found = row[above] / row[below]
        return f"×{found:,.0f}" if found >= 100 else f"×{found:.2g}"

    return cell


def _text(name: str) -> Callable[[Record], str]:
    return lambda row: str(row.get(name, ""))


def _pass(row: Record) -> str:
    return "forward + backward" if row["backward"] else "forward"


def _grid(row: Record) -> str:
    return grid_text(row["grid"], row.get("causal", False))


def _rates(rows: Sequence[Record]) -> str:
    """Describe the rates of matrix products on which the shares are based, by dtype."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row.get("matmul_rate"):
            rates.setdefault(row["dtype"], []).append(row["matmul_rate"])
    parts = [f"{sum(r) / len(r) / 1e12:.3g} TFLOP/s in {name}" for name, r in rates.items()]
    return " and ".join(parts) or "an unknown rate"


def _checks(rows: Sequence[Record]) -> str:
    def worst(row: Record) -> str:
        return max(row["errors"], key=row["errors"].get)

    intro = (
        "Values and gradients are compared with plain torch on the same rounded inputs. *Largest "
        "error* is the largest relative error of a tensor, and the next column names that tensor "
        "(*dwq* is the gradient of the table of the queries). *Equal bits* says whether a second "
        "run gave the same bits."
    )
    columns: Columns = [
        ("what", _text("name")),
        ("backend", _text("backend")),
        ("reference", _text("exact")),
        ("largest error", _number("largest", ".1e")),
        ("tensor", worst),
        ("allowed", _number("tolerance", ".0e")),
        ("equal bits", lambda row: {True: "yes", False: "no"}.get(row.get("equal_bits"), "")),  # type: ignore[arg-type]
        ("passed", lambda row: "yes" if row["passed"] else "**no**"),
    ]
    return f"{_wrapped(intro)}\n\n{_table(rows, columns)}"


def _operators(rows: Sequence[Record]) -> str:
    intro = (
        "*Matmul share* is computed as above, with the rate of an 8192³ matrix product on the GPU: "
        f"{_rates(rows)}. *Peak GB* is the memory that a call takes beyond its inputs, including "
        "gradients. *Plain torch* is the time of plain torch divided by this time. *Attention* is "
        "this time divided by that of q, k and v projections and `scaled_dot_product_attention`."
    )
    if any("wide_seconds" in row for row in rows):
        intro += (
            " *As wide tables* is the time of α with the kernels for wide tables, divided by that "
            "with the kernels for small tables, which the library uses."
        )
    if any("before_seconds" in row for row in rows):
        intro += " *Before* is the time of an earlier version on the same machine."
    columns: Columns = [
        ("operator", _text("operator")),
        ("grid", _grid),
        ("width", _text("width")),
        ("batch", _text("batch")),
        ("dtype", _text("dtype")),
        ("pass", _pass),
        ("ms", _number("seconds", ",.2f", 1e3)),
        ("matmul share", _number("matmul_share", ".2f")),
        ("peak GB", _number("peak_bytes", ".2f", 1e-9)),
        ("plain torch", _times("torch_seconds", "seconds")),
        ("attention", _times("seconds", "beside_seconds")),
        ("as wide tables", _times("wide_seconds", "seconds")),
        ("before, ms", _number("before_seconds", ",.1f", 1e3)),
    ]
    return f"{_wrapped(intro)}\n\n{_table(rows, columns)}"


def _acmix(rows: Sequence[Record]) -> str:
    intro = (
        "The whole `ACmix2d` with an attention window of 7×7 pixels is measured with each way of "
        'computing its attention: with the backend that `backend="auto"` chooses, in plain torch '
        "tile by tile (*torch*), with a copy for every neighbour (*unfold*), and with torch's flex "
        "attention on pixels row by row (*flex*) or tile by tile. *Best* is the fastest way, and "
        "the time of the second fastest divided by its time."
    )

    def way(name: str) -> Callable[[Record], str]:
        def cell(row: Record) -> str:
            found: dict[str, Any] = row["ways"].get(name, {})
            if "seconds" not in found:
                return "failed" if found else ""
            size = f", {found['peak_bytes'] / 1e9:.2f} GB" if found.get("peak_bytes") else ""
            return f"{found['seconds'] * 1e3:,.2f} ms{size}"

        return cell

    columns: Columns = [
        ("map", _grid),
        ("channels", _text("width")),
        ("batch", _text("batch")),
        ("dtype", _text("dtype")),
        ("pass", _pass),
        *((name, way(name)) for name in ("auto", "torch", "unfold", "flex", "flex, tiled")),
        ("best", lambda row: row["best"] + (f", ×{row['by']:.2f}" if "by" in row else "")),
    ]
    failed = [
        f"- Failed: {name} at {row['name']}: {found['error']}"
        for row in rows
        for name, found in row["ways"].items()
        if "error" in found
    ]
    failed = ["\n".join(failed)] if failed else []
    return "\n\n".join([_wrapped(intro), _table(rows, columns), *failed])


def _steps(rows: Sequence[Record]) -> str:
    intro = (
        "The optimizer is AdamW; matrix products are in bfloat16 (autocast), weights in float32. "
        "*Published* is the memory that the published algorithm would take, computed from its "
        "shapes as above. *Attention* is the time divided by that of the attention model of the "
        "same size and batch. *In a graph* is the time of the same step in a CUDA graph, which "
        "does not wait for Python, and the last column compares these times with attention's."
    )
    columns: Columns = [
        ("model", lambda row: row["model"] + (f" ({row['relative']})" if row["relative"] else "")),
        ("parameters, M", _number("parameters", ",.1f", 1e-6)),
        ("batch", _text("batch")),
        ("seconds", _number("seconds", ".3f")),
        ("images/s", _number("images_per_second", ",.0f")),
        ("peak GB", _number("peak_bytes", ".1f", 1e-9)),
        ("published, GB", _number("published_bytes", ",.0f", 1e-9)),
        ("attention", _number("attention_ratio", ".2f", sign="×")),
        ("in a graph, s", _number("graph_seconds", ".3f")),
        ("attention in a graph", _number("attention_graph_ratio", ".2f", sign="×")),
    ]
    return f"{_wrapped(intro)}\n\n{_table(rows, columns)}"


LABELS = {
    "first_forward_seconds": "first forward {:.2f} s",
    "first_backward_seconds": "first backward {:.2f} s",
    "first_compiled": "{} kernels compiled or loaded",
    "second_batch_forward_seconds": "forward at a second batch size {:.3f} s",
    "second_batch_backward_seconds": "backward {:.3f} s",
    "second_batch_compiled": "{} kernels compiled",
    "first_calls_seconds": "forward and backward together {:.1f} s",
    "before_seconds": "before {:.1f} s",
    "equal_bits": "equal bits: {}",
    "largest_difference": "largest relative difference {:.1e}",
    "graph_seconds": "a replayed step {:.4f} s",
    "eager_seconds": "a step without a graph {:.4f} s",
    "first_seconds": "the first step {:.1f} s",
    "difference": "relative difference of its loss {:.1e}",
    "compiled_seconds": "a later step {:.4f} s",
}
"""The words for each number of the part "first"."""


def _first(rows: Sequence[Record]) -> str:
    lines = []
    for row in rows:
        values = [label.format(row[name]) for name, label in LABELS.items() if name in row]
        lines.append(f"- {row['name']}: {', '.join(values)}.")
    return "\n".join(lines)
