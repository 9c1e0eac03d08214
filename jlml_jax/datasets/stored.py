"""Reading what a TFDS builder wrote, by index: examples, and encoded images that stay on disk. Needs no TensorFlow."""

import contextlib
import hashlib
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jlml_jax.errors import UserError

EXAMPLES_AT_ONCE = 256  # many times faster than one by one, and yet small in memory


def open_split(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
    """The examples of a prepared split, by index; images are left encoded, as bytes.

    Raises:
        UserError: its files are damaged; some damage is found only when an example is read.
    """
    # Every file stays open once it is read from: ImageNet has as many as most systems allow a process at first.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        soft = min(soft + builder.info.splits[split].num_shards, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with _damage_told(builder):
        return _Examples(builder, builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


@contextlib.contextmanager
def _damage_told(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # array_record's, of whatever kind
        told = str(error).splitlines()[0]
        if "() failed: " in told:  # as the system told it: the files may be whole
            raise UserError(f"cannot read {builder.data_path} ({told}); mend that and run the same command again"
                            ) from error
        raise UserError(f"{builder.data_path} is damaged ({told}); prepare {full_name(builder)} again with --overwrite"
                        ) from error


def full_name(builder: tfds.core.DatasetBuilder) -> str:
    """As in `datasets.NAMES`, with the configuration."""
    return "/".join([builder.name, *([builder.builder_config.name] if builder.builder_config else [])])


class _Examples(Sequence[dict[str, Any]]):
    """TFDS's data source, whose damage is told."""

    def __init__(self, builder: tfds.core.DatasetBuilder, source: Sequence[dict[str, Any]]):
        self._builder, self._source = builder, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        with _damage_told(self._builder):
            examples = self._source.__getitems__(rows)
            if any(value is None for example in examples for value in example.values()):
                raise RuntimeError("an example is empty")
            return examples


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
