"""CMC, mAP and mINP of person re-identification: arrays in, numbers out.

Persons are identities >= 1. Identity 0 is a distractor: always wrong, never one person. Identity -1 is junk: ignored.
A gallery image with the query's identity and camera is ignored. On equal distances the wrong image ranks first. (Those
computed here from features may differ in the last bits for two images that are the same.)
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jlml_jax.distances import (
    BLOCK,
    DistancesTo,
    Features,
    Products,
    checked,
    checked_pair,
    numpy_products,
    split,
    squared_l2,
    threads,
)
from jlml_jax.errors import UserError

_CHUNK_DISTANCES = 6 << 20  # that one thread holds at a time (24 MiB as float32)
_MIN_CHUNK = 16  # queries; fewer would read a block of the gallery too often
_ROWS_AT_ONCE = 32  # of distances, which then stay in the cache, in calls long enough for other threads not to wait


class _Labels(NamedTuple):
    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cameras: np.ndarray
    gallery_cameras: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class RankingMetrics:
    """Quality of a ranking; fractions, 0 to 1.

    Attributes:
      cmc: [max_rank] float64; cmc[k - 1] is the share of queries with a true match among the first k gallery images.
      mean_ap: mean over queries of the average precision at hits, (1/K) sum_j j / r_j, where the j-th of the query's K
        true matches has rank r_j.
      mean_ap_trapezoid: the same with the trapezoid of the official Market-1501 evaluation code (compute_AP.m, Zheng
        et al. 2015): (1/K) sum_j (before_j + j / r_j) / 2, where before_j = (j - 1) / (r_j - 1) is the precision one
        rank earlier, 1 when r_j = 1. Recall rises at hits only, so that no other rank adds area.
      mean_inp: mean over queries of K / r_K (mINP; Ye et al., TPAMI 2021).
      num_valid_queries: queries with a true match; all means are over these. With single_gallery_shot, the queries
        that had one in at least one repeat.
    """

    cmc: np.ndarray
    mean_ap: float
    mean_ap_trapezoid: float
    mean_inp: float
    num_valid_queries: int


def evaluate_ranking(
    query_features: Features,
    gallery_features: Features,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
    *,
    max_rank: int = 50,
    single_gallery_shot: bool = False,
    repeats: int = 10,
    seed: int = 0,
    products: Products = numpy_products,
) -> RankingMetrics:
    """Ranks the gallery for every query by L2 distance, and scores it.

    Never holds the Q x G matrix, nor a copy of the gallery: beside what is given, it takes a few hundred MiB at most,
    and a time that grows linearly with G.

    Args:
      query_features: [Q, D].
      gallery_features: [G, D]; an array, a memory map of one, or LazyRows.
      query_ids: [Q] integers >= -1. A query with identity 0 or -1 is never valid.
      gallery_ids: [G] integers >= -1.
      query_cameras: [Q] integers.
      gallery_cameras: [G] integers.
      max_rank: length of the CMC. Beyond the gallery's size it keeps its final value.
      single_gallery_shot: rank against one random image a gallery identity (the CUHK03 protocol) and all distractors.
        One draw a repeat is shared by all queries, and the metrics are averaged over repeats. A query whose identity
        is drawn from its own camera has no match in that repeat and is left out of it; a repeat in which that befalls
        every query is left out of the average.
      repeats: number of draws.
      seed: of the draws, which are those of `np.random.default_rng(seed)`.
      products: what multiplies matrices.

    Raises:
      UserError: a feature is NaN, infinite or immensely larger than the others, or no query has a true match.
      ValueError: shapes do not agree, or identities or cameras are not integers.
    """
    query, gallery = checked_pair(query_features, gallery_features)
    labels = _labels((len(query), len(gallery)), query_ids, gallery_ids, query_cameras, gallery_cameras)

    distances_to, _ = squared_l2(query, gallery, products)
    return _evaluate(distances_to, labels, max_rank, repeats if single_gallery_shot else None, seed)


def rank_blocks(
    distances: Callable[[np.ndarray, np.ndarray], np.ndarray],
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
    *,
    max_rank: int = 50,
    single_gallery_shot: bool = False,
    repeats: int = 10,
    seed: int = 0,
) -> RankingMetrics:
    """`evaluate_ranking` by other distances than L2, which are asked for block by block.

    Args:
      distances: a function of queries int [n] and gallery images int [m] to their distances [n, m], finite, which
        threads call, and which may be asked for the same ones twice. They are compared in their own precision.
    """
    labels = _labels((len(query_ids), len(gallery_ids)), query_ids, gallery_ids, query_cameras, gallery_cameras)
    return _evaluate(lambda columns: lambda rows: distances(rows, columns), labels, max_rank,
                     repeats if single_gallery_shot else None, seed)


def rank_metrics(
    distances: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
    *,
    max_rank: int = 50,
    single_gallery_shot: bool = False,
    repeats: int = 10,
    seed: int = 0,
) -> RankingMetrics:
    """`evaluate_ranking` from distances [Q, G] (smaller is more alike), which are compared in their own precision.

    Raises:
      UserError: a distance is NaN or infinite, or no query has a true match.
      ValueError: shapes do not agree, or identities or cameras are not integers.
    """
    distances = checked(distances, "distances")
    labels = _labels(distances.shape, query_ids, gallery_ids, query_cameras, gallery_cameras)

    def distances_to(columns: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        if not np.array_equal(columns, np.arange(distances.shape[1])):
            return lambda rows: distances[rows[:, None], columns]
        # Of rows side by side, as they mostly are, no copy.
        return lambda rows: distances[rows[0]:rows[-1] + 1] if rows[-1] - rows[0] < len(rows) else distances[rows]

    return _evaluate(distances_to, labels, max_rank, repeats if single_gallery_shot else None, seed)


def query_scores(
    query_features: Features,
    gallery_features: Features,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """For each query the rank of its first true match, int64 [Q], and its average precision at hits, float64 [Q].

    Arguments and errors are those of `evaluate_ranking`, whose means over the whole gallery these add up to. A query
    without a true match has 0 and NaN.
    """
    query, gallery = checked_pair(query_features, gallery_features)
    labels = _labels((len(query), len(gallery)), query_ids, gallery_ids, query_cameras, gallery_cameras)
    first_ranks, average_precision = np.zeros(len(query), np.int64), np.full(len(query), np.nan)
    rows, first_ranks_of_rows, scores = _score(
        squared_l2(query, gallery, numpy_products)[0], labels, np.flatnonzero(labels.gallery_ids >= 0))
    first_ranks[rows], average_precision[rows] = first_ranks_of_rows, scores[0]
    return first_ranks, average_precision


def _labels(shape: tuple[int, ...], *labels: ArrayLike) -> _Labels:
    """Checks the four label arrays against [Q, G]."""
    checked = {}
    for name, length, values in zip(_Labels._fields, (*shape, *shape), labels, strict=True):
        array = np.asarray(values)
        if array.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},), as the features or distances do, got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {array.dtype}")
        array = checked[name] = array.astype(np.int64)
        if name.endswith("ids") and (array < -1).any():  # also what was too large for int64
            raise ValueError(f"{name} has {array.min()}, but persons are 1 and up, 0 is a distractor and -1 is junk")
    return _Labels(**checked)


def _evaluate(
    distances_to: DistancesTo, labels: _Labels, max_rank: int, repeats: int | None, seed: int
) -> RankingMetrics:
    """Metrics over the whole gallery (repeats is None), or averaged over `repeats` single-shot draws of it."""
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    everything = [np.flatnonzero(labels.gallery_ids >= 0)]
    draws = everything if repeats is None else _single_shot_draws(labels.gallery_ids, repeats, seed)
    valid = np.zeros(len(labels.query_ids), bool)
    curves, means = [], []
    for columns in draws:
        rows, first_ranks, scores = _score(distances_to, labels, columns)
        valid[rows] = True
        if rows.size:
            hits = np.bincount(np.minimum(first_ranks, max_rank + 1), minlength=max_rank + 2)
            curves.append(np.cumsum(hits[1 : max_rank + 1]) / rows.size)
            means.append(scores.mean(axis=1))
    if not curves:
        raise UserError(f"no query has a true match: {_why_no_match(labels)}")
    return RankingMetrics(np.mean(curves, axis=0), *np.mean(means, axis=0).tolist(), int(valid.sum()))


def _single_shot_draws(gallery_ids: np.ndarray, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """For each repeat the gallery columns kept: one random image a person, and every distractor."""
    order = np.argsort(gallery_ids, kind="stable")
    order = order[gallery_ids[order] >= 1]
    _, starts, counts = np.unique(gallery_ids[order], return_index=True, return_counts=True)
    distractors = np.flatnonzero(gallery_ids == 0)
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        yield np.concatenate([order[starts + rng.integers(counts)], distractors])


def _score(
    distances_to: DistancesTo, labels: _Labels, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks the gallery `columns` for every query.

    Returns the n queries with a true match, the rank of their first one [n], and their average precision, trapezoid
    average precision and inverse negative penalty [3, n].

    The ranks of the true matches are all that these need, and the rank of the j-th is j plus the number of wrong images
    at most as far. That number is a sum over blocks of the gallery.
    """
    shows_person = labels.query_ids >= 1
    query_ids, gallery_ids, _ = _numbered(labels.query_ids, labels.gallery_ids)
    query_cameras, gallery_cameras, num_cameras = _numbered(labels.query_cameras, labels.gallery_cameras)
    labels = _Labels(query_ids, gallery_ids, query_cameras, gallery_cameras)
    matches = _People(labels, num_cameras, columns).matches
    rows = np.flatnonzero(shows_person & (matches > 0))
    if not rows.size:
        return rows, rows, np.empty((3, 0))
    counts = matches[rows]
    starts = np.cumsum(counts) - counts
    true: list[list[np.ndarray]] = [[] for _ in rows]  # distances of each query's true matches
    wrong = [np.zeros(count, np.int64) for count in counts]  # images at most as far as each of them

    def visit(block: np.ndarray, collect: bool, count: bool) -> None:
        people, distances = _People(labels, num_cameras, block), distances_to(block)

        def visit_chunk(chunk: np.ndarray) -> None:
            of_chunk = distances(rows[chunk])
            own = [people.of(rows[number], row) for number, row in zip(chunk, of_chunk, strict=True)]
            if collect:
                for number, (_, own_true) in zip(chunk, own, strict=True):
                    true[number].append(own_true)
            if count:
                found = [np.sort(np.concatenate(true[number])) for number in chunk]
                at_most = _count_at_most(of_chunk, found)
                for number, nearer, own_found, (of_identity, _) in zip(chunk, at_most, found, own, strict=True):
                    of_identity.sort()
                    wrong[number] += nearer - of_identity.searchsorted(own_found, "right")

        size = max(_MIN_CHUNK, _CHUNK_DISTANCES // len(block))
        with threads() as pool:
            list(pool.map(visit_chunk, split(np.arange(len(rows)), size)))

    with_people, others = _blocks(labels, columns, rows)
    if len(with_people) > 1:  # nothing can be counted before all true matches are known
        for block in with_people:
            visit(block, collect=True, count=False)
    for block in with_people:
        visit(block, collect=len(with_people) == 1, count=True)
    for block in others:
        visit(block, collect=False, count=True)

    hits = np.arange(1, counts.sum() + 1) - np.repeat(starts, counts)
    ranks = hits + np.concatenate(wrong)
    precision = hits / ranks
    before = np.divide(hits - 1, ranks - 1, out=np.ones(len(ranks)), where=ranks > 1)
    average_precision = np.add.reduceat(precision, starts) / counts
    trapezoid = np.add.reduceat((before + precision) / 2, starts) / counts
    return rows, ranks[starts], np.stack([average_precision, trapezoid, counts / ranks[starts + counts - 1]])


def _numbered(queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Both with their values numbered from 0, so that products of them fit in int64; how many values there are."""
    values, numbers = np.unique(np.concatenate([queries, gallery]), return_inverse=True)
    return numbers[:len(queries)], numbers[len(queries):], len(values)


def _count_at_most(values: np.ndarray, bounds: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """For each row of `values`, [n, B], how many of it are at most each of its bounds, ascending and at least one."""
    for start in range(0, len(values), _ROWS_AT_ONCE):
        part, of_part = values[start:start + _ROWS_AT_ONCE], bounds[start:start + _ROWS_AT_ONCE]
        # What is farther than a person's last true match is not sorted: of what a trained network ranks most.
        near = part <= np.array([own[-1] for own in of_part])[:, None]
        ends = np.count_nonzero(near, axis=1).cumsum()
        values_near = part.ravel()[np.flatnonzero(near)]  # a third of the time that part[near] takes
        for row, own in zip(np.split(values_near, ends[:-1]), of_part, strict=True):
            row.sort()
            yield row.searchsorted(own, "right")


def _blocks(labels: _Labels, columns: np.ndarray, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The gallery `columns` in blocks: those with images of the people whom the queries `rows` show, and the rest."""
    if len(columns) <= BLOCK:
        return [columns], []
    asked_for = np.isin(labels.gallery_ids[columns], labels.query_ids[rows])
    return split(columns[asked_for], BLOCK), split(columns[~asked_for], BLOCK)


class _People:
    """Where the images of each query's identity lie among gallery `columns`.

    Sorted by (identity, camera), they are the run [begin, end), those to ignore [skip, resume) in it. Cameras are
    numbered from 0 to `num_cameras` - 1.
    """

    def __init__(self, labels: _Labels, num_cameras: int, columns: np.ndarray):
        keys = labels.gallery_ids[columns] * num_cameras + labels.gallery_cameras[columns]
        self._order = np.argsort(keys, kind="stable")
        people = labels.query_ids * num_cameras
        same = people + labels.query_cameras
        bounds = keys[self._order].searchsorted([people, same, same + 1, people + num_cameras])
        begins, skips, resumes, ends = bounds
        self.matches = ends - begins - (resumes - skips)  # true ones, of each query
        self._bounds = bounds.T.tolist()

    def of(self, query: int, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of one query's `distances` to the columns those to its identity's images, and to its true matches."""
        begin, skip, resume, end = self._bounds[query]
        own = distances[self._order[begin:end]]  # a copy
        return own, np.concatenate([own[: skip - begin], own[resume - begin :]])


def _why_no_match(labels: _Labels) -> str:
    """The most likely cause, in the order in which a user would look."""
    cameras = np.unique(np.concatenate([labels.query_cameras, labels.gallery_cameras]))
    if not labels.query_ids.size or not labels.gallery_ids.size:
        return f"there are {labels.query_ids.size} query and {labels.gallery_ids.size} gallery images"
    if not (labels.query_ids >= 1).any():
        return "no query shows a person (all query identities are 0, a distractor, or -1, junk)"
    if not np.intersect1d(labels.query_ids[labels.query_ids >= 1], labels.gallery_ids).size:
        return "no query identity is in the gallery"
    if len(cameras) == 1:
        return f"all images have camera {cameras[0]}, but a match must come from another camera than the query's"
    return "the gallery images ranked of each query's identity are all from the query's own camera, and are ignored"
