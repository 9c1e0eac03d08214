"""Which images show one person, where nobody has said so: groups of features that are near each other."""

import numpy as np
import scipy.cluster.hierarchy

from jlml_jax.distances import l2_distances
from jlml_jax.errors import UserError

MOST_IMAGES = 30_000  # the distances of all pairs are held twice, in float64: 7 GB
_BLOCK = 1024  # images whose distances to all others are computed at a time
_NEVER = 1e300  # a distance that no mean with others brings below a threshold, of however many


def group(features: np.ndarray, threshold: float, apart: np.ndarray | None = None) -> np.ndarray:
    """Agglomerative clustering by average linkage: the two nearest groups are joined, again and again, as long as the
    mean L2 distance between an image of one and an image of the other is at most `threshold`.

    By the mean, one wrong pair does not join two persons, nor does one bad view part them. Measured against
    alternatives in experiments/results/grouping.md.

    Args:
        features: float [N, D].
        threshold: a distance, such as `calibration` measures.
        apart: int [P, 2]: pairs of images that are known to be of different people.

    Returns:
        The group of each image, int64 [N], numbered from 0 by size, the largest first; equal ones by their first image.

    Raises:
        UserError: a feature is NaN or infinite, or there are more than `MOST_IMAGES`.
    """
    number = len(features)
    check_number(number)
    if number < 2:
        return np.zeros(number, np.int64)
    distances, end = np.empty(_pairs_before(number, number)), 0  # of each image to those after it
    for start in range(0, number, _BLOCK):
        block = l2_distances(features[start:start + _BLOCK], features[start:])
        for row, values in enumerate(block, start):
            values = values[row - start + 1:]
            distances[end:end + len(values)] = values
            end += len(values)
    if apart is not None:
        first, second = np.sort(apart, axis=1).T
        distances[_pairs_before(number, first) + second - first - 1] = _NEVER
    tree = scipy.cluster.hierarchy.linkage(distances, "average")
    return by_size(scipy.cluster.hierarchy.fcluster(tree, threshold, "distance"))


def by_size(groups: np.ndarray) -> np.ndarray:
    """Groups [N], numbered from 0 by size, the largest first; equal ones by their first image; int64 [N]."""
    _, first, groups, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    ranks = np.empty(len(sizes), np.int64)
    ranks[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return ranks[groups]


def _pairs_before(number: int, row: int | np.ndarray) -> int | np.ndarray:
    """Of `number` images, the pairs of those before `row` with all after each."""
    return number * row - row * (row + 1) // 2


def check_number(number: int, what: str = "images") -> None:
    """A UserError if so many cannot be grouped: told before they are embedded, not after."""
    if number > MOST_IMAGES:
        raise UserError(f"{number:,} {what} are more than can be grouped at once, {MOST_IMAGES:,}; group them by place "
                        "or day, say")


def typical_first(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """All images by group, and within one by the distance from the mean of its features, int64 [N]."""
    order, distances = np.argsort(groups, kind="stable"), np.empty(len(groups))
    for rows in np.split(order, np.cumsum(np.bincount(groups))[:-1]):  # of tracks, all images may be a great many
        distances[rows] = np.linalg.norm(features[rows] - features[rows].mean(axis=0, dtype=np.float64), axis=1)
    return np.lexsort((distances, groups))


def agreement(groups: np.ndarray, identities: np.ndarray) -> tuple[float, float]:
    """How well groups agree with who is known to be on the images: B-cubed precision and recall (Bagga and Baldwin
    1998), 0 to 1.

    Precision is the mean, over the images, of the share of an image's group that shows its person; recall, of the share
    of its person's images that are in its group.

    Args:
        groups: int [N], N > 0.
        identities: [N].
    """
    _, persons = np.unique(identities, return_inverse=True)

    def images_alike(labels: np.ndarray) -> np.ndarray:  # of each image, how many have its label
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        return counts[inverse]

    both = images_alike(groups * (persons.max() + 1) + persons)
    return (both / images_alike(groups)).mean(), (both / images_alike(persons)).mean()
