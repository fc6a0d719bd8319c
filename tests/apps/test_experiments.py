"""Experiments: what is run, how rates are chosen, and what is written, also from the outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from test_first_run import command

from translution.apps.config import parse
from translution.apps.experiments.config import BUDGETS, MEASURES, Arm, Experiment, load_experiment
from translution.apps.experiments.costs import parameters_of, widened
from translution.apps.experiments.report import write_results
from translution.apps.experiments.results import Results
from translution.apps.experiments.runs import Runs
from translution.utils.tables import markdown_table

pytestmark = pytest.mark.usefixtures("own_names")  # some experiments import models
ROOT = Path(__file__).parents[2]
CONTENT = {
    "title": "Tiny",
    "asks": "Does it run?",
    "base": {
        "model": {"name": "vit", "patch_size": 5, "dim": 12, "depth": 1, "heads": 3},
        "data": {"kind": "images", "format": "digits", "canvas": 20, "test_limit": 20},
        "train": {"steps": 2, "batch_size": 8, "validate_every": 1000},
    },
    "regimes": {"centred": {"data.moved": False}, "moved": {"data.moved": True}},
    "tests": {"centred": {"data.moved": False}, "moved": {"data.moved": True}},
    "rows": {
        "attention": {"model.mixer": "attention"},
        "Translution": {"model.mixer": "translution"},
    },
    "rates": [1e-3, 3e-3],
    "seeds": 3,
    "measures": ["accuracy"],
    "time": {"like": "Translution", "regimes": ["moved"]},
    "parameters": {"like": "Translution", "regimes": ["moved"], "rates": [1e-3]},
}  # fmt: skip
FACTS = {
    "machine": {},
    "rows": {
        "attention": {"parameters": 100, "step_ms": 2.0, "multiply_adds": 5.0},
        "Translution": {"parameters": 900, "step_ms": 9.0, "multiply_adds": 60.0},
    },
}
MACHINE = {"cpu": "a processor", "cores": 2, "torch": "2.13.0"}


def experiment(**changes):
    return parse(Experiment, CONTENT | changes, "test")


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps(FACTS))
    found = experiment()
    return Runs(found, folder, list(found.rows), BUDGETS)


def finish(runs, run, valid, test=0.5):
    """As if the run had been made."""
    folder = runs.folder / run.folder
    folder.mkdir()
    tests = {name: {"test_accuracy": test} for name in runs.experiment.tests}
    result = {
        "row": run.arm.row, "regime": run.arm.regime, "budget": run.arm.budget, "rate": run.rate,
        "seed": run.seed, "identity": run.identity, "steps": run.config.train.steps,
        "dim": run.config.model.given["dim"], "parameters": 1, "seconds": 1.0,
        "valid": None if valid is None else {"valid_accuracy": valid},
        "tests": {} if valid is None else tests,
        "date": "2026-01-02", "commit": "abc", "machine": MACHINE,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def of(runs, arm):
    return [run for run in runs.planned() if run.arm == arm]


def test_each_row_is_seeded_with_the_rate_that_was_best_for_it(runs):
    arm = Arm("attention", "centred", "steps")
    first = of(runs, arm)
    assert [(run.rate, run.seed) for run in first] == [(1e-3, 0), (3e-3, 0)]
    finish(runs, first[0], 0.6)
    assert len(of(runs, arm)) == 2
    assert runs.chosen(arm) is None
    finish(runs, first[1], 0.7)
    later = of(runs, arm)[2:]
    assert [(run.rate, run.seed) for run in later] == [(3e-3, 1), (3e-3, 2)]
    assert later[1].config.seed == 2
    assert later[1].config.train.learning_rate == 3e-3


def test_a_rate_that_diverges_is_not_chosen(runs):
    arm = Arm("attention", "centred", "steps")
    first = of(runs, arm)
    finish(runs, first[0], 0.1)
    finish(runs, first[1], None)
    assert runs.chosen(arm) == 1e-3


def test_all_rates_diverging_is_told(runs):
    for run in of(runs, Arm("attention", "centred", "steps")):
        finish(runs, run, None)
    with pytest.raises(ValueError, match=r"rates: every one of \[0.001, 0.003\] diverged"):
        runs.planned()


def test_the_least_is_best_where_less_is_better():
    assert not MEASURES["bits_per_byte"].higher
    told = MEASURES["perplexity_per_byte"]
    assert told.of({"test_bits_per_byte": 3.0}, "test") == 8.0
    assert MEASURES["accuracy"].of({"test_accuracy": 0.25}, "test") == 25.0


def test_equal_time_gives_more_steps_and_the_chosen_rate(runs):
    arm = Arm("attention", "moved", "time")
    assert not of(runs, arm)  # before a rate is chosen
    for run, valid in zip(of(runs, Arm("attention", "moved", "steps")), (0.6, 0.7), strict=True):
        finish(runs, run, valid)
    assert [(r.rate, r.seed, r.config.train.steps) for r in of(runs, arm)] == [
        (3e-3, seed, 9) for seed in range(3)
    ]


def test_equal_parameters_widens(runs):
    arm = Arm("attention", "moved", "parameters")
    config = runs.experiment.config(arm, 1e-3, 0)
    wanted = 40_000
    dim = widened(config, wanted)
    assert dim % 12 == 0

    def off(dim):
        found = runs.experiment.config(arm, 1e-3, 0, {"model.dim": dim})
        return abs(parameters_of(found) / wanted - 1)

    assert off(dim) < min(off(dim + 12), off(dim - 12))
    assert off(dim) < 0.2


def test_the_row_that_others_are_like_is_not_run_twice(runs):
    arms = runs.experiment.arms(BUDGETS)
    assert len(arms) == 4 + 1 + 1
    assert not [arm for arm in arms if arm.row == "Translution" and arm.budget != "steps"]
    assert len({arm.folder for arm in arms}) == len(arms)


def test_a_folder_with_other_runs_is_refused(runs):
    finish(runs, of(runs, Arm("attention", "centred", "steps"))[0], 0.5)
    changed = {**CONTENT["base"], "train": {**CONTENT["base"]["train"], "steps": 3}}
    other = Runs(experiment(base=changed), runs.folder, ["attention"], ["steps"])
    with pytest.raises(ValueError, match=r"out: .* holds a run of another configuration"):
        other.planned()


def test_where_data_lie_and_how_often_is_saved_changes_no_run(runs):
    run = of(runs, Arm("attention", "centred", "steps"))[0]
    base = {**CONTENT["base"], "train": {**CONTENT["base"]["train"], "save_every": 7}}
    same = Runs(experiment(base=base), runs.folder, ["attention"], ["steps"])
    assert same.planned()[0].identity == run.identity


def results(runs):
    found = runs.results()
    assert found is not None
    assert found.facts == FACTS
    return found


def table(runs):
    return markdown_table(*results(runs).table()).splitlines()


def finish_all(runs):
    left = runs.planned()
    while left:
        for run in left:
            better = {"attention": 0.5, "Translution": 0.75}[run.arm.row]
            finish(runs, run, run.rate, better + run.seed / 100)
        left = [run for run in runs.planned() if runs.result(run) is None]


def test_table(runs):
    finish_all(runs)
    lines = table(runs)
    assert "| centred → moved, accuracy, %, equal steps |" in lines[0]
    attention, translution = lines[2:]
    assert attention.startswith("| attention | ×1.0 | 100 | 51.0 ± 1.0 |")
    assert "51.0 ± 1.0 (9 steps)" in attention
    assert re.search(r"\(width \d+, rate 0.001\)", attention)
    assert attention.endswith("| centred 0.003, moved 0.003 |")
    assert "**76.0 ± 1.0**" in translution
    assert "**" not in attention
    assert translution.startswith("| Translution | ×4.5 | 900 |")


@pytest.mark.parametrize(("lead", "bold"), [(0.5, False), (0.9, False), (1.1, True)])
def test_only_a_lead_beyond_the_deviation_is_bold(runs, lead, bold):
    """The three seeds differ by one point, so the deviation of each row is one point."""
    arm = Arm("attention", "centred", "steps")
    for row, score in (("attention", 0.50), ("Translution", 0.50 + lead / 100)):
        for _ in range(2):  # the other seeds follow from the first one
            for run in of(runs, replace(arm, row=row)):
                if runs.result(run) is None:
                    finish(runs, run, run.rate, score + run.seed / 100)
    attention, translution = table(runs)[2:]
    assert "**" not in attention
    assert ("**" in translution) == bold


def test_one_seed_is_never_bold(runs):
    arm = Arm("attention", "centred", "steps")
    for row, score in (("attention", 0.1), ("Translution", 0.9)):
        for run in of(runs, replace(arm, row=row)):
            finish(runs, run, run.rate, score)
    assert "**" not in "".join(table(runs))


def test_equal_time_with_times_from_elsewhere(runs):
    """The steps follow the times that the file gives, not those of this machine."""
    given = {"like": "Translution", "step_ms": {"attention": 3.0, "Translution": 12.0}}
    found = experiment(gpu_time={**given, "regimes": ["moved"]})
    runs = replace(runs, experiment=found)
    for run, valid in zip(of(runs, Arm("attention", "moved", "steps")), (0.6, 0.7), strict=True):
        finish(runs, run, valid)
    arm = Arm("attention", "moved", "gpu_time")
    assert [run.config.train.steps for run in of(runs, arm)] == [8, 8, 8]
    for run in runs.planned():
        if runs.result(run) is None:
            finish(runs, run, run.rate)
    assert "50.0 ± 0.0 (8 steps)" in table(runs)[2]
    assert "equal time on a GPU" in table(runs)[0]
    with pytest.raises(ValueError, match=r"gpu_time.step_ms: got .*, want a time for 'attention'"):
        experiment(gpu_time={"like": "Translution", "step_ms": {"Translution": 1.0}})
    with pytest.raises(ValueError, match=r"^test: time.step_ms: got .*, want none"):
        experiment(time=given)


def test_a_part_of_the_runs_is_a_part_of_the_table(runs):
    for run in of(runs, Arm("attention", "centred", "steps")):
        finish(runs, run, run.rate)
    head, _, attention, translution = table(runs)
    assert "moved → moved" not in head
    assert attention.startswith("| attention | ×1.0 | 100 | 50.0 | 50.0 |")
    assert translution.startswith("| Translution | ×4.5 | 900 | – | – |")
    assert results(runs).about().startswith("Test part, one seed, ")
    others = [r for r in of(runs, Arm("attention", "centred", "steps")) if runs.result(r) is None]
    for run in [*others, *of(runs, Arm("Translution", "centred", "steps"))]:
        finish(runs, run, run.rate)
    said = "Test part, mean over 1 to 3 seeds, ± standard deviation where there are several, "
    assert results(runs).about().startswith(said)


def test_processes_end_with_the_one_that_waits_for_them(tmp_path):
    """Also if that one is killed; they would train on, and nobody would know."""
    file = tmp_path / "killed.py"
    file.write_text(
        "import os, time\n"
        "from translution.apps.experiments.making import working\n"
        "if __name__ == '__main__':\n"
        "    with working(2, print, 1) as (pool, _):\n"
        "        worker = pool.submit(os.getpid).result()\n"
        "        pool.submit(time.sleep, 300)\n"
        "        print(worker, flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120)
    worker = int(done.stdout)
    state = Path(f"/proc/{worker}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def test_what_processes_are_forked_from_asks_for_no_gpu():
    """CUDA does not work in a process that is forked from one that has asked for devices."""
    code = (
        "import torch\n"
        "def asked(*_): raise AssertionError('CUDA was asked')\n"
        "for name in ('is_available', 'device_count', '_lazy_init', 'get_device_properties'):\n"
        "    setattr(torch.cuda, name, asked)\n"
        "import translution.apps.experiments.making"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_before_a_rate_is_chosen(runs, tmp_path):
    from typer.testing import CliRunner

    import translution.apps.cli

    (tmp_path / "runs.yaml").write_text(json.dumps(CONTENT))
    finish(runs, of(runs, Arm("attention", "centred", "steps"))[0], 0.5)
    arguments = ["experiment", str(tmp_path / "runs.yaml"), "--out", str(tmp_path), "--report"]
    done = CliRunner().invoke(translution.apps.cli._app(), arguments)
    assert isinstance(done.exception, ValueError)
    assert "there is no finished row" in str(done.exception)


def test_words_around_the_table_stay(runs, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "results.md"
    page.write_text("# Results\nWords.\n\n<!-- begin tiny -->\nold\n<!-- end tiny -->\n\nMore.\n")
    finish_all(runs)
    for _ in range(2):
        write_results("tiny", "translution experiment tiny.yaml", results(runs), docs)
    text = page.read_text()
    assert text.startswith("# Results\nWords.\n\n<!-- begin tiny -->\n| ")
    assert text.endswith("<!-- end tiny -->\n\nMore.\n")
    assert "old" not in text
    assert "over 3 seeds, 2 steps" in text
    assert "a processor, 2 cores" in text
    assert "abc" in text
    write_results("other", "command", results(runs), docs)
    assert "## Tiny\nDoes it run?\n\n<!-- begin other -->" in page.read_text()
    content = json.loads((docs / "results.json").read_text())
    assert list(content) == ["tiny", "other"]
    row = content["tiny"]["rows"][0]
    assert row["mean"] == pytest.approx(51.0)
    assert row["std"] == pytest.approx(1.0)
    assert len(content["tiny"]["runs"]) == len(results(runs).runs)
    for name in ("results-tiny.png", "costs-tiny.png"):
        picture = (docs / "images" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert f"](images/{name})" in text


def test_a_wide_table_is_shortened(runs, tmp_path):
    """The page has the columns of the last kind of training, and another page has all."""
    finish_all(runs)
    for _ in range(2):  # the second time replaces the tables
        write_results("tiny", "command", results(runs), tmp_path)
    page, tables = ((tmp_path / f"{n}.md").read_text() for n in ("results", "results-tables"))
    head = next(line for line in page.splitlines() if line.startswith("|  |"))
    numbers = "moved → moved, accuracy, %, equal steps | moved → moved, accuracy, %, equal time | "
    numbers += "moved → moved, accuracy, %, equal parameters | learning rate |"
    assert head == f"|  | time of a step | parameters | {numbers}"
    assert "(results-tables.md#tiny)" in page
    assert tables.count("## Tiny\n") == 1
    assert tables.count("centred → moved, accuracy, %, equal steps") == 1


def test_known_results_are_taken_over(runs, tmp_path):
    finish_all(runs)
    write_results("tiny", "command", results(runs), tmp_path)
    known = json.loads((tmp_path / "results.json").read_text())["tiny"]
    elsewhere = Runs(runs.experiment, tmp_path / "new", runs.rows, BUDGETS, known=known)
    assert elsewhere.facts == FACTS
    assert table(elsewhere) == table(runs)
    changed = experiment(base={**CONTENT["base"], "model": {**CONTENT["base"]["model"], "dim": 24}})
    other = Runs(changed, tmp_path / "new", runs.rows, ["steps"], known=known)
    assert not any(other.result(run) for run in other.planned())


def test_a_figure_over_an_axis(runs, tmp_path):
    rows = {"1 layer": {"model.mixer": "attention"}, "no layer": {"model.mixer": "translution"}}
    found = experiment(rows=rows, regimes={"": {}}, tests={"": {}}, time=None, parameters=None,
                       axis="layers")  # fmt: skip
    other = Runs(found, tmp_path / "other", list(rows), ["steps"])
    other.folder.mkdir()
    for run in other.planned():
        finish(other, run, 0.5)
    facts = {"rows": dict(zip(rows, FACTS["rows"].values(), strict=True))}
    (other.folder / "facts.json").write_text(json.dumps(facts))
    whole = other.results()
    write_results("axis", "", Results(found, whole.runs, facts, whole.chosen), tmp_path)
    assert (tmp_path / "images" / "results-axis.png").stat().st_size > 2000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "rows: got {}"),
        ({"rates": []}, "rates: got "),
        ({"measures": ["speed"]}, "measures.0: got 'speed'"),
        ({"time": {"like": "no"}}, "time.like: got 'no', want one of"),
        ({"parameters": {"like": "attention", "rows": ["x"]}}, "parameters.rows: got 'x'"),
        ({"rows": {"a": {"model.mixr": "alpha"}}}, "mixr"),
        ({"rows": {"a": {"train.steps": 0}}}, "train.steps: got 0"),
        ({"rows": {"—": {}}}, "want names with a letter or digit"),
    ],
)
def test_errors(changes, message):
    if "rows" in changes:
        changes = {"time": None, "parameters": None, **changes}
    with pytest.raises(ValueError, match="test: ") as error:
        experiment(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_experiments_here_are_whole(path):
    found = load_experiment(path)
    assert found.seeds >= 3 or path.stem.startswith("screen-")  # these only sort out what to repeat
    assert found.arms(BUDGETS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_committed_runs_are_recognised(path):
    """What decides a run's numbers is hashed as it was when docs/results.json was written."""
    known = json.loads((ROOT / "docs" / "results.json").read_text("utf-8"))[path.stem]
    found = load_experiment(path)
    runs = Runs(found, ROOT / "nowhere", list(found.rows), ["steps"], known)
    planned = runs.planned()
    assert any(runs.result(run) is not None for run in planned)
    # the time on a GPU ended before all runs of these were finished
    if not path.stem.startswith("tiny-"):
        assert all(runs.result(run) is not None for run in planned)


