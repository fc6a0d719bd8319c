"""One image: decoded from any mode, and fitted to a size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pictures import encoded, picture
from translution.apps.data.transform import decode, random_box
from translution.interop.images import centred_box, fit

# -- decoding ------------------------------------------------------------------------------------


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))


def pixels(content: bytes, channels=3) -> np.ndarray:
    return np.asarray(decode(content, channels)).astype(int)


def test_every_mode_is_decoded():
    image = picture()
    want = np.asarray(image)
    assert (pixels(encoded(image)) == want).all()
    assert (pixels(encoded(image.convert("RGBA"))) == want).all()
    assert (pixels(encoded(image), 1) == np.asarray(image.convert("L"))).all()
    cmyk = pixels(encoded(image.convert("CMYK"), "JPEG", quality=100))
    assert abs(cmyk - want).max() < 6
    palette = image.quantize(16)
    assert (pixels(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()
    bits = image.convert("1")
    assert (pixels(encoded(bits), 1) == np.asarray(bits.convert("L"))).all()
    grey = pixels(encoded(picture(channels=1)))
    assert grey.shape == (12, 10, 3)
    assert (grey == grey[..., :1]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    values = np.arange(0, 65536, 257 * 5, dtype=np.uint16).reshape(4, 13)
    content = encoded(Image.fromarray(values), form)
    assert (pixels(content, 1) == np.arange(0, 256, 5).reshape(4, 13)).all()
    assert (pixels(content) == np.arange(0, 256, 5).reshape(4, 13, 1)).all()


def test_what_is_transparent_is_white():
    array = np.zeros((2, 2, 4), np.uint8)
    array[0, 0] = (10, 20, 30, 255)
    array[0, 1] = (0, 0, 0, 128)
    got = pixels(encoded(Image.fromarray(array)))
    assert got[0, 0].tolist() == [10, 20, 30]
    assert got[0, 1].tolist() == [127, 127, 127]
    assert (got[1] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    assert pixels(encoded(palette, transparency=1))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_photograph_stands_upright():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    want = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert (pixels(encoded(image, exif=exif)) == want).all()


def test_of_an_animation_the_first():
    first, second = picture(channels=1), Image.new("L", (10, 12), 255)
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (pixels(content, 1) == np.asarray(first)).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_the_formats_of_the_suffixes_are_read(form):
    assert pixels(encoded(picture(), form)).shape == (12, 10, 3)


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "SGI"])
def test_other_formats_are_not_opened(form, monkeypatch):
    """Pillow starts Ghostscript for EPS."""
    content = encoded(picture(), form)
    Image.init()
    opener, accept = Image.OPEN[form]
    opened = []
    monkeypatch.setitem(Image.OPEN, form, (lambda *a: opened.append(a) or opener(*a), accept))
    with pytest.raises(ValueError, match="of a known format"):
        decode(content, 3)
    assert not opened


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"hello", "not an image of a known format"),
        (encoded(picture(40, 40), "JPEG")[:-200], "not a readable image .Truncated"),
        (encoded(NOISE, "JPEG")[:-200], "image file is truncated"),
        (encoded(picture(40, 40))[:-30], "truncated|not a readable"),
        (encoded(Image.new("F", (3, 3)), "TIFF"), "mode F"),
        (encoded(Image.new("I", (3, 3)), "TIFF"), "mode I"),
    ],
)
def test_damaged_content(content, said):
    with pytest.raises(ValueError, match=said):
        decode(content, 3)


# -- fitting -------------------------------------------------------------------------------------

SIDE = st.integers(1, 60)


@given(SIDE, SIDE, SIDE, SIDE, st.floats(0.3, 1))
def test_the_centred_box(width, height, h, w, crop):
    left, top, right, bottom = centred_box(width, height, (h, w), crop)
    if (height, width) == (h, w):
        assert (left, top, right, bottom) == (0, 0, width, height)
        return
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= top < bottom <= height + 1e-9
    assert left == pytest.approx(width - right)
    assert top == pytest.approx(height - bottom)
    assert (right - left) * h == pytest.approx((bottom - top) * w)
    assert max((right - left) / width, (bottom - top) / height) == pytest.approx(crop)


@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 2**31))
def test_a_random_box_lies_within(width, height, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    left, top, right, bottom = random_box(
        width, height, (h, w), (0.08, 1), (3 / 4, 4 / 3), generator
    )
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= top < bottom <= height + 1e-9


def test_a_random_box_has_the_area_and_shape_asked_for():
    generator = torch.Generator().manual_seed(0)
    areas, shapes = [], []
    for _ in range(2000):
        left, top, right, bottom = random_box(
            400, 400, (10, 20), (0.1, 0.3), (3 / 4, 4 / 3), generator
        )
        areas.append((right - left) * (bottom - top) / 400**2)
        shapes.append((right - left) / (bottom - top) / 2)
    assert 0.095 < min(areas) < 0.11
    assert 0.29 < max(areas) < 0.305
    assert 0.73 < min(shapes) < 0.77
    assert 1.30 < max(shapes) < 1.36
    assert np.log(shapes).mean() == pytest.approx(0, abs=0.02)


def test_evaluation_is_resizing_the_short_side_and_the_centre_of_it():
    image = picture(60, 90)
    got = fit(image, (28, 28), centred_box(90, 60, (28, 28), 0.875), "bicubic")
    whole = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)).astype(int)
    want = torch.from_numpy(whole[2:30, 10:38]).permute(2, 0, 1)
    assert got.dtype == torch.uint8
    assert (got.int() - want).abs().max() <= 1


def test_an_image_of_the_size_is_not_resampled():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    got = fit(image, (9, 7), centred_box(7, 9, (9, 7), 0.875), "bicubic")
    assert (got == torch.from_numpy(np.array(image)).permute(2, 0, 1)).all()
