"""The command `translution bench-gpu`, on tiny sizes in Triton's interpreter."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from translution.apps import cli
from translution.apps.bench import gpu_first, gpu_page, gpu_parts, gpu_rows
from translution.apps.bench.gpu_page import BEGIN, END, section
from translution.apps.bench.gpu_rows import Row

pytest.importorskip("triton")
DOCS = Path(__file__).parents[2] / "docs"
BEFORE = "# Performance\n\n## On a GPU\n"
AFTER = "\n## ACmix\nThe rest, as it was.\n"
DRY = ("--dry", "--device", "cpu")


def call(patch, capture, *arguments):
    """The command in this process: (exit code, what it printed, its errors)."""
    patch.setattr(sys, "argv", ["translution", "bench-gpu", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    told = capture.readouterr()
    return code, told.out, told.err


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def page(folder, text="old\n"):
    file = folder / "performance.md"
    file.write_text(f"{BEFORE}{BEGIN}\n{text}{END}\n{AFTER}", "utf-8")
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One dry run of all parts: (its file, the page, the exit code)."""
    folder = tmp_path_factory.mktemp("bench-gpu")
    arguments = ["--out", str(folder / "gpu.json"), "--docs", str(page(folder))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["translution", "bench-gpu", *DRY, *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return json.loads((folder / "gpu.json").read_text()), (folder / "performance.md"), code


def test_a_dry_run_measures_every_part(whole):
    told, _, code = whole
    assert not code
    assert told["program"] == "translution bench-gpu"
    assert told["dry"] is True
    assert told["command"].startswith("translution bench-gpu --dry")
    assert {"torch", "triton", "commit", "source", "device", "cpu"} <= set(told["machine"])
    assert len(told["date"]) == len("2026-11-27T00:00:00")
    planned = {(row.part, row.name) for make in gpu_parts.PARTS.values() for row in make(True)}
    assert {(row["part"], row["name"]) for row in told["rows"]} == planned
    assert len(told["rows"]) == len(planned)
    assert not [row for row in told["rows"] if "error" in row]
    assert all(row["took"] > 0 for row in told["rows"])


def rows_of(told, part):
    found = [row for row in told["rows"] if row["part"] == part]
    assert found
    return found


def test_what_a_row_holds(whole):
    told = whole[0]
    for row in rows_of(told, "check"):
        assert row["passed"], row
        assert row["equal_bits"]
        assert row["exact"] == "float64"
        assert row["backend"] == "triton"
        assert row["largest"] == max(row["errors"].values()) < row["tolerance"]
    biased = rows_of(told, "check")[0]["errors"]
    sides = {f"d{kind}{side}" for kind in "xwb" for side in "qkv"}
    assert set(biased) == {"s", "y", "da"} | sides
    for row in rows_of(told, "operator"):
        assert row["matmul_share"] == row["flops"] / row["seconds"] / row["matmul_rate"]
        assert row["peak_bytes"] > 0
        assert row["beside_seconds"] > 0
        assert ("torch_seconds" in row) == (row["backend"] == "triton")
    assert {row["backend"] for row in rows_of(told, "operator")} == {"triton", "torch"}
    for row in rows_of(told, "acmix"):
        assert {"torch", "auto", "unfold"} <= set(row["ways"])
        fine = {name: way for name, way in row["ways"].items() if "error" not in way}
        assert {"torch", "auto", "unfold"} <= set(fine)
        assert all(way["difference"] < 1e-5 for way in fine.values())
        assert fine[row["best"]]["seconds"] == min(way["seconds"] for way in fine.values())
        assert row["by"] >= 1
    steps = rows_of(told, "steps")
    ratios = [row["attention_ratio"] for row in steps[1:]]
    assert ratios == [row["seconds"] / steps[0]["seconds"] for row in steps[1:]]
    assert steps[1]["published_bytes"] > 0
    first = {row["name"]: row for row in rows_of(told, "first")}
    assert first["new shape, empty cache"]["second_batch_compiled"] == 0
    assert first["CUDA graph of a step"]["equal_bits"]
    assert first["torch.compile of a step"]["difference"] < 2e-2


def test_only_the_section_is_written(whole):
    told, file, _ = whole
    text = file.read_text("utf-8")
    assert text.startswith(f"{BEFORE}{BEGIN}\n")
    assert text.endswith(f"{END}\n{AFTER}")
    assert section(told) in text
    assert "\nold\n" not in text
    for title in ("Correctness", "The operators", "ACmix on a GPU", "A training step on a GPU"):
        assert f"### {title}\n" in text
    assert "| translution | 2×2 | 16 | 2 | float32 | forward |" in text


def test_the_section_from_an_earlier_file(whole, run, tmp_path):
    """Without measuring, and without a GPU."""
    (tmp_path / "gpu.json").write_text(json.dumps(whole[0]))
    file = page(tmp_path)
    code, out, err = run("--only", "none", "--docs", str(file))
    assert code == 0, err
    assert "is written from gpu.json" in out
    assert file.read_text("utf-8") == whole[1].read_text("utf-8")
    assert json.loads((tmp_path / "gpu.json").read_text()) == whole[0]


def test_the_page_is_that_of_its_file():
    told = json.loads((DOCS / "gpu.json").read_text("utf-8"))
    before, after = gpu_page.check_page(str(DOCS / "performance.md"))
    assert before.endswith("\n## On a GPU\n")
    assert after.startswith("\n### How the kernels work")
    text = (DOCS / "performance.md").read_text("utf-8")
    assert text == f"{before}{BEGIN}\n\n{section(told)}\n{END}\n{after}"


def test_what_a_file_lacks_is_told_by_command(whole):
    told = {**whole[0], "dry": False}
    text = section(told)
    assert "- `translution bench-gpu --only acmix`: all in bfloat16; all in float32." in text
    plan = [
        {"part": part, "name": row.name, "error": "none"}
        for part, make in gpu_parts.PARTS.items()
        for row in make(False)
        if part != "first"
    ]
    for row in plan[:-1]:
        del row["error"]
    assert gpu_page._lacking({"rows": plan}).splitlines()[4:] == [
        "- `translution bench-gpu --only steps`: translution_vit_small_patch16_224 qkv, batch 64.",
        "- `translution bench-gpu --only first`: new shape, empty cache; CUDA graph of a step; "
        "torch.compile of a step; new shape, kept cache.",
    ]


def test_a_process_of_its_own(tmp_path):
    setting = gpu_rows.Setting.of_dry(time.monotonic() + 100)
    found = gpu_first._elsewhere("CUDA graph", setting, str(tmp_path))
    assert found["equal_bits"]
    with pytest.raises(RuntimeError, match=r"its process ended with 1: KeyError: 'nothing'"):
        gpu_first._elsewhere("nothing", setting, str(tmp_path))
    setting.deadline = 0.0
    with pytest.raises(RuntimeError, match="longer than what was left"):
        gpu_first._elsewhere("torch.compile", setting, str(tmp_path))


# -- runs of rows that cost nothing ----------------------------------------------------------------


class Counted:
    """Rows of the part "first" that count how often each is measured, and fail as they are told."""

    def __init__(self, monkeypatch, **failing):
        self.failing, self.calls = failing, []
        monkeypatch.setitem(gpu_parts.PARTS, "first", self.rows)

    def rows(self, dry):
        return [Row("first", name, lambda _, name=name: self.measure(name)) for name in "abc"]

    def measure(self, name):
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]
        return {"first_seconds": 1.0}


FIRST = (*DRY, "--only", "first")


def test_a_run_cut_off_goes_on_where_it_ended(run, tmp_path, monkeypatch):
    rows = Counted(monkeypatch, b=KeyboardInterrupt())
    assert run(*FIRST)[0] == 130
    held = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["name"] for row in held] == ["a"]
    rows.failing = {}
    code, out, err = run(*FIRST)
    assert code == 0, err
    assert rows.calls == ["a", "b", "b", "c"]
    assert "2 rows measured, 0 failed, 0 skipped" in out
    held = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["name"] for row in held] == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    run(*FIRST)
    assert len(rows.calls) == 4
    run(*FIRST, "--again")
    assert rows.calls[4:] == ["a", "b", "c"]
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 3


