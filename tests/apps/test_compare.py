from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from translution.apps import cli
from translution.apps.compare import folder as folder_module
from translution.apps.compare.comparison import comparison
from translution.apps.compare.distances import accuracy_by_distance
from translution.apps.compare.folder import compare_in
from translution.apps.compare.report import table_norms
from translution.apps.data import digits as data_module
from translution.apps.data.digits import load_digits, mnist, place, read_idx, rings
from translution.apps.experiments.config import Arm, load_experiment
from translution.apps.experiments.runs import Runs
from translution.apps.training.checkpoints import open_checkpoint
from translution.apps.training.run import evaluate
from translution.apps.training.tasks import Task
from translution.models import vit
from translution.utils.measuring import TrainingStep

TINY = {
    "steps": 12, "batch_size": 16, "learning_rate": 0.01, "dim": 16, "depth": 2, "heads": 2,
    "canvas": 12, "patch": 4,
    "train_limit": 32, "test_limit": 24, "seeds": 1, "device": "cpu",
}  # fmt: skip
MIXERS = ("attention", "translution")


TITLES = ("attention, learned positions", "Translution")


def tiny(**more):
    return comparison(**(TINY | {"mixers": MIXERS} | more))


def command(monkeypatch, *arguments):
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["translution", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert compare_in(str(folder), tiny(), command="translution compare")
    return folder


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text("utf-8"))


# -- the command ---------------------------------------------------------------------------------


def test_command_line_end_to_end(tmp_path, monkeypatch, capsys, results):
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    arguments += ["--mixers=attention,translution", f"--out={tmp_path / 'out'}"]
    assert command(monkeypatch, *arguments) == 0
    told = capsys.readouterr().out
    assert "attention, learned positions, moved, seed 0: on centred" in told
    assert re.search(r"on moved \d+\.\d %  \(", told)
    again = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    # the same seed gives the same numbers; another run is the one of the fixture
    for run, other in zip(again["runs"], results["runs"], strict=True):
        for key in ("row", "regime", "seed", "tests", "valid", "by_distance", "parameters"):
            assert run[key] == other[key], key
    assert again["command"].startswith("translution compare --steps=12")


def test_another_seed_gives_other_numbers(tmp_path, results):
    compare_in(str(tmp_path), tiny(seed=5, mixers=("attention",)))
    other = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert other["runs"][0]["valid"] != results["runs"][0]["valid"]
    assert [run["seed"] for run in other["runs"]] == [5, 5]


def test_results(results, finished):
    assert results["complete"]
    assert {"python", "torch", "cpu", "cores", "threads", "device"} <= set(results["machine"])
    assert results["experiment"]["base"]["train"]["steps"] == 12
    plan = [(run["regime"], run["row"]) for run in results["runs"]]
    assert plan == [(r, m) for r in ("centred", "moved") for m in TITLES]
    for run in results["runs"]:
        assert run["steps"] == 12
        assert run["seconds"] > 0
        assert sum(ring["share"] for ring in run["by_distance"]) == pytest.approx(1)
        cost = results["facts"]["rows"][run["row"]]
        assert cost["peak_bytes"] > 4 * run["parameters"]
        assert cost["parameters"] == run["parameters"]
        assert cost["step_ms"] > 0
    first = results["rows"][0]
    assert (first["row"], first["trained"], first["tested"]) == (TITLES[0], "centred", "centred")
    accuracy = results["runs"][0]["tests"]["centred"]["test_accuracy"]
    assert first["mean"] == pytest.approx(100 * accuracy)
    assert first["std"] is None
    tested = {(row["trained"], row["tested"]) for row in results["rows"]}
    assert len(tested) == 4  # trained moved, tested centred too
    assert not [p.name for p in finished.iterdir() if p.name.startswith(".")]


def test_checkpoints_reproduce_the_accuracy(finished, results):
    experiment = tiny()
    runs = Runs(experiment, finished / "runs", TITLES, ["steps"])
    for run, told in zip(runs.planned(), results["runs"], strict=True):
        checkpoint = open_checkpoint(finished / told["folder"])
        assert [p.suffix for p in checkpoint.path.iterdir() if p.suffix == ".pt"] == []
        assert accuracy_by_distance(checkpoint.path, run)["by_distance"] == told["by_distance"]
        assert sum(p.numel() for p in checkpoint.model.parameters()) == told["parameters"]
        tested = experiment.tested(run.arm, run.seed, "moved")
        assert evaluate(checkpoint.path, "test", tested) == told["tests"]["moved"]


