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
_RANGE = 2.0**60  # of sizes whose squares float32 holds beside each other
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
    distances *= np.float32(scale)
    return distances


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


def checked_pair(query_features: Features, gallery_features: Features
              ) -> tuple[np.ndarray, np.ndarray | LazyRows]:
    query, gallery = checked(query_features, "query features"), checked(gallery_features, "gallery features")
    if query.shape[1] != gallery.shape[1] or not query.shape[1]:
        raise ValueError(f"query and gallery features must agree in D > 0, got {query.shape} and {gallery.shape}")
    return query[:], gallery


def squared_l2(query: np.ndarray, gallery: np.ndarray | LazyRows, products: Products) -> tuple[DistancesTo, float]:
    """Squared distances float32 by blocks, and the unit of the plain distance.

    All blocks have one centre and one unit, so that distances compare over blocks.
    """
    # Any centre gives the same distances; one amid the data keeps the norms, and so the cancellation, small. On a grid
    # of powers of two about as coarse as the data's spread the shift is exact for integers and the like, so that equal
    # distances stay equal.
    dtype = np.result_type(query.dtype, gallery.dtype)
    sample = gallery[:: max(1, len(gallery) // 1024)].astype(np.float64)
    mean, spread = sample.mean(axis=0), sample.std(axis=0)
    grid = np.ldexp(1.0, np.frexp(spread)[1])
    centre = np.where(spread > 0, np.round(mean / grid) * grid, mean).astype(dtype)
    # Without a common scale, squares of very large or very small features would leave float32's range.
    def largest_of(features: np.ndarray, part: slice) -> tuple[float, int]:
        sizes = np.abs(features[part] - centre).max(axis=1)
        return float(sizes.max()), part.start + int(sizes.argmax())

    def largest_row(features: np.ndarray | LazyRows) -> tuple[float, int]:
        return max(pool.map(functools.partial(largest_of, features), _parts(features)), default=(0.0, 0))

    with threads() as pool:
        largest, row, name = max((*largest_row(query), "query"), (*largest_row(gallery), "gallery"))
    typical = float(np.median(np.abs(sample - centre).max(axis=1)))
    if 0 < typical < largest / _RANGE:
        raise UserError(f"{name} features: row {row} has values of {largest:.0e} where those of most others are of "
                        f"{typical:.0e}, which would vanish beside them; mend it or leave it out")
    scale = math.ldexp(1.0, min(100, max(-100, math.frexp(largest)[1])))

    def centred(features: np.ndarray) -> np.ndarray:
        features = features - centre
        features *= dtype.type(1 / scale)
        return features.astype(np.float32, copy=False)

    centred_query = centred(query)
    query_norms = _squared_norms(centred_query)
    centred_query *= -2

    def distances_to(columns: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        block = np.empty((len(columns), gallery.shape[1]), np.float32)
        gallery_norms = np.empty(len(columns), np.float32)

        def read(part: slice) -> None:
            block[part] = centred(gallery[columns[part]])
            gallery_norms[part] = _squared_norms(block[part])

        with threads() as pool:
            list(pool.map(read, _parts(block)))
        multiply = products(block)

        def distances(rows: np.ndarray) -> np.ndarray:
            squared = multiply(centred_query[rows])
            for index, row in zip(rows, squared, strict=True):
                norms = gallery_norms + query_norms[index]
                row += norms
                norms *= _CLOSE
                close = np.flatnonzero(row < norms)
                for part in split(close, 256):  # as many as stay in the cache
                    difference = gallery[columns[part]] - query[index]
                    difference *= dtype.type(1 / scale)
                    row[part] = np.einsum("gd,gd->g", difference, difference)
            return squared

        return distances

    return distances_to, scale


def _squared_norms(features: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", features, features, dtype=np.float64).astype(np.float32)
