"""The ranking metrics at Market-1501's size against a loop over queries that sorts each one's distances by argsort."""

import subprocess
import sys

import numpy as np

from experiments.bench.timing import ratio_of, time_in_turn
from jlml_jax import metrics
from jlml_jax.distances import l2_distances

NUM_QUERIES, NUM_GALLERY, NUM_DISTRACTORS = 3_368, 15_913, 2_798  # without junk
NUM_IDENTITIES, NUM_CAMERAS, DIM, MAX_RANK = 750, 6, 1_024, 50

_PEAK_MEMORY = """
import re
from pathlib import Path
from experiments.bench import ranking
from jlml_jax import metrics
features, labels = ranking.made_up()
metrics.evaluate_ranking(*features, *labels)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def made_up(seed: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]:
    """Features of query and gallery, float32 [., 1,024], and the identities and the cameras of both.

    The features tell people apart about as well as a trained network's.
    """
    rng = np.random.default_rng(seed)
    query_ids = rng.integers(1, NUM_IDENTITIES + 1, NUM_QUERIES)
    gallery_ids = rng.permutation(np.concatenate(
        [np.zeros(NUM_DISTRACTORS, int), rng.integers(1, NUM_IDENTITIES + 1, NUM_GALLERY - NUM_DISTRACTORS)]))
    centres = rng.standard_normal((NUM_IDENTITIES + 1, DIM), np.float32)
    features = tuple(centres[ids] + 3 * rng.standard_normal((len(ids), DIM), np.float32)
                     for ids in (query_ids, gallery_ids))
    cameras = (rng.integers(1, NUM_CAMERAS + 1, len(ids)) for ids in (query_ids, gallery_ids))
    return features, (query_ids, gallery_ids, *cameras)


def loop_over_queries(distances: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray,
                      query_cameras: np.ndarray, gallery_cameras: np.ndarray) -> tuple[np.ndarray, float]:
    """CMC [50] and mAP as most code computes them: argsort, mask, cumulative sums, query by query."""
    curves, precisions = [], []
    for row, identity, camera in zip(distances, query_ids, query_cameras, strict=True):
        order = np.argsort(row)
        keep = ~((gallery_ids[order] == identity) & (gallery_cameras[order] == camera))
        hits = (gallery_ids[order] == identity)[keep]
        if not hits.any():
            continue
        curves.append(np.minimum(hits.cumsum(), 1)[:MAX_RANK])
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        precisions.append((precision * hits).sum() / hits.sum())
    return np.mean(curves, axis=0), float(np.mean(precisions))


def bench_evaluate(repeats: int) -> dict:
    """Seconds from distances and from features, ours and the loop's, and the peak memory of ours from features."""
    (query, gallery), labels = made_up()
    distances = l2_distances(query, gallery)

    def loop_from_features():
        squares = (query**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * query @ gallery.T
        return loop_over_queries(squares, *labels)

    scores, (cmc, mean_ap) = metrics.rank_metrics(distances, *labels), loop_over_queries(distances, *labels)
    # It is the same work; of equal distances ours ranks the wrong image first.
    np.testing.assert_allclose(scores.cmc, cmc, rtol=1e-3)
    np.testing.assert_allclose(scores.mean_ap, mean_ap, rtol=1e-5)
    from_distances = time_in_turn({"ours": lambda: metrics.rank_metrics(distances, *labels),
                                   "loop": lambda: loop_over_queries(distances, *labels)}, repeats)
    from_features = time_in_turn({"ours": lambda: metrics.evaluate_ranking(query, gallery, *labels),
                                  "loop": loop_from_features}, repeats)
    memory = subprocess.run([sys.executable, "-c", _PEAK_MEMORY], capture_output=True, text=True, check=True)
    return {
        "queries": NUM_QUERIES, "gallery": NUM_GALLERY, "dim": DIM, "repeats": repeats, "mean_ap": mean_ap,
        "seconds_from_distances": {name: float(np.median(values)) for name, values in from_distances.items()},
        "from_distances_over_loop": ratio_of(from_distances["loop"], from_distances["ours"]),
        "seconds_from_features": {name: float(np.median(values)) for name, values in from_features.items()},
        "from_features_over_loop": ratio_of(from_features["loop"], from_features["ours"]),
        "peak_memory_mib": int(memory.stdout) / 1024,  # of a whole process that evaluates from features
    }
