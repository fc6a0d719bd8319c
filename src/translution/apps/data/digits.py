"""Handwritten digits, and where they are put on a larger canvas."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import os
import shutil
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Digits", "Ring", "load_digits", "mnist", "place", "read_idx", "rings", "train_batches"]

# The four files of MNIST and the SHA-256 of their content when unpacked, so that it does not matter
# how a copy was compressed.
MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SOURCES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
RINGS = 10  # the most distances that accuracy is measured at


@dataclass(frozen=True)
class Digits:
    """Digits, float32 [n, height, width] with values from 0 to 1, and their labels, int64 [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def size(self) -> int:
        """The side of a digit in pixels."""
        return int(self.train.shape[-1])

    def limited(self, train: int | None, test: int | None) -> Digits:
        """Only the first digits of each part, whose order is random already. None keeps all."""
        return Digits(
            self.train[:train], self.train_labels[:train], self.test[:test], self.test_labels[:test]
        )


def load_digits() -> Digits:
    """The 1,797 digits of 8×8 pixels that scikit-learn contains. A fixed fifth is for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int64), test_size=0.2, random_state=0, stratify=labels
    )
    return Digits(*(torch.from_numpy(a) for a in (train, train_labels, test, test_labels)))


def mnist(
    folder: Path,
    sources: Sequence[str] = SOURCES,
    checksums: dict[str, str] | None = None,
) -> Digits:
    """MNIST from the four IDX files in a folder, plain or with gzip. Missing files are downloaded.

    Args:
        folder: where the files are.
        sources: addresses to download from, in this order.
        checksums: the SHA-256 of each unpacked file; None takes those of MNIST.

    Raises:
        ValueError: a file with another content.
        OSError: a file that cannot be read or downloaded.
    """
    checksums = MNIST if checksums is None else checksums
    arrays = {}
    for name, checksum in checksums.items():
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
        content = _download(folder, name, checksum, sources) if path is None else _unpack(path)
        if path is not None:
            _check(str(path), content, checksum)
        arrays[name] = read_idx(content, str(path or folder / name))
    train, train_labels, test, test_labels = arrays.values()
    return Digits(
        torch.from_numpy(train.astype(np.float32) / 255),
        torch.from_numpy(train_labels.astype(np.int64)),
        torch.from_numpy(test.astype(np.float32) / 255),
        torch.from_numpy(test_labels.astype(np.int64)),
    )


def read_idx(content: bytes, name: str) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Args:
        content: the unpacked file.
        name: its name, for messages.

    Raises:
        ValueError: another format, or a file that is cut off.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 4:
        raise ValueError(
            f"{name}: not an IDX file of unsigned bytes (it starts with {content[:4].hex(' ')}, "
            "want 00 00 08 and the number of axes)"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{name}: cut off within its header of {start} bytes")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{name}: got {len(content) - start} bytes of data, want {math.prod(shape)} for the "
            f"shape {shape} in its header"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _unpack(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None


def _check(name: str, content: bytes, checksum: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != checksum:
        raise ValueError(
            f"{name}: the SHA-256 of its content is {got}, want {checksum}; remove the file to "
            "have it downloaded"
        )


def _download(folder: Path, name: str, checksum: str, sources: Sequence[str]) -> bytes:
    """Download a file from the first source that offers it. Only a correct file is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for source in sources:
        url = f"{source}{name}.gz"
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=30) as reply:
                shutil.copyfileobj(reply, file)
            content = _unpack(Path(temporary))
            _check(url, content, checksum)
            os.replace(temporary, folder / f"{name}.gz")
            return content
        except (OSError, ValueError) as error:
            problems.append(f"{url}: {error}")
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise OSError(
        f"cannot download {name} to {folder} ({'; '.join(problems)}); put the four MNIST files "
        "there, or use --data digits"
    )


# -- positions on a canvas -----------------------------------------------------------------------


def place(digits: Tensor, canvas: int, places: Tensor) -> Tensor:
    """Place digits on black canvases.

    Args:
        digits: [n, height, width].
        canvas: the side of the canvas in pixels.
        places: int64 [n, 2], the row and column of each digit's upper left pixel.

    Returns:
        Images [n, 1, canvas, canvas].

    Raises:
        ValueError: a digit that would not lie within its canvas.
    """
    n, size = len(digits), digits.shape[-1]
    if n and (places.min() < 0 or places.max() > canvas - size):
        raise ValueError(
            f"places: got {int(places.min())} to {int(places.max())}, want 0 to {canvas - size}"
        )
    span = torch.arange(size)
    rows = (places[:, :1] + span)[:, :, None]
    columns = (places[:, 1:] + span)[:, None, :]
    images = digits.new_zeros(n, canvas, canvas)
    images[torch.arange(n)[:, None, None], rows, columns] = digits
    return images[:, None]


def centre(n: int, size: int, canvas: int) -> Tensor:
    """Positions [n, 2] that put digits of this size in the centre of a canvas."""
    return torch.full((n, 2), (canvas - size) // 2)


def anywhere(n: int, size: int, canvas: int, generator: torch.Generator, step: int = 1) -> Tensor:
    """Random positions [n, 2] for digits of this size on a canvas.

    Their distances from the centre, down and across, are multiples of `step` pixels.
    """
    first = (canvas - size) // 2 % step
    count = (canvas - size - first) // step + 1
    return first + step * torch.randint(count, (n, 2), generator=generator)


def shifted(n: int, size: int, canvas: int, generator: torch.Generator, shift: int) -> Tensor:
    """Positions [n, 2] at a distance of `shift` pixels from the centre, both down or up and across.

    The direction of each digit is one of the four diagonals, at random.
    """
    signs = 2 * torch.randint(2, (n, 2), generator=generator) - 1
    return centre(n, size, canvas) + shift * signs


@dataclass(frozen=True)
class Ring:
    """The positions whose distance from the centre is from `first` to `last` pixels.

    The distance is the larger one of rows and columns.

    places: int64 [n, 2].
    share: how many of all positions these are, from 0 to 1.
    """

    first: int
    last: int
    places: Tensor
    share: float


def rings(size: int, canvas: int) -> list[Ring]:
    """All positions of a digit of this size, grouped by distance from the centre, nearest first."""
    axis = torch.arange(canvas - size + 1)
    every = torch.cartesian_prod(axis, axis)
    distance = (every - (canvas - size) // 2).abs().amax(1)
    most = int(distance.max())
    count = min(RINGS - 1, most)
    edges = [0] + [1 + i * most // count for i in range(count + 1)]
    groups = []
    for first, after in itertools.pairwise(edges):
        places = every[(distance >= first) & (distance < after)]
        groups.append(Ring(first, after - 1, places, len(places) / len(every)))
    return groups


def train_batches(
    data: Digits, canvas: int, moved: bool, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training digits on canvases. Every epoch has a new random order.

    Args:
        data: the digits.
        canvas: the side of the canvas in pixels.
        moved: whether digits lie anywhere on the canvas, or in its centre.
        batch_size, steps: the size and number of batches.
        seed: decides orders and positions.

    Yields:
        Images, float32 [batch_size, 1, canvas, canvas], and labels, int64 [batch_size].
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            again = torch.randperm(len(data.train), generator=generator)
            order = torch.cat([order, again])
        chosen, order = order[:batch_size], order[batch_size:]
        if moved:
            places = anywhere(batch_size, data.size, canvas, generator)
        else:
            places = centre(batch_size, data.size, canvas)
        yield place(data.train[chosen], canvas, places), data.train_labels[chosen]
