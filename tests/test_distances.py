"""L2 distances against float64, however the features lie."""

import numpy as np
import pytest

from jlml_jax import distances, metrics
from jlml_jax.distances import l2_distances
from jlml_jax.errors import UserError


def feature_sets():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(40, 256)), rng.normal(size=(70, 256))
    centres = rng.normal(size=(70, 256))
    yield "plain", query, gallery
    yield "far from the origin", query + 1000, gallery + 1000
    yield "far, in float64", (query * 1e-3 + 1e6).astype(np.float64), (gallery * 1e-3 + 1e6).astype(np.float64)
    yield (
        "one large constant dimension",
        np.c_[query * 1e-3, np.full(40, 10000.4)],
        np.c_[gallery * 1e-3, np.full(70, 10000.4)],
    )
    yield "near-duplicates", centres[:40] + 1e-3 * query, centres + 1e-3 * gallery
    yield "an outlier", np.r_[query, [np.full(256, 1e6)]], gallery + 30
    near_zero = np.r_[gallery[:10] * 1e-3, gallery[10:] + 100]
    yield "near-duplicates far from the centre", query[:5] * 1e-3, near_zero
    yield "two tight clusters", np.sign(query[:, :1]) * 50 + 1e-2 * query, np.sign(gallery[:, :1]) * 50 + 1e-2 * gallery
    yield "huge", query * 1e25, gallery * 1e25
    yield "tiny", query * 1e-25, gallery * 1e-25
    yield "2-D", query[:, :2], gallery[:, :2]


@pytest.mark.parametrize(
    "name, query, gallery", list(feature_sets()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_l2_distances_agree_with_float64(name, query, gallery):
    if "float64" not in name:
        query, gallery = query.astype(np.float32), gallery.astype(np.float32)
    gallery = np.concatenate([gallery, query[:3]])
    expected = np.sqrt(((query[:, None].astype(np.float64) - gallery) ** 2).sum(axis=2))
    found = l2_distances(query, gallery)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=5e-6)  # two so exact cannot change order if 1e-5 apart
    for row in range(3):
        assert found[row, -3 + row] == 0


@pytest.mark.parametrize("block", [1, 5, 7, 20])
def test_l2_distances_do_not_depend_on_the_blocks(monkeypatch, block):
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(4, 6)), rng.normal(size=(20, 6))
    expected = l2_distances(query, gallery)
    monkeypatch.setattr(distances, "BLOCK", block)
    np.testing.assert_allclose(l2_distances(query, gallery), expected, rtol=1e-6)


def test_rows_that_cannot_be_read_are_no_rows():
    with pytest.raises(TypeError, match="__getitem__"):
        type("Unread", (distances.LazyRows,), {})()


def test_centring_leaves_little_to_sum_anew(monkeypatch):
    """Correct without it, but slow: nearly all pairs would go the exact way. So shut that way, and see."""
    monkeypatch.setattr(distances, "_CLOSE", 0)
    for name, query, gallery in feature_sets():
        if name in ("plain", "far from the origin", "one large constant dimension"):
            query, gallery = query.astype(np.float32), gallery.astype(np.float32)
            expected = np.sqrt(((query[:, None].astype(np.float64) - gallery) ** 2).sum(axis=2))
            np.testing.assert_allclose(l2_distances(query, gallery), expected, rtol=5e-6)


def test_l2_distances_accept_what_extractors_give():
    import jax.numpy as jnp

    features = np.arange(12).reshape(3, 4)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8):
        given = jnp.asarray(features, dtype)
        np.testing.assert_allclose(l2_distances(given, given)[0], [0, 8, 16])


@pytest.mark.parametrize("side, row", [(0, 4), (1, 0), (1, 6)])
def test_the_row_beside_which_the_others_would_vanish_is_named(side, row):
    """In units of 1e25 the squares of the others are 0 in float32, and all would be equally far."""
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(7, 8)).astype(np.float32)]
    labels = ([1] * 5, [1, 2, 3, 1, 2, 3, 1], [1] * 5, [2] * 7)
    features[side][row] *= 1e15  # that much is well
    expected = np.sqrt(((features[0][:, None].astype(np.float64) - features[1]) ** 2).sum(axis=2))
    np.testing.assert_allclose(l2_distances(*features), expected, rtol=5e-6)
    features[side][row] *= 1e10
    for refuses in (l2_distances, lambda *features: metrics.evaluate_ranking(*features, *labels)):
        with pytest.raises(UserError, match=f"{('query', 'gallery')[side]} features: row {row} has values of [1-9]e.2"):
            refuses(*features)


