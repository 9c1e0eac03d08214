"""Who is train, query and gallery in a benchmark's protocol."""

import dataclasses

import ml_collections
import numpy as np

from jlml_jax import datasets
from jlml_jax.datasets.base import DISTRACTOR, Split
from jlml_jax.errors import UserError

# Data sets whose splits are train, query and gallery themselves.
FIXED_SPLITS = ("market1501", "synthetic_pedestrians")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The images of one trial. Training and test identities are disjoint."""

    name: str  # as results.json has it
    train: Split
    query: Split
    gallery: Split

    def identities(self) -> np.ndarray:
        """The training identities, sorted, int64 [C]: class c of a classifier is the person identities()[c]."""
        return np.unique(self.train.identities)

    def labels(self) -> np.ndarray:
        """The classes of the training images, int64 [N]."""
        return np.searchsorted(self.identities(), self.train.identities)


def load(data: ml_collections.ConfigDict) -> Protocol:
    """The protocol of `config.data`: Market-1501's single-query one, and the same for the synthetic set."""
    if data.name in datasets.NAMES and data.name not in FIXED_SPLITS:
        raise UserError(f"data.name={data.name!r} can be prepared, but its protocol is not there yet; "
                        f"train on {' or '.join(FIXED_SPLITS)}")
    splits = datasets.load(data.name, ("train", "query", "gallery"), data.data_dir)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"the {name} split of {data.name} is empty; prepare the data set again")
    if splits["train"].identities.min() <= DISTRACTOR:
        raise UserError(f"the train split of {data.name} has junk or distractors in it; prepare the data set again")
    shared = np.intersect1d(splits["train"].identities, splits["query"].identities)
    if len(shared):
        raise UserError(f"{len(shared)} test identities of {data.name}, such as {shared[0]}, are training identities "
                        "too: the result would mean nothing; prepare the data set again from the original files")
    return Protocol("single-query", splits["train"], splits["query"], splits["gallery"])
