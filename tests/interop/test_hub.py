"""Saving and sharing: a folder alone makes the model again, and says what is wrong with itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

import translution
from translution.models import GPT, ResNet, ViT, create_model
from translution.models.blocks import TABLE_MIXERS
from translution.models.card import model_card
from translution.models.description import Description, read_description, write_description
from translution.models.pretrained import MARK, Pretrained, find_checkpoint
from translution.models.weights import read_weights

# One of each family, small.
SMALL = {
    "vit": {"image_size": (8, 12), "patch_size": 4, "dim": 12, "depth": 2, "heads": 2,
            "num_classes": 3, "window": (1, 2)},
    "gpt": {"context": 6, "vocab_size": 11, "dim": 12, "depth": 1, "heads": 2},
    "resnet": {"depths": (1,) * 4, "dim": 8, "heads": 2, "num_classes": 3, "features_only": True},
    "san": {"depths": (1,) * 5, "dim": 16, "group_size": 2, "num_classes": 3},
    "pvt": {"depths": (1,) * 4, "dims": (8,) * 4, "heads": (1, 1, 2, 2), "num_classes": 3,
            "image_size": (64, 32)},
    "swin": {"depths": (1,) * 4, "dim": 8, "heads": (1, 1, 2, 2), "num_classes": 3},
}  # fmt: skip


def make(family="vit", **more):
    torch.manual_seed(0)
    return create_model(family, **(SMALL[family] | more))


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", SMALL)
def test_every_family_makes_the_round_trip(tmp_path, family):
    model = make(family)
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = type(model).from_pretrained(tmp_path / "deep" / "folder")
    assert type(again) is type(model)
    assert again.config == model.config
    assert same(model, again)
    assert not again.training
    assert {p.name for p in (tmp_path / "deep" / "folder").iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(
    mixer=st.sampled_from(["attention", "rotary", "bias", "translution", "alpha"]),
    depth=st.integers(1, 2),
    relative=st.sampled_from(["", "q", "kv"]),
    buckets=st.sampled_from([None, 2]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_options_and_dtype(tmp_path_factory, mixer, depth, relative, buckets, dtype):
    folder = tmp_path_factory.mktemp("any")
    options = {"depth": depth, "buckets": buckets}
    options |= {"relative": relative} if mixer in TABLE_MIXERS else {}
    model = make("gpt", mixer=mixer, **options).to(dtype).eval()
    model.save_pretrained(folder)
    again = Pretrained.from_pretrained(folder)  # any class
    ids = torch.randint(0, 11, (2, 6))
    assert again.config == model.config
    assert again.head.weight.dtype == dtype
    assert torch.equal(model(ids), again(ids))


def test_options_that_the_mixer_does_not_use_are_left_out_of_earlier_files(tmp_path):
    model = make("gpt", mixer="attention")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["options"] |= {"relative": "kv", "rank": 3, "relative_layers": None, "rotary": True}
    del config["options"]["position"], config["options"]["relative_depth"]
    path.write_text(json.dumps(config))
    again = Pretrained.from_pretrained(tmp_path)
    assert (again.config.relative, again.config.rank, again.config.position) == ("qkv", 8, "none")


def test_the_configuration_alone_is_enough(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == "translution-checkpoint-2"
    assert config["translution"] == translution.__version__
    rebuilt = create_model(config["architecture"], **config["options"])
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in make().state_dict().items()
    }


def test_tied_weights_stay_tied(tmp_path):
    model = make("gpt", mixer="rotary").eval()
    model.head.weight = model.embed.weight
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    assert same(model, again)
    assert (
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |"
        in (tmp_path / "README.md").read_text()
    )
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    change(tmp_path / "config.json", tied=[["embed.weight", "nothing"]])
    with pytest.raises(ValueError, match=r"config.json: tied: 'nothing' cannot be"):
        GPT.from_pretrained(tmp_path)


def test_saved_models_have_hashes_and_finite_weights(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "one")
    content = bytearray((tmp_path / "one" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "one" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: was changed or damaged"):
        ViT.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.head.bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"weights: head.bias have values that are not finite"):
        model.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_models_of_the_first_version_are_read(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    old = {k: content[k] for k in ("translution", "architecture", "options")}
    file.write_text(json.dumps(old | {"format": "translution-model-1"}))
    assert same(ViT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", ["resnet", "swin", "san", "pvt"])
def test_models_that_once_had_acmix(tmp_path, name):
    """A family's name means the network of that name; a file of an earlier format means ACmix."""
    assert create_model(name).config.mixer in ("convolution", "attention")
    (tmp_path / "config.json").write_text(
        json.dumps({"format": "translution-model-1", "architecture": name, "options": {"dim": 64}})
    )
    assert read_description(tmp_path).options == {"mixer": "acmix", "dim": 64}


