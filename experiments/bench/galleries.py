"""Time and memory of an evaluation against galleries of 20 thousand to a million images, on the CPU.

Each size in a process of its own: all of `evaluate.evaluate_trials`, for the global, the local and the joint feature,
whose random features lie in memory as extraction leaves them. Decoding and the network are left out. The time of all
cores together is what to compare: it hardly depends on what else the machine does.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np

from configs import default
from experiments.bench import ranking
from jlml_jax import evaluate
from jlml_jax.datasets.split import DISTRACTOR, Split
from jlml_jax.protocols import Trial

SIZES = (20_000, 100_000, 500_000, 1_000_000)
BRANCH_DIM = 512


def made_up_split(identities: np.ndarray, cameras: np.ndarray, first: int) -> Split:
    """A split of images that are never decoded; `first` is the number of its first one."""
    names = np.arange(first, first + len(identities))
    return Split("made up", [name.tobytes() for name in names], identities, cameras, names.astype(str))


def measure(num_queries: int, num_gallery: int) -> dict:
    """Seconds and peak memory of this process; the gallery is Market-1501's and further distractors."""
    rng = np.random.default_rng(0)
    people = ranking.NUM_GALLERY - ranking.NUM_DISTRACTORS
    gallery_ids = np.full(num_gallery, DISTRACTOR)
    gallery_ids[rng.permutation(num_gallery)[:people]] = rng.integers(1, ranking.NUM_IDENTITIES + 1, people)
    identities = {"query": rng.integers(1, ranking.NUM_IDENTITIES + 1, num_queries), "gallery": gallery_ids}
    splits, start = {}, 0
    for part, ids in identities.items():
        splits[part] = made_up_split(ids, rng.integers(1, ranking.NUM_CAMERAS + 1, len(ids)), start)
        start += len(ids)
    centres = {branch: rng.standard_normal((ranking.NUM_IDENTITIES + 1, BRANCH_DIM), np.float32)
               for branch in ("global", "local")}

    def extract(split: Split) -> evaluate.Features:
        features = {branch: rng.standard_normal((len(split), BRANCH_DIM), np.float32) for branch in centres}
        for branch, values in features.items():
            for number, identity in enumerate(split.identities):
                if identity != DISTRACTOR:
                    values[number] += centres[branch][identity] / 3
        return features

    cache = evaluate.FeatureCache(extract)
    for split in splits.values():  # extraction is not what is timed
        cache(split)
    before = _peak_mib()
    start, cpu_start = time.perf_counter(), time.process_time()
    rows = evaluate.evaluate_trials([Trial("made up", "single-query", **splits)], cache,
                                    default.get_config().evaluate)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"queries": num_queries, "gallery": num_gallery, "seconds": seconds,
            "cpu_seconds": cpu_seconds, "cpu_microseconds_a_gallery_image": 1e6 * cpu_seconds / num_gallery,
            "peak_memory_mib": _peak_mib(),
            "peak_memory_mib_before_ranking": before, "features_mib": num_gallery * 2 * BRANCH_DIM * 4 / 2**20,
            "mean_ap": rows[-1]["mean_ap"]}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_galleries(num_queries: int) -> dict:
    """`measure` for all SIZES."""
    sizes = []
    for num_gallery in SIZES:
        program = ("import json; from experiments.bench import galleries; "
                   f"print(json.dumps(galleries.measure({num_queries}, {num_gallery})))")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        sizes.append(json.loads(done.stdout))
        print(sizes[-1], file=sys.stderr, flush=True)
    return {"dim": 2 * BRANCH_DIM, "sizes": sizes}
