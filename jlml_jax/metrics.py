"""Distances, CMC, mAP and mINP of person re-identification: arrays in, numbers out.

Persons are identities >= 1. Identity 0 is a distractor: always wrong, never one person. Identity -1 is junk: ignored.
A gallery image with the query's identity and camera is ignored. On equal distances the wrong image ranks first.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jlml_jax.errors import UserError

_CHUNK_DISTANCES = 6 << 20  # that one thread holds at a time (24 MiB as float32)
_MIN_CHUNK = 16  # queries; fewer would read the gallery too often
_MAX_THREADS = 8  # bounds the memory, together with _CHUNK_DISTANCES
_CLOSE = 0.1  # squared distance / (sum of squared norms) below which the matmul expansion has cancelled too much


class _Labels(NamedTuple):
    query_ids: np.ndarray
    gallery_ids: np.ndarray
    query_cameras: np.ndarray
    gallery_cameras: np.ndarray


# the distance rows of the named queries, each to the gallery columns chosen before
_Distances = Callable[[np.ndarray], Iterable[np.ndarray]]


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
    query_features: ArrayLike,
    gallery_features: ArrayLike,
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
    """Ranks the gallery for every query by L2 distance, and scores it. Never holds the Q x G matrix.

    Args:
      query_features: [Q, D].
      gallery_features: [G, D].
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

    Raises:
      UserError: a feature is NaN or infinite, or no query has a true match.
      ValueError: shapes do not agree, or identities or cameras are not integers.
    """
    query, gallery = _features(query_features, gallery_features)
    labels = _labels((len(query), len(gallery)), query_ids, gallery_ids, query_cameras, gallery_cameras)

    def distances_to(columns: np.ndarray) -> _Distances:
        return _squared_l2(query, gallery if len(columns) == len(gallery) else gallery[columns])[0]

    return _evaluate(distances_to, labels, max_rank, repeats if single_gallery_shot else None, seed)


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
    distances = _matrix(distances, "distances")
    labels = _labels(distances.shape, query_ids, gallery_ids, query_cameras, gallery_cameras)

    def distances_to(columns: np.ndarray) -> _Distances:
        if len(columns) == distances.shape[1]:
            return lambda rows: (distances[row] for row in rows)
        return lambda rows: (distances[row, columns] for row in rows)

    return _evaluate(distances_to, labels, max_rank, repeats if single_gallery_shot else None, seed)


def query_scores(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike,
    gallery_cameras: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """For each query the rank of its first true match, int64 [Q], and its average precision at hits, float64 [Q].

    Arguments and errors are those of `evaluate_ranking`, whose means over the whole gallery these add up to. A query
    without a true match has 0 and NaN.
    """
    query, gallery = _features(query_features, gallery_features)
    labels = _labels((len(query), len(gallery)), query_ids, gallery_ids, query_cameras, gallery_cameras)
    first_ranks, average_precision = np.zeros(len(query), np.int64), np.full(len(query), np.nan)
    rows, first_ranks_of_rows, scores = _score(
        lambda columns: _squared_l2(query, gallery[columns])[0], labels, np.flatnonzero(labels.gallery_ids >= 0))
    first_ranks[rows], average_precision[rows] = first_ranks_of_rows, scores[0]
    return first_ranks, average_precision


def l2_distances(query_features: ArrayLike, gallery_features: ArrayLike) -> np.ndarray:
    """Plain (not squared) L2 distances, [Q, D] and [G, D] -> [Q, G] float32.

    By the matmul expansion on centred features; what cancels there is summed anew from the differences. So the
    relative error stays below 1e-5 far from the origin and for near-duplicates too, and identical rows are at 0.

    Raises:
      UserError: a feature is NaN or infinite.
      ValueError: shapes do not agree.
    """
    query, gallery = _features(query_features, gallery_features)
    if not len(query) or not len(gallery):
        return np.zeros((len(query), len(gallery)), np.float32)
    squared_l2, scale = _squared_l2(query, gallery)
    distances = squared_l2(np.arange(len(query)))
    np.sqrt(distances, out=distances)
    distances *= np.float32(scale)
    return distances


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


def _matrix(values: ArrayLike, name: str) -> np.ndarray:
    """As a finite 2-D array of at least float32 (float64 stays)."""
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be 2-D, got shape {matrix.shape}")
    matrix = matrix.astype(np.result_type(matrix.dtype, np.float32), copy=False)
    step = max(1, (1 << 20) // max(1, matrix.shape[1]))
    starts = range(0, len(matrix), step)
    with _threads() as pool:
        finite = pool.map(lambda start: np.isfinite(matrix[start : start + step]).all(), starts)
    for start, ok in zip(starts, finite, strict=True):
        if not ok:
            row = start + int(np.argmin(np.isfinite(matrix[start : start + step]).all(axis=1)))
            raise UserError(f"{name}: row {row} has a NaN or infinite value; mend it or leave it out")
    return matrix


def _features(query_features: ArrayLike, gallery_features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    query, gallery = _matrix(query_features, "query features"), _matrix(gallery_features, "gallery features")
    if query.shape[1] != gallery.shape[1] or not query.shape[1]:
        raise ValueError(f"query and gallery features must agree in D > 0, got {query.shape} and {gallery.shape}")
    return query, gallery


def _squared_l2(query: np.ndarray, gallery: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """A function from n query rows to their squared distances [n, G] float32, and the unit of the plain distance."""
    # Any centre gives the same distances; one amid the data keeps the norms, and so the cancellation, small. On a grid
    # of powers of two about as coarse as the data's spread the shift is exact for integers and the like, so that equal
    # distances stay equal.
    dtype = np.result_type(query, gallery)
    sample = gallery[:: max(1, len(gallery) // 1024)].astype(np.float64)
    mean, spread = sample.mean(axis=0), sample.std(axis=0)
    grid = np.ldexp(1.0, np.frexp(spread)[1])
    centre = np.where(spread > 0, np.round(mean / grid) * grid, mean).astype(dtype)
    centred_query, centred_gallery = query - centre, gallery - centre
    # Without a common scale, squares of very large or very small features would leave float32's range.
    largest = max(float(x) for f in (centred_query, centred_gallery) for x in (f.max(), -f.min()))
    scale = math.ldexp(1.0, min(100, max(-100, math.frexp(largest)[1])))
    centred_query *= dtype.type(1 / scale)
    centred_gallery *= dtype.type(1 / scale)
    centred_query = centred_query.astype(np.float32, copy=False)
    centred_gallery = centred_gallery.astype(np.float32, copy=False)
    query_norms, gallery_norms = _squared_norms(centred_query), _squared_norms(centred_gallery)

    def distances(rows: np.ndarray) -> np.ndarray:
        block = (-2 * centred_query[rows]) @ centred_gallery.T
        for index, row in zip(rows, block, strict=True):
            norms = gallery_norms + query_norms[index]
            row += norms
            norms *= _CLOSE
            close = np.flatnonzero(row < norms)
            for start in range(0, close.size, 256):  # as many as stay in the cache
                part = close[start : start + 256]
                difference = gallery[part] - query[index]
                difference *= dtype.type(1 / scale)
                row[part] = np.einsum("gd,gd->g", difference, difference)
        return block

    return distances, scale


def _squared_norms(features: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", features, features, dtype=np.float64).astype(np.float32)


def _labels(shape: tuple[int, ...], *labels: ArrayLike) -> _Labels:
    """Checks the four label arrays against [Q, G]."""
    checked = {}
    for name, length, values in zip(_Labels._fields, (*shape, *shape), labels, strict=True):
        array = np.asarray(values)
        if array.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},), as the features or distances do, got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {array.dtype}")
        if name.endswith("ids") and (array < -1).any():
            raise ValueError(f"{name} has {array.min()}, but persons are 1 and up, 0 is a distractor and -1 is junk")
        checked[name] = array.astype(np.int64)
    return _Labels(**checked)


def _evaluate(
    distances_to: Callable[[np.ndarray], _Distances], labels: _Labels, max_rank: int, repeats: int | None, seed: int
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
    distances_to: Callable[[np.ndarray], _Distances], labels: _Labels, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks the gallery `columns` for every query.

    Returns the n queries with a true match, the rank of their first one [n], and their average precision, trapezoid
    average precision and inverse negative penalty [3, n].

    The ranks of the true matches are all that these need, and the rank of the j-th is j plus the number of wrong images
    at most as far: a look-up in the sorted distances. Sorting values alone is several times faster than argsort.
    """
    # Sorted by (identity, camera), an identity's images are the run [begin, end), those to ignore [skip, resume) in it.
    cameras, codes = np.unique(np.concatenate([labels.query_cameras, labels.gallery_cameras]), return_inverse=True)
    query_codes, gallery_codes = np.split(codes, [len(labels.query_cameras)])
    keys = labels.gallery_ids[columns] * len(cameras) + gallery_codes[columns]
    order = np.argsort(keys, kind="stable")
    query_keys = labels.query_ids * len(cameras)
    same = query_keys + query_codes
    bounds = keys[order].searchsorted([query_keys, same, same + 1, query_keys + len(cameras)])
    matches = bounds[3] - bounds[0] - (bounds[2] - bounds[1])
    rows = np.flatnonzero((labels.query_ids >= 1) & (matches > 0))
    if not rows.size:
        return rows, rows, np.empty((3, 0))
    distances = distances_to(columns)

    def score_chunk(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = []
        for row, (begin, skip, resume, end) in zip(distances(chunk), bounds[:, chunk].T.tolist(), strict=True):
            own = row[order[begin:end]]
            true = np.sort(np.concatenate([own[: skip - begin], own[resume - begin :]]))
            wrong.append(np.sort(row).searchsorted(true, "right") - np.sort(own).searchsorted(true, "right"))
        counts = matches[chunk]
        starts = np.cumsum(counts) - counts
        hits = np.arange(1, counts.sum() + 1) - np.repeat(starts, counts)
        ranks = hits + np.concatenate(wrong)
        precision = hits / ranks
        before = np.divide(hits - 1, ranks - 1, out=np.ones(len(ranks)), where=ranks > 1)
        average_precision = np.add.reduceat(precision, starts) / counts
        trapezoid = np.add.reduceat((before + precision) / 2, starts) / counts
        return ranks[starts], np.stack([average_precision, trapezoid, counts / ranks[starts + counts - 1]])

    size = max(_MIN_CHUNK, _CHUNK_DISTANCES // len(columns))
    with _threads() as pool:
        parts = list(pool.map(score_chunk, np.split(rows, range(size, len(rows), size))))
    return rows, np.concatenate([first for first, _ in parts]), np.concatenate([scores for _, scores in parts], axis=1)


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
