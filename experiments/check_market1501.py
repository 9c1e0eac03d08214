"""Market-1501's own lists of good and junk images, compared with what our ranking takes for true matches and ignores.

python -m experiments.check_market1501 --source=Market-1501-v15.09.15 [--data_dir=DIR]

The archive has two lists for each query, gt_query/*_good.mat and *_junk.mat, by which its evaluation code goes; images
of identity -1, ignored for every query, are in none. What ours takes them for is not computed here: `metrics` is asked,
by made-up distances.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs import default
from jlml_jax import metrics, protocols
from jlml_jax.arguments import Parser
from jlml_jax.datasets.base import unpacked_root
from jlml_jax.datasets.market1501 import ROOT
from jlml_jax.datasets.matlab import integers, read_mat
from jlml_jax.datasets.split import JUNK, Split
from jlml_jax.errors import UserError, exit_status, first_few
from jlml_jax.evaluate import labels_of
from jlml_jax.protocols import Trial

LISTS = "gt_query"
WRONG, IGNORED, GOOD = range(3)
WORDS = ("wrong", "junk", "good")


def listed_kinds(folder: Path, query: str, gallery: Split) -> np.ndarray:
    """What the archive has each gallery image be for the query of that file name: WRONG, IGNORED or GOOD, int8 [G].

    Raises:
        UserError: a list is missing or damaged, or names an image that it cannot.
    """
    kinds = np.where(gallery.identities == JUNK, IGNORED, WRONG).astype(np.int8)
    for word, kind in (("good", GOOD), ("junk", IGNORED)):
        path = folder / f"{query.partition('.')[0]}_{word}.mat"
        if not path.is_file():
            raise UserError(f"there is no {path}; unpack the archive again")
        try:
            numbers = integers(read_mat(path, f"{word}_index")[f"{word}_index"])
        except ValueError as error:
            raise UserError(f"{path} is not a list of images ({error}); unpack the archive again") from error
        numbers = [] if numbers == [0] else numbers
        if any(not 1 <= number <= len(gallery) for number in numbers):
            raise UserError(f"{path} numbers images beyond the {len(gallery):,} of bounding_box_test; unpack the "
                            "archive again")
        rows = np.array(numbers, int) - 1
        if (kinds[rows] != WRONG).any() or len(set(numbers)) != len(numbers):
            raise UserError(f"{path} lists an image twice, one that is good, or one of identity -1; unpack the "
                            "archive again")
        kinds[rows] = kind
    return kinds


def agree(labels: Sequence[np.ndarray], kinds: np.ndarray) -> bool:
    """Whether `metrics` takes every gallery image for what it is listed as.

    Three rankings tell, in each of which the images of a kind have one distance. Below, a true match, a wrong and an
    ignored image are so to `metrics`; WRONG, IGNORED and GOOD is how they are listed.

    1. WRONG, IGNORED, GOOD: the first true match has the rank after as many images as are WRONG. So none of them is a
       true match, which would have had a lower rank, even with all wrong ones of that distance before it.
    2. GOOD, WRONG, IGNORED: no wrong image precedes a true match (mINP is 1). So all true matches are GOOD: an IGNORED
       one would have all wrong images before it, so there would be none, and in 1 its rank would be 1.
    3. IGNORED, GOOD, WRONG: again. So all wrong images are WRONG, and by the rank in 1 all WRONG ones are wrong; by
       mINP in 1, there are as many true matches as GOOD images. What is left, the IGNORED, is ignored.

    Args:
        labels: of one query, in the order in which `metrics` takes them.
        kinds: how each gallery image is listed, int8 [G], some of them WRONG.
    """
    num_wrong, num_good = np.count_nonzero(kinds == WRONG), np.count_nonzero(kinds == GOOD)

    def rank(*order: int) -> metrics.RankingMetrics:
        return metrics.rank_metrics(np.argsort(order)[kinds][None], *labels, max_rank=num_wrong + 1)

    try:
        last = rank(WRONG, IGNORED, GOOD)
        first = [rank(GOOD, WRONG, IGNORED), rank(IGNORED, GOOD, WRONG)]
    except UserError:  # to `metrics`, the query has no true match
        return False
    return (last.cmc[num_wrong - 1] == 0 and last.cmc[num_wrong] == 1
            and last.mean_inp == num_good / (num_wrong + num_good) and all(one.mean_inp == 1 for one in first))


@functools.cache
def counted_kind(query_id: int, query_camera: int, identity: int, camera: int) -> int:
    """What `metrics` takes an image for: ranked behind a distractor and before a true match, it shows by mINP."""
    scores = metrics.rank_metrics([[0, 1, 2]], [query_id], [0, identity, query_id], [query_camera],
                                  [query_camera, camera, query_camera + 1])
    return {1 / 3: WRONG, 1 / 2: IGNORED, 2 / 3: GOOD}[scores.mean_inp]


def difference(trial: Trial, row: int, kinds: np.ndarray) -> str:
    """Which images of the query in `row` are counted as another kind than listed, in words."""
    query, gallery = trial.query, trial.gallery
    counted = [counted_kind(int(query.identities[row]), int(query.cameras[row]), identity, camera) for identity, camera
               in zip(gallery.identities.tolist(), gallery.cameras.tolist(), strict=True)]
    others = [f"{name} is {WORDS[listed]} there, {WORDS[ours]} here"
              for name, listed, ours in zip(gallery.names, kinds, counted, strict=True) if listed != ours]
    return f"{query.names[row]} ({len(others)} images: {first_few(others)})"


def differing_queries(trial: Trial, listed: Sequence[np.ndarray]) -> Iterator[int]:
    """The queries for which `metrics` differs from `listed`, the kinds of the gallery images for each."""
    queries, gallery_ids, query_cameras, gallery_cameras = labels_of(trial)
    for row, kinds in enumerate(tqdm(listed, "ranking", unit=" queries", leave=False, disable=None)):
        if not agree((queries[[row]], gallery_ids, query_cameras[[row]], gallery_cameras), kinds):
            yield row


def check(source: Path, data_dir: str) -> None:
    """Prints how many images are listed, and that all agree; a UserError names the first queries that do not."""
    folder = unpacked_root(source, ROOT, [f"{LISTS}/"]) / LISTS
    data = default.get_config().data
    data.data_dir = data_dir
    trial = protocols.load("market1501", data).trial(0)
    # The lists number the images of bounding_box_test in the order of their names, which a split has too.
    listed = [listed_kinds(folder, name, trial.gallery) for name in trial.query.names]
    good = sum(np.count_nonzero(kinds == GOOD) for kinds in listed)
    num_ignored = np.count_nonzero(trial.gallery.identities == JUNK)
    junk = [np.count_nonzero(kinds == IGNORED) - num_ignored for kinds in listed]
    print(f"{len(listed):,} queries, {len(trial.gallery):,} gallery images; listed are {good:,} good ones and "
          f"{sum(junk):,} junk ones, none for {junk.count(0):,} queries; {num_ignored:,} of identity -1", flush=True)
    if differing := list(differing_queries(trial, listed)):
        shown = [difference(trial, row, listed[row]) for row in differing[:4]]
        raise UserError(f"{len(differing):,} of {len(listed):,} queries differ from {folder}: "
                        f"{first_few(shown, '; ')}; prepare market1501 from the same archive")
    print("the ranking counts and ignores exactly these")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (None: the process's own); returns its exit status."""
    parser = Parser("experiments.check_market1501", __doc__)
    parser.add_argument("--source", type=Path, required=True, help="the unpacked archive")
    parser.add_argument("--data_dir", default="", help="where prepare has put the data (default: TFDS's own)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: check(options.source, options.data_dir))


if __name__ == "__main__":
    sys.exit(main())
