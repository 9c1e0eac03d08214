"""Exact nearest neighbours."""

from unittest import mock

import jax
import numpy as np
import pytest

from jlml_jax import nearest
from jlml_jax.errors import UserError
from jlml_jax.nearest import NearestNeighbours


def reference(gallery, query, top_k):
    """Exact, in extended precision: of equal distances the lower row first."""
    distances = np.sqrt(((gallery.astype(np.longdouble) - query.astype(np.longdouble)) ** 2).sum(1))
    order = np.lexsort((np.arange(len(gallery)), distances.astype(np.float64)))[:top_k]
    return order, distances[order].astype(np.float64)


CASES = ("random", "far away", "near duplicates", "all equal", "huge", "at the edge of float32", "tiny", "one long")


def drawn(case):
    """A gallery [1003, 48] and queries [30, 48]."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((1003, 48)).astype(np.float32)
    queries = rng.standard_normal((30, 48)).astype(np.float32)
    if case == "far away":
        gallery, queries = gallery + 1000, queries + 1000
    elif case == "near duplicates":  # of the first query, some a last bit apart
        gallery[::3] = queries[0] * (1 + 2.0 ** -23 * rng.integers(-2, 3, (335, 1)))
    elif case == "all equal":
        gallery[:] = gallery[0]
    elif case in ("huge", "at the edge of float32", "tiny"):
        factor = {"huge": 1e30, "at the edge of float32": 2e18, "tiny": 1e-21}[case]
        gallery, queries = gallery * np.float32(factor), queries * np.float32(factor)
    elif case == "one long":
        gallery[500] *= 1000
    return gallery, queries


def check(found, gallery, query, top_k, case):
    rows, distances = found
    expected_rows, expected_distances = reference(gallery, query, top_k)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12)
    if case != "near duplicates":  # there, float64 cannot tell some of the distances apart
        np.testing.assert_array_equal(rows, expected_rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 10])
def test_nearest_neighbours_are_exact(monkeypatch, case, top_k):
    monkeypatch.setattr(nearest, "_CPU_CHUNK_BYTES", 4 * 48 * 64)  # several chunks, and an odd last one
    gallery, queries = drawn(case)
    check(NearestNeighbours(gallery).search(queries[0], top_k), gallery, queries[0], top_k, case)


@pytest.mark.parametrize("case", CASES)
def test_many_searches_are_as_exact_as_one(monkeypatch, case):
    """By products, and where these do not tell enough, one by one."""
    monkeypatch.setattr(nearest, "_CPU_CHUNK_BYTES", 4 * 48 * 64)
    monkeypatch.setattr(nearest, "_MOST_AT_ONCE", 8)  # several blocks, and one of fewer
    gallery, queries = drawn(case)
    alone = mock.Mock(side_effect=nearest._squared_distances)
    monkeypatch.setattr(nearest, "_squared_distances", alone)
    wanted = [1, 10, 1003, 2000] * 7 + [3, 3]
    found = list(NearestNeighbours(gallery).search_many((query, top_k, None)
                                                        for query, top_k in zip(queries, wanted, strict=True)))
    assert len(found) == len(queries)
    for result, query, top_k in zip(found, queries, wanted, strict=True):
        check(result, gallery, query, top_k, case)
    if case in ("random", "one long"):  # only the gallery's lengths are by differences, from zero
        assert alone.call_count == 16


def test_what_float32_sums_wrongly_or_not_at_all_is_found():
    """Distances that differ by less than their sums' rounding, and squares that are too small for float32."""
    rng = np.random.default_rng(0)
    alike = rng.permuted(rng.standard_normal((1, 512), np.float32).repeat(200, 0), axis=1)
    alike[:, 0] += 2.0 ** -22 * rng.permutation(200)  # the same sums of squares, almost
    tiny = np.full((2, 1000), 1e-20, np.float32)
    tiny[1] = [1.2e-19] + [0] * 999
    for gallery in (alike, tiny):
        query = np.zeros(gallery.shape[1], np.float32)
        for top_k in (1, 5):
            expected = reference(gallery, query, top_k)[0]
            np.testing.assert_array_equal(NearestNeighbours(gallery).search(query, top_k)[0], expected)
            for rows, _ in NearestNeighbours(gallery).search_many([(query, top_k, None)] * 2):
                np.testing.assert_array_equal(rows, expected)