@pytest.mark.parametrize("size", [1e-12, 1.0])
@pytest.mark.parametrize("ratio, refused", [(2.0**59.5, False), (2.0**60, False), (2.0**60.5, True)])
def test_a_row_beside_which_the_others_would_vanish_is_refused(size, ratio, refused):
    """Its size is that of the largest value's distance from the centre, which the sample of the gallery sets."""
    gallery = np.array([[-size], [size]] * 8)
    query = np.array([[size * ratio]])
    if refused:
        with pytest.raises(UserError, match="query features: row 0 has values of"):
            l2_distances(query, gallery)
    else:
        np.testing.assert_allclose(l2_distances(query, gallery), np.broadcast_to(query, (1, 16)), rtol=1e-5)


def test_what_vanishes_is_judged_by_distances_from_the_centre_not_from_the_origin():
    gallery = 2.0**30 + np.array([[-1.0], [1.0]] * 8)
    with pytest.raises(UserError, match="query features: row 0 has values of"):
        l2_distances(np.array([[2.0**61]]), gallery)


def test_beside_equal_features_any_size_is_compared():
    np.testing.assert_allclose(l2_distances(np.full((1, 2), 1e20), np.zeros((3, 2))), np.full((1, 3), 2**0.5 * 1e20),
                               rtol=1e-6)


@pytest.mark.parametrize("size", [1e-250, 1e-60, 1e60, 1e150])
def test_features_beyond_the_range_of_float32_are_ranked(size):
    """As float64 has them. Distances are float32: what is too large for it is infinite, what is too small 0."""
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(6, 8)), rng.normal(size=(20, 8))
    gallery[3] = query[2]
    labels = np.arange(6) % 3 + 1, np.arange(20) % 3 + 1, np.ones(6, int), np.full(20, 2)
    found, expected = (metrics.evaluate_ranking(factor * query, factor * gallery, *labels) for factor in (size, 1))
    assert found.mean_ap == expected.mean_ap
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    with np.errstate(over="ignore"):
        distances_found = l2_distances(size * query, size * gallery)
    far = np.ones(distances_found.shape, bool)
    far[2, 3] = False
    assert (distances_found[far] == (np.inf if size > 1 else 0)).all() and distances_found[2, 3] == 0


@pytest.mark.parametrize("offset, spread", [(0, 1), (100, 1e-3), (3e4, 1e-2)])
def test_order_is_that_of_float64_where_distances_differ_by_more_than_1e_5(offset, spread):
    """Distances that are 2e-5 apart, one after the other, however far off the features lie."""
    rng = np.random.default_rng(0)
    query = (offset + spread * rng.normal(size=(1, 256))).astype(np.float64)
    directions = rng.normal(size=(400, 256))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steps = rng.permutation(400)
    gallery = query + 10 * spread * (1 + 2e-5) ** steps[:, None] * directions
    if not offset:  # at an offset float32 itself would round the distances
        query, gallery = query.astype(np.float32), gallery.astype(np.float32)
    np.testing.assert_array_equal(l2_distances(query, gallery)[0].argsort(), steps.argsort())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_their_row(bad):
    for column in (0, 2):
        features = np.ones((3, 3))
        features[1:, column] = bad
        with pytest.raises(UserError, match="query features: row 1 "):
            l2_distances(features, np.ones((3, 3)))
    for features in (np.array([[bad, 1]]), np.array([[1, 1], [1, bad]])):
        with pytest.raises(UserError, match=f"row {len(features) - 1} "):
            l2_distances(features, np.ones((3, 2)))
    large = np.ones((5000, 300), np.float32)
    large[4321, 7] = bad
    with pytest.raises(UserError, match="gallery features: row 4321 "):
        l2_distances(large[:1], large)


def test_of_an_empty_gallery_there_are_no_distances():
    assert l2_distances(np.ones((2, 3)), np.ones((0, 3))).shape == (2, 0)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="query features must be 2-D"):
        l2_distances(np.ones(shape), np.ones((2, 3)))
