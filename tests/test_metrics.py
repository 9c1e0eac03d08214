"""jlml_jax.metrics against hand-computed examples and a brute-force reference written from the protocol's text."""

import dataclasses
import functools
import tracemalloc

import numpy as np
import pytest
from reference_ranking import assert_equal, score, score_single_shot, single_shot_draws, squared_distances

from jlml_jax import distances, metrics
from jlml_jax.distances import l2_distances
from jlml_jax.errors import UserError


def random_labels(rng, num_queries, num_gallery, num_ids=5, num_cameras=3):
    """Persons, distractors and junk on both sides, and persons without a match."""
    return (
        rng.integers(-1, num_ids + 2, num_queries),
        rng.integers(-1, num_ids + 1, num_gallery),
        rng.integers(1, num_cameras + 1, num_queries),
        rng.integers(1, num_cameras + 1, num_gallery),
    )


def one_query(row, same, **kwargs):
    """Metrics of one query of person 1; same[g] says whether gallery image g is a true match."""
    ids = np.where(same, 1, 2)
    return metrics.rank_metrics(np.array([row]), [1], ids, [1], np.full(len(ids), 2), **kwargs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force_on_random_cases(seed, dtype):
    rng = np.random.default_rng(seed)
    num_queries, num_gallery, max_rank = rng.integers(1, 14), rng.integers(1, 40), int(rng.integers(1, 60))
    labels = random_labels(rng, num_queries, num_gallery, rng.integers(1, 6), rng.integers(1, 4))
    levels = [3, 10, 10**6][seed % 3]  # from nearly all tied to hardly any
    matrix = rng.integers(-levels, levels, (num_queries, num_gallery)).astype(dtype)
    expected = score(matrix.tolist(), *labels, max_rank)
    if expected is None:
        with pytest.raises(UserError, match="no query has a true match"):
            metrics.rank_metrics(matrix, *labels, max_rank=max_rank)
    else:
        assert_equal(metrics.rank_metrics(matrix, *labels, max_rank=max_rank), expected)


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force_from_features(seed):
    rng = np.random.default_rng(seed)
    labels = random_labels(rng, 40, 90)
    if seed % 2:  # small integers: heavy ties, which must survive centring
        query, gallery = rng.integers(0, 3, (40, 4)).astype(np.float32), rng.integers(0, 3, (90, 4)).astype(np.float32)
    else:
        query, gallery = rng.normal(size=(40, 32)) + 30, rng.normal(size=(90, 32)) + 30
    matrix = squared_distances(query, gallery)
    assert_equal(metrics.evaluate_ranking(query, gallery, *labels), score(matrix, *labels, 50), 1e-6)


@pytest.mark.parametrize("most_bounds", [1, 2, 20, 200])
@pytest.mark.parametrize("rows, columns", [(1, 1), (metrics._ROWS_AT_ONCE, 64), (metrics._ROWS_AT_ONCE + 1, 129),
                                           (3 * metrics._ROWS_AT_ONCE, 300)])
def test_counted_values_are_those_at_most_each_bound(most_bounds, rows, columns):
    """On both sides of the number of rows that are taken at once; rows of few bounds and of many, and equal values."""
    rng = np.random.default_rng(most_bounds + rows)
    values = rng.integers(0, 50, (rows, columns)).astype(np.float32)
    bounds = [np.sort(rng.integers(-5, 55, count)).astype(np.float32)
              for count in rng.integers(1, most_bounds + 1, rows)]
    bounds[-1] = np.sort(rng.choice(values[-1], most_bounds))
    counted = list(metrics._count_at_most(values, bounds))
    assert len(counted) == rows
    for row, own, counts in zip(values, bounds, counted, strict=True):
        np.testing.assert_array_equal(counts, (row[:, None] <= own).sum(0))


def test_hand_computed():
    # ranks of the true matches: 1, 3, 6
    result = one_query([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [True, False, True, False, False, True], max_rank=8)
    assert result.mean_ap == pytest.approx((1 + 2 / 3 + 3 / 6) / 3, abs=1e-12)
    # precision one rank earlier: 1 by definition, 1/2, 2/5
    expected = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3
    assert result.mean_ap_trapezoid == pytest.approx(expected, abs=1e-12)
    assert result.mean_inp == pytest.approx(3 / 6, abs=1e-12)
    np.testing.assert_array_equal(result.cmc, np.ones(8))
    assert result.num_valid_queries == 1
    # first match at rank 2: the precision before it is 0, not 1
    result = one_query([0.1, 0.2, 0.3], [False, True, False], max_rank=2)
    assert (result.mean_ap, result.mean_ap_trapezoid, result.mean_inp) == (0.5, 0.25, 0.5)
    np.testing.assert_array_equal(result.cmc, [0, 1])


def test_identities_and_cameras_may_be_any_integers():
    """Such as the number of a site in the highest bits of each person's."""
    rng = np.random.default_rng(0)
    query_ids, gallery_ids, query_cameras, gallery_cameras = random_labels(rng, 20, 80, num_cameras=16)
    matrix = rng.normal(size=(20, 80))
    expected = metrics.rank_metrics(matrix, query_ids, gallery_ids, query_cameras, gallery_cameras)
    query_ids, gallery_ids = (np.where(ids > 0, 1 + (ids << 60), ids) for ids in (query_ids, gallery_ids))
    found = metrics.rank_metrics(matrix, query_ids, gallery_ids, -(query_cameras << 58), -(gallery_cameras << 58))
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    assert (found.mean_ap, found.num_valid_queries) == (expected.mean_ap, expected.num_valid_queries)


def test_perfect_ranking_scores_one():
    result = one_query([1.0, 2.0, 3.0, 4.0], [True, True, True, False])
    assert (result.mean_ap, result.mean_ap_trapezoid, result.mean_inp) == (1, 1, 1)
    np.testing.assert_array_equal(result.cmc, np.ones(50))


def test_on_equal_distances_the_wrong_image_ranks_first():
    for same in ([True, False, False], [False, False, True]):
        result = one_query([0.5, 0.5, 0.5], same, max_rank=4)
        np.testing.assert_array_equal(result.cmc, [0, 0, 1, 1])
        assert result.mean_inp == pytest.approx(1 / 3)
    # a network that has collapsed gives the lowest score, not a perfect one
    constant = np.full((1, 8), 0.3)
    result = metrics.evaluate_ranking(constant, np.repeat(constant, 10, 0), [1], [1] + [2] * 9, [1], [2] * 10)
    assert result.mean_ap == pytest.approx(1 / 10)


def test_ignored_images_do_not_count_and_distractors_do():
    # nearest first: own camera, junk, distractor, true match
    matrix = np.array([[0.1, 0.2, 0.3, 0.4]])
    result = metrics.rank_metrics(matrix, [1], [1, -1, 0, 1], [1], [1, 2, 1, 2], max_rank=3)
    np.testing.assert_array_equal(result.cmc, [0, 1, 1])
    assert (result.mean_ap, result.mean_inp) == (0.5, 0.5)
    # queries that are distractors or junk are never valid, though the gallery holds such images in other cameras
    result = metrics.rank_metrics(np.ones((3, 3)), [0, -1, 1], [0, -1, 1], [1, 1, 1], [2, 2, 2])
    assert result.num_valid_queries == 1


def test_cmc_beyond_the_gallery_keeps_its_final_value():
    result = one_query([0.1, 0.2], [False, True], max_rank=7)
    np.testing.assert_array_equal(result.cmc, [0, 1, 1, 1, 1, 1, 1])


def test_float64_distances_are_compared_in_float64():
    result = one_query([1.0, 1.0 + 1e-12], [True, False])
    assert result.mean_ap == 1
    result = one_query([1.0 + 1e-12, 1.0], [True, False])
    assert result.mean_ap == 0.5


def test_result_does_not_depend_on_the_chunk_size(monkeypatch):
    rng = np.random.default_rng(0)
    labels = random_labels(rng, 50, 80)
    query, gallery = rng.normal(size=(50, 16)), rng.normal(size=(80, 16))
    matrix = l2_distances(query, gallery)
    whole = metrics.rank_metrics(matrix, *labels)
    assert_equal(whole, score(matrix.tolist(), *labels, 50))
    for size in (1, 2, 7, 49):
        monkeypatch.setattr(metrics, "_MIN_CHUNK", size)
        monkeypatch.setattr(metrics, "_CHUNK_DISTANCES", 1)
        for result in (metrics.rank_metrics(matrix, *labels), metrics.evaluate_ranking(query, gallery, *labels)):
            np.testing.assert_array_equal(result.cmc, whole.cmc)
            assert result.mean_ap == pytest.approx(whole.mean_ap, abs=1e-12)
            assert result.num_valid_queries == whole.num_valid_queries


@pytest.mark.parametrize("block", [3, 40, 89])
def test_result_does_not_depend_on_the_blocks(monkeypatch, block):
    """Neither where the queried people fill several blocks, nor where one has them all; ties over blocks survive."""
    rng = np.random.default_rng(0)
    labels = random_labels(rng, 40, 90)
    labels[1][20:] = np.where(rng.random(70) < 0.5, 0, labels[1][20:])  # distractors, for blocks without people
    query = rng.integers(0, 3, (40, 4)).astype(np.float32)
    gallery = rng.integers(0, 3, (90, 4)).astype(np.float32)
    expected = score(squared_distances(query, gallery), *labels, 50)
    given = l2_distances(query, gallery)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert_equal(metrics.evaluate_ranking(query, gallery, *labels), expected, 1e-6)
    assert_equal(metrics.rank_metrics(given, *labels), expected)
    assert_equal(metrics.rank_blocks(lambda rows, columns: given[rows][:, columns], *labels), expected)
    first_ranks, precisions = metrics.query_scores(query, gallery, *labels)
    assert np.nanmean(precisions) == pytest.approx(expected[1], abs=1e-9)
    assert np.mean(first_ranks[first_ranks > 0] <= 5) == pytest.approx(expected[0][4])


class ReadOnce(distances.LazyRows):
    """Rows that are computed, and a count of those handed out at a time."""

    def __init__(self, values):
        self._values, self.most = values, 0
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, rows):
        found = self._values[rows].copy()
        self.most = max(self.most, len(found))
        return found


def test_a_gallery_may_be_read_lazily_and_is_never_read_whole(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 300)
    monkeypatch.setattr(distances, "_READ_AT_ONCE", 64 * 16)
    rng = np.random.default_rng(0)
    labels = random_labels(rng, 50, 4000)
    query, gallery = rng.normal(size=(50, 16)), rng.normal(size=(4000, 16)).astype(np.float32)
    lazy = ReadOnce(gallery)
    expected = metrics.evaluate_ranking(query, gallery, *labels)
    result = metrics.evaluate_ranking(query, lazy, *labels)
    np.testing.assert_array_equal(result.cmc, expected.cmc)
    assert result.mean_ap == expected.mean_ap
    assert lazy.most < 2048  # the sample that the centre is found from
    np.testing.assert_array_equal(np.asarray(lazy), gallery)
    assert (np.asarray(lazy).dtype, np.asarray(lazy, np.float64).dtype) == (np.float32, np.float64)
    gallery[3210, 3] = np.nan
    with pytest.raises(UserError, match="gallery features: row 3210 "):
        metrics.evaluate_ranking(query, lazy, *labels)


def peak_memory(call, *arguments):
    """Bytes that `call` takes at most, beside its arguments."""
    tracemalloc.start()
    try:
        call(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_never_copies_the_gallery(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 500)
    monkeypatch.setattr(metrics, "_CHUNK_DISTANCES", 1 << 14)
    monkeypatch.setattr(distances, "_READ_AT_ONCE", 1 << 15)
    rng = np.random.default_rng(0)
    labels = (rng.integers(1, 50, 100), np.where(rng.random(20_000) < 0.9, 0, 7), np.ones(100, int),
              np.full(20_000, 2))
    labels[1][:50] = -1  # junk, which is left out
    query, gallery = (rng.standard_normal((size, 256), np.float32) for size in (100, 20_000))
    assert peak_memory(metrics.evaluate_ranking, query, gallery, *labels) < gallery.nbytes / 3


def test_never_holds_all_distances(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_DISTANCES", 1 << 16)
    rng = np.random.default_rng(0)
    labels = (rng.integers(1, 50, 2000), rng.integers(1, 50, 4000), np.ones(2000, int), np.full(4000, 2))
    query, gallery = rng.normal(size=(2000, 8)), rng.normal(size=(4000, 8))
    half_of_the_matrix = 2000 * 4000 * 4 / 2  # the chunks of 8 threads are an eighth of that
    assert peak_memory(metrics.evaluate_ranking, query, gallery, *labels) < half_of_the_matrix


def test_single_gallery_shot_equals_brute_force():
    rng = np.random.default_rng(0)
    labels = random_labels(rng, 20, 60)
    matrix = rng.integers(0, 8, (20, 60)).astype(np.float64)
    expected = score_single_shot(matrix.tolist(), *labels, 20, seed=3)
    draws = single_shot_draws(labels[1], 10, 3)
    assert len({len(score(matrix, *labels, 20, draw)[4]) for draw in draws}) > 1  # queries drop out of some
    assert_equal(metrics.rank_metrics(matrix, *labels, max_rank=20, single_gallery_shot=True, seed=3), expected)


def test_where_a_person_has_one_image_the_single_shot_is_the_gallery_in_whatever_order():
    labels, matrix = ([2, 1], [2, 1, 3, 0], [1, 1], [2, 2, 2, 2]), [[0, 1, 2, 3], [1, 0, 2, 3]]
    once = metrics.rank_metrics(matrix, *labels, max_rank=3, single_gallery_shot=True)
    assert once.cmc.tolist() == [1, 1, 1] and once.mean_ap == 1


def test_single_gallery_shot_draws():
    gallery_ids = np.array([7, 0, 2, 7, -1, 0, 7, 2, 9])
    draws = list(metrics._single_shot_draws(gallery_ids, 400, seed=0))
    for draw in draws:
        assert sorted(gallery_ids[draw].tolist()) == [0, 0, 2, 7, 9]
        assert {1, 5} <= set(draw.tolist())
    counts = np.bincount(np.concatenate(draws), minlength=9)
    assert counts[4] == 0 and counts[8] == 400
    assert (counts[[0, 3, 6]] > 90).all() and (counts[[2, 7]] > 150).all()  # 133 and 200 expected


def test_single_gallery_shot_is_set_by_its_seed_and_ends_where_no_choice_is():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(30, 8)), rng.normal(size=(90, 8))
    # CUHK03: queries are all view-1 images, gallery one of three view-2 images a person
    labels = (np.arange(30) % 10 + 1, np.arange(90) % 30 + 1, np.ones(30, int), np.full(90, 2))

    def run(**kwargs):
        return metrics.evaluate_ranking(query, gallery, *labels, single_gallery_shot=True, **kwargs)

    assert run(seed=1).mean_ap == run(seed=1).mean_ap != run(seed=2).mean_ap
    result = run()
    assert result.num_valid_queries == 30
    assert result.mean_ap == pytest.approx(result.mean_inp)  # one true match a query
    one_each = (query, gallery[:30], labels[0], labels[1][:30], labels[2], labels[3][:30])
    assert metrics.evaluate_ranking(*one_each, single_gallery_shot=True).mean_ap == pytest.approx(
        metrics.evaluate_ranking(*one_each).mean_ap, abs=1e-12
    )


def test_defaults_are_ten_draws_of_seed_0_and_50_ranks():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(30, 8)), rng.normal(size=(90, 8))
    labels = random_labels(rng, 30, 90, num_ids=12)
    matrix = squared_distances(query, gallery)
    expected = score_single_shot(matrix, *labels, 50, repeats=10, seed=0)
    assert_equal(metrics.evaluate_ranking(query, gallery, *labels, single_gallery_shot=True), expected)
    assert_equal(metrics.rank_metrics(matrix, *labels, single_gallery_shot=True), expected)
    blocks = metrics.rank_blocks(lambda rows, columns: np.asarray(matrix)[np.ix_(rows, columns)], *labels,
                                 single_gallery_shot=True)
    assert_equal(blocks, expected)
    assert len(metrics.rank_metrics(matrix, *labels).cmc) == 50
    assert len(metrics.evaluate_ranking(query, gallery, *labels).cmc) == 50


def test_options_are_named_in_the_call():
    def distances_of(rows, columns):
        return np.ones((len(rows), len(columns)))

    labels = [1], [1], [1], [2]
    one = np.ones((1, 1))
    for call in (functools.partial(metrics.evaluate_ranking, one, one), functools.partial(metrics.rank_metrics, one),
                 functools.partial(metrics.rank_blocks, distances_of)):
        assert call(*labels).mean_ap == 1
        with pytest.raises(TypeError, match="positional"):
            call(*labels, 10)


def test_one_rank_and_one_draw_are_enough():
    result = metrics.rank_metrics([[1.0]], [1], [1], [1], [2], max_rank=1, single_gallery_shot=True, repeats=1)
    assert result.cmc.tolist() == [1]


def test_results_are_fixed_and_not_compared_array_by_array():
    result, other = (metrics.rank_metrics([[1.0]], [1], [1], [1], [2]) for _ in range(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mean_ap = 2.0
    assert result != other and result == result  # noqa: PLR0124


def test_too_few_rows_of_distances_are_noticed():
    with pytest.raises(ValueError, match="shorter"):
        metrics.rank_blocks(lambda rows, columns: np.ones((len(rows) - 1, len(columns))), [1, 1], [1], [1, 1], [2])


def test_scores_of_each_query_are_those_of_its_own_ranking():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(40, 8)), rng.normal(size=(60, 8))
    labels = random_labels(rng, 40, 60)
    matrix = squared_distances(query, gallery)
    ranks, precisions = metrics.query_scores(query, gallery, *labels)
    assert ranks.shape == precisions.shape == (40,)
    alone = [score([matrix[q]], labels[0][[q]], labels[1], labels[2][[q]], labels[3], 60) for q in range(40)]
    assert sum(one is None for one in alone) > 5  # junk, distractors, people who are not there
    for one, rank, precision in zip(alone, ranks, precisions, strict=True):
        if one is None:
            assert rank == 0 and np.isnan(precision)
        else:
            assert rank == 1 + np.flatnonzero(one[0])[0]
            assert precision == pytest.approx(one[1], abs=1e-6)


def test_query_scores_add_up_to_the_means():
    rng = np.random.default_rng(0)
    query, gallery = rng.standard_normal((30, 4)), rng.standard_normal((200, 4))
    labels = rng.integers(1, 9, 30), rng.integers(-1, 9, 200), rng.integers(0, 3, 30), rng.integers(0, 3, 200)
    labels[0][7] = 99  # without a match
    first_ranks, precisions = metrics.query_scores(query, gallery, *labels)
    whole = metrics.evaluate_ranking(query, gallery, *labels, max_rank=20)
    assert first_ranks[7] == 0 and np.isnan(precisions[7])
    valid = np.isfinite(precisions)
    assert np.mean(precisions[valid]) == pytest.approx(whole.mean_ap)
    np.testing.assert_allclose([np.mean(first_ranks[valid] <= k) for k in range(1, 21)], whole.cmc)


def test_a_repeat_without_any_match_is_left_out():
    matrix = np.array([[0.5, 0.1, 0.2]])
    labels = ([1], [1, 1, 2], [1], [1, 2, 2])  # the person's first image is from the query's camera
    result = metrics.rank_metrics(matrix, *labels, single_gallery_shot=True, repeats=20)
    assert (result.mean_ap, result.num_valid_queries) == (1, 1)
    labels = ([1], [1, 1, 2], [1], [1, 1, 2])
    with pytest.raises(UserError, match="no query has a true match"):
        metrics.rank_metrics(matrix, *labels, single_gallery_shot=True)


@pytest.mark.parametrize(
    "labels, cause",
    [
        (([2, 3], [2, 3], [4, 4], [4, 4]), "all images have camera 4"),
        (([0, -1], [1, 2], [1, 1], [2, 2]), "no query shows a person"),
        (([1, 2], [3, 0], [1, 1], [2, 2]), "no query identity is in the gallery"),
        (([1, 1], [3, 0], [1, 1], [2, 2]), "no query identity is in the gallery"),
        (([1, 0], [3, 0], [1, 1], [2, 2]), "no query identity is in the gallery"),
        (([1, 1], [1, 2], [1, 1], [1, 2]), "query's own camera"),
        (([1, 2], [1, 2], [1, 2], [1, 2]), "query's own camera"),
    ],
)
def test_names_the_cause_when_no_query_is_valid(labels, cause):
    with pytest.raises(UserError, match=cause):
        metrics.rank_metrics(np.ones((2, 2)), *labels)


def test_empty_sides():
    with pytest.raises(UserError, match="0 query and 2 gallery"):
        metrics.evaluate_ranking(np.ones((0, 3)), np.ones((2, 3)), [], [1, 2], [], [1, 1])
    with pytest.raises(UserError, match="1 query and 0 gallery"):
        metrics.rank_metrics(np.ones((1, 0)), [1], [], [1], [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_values_that_are_not_finite(bad):
    labels = ([1, 1, 1], [1, 2, -1], [1, 1, 1], [2, 2, 2])
    for column in (0, 2):  # in an ignored image too
        matrix = np.ones((3, 3))
        matrix[1:, column] = bad
        with pytest.raises(UserError, match="distances: row 1 "):
            metrics.rank_metrics(matrix, *labels)
        with pytest.raises(UserError, match="gallery features: row 1 "):
            metrics.evaluate_ranking(np.ones((3, 3)), matrix, *labels)


def test_refuses_shapes_and_labels_that_do_not_fit():
    good = [[1, 2], [1, 2, 3], [1, 1], [2, 2, 2]]
    metrics.rank_metrics(np.ones((2, 3)), *good)
    for position, name in enumerate(["query_ids", "gallery_ids", "query_cameras", "gallery_cameras"]):
        for wrong in ([1] * 4, [[1], [2]], 1):
            with pytest.raises(ValueError, match=name):
                metrics.rank_metrics(np.ones((2, 3)), *good[:position], wrong, *good[position + 1 :])
    with pytest.raises(ValueError, match="integers"):
        metrics.rank_metrics(np.ones((2, 3)), [1.0, 2.0], *good[1:])
    for too_low in ([1, -2], np.array([1, 2**64 - 2], np.uint64)):  # which int64 has as -2
        with pytest.raises(ValueError, match="-2"):
            metrics.rank_metrics(np.ones((2, 3)), too_low, *good[1:])
    with pytest.raises(ValueError, match="2-D"):
        metrics.rank_metrics(np.ones(3), *good)
    for dims in ((4, 5), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match="agree in D"):
            metrics.evaluate_ranking(np.ones((2, dims[0])), np.ones((3, dims[1])), *good)
    for option in ({"max_rank": 0}, {"single_gallery_shot": True, "repeats": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            metrics.rank_metrics(np.ones((2, 3)), *good, **option)
