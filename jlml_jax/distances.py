"""L2 distances between features, by blocks of a gallery that may be far larger than what memory has room for twice."""

import abc
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike

from jlml_jax.errors import UserError

BLOCK = 32 << 10  # gallery images whose distances are computed before the next are looked at
_MAX_THREADS = 8  # bounds the memory
_READ_AT_ONCE = 1 << 20  # numbers of a matrix that one thread copies at a time
_RANGE = 2.0**60  # largest over typical feature, beyond which float32 does not hold the squares of both
_CLOSE = 0.1  # squared distance / (sum of squared norms) below which the matmul expansion has cancelled too much

# From gallery columns int [B] to a function of queries int [n] to their distances [n, B]; threads call it.
DistancesTo = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]

# From a block of the gallery, float32 [B, D], to a function of queries, float32 [n, D], to their products [n, B].
Products = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]


class LazyRows(abc.ABC):
    """Stands for features [N, D] whose rows are made when they are read, so that never all of them need memory."""

    shape: tuple[int, int]
    dtype: np.dtype

    @abc.abstractmethod
    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The features of these rows, [n, D], in an array that the caller may write to."""

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Features = ArrayLike | LazyRows


def numpy_products(gallery: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`Products` by NumPy, which uses all cores."""
    return lambda query: query @ gallery.T


def l2_distances(query_features: Features, gallery_features: Features) -> np.ndarray:
    """Plain (not squared) L2 distances, [Q, D] and [G, D] -> [Q, G] float32.

    By the matmul expansion on centred features; what cancels there is summed anew from the differences. So the
    relative error stays below 1e-5 far from the origin and for near-duplicates too, and identical rows are at 0.
    Differences below 1e-19 of the largest value are lost.

    Raises:
      UserError: a feature is NaN, infinite or immensely larger than the others.
      ValueError: shapes do not agree.
    """
    query, gallery = checked_pair(query_features, gallery_features)
    distances = np.zeros((len(query), len(gallery)), np.float32)
    if not distances.size:
        return distances
    distances_to, scale = squared_l2(query, gallery, numpy_products)
    for columns in split(np.arange(len(gallery)), BLOCK):
        distances[:, columns[0]:columns[-1] + 1] = distances_to(columns)(np.arange(len(query)))
    np.sqrt(distances, out=distances)
    return np.multiply(distances, scale, out=distances, dtype=np.float64, casting="same_kind")


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))


def split(values: np.ndarray, size: int) -> list[np.ndarray]:
    """In parts of `size`, the last of which may be shorter."""
    return [values[start:start + size] for start in range(0, len(values), size)]


def checked(values: Features, name: str) -> np.ndarray | LazyRows:
    """As a finite 2-D array of at least float32 (float64 stays), or what stands for one."""
    matrix = values if isinstance(values, LazyRows) else np.asarray(values)
    if len(matrix.shape) != 2:
        raise ValueError(f"{name} must be 2-D, got shape {matrix.shape}")
    if not isinstance(matrix, LazyRows):
        matrix = matrix.astype(np.result_type(matrix.dtype, np.float32), copy=False)
    parts = _parts(matrix)
    with threads() as pool:
        finite = pool.map(lambda part: np.isfinite(matrix[part]).all(), parts)
    for part, ok in zip(parts, finite, strict=True):
        if not ok:
            row = part.start + int(np.argmin(np.isfinite(matrix[part]).all(axis=1)))
            raise UserError(f"{name}: row {row} has a NaN or infinite value; mend it or leave it out")
    return matrix