def test_a_users_subclass_comes_back(tmp_path):
    class Mine(ViT):
        pass

    model = Mine(make().config)
    model.save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path)
    assert type(again) is Mine
    assert same(model, again)


def test_card(tmp_path):
    model = make()
    results = {"accuracy | test, %": 97.25, "loss": 0.1}
    model.save_pretrained(tmp_path, "Digits.", results, classes=["one", "two", "three"])
    card = (tmp_path / "README.md").read_text()
    parameters = sum(p.numel() for p in model.parameters())
    for part in (
        "library_name: translution", "pipeline_tag: image-classification", "Digits.", "8×12",
        f"| parameters | {parameters:,} |", "| mixer | translution |", "3: one, two, three",
        r"| accuracy \| test, % | 97.25 |", "ViT.from_pretrained", MARK,
    ):  # fmt: skip
        assert part in card
    assert json.loads((tmp_path / "config.json").read_text())["classes"] == ["one", "two", "three"]
    # written anew while it is ours, and left alone when it is somebody's
    model.save_pretrained(tmp_path, "Other digits.")
    assert "Other digits." in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path, "Digits.")
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_the_card_counts_what_is_computed():
    """Of one linear map more per token, its multiply-adds more."""
    with torch.device("meta"):
        one, two = (make("gpt", mixer="attention", vocab_size=v) for v in (11, 1_000_011))
    cards = [model_card(model, "gpt", "text-generation") for model in (one, two)]
    counts = [
        float(next(line for line in card.splitlines() if "multiply-adds" in line).split()[-3])
        for card in cards
    ]
    assert counts[1] == pytest.approx(6 * 12 * 1e6 / 1e9, rel=0.01)
    assert "a text of 6 tokens" in cards[0]


