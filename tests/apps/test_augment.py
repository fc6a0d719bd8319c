"""Augmentation: exact where it can be, like Pillow's where that is the custom, and seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError

from translution.apps.data.augment import Augment, AugmentOptions, _cut, _operations, _rectangles

ALL = {
    "pad": 2, "flip": 0.5, "randaugment": (2, 9), "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def noise(b=6, c=3, h=16, w=12) -> torch.Tensor:
    return torch.randint(256, (b, c, h, w), dtype=torch.uint8)


def augment(images: torch.Tensor, plain: bool = False, **options) -> Augment:
    """plain: values from 0 to 1 come out."""
    c = images.shape[1]
    mean, std = ((0.0,) * c, (1.0,) * c) if plain else (MEAN[:c], STD[:c])
    return Augment(AugmentOptions(**options), 5, images.shape[2:], mean, std)


def labels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(images)) % 5


def test_evaluation_is_normalisation_alone():
    images = noise()
    module = augment(images, **ALL).eval()
    got, targets = module(images, labels(images))
    want = (images.numpy() / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)
    assert torch.equal(targets, labels(images))
    assert not list(module.parameters())
    assert not module.state_dict()


def test_as_it_stands_training_changes_nothing():
    images = noise()
    module = augment(images)
    assert torch.equal(module(images, labels(images))[0], module.eval()(images, labels(images))[0])


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", [*ALL, "all"])
def test_equal_seeds_give_equal_pixels(name, c):
    images = noise(32, c)
    before = images.clone()
    module = augment(images, **(ALL if name == "all" else {name: ALL[name]}))

    def run(seed):
        torch.manual_seed(seed)
        return module(images, labels(images))

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, before)
    assert first[0].isfinite().all()
    assert first[0].shape == images.shape
    assert first[0].dtype == torch.float32


def test_flip():
    images = noise(200)
    got, _ = augment(images, plain=True, flip=0.25)(images, labels(images))
    mirrored = [torch.equal(g, i.flip(-1)) for g, i in zip(got, images / 255, strict=True)]
    same = [torch.equal(g, i) for g, i in zip(got, images / 255, strict=True)]
    assert sum(mirrored) + sum(same) == 200
    assert 25 < sum(mirrored) < 75


def test_pad_is_a_cut_out_of_the_padded_image():
    images = noise(60, h=6, w=5)
    got, _ = augment(images, plain=True, pad=2)(images, labels(images))
    padded = torch.nn.functional.pad(images / 255, (2, 2, 2, 2))
    places = set()
    for out, source in zip(got, padded, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(out, source[:, y : y + 6, x : x + 5])
        ]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 15


def test_erasing_leaves_the_mean_in_a_rectangle():
    images = noise(300, h=20, w=20)
    got, _ = augment(images, erasing=0.5)(images, labels(images))
    want, _ = augment(images)(images, labels(images))
    gone = (got.abs() < 1e-6).all(1)
    assert torch.equal(torch.where(gone[:, None], 0, want), torch.where(gone[:, None], 0, got))
    erased = gone.flatten(1).sum(1)
    assert 110 < int((erased > 4).sum()) < 190
    assert erased.max() / 400 < 0.37
    assert erased[erased > 4].float().mean() / 400 == pytest.approx(0.176, abs=0.03)


@given(st.integers(1, 9), st.integers(1, 9))
def test_rectangles_of_any_size(h, w):
    inside = _rectangles(torch.zeros(5, 3, h, w))
    for one in inside[:, 0]:
        rows, columns = one.any(1), one.any(0)
        assert one.any()
        assert torch.equal(one, rows[:, None] & columns)


def test_mixup():
    images = noise(8)
    module = augment(images, plain=True, mixup=0.8)
    got, targets = module(images, labels(images))
    assert targets.shape == (8, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    share = None
    for i in range(8):  # some other image j and one share explain each
        residual = got[i] - images[i] / 255
        fits = []
        for j in range(8):
            step = (images[j] - images[i].float()) / 255
            s = float((residual * step).sum() / (step * step).sum().clamp(min=1e-9))
            if (residual - s * step).abs().max() < 1e-5:
                fits.append((j, s))
        assert fits
        j, s = fits[0]
        if abs(s) > 1e-6:  # otherwise it was mixed with itself
            share = s if share is None else share
            assert s == pytest.approx(share, abs=1e-4)
            want = torch.zeros(5)
            want[i % 5] += 1 - s
            want[j % 5] += s
            torch.testing.assert_close(targets[i], want, atol=1e-4, rtol=0)


def test_cutmix():
    """Each image is constant, so that its pixels tell where they are from."""
    images = (torch.arange(6) * 40).byte()[:, None, None, None].expand(-1, 3, 16, 12).contiguous()
    module = augment(images, plain=True, cutmix=1.0)
    seen = 0
    for _ in range(10):
        got, targets = module(images, torch.tensor([0, 1, 2, 3, 4, 0]))
        source = (got[:, 0] * 255 / 40).round().long()
        for i in range(6):
            counts = torch.bincount(source[i].flatten(), minlength=6) / (16 * 12)
            want = counts[:5].clone()
            want[0] += counts[5]
            torch.testing.assert_close(targets[i], want, atol=1e-5, rtol=0)
            other = source[i] != i
            rows, columns = other.any(1), other.any(0)
            assert torch.equal(other, rows[:, None] & columns)
            seen += bool(other.any())
    assert seen > 10


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_the_share_is_that_of_the_box(h, w, share):
    (rows, columns), got = _cut(h, w, share)
    box = torch.zeros(h, w)
    box[rows, columns] = 1
    assert float(box.mean()) == pytest.approx(got)
    assert 0 <= rows.start <= rows.stop <= h
    assert 0 <= columns.start <= columns.stop <= w


def test_each_batch_draws_one_way_of_mixing():
    images = (torch.arange(6) * 40).byte()[:, None, None, None].expand(-1, 3, 16, 12).contiguous()
    module = augment(images, plain=True, mixup=0.8, cutmix=1.0, mix=0.5)
    kinds = {"cut": 0, "mixed": 0, "neither": 0}
    for _ in range(200):
        got, targets = module(images, labels(images))
        flat = got.flatten(1)
        if (flat.amax(1) > flat.amin(1)).any():
            kinds["cut"] += 1
        elif torch.equal(got, images / 255):
            kinds["neither"] += 1
        else:
            kinds["mixed"] += 1
        assert targets.shape == (6, 5)  # also where a batch is not mixed
    assert 70 < kinds["neither"] < 135
    assert kinds["cut"] > 25
    assert kinds["mixed"] > 25


NAMES = (
    "identity", "autocontrast", "equalize", "rotate", "posterize", "solarize", "colour",
    "contrast", "brightness", "sharpness", "shear x", "shear y", "translate x", "translate y",
)  # fmt: skip


def pillow(image: Image.Image, name: str, s: float) -> Image.Image:
    """The same by Pillow, at level s from -1 to 1."""
    enhance = {
        "colour": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    w, h = image.size
    warps = {
        "shear x": (1, -0.3 * s, 0.3 * s * h / 2, 0, 1, 0),
        "shear y": (1, 0, 0, -0.3 * s, 1, 0.3 * s * w / 2),
        "translate x": (1, 0, -0.45 * s * w, 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, -0.45 * s * h),
    }
    if name in enhance:
        return enhance[name](image).enhance(1 + 0.9 * s)
    if name in warps:
        how = Image.Resampling.BILINEAR
        return image.transform(
            (w, h), Image.Transform.AFFINE, warps[name], how, fillcolor=(128,) * 3
        )
    if name == "rotate":
        return image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * abs(s)))
    if name == "solarize":
        return ImageOps.solarize(image, 256 * (1 - abs(s)))
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}.get(
        name, lambda image: image
    )(image)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s", [0.0, 0.4, -0.8, 1.0])
def test_operations_agree_with_pillow(name, s):
    rows, columns = np.mgrid[:40, :30]
    wave = 110 + 60 * np.sin(rows[..., None] / 5 + np.arange(3)) + columns[..., None]
    image = Image.fromarray(wave.astype(np.uint8))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    operation = _operations()[NAMES.index(name)]
    got = operation(x.repeat(2, 1, 1, 1), torch.tensor([s, s])).clamp(0, 1) * 255
    assert torch.equal(got[0], got[1])
    want = torch.from_numpy(np.array(pillow(image, name, s))).permute(2, 0, 1).float()
    apart = (got[0] - want).abs()
    # Pillow rounds, and treats the border between image and filling in its own way
    assert apart.median() <= 1.5
    assert apart.mean() < 3
    if name not in ("rotate", "equalize") and not name.startswith(("shear", "translate")):
        assert apart.max() <= 2


def test_at_magnitude_0_nothing_but_the_contrast_changes():
    x = torch.rand(4, 3, 9, 9)
    x[0, :, 0, 0] = 1.0
    x = (x * 255).round() / 255
    for name, operation in zip(NAMES, _operations(), strict=True):
        if name not in ("autocontrast", "equalize"):
            torch.testing.assert_close(operation(x, torch.zeros(4)), x, atol=1e-5, rtol=0)


def test_randaugment_draws_for_each_image():
    image = noise(1, h=20, w=20)
    images = image.repeat(64, 1, 1, 1)
    got, _ = augment(images, plain=True, randaugment=(1, 15))(images, labels(images))
    kinds = {g.numpy().round(4).tobytes() for g in got}
    assert 8 < len(kinds) <= 25  # of 14 operations, 10 of them of two signs
    assert got.min() >= 0
    assert got.max() <= 1


def test_autocast_does_not_reach_the_pixels():
    images = noise()
    module = augment(images, **ALL)
    torch.manual_seed(0)
    want, _ = module(images, labels(images))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = module(images, labels(images))
    assert torch.equal(got, want)


def test_an_empty_batch_and_one_of_one():
    images = noise(1)
    module = augment(images, **ALL)
    got, targets = module(images, labels(images))
    assert got.shape == images.shape
    torch.testing.assert_close(targets.sum(1), torch.ones(1))
    for _ in range(5):
        got, targets = module(
            torch.zeros(0, 0, 0, 0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        )
        assert got.shape == (0, 3, 16, 12)
        assert targets.shape == (0, 5)


def test_what_is_refused():
    images = noise()
    module = augment(images)
    with pytest.raises(ValueError, match=r"images: got torch.float32 \[6, 3, 16, 12\]"):
        module(images.float(), labels(images))
    with pytest.raises(ValueError, match=r"want torch.uint8 \['b', 3, 16, 12\]"):
        module(images[..., :5], labels(images))
    with pytest.raises(ValueError, match="and 5 labels, want"):
        module(images, labels(images)[:5])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"resized_crop": [0, 1]}, r"resized_crop: got \[0.0, 1.0\]"),
        ({"resized_crop": [0.5, 0.2]}, "resized_crop: got"),
        ({"resized_crop": [0.5, 1.2]}, "resized_crop: got"),
        ({"ratio": [0, 1]}, "ratio: got"),
        ({"ratio": [2, 1]}, "ratio: got"),
        ({"randaugment": [0, 9]}, r"randaugment: got \[0, 9\]"),
        ({"randaugment": [2, 31]}, r"randaugment: got \[2, 31\]"),
        ({"flip": 1.5}, "flip"),
        ({"erasing": -0.1}, "erasing"),
        ({"pad": -1}, "pad"),
        ({"mixup": float("inf")}, r"mixup\n *Input should be a finite number"),
        ({"cutmix": -1}, "cutmix"),
        ({"mix": 2}, "mix"),
        ({"blur": 1}, "blur"),
    ],
)
def test_options_that_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        AugmentOptions(**given)
