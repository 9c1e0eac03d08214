"""A split of a data set: images in memory, or left on disk, with their annotation. Knows nothing of who wrote them."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from jlml_jax.datasets.images import decode_image

# In the place of a person's number, 1 and up.
JUNK = -1
DISTRACTOR = 0
EXAMPLES_AT_ONCE = 256  # many times faster than one by one, and yet small in memory


def read_examples(source: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All examples of `source` in its order."""
    for start in range(0, len(source), EXAMPLES_AT_ONCE):
        yield from source.__getitems__(range(start, min(start + EXAMPLES_AT_ONCE, len(source))))


class StoredImages(Sequence[bytes]):
    """Encoded images that are read from disk whenever they are asked for; threads may share them."""

    def __init__(self, source: Sequence[dict[str, Any]], digests: np.ndarray, rows: np.ndarray | None = None):
        """Args:
            source: all examples of a split, as `open_split` gives them.
            digests: their images' SHA-256, uint8 [len(source), 32].
            rows: which of them, int [N]; None for all.
        """
        self._source, self._digests = source, digests
        self._rows = np.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> bytes:
        return self._source[self._rows[index]]["image"]

    def read(self, indices: np.ndarray) -> list[bytes]:
        """The images at `indices` (int [M]), read in parallel."""
        return [example["image"] for example in self._source.__getitems__(self._rows[indices].tolist())]

    def select(self, indices: np.ndarray) -> "StoredImages":
        """The images at `indices` (int [M]), in that order, still on disk."""
        return StoredImages(self._source, self._digests, self._rows[indices])

    def digests(self) -> Iterator[bytes]:
        """The images' SHA-256, without reading them."""
        return (self._digests[row].tobytes() for row in self._rows)


def join_images(parts: Sequence[Sequence[bytes] | StoredImages]) -> StoredImages:
    """The images of all `parts`, one after another; those on disk stay there."""
    digests = [digest for part in parts for digest in (
        part.digests() if isinstance(part, StoredImages) else (hashlib.sha256(image).digest() for image in part))]
    return StoredImages(_Joined(parts), np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1))


class _Joined(Sequence[dict[str, Any]]):
    """What StoredImages reads from, of several parts."""

    def __init__(self, parts: Sequence[Sequence[bytes] | StoredImages]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        rows = np.asarray(rows, int)
        numbers = self._ends.searchsorted(rows, "right")
        images = {}
        for number in np.unique(numbers):
            part, chosen = self._parts[number], rows[numbers == number]
            within = chosen - self._ends[number] + len(part)
            read = part.read(within) if isinstance(part, StoredImages) else [part[index] for index in within]
            images |= zip(chosen.tolist(), read, strict=True)
        return [{"image": images[row]} for row in rows.tolist()]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one data set, still encoded, in memory or on disk, with their annotation."""

    dataset: str  # as in datasets.NAMES
    images: Sequence[bytes] | StoredImages  # N encoded files
    identities: np.ndarray  # int64 [N]
    cameras: np.ndarray  # int64 [N]
    names: np.ndarray  # str [N]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> list[bytes]:
        """The encoded images at `indices` (int [M])."""
        if isinstance(self.images, StoredImages):
            return self.images.read(indices)
        return [self.images[i] for i in indices]

    def select(self, indices: np.ndarray) -> "Split":
        """The images at `indices` (int [M]), in that order; what is on disk stays there."""
        images = self.images.select(indices) if isinstance(self.images, StoredImages) else self.read(indices)
        return Split(self.dataset, images, self.identities[indices], self.cameras[indices], self.names[indices])

    def keys(self) -> Iterator[bytes]:
        """What tells images apart: the encoded files; for images on disk, which are not read, their SHA-256."""
        return iter(self.images.digests() if isinstance(self.images, StoredImages) else self.images)

    def fingerprint(self) -> str:
        """SHA-256 over names, annotation and encoded images: equal exactly when the split is.

        Images on disk are not read: their own SHA-256 stand for them.
        """
        digest = hashlib.sha256()
        for name, identity, camera, image in zip(self.names, self.identities, self.cameras, self.keys(), strict=True):
            digest.update(f"{name}\0{identity}\0{camera}\0{len(image)}\0".encode())
            digest.update(image)
        return digest.hexdigest()

    def training_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to decode to for an input of `height` x `width`, to which the training step resizes.

        The images' own, where all in memory share one that is no larger: so they are few bytes to hold and to move.
        """
        if isinstance(self.images, StoredImages) or not self.images:
            return height, width
        own = decode_image(self.images[0], f"{self.dataset}: {self.names[0]}").shape[:2]
        if own == (height, width) or own[0] > height or own[1] > width:
            return height, width
        with contextlib.suppress(Exception):  # what does not decode is named once it is decoded
            for encoded in self.images:
                with Image.open(io.BytesIO(encoded)) as image:  # reads the size alone
                    if image.size != own[::-1]:
                        break
            else:
                return own
        return height, width

    def decode(self, height: int, width: int) -> np.ndarray:
        """All images as one uint8 array [N, height, width, 3], resized by an antialiased triangle filter."""
        def decode(index: int, encoded: bytes) -> np.ndarray:
            return decode_image(encoded, f"{self.dataset}: {self.names[index]}", height, width)

        decoded = np.empty((len(self), height, width, 3), np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes and resizes
            for start in range(0, len(self), EXAMPLES_AT_ONCE):
                indices = np.arange(start, min(start + EXAMPLES_AT_ONCE, len(self)))
                for index, image in zip(indices, pool.map(decode, indices, self.read(indices)), strict=True):
                    decoded[index] = image
        return decoded
