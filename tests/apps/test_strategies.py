"""Runs on two devices (gloo on the CPU, started by torchrun) against the run on one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("pydantic")
pytest.importorskip("kornia")
from lightning import Callback, Trainer

from translution.apps.config import parse
from translution.apps.training import run
from translution.apps.training.checkpoints import open_checkpoint
from translution.apps.training.config import Config
from translution.apps.training.tasks import Task

TINY = {
    "model": {"name": "vit", "mixer": "translution", "patch_size": 4, "dim": 8, "depth": 2,
              "heads": 2},
    "data": {"kind": "images", "format": "digits", "canvas": 12, "moved": True,
             "train_limit": 64, "valid_limit": 9},
    "train": {"steps": 4, "batch_size": 8, "accumulate": 2, "clip": 0.5, "decay": "matrices",
              "validate_every": 2, "save_every": 2, "device": "cpu", "betas": [0.5, 0.5],
              "schedule": "constant"},
}  # fmt: skip


SGD = ["train.optimizer=sgd", "train.betas=[0.9, 0.999]", "train.learning_rate=0.1"]


def gradients_of(folder: Path, strategy: str, devices: int, steps: int) -> None:
    """Train in float64, and keep each step's gradients. A folder named "sgd…" is one of SGD."""
    kept = []
    torch.set_default_dtype(torch.float64)

    def keep(task: Task, optimizer: torch.optim.Optimizer) -> None:
        grads = {}
        for name, parameter in task.model.named_parameters():
            grad = parameter.grad
            if hasattr(grad, "full_tensor"):
                grad = grad.full_tensor()
            grads[name] = grad.clone()
        kept.append(grads)

    hook, Task.on_before_optimizer_step = Task.on_before_optimizer_step, keep
    changes = [f"train.devices={devices}", f"train.steps={steps}"]
    if strategy == "offset":
        changes += [f"train.offset_ranks={devices}"]
    else:
        changes += [f"train.strategy={strategy}"]
    changes += SGD if folder.name.startswith("sgd") else []
    config = parse(Config, TINY, "here", changes)
    try:
        run.train(config, folder, resume=True)
    finally:
        torch.set_default_dtype(torch.float32)
        Task.on_before_optimizer_step = hook
    if int(os.environ.get("RANK", 0)) == 0 and kept:
        torch.save(kept, folder / "gradients.pt")


class Listening(Callback):
    """Writes the addresses that this process listens on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        inodes = {path.stat().st_ino for path in Path("/proc/self/fd").iterdir() if path.exists()}
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[9]) in inodes:  # it listens
                    found.append(fields[1].partition(":")[0])
        (self.folder / f"rank-{trainer.global_rank}").write_text("\n".join(found))


if __name__ == "__main__" and sys.argv[2:] == ["loopback"]:
    torch.set_num_threads(1)
    started = parse(Config, TINY, "here", ["train.devices=2", "train.steps=1"])
    folder = Path(sys.argv[1])
    run.train(started, folder / "run", callbacks=[Listening(folder)])
    sys.exit()

if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[2:]:
        name, strategy, steps = argument.split(":")
        gradients_of(Path(sys.argv[1]) / name, strategy, 2, int(steps))
    sys.exit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each strategy on two from the start, and some going on from where another ended."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
        str(20_000 + os.getpid() % 20_000), __file__, str(folder),
        "ddp:ddp:4", "fsdp:fsdp:4", "both:ddp:2", "both:fsdp:4", "half:fsdp:2", "offset:offset:4",
        "part:offset:2", "mixed:ddp:2", "mixed:offset:4", "sgd:fsdp:2", "sgd:offset:4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    gradients_of(folder / "one", "auto", 1, 4)
    gradients_of(folder / "sgd-one", "auto", 1, 4)
    shutil.copytree(folder / "half", folder / "back")
    gradients_of(folder / "back", "auto", 1, 4)
    shutil.copytree(folder / "part", folder / "alone")
    gradients_of(folder / "alone", "auto", 1, 4)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_gradients_equal_those_of_one_process(runs, name):
    one = torch.load(runs / "one" / "gradients.pt", weights_only=True)
    two = torch.load(runs / name / "gradients.pt", weights_only=True)
    assert len(one) == len(two) == 4
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(theirs[key], mine[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "both", "back", "offset", "mixed", "alone", "sgd"])
def test_weights_and_metrics_equal_those_of_one_process(runs, name):
    """Also where a run goes on with another strategy: optimizer states find their parameters."""
    alone = "sgd-one" if name == "sgd" else "one"
    one, two = (open_checkpoint(runs / n / "checkpoints" / "last-000004") for n in (alone, name))
    for (key, mine), theirs in zip(
        one.model.state_dict().items(), two.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-7, msg=key)
    assert two.metrics == pytest.approx(one.metrics, rel=1e-6)


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's tables")
def test_two_devices_of_one_machine_listen_on_the_loopback_interface_only(tmp_path):
    command = [sys.executable, __file__, str(tmp_path), "loopback"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(2)]
    assert found[0]  # the store
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert {*found[0], *found[1]} <= loopback


def test_fsdp_has_no_averaged_weights(tmp_path):
    config = parse(Config, TINY, "here", ["train.strategy=fsdp", "train.ema=0.9"])
    with pytest.raises(ValueError, match=r"train.ema: got 0.9, want none with"):
        run.train(config, tmp_path / "run")