def test_a_failing_row_stops_no_other(run, tmp_path, monkeypatch):
    failing = {
        "a": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        "b": RuntimeError("the first line\nand a second"),
    }
    rows = Counted(monkeypatch, **failing)
    code, out, err = run(*FIRST, "--docs", str(page(tmp_path)))
    assert code == 0, err
    assert "first: a: failed: out of memory" in out
    assert "1 rows" not in out
    assert "3 rows measured, 2 failed, 0 skipped" in out
    held = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row.get("error") for row in held] == [
        "out of memory", "RuntimeError: the first line", None,
    ]  # fmt: skip
    assert "- Failed: b: RuntimeError: the first line" in page_text(tmp_path)
    rows.failing = {}
    run(*FIRST)  # what failed is tried again
    assert rows.calls == ["a", "b", "c", "a", "b"]
    rows.failing = failing
    run(*FIRST, "--again")
    run(*FIRST, "--again")
    assert rows.calls[-6:] == ["a", "b", "c", "c", "a", "b"]  # what failed before comes last


def page_text(folder):
    return (folder / "performance.md").read_text("utf-8")


def test_another_version_is_measured_anew(run, tmp_path, monkeypatch):
    rows = Counted(monkeypatch)
    run(*FIRST)
    file = tmp_path / "gpu.json"
    told = json.loads(file.read_text())
    told["machine"]["source"] = "another"
    file.write_text(json.dumps(told))
    _, out, _ = run(*FIRST)
    assert "was measured with another version or device, and is replaced" in out
    assert rows.calls == ["a", "b", "c"] * 2


