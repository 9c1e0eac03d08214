"""What a network has to beat: colour histograms over horizontal stripes, compared by four distances."""

from collections.abc import Callable

import numpy as np

NUM_STRIPES = 6
HSV_BINS = (8, 3, 3)  # hue, saturation, value


def rgb_to_hsv(images: np.ndarray) -> np.ndarray:
    """Hue, saturation and value of RGB images, uint8 [..., 3], as float32 [..., 3], all in [0, 1]; the hue in [0, 1).

    Greys, which have no hue, get hue 0.
    """
    red, green, blue = np.moveaxis(images.astype(np.float32) / 255, -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(chroma > 0, chroma, 1)
    hue = np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = np.where(value == red, (green - blue) / divisor, hue)
    hue = np.where(chroma > 0, hue / 6, 0)
    hue -= np.floor(hue)
    saturation = chroma / np.where(value > 0, value, 1)
    return np.stack([hue, saturation, value], axis=-1)


def color_histogram(images: np.ndarray) -> np.ndarray:
    """HSV histograms of RGB images, uint8 [N, H, W, 3], over six horizontal stripes: float32 [N, 6 * 72].

    Each stripe has a joint histogram of 8 hues, 3 saturations and 3 values that sums to 1. Pixels of the lowest
    saturation share one bin for all hues, those of the lowest value one for all hues and saturations: what a camera
    makes of a grey's hue is chance.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {images.dtype} {images.shape}")
    count, height, width = images.shape[:3]
    if height < NUM_STRIPES or width < 1:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into {NUM_STRIPES} stripes")
    size = int(np.prod(HSV_BINS))
    first_bins = np.arange(height)[:, None] * NUM_STRIPES // height * size
    histograms = np.empty((count, NUM_STRIPES, size), np.float32)
    for index, image in enumerate(images):  # one at a time, which stays in the processor's cache
        bins = (rgb_to_hsv(image) * HSV_BINS).astype(np.int32)
        hue, saturation, value = (np.minimum(bins[..., k], HSV_BINS[k] - 1) for k in range(3))
        saturation = np.where(value == 0, 0, saturation)
        hue = np.where(saturation == 0, 0, hue)
        joint = first_bins + (hue * HSV_BINS[1] + saturation) * HSV_BINS[2] + value
        counts = np.bincount(joint.ravel(), minlength=NUM_STRIPES * size).reshape(NUM_STRIPES, size)
        histograms[index] = counts / counts.sum(axis=1, keepdims=True)
    return histograms.reshape(count, -1)


def random_distances(draw: int, num_gallery: int, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """A random number, uint32 [n, m], for each of the pairs of `queries` int [n] with `gallery` images int [m].

    It is a hash (SplitMix64's) of the pair and of `draw`, so that any block can be asked for, in any order.
    """
    pairs = queries[:, None].astype(np.uint64) * np.uint64(num_gallery) + gallery.astype(np.uint64)
    mixed = (pairs + np.uint64(draw << 40)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def l1_distances(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Sums of absolute differences between rows of query [Q, D] and gallery [G, D]: float32 [Q, G]."""
    return _distances(query, gallery, lambda one, block: np.abs(block - one).sum(axis=1))


def l2_distances(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows of query [Q, D] and gallery [G, D]: float32 [Q, G]."""
    return _distances(query, gallery, lambda one, block: np.sqrt(np.square(block - one).sum(axis=1)))


def chi_squared_distances(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Half the sums of (q - g)^2 / (q + g) between rows of query [Q, D] and gallery [G, D]: float32 [Q, G].

    Bins empty on both sides add nothing.
    """

    def one_to_block(one: np.ndarray, block: np.ndarray) -> np.ndarray:
        total = block + one
        return 0.5 * (np.square(block - one) / np.where(total > 0, total, 1)).sum(axis=1)

    return _distances(query, gallery, one_to_block)


def _distances(query: np.ndarray, gallery: np.ndarray,
               one_to_block: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    distances = np.empty((len(query), len(gallery)), np.float32)
    for start in range(0, len(gallery), 1024):  # as many as stay in the cache
        block = slice(start, start + 1024)
        for row, one in zip(distances, query, strict=True):
            row[block] = one_to_block(one, gallery[block])
    return distances


def hellinger_distances(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Euclidean distances between square roots of rows of query [Q, D] and gallery [G, D]: float32 [Q, G].

    They rank as the Bhattacharyya coefficient does, sum sqrt(q g), summed over the stripes.
    """
    return l2_distances(np.sqrt(query), np.sqrt(gallery))


HISTOGRAM_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "l1": l1_distances,
    "l2": l2_distances,
    "chi_squared": chi_squared_distances,
    "hellinger": hellinger_distances,
}
