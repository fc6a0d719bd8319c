"""Augmentation: exact where it can be, like torchvision's where that is the custom, and seeded."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from translution.apps.data.augment import Augment, AugmentOptions, _cut, _rectangles
from translution.apps.data.rand_augment import RandAugmentOptions, make_operations

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
    "identity", "autocontrast", "equalize", "rotate", "posterize", "solarize", "saturation",
    "contrast", "brightness", "sharpness", "shear x", "shear y", "translate x", "translate y",
)  # fmt: skip


def operation(name: str, **options):
    """One of the operations, which takes images and levels."""
    given = RandAugmentOptions(operations=1, magnitude=9, **options)
    mean = torch.tensor(MEAN)[:, None, None]
    return make_operations(given, mean)[NAMES.index(name)]


def picture(h=40, w=30, c=3) -> np.ndarray:
    """Values from 0 to 255, [height, width, channels], that differ between channels."""
    rows, columns = np.mgrid[:h, :w]
    wave = 110 + 60 * np.sin(rows[..., None] / 5 + np.arange(c)) + columns[..., None]
    return wave.astype(np.uint8)


def as_pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] / 255


# The following is written from torchvision's documentation: an affine map is T C R Shy Shx C⁻¹,
# where T shifts, C moves the centre, R rotates, and a shear by an angle has minus its tangent. Its
# inverse says where the middle of a pixel is sampled, for which the top left corner is (0, 0).


def matrix(centre, angle=0.0, shift=(0.0, 0.0), shear=(0.0, 0.0)) -> np.ndarray:
    def moved(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    down = np.array([[1, 0, 0], [-math.tan(shear[1]), 1, 0], [0, 0, 1]])
    right = np.array([[1, -math.tan(shear[0]), 0], [0, 1, 0], [0, 0, 1]])
    x, y = centre
    return moved(*shift) @ moved(x, y) @ rotation @ down @ right @ moved(-x, -y)


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


WEIGHTS = {
    "nearest": lambda x: float(-0.5 <= x < 0.5),
    "bilinear": lambda x: max(0.0, 1 - abs(x)),
    "bicubic": cubic,
}


def sampled(image: np.ndarray, forward: np.ndarray, how: str, fill) -> np.ndarray:
    """Each pixel as a weighted sum of those around the place where it is sampled."""
    h, w, _ = image.shape
    back, weight = np.linalg.inv(forward), WEIGHTS[how]
    out = np.zeros(image.shape)
    for y in range(h):
        for x in range(w):
            u, v, _ = back @ (x + 0.5, y + 0.5, 1)
            left, top = math.floor(u - 0.5), math.floor(v - 0.5)
            for i in range(top - 1, top + 3):
                for j in range(left - 1, left + 3):
                    part = weight(i + 0.5 - v) * weight(j + 0.5 - u)
                    inside = 0 <= i < h and 0 <= j < w
                    out[y, x] += part * (image[i, j] if inside else np.array(fill))
    return out


@pytest.mark.parametrize("fill", ["black", "mean"])
@pytest.mark.parametrize("how", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["rotate", "shear x", "shear y", "translate x", "translate y"])
@pytest.mark.parametrize("level", [0.3, -0.7])
def test_geometry_is_torchvisions(name, how, fill, level):
    h, w = 14, 11
    image = picture(h, w)
    forward = {
        # a positive angle turns against the clock, and rows go down
        "rotate": matrix((w / 2, h / 2), angle=-math.radians(30 * level)),
        "shear x": matrix((0, 0), shear=(math.atan(0.3 * level), 0)),
        "shear y": matrix((0, 0), shear=(0, math.atan(0.3 * level))),
        "translate x": matrix((w / 2, h / 2), shift=(int(150 / 331 * w * level), 0)),
        "translate y": matrix((w / 2, h / 2), shift=(0, int(150 / 331 * h * level))),
    }[name]
    colour = (0, 0, 0) if fill == "black" else [255 * m for m in MEAN]
    want = sampled(image, forward, how, colour)
    do = operation(name, interpolation=how, fill=fill)
    got = 255 * do(as_pixels(image).repeat(2, 1, 1, 1), torch.tensor([level, level]))
    assert torch.equal(got[0], got[1])
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), want, atol=0.02)


def grey(image: np.ndarray) -> np.ndarray:
    return np.floor(image @ np.array([0.2989, 0.587, 0.114]))[..., None]


def blended(image, other, share):
    return np.floor(np.clip(share * image + (1 - share) * other, 0, 255))


def smoothed(image: np.ndarray) -> np.ndarray:
    kernel, (h, w, _), out = np.ones((3, 3)), image.shape, image.astype(float)
    kernel[1, 1] = 5
    for y in range(1, h - 1):
        for x in range(1, w - 1):
            around = image[y - 1 : y + 2, x - 1 : x + 2]
            out[y, x] = np.round((around * kernel[..., None]).sum((0, 1)) / kernel.sum())
    return out


def equalized(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.flatten(), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if not step:
        return channel
    table = (np.cumsum(counts) + step // 2) // step
    return np.clip(np.concatenate([[0], table[:-1]]), 0, 255)[channel]


def stretched(channel: np.ndarray) -> np.ndarray:
    low, high = float(channel.min()), float(channel.max())
    return channel if low == high else np.clip((channel - low) * 255 / (high - low), 0, 255)


def twin(image: np.ndarray, name: str, level: float, increasing: bool) -> np.ndarray:
    """What torchvision documents, for the operations that move nothing."""
    factor = 1 + 0.9 * level if increasing else 0.1 + 1.8 * abs(level)
    strength = abs(level) if increasing else 1 - abs(level)
    channels = [image[..., i] for i in range(image.shape[2])]
    return {
        "identity": lambda: image,
        "autocontrast": lambda: np.stack([stretched(c) for c in channels], -1),
        "equalize": lambda: np.stack([equalized(c) for c in channels], -1),
        "posterize": lambda: image & (0xFF << round(4 * strength) & 0xFF),
        "solarize": lambda: np.where(image >= 255 * (1 - strength), 255 - image, image),
        "saturation": lambda: blended(image, grey(image), factor),
        "contrast": lambda: blended(image, grey(image).mean(), factor),
        "brightness": lambda: blended(image, 0, factor),
        "sharpness": lambda: blended(image, smoothed(image), factor),
    }[name]()


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", NAMES[:3] + NAMES[4:10])
@pytest.mark.parametrize("level", [0.0, 0.3, -0.8, 1.0])
def test_colours_are_torchvisions(name, level, increasing):
    image = picture()
    image[0, 0] = 255
    do = operation(name, increasing=increasing)
    got = do(as_pixels(image).repeat(2, 1, 1, 1), torch.tensor([level, level])).clamp(0, 1) * 255
    assert torch.equal(got[0], got[1])
    want = twin(image, name, level, increasing)
    exact = name in ("identity", "equalize", "posterize", "solarize")
    # the twin cuts off fractions of a value once or twice, as 8 bits do
    np.testing.assert_allclose(
        got[0].permute(1, 2, 0).numpy(), want, atol=0.01 if exact else 2.0, rtol=0
    )


def test_grey_images_keep_their_saturation():
    x = as_pixels(picture(c=1))
    assert torch.equal(operation("saturation")(x, torch.tensor([0.8])), x)


def test_the_probability_of_an_operation():
    images = noise(1, h=20, w=20).repeat(400, 1, 1, 1)
    few = {"operations": 1, "magnitude": 15, "probability": 0.25}
    got, _ = augment(images, plain=True, randaugment=few)(images, labels(images))
    same = (got - images / 255).abs().amax((1, 2, 3)) < 1e-6
    assert 280 < int(same.sum()) < 340  # 300 were left, and a few identities


def test_the_deviation_of_the_magnitude():
    images = noise(1, h=20, w=20).repeat(300, 1, 1, 1)
    one = {"operations": 1, "magnitude": 9}

    def kinds(**more):
        got, _ = augment(images, plain=True, randaugment=one | more)(images, labels(images))
        return len({g.numpy().round(4).tobytes() for g in got})

    assert kinds() <= 25
    assert kinds(magnitude_std=3.0) > 100


def test_magnitudes_are_cut_off_at_the_largest():
    """So strong that every draw is cut off: at 0, or at the largest, but not beyond."""
    images = noise(1, h=20, w=20).repeat(200, 1, 1, 1)
    far = {"operations": 1, "magnitude": 30, "magnitude_std": 30}
    got, _ = augment(images, plain=True, randaugment=far)(images, labels(images))
    assert got.isfinite().all()
    uncovered = (got == 0).all(1).float().mean((1, 2))
    assert float(uncovered.max()) <= 0.46  # of a shift


def test_at_magnitude_0_nothing_but_the_contrast_changes():
    """And what is white, which torchvision solarizes already there."""
    x = torch.rand(4, 3, 9, 9) * 254 / 255
    x = (x * 255).round() / 255
    for name in NAMES:
        if name not in ("autocontrast", "equalize"):
            torch.testing.assert_close(operation(name)(x, torch.zeros(4)), x, atol=1e-5, rtol=0)


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


# A value of each option that changes what comes out, beside others that it needs.
MATTERS = {
    "pad": (2, {}), "flip": (0.5, {}), "randaugment": ([2, 9], {}), "erasing": (0.5, {}),
    "erasing_fill": ("noise", {"erasing": 0.5}), "mixup": (0.8, {}), "cutmix": (1.0, {}),
    "mix": (0.0, {"mixup": 0.8}),
}  # fmt: skip
OF_THE_LOADER = {"resized_crop", "ratio"}  # tests/apps/test_images.py
OF_RANDAUGMENT = {
    "operations": 3, "magnitude": 20, "magnitude_std": 5, "probability": 0.5, "increasing": False,
    "interpolation": "bilinear", "fill": "mean",
}  # fmt: skip


def test_every_option_matters():
    assert MATTERS.keys() | OF_THE_LOADER == AugmentOptions.model_fields.keys()
    assert OF_RANDAUGMENT.keys() == RandAugmentOptions.model_fields.keys()
    images = noise(64)

    def changed(**options):
        torch.manual_seed(0)
        return augment(images, **options)(images, labels(images))[0]

    for name, (value, others) in MATTERS.items():
        assert not torch.equal(changed(**others), changed(**others | {name: value})), name
    plain = {"operations": 2, "magnitude": 9}
    for name, value in OF_RANDAUGMENT.items():
        found = changed(randaugment=plain | {name: value})
        assert not torch.equal(changed(randaugment=plain), found), name


def test_the_example_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    options = AugmentOptions(**yaml.safe_load(example)).randaugment
    assert (options.magnitude, options.interpolation) == (27, "bicubic")


def test_erasing_with_noise_has_the_data_s_mean_and_deviation():
    images = torch.full((200, 3, 20, 20), 255, dtype=torch.uint8)
    module = augment(images, erasing=1.0, erasing_fill="noise")
    got, _ = module(images, labels(images))
    untouched = ((1 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None]
    noisy = got[((got - untouched).abs() > 1e-6).all(1, keepdim=True).expand_as(got)]
    assert noisy.numel() > 10_000
    assert float(noisy.mean()) == pytest.approx(0, abs=0.03)
    assert float(noisy.std()) == pytest.approx(1, abs=0.03)


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
        ({"randaugment": [0, 9]}, r"randaugment\n *Value error, got \[0, 9\], want \[n, m\]"),
        ({"randaugment": [2, 31]}, r"randaugment\n *Value error, got \[2, 31\]"),
        ({"randaugment": [2]}, r"randaugment\n *Value error, got \[2\]"),
        ({"randaugment": {"operations": 2}}, r"randaugment.magnitude\n *Field required"),
        *(
            (
                {"randaugment": {"operations": 2, "magnitude": 9} | given},
                f"randaugment.{next(iter(given))}",
            )
            for given in (
                {"operations": 0},
                {"magnitude": 31},
                {"magnitude_std": -1},
                {"probability": 0},
                {"increasing": "some"},
                {"interpolation": "lanczos"},
                {"fill": "grey"},
                {"steps": 1},
            )
        ),
        ({"erasing_fill": "black"}, "erasing_fill"),
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
