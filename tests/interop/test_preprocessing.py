"""The description of a model's preprocessing: what it does, that it travels, what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
from PIL import Image

from translution import create_model, gpt, vit
from translution.interop.images import normalised, prepare
from translution.models.preprocessing import Preprocessing
from translution.models.pretrained import Pretrained

NAMES = tuple("abcdefghij")
DIGITS = Preprocessing((20, 20), 1, (0.5,), (0.5,), digit_size=8, canvas=20, classes=NAMES)
PHOTOS = Preprocessing((32, 24), 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 0.875, "bilinear")
VIT = {"image_size": 20, "patch_size": 5, "in_channels": 1, "num_classes": 10, "dim": 8,
       "depth": 1, "heads": 1}  # fmt: skip


def drawn(width, height, mode="L"):
    values = np.random.default_rng(0).integers(0, 255, (height, width, 4), np.uint8)
    return Image.fromarray(values, "RGBA").convert("RGB").convert(mode)


@pytest.mark.parametrize("one", [DIGITS, PHOTOS, replace(PHOTOS, classes=("cat", "chien, é"))])
def test_json_and_back(one):
    assert Preprocessing.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop": 0}, "preprocessing.crop: got 0"),
        ({"crop": "1"}, "preprocessing.crop: got '1'"),
        ({"crop": float("nan")}, "preprocessing.crop: got nan"),
        ({"image_size": 20}, "preprocessing.image_size: got 20"),
        ({"image_size": [20, 0]}, "preprocessing.image_size"),
        ({"image_size": [20, 20.0]}, "preprocessing.image_size"),
        ({"channels": 2}, "preprocessing.channels: got 2"),
        ({"channels": True}, "preprocessing.channels: got True"),
        ({"mean": [0.5, 0.5]}, "preprocessing.mean"),
        ({"mean": [float("nan")]}, "preprocessing.mean"),
        ({"std": [0.0]}, "preprocessing.std"),
        ({"std": 1.0}, "preprocessing.std: got 1.0"),
        ({"resample": "nearest"}, "preprocessing.resample: got 'nearest'"),
        ({"digit_size": 21}, "preprocessing.digit_size: got 21, want 1 to 20"),
        ({"digit_size": None}, "preprocessing.digit_size: got None"),
        ({"canvas": None}, "preprocessing.digit_size: got 8, want None"),
        ({"canvas": "20"}, "preprocessing.canvas: got '20'"),
        ({"classes": "abc"}, "preprocessing.classes: got 'abc'"),
        ({"classes": [1]}, "preprocessing.classes"),
        ({"image_sise": [2, 2]}, "got the key 'image_sise'"),
    ],
)
def test_a_wrong_description_names_the_key(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Preprocessing.from_dict(DIGITS.to_dict() | change)


def test_a_missing_key_is_named():
    content = DIGITS.to_dict()
    del content["mean"]
    with pytest.raises(ValueError, match=r"preprocessing\.mean: is missing"):
        Preprocessing.from_dict(content)
    with pytest.raises(ValueError, match="preprocessing: got None, want a dict"):
        Preprocessing.from_dict(None)


# -- images --------------------------------------------------------------------------------------


def test_a_digit_is_placed_in_the_centre():
    digit = drawn(8, 8)
    placed = prepare(digit, DIGITS)
    assert placed.shape == (1, 20, 20)
    assert torch.equal(placed[0, 6:14, 6:14], torch.from_numpy(np.array(digit)))
    assert placed.sum(dtype=torch.int64) == placed[0, 6:14, 6:14].sum(dtype=torch.int64)
    # what is on a canvas stays as it is
    canvas = Image.fromarray(placed[0].numpy())
    assert torch.equal(prepare(canvas, DIGITS), placed)
    # for a model of colours it is still one digit on black
    colours = replace(DIGITS, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(prepare(digit.convert("RGB"), colours), placed.expand(3, 20, 20))


def test_other_sizes_become_a_digits_size():
    large = drawn(28, 28)
    small = large.resize((8, 8), Image.Resampling.BICUBIC)
    assert torch.equal(prepare(large, DIGITS), prepare(small, DIGITS))
    # with the shape of the image
    placed = prepare(Image.new("L", (40, 20), 255), DIGITS)[0]
    assert bool((placed[8:12, 6:14] == 255).all())
    assert int((placed > 0).sum()) == 4 * 8
    assert prepare(Image.new("L", (400, 1), 255), DIGITS).sum() > 0


def test_a_canvas_of_another_size_than_the_image():
    described = replace(DIGITS, image_size=(40, 40))
    want = Image.fromarray(prepare(drawn(8, 8), DIGITS)[0].numpy())
    want = want.resize((40, 40), Image.Resampling.BICUBIC)
    found = prepare(drawn(8, 8), described)[0]
    assert torch.equal(found, torch.from_numpy(np.array(want)))


def test_a_photograph_is_cut_and_normalised():
    image = drawn(90, 70, "RGB")
    found = prepare(image, PHOTOS)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 32, 24)
    assert torch.equal(prepare(image.convert("RGBA"), PHOTOS), found)
    x = normalised(found[None], PHOTOS)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PHOTOS.mean, PHOTOS.std))
    assert torch.equal(x[0], (found / 255 - mean) / std)


# -- with a model --------------------------------------------------------------------------------


def test_it_travels_with_a_model(tmp_path):
    model = vit(**VIT)
    model.save_pretrained(tmp_path / "a", preprocessing=DIGITS)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["classes"] == list(NAMES)
    assert "classes" not in content["preprocessing"]
    again = Pretrained.from_pretrained(tmp_path / "a")
    assert again.preprocessing == DIGITS
    again.save_pretrained(tmp_path / "b")  # without a word
    assert Pretrained.from_pretrained(tmp_path / "b").preprocessing == DIGITS
    again.save_pretrained(tmp_path / "c", classes=[n.upper() for n in NAMES])
    found = Pretrained.from_pretrained(tmp_path / "c").preprocessing
    assert found.classes == tuple("ABCDEFGHIJ")


def test_a_folder_of_an_earlier_version_has_none(tmp_path):
    vit(**VIT).save_pretrained(tmp_path, classes=NAMES)
    assert Pretrained.from_pretrained(tmp_path).preprocessing is None


@pytest.mark.parametrize(
    ("model", "described", "said"),
    [
        (lambda: vit(**VIT), replace(DIGITS, image_size=(24, 24)), "preprocessing.image_size"),
        (lambda: vit(**VIT), PHOTOS, "preprocessing.channels: got 3, want the model's 1"),
        (lambda: vit(**VIT), replace(DIGITS, classes=("a",)), "classes: got 1 names"),
        (lambda: gpt(context=4, vocab_size=5, dim=8, depth=1, heads=1), DIGITS, "takes none"),
    ],
)
def test_that_of_another_model_is_refused(tmp_path, model, described, said):
    with pytest.raises(ValueError, match=said):
        model().save_pretrained(tmp_path / "model", preprocessing=described)
    assert not (tmp_path / "model").exists()


def test_a_wrong_file_is_named(tmp_path):
    vit(**VIT).save_pretrained(tmp_path, preprocessing=DIGITS)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for change, said in (
        ({"preprocessing": content["preprocessing"] | {"crop": 7}}, "preprocessing.crop: got 7"),
        ({"preprocessing": []}, r"preprocessing: got \[\], want a dict"),
        ({"classes": "abc"}, "classes: got 'abc'"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=rf"config\.json: {said}"):
            Pretrained.from_pretrained(tmp_path)


def test_models_of_any_size_take_any(tmp_path):
    model = create_model("resnet", depths=(1,) * 4, dim=8, heads=2, num_classes=2)
    model.save_pretrained(tmp_path, preprocessing=PHOTOS)
    assert Pretrained.from_pretrained(tmp_path).preprocessing == PHOTOS
