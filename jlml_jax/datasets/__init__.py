"""The data sets by name: one TFDS builder a benchmark.

TFDS is imported only where a builder is asked for: what works on a user's own images does without.
"""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from jlml_jax.datasets.split import DISTRACTOR, Split
from jlml_jax.errors import UserError, first_few, storage_errors_told
from jlml_jax.files import refuse_address

if TYPE_CHECKING:
    from jlml_jax.datasets.base import ArrayRecordBuilder

# Where a builder has configurations, a name is that of the data set and that of the configuration, as in TFDS.
_BUILDERS = {
    "cuhk03/detected": "jlml_jax.datasets.cuhk03:Cuhk03",
    "cuhk03/labeled": "jlml_jax.datasets.cuhk03:Cuhk03",
    "folder/NAME": "jlml_jax.datasets.folder:Folder",  # NAME is the user's own
    "grid": "jlml_jax.datasets.grid:Grid",
    "imagenet2012": "jlml_jax.datasets.imagenet:Imagenet2012",
    "market1501": "jlml_jax.datasets.market1501:Market1501",
    "msmt17": "jlml_jax.datasets.msmt17:Msmt17",
    "synthetic_pedestrians": "jlml_jax.datasets.synthetic_pedestrians:SyntheticPedestrians",
    "tiny_imagenet": "jlml_jax.datasets.tiny_imagenet:TinyImagenet",
    "viper": "jlml_jax.datasets.viper:Viper",
}

NAMES = tuple(sorted(_BUILDERS))


def builder(name: str, data_dir: str | None = None) -> "ArrayRecordBuilder":
    """The TFDS builder of data set `name`; `data_dir` defaults to TFDS's own (~/tensorflow_datasets).

    Raises:
        UserError: there is no such data set, `data_dir` is an address, or what lies there is damaged.
    """
    refuse_address("data_dir", data_dir)
    family, _, config = name.partition("/")
    known = "folder/NAME" if family == "folder" else name
    if known not in _BUILDERS:
        raise UserError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    # TFDS warns of a folder without data, which is told better by what then fails.
    logging.set_verbosity(logging.ERROR)
    module, class_name = _BUILDERS[known].split(":")
    data_dir = os.path.expanduser(data_dir) if data_dir else None
    try:
        dataset = getattr(importlib.import_module(module), class_name)(data_dir=data_dir, config=config or None)
        _ = dataset.info.metadata  # which TFDS reads when it is first asked for
        return dataset
    except (json_format.ParseError, ValueError) as error:  # of dataset_info.json, of metadata.json
        raise UserError(f"what was prepared of {name} in {data_dir or tfds.core.constants.DATA_DIR} is damaged "
                        f"({error}); remove its folder there and prepare it again") from error


def load(name: str, splits: tuple[str, ...], data_dir: str | None = None) -> dict[str, Split]:
    """Those of `splits` that a prepared data set has. A data set that is drawn, not downloaded, is drawn if need be.

    Raises:
        UserError: the data set is unknown, not prepared or damaged.
    """
    dataset = _prepared(name, data_dir)
    return {split: dataset.load_split(split) for split in splits if split in dataset.info.splits}


def load_distractors(name: str, data_dir: str | None = None) -> list[Split]:
    """All splits of a prepared data set of crops, as images of nobody (identity 0), which are left on disk.

    Raises:
        UserError: it is not prepared or damaged, or has no crops of people.
    """
    from jlml_jax.datasets.base import PersonDatasetBuilder

    dataset = _prepared(name, data_dir)
    if not isinstance(dataset, PersonDatasetBuilder):
        raise UserError(f"{name} has no crops of people, or of what a detector takes for them; give another data set")
    splits = [dataset.load_stored_split(split) for split in dataset.info.splits]
    return [dataclasses.replace(split, identities=np.full(len(split), DISTRACTOR)) for split in splits]


def metadata(name: str, data_dir: str | None = None) -> dict[str, Any]:
    """What a prepared data set holds besides images: lists that its protocols need, as its builder's docstring says.

    `incomplete`, only there if the original files were not those published, says in words for people in what: "resized
    to 64x128; train has 12,000 images instead of 12,936".
    """
    dataset = _prepared(name, data_dir)

    class Metadata(dict):
        def __missing__(self, key: str) -> Any:
            raise UserError(f"{dataset.data_path} is damaged (metadata.json has no {key}); prepare {name} again with "
                            "--overwrite")

    return Metadata(dataset.info.metadata or {})


@dataclasses.dataclass(frozen=True)
class Names:
    """What people and cameras of a data set are called: in one of the user's own as they did, else by number."""

    identities: Sequence[str] = ()
    cameras: Sequence[str] | None = ()  # None: not known, every image counts as one of its own

    def identity(self, number: int) -> str:
        if number == DISTRACTOR:
            return "distractor"
        return self.identities[number - 1] if self.identities else str(number)

    def camera(self, number: int) -> str:
        if number < 0:
            return "another"  # extra distractors', as protocols has it
        if self.cameras is None:
            return ""
        return self.cameras[number - 1] if self.cameras else str(number)


def names(name: str, data_dir: str | None = None) -> Names:
    """Those of a prepared data set; of several joined by + the numbers."""
    if not name.startswith("folder/") or "+" in name:
        return Names()
    found = metadata(name, data_dir)
    return Names(found["identities"], found["cameras"] or None)


def _prepared(name: str, data_dir: str | None) -> "ArrayRecordBuilder":
    dataset = builder(name, data_dir)
    if not dataset.is_prepared():
        if not dataset.DRAWN:
            root = Path(dataset.data_dir_root)
            fetch, source = f"{' '.join(dataset.MANUAL_DOWNLOAD_INSTRUCTIONS.split())} Then", "ORIGINAL_FILES"
            if name.startswith("folder/"):  # whose name may be a wrong one
                others = [f"folder/{path.parts[-3]}" for path in sorted(root.glob("folder/*/*/dataset_info.json"))]
                fetch = f"There are {first_few(others)}: give one of these, or" if others else "First"
                source = "CSV_OR_FOLDER"
            raise UserError(f"{name} is not prepared in {root}. {fetch} run python -m jlml_jax.prepare {name} "
                            f"--source={source} --data_dir={root}")
        with storage_errors_told(dataset.data_path), dataset.alone():
            dataset = builder(name, data_dir)  # which another process may have drawn meanwhile
            if not dataset.is_prepared():
                print(f"drawing {name} into {dataset.data_dir}", flush=True)
                dataset.build()
    return dataset