def test_only_rows_that_are_wanted_are_timed(runs, monkeypatch):
    """The others are not in the table, and need no time of a step."""
    timed = []

    def costs(configs):
        timed.append([config.model.given["mixer"] for config in configs])
        return [FACTS["rows"]["attention"]] * len(configs)

    monkeypatch.setattr("translution.apps.experiments.runs.costs_of", costs)
    for row in runs.experiment.rows:  # the other row has results, for example of an earlier version
        for run in of(runs, Arm(row, "centred", "steps")):
            finish(runs, run, run.rate)
    (runs.folder / "facts.json").unlink()
    some = Runs(runs.experiment, runs.folder, ["attention"], ["steps"])
    assert len(some.facts["rows"]) == 1
    assert timed == [["attention"]]
    rows = markdown_table(*some.results().table()).splitlines()[2:]
    assert [line.split(" | ")[0] for line in rows] == ["| attention"]
    with_time = Runs(runs.experiment, runs.folder, ["attention"], ["steps", "time"])
    assert len(with_time.facts["rows"]) == 2
    assert timed[1:] == [["attention", "translution"]]


def test_a_row_that_is_added_keeps_the_times_of_the_others(runs, monkeypatch):
    """It is timed beside an earlier row, and gets its time as if it had been timed with that."""
    costs = {"parameters": 5, "peak_bytes": 6}
    monkeypatch.setattr(
        "translution.apps.experiments.runs.costs_of",
        lambda configs: [costs | {"step_ms": 4.0}, costs | {"step_ms": 12.0}],
    )
    found = experiment(rows=CONTENT["rows"] | {"alpha": {"model.mixer": "alpha"}})
    rows = Runs(found, runs.folder, list(found.rows), BUDGETS).facts["rows"]
    assert rows == FACTS["rows"] | {"alpha": costs | {"step_ms": 6.0}}


