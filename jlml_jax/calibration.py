"""When two images show the same person: thresholds on the distance, by the rate at which strangers fall below them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlml_jax import provenance
from jlml_jax.datasets.split import DISTRACTOR
from jlml_jax.distances import l2_distances
from jlml_jax.errors import UserError
from jlml_jax.extractor import Extractor
from jlml_jax.files import write_atomically

FALSE_ACCEPT_RATES = (1e-2, 1e-3, 1e-4)
FILE = "calibration.json"

_BLOCK = 2048  # images a side of the block of pairs whose distances are held at a time
_SHIFT = 12  # bits of a float32 that a bin leaves out: bins are 1/2048 wide, relative to the distance
_POINTS = 200  # of the ROC that is written


@dataclasses.dataclass(frozen=True, eq=False)
class PairCounts:
    """How many pairs there are by distance: exact counts in 2^19 bins. A positive float32 orders as its bits do."""

    same: np.ndarray  # int64 [bins], pairs of one person from different cameras
    different: np.ndarray  # int64 [bins], pairs of different persons, or of a person and a distractor

    def edges(self) -> np.ndarray:
        """The lower edges of the bins, float32."""
        return (np.arange(len(self.same), dtype=np.uint32) << _SHIFT).view(np.float32)


def count_pairs(features: np.ndarray, identities: np.ndarray, cameras: np.ndarray, what: str = "images") -> PairCounts:
    """Counts all pairs of images, block by block.

    As in the matching rules, pairs of one person's images from one camera do not count, nor does junk (-1); a
    distractor (0) is nobody in the set, and whether two distractors are one person is not known.

    Args:
        features: float [N, D].
        identities: int [N]; persons are 1 and up.
        cameras: int [N].
        what: they are, for messages.

    Raises:
        UserError: there are no pairs of one of the two kinds.
    """
    keep = identities >= DISTRACTOR
    features, identities, cameras = features[keep], identities[keep], cameras[keep]
    bins = 1 << (31 - _SHIFT)
    same, different = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    starts = range(0, len(features), _BLOCK)
    for i in starts:
        for j in range(i, len(features), _BLOCK):
            a, b = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            codes = l2_distances(features[a], features[b]).view(np.uint32) >> _SHIFT
            equal = identities[a, None] == identities[b]
            other = ~equal
            equal &= (cameras[a, None] != cameras[b]) & (identities[a, None] != DISTRACTOR)
            if i == j:  # each pair once
                upper = np.triu(np.ones(equal.shape, bool), 1)
                equal &= upper
                other &= upper
            same += np.bincount(codes[equal], minlength=bins)
            different += np.bincount(codes[other], minlength=bins)
    if not same.any():
        raise UserError(f"no two of the {len(features):,} {what} show one person, from different cameras where these "
                        "are known; give images with identities, of persons seen by more cameras than one")
    if not different.any():
        raise UserError(f"no two of the {len(features):,} {what} show different persons; give images of more persons")
    return PairCounts(same, different)


def calibrate(counts: PairCounts) -> dict[str, Any]:
    """Rates by threshold, as JSON: two images are accepted as one person if their distance is below the threshold.

    `thresholds` has, for each of FALSE_ACCEPT_RATES, the largest bin edge at which no larger share of the different
    pairs is accepted; None where there are too few pairs to measure that rate, fewer than 1 / rate. `equal_error` is
    where false accepts and false rejects are closest. `roc` has up to 200 points.
    """
    edges = counts.edges()
    total_same, total_different = int(counts.same.sum()), int(counts.different.sum())
    # Pairs below each edge.
    below_same = np.concatenate([[0], np.cumsum(counts.same)[:-1]])
    below_different = np.concatenate([[0], np.cumsum(counts.different)[:-1]])
    accepts, rejects = below_different / total_different, 1 - below_same / total_same

    def point(index: int) -> dict[str, float]:
        return {"threshold": float(edges[index]), "false_accept_rate": float(accepts[index]),
                "true_accept_rate": float(1 - rejects[index])}

    thresholds = []
    for rate in FALSE_ACCEPT_RATES:
        allowed = math.floor(rate * total_different * (1 + 1e-12))  # so that 1e-3 of 1,000 is 1
        entry = {"rate": rate, "threshold": None, "different_pairs_accepted": None}
        if allowed:
            index = int(np.searchsorted(below_different, allowed, "right")) - 1
            entry |= point(index) | {"different_pairs_accepted": int(below_different[index])}
        thresholds.append(entry)
    equal = int(np.argmin(np.abs(accepts - rejects)))
    changes = np.flatnonzero(np.diff(below_same + below_different)) + 1
    # Evenly spaced in the rank of the different pairs on a logarithmic scale: the low rates are what matters.
    marks = np.searchsorted(below_different[changes], np.geomspace(1, total_different, _POINTS))
    points = np.unique(changes[np.minimum(marks, len(changes) - 1)])
    return {
        "pairs": {"same": total_same, "different": total_different},
        "thresholds": thresholds,
        "equal_error": point(equal) | {"rate": float((accepts[equal] + rejects[equal]) / 2)},
        "roc": [point(index) for index in points],
    }


def save(workdir: Path, result: dict[str, Any], extractor: Extractor, source: dict[str, Any]) -> Path:
    """Writes calibration.json into the run, whole or not at all; `source` says which images it is of.

    Raises:
        UserError: the file cannot be written.
    """
    path = workdir / FILE
    content = {"fingerprint": extractor.fingerprint, "source": source, **result, "provenance": provenance.collect()}
    try:
        write_atomically(path, json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room, or make the folder writable") from error
    return path


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """A run's thresholds, as calibrate has measured them; false if there are none."""

    thresholds: Sequence[tuple[float, float]]  # (rate, threshold), the strictest rate first
    why_none: str = ""  # in words, for the user
    of_tracks: bool = False  # measured on pairs of tracks, rather than of images

    def __bool__(self) -> bool:
        return bool(self.thresholds)

    def on(self, *, tracks: bool) -> "Verdicts":
        """These, if they were measured on pairs of tracks, or of single images, as asked for; else none: tracks of
        several images are nearer to each other, those of strangers too (experiments/results/grouping.md)."""
        if not self or self.of_tracks == tracks:
            return self
        was, now = ("tracks", "single images") if self.of_tracks else ("single images", "tracks")
        return Verdicts((), f"the run was calibrated on {was}; for {now} calibrate a copy of it on these")

    def of(self, distance: float) -> str:
        """The strictest rate at which two images at that distance are accepted as one person."""
        for rate, threshold in self.thresholds:
            if distance < threshold:
                return f"same person at a false accept rate of {format_rate(rate)}"
        return f"not the same person at {format_rate(self.thresholds[-1][0])}"


