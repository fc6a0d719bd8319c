"""Tables of images: Parquet, and data sets by name."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from pictures import PICTURES, parquet, picture, table
from translution.apps.data.images import ImageOptions, collate, load_image, open_images


@pytest.fixture(autouse=True)
def _tables(tmp_path, monkeypatch):
    """What datasets writes beside the data goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, named, struct):
    images = [{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(PICTURES)]
    labels = [i % 2 for i in range(20)]
    path = table(
        tmp_path / "a.parquet", images if struct else PICTURES, labels, ["no", "yes"] * named
    )
    images = open_images(parquet(path, holdout=0), "train", 0)
    assert images.classes == (["no", "yes"] if named else ["0", "1"])
    assert images.labels.tolist() == labels
    image, label = images[0, 7]
    assert label == 1
    assert torch.equal(image, torch.from_numpy(np.array(picture(8, 8, 7))).permute(2, 0, 1))


def test_parquet_of_an_image_feature_in_several_files(tmp_path):
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a"]))
    for i in (2, 10):
        some = {"picture": [picture(8, 8, i)] * 3, "kind": [0] * 3}
        made = datasets.Dataset.from_dict(some, features)
        made.to_parquet(tmp_path / f"part-{i}.parquet")
    options = {"image_column": "picture", "label_column": "kind", "holdout": 0}
    for place in (tmp_path, tmp_path / "part-*.parquet"):
        images = open_images(parquet(str(place), **options), "train", 0)
        assert len(images) == 6
        assert images.classes == ["a"]
        assert int(images[0, 0][0][0, 0, 0]) == 10  # natural order: part 2 first
        assert int(images[0, 5][0][0, 0, 0]) == 50


def test_paths_in_a_table_are_read(tmp_path):
    for i in range(2):
        picture(8, 8, i).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    images = [{"bytes": None, "path": path} for path in paths]
    features = datasets.Features(
        image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        label=datasets.Value("int64"),
    )
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features)
    made.to_parquet(tmp_path / "a.parquet")
    options = parquet(str(tmp_path / "a.parquet"), holdout=0)
    assert torch.equal(open_images(options, "train", 0)[0, 1][0], load_image(paths[1], options))
    Path(paths[1]).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"train: .*1\.png: not an image"):
        open_images(options, "train", 0)


def test_classes_by_name(tmp_path):
    path = table(tmp_path / "a.parquet", PICTURES[:4], [0, 2, 2, 0])
    with pytest.raises(ValueError, match=r"label' has the labels \[0, 2\], want 0, 1, … without"):
        open_images(parquet(path), "train", 0)
    images = open_images(parquet(path, classes=["a", "b", "c"]), "train", 0)
    assert images.classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="row 1: label is 2, want 0 to 1"):
        open_images(parquet(path, classes=["a", "b"]), "train", 0)
    named = table(tmp_path / "b.parquet", PICTURES[:2], [0, 1], ["no", "yes"])
    with pytest.raises(ValueError, match=r"classes: got \['yes', 'no'\], but .* has \['no', 'yes'"):
        open_images(parquet(named, classes=["yes", "no"]), "train", 0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0.0, 1.0], "has double, want integer labels"),
        (["a", "b"], "has (large_)?string, want integer labels"),
        ([0, None], "row 1 has no label"),
        ([-1, 0], r"has the labels \[-1, 0\]"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, said):
    path = table(tmp_path / "a.parquet", PICTURES[:2], labels)
    with pytest.raises(ValueError, match=f"train: .*a.parquet: .*{said}"):
        open_images(parquet(path), "train", 0)


def test_what_is_wrong_with_a_table(tmp_path):
    good = table(tmp_path / "a.parquet", PICTURES[:4], [0, 1, 0, 1])

    def refused(match, part="train", **more):
        with pytest.raises(ValueError, match=match):
            open_images(parquet(**({"train": good} | more)), part, 0)

    refused("no column 'img'; there are .*'image', 'label'", image_column="img")
    refused("no column 'kind'; there are", label_column="kind")
    refused("column 'label' has .*int64.*, want encoded images", image_column="label")
    refused("train: .*absent: there is no such file", train=str(tmp_path / "absent"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    refused("bad.parquet: not a readable Parquet file", train=str(tmp_path / "bad.parquet"))
    (tmp_path / "none.parquet").write_bytes(b"")
    refused("none.parquet: not a readable Parquet file", train=str(tmp_path / "none.parquet"))
    other = table(tmp_path / "b.parquet", PICTURES[:2], [0, 1], extra=[1, 2])
    refused(r"b.parquet has the columns \['extra', .* but .*a.parquet", train=good[:-9] + "[ab].p*")
    high = table(tmp_path / "c.parquet", PICTURES[:2], [0, 2])
    refused("test: .*c.parquet: row 1: label is 2, want 0 to 1", "test", test=high)
    named = table(tmp_path / "d.parquet", PICTURES[:2], [0, 1], ["b", "a"])
    refused("valid: its classes are not those of train", "valid", valid=named)
    one = table(tmp_path / "e.parquet", PICTURES[:1], [0])
    refused("train: got 1 images, want more than the 1 held out", train=one)
    assert len(open_images(parquet(good, test=other), "test", 0)) == 2


def test_a_damaged_row_is_named(tmp_path):
    path = table(tmp_path / "a.parquet", [*PICTURES[:3], b"no", b""], [0, 1, 0, 1, 0])
    options = parquet(path, holdout=0)
    with pytest.raises(ValueError, match=r"train: .*a\.parquet: row 3: not an image"):
        open_images(options, "train", 0)
    images = open_images(parquet(path, holdout=0, bad="skip"), "train", 0)
    batch = collate([images[0, i] for i in range(5)])
    assert batch.skipped == 2
    assert batch.labels.tolist() == [0, 1, 0]


def test_a_data_set_by_name(tmp_path):
    """A folder stands for a name of the hub here: there is no network in tests."""
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        table(tmp_path / "set" / f"{part}.parquet", PICTURES[:4], [0, 1, 0, 1], ["a", "b"])
    hub = {"format": "hub", "name": str(tmp_path / "set"), "image_size": 8}
    options = ImageOptions(**hub, train="train", test="test")
    assert len(open_images(options, "test", 0)) == 4
    assert len(open_images(options, "train", 0)) == 3
    assert open_images(options, "valid", 0).classes == ["a", "b"]
    with pytest.raises(ValueError, match=r"train: .*set\[nosuch\]: "):
        open_images(ImageOptions(**hub, train="nosuch"), "train", 0)
    with pytest.raises((ValueError, OSError), match="nobody/nothing"):
        open_images(ImageOptions(**hub | {"name": "nobody/nothing"}, train="train"), "train", 0)