def test_the_experiment_of_the_docs_is_whole(tmp_path):
    text = (ROOT / "docs" / "experiments.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    found = load_experiment(tmp_path / "mine.yaml")
    assert len(found.arms(BUDGETS)) == 3 + 2 + 2


def test_a_file_extends_another(tmp_path):
    import yaml

    def write(name, content):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        return tmp_path / name

    write("one.yaml", CONTENT)
    own = {key: value for key, value in CONTENT.items() if key != "base"}
    two = write("two.yaml", own | {"extends": "one.yaml", "base": {"train": {"steps": 5}}})
    three = write("three.yaml", own | {"extends": "two.yaml"})
    for path in (two, three):
        base = load_experiment(path, ["--base.model.depth=2"]).base
        assert base["train"] == {"steps": 5, "batch_size": 8, "validate_every": 1000}
        assert base["model"] == CONTENT["base"]["model"] | {"depth": 2}
    write("one.yaml", CONTENT | {"extends": "three.yaml"})
    with pytest.raises(ValueError, match="which extends this one"):
        load_experiment(three)
    with pytest.raises(ValueError, match=r"extends: got 'none.yaml', want a file in"):
        load_experiment(write("four.yaml", own | {"extends": "none.yaml"}))
    with pytest.raises(ValueError, match="extends: got 3"):
        load_experiment(write("four.yaml", CONTENT | {"extends": 3}))


def test_from_the_command_line(tmp_path):
    """Runs, goes on where it was stopped, and only reports what is whole."""
    import yaml

    file = tmp_path / "tiny.yaml"
    content = {**CONTENT, "rates": [1e-3], "seeds": 2, "regimes": {"": {"data.moved": True}}}
    content |= {"tests": {"": {}}, "time": {"like": "Translution"}, "parameters": None}
    file.write_text(yaml.safe_dump(content))
    where = ("--out", tmp_path / "runs", "--docs", tmp_path / "docs")
    code, _, err = command("experiment", file, *where, "--rows=attention", "--budgets=steps")
    assert code == 0, err
    results = sorted((tmp_path / "runs" / "tiny").glob("*/result.json"))
    assert [p.parent.name for p in results] == [
        "steps-attention-0.001-0",
        "steps-attention-0.001-1",
    ]
    assert not list((tmp_path / "runs").glob("tiny/*/run/checkpoints"))
    before = [p.stat().st_mtime_ns for p in results]
    code, _, err = command("experiment", file, *where, "--jobs=2")
    assert code == 0, err
    assert before == [p.stat().st_mtime_ns for p in results]  # they were not made again
    assert len(list((tmp_path / "runs" / "tiny").glob("*/result.json"))) == 6
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "equal time" in page
    assert "steps)" in page
    assert "| Translution |" in page
    code, _, err = command("experiment", file, *where, "--rows", "nothing")
    assert code == 2
    assert "--rows: got 'nothing', want some of" in err
    code, _, err = command("experiment", file, "--out", tmp_path / "none", "--report")
    assert code == 2
    assert "no finished row" in err


def test_earlier_results_are_made_again(tmp_path, monkeypatch):
    """At the rate that was best then; what changed is said, and both numbers are written."""
    import yaml

    monkeypatch.chdir(tmp_path)
    content = {**CONTENT, "seeds": 2, "regimes": {"": {"data.moved": True}}, "tests": {"": {}}}
    del content["time"], content["parameters"]
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    assert command("experiment", "tiny.yaml", "--docs=docs")[0] == 0
    known = Path("docs/results.json")
    again = ("experiment", "tiny.yaml", f"--known={known}", "--repeat", "--docs=docs")
    code, out, err = command(*again)
    assert code == 0, err
    assert "tiny: 2 of 2 numbers are as before" in out
    written = json.loads(Path("docs/repeated.json").read_text())["tiny"]
    assert (
        written["command"] == "translution experiment tiny.yaml --known docs/results.json --repeat"
    )
    assert {one["row"] for one in written["results"]} == {"attention", "Translution"}
    assert all(one["numbers"][0] == one["numbers"][1] for one in written["results"])

    changed = json.loads(known.read_text())
    rate = next(one["rate"] for one in written["results"] if one["row"] == "attention")
    for run in changed["tiny"]["runs"]:
        if run["row"] == "attention" and (run["rate"], run["seed"]) == (rate, 0):
            run["tests"][""]["test_accuracy"] = 0.25
    known.write_text(json.dumps(changed))
    files = sorted(Path("runs/experiments/tiny-repeated").glob("*/result.json"))
    before = [path.stat().st_mtime_ns for path in files]
    code, out, err = command(*again)
    assert code == 0, err
    assert "tiny: 1 of 2 numbers are as before; most changed: attention, from 25.0 % to " in out
    assert [path.stat().st_mtime_ns for path in files] == before  # they were not made a third time
    code, _, err = command("experiment", "tiny.yaml", "--repeat")
    assert code == 2
    assert "--repeat: want a file with results of tiny as --known" in err
