import numpy as np
import pytest

from jlml_jax import metrics
from jlml_jax.reranking import Reranking

IDS = np.concatenate([np.arange(12), np.random.default_rng(0).integers(0, 12, 60)])


def by_definition(query, gallery, k1, k2, weight):
    """The paper's equations on whole matrices, in float64, one image after another."""
    features = np.concatenate([query, gallery]).astype(np.float64)
    squared = np.square(features[:, None] - features).sum(-1)
    distances = squared / squared.max(axis=1, keepdims=True)
    order = np.argsort(distances, axis=1, kind="stable")

    def reciprocal(index, k):
        return [other for other in order[index, :k + 1] if index in order[other, :k + 1]]

    encoding = np.zeros_like(distances)
    for index in range(len(features)):
        known = reciprocal(index, k1)
        robust = set(known)
        for other in known:
            theirs = reciprocal(other, round(k1 / 2))
            if len(set(theirs) & set(known)) > 2 / 3 * len(theirs):
                robust |= set(theirs)
        robust = sorted(robust)
        encoding[index, robust] = np.exp(-distances[index, robust])
        encoding[index] /= encoding[index].sum()
    encoding = np.stack([encoding[order[index, :k2]].mean(0) for index in range(len(features))])
    jaccard = np.array([[1 - np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in encoding[len(query):]]
                        for a in encoding[:len(query)]])
    return (1 - weight) * jaccard + weight * distances[:len(query), len(query):]


@pytest.fixture(scope="module")
def people():
    """Features of 12 queries and 60 gallery images of 12 people."""
    rng = np.random.default_rng(1)
    features = (rng.standard_normal((12, 16))[IDS] + 0.7 * rng.standard_normal((72, 16))).astype(np.float32)
    return features[:12], features[12:]


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 1.0), (100, 2, 0.5), (4, 9, 0.3)])
def test_distances_are_those_of_the_equations(people, k1, k2, weight):
    expected = by_definition(*people, k1, k2, weight)
    reranking = Reranking(*people, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(reranking.distances(np.arange(12), np.arange(60)), expected, atol=2e-6)
    some = reranking.distances(np.array([7, 2]), np.array([30, 3, 59]))
    np.testing.assert_allclose(some, expected[np.ix_([7, 2], [30, 3, 59])], atol=2e-6)


def test_without_other_wishes_it_is_the_papers(people):
    everything = np.arange(12), np.arange(60)
    expected = Reranking(*people, k1=20, k2=6, weight=0.3).distances(*everything)
    np.testing.assert_array_equal(Reranking(*people).distances(*everything), expected)


def test_it_ranks_better_than_plain_distances(people):
    """The images between those of a person that are far from each other bring them together."""
    labels = IDS[:12] + 1, IDS[12:] + 1, np.zeros(12, int), np.ones(60, int)
    plain = metrics.evaluate_ranking(*people, *labels)
    reranked = metrics.rank_blocks(Reranking(*people, k1=6, k2=3).distances, *labels)
    assert reranked.mean_ap > plain.mean_ap + 0.02
    same = metrics.rank_blocks(Reranking(*people, weight=1.0).distances, *labels)
    assert same.mean_ap == pytest.approx(plain.mean_ap)


def test_copies_of_an_image_are_no_trouble():
    query, gallery = np.ones((2, 4), np.float32), np.ones((30, 4), np.float32)
    distances = Reranking(query, gallery, k1=5, k2=2).distances(np.arange(2), np.arange(30))
    assert np.isfinite(distances).all()