def test_repeating_replaces_an_earlier_comparison_only(tmp_path):
    compare_in(str(tmp_path), tiny(mixers=("attention",)))
    (tmp_path / "notes.txt").write_text("kept")
    for _ in range(2):  # a finished one is made anew, also by the same command
        compare_in(str(tmp_path), tiny(mixers=("convolution",)))
        names = {p.name for p in tmp_path.iterdir()}
        assert names == {"notes.txt", "results.json", "report.html", "runs"}
        assert {p.name for p in (tmp_path / "runs").iterdir()} == {
            "facts.json", "steps-centred-convolution-3-3-0.01-0",
            "steps-moved-convolution-3-3-0.01-0",
        }  # fmt: skip
        before = (tmp_path / "runs" / "facts.json").stat().st_mtime_ns
    assert (tmp_path / "runs" / "facts.json").stat().st_mtime_ns == before


def test_what_the_first_format_left_is_replaced_too(tmp_path):
    (tmp_path / "attention-moved-seed0.safetensors").write_text("")
    earlier = {
        "format": "translution-compare-1", "complete": False,
        "runs": [{"checkpoint": "attention-moved-seed0.safetensors"}],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    folder_module.open_folder(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_another_folder_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert command(monkeypatch, "--out", tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--mixers", "attention,atention"], "mixers"),
        (["--mixers", ""], "mixers"),
        (["--mixers", "alpha,alpha"], "mixers"),
        (["--data", "letters"], "data"),
        (["--steps", "0"], "steps"),
        (["--seeds", "0"], "seeds"),
        (["--seed", "-1"], "seed"),
        (["--canvas", "8"], "canvas"),
        (["--patch", "7"], "patch"),
        (["--heads", "5"], "heads"),
        (["--learning-rate", "0"], "learning_rate"),
        (["--device", "tpu"], "device"),
        (["--init", "zero"], "init"),
        (["--train-limit", "0"], "train_limit"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, word):
    assert command(monkeypatch, "--out", tmp_path / "out", *arguments) == 2
    told = capsys.readouterr().err.strip()
    assert word in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda'"):
        compare_in("nowhere", tiny(device="cuda"))


def interrupted_after(monkeypatch, steps):
    """Ctrl-C at a step, counted over all runs."""
    step, calls = Task.training_step, []

    def training_step(self, batch, index):
        calls.append(index)
        if len(calls) == steps + 1:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(Task, "training_step", training_step)


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted_after(patch, TINY["steps"] + 2)
        assert compare_in(str(tmp_path), tiny()) is False
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert not found["complete"]
    assert [run["row"] for run in found["runs"]] == [TITLES[0]]
    assert open_checkpoint(tmp_path / found["runs"][0]["folder"]).model
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Partial:" in page
    assert "1 of" in re.sub(r"\s+", " ", page)
    assert "1 of 4 runs are finished" in capsys.readouterr().out
    result = tmp_path / found["runs"][0]["folder"] / ".." / "result.json"
    before = result.stat().st_mtime_ns
    assert compare_in(str(tmp_path), tiny())
    assert result.stat().st_mtime_ns == before
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert found["complete"]
    assert len(found["runs"]) == 4


def test_ctrl_c_before_any_run_is_finished(tmp_path, monkeypatch):
    interrupted_after(monkeypatch, 0)
    assert compare_in(str(tmp_path), tiny()) is False
    assert "No run was finished" in (tmp_path / "report.html").read_text("utf-8")


def test_several_runs_at_a_time(tmp_path, capsys):
    """In processes of their own the runs give the same numbers, in the order of the plan."""
    found = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        assert compare_in(str(folder), tiny(mixers=("attention", "convolution")), jobs=jobs)
        found.append(json.loads((folder / "results.json").read_text("utf-8")))
        assert capsys.readouterr().out.count("on moved") == 4
    one, two = (results["runs"] for results in found)
    names = ("seed", "regime", "row", "tests", "by_distance", "parameters", "folder")
    assert [{n: run[n] for n in names} for run in two] == [
        {n: run[n] for n in names} for run in one
    ]
    for run in two:
        assert open_checkpoint(tmp_path / "2" / run["folder"]).model


def test_jobs_are_counted(tmp_path):
    with pytest.raises(ValueError, match="jobs: got -1, want at least 0"):
        compare_in(str(tmp_path), tiny(), jobs=-1)


# -- the report ----------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href") and v]
        self.ids += [attributes["id"]] if "id" in attributes else []


def test_report_is_self_contained(finished):
    page = (finished / "report.html").read_text("utf-8")
    assert "http:" not in page
    assert "https:" not in page
    parsed = Page()
    parsed.feed(page)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "@import" not in page
    assert "Partial:" not in page
    for title in (
        "Accuracy and cost", "Training curves", "Accuracy against distance moved",
        "Attention of a query patch", "Table entries over their offset", "How this was made",
    ):  # fmt: skip
        assert title in page
    assert page.count('role="img" aria-label="') >= 4  # the two curves, and translution twice


def test_viewer_data(finished):
    page = (finished / "report.html").read_text("utf-8")
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    viewer = json.loads(text[1])
    assert viewer["regimes"] == ["centred", "moved"]
    assert [s["mixer"] for s in viewer["sets"]] == [*TITLES, *TITLES]
    assert all(len(s["pixels"]) == 144 for s in viewer["samples"])
    whole, last = viewer["sets"][1]["maps"][0]
    assert np.shape(whole) == (2, 10, 10)
    assert np.shape(last) == (2, 1, 10)
    assert np.allclose(np.sum(whole, -1), 1000, atol=6)


# -- measurements --------------------------------------------------------------------------------


def test_table_norms_are_arranged_over_the_offset():
    model = vit(mixer="translution", image_size=12, patch_size=4, in_channels=1, num_classes=10,
                dim=16, depth=2, heads=2)  # fmt: skip
    tables = table_norms(model)
    assert [(t["block"], t["table"]) for t in tables] == [(0, "q"), (0, "k"), (0, "v")]
    layout = model.blocks[0].mixer.layout
    with torch.no_grad():
        centre = layout.index[1, 1]  # a token and itself
        model.blocks[0].mixer.v_proj.weight[centre] *= 3
    v = table_norms(model)[2]
    assert v["norm"].shape == (5, 5)
    assert v["norm"].argmax() == v["apart"].argmax() == 12
    assert tables[2]["apart"].max() < 1e-6  # they start equal


def test_peak_of_a_step_sees_the_activations():
    def peak(images):
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 10))
        return TrainingStep(linear, images, torch.zeros(len(images)).long()).peak_bytes()

    weights = 4 * 1010
    few, many = peak(torch.rand(10, 100)), peak(torch.rand(1000, 100))
    assert few >= 4 * weights  # weights, gradients, two moments
    assert many - few >= 4 * 10 * 990


# -- data ----------------------------------------------------------------------------------------


def test_digits_are_split_without_a_leak():
    data = load_digits()
    assert len(data.train) == 1437
    assert len(data.test) == 360
    train = {image.numpy().tobytes() for image in data.train}
    assert not any(image.numpy().tobytes() in train for image in data.test)
    assert data.train.min() == 0
    assert data.train.max() == 1
    share = torch.bincount(data.test_labels, minlength=10) / 360
    assert (share - torch.bincount(data.train_labels, minlength=10) / 1437).abs().max() < 0.01
    assert torch.equal(data.train, load_digits().train)


def test_place():
    digits = torch.rand(3, 8, 8) + 0.1
    places = torch.tensor([[0, 0], [12, 12], [3, 7]])
    images = place(digits, 20, places)
    assert images.shape == (3, 1, 20, 20)
    for image, digit, (row, column) in zip(images, digits, places, strict=True):
        assert torch.equal(image[0, row : row + 8, column : column + 8], digit)
        assert int((image != 0).sum()) == 64
    with pytest.raises(ValueError, match="want 0 to 12"):
        place(digits, 20, places + 1)


@pytest.mark.parametrize(("size", "canvas"), [(8, 20), (8, 9), (28, 84), (8, 13)])
def test_rings_cover_every_place_once(size, canvas):
    found = rings(size, canvas)
    every = torch.cat([ring.places for ring in found])
    assert len(every) == len(every.unique(dim=0)) == (canvas - size + 1) ** 2
    assert every.min() >= 0
    assert every.max() <= canvas - size
    assert (found[0].first, found[0].last, len(found[0].places)) == (0, 0, 1)
    assert sum(ring.share for ring in found) == pytest.approx(1)
    middle = (canvas - size) // 2
    for ring in found:
        far = (ring.places - middle).abs().amax(1)
        assert (int(far.min()), int(far.max())) == (ring.first, ring.last)


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def files():
    """Four small files in MNIST's manner, and their checksums."""
    random = np.random.default_rng(0)
    shapes = {"train": 6, "t10k": 4}
    contents = {}
    for part, n in shapes.items():
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        contents[f"{part}-images-idx3-ubyte"] = idx(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8))
    return contents, {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()}


