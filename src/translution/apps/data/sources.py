"""Finding images and their labels: in folders, in Parquet files, on the Hugging Face hub, and the
digits of scikit-learn and MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digits import load_digits, mnist
from .image_options import ImageOptions
from .parts import Part
from .progress import bars_on_terminals
from .transform import SUFFIXES, find

__all__ = ["Source", "read_source"]


@dataclass(frozen=True)
class Source:
    """All images of a part and their labels.

    name: the folder, file or data set, for messages.
    images: a datasets.Dataset with encoded images in `column`, or digits, uint8 [n, height, width].
    labels: int64 [n], from 0 to len(classes) - 1.
    classes: the names of the classes.
    """

    name: str
    images: Any
    column: str
    labels: Tensor
    classes: list[str]


def read_source(options: ImageOptions, part: Part) -> Source:
    """Find all images of a part, and label them with the classes of the training part.

    Raises:
        ValueError: data that are missing or wrong; the message names the part and the place.
    """
    if options.format in ("digits", "mnist"):
        return _digits(options, part)
    place = getattr(options, part)
    if place is None:
        raise ValueError(f"{part}: got none, want where its images are")
    if options.format == "folder":
        return _folder(options, part, place)
    return _table(options, part, place)


def _digits(options: ImageOptions, part: Part) -> Source:
    data = load_digits() if options.format == "digits" else mnist(Path(str(options.folder)))
    images, labels = data.train, data.train_labels
    if part == "test":
        images, labels = data.test, data.test_labels
    images = (images * 255).round().byte()
    return Source(options.format, images, "", labels, [str(i) for i in range(10)])


# -- a folder per class --------------------------------------------------------------------------


def _folder(options: ImageOptions, part: Part, place: str) -> Source:
    import datasets

    folders = _class_folders(place, part)
    classes = [folder.name for folder in folders]
    if part != "train":
        train = [folder.name for folder in _class_folders(str(options.train), "train")]
        _check_same_classes(part, classes, train)
    paths, labels = [], []
    for label, folder in enumerate(folders):
        try:
            files = find(folder, SUFFIXES)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        paths += [str(file) for file in files]
        labels += [label] * len(files)
    # loader processes share the memory of a table, but each would copy a list of strings
    features = datasets.Features(image=datasets.Image(decode=False))
    table = datasets.Dataset.from_dict({"image": paths}, features)
    return Source(place, table, "image", torch.tensor(labels), classes)


def _class_folders(place: str, part: Part) -> list[Path]:
    """The folders of the classes, sorted by name. The order decides the labels."""
    root = Path(place).expanduser()
    if not root.is_dir():
        raise ValueError(f"{part}: {place} is no folder, want one with a folder for each class")
    inside = [path for path in root.iterdir() if not path.name.startswith(".")]
    stray = sorted(path.name for path in inside if path.suffix.lower() in SUFFIXES)
    stray = [name for name in stray if (root / name).is_file()]
    folders = sorted((path for path in inside if path.is_dir()), key=lambda path: path.name)
    above = (root.resolve(), *root.resolve().parents)
    names = dict.fromkeys(above, "a folder that contains all classes")
    for folder in folders:
        if (real := folder.resolve()) in names:
            raise ValueError(
                f"{part}: {place}: the class {folder.name!r} is the same folder as "
                f"{names[real]}, want a folder of its own for each class"
            )
        names[real] = f"the class {folder.name!r}"
    if stray or not folders:
        got = f"the image {stray[0]} beside them" if stray else "none"
        raise ValueError(f"{part}: {place}: want a folder for each class, got {got}")
    return folders


def _check_same_classes(part: str, classes: Sequence[str], train: Sequence[str]) -> None:
    if list(classes) != list(train):
        missing = [name for name in train if name not in classes]
        extra = [name for name in classes if name not in train]
        raise ValueError(
            f"{part}: its classes are not those of train: it lacks {missing}, has {extra} besides"
            + ("" if missing or extra else ", and orders them otherwise")
        )


# -- tables --------------------------------------------------------------------------------------


def _table(options: ImageOptions, part: Part, place: str) -> Source:
    table, labels, classes = _labelled(options, part, place)
    if part != "train":
        *_, train = _labelled(options, "train", str(options.train))
        if classes is not None:
            _check_same_classes(part, classes, train or [])
        classes = train
    classes = classes or []
    name = _name(options, place)
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{part}: {name}: row {row}: {options.label_column} is {int(labels[row])}, want 0 to "
            f"{len(classes) - 1}"
        )
    return Source(name, table, options.image_column, labels, classes)


def _name(options: ImageOptions, place: str) -> str:
    return place if options.format == "parquet" else f"{options.name}[{place}]"


def _labelled(
    options: ImageOptions, part: Part, place: str
) -> tuple[Any, Tensor, list[str] | None]:
    """A table, its labels and its classes. The classes are None if the table does not name them and
    the part is not the training part."""
    import datasets

    name = _name(options, place)
    table = (_parquet if options.format == "parquet" else _hub)(options, part, place)
    for column in (options.image_column, options.label_column):
        if column not in table.column_names:
            raise ValueError(
                f"{part}: {name}: there is no column {column!r}; there are {table.column_names}"
            )
    if not len(table):
        raise ValueError(f"{part}: {name}: it has no rows")
    table = table.select_columns([options.image_column, options.label_column])
    feature = table.features[options.image_column]
    if isinstance(feature, datasets.Image):
        table = table.cast_column(options.image_column, datasets.Image(decode=False))
    elif not _holds_bytes(feature):
        raise ValueError(
            f"{part}: {name}: column {options.image_column!r} has {feature}, want encoded images: "
            "bytes, or a struct of bytes and path"
        )
    labels = _integers(table, options.label_column, f"{part}: {name}")
    feature = table.features[options.label_column]
    named = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if named and options.classes and named != list(options.classes):
        raise ValueError(f"classes: got {list(options.classes)}, but {name} has {named}")
    classes = named or (list(options.classes) if options.classes else None)
    if classes is None and part == "train":
        seen = set(labels.tolist())
        if seen != set(range(len(seen))):
            raise ValueError(
                f"{part}: {name}: column {options.label_column!r} has the labels "
                f"{sorted(seen)[:10]}{'…' if len(seen) > 10 else ''}, want 0, 1, … without gaps; "
                "classes can be named with the key `classes`"
            )
        classes = [str(label) for label in range(len(seen))]
    return table, labels, classes


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return set(feature) >= {"bytes", "path"} and _holds_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _integers(table: Any, column: str, name: str) -> Tensor:
    import pyarrow

    values = table.select_columns([column]).with_format("arrow")[:].column(0)
    if not pyarrow.types.is_integer(values.type):
        raise ValueError(f"{name}: column {column!r} has {values.type}, want integer labels")
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise ValueError(f"{name}: row {row} has no {column}")
    return torch.from_numpy(values.to_numpy().astype("int64"))


def _parquet(options: ImageOptions, part: Part, place: str) -> Any:
    import datasets
    import pyarrow.parquet

    try:
        files = find(place, (".parquet",))
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None
    columns: dict[Path, set[str]] = {}
    rows: dict[Path, int] = {}
    for file in files:
        try:
            about = pyarrow.parquet.read_metadata(file)
            columns[file] = set(about.schema.to_arrow_schema().names)
            rows[file] = about.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{part}: {file}: not a readable Parquet file ({error})") from None
        if columns[file] != columns[files[0]]:
            raise ValueError(
                f"{part}: {file} has the columns {sorted(columns[file])}, but {files[0]} has "
                f"{sorted(columns[files[0]])}"
            )
    if not any(rows.values()):
        raise ValueError(f"{part}: {place}: it has no rows")
    bars_on_terminals()
    try:  # datasets refuses files without rows
        return datasets.Dataset.from_parquet([str(file) for file in files if rows[file]])
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{part}: {place}: {error.__cause__ or error}") from None


def _hub(options: ImageOptions, part: Part, place: str) -> Any:
    import datasets

    bars_on_terminals()
    try:
        return datasets.load_dataset(
            str(options.name), options.subset, split=place, revision=options.revision
        )
    except (datasets.exceptions.DatasetsError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"{part}: {_name(options, place)}: {error.__cause__ or error}") from None