def test_no_budget_skips_all_and_says_so(run, tmp_path):
    code, out, err = run(*DRY, "--budget", "0")
    assert code == 0, err
    for part, make in gpu_parts.PARTS.items():
        assert f"{part}: {len(make(True))} rows skipped" in out
    assert "what is left of the budget of 0 s" in out
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []


def test_a_row_that_does_not_fit_is_skipped(monkeypatch):
    setting = gpu_rows.Setting(torch.device("cuda"), deadline=100.0)
    monkeypatch.setattr(gpu_rows.time, "monotonic", lambda: 90.0)
    assert setting.fits(Row("check", "short", dict, needs=9))
    assert not setting.fits(Row("check", "long", dict, needs=11))


def test_what_matters_most_comes_first():
    rows = gpu_rows.in_order([make(False) for make in gpu_parts.PARTS.values()])
    assert [row.rank for row in rows] == sorted(row.rank for row in rows)
    first = [row for row in rows if row.rank == 0]
    assert {row.part for row in first} == set(gpu_parts.PARTS)
    assert all("float16" not in row.name.replace("bfloat16", "") for row in first)
    assert first[0].name == "14×14, prefix 1, width 192, batch 64, bfloat16"
    names = [(row.part, row.name) for row in rows]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed", *DRY], "only: got 'speed', want one of "),
        (["--only", "check,none", *DRY], "only: got 'check,none', want none by itself"),
        (["--only", "none", "--out", "held.json"], "docs: got nothing, want a page"),
        (["--budget", "-1", *DRY], "budget: got -1"),
        (["--repeats", "0", *DRY], "repeats: got 0"),
        (["--out", "nowhere/gpu.json", *DRY], "out: got nowhere/gpu.json"),
        (["--docs", "nowhere.md", *DRY], "docs: got nowhere.md"),
        (["--docs", "plain.md", *DRY], "docs: got plain.md, want a page with the lines "),
        (["--dry", "--device", "cuda"], "device: got 'cuda', want cpu with --dry"),
        (["--device", "cpu"], "device: got 'cpu', want a GPU"),
        (["--only", "none"], "out: got gpu.json, want a file that exists"),
        (["--only", "none", "--out", "plain.md"], "out: plain.md is not a file of this command"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, run, tmp_path):
    (tmp_path / "plain.md").write_text("# A page\n")
    (tmp_path / "held.json").write_bytes((DOCS / "gpu.json").read_bytes())
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_part_names_the_choices(run):
    _, _, err = run("--only", "speed")
    for name in ("only", *gpu_parts.PARTS, "none"):
        assert name in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(run):
    code, _, err = run()
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "want a GPU that torch can use with CUDA" in err