def _parts(matrix: np.ndarray | LazyRows) -> list[slice]:
    """All rows, in parts that are read at once."""
    step = max(1, _READ_AT_ONCE // max(1, matrix.shape[1]))
    return [slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]


def checked_pair(query_features: Features, gallery_features: Features) -> tuple[np.ndarray, np.ndarray | LazyRows]:
    """Both as `checked` has them, the queries in memory; a ValueError if they are not of one length."""
    query, gallery = checked(query_features, "query features"), checked(gallery_features, "gallery features")
    if query.shape[1] != gallery.shape[1] or not query.shape[1]:
        raise ValueError(f"query and gallery features must agree in D > 0, got {query.shape} and {gallery.shape}")
    return query[:], gallery


def squared_l2(query: np.ndarray, gallery: np.ndarray | LazyRows, products: Products) -> tuple[DistancesTo, float]:
    """Squared distances float32 by blocks of the gallery, in a common unit, and that unit of the plain distance.

    Raises:
      UserError: a feature is immensely larger than the others.
    """
    dtype = np.result_type(query.dtype, gallery.dtype)
    sample = gallery[:: max(1, len(gallery) // 1024)].astype(np.float64)
    centre = _centre(sample).astype(dtype)
    scale = _scale(query, gallery, centre, sample)
    return _Blocks(query, gallery, products, centre, dtype.type(1 / scale)).distances_to, scale


def _centre(sample: np.ndarray) -> np.ndarray:
    """A point amid the features, float64 [D], to measure from.

    Any gives the same distances; this one keeps the norms small, and so the cancellation. On a grid of powers of two
    about as coarse as the data's spread the shift is exact for integers and the like: equal distances stay equal.
    """
    mean, spread = sample.mean(axis=0), sample.std(axis=0)
    grid = np.ldexp(1.0, np.frexp(spread)[1])
    return np.where(spread > 0, np.round(mean / grid) * grid, mean)


def _scale(query: np.ndarray, gallery: np.ndarray | LazyRows, centre: np.ndarray, sample: np.ndarray) -> float:
    """A power of two of about the largest feature: squares of very large or small ones would leave float32's range."""
    def largest_of(features: np.ndarray | LazyRows, rows: slice) -> tuple[float, int]:
        sizes = np.abs(features[rows] - centre).max(axis=1)
        return float(sizes.max()), rows.start + int(sizes.argmax())

    with threads() as pool:
        largest, row, name = max(
            (*max(pool.map(functools.partial(largest_of, features), _parts(features)), default=(0.0, 0)), name)
            for features, name in ((query, "query"), (gallery, "gallery")))
    typical = float(np.median(np.abs(sample - centre).max(axis=1)))
    if 0 < typical < largest / _RANGE:
        raise UserError(f"{name} features: row {row} has values of {largest:.0e} where those of most others are of "
                        f"{typical:.0e}, which would vanish beside them; mend it or leave it out")
    limit = np.finfo(centre.dtype).maxexp - 28  # of a power whose inverse that type has, too
    return math.ldexp(1.0, min(limit, max(-limit, math.frexp(largest)[1])))


class _Blocks:
    """Squared distances by blocks, all from one centre and in one unit, so that they compare over blocks."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray | LazyRows, products: Products, centre: np.ndarray,
                 factor: np.floating):
        self._query, self._gallery, self._products = query, gallery, products
        self._centre, self._factor = centre, factor
        self._minus_two_queries = self._centred(query)
        self._query_norms = _squared_norms(self._minus_two_queries)
        self._minus_two_queries *= -2

    def distances_to(self, columns: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """A function of queries int [n] to their squared distances [n, B] to the gallery's `columns` int [B]."""
        block = np.empty((len(columns), self._gallery.shape[1]), np.float32)
        gallery_norms = np.empty(len(columns), np.float32)

        def read(rows: slice) -> None:
            block[rows] = self._centred(self._gallery[columns[rows]])
            gallery_norms[rows] = _squared_norms(block[rows])

        with threads() as pool:
            list(pool.map(read, _parts(block)))
        multiply = self._products(block)

        def distances(queries: np.ndarray) -> np.ndarray:
            squared = multiply(self._minus_two_queries[queries])
            for query, row in zip(queries, squared, strict=True):
                norms = gallery_norms + self._query_norms[query]
                row += norms
                norms *= _CLOSE
                for close in split(np.flatnonzero(row < norms), 256):  # as many as stay in the cache
                    row[close] = self._from_differences(query, columns[close])
            return squared

        return distances

    def _centred(self, features: np.ndarray) -> np.ndarray:
        features = features - self._centre
        features *= self._factor
        return features.astype(np.float32, copy=False)

    def _from_differences(self, query: int, columns: np.ndarray) -> np.ndarray:
        """[n], without cancellation."""
        difference = self._gallery[columns] - self._query[query]
        difference *= self._factor
        return np.einsum("gd,gd->g", difference, difference)


def _squared_norms(features: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", features, features, dtype=np.float64).astype(np.float32)
