"""Images: what is read, what is refused, and that pixels depend on seed, epoch and index alone."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pictures import PICTURES, folder, parquet, picture, table
from translution.apps.data import digits
from translution.apps.data.images import (
    ImageOptions,
    collate,
    image_files,
    load_image,
    open_images,
)

SHARED = Path(
    os.environ.get("TRANSLUTION_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)


@pytest.fixture(autouse=True)
def _tables(tmp_path, monkeypatch):
    """What datasets writes beside the data goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tree(tmp_path):
    """Two classes of eight images of unequal sizes, and as many to validate."""
    for part in ("train", "valid"):
        for name in ("dog", "cat"):
            (tmp_path / part / name / "more").mkdir(parents=True)
            for i in range(8):
                below = "more" if i == 7 else "."
                path = tmp_path / part / name / below / f"{i}.png"
                picture(12 + i, 20 - i, 10 * (name == "dog") + i).save(path)
    (tmp_path / "train" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


# -- files ---------------------------------------------------------------------------------------


def test_image_files(tree):
    cat = tree / "train" / "cat"
    for i in (10, 11):
        picture().save(cat / f"{i}.JPG", "PNG")
    files = image_files([str(cat / "*"), str(cat), str(cat / "2.png")])
    names = [file.name for file in files]
    assert names == [*(f"{i}.png" for i in range(7)), "10.JPG", "11.JPG", "7.png"]
    assert image_files([str(tree / "**" / "3.png")])[0].parts[-3:] == ("train", "cat", "3.png")
    for nothing in ("absent.png", "*.gif"):
        with pytest.raises(ValueError, match="there is no such file or folder"):
            image_files([str(cat), str(tree / nothing)])
    (tree / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare: no file in it ends in .jpg"):
        image_files([str(tree / "bare")])


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    picture().save(tmp_path / "a[1].png")
    assert image_files([str(tmp_path / "a[1].png")]) == [tmp_path / "a[1].png"]


def test_links_that_lead_back_are_followed_once(tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for path in (photos / "a.png", photos / "more" / "b.png", tmp_path / "c.png"):
        picture().save(path)
    for link, target in (
        ("loop", "."), ("again", "."), ("more/up", ".."), ("alias", "more"),
        ("self", "self"),
    ):  # fmt: skip
        (photos / link).symlink_to(target)
    want = [photos / "a.png", photos / "more" / "b.png"]
    for patterns in (["."], [".", "loop", "again/more"], ["*"], ["**"], ["**/*.png"], ["**/more"]):
        found = image_files([str(photos / pattern) for pattern in patterns])
        found = [file.resolve() for file in found]
        assert found == (want[1:] if patterns == ["**/more"] else want), patterns
    (photos / "out").symlink_to("../..")
    assert image_files([str(photos)]) == want
    (photos / "other").symlink_to("../elsewhere")  # a folder outside is followed, once
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere" / "d.png")
    (photos / "third").symlink_to("other")
    assert len(image_files([str(photos)])) == 3
    (photos / "gone.png").symlink_to("absent")  # it is named when it is read
    assert photos / "gone.png" in image_files([str(photos)])


def test_a_pipe_is_no_image(tree):
    os.mkfifo(tree / "train" / "cat" / "pipe.png")
    assert len(open_images(folder(tree), "train", 0)) == 16
    with pytest.raises(ValueError, match=r"pipe\.png: is neither a file nor a folder"):
        image_files([str(tree / "train" / "cat" / "pipe.png")])
    with pytest.raises(ValueError, match="no file in it ends in"):
        image_files([str(tree / "train" / "cat" / "pipe*")])


def test_a_class_that_is_a_link_to_others_is_refused(tree):
    (tree / "train" / "kitten").symlink_to("cat")
    with pytest.raises(
        ValueError, match=r"train: .*'kitten' is the same folder as the class 'cat'"
    ):
        open_images(folder(tree), "train", 0)
    (tree / "train" / "kitten").unlink()
    (tree / "train" / "all").symlink_to(".")
    with pytest.raises(ValueError, match="'all' is the same folder as a folder that contains"):
        open_images(folder(tree), "train", 0)
    (tree / "train" / "all").unlink()
    (tree / "train" / "cat" / "up").symlink_to("..")  # its dogs are not cats
    assert open_images(folder(tree), "train", 0).labels.tolist() == [0] * 8 + [1] * 8


def test_load_image(tree):
    options = folder(tree, image_size=[6, 8], channels=1)
    image = load_image(tree / "train" / "cat" / "0.png", options)
    assert image.dtype == torch.uint8
    assert image.shape == (1, 6, 8)
    with pytest.raises(ValueError, match=r"notes\.txt: not an image"):
        load_image(tree / "train" / "notes.txt", options)
    with pytest.raises(OSError, match="absent"):
        load_image(tree / "absent.png", options)


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_of_classes(tree):
    train = open_images(folder(tree), "train", 0)
    assert train.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    assert train.channels == 3
    image, label = train[0, 9]
    assert image.shape == (3, 8, 8)
    assert label == 1
    want = load_image(tree / "train" / "dog" / "1.png", folder(tree))
    assert torch.equal(image, want)
    assert len(open_images(folder(tree), "valid", 0)) == 16


def test_what_is_wrong_with_a_folder(tree):
    def refused(match, part="train", **more):
        with pytest.raises(ValueError, match=match):
            open_images(folder(tree, **more), part, 0)

    refused("train: .*absent is no folder", train=str(tree / "absent"))
    (tree / "bare").mkdir()
    refused("train: .*bare: want a folder for each class, got none", train=str(tree / "bare"))
    refused("test: got none, want where its images are", "test")
    (tree / "valid" / "eel").mkdir()
    refused(r"valid: its classes are not those of train: it lacks \[\], has \['eel'\]", "valid")
    (tree / "train" / "eel").mkdir()
    refused("train: .*eel: no file in it ends in")
    picture().save(tree / "train" / "eel.png")
    refused("train: .*got the image eel.png beside them")


@pytest.mark.parametrize("cache", [False, True])
def test_a_damaged_file_is_named_or_counted(tree, cache):
    (tree / "train" / "cat" / "2.png").write_bytes(b"")
    (tree / "train" / "dog" / "3.png").write_bytes(b"not an image")

    def batch(**more):
        images = open_images(folder(tree, cache=cache, **more), "train", 0)
        return images, collate([images[0, i] for i in range(len(images))])

    with pytest.raises(ValueError, match=r"train: .*cat.2\.png: it is empty"):
        batch()
    images, got = batch(bad="skip")
    assert got.skipped == 2
    assert len(got.images) == 14
    assert got.labels.tolist() == [0] * 7 + [1] * 7
    assert images[0, 2] is None
    assert images[0, 11] is None


def test_a_file_that_went_away_is_no_bad_image(tree):
    images = open_images(folder(tree, cache=False, bad="skip"), "train", 0)
    (tree / "train" / "cat" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        images[0, 0]


def test_a_batch_of_nothing():
    batch = collate([None, None])
    assert batch.images.shape == (0, 0, 0, 0)
    assert batch.labels.dtype == torch.int64
    assert batch.skipped == 2


# -- parts ---------------------------------------------------------------------------------------


def rows(images) -> set[int]:
    return set(images._rows.tolist())


def test_what_is_held_out_is_not_trained_on(tmp_path):
    path = table(tmp_path / "a.parquet", PICTURES, [i % 4 for i in range(20)])
    options = parquet(path, holdout=0.25)
    train, valid = (open_images(options, part, 3) for part in ("train", "valid"))
    assert len(valid) == 5
    assert rows(train) | rows(valid) == set(range(20))
    assert not rows(train) & rows(valid)
    assert rows(open_images(options, "valid", 3)) == rows(valid)
    assert rows(open_images(options, "valid", 4)) != rows(valid)
    with pytest.raises(ValueError, match="valid: got none and a holdout of 0"):
        open_images(parquet(path, holdout=0), "valid", 0)
    assert len(open_images(parquet(path, holdout=0), "train", 0)) == 20


def test_limits(tmp_path):
    path = table(tmp_path / "a.parquet", PICTURES, [i % 4 for i in range(20)])
    options = parquet(path, holdout=0.25, train_limit=6, valid_limit=3)
    whole = parquet(path, holdout=0.25)
    train = open_images(options, "train", 0)
    assert len(train) == 6
    assert rows(train) < rows(open_images(whole, "train", 0))
    assert rows(train) == rows(open_images(options, "train", 0))
    assert train.classes == ["0", "1", "2", "3"]
    valid = open_images(options, "valid", 0)
    assert len(valid) == 3
    assert rows(valid) < rows(open_images(whole, "valid", 0))


# -- digits --------------------------------------------------------------------------------------


def test_digits_are_put_on_a_canvas():
    still = ImageOptions(format="digits", canvas=20)
    assert still.image_size == (20, 20)
    assert still.channels == 1
    parts = {part: open_images(still, part, 0) for part in ("train", "valid", "test")}
    assert [len(p) for p in parts.values()] == [1293, 144, 360]
    train = parts["train"]
    image, label = train[0, 5]
    assert image.shape == (1, 20, 20)
    assert torch.equal(image, train[9, 5][0])
    data = digits.load_digits()
    row = int(train._rows[5])
    assert label == int(data.train_labels[row])
    want = digits.place(data.train[row][None], 20, digits.centre(1, 8, 20))[0]
    assert torch.equal(image, (want * 255).round().byte())
    colour = open_images(ImageOptions(format="digits", canvas=20, channels=3), "train", 0)
    assert torch.equal(colour[0, 5][0], image.expand(3, -1, -1))
    small = open_images(ImageOptions(format="digits", canvas=20, image_size=10), "train", 0)
    assert small[0, 5][0].shape == (1, 10, 10)


def test_moved_digits_move_with_the_epoch_in_training_alone():
    options = ImageOptions(format="digits", canvas=20, moved=True)
    train, again = (open_images(options, "train", 0) for _ in range(2))
    assert torch.equal(train[3, 5][0], again[3, 5][0])
    assert len({train[e, 5][0].numpy().tobytes() for e in range(10)}) > 5
    assert not torch.equal(train[3, 5][0], open_images(options, "train", 1)[3, 5][0])
    test = open_images(options, "test", 0)
    assert torch.equal(test[0, 5][0], test[4, 5][0])
    ink = collate([test[0, i] for i in range(200)]).images
    assert (ink.sum((0, 1)) > 0).float().mean() > 0.85  # of the canvas; digits have empty corners


def test_digits_move_by_whole_steps_from_the_centre():
    """8 pixels on 23: the centre begins at 7, so steps of 3 begin at 1, 4, ... 13."""
    still = open_images(ImageOptions(format="digits", canvas=23), "test", 0)
    moved = open_images(ImageOptions(format="digits", canvas=23, moved=3), "test", 0)
    seen = set()
    for i in range(200):
        at = [
            [
                s
                for s in range(-6, 7)
                if torch.equal(still[0, i][0].roll((r, s), (1, 2)), moved[0, i][0])
            ]
            for r in range(-6, 7)
        ]
        seen |= {(r - 6, s) for r, found in enumerate(at) for s in found}
    assert seen == {(r, s) for r in range(-6, 7, 3) for s in range(-6, 7, 3)}


def test_digits_at_an_exact_distance():
    """8 pixels on 20, in each of the four diagonal directions, the same in every epoch."""
    still = open_images(ImageOptions(format="digits", canvas=20), "test", 0)
    away = open_images(ImageOptions(format="digits", canvas=20, shift=5), "test", 0)
    seen = set()
    for i in range(40):
        fits = [
            (r, s)
            for r in (-5, 5)
            for s in (-5, 5)
            if torch.equal(still[0, i][0].roll((r, s), (1, 2)), away[0, i][0])
        ]
        assert len(fits) == 1
        assert torch.equal(away[0, i][0], away[3, i][0])
        seen |= set(fits)
    assert len(seen) == 4
    with pytest.raises(ValueError, match="shift: got 7, but a digit can move by 6 pixels at most"):
        ImageOptions(format="digits", canvas=20, shift=7)
    with pytest.raises(ValueError, match="shift: got 2, want 0 where moved is True"):
        ImageOptions(format="digits", canvas=20, shift=2, moved=True)


def idx(array: np.ndarray) -> bytes:
    head = b"\x00\x00\x08" + bytes([array.ndim])
    return gzip.compress(
        head + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    )


def test_mnist(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    checksums = {}
    for name in digits.MNIST:
        n = 20 if name.startswith("train") else 10
        shape, most = ((n, 28, 28), 256) if "images" in name else ((n,), 10)
        content = idx(rng.integers(0, most, shape, np.uint8))
        (tmp_path / f"{name}.gz").write_bytes(content)
        checksums[name] = hashlib.sha256(gzip.decompress(content)).hexdigest()
    monkeypatch.setattr(digits, "MNIST", checksums)
    options = ImageOptions(format="mnist", folder=str(tmp_path))
    train = open_images(options, "train", 0)
    assert len(train) == 18
    want = digits.mnist(tmp_path).train[train._rows[4]]
    assert torch.equal(train[0, 4][0][0], (want * 255).round().byte())
    assert len(open_images(options, "test", 0)) == 10


# -- what is random, and worker processes --------------------------------------------------------


def test_random_crops_depend_on_seed_epoch_and_index_alone(tree):
    options = folder(tree, augment={"resized_crop": [0.2, 1]})
    a = open_images(options, "train", 0)
    cached = {c: open_images(folder(tree, augment=options.augment, cache=c), "train", 0)
              for c in (False, True)}  # fmt: skip
    for i in (3, 12, 3):
        assert torch.equal(a[1, i][0], cached[False][1, i][0])
        assert torch.equal(a[1, i][0], cached[True][1, i][0])
    assert len({a[e, 4][0].numpy().tobytes() for e in range(6)}) == 6
    assert not torch.equal(a[1, 3][0], open_images(options, "train", 1)[1, 3][0])
    valid = open_images(options, "valid", 0)
    assert torch.equal(valid[0, 3][0], valid[1, 3][0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same(tree, method):
    options = folder(tree, augment={"resized_crop": [0.2, 1]}, bad="skip")
    (tree / "train" / "cat" / "2.png").write_bytes(b"")
    images = open_images(options, "train", 0)
    keys = [(2, i) for i in torch.randperm(16).tolist()]
    want = collate([images[key] for key in keys])
    loader = torch.utils.data.DataLoader(
        images,
        5,
        sampler=keys,
        num_workers=1 + (method == "fork"),
        collate_fn=collate,
        multiprocessing_context=method,
    )
    got = list(loader)
    assert torch.equal(torch.cat([b.images for b in got]), want.images)
    assert torch.equal(torch.cat([b.labels for b in got]), want.labels)
    assert sum(b.skipped for b in got) == want.skipped == 1


def test_pickle(tree, tmp_path):
    path = table(tmp_path / "a.parquet", PICTURES, [i % 4 for i in range(20)])
    for options in (folder(tree), folder(tree, cache=False), parquet(path)):
        images = open_images(options, "train", 0)
        assert torch.equal(pickle.loads(pickle.dumps(images))[0, 3][0], images[0, 3][0])


def test_small_data_are_kept_in_memory_unasked(tree, monkeypatch):
    assert open_images(folder(tree), "train", 0)._cache is not None
    assert open_images(folder(tree, cache=False), "train", 0)._cache is None
    monkeypatch.setattr("translution.apps.data.images.CACHE_BYTES", 1000)
    assert open_images(folder(tree), "train", 0)._cache is None
    assert open_images(folder(tree, cache=True), "train", 0)._cache is not None


# -- options -------------------------------------------------------------------------------------


def test_defaults_by_format_and_channels():
    options = ImageOptions(format="folder", train="a", image_size=32)
    assert (options.image_size, options.channels, options.crop) == ((32, 32), 3, 0.875)
    assert options.mean == (0.485, 0.456, 0.406)
    grey = ImageOptions(format="folder", train="a", image_size=[32, 48], channels=1, mean=None)
    assert (grey.image_size, grey.mean, grey.std) == ((32, 48), (0.5,), (0.5,))
    mnist = ImageOptions(format="mnist", folder="a", channels=3)
    assert (mnist.image_size, mnist.crop, len(mnist.mean)) == ((28, 28), 1, 3)
    for made in (options, grey, mnist):
        assert ImageOptions(**made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "folder"}, "image_size\n *Field required"),
        ({"format": "folder", "image_size": 8}, "train: is missing; format 'folder' needs it"),
        ({"format": "hub", "image_size": 8, "train": "a"}, "name: is missing"),
        ({"format": "digits", "train": "a"}, "train: got 'a', want none with format 'digits'"),
        ({"format": "digits", "canvas": 7}, "canvas: got 7, want at least a digit's side of 8"),
        ({"format": "digits", "image_size": [0, 8]}, "greater than 0"),
        ({"format": "digits", "mean": [0.1, 0.2]}, "mean: got 2 values, want 1"),
        ({"format": "digits", "std": [0]}, r"std: got \[0.0\], want values above 0"),
        ({"format": "digits", "channels": 2}, "channels"),
        ({"format": "digits", "holdout": 1}, "holdout"),
        ({"format": "digits", "sise": None}, "sise"),
        ({"format": ["digits"]}, "format"),
        ({"format": "folder", "image_size": 8, "train": "a", "test": "a"}, "test: got 'a', want"),
        ({"format": "folder", "image_size": 8, "train": "a", "valid": "a"}, "valid: got 'a', want"),
        ({"format": "folder", "image_size": 8, "train": "a", "canvas": 9}, "canvas: got 9, want n"),
    ],
)
def test_options_that_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        ImageOptions(**given)


# -- real data, where there are any --------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "cifar10").exists(), reason="CIFAR-10 is not here")
def test_cifar():
    test = str(SHARED / "cifar10" / "test.parquet")
    images = open_images(parquet(test, image_size=32, train_limit=200, holdout=0), "train", 0)
    batch = collate([images[0, i] for i in range(200)])
    assert batch.images.shape == (200, 3, 32, 32)
    assert images.classes == [str(i) for i in range(10)]
    assert 100 < batch.images.float().mean() < 140


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason="MNIST is not here")
def test_real_mnist():
    images = open_images(ImageOptions(format="mnist", folder=str(SHARED / "mnist")), "test", 0)
    assert len(images) == 10000
    assert images[0, 0][1] == 7
