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
    """What stands before the section, and what after it.

    Raises:
        ValueError: a page without the two marks, each once and in a line of its own.
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
    """Put the section between the marks of a page; nothing else of it changes."""
    before, after = check_page(file)
    text = f"{before}{BEGIN}\n\n{section(record)}\n{END}\n{after}"
    write_whole(Path(file), lambda path: path.write_text(text, "utf-8"))


def section(record: Record) -> str:
    """The section in Markdown, without its heading."""
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
            fine = [row for row in rows if "error" not in row]
            failed = [f"- Failed: {row['name']}: {row['error']}" for row in rows if "error" in row]
            body = [make(fine)] if fine else []
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
    """What of the command's plan the file does not hold, by the command that measures it."""
    lines = []
    for name, plan in PARTS.items():
        held = {_case(row["name"]) for row in record["rows"] if "error" not in row}
        kinds: dict[str, list[str]] = {}  # cases by dtype, where they have one
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
    head = "### What has no figure here\n\nThe commands that give it, with `--out` and `--docs`:"
    return "\n\n".join([head, "\n".join(lines)])


def _case(name: str) -> str:
    """A row's name without its direction."""
    return name.removesuffix(" + backward").removesuffix(", forward")


# -- tables ----------------------------------------------------------------------------------------


def _table(rows: Sequence[Record], columns: Columns) -> str:
    """In Markdown; a column that says nothing of any row is left out."""
    cells = [(title, [make(row) for row in rows]) for title, make in columns]
    cells = [(title, column) for title, column in cells if any(column)]
    return markdown_table(
        [title for title, _ in cells],
        list(zip(*(column for _, column in cells), strict=True)),
    )


def _number(name: str, form: str, factor: float = 1.0, sign: str = "") -> Callable[[Record], str]:
    """A value of a row, "" where there is none."""

    def cell(row: Record) -> str:
        value = row.get(name)
        return "" if value is None else sign + format(value * factor, form)

    return cell


def _times(above: str, below: str) -> Callable[[Record], str]:
    """A ratio of two values."""

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
    """The rate that shares are of, by dtype."""
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
        "Values and gradients beside plain torch on the same rounded inputs, by the relative error "
        "of the tensor that is furthest off (*dwq* is the gradient of the queries' table), and "
        "whether a second run gave the same bits."
    )
    columns: Columns = [
        ("what", _text("name")),
        ("backend", _text("backend")),
        ("beside", _text("exact")),
        ("largest error", _number("largest", ".1e")),
        ("of", worst),
        ("allowed", _number("tolerance", ".0e")),
        ("equal bits", lambda row: {True: "yes", False: "no"}.get(row.get("equal_bits"), "")),  # type: ignore[arg-type]
        ("passed", lambda row: "yes" if row["passed"] else "**no**"),
    ]
    return f"{_wrapped(intro)}\n\n{_table(rows, columns)}"


def _operators(rows: Sequence[Record]) -> str:
    intro = (
        "*Matmul share* is counted as above, over the rate of a plain 8192³ product there: "
        f"{_rates(rows)}. Peak memory is beyond the inputs, gradients included. *Plain torch* is "
        "its time over this one, *attention* this time over that of projections and "
        "`scaled_dot_product_attention`."
    )
    if any("wide_seconds" in row for row in rows):
        intro += (
            " *As wide tables* is the time of α's tables in the kernels for wide ones over that of "
            "the kernels for small ones, which the library takes."
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
        "The whole `ACmix2d`, attention kernel 7, with each way of computing its attention: what "
        '`backend="auto"` takes, the tiling in plain torch, a copy per neighbour (*unfold*), '
        "torch's flex attention (on places row by row, or tile by tile). *Best* says how many "
        "times its time the next one takes."
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
        "AdamW, products in bfloat16 (autocast), weights in float32. *Published* is what the "
        "published algorithm would take by its shapes, as above; *attention* the time over that of "
        "the attention model of the same size and batch."
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
    "eager_seconds": "one without {:.4f} s",
    "first_seconds": "the first step {:.1f} s",
    "difference": "relative difference of its loss {:.1e}",
    "compiled_seconds": "a later one {:.4f} s",
}
"""How the values of the part "first" are told."""


def _first(rows: Sequence[Record]) -> str:
    lines = []
    for row in rows:
        values = [label.format(row[name]) for name, label in LABELS.items() if name in row]
        lines.append(f"- {row['name']}: {', '.join(values)}.")
    return "\n".join(lines)
