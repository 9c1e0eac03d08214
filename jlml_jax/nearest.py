"""Exact nearest neighbours by L2 distance among features that may lie on a disk."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jlml_jax.errors import UserError

# What the device takes at a time. On a CPU the differences must stay in the cache: this is what makes a query cost
# one reading of the features, not three.
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 4 << 20, 256 << 20
_PRODUCTS_BYTES, _MOST_AT_ONCE = 128 << 20, 256  # of the queries that are searched for together, and their number
_EXACT_ROWS = 256  # rows a thread compares in float64 at a time: their differences stay in the cache
# Float32 sums of D squared differences are within D + 2 roundings of 2^-24 (Higham 2002, section 3.1); this is the
# share of it that widens the choice of candidates.
_ROUNDING = 2.0 ** -23
_MANY = 64  # candidates beyond the wanted ones for which another reading of all features is the faster way
_LARGEST = np.finfo(np.float32).max / 16  # squared length up to which no sum below overflows

# The rows int64 [k] and distances float64 [k] of the nearest, nearest first.
Nearest = tuple[np.ndarray, np.ndarray]


@jax.jit
def _squared_distances(chunk: jax.Array, query: jax.Array) -> jax.Array:
    """[n, D], [D] -> [n]. From the differences, so that nothing cancels.

    The sum as a product with ones is what XLA makes fast on a CPU.
    """
    difference = chunk - query
    ones = jax.numpy.ones(query.shape, chunk.dtype)
    return jax.numpy.matmul(difference * difference, ones, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _products(chunk: jax.Array, queries: jax.Array) -> jax.Array:
    """[n, D], [Q, D] -> [Q, n]."""
    return jax.numpy.matmul(queries, chunk.T, precision=jax.lax.Precision.HIGHEST)


class NearestNeighbours:
    """Exact search by L2 distance among `features`, float32 [N, D], on the device, in chunks.

    On a CPU the chunks are views of `features`, so that a memory map is read where it lies. On an accelerator they are
    kept in its memory if they take less than half of it, else sent for every query, or for every block of them.

    The device's float32 distances only choose the candidates, with a margin for all their rounding; the candidates'
    order is by distances in float64, of equal ones the lower row first.
    """

    def __init__(self, features: np.ndarray):
        self._features = features
        device = jax.local_devices()[0]
        on_cpu = device.platform == "cpu"
        rows = (_CPU_CHUNK_BYTES if on_cpu else _CHUNK_BYTES) // (4 * features.shape[1])
        rows = max(16, rows - rows % 16)  # JAX on a CPU takes what is aligned to 64 bytes as it lies, and copies others
        self._chunks = [features[start:start + rows] for start in range(0, len(features), rows)]
        if on_cpu or features.nbytes < (device.memory_stats() or {}).get("bytes_limit", 0) / 2:
            self._chunks = [jax.device_put(np.asarray(chunk), device, may_alias=True) for chunk in self._chunks]

    def search(self, query: np.ndarray, top_k: int, eligible: np.ndarray | None = None) -> Nearest:
        """The `top_k` nearest, or all if they are fewer.

        Args:
            query: [D].
            top_k: how many, at least 1.
            eligible: bool [N], rows that may be found; None: all.

        Raises:
            ValueError: shapes do not agree, or a value of the query is not finite.
            UserError: a feature is not finite: what holds it is damaged.
        """
        query = self._checked(query, top_k)
        rows = self._rows(eligible)
        return self._nearest(rows if not len(rows) else self._by_differences(query, top_k, rows), query, top_k)

    def search_many(self, searches: Iterable[tuple[np.ndarray, int, np.ndarray | None]]) -> Iterator[Nearest]:
        """What `search` gives for each of many (query, top_k, eligible), which are read as they are needed.

        The features are read once for a block of queries. Their products bound the distances. Where that leaves many
        candidates, as among features that are nearly alike, the query is searched for by itself.
        """
        at_once = min(_MOST_AT_ONCE, max(1, _PRODUCTS_BYTES // (4 * max(1, len(self._features)))))
        searches, norms = iter(searches), None
        while block := list(itertools.islice(searches, at_once)):
            if len(block) == 1:
                yield self.search(*block[0])
                continue
            queries = np.stack([self._checked(query, top_k) for query, top_k, _ in block])
            if norms is None:
                norms = self._squared_distances(np.zeros_like(queries[0]))
                products = np.empty((at_once, len(self._features)), np.float32)
            start = 0
            for chunk in self._chunks:
                products[:len(block), start:start + len(chunk)] = _products(chunk, queries)
                start += len(chunk)
            for query, of_query, (_, top_k, eligible) in zip(queries, products[:len(block)], block, strict=True):
                rows = self._rows(eligible)
                candidates = _by_products(of_query, norms, query, top_k, rows)
                if candidates is None:
                    candidates = self._by_differences(query, top_k, rows)
                yield self._nearest(candidates, query, top_k)

    def _checked(self, query: np.ndarray, top_k: int) -> np.ndarray:
        query = np.asarray(query, np.float32)
        if query.shape != self._features.shape[1:] or not np.isfinite(query).all() or top_k < 1:
            raise ValueError(f"query must be finite {self._features.shape[1:]} and top_k at least 1, got "
                             f"{query.shape} and {top_k}")
        return query

    def _rows(self, eligible: np.ndarray | None) -> np.ndarray:
        return np.arange(len(self._features)) if eligible is None else np.flatnonzero(eligible)

    def _squared_distances(self, query: np.ndarray) -> np.ndarray:
        """float32 [N], of all features."""
        if not self._chunks:
            return np.empty(0, np.float32)
        # Each is fetched before the next one is sent: what does not fit the device together passes through it.
        squared = np.concatenate([np.asarray(_squared_distances(chunk, query)) for chunk in self._chunks])
        suspects = np.flatnonzero(~np.isfinite(squared))  # or only so large that their squares overflow
        bad = suspects[[not np.isfinite(self._features[row]).all() for row in suspects]]
        if len(bad):
            raise UserError(f"the gallery's features are damaged: {len(bad):,} rows are not finite, the first of them "
                            f"{bad[0]}; make the gallery anew")
        return squared

    def _by_differences(self, query: np.ndarray, top_k: int, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that may be among the nearest."""
        squared = self._squared_distances(query)[rows]
        if len(rows) <= top_k:
            return rows
        cut = float(np.partition(squared, top_k - 1)[top_k - 1])
        margin = 1 + 2 * (len(query) + 8) * _ROUNDING
        return rows[squared <= cut * margin + np.finfo(np.float32).tiny * len(query)]

    def _nearest(self, candidates: np.ndarray, query: np.ndarray, top_k: int) -> Nearest:
        distances = self._exact_distances(candidates, query)
        nearest = np.lexsort((candidates, distances))[:top_k]
        return candidates[nearest], distances[nearest]

    def _exact_distances(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """float64 [M], of rows that are usually few, but all of them where all are about as far."""
        def squared(part: np.ndarray) -> np.ndarray:
            difference = self._features[part].astype(np.float64)
            difference -= query
            return np.einsum("nd,nd->n", difference, difference)

        if len(rows) <= _EXACT_ROWS:
            return np.sqrt(squared(rows))
        with ThreadPoolExecutor() as pool:
            parts = pool.map(squared, np.split(rows, range(_EXACT_ROWS, len(rows), _EXACT_ROWS)))
            return np.sqrt(np.concatenate(list(parts)))


def _by_products(products: np.ndarray, norms: np.ndarray, query: np.ndarray, top_k: int, rows: np.ndarray
                 ) -> np.ndarray | None:
    """Those of `rows` that may be among the nearest; None: too many, or too large for float32.

    Args:
        products: of the features with the query, float32 [N].
        norms: the features' squared lengths, float32 [N].
    """
    if len(rows) <= top_k:
        return rows
    query_norm = np.square(query, dtype=np.float64).sum()
    if not max(norms.max(), query_norm) < _LARGEST:
        return None
    if len(rows) < len(norms):
        products, norms = products[rows], norms[rows]
    lengths = norms + np.float32(query_norm)
    # |error| <= (2 D + 16) 2^-24 (|g|^2 + |q|^2): D + 2 roundings of each length; D of a product, taken twice, which is
    # at most half of that sum; and those of the sum. What underflows is less than the last term.
    error = lengths * np.float32((len(query) + 8) * _ROUNDING) + np.float32(np.finfo(np.float32).tiny * 4 * len(query))
    lowest = lengths - 2 * products - error
    cut = np.partition(lowest + 2 * error, top_k - 1)[top_k - 1]
    candidates = rows[lowest <= cut]
    return candidates if len(candidates) <= top_k + max(_MANY, top_k) else None
