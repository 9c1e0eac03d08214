"""The features of a few crops, as a tracker asks for them with every frame, beside those of a full batch."""

import functools
import tempfile
from pathlib import Path

import numpy as np

from experiments.bench.timing import ratio_of, time_in_turn
from jlml_jax import load_extractor
from jlml_jax.unpack import unpack

COUNTS = (1, 2, 5, 10, 20, 50)


def bench_few_crops(repeats: int) -> dict:
    """Milliseconds of the included run's `embed_crops`, and how many times as long a full batch takes, by crops."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(f"{folder}/run")
        extractor = load_extractor(Path(folder) / "run")
    crops = np.random.default_rng(0).integers(0, 256, (extractor.batch_size, 160, 64, 3), np.uint8)
    ways = {count: functools.partial(extractor.embed_crops, crops[:count]) for count in (*COUNTS, len(crops))}
    seconds = time_in_turn(ways, repeats)
    return {
        "height": extractor.height, "width": extractor.width, "batch_size": len(crops), "repeats": repeats,
        "milliseconds": {str(count): {"median": 1e3 * float(np.median(values)), "minimum": 1e3 * min(values),
                                      "maximum": 1e3 * max(values)} for count, values in seconds.items()},
        "full_batch_over": {str(count): ratio_of(seconds[len(crops)], seconds[count]) for count in COUNTS},
    }