def fill(folder, contents, packed):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_from_files(tmp_path, files, packed):
    contents, checksums = files
    data = mnist(fill(tmp_path, contents, packed), sources=(), checksums=checksums)
    assert data.train.shape == (6, 28, 28)
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    raw = read_idx(contents["train-images-idx3-ubyte"], "x")
    assert np.array_equal((data.train * 255).round().numpy(), raw)


def test_mnist_is_downloaded_once(tmp_path, files):
    contents, checksums = files
    source = fill(tmp_path / "source", contents, packed=True).as_uri() + "/"
    target = tmp_path / "target"
    nowhere = (tmp_path / "nowhere").as_uri() + "/"
    first = mnist(target, sources=(nowhere, source), checksums=checksums)
    assert sorted(p.name for p in target.iterdir()) == sorted(f"{n}.gz" for n in contents)
    again = mnist(target, sources=(), checksums=checksums)
    assert torch.equal(first.train, again.train)


def test_a_wrong_download_is_not_kept(tmp_path, files):
    contents, checksums = files
    wrong = {name: content[:-1] + b"x" for name, content in contents.items()}
    source = fill(tmp_path / "source", wrong, packed=True).as_uri() + "/"
    with pytest.raises(OSError, match=r"cannot download .*SHA-256"):
        mnist(tmp_path / "target", sources=(source,), checksums=checksums)
    assert not list((tmp_path / "target").iterdir())


