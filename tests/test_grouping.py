"""Grouping by average linkage: against one written out plainly; frames, order, agreement with known persons."""

import itertools
import tracemalloc

import numpy as np
import pytest

from jlml_jax import grouping
from jlml_jax.errors import UserError


def cloud(number=40, persons=8, seed=0):
    rng = np.random.default_rng(seed)
    identities = rng.integers(0, persons, number)
    centres = rng.standard_normal((persons, 6))
    return (centres[identities] + 0.5 * rng.standard_normal((number, 6))).astype(np.float32), identities


def joined_one_by_one(features, threshold, frames):
    """The groups as sets of rows: the two at the least mean distance are joined while that is at most `threshold`."""
    distances = np.linalg.norm(features[:, None].astype(np.float64) - features, axis=-1)
    distances[(frames[:, None] == frames) & (frames >= 0)] = 1e12
    groups = [{row} for row in range(len(features))]
    while len(groups) > 1:
        mean, a, b = min((distances[np.ix_(list(x), list(y))].mean(), i, j)
                         for (i, x), (j, y) in itertools.combinations(enumerate(groups), 2))
        if mean > threshold:
            break
        groups[a] |= groups.pop(b)
    return {frozenset(one) for one in groups}


def as_sets(groups):
    return {frozenset(np.flatnonzero(groups == number).tolist()) for number in np.unique(groups)}


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 1.2, 1.8, 2.5, 9.0])
def test_groups_are_those_of_average_linkage(threshold, framed, monkeypatch):
    monkeypatch.setattr(grouping, "_BLOCK", 7)  # several, the last one smaller
    for seed in range(3):
        features, _ = cloud(seed=seed)
        frames = np.random.default_rng(seed).integers(-1, 12, len(features)) if framed else np.full(len(features), -1)
        apart = [(b, a) for a, b in itertools.combinations(range(len(features)), 2) if frames[a] == frames[b] >= 0]
        groups = grouping.group(features, threshold, np.array(apart) if framed else None)
        assert as_sets(groups) == joined_one_by_one(features, threshold, frames)


def test_a_group_has_nobody_who_is_known_to_be_another():
    features = np.zeros((100, 3), np.float32)  # one person, by all that the features say, of thousands of pairs
    groups = grouping.group(features, 9.0, np.array([[0, 1], [4, 3]]))
    assert groups[0] != groups[1] and groups[3] != groups[4] and len(np.unique(groups)) == 2
    assert len(np.unique(grouping.group(features, 9.0))) == 1


def test_the_largest_group_is_the_first_and_of_equal_ones_the_one_that_begins_first():
    features = np.array([[9], [0], [5], [5], [0], [5], [9], [7]], np.float32)
    assert grouping.group(features, 0.5).tolist() == [1, 2, 0, 0, 2, 0, 1, 3]


def test_few_images():
    assert grouping.group(np.zeros((0, 4), np.float32), 1.0).tolist() == []
    assert grouping.group(np.zeros((1, 4), np.float32), 1.0).tolist() == [0]


def test_what_cannot_be_grouped(monkeypatch):
    features = cloud(10)[0]
    monkeypatch.setattr(grouping, "MOST_IMAGES", 9)
    with pytest.raises(UserError, match="10 images are more than can be grouped at once, 9"):
        grouping.group(features, 1.0)
    features[3, 2] = np.nan
    with pytest.raises(UserError, match="row 3"):
        grouping.group(features[:9], 1.0)


def test_typical_images_come_first():
    features = np.array([[0.0], [10.0], [1.0], [0.4], [12.0]], np.float32)
    # The means are 0.467 and 11.
    order = grouping.typical_first(features, np.array([0, 1, 0, 0, 1]))
    assert order.tolist()[:3] == [3, 0, 2] and sorted(order[3:]) == [1, 4]
    assert grouping.typical_first(features, np.array([1, 0, 2, 2, 0])).tolist()[2] == 0


def test_the_order_within_groups_takes_the_memory_of_a_group():
    """For of tracks, the images are many more than what can be grouped."""
    features, groups = np.ones((20_000, 64), np.float32), np.arange(20_000) // 20
    tracemalloc.start()
    grouping.typical_first(features, groups)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes / 2


def test_agreement():
    assert grouping.agreement(np.array([0, 0, 1]), np.array(["a", "a", "b"])) == (1, 1)
    # In the groups {a, a, b, c} and {c} 2/4, 2/4, 1/4, 1/4 and 1; of the persons a, a, b, c and c 1, 1, 1, 1/2 and 1/2.
    precision, recall = grouping.agreement(np.array([7, 7, 7, 7, 6]), np.array(["a", "a", "b", "c", "c"]))
    assert precision == pytest.approx(0.5)
    assert recall == pytest.approx(0.8)
