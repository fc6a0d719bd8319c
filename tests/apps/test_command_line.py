"""The command line as a whole: what it loads, its help, the two forms of its options."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from translution.apps import cli
from translution.apps.lazy import _joined

APPS = Path(cli.__file__).parent


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["models", "vit"]])
def test_torch_is_not_imported(words):
    code = f"""
import sys
from translution.apps.cli import main
sys.argv = ["translution", *{words}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert words != ["--version"] or done.stdout == "translution 0.1.0\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_lines_of_help_are_those_of_the_docstrings(name):
    module, function, line = cli.COMMANDS[name]
    tree = ast.parse((APPS / (module.replace(".", "/") + ".py")).read_text("utf-8"))
    (found,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert " ".join(ast.get_docstring(found).split("\n\n")[0].split()) == line


def test_a_value_may_stand_apart():
    known = {"--resume"}
    assert _joined(["c", "--out", "x", "--a.b=1"], known) == ["c", "--out=x", "--a.b=1"]
    assert _joined(["--out", "x", "c", "--resume"], known) == ["c", "--resume", "--out=x"]
    assert _joined(["c", "--rate", "-1"], known) == ["c", "--rate=-1"]
    assert _joined(["c", "--rate", "--b=2"], known) == ["c", "--rate", "--b=2"]


@pytest.mark.parametrize("words", [["c", "--a", "1"], ["--a", "1", "c"], ["--a=1", "c"]])
def test_a_command_takes_both_forms(words):
    import typer

    command = typer.main.get_command(cli._app()).commands["train"]
    context = command.make_context("train", words)
    assert context.params["config"] == Path("c")
    assert context.args == ["--a=1"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_whole_at_80_columns(name, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(cli._app(), [name, "--help"])
    assert done.exit_code == 0
    assert "…" not in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare --seeds x", "--seeds: got x, want an integer"),
        ("compare --seeds=", "--seeds: got '', want an integer"),
        ("models --batch 0", "--batch: got 0, want at least 1"),
        ("demo --port=99999", "--port: got 99999, want at most 65535"),
        ("export a --to=onnx", "--out: got nothing, want a value; see translution export --help"),
        ("train", "CONFIG: got nothing, want a value; see translution train --help"),
        ("models --nothing", "--nothing: no such option; see translution models --help"),
        ("--nothing", "--nothing: no such option; see translution --help"),
        ("bench --step", "--step: no such option; did you mean --"),
        ("models --json=3", "--json: takes no value"),
        ("export --batch", "--batch: got nothing, want a value"),
        ("models a b", "got unexpected extra argument(s) (b); see translution models --help"),
        ("trian c", "COMMAND: got trian; did you mean train?"),
        ("nothing", "COMMAND: got nothing; want one of train, evaluate, "),
    ],
)
def test_a_usage_error_is_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["translution", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert line.startswith(f"translution: {said}")


def test_no_command_prints_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["translution"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