def test_damaged_files_are_named(tmp_path, files):
    contents, checksums = files
    fill(tmp_path, contents, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: damaged gzip file"):
        mnist(tmp_path, sources=(), checksums=checksums)
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: the SHA-256"):
        mnist(tmp_path, sources=(), checksums=checksums)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01" + bytes(8), "not an IDX file"),
        (b"\x00\x00\x08\x03" + bytes(3), "cut off within its header"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "got 5 bytes of data, want 6"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "got 7 bytes of data, want 6"),
    ],
)
def test_idx_that_is_not_right(content, problem):
    with pytest.raises(ValueError, match=f"somewhere: {problem}"):
        read_idx(content, "somewhere")


def test_mnist_checksums_have_the_right_shape():
    assert len(data_module.MNIST) == 4
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in data_module.MNIST.values())


def test_a_missing_folder_and_no_network_is_one_clear_error(tmp_path):
    with pytest.raises(OSError, match="use --data digits"):
        mnist(tmp_path, sources=((tmp_path / "nowhere").as_uri() + "/",))


def test_importing_the_command_is_light():
    code = (
        "import sys, translution.apps.compare.command;"
        "print([m for m in ('lightning', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    there = {path.name for path in Path(folder_module.__file__).parent.iterdir()}
    assert {"report.html.jinja", "digits.yaml", "mnist.yaml"} <= there


def test_few_packages_are_enough(tmp_path):
    """It runs with the packages of the extra `compare` alone; those of others are hidden.

    All but what other libraries import themselves where it is installed, such as transformers.
    """
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | {"steps": 2}).items()]
    code = f"""
import sys
HIDDEN = {{"kornia", "tensorboard", "tensorboardX", "datasets", "pyarrow", "triton", "nicegui"}}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Finder())
sys.argv = ["translution", "compare", "--out", {str(tmp_path / "out")!r}, "--mixers", "alpha",
            "--jobs", "1", *{arguments!r}]
from translution.apps import cli
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_its_files_are_what_it_compares_by_default(data):
    """`translution experiment` gives the same runs from the file that the command begins with."""
    file = load_experiment(Path(folder_module.__file__).with_name(f"{data}.yaml"))
    made = comparison(data, data_dir="data/mnist" if data == "mnist" else None)
    arm = Arm("ACmix", "moved", "steps")
    mine, its = (e.config(arm, e.rates[0], 2).model_dump() for e in (file, made))
    for content in (mine, its):
        content["train"].pop("log_every")
    assert mine == its
    assert list(file.rows) == list(made.rows)
