"""Ranking and its scores by plain Python loops over one query at a time, from the protocols' texts."""

import numpy as np


def squared_distances(query, gallery):
    """Squared L2 distances, a list for each query, in the precision of Python's floats."""
    return [[sum((float(a) - float(b)) ** 2 for a, b in zip(left, right, strict=True)) for right in gallery]
            for left in query]


def score(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank, columns=None):
    """(CMC, mAP, trapezoid mAP, mINP, the queries with a match), of all gallery images or of those in `columns`.

    None if no query has a match.
    """
    curves, aps, trapezoids, inps, valid = [], [], [], [], []
    for q in range(len(query_ids)):
        if query_ids[q] < 1:
            continue
        ranking = []
        for g in range(len(gallery_ids)) if columns is None else columns:
            same = gallery_ids[g] == query_ids[q]
            if gallery_ids[g] == -1 or (same and gallery_cameras[g] == query_cameras[q]):
                continue
            ranking.append((distances[q][g], bool(same)))
        ranking.sort()  # False before True: of equal distances the wrong image comes first
        good = sum(same for _, same in ranking)
        if not good:
            continue
        # the loop of Market-1501's compute_AP.m
        ap, trapezoid, found, old_recall, old_precision = 0.0, 0.0, 0, 0.0, 1.0
        curve = [0.0] * max_rank
        for position, (_, same) in enumerate(ranking):
            if same:
                found += 1
                ap += found / (position + 1) / good
                last = position + 1
                for k in range(position, max_rank):
                    curve[k] = 1.0
            recall, precision = found / good, found / (position + 1)
            trapezoid += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
        curves.append(curve)
        aps.append(ap)
        trapezoids.append(trapezoid)
        inps.append(good / last)
        valid.append(q)
    if not curves:
        return None
    return np.mean(curves, axis=0), np.mean(aps), np.mean(trapezoids), np.mean(inps), valid


def single_shot_draws(gallery_ids, repeats, seed):
    """For each repeat the images kept: one of each person, drawn at random, and all distractors."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(repeats):
        draw = [g for g in range(len(gallery_ids)) if gallery_ids[g] == 0]
        for person in sorted({identity for identity in gallery_ids if identity >= 1}):
            images = [g for g in range(len(gallery_ids)) if gallery_ids[g] == person]
            draw.append(images[rng.integers(len(images))])
        draws.append(draw)
    return draws


def score_single_shot(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank, repeats=10, seed=0):
    """As `score`, of `repeats` draws: the means over those in which any query has a match."""
    runs = [score(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank, draw)
            for draw in single_shot_draws(gallery_ids, repeats, seed)]
    runs = [run for run in runs if run is not None]
    if not runs:
        return None
    return (*(np.mean([run[field] for run in runs], axis=0) for field in range(4)),
            sorted({query for run in runs for query in run[4]}))


def assert_equal(result, expected, tolerance=1e-9):
    """That a RankingMetrics is what `score` gave."""
    cmc, ap, trapezoid, inp, valid = expected
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        [result.mean_ap, result.mean_ap_trapezoid, result.mean_inp], [ap, trapezoid, inp], rtol=0, atol=tolerance)
    assert result.num_valid_queries == len(valid)