def test_saving_refuses_another_model(tmp_path):
    model = make()
    for wrong in ({"data": 3}, {"data": ["a"]}, {"results": "x"}, {"results": {"a": "b"}}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: got .*, want"):
            model.save_pretrained(tmp_path / "wrong", **wrong)
        assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match=r"classes: got 2 names, but the model has 3 classes"):
        model.save_pretrained(tmp_path, classes=["a", "b"])
    model.head = torch.nn.Linear(12, 5)
    with pytest.raises(ValueError, match=r"head.weight has shape \(5, 12\), want \(3, 12\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_file(tmp_path):
    make().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    text = config.read_text()
    with pytest.raises(ValueError, match=r"is a ViT, want a GPT"):
        GPT.from_pretrained(tmp_path)
    change(config, format="translution-checkpoint-3")
    with pytest.raises(ValueError, match=r"config.json: format 'translution-checkpoint-3'.*newer"):
        ViT.from_pretrained(tmp_path)
    for broken in ("{", "[]", '{"model_type": "bert"}', '{"format": 1, "architecture": "vit"}'):
        config.write_text(broken)
        with pytest.raises(ValueError, match=r"config.json: not a translution model"):
            ViT.from_pretrained(tmp_path)
    config.write_text(text)
    change(config, options=[])
    with pytest.raises(ValueError, match=r"config.json: options: got \[\], want a dict"):
        ViT.from_pretrained(tmp_path)
    config.write_text(text)
    change(config, architecture="vti")
    with pytest.raises(ValueError, match=r"config.json: 'vti': name: there is no model 'vti'.*vit"):
        ViT.from_pretrained(tmp_path)
    config.write_text(text.replace('"rank"', '"rnak"'))
    with pytest.raises(ValueError, match=r"config.json: 'vit': option of ViTConfig: got 'rnak'"):
        ViT.from_pretrained(tmp_path)
    config.write_text(text)

    tensors = load_file(weights)
    tensors["head.bias"] = torch.zeros(4)
    del tensors["cls_token"]
    save_file(tensors | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="safetensors: does not fit") as error:
        ViT.from_pretrained(tmp_path)
    for part in ("cls_token is missing", "extra is not in the model", "head.bias has shape (4,)"):
        assert part in str(error.value)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        ViT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: is missing$"):
        ViT.from_pretrained(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match=r"parts/division.json: is missing$"):
        read_weights(tmp_path, read_description(tmp_path))


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.head.bias += 1
    wanted = load_file(tmp_path / "model.safetensors")

    def fail(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_training_runs_folder(tmp_path):
    """Its best checkpoint, as training writes it; `test_exported` has a real one."""
    models = {}
    for seed, name in enumerate(("last-000009", "best-000005", "best-000006")):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        models[name] = model = make("gpt")
        with torch.no_grad():
            model.head.weight += seed
        save_file(model.state_dict(), folder / "model.safetensors")
        described = Description("gpt", SMALL["gpt"], config={}, step=int(name[-1]))
        write_description(folder, "checkpoint.json", described, ["model.safetensors"])
    assert same(GPT.from_pretrained(tmp_path), models["best-000006"])
    last = tmp_path / "checkpoints" / "last-000009"
    assert same(Pretrained.from_pretrained(last), models["last-000009"])
    assert find_checkpoint(tmp_path).name == "best-000006"
    with pytest.raises(ValueError, match=r"is a GPT, want a ResNet"):
        ResNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        GPT.from_pretrained(last.parent)
    with pytest.raises(ValueError, match="is not a folder, want one"):
        GPT.from_pretrained(tmp_path / "nowhere" / "at all")


def test_exported(tmp_path):
    """From a training checkpoint to a folder to share."""
    for name in ("lightning", "tokenizers", "yaml"):
        pytest.importorskip(name)
    from translution.apps.data.tokenizers import TokenizerOptions, make_tokenizer
    from translution.apps.training.checkpoints import Checkpoint, open_checkpoint

    config = {"data": {"kind": "text", "train": "books"}, "train": {"steps": 5}, "seed": 0}
    tokenizer = make_tokenizer(TokenizerOptions())
    checkpoint = Checkpoint(tmp_path, make("gpt"), config, 1234, None, tokenizer, {"loss": 1.5})
    checkpoint.export(tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    for part in ("1,234 steps", "train: books", "| loss | 1.5 |", "text-generation"):
        assert part in card
    assert (tmp_path / "shared" / "tokenizer.json").is_file()
    assert same(GPT.from_pretrained(tmp_path / "shared"), checkpoint.model)
    described = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert set(described["files"]) == {"model.safetensors", "tokenizer.json"}
    assert described["options"]["vocab_size"] != 257  # this small model fits no tokenizer
    description = Description("gpt", SMALL["gpt"], config=config)
    folder = tmp_path / "checkpoint"
    (tmp_path / "shared").rename(folder)
    (folder / "config.json").unlink()
    write_description(folder, "checkpoint.json", description, ["model.safetensors"])
    with pytest.raises(ValueError, match=r"tokenizer.json: has 257 tokens, but the model 11"):
        open_checkpoint(folder)
    write_description(
        folder, "checkpoint.json", description, ["model.safetensors", "tokenizer.json"]
    )
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer.json: was changed or damaged"):
        open_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json: is missing"):
        open_checkpoint(folder)
    checkpoint.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="model: got Linear"):
        checkpoint.export(tmp_path / "shared")


class FakeHub:
    """A Hub in a folder."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, **keywords):  # HfApi(...)
        self.calls.append(keywords)
        return self

    def create_repo(self, name, **keywords):
        self.calls.append(keywords)
        (self.folder / name).mkdir(parents=True)
        return type("Repo", (), {"repo_id": name})

    def upload_folder(self, repo_id, folder_path, **keywords):
        self.calls.append(keywords)
        for file in Path(folder_path).iterdir():
            (self.folder / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://here/{repo_id}"

    def snapshot_download(self, name, allow_patterns, **keywords):
        self.calls.append(keywords)
        assert "README.md" not in allow_patterns
        return str(self.folder / name)


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "HfApi", fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    model = make()
    url = model.push_to_hub("me/model", data="Digits.", private=True, token="t", revision="dev")
    assert url == "https://here/me/model"
    assert "Digits." in (tmp_path / "me" / "model" / "README.md").read_text()
    assert same(ViT.from_pretrained("me/model", revision="dev"), model)
    made, repo, commit, download = fake.calls
    assert made["token"] == "t"
    assert repo["private"] is True
    assert commit["revision"] == "dev"
    assert commit["commit_message"]
    assert download == {"revision": "dev"}
    with pytest.raises(ValueError, match=r"revision: .* is a folder"):
        ViT.from_pretrained(tmp_path, revision="dev")


def test_a_name_that_the_hub_lacks(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        ValueError,
        match=r"nobody/nothing is not a folder, and could not be downloaded .*: no network",
    ):
        ViT.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"source: ./nothing is not a folder"):
        ViT.from_pretrained("./nothing")


def test_without_the_packages():
    """Models work, and say what saving needs."""
    code = """
import sys
for name in ("safetensors", "safetensors.torch", "huggingface_hub"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
import torch, translution
model = translution.create_model("gpt", depth=1, dim=6, context=4, vocab_size=5)
model(torch.zeros(1, 4).long())
for call in (lambda: model.save_pretrained("."), lambda: model.push_to_hub("a/b"),
             lambda: translution.GPT.from_pretrained("a/b")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{package} is not installed; pip install 'translution[hub]'"
        for package in ("safetensors", "huggingface_hub", "huggingface_hub")
    ]
