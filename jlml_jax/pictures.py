"""Ranked lists as pictures."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jlml_jax import metrics
from jlml_jax.datasets.base import JUNK
from jlml_jax.errors import UserError
from jlml_jax.protocols import Trial

_CROP, _FRAME, _GAP = (64, 128), 4, 6  # pixels: width and height of a crop, its frame, the space around it
_RIGHT, _WRONG, _QUERY, _PAPER = (28, 148, 72), (206, 44, 44), (90, 90, 90), (255, 255, 255)


def ranked_lists(trial: Trial, query_features: np.ndarray, gallery_features: np.ndarray, path: Path, *,
                 num_queries: int = 8, top_k: int = 10, seed: int = 0) -> None:
    """Draws random queries, each with its `top_k` gallery images: right ones framed in green, wrong ones in red.

    Images that do not count (junk, and the query's own identity and camera) are left out.
    """
    query, gallery = trial.query, trial.gallery
    chosen = np.sort(np.random.default_rng(seed).permutation(len(query))[:num_queries])
    distances = metrics.l2_distances(query_features[chosen], gallery_features)
    cell = (_CROP[0] + 2 * _FRAME + _GAP, _CROP[1] + 2 * _FRAME + _GAP)
    columns = min(top_k, len(gallery)) + 1
    sheet = Image.new("RGB", (columns * cell[0] + 3 * _GAP, len(chosen) * cell[1] + _GAP), _PAPER)
    for row, q in enumerate(chosen):
        same = gallery.identities == query.identities[q]
        counts = (gallery.identities != JUNK) & ~(same & (gallery.cameras == query.cameras[q]))
        ranked = np.argsort(np.where(counts, distances[row], np.inf), kind="stable")
        ranked = ranked[:min(top_k, int(counts.sum()))]
        pixels = [query.select(np.array([q])).decode(_CROP[1], _CROP[0])[0],
                  *gallery.select(ranked).decode(_CROP[1], _CROP[0])]
        colors = [_QUERY, *(_RIGHT if same[g] else _WRONG for g in ranked)]
        for column, (crop, color) in enumerate(zip(pixels, colors, strict=True)):
            left = _GAP + column * cell[0] + (2 * _GAP if column else 0)  # a wider space after the query
            top = _GAP + row * cell[1]
            ImageDraw.Draw(sheet).rectangle(
                (left, top, left + _CROP[0] + 2 * _FRAME - 1, top + _CROP[1] + 2 * _FRAME - 1), fill=color)
            sheet.paste(Image.fromarray(crop), (left + _FRAME, top + _FRAME))
    try:
        sheet.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
