"""k-reciprocal re-ranking: Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding",
CVPR 2017.

Whoever is among the nearest of an image, and has the image among their own nearest, is likely to show the same person.
An image's such neighbours are encoded as weights over all images of the test, the Jaccard distance of two encodings is
mixed with the plain distance, and the gallery is ranked by that.
"""

import numpy as np
import scipy.sparse

from jlml_jax.distances import Features, Products, checked_pair, numpy_products, split, squared_l2, threads

_CHUNK = 256  # images whose distances to all others are held at a time, by each thread
_KNOWN_SHARE = 2 / 3  # of a neighbour's reciprocal neighbours: if more are known already, all come in


class Reranking:
    """The re-ranked distances of `query` [Q, D] and `gallery` [G, D], to be asked for block by block.

    Time grows with (Q + G)^2, for every image is compared with every other; memory with (Q + G) * D, and with the
    neighbours kept: never with Q * G.

    Args:
      products: what multiplies matrices, as `metrics.evaluate_ranking` takes it.
      k1: how many nearest images may be reciprocal neighbours.
      k2: over how many nearest images an encoding is averaged (equation 11); 1: it is not.
      weight: of the plain distance in the mixture, lambda of equation 12; the defaults are the paper's.

    Raises:
      UserError: a feature is NaN or infinite.
      ValueError: shapes do not agree.
    """

    def __init__(self, query: Features, gallery: Features, products: Products = numpy_products, *, k1: int = 20,
                 k2: int = 6, weight: float = 0.3):
        query, gallery = checked_pair(query, gallery)
        everything = np.concatenate([query, gallery[:]])
        self._num_queries, self._weight = len(query), weight
        self._plain, unit = squared_l2(everything, everything, products)
        nearest, self._farthest = self._neighbours(len(everything), min(max(k1 + 1, k2), len(everything)))
        rows, columns = _robust_neighbours(nearest[:, :k1 + 1], k1)
        encoding = _encode(everything, unit, rows, columns, self._farthest)
        if k2 > 1:
            encoding = _average(encoding, nearest[:, :k2])
        self._shared = _shared(encoding[:len(query)], encoding[len(query):])

    def distances(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of the queries int [n] to the gallery images int [m]: float32 [n, m], from 0 to 1."""
        shared = self._shared[rows][:, columns].toarray()
        jaccard = 1 - shared / (2 - shared)  # equation 10, for encodings that sum to 1
        plain = self._plain(columns + self._num_queries)(rows) / self._farthest[rows, None]
        return (1 - self._weight) * jaccard + self._weight * plain

    def _neighbours(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every image the `count` nearest, itself first, int [N, count]; the farthest's squared distance [N]."""
        nearest, farthest = np.empty((number, count), np.int64), np.empty(number, np.float32)
        for_all = self._plain(np.arange(number))

        def find(rows: np.ndarray) -> None:
            squared = for_all(rows)
            farthest[rows] = np.maximum(squared.max(axis=1), np.finfo(np.float32).tiny)
            squared[np.arange(len(rows)), rows] = -1  # before copies of it
            found = np.argpartition(squared, count - 1, axis=1)[:, :count]
            order = np.lexsort((found, np.take_along_axis(squared, found, axis=1)), axis=1)
            nearest[rows] = np.take_along_axis(found, order, axis=1)

        with threads() as pool:
            list(pool.map(find, split(np.arange(number), _CHUNK)))
        return nearest, farthest


def _robust_neighbours(nearest: np.ndarray, k1: int) -> tuple[np.ndarray, np.ndarray]:
    """The k-reciprocal neighbours of every image and those that these bring in (equations 3 and 4), as index pairs.

    As in the authors' code, more than two thirds of the newcomers must be known, where equation 4 has at least.
    """
    reciprocal, half = _reciprocal(nearest), _reciprocal(nearest[:, :round(k1 / 2) + 1])
    pairs = []
    for index, known in enumerate(reciprocal):
        robust = known.union(*(half[other] for other in known
                               if len(half[other] & known) > _KNOWN_SHARE * len(half[other])))
        pairs.append(np.array([[index] * len(robust), sorted(robust)]))
    return tuple(np.concatenate(pairs, axis=1))


def _reciprocal(nearest: np.ndarray) -> list[set[int]]:
    sets = [set(row) for row in nearest.tolist()]
    return [{other for other in mine if index in sets[other]} for index, mine in enumerate(sets)]


def _encode(features: np.ndarray, unit: float, rows: np.ndarray, columns: np.ndarray, farthest: np.ndarray
            ) -> scipy.sparse.csr_array:
    """The weights of the pairs (row, column), [N, N], which sum to 1 by row: equation 7, of distances from 0 to 1."""
    weights = np.empty(len(rows), np.float32)

    def weigh(part: np.ndarray) -> None:
        difference = (features[rows[part]] - features[columns[part]]) / unit
        weights[part] = np.exp(-np.einsum("nd,nd->n", difference, difference) / farthest[rows[part]])

    with threads() as pool:
        list(pool.map(weigh, split(np.arange(len(rows)), _CHUNK)))
    weights /= np.bincount(rows, weights)[rows]
    return scipy.sparse.csr_array((weights, (rows, columns)), shape=(len(features),) * 2)


def _average(encoding: scipy.sparse.csr_array, nearest: np.ndarray) -> scipy.sparse.csr_array:
    """Local query expansion (equation 11): of every image the mean of its `nearest` ones' encodings."""
    number, count = nearest.shape
    mean = scipy.sparse.csr_array((np.full(number * count, 1 / count, np.float32), nearest.ravel(),
                                   np.arange(0, number * count + 1, count)), shape=encoding.shape)
    return mean @ encoding


def _shared(query: scipy.sparse.csr_array, gallery: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """For each query and gallery image the sum over all images of the smaller of their two weights, [Q, G]."""
    by_image = gallery.tocsc()
    found, values = [], []
    for row in range(query.shape[0]):
        start, end = query.indptr[row:row + 2]
        starts, ends = by_image.indptr[query.indices[start:end]], by_image.indptr[query.indices[start:end] + 1]
        places = np.concatenate([np.arange(*bounds) for bounds in zip(starts, ends, strict=True)])
        own = np.repeat(query.data[start:end], ends - starts)
        sums = np.bincount(by_image.indices[places], np.minimum(own, by_image.data[places]), gallery.shape[0])
        found.append(np.flatnonzero(sums))
        values.append(sums[found[-1]].astype(np.float32))
    ends = np.cumsum([0, *map(len, found)])
    return scipy.sparse.csr_array((np.concatenate(values), np.concatenate(found), ends),
                                  shape=(query.shape[0], gallery.shape[0]))