def format_rate(rate: float) -> str:
    """1e-3 rather than Python's 0.001."""
    return f"{rate:.0e}".replace("e-0", "e-")


def load(workdir: Path, extractor: Extractor) -> dict[str, Any] | None:
    """What `save` has left in the run; None if nothing.

    Raises:
        UserError: it is damaged, or of other weights than the run has now.
    """
    path = workdir / FILE
    again = f"run python -m jlml_jax.calibrate --workdir={workdir} again, or delete it"
    try:
        content = json.loads(path.read_text())
        fingerprint = str(content["fingerprint"])
        _thresholds(content)
        _of_tracks(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {again}") from error
    if fingerprint != extractor.fingerprint:
        raise UserError(f"{path} is of another model (fingerprint {fingerprint}) than the run now is "
                        f"({extractor.fingerprint}); {again}")
    return content


def load_verdicts(workdir: Path, extractor: Extractor) -> Verdicts:
    """The thresholds that `save` has left in the run, if any, of images or of tracks: see `Verdicts.on`. A UserError as
    `load` raises it."""
    content = load(workdir, extractor)
    if content is None:
        return Verdicts((), f"run python -m jlml_jax.calibrate --workdir={workdir} first, with --features of labelled "
                        "images of yours if the run's data set is not at hand")
    return Verdicts(_thresholds(content), "the run was calibrated on too few pairs of different people; run python -m "
                    f"jlml_jax.calibrate --workdir={workdir} on more images", _of_tracks(content))


def _thresholds(content: dict[str, Any]) -> list[tuple[float, float]]:
    return sorted((float(entry["rate"]), float(entry["threshold"])) for entry in content["thresholds"]
                  if entry["threshold"] is not None)


def _of_tracks(content: dict[str, Any]) -> bool:
    return "tracks" in content.get("source", {})
