"""Reading what a TFDS builder wrote, by index: examples, and encoded images that stay on disk. Needs no TensorFlow."""

import contextlib
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from jlml_jax.errors import UserError


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