def test_each_of_many_searches_has_its_own_rows_and_number():
    gallery = np.arange(200, dtype=np.float32)[:, None].repeat(4, 1)
    neighbours, rng, searches = NearestNeighbours(gallery), np.random.default_rng(0), []
    for _ in range(20):
        eligible = None if rng.random() < 0.3 else rng.random(200) < rng.choice([0.0, 0.02, 0.5])
        searches.append((rng.uniform(0, 200, 4).astype(np.float32), int(rng.integers(1, 12)), eligible))
    found = list(neighbours.search_many(searches))
    for (rows, distances), search in zip(found, searches, strict=True):
        expected_rows, expected_distances = neighbours.search(*search)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(distances, expected_distances)
    assert {len(rows) for rows, _ in found} >= {0, 1}
    assert [len(rows) for rows, _ in NearestNeighbours(gallery[:0]).search_many([(gallery[0], 3, None)] * 2)] == [0, 0]
    assert list(neighbours.search_many([])) == []


def test_of_many_searches_a_bad_one_is_refused():
    searches = [(np.zeros(4), 1, None), (np.full(4, np.nan), 1, None)]
    with pytest.raises(ValueError, match="query must be finite"):
        list(NearestNeighbours(np.ones((20, 4), np.float32)).search_many(searches))


def test_only_eligible_rows_are_found():  # of equal distances, the lower row first
    gallery = np.arange(20, dtype=np.float32)[:, None].repeat(4, 1)
    eligible = np.zeros(20, bool)
    eligible[[3, 9, 17]] = True
    search = NearestNeighbours(gallery)
    rows, distances = search.search(np.full(4, 10, np.float32), 2, eligible)
    assert rows.tolist() == [9, 3] and distances.tolist() == [2.0, 14.0]
    assert search.search(np.full(4, 10.5, np.float32), 5, eligible)[0].tolist() == [9, 17, 3]
    assert len(search.search(np.full(4, 10, np.float32), 5, np.zeros(20, bool))[0]) == 0
    assert len(NearestNeighbours(gallery[:0]).search(np.zeros(4, np.float32), 5)[0]) == 0
    for query, top_k in ((np.zeros(3), 1), (np.full(4, np.nan), 1), (np.zeros(4), 0)):
        with pytest.raises(ValueError, match="query must be finite"):
            search.search(query, top_k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_told_and_not_just_never_found(bad):
    gallery = np.ones((20, 4), np.float32)
    gallery[[7, 12], [0, 3]] = bad
    eligible = np.arange(20) < 5  # what is damaged there may be damaged here
    query = np.zeros(4, np.float32)
    for rows in (None, eligible):
        with pytest.raises(UserError, match="2 rows are not finite, the first of them 7"):
            NearestNeighbours(gallery).search(query, 3, rows)
        with pytest.raises(UserError, match="2 rows are not finite, the first of them 7"):
            list(NearestNeighbours(gallery).search_many([(query, 3, rows)] * 2))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU reads the file where it lies")
def test_a_memory_map_is_searched_where_it_lies(tmp_path):
    np.random.default_rng(0).standard_normal((5000, 1024), np.float32).tofile(tmp_path / "f")
    mapped = np.memmap(tmp_path / "f", "<f4", "r", shape=(5000, 1024))
    chunks = NearestNeighbours(mapped)._chunks
    assert len(chunks) == 5
    start = mapped.ctypes.data
    assert [chunk.unsafe_buffer_pointer() - start for chunk in chunks] == [i * (4 << 20) for i in range(5)]
