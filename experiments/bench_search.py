"""Benchmark of exact search: python -m experiments.bench_search --folder=DIR [--rows=1000000 --dim=1024] [--json=FILE]

Fills a gallery folder with random unit features in DIR (4.1 GB at the default size; kept for the next time), opens it
and searches. Beside each query, NumPy's product of all features with one vector: the least that an exact search can do
is to read them all once, which that does and hardly more. Peak memory is the process's largest resident set, in which
the memory-mapped features count.
"""

import json
import resource
import time
from pathlib import Path

import numpy as np

from jlml_jax import provenance
from jlml_jax.arguments import Parser
from jlml_jax.gallery import Gallery, is_gallery
from jlml_jax.nearest import NearestNeighbours
from jlml_jax.user_images import LoadedImage, UserImage

_BATCH = 20_000
_MANY, _MANY_REPEATS = 512, 5  # queries that are searched for together


def fill(folder: Path, rows: int, dim: int) -> None:
    """Adds random features until there are `rows`."""
    gallery = Gallery(folder) if is_gallery(folder) else Gallery.create(folder, "benchmark", dim)
    with gallery.writing():
        for first in range(len(gallery), rows, _BATCH):
            numbers = range(first, min(first + _BATCH, rows))
            features = np.random.default_rng(first).standard_normal((len(numbers), dim), np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            gallery.add([LoadedImage(UserImage(Path(f"/crops/{i:08d}.jpg"), f"{i:08d}.jpg", camera=str(i % 8)),
                                     i.to_bytes(32, "big")) for i in numbers], features)
    gallery.close()


def bench(folder: Path, repeats: int) -> dict:
    """Seconds to open, of the first query and of the others; the share of the floor, each query beside its own.

    `of_many`: seconds a query of many searched for together, and of NumPy's product of the features with them all.
    """
    start = time.perf_counter()
    gallery = Gallery(folder)
    neighbours = NearestNeighbours(gallery.features)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    cameras = gallery.cameras
    cameras_read = time.perf_counter() - start
    rng = np.random.default_rng(1)
    seconds, filtered, floor = [], [], []
    for _ in range(repeats + 1):
        row = int(rng.integers(len(gallery)))
        query = np.array(gallery.features[row])
        start = time.perf_counter()
        rows, _ = neighbours.search(query, 10)
        seconds.append(time.perf_counter() - start)
        assert rows[0] == row
        start = time.perf_counter()
        neighbours.search(query, 10, cameras != cameras[row])
        filtered.append(time.perf_counter() - start)
        start = time.perf_counter()
        gallery.features @ query
        floor.append(time.perf_counter() - start)
    ratios = np.array(floor[1:]) / np.array(seconds[1:])
    searches = [(np.array(gallery.features[row]), 10, None) for row in rng.integers(len(gallery), size=_MANY)]
    many, product = [], []
    for _ in range(_MANY_REPEATS + 1):  # the first compiles
        start = time.perf_counter()
        found = list(neighbours.search_many(searches))
        many.append((time.perf_counter() - start) / _MANY)
        assert all((gallery.features[rows[0]] == query).all() for (rows, _), (query, *_) in zip(
            found, searches, strict=True))
        start = time.perf_counter()
        np.stack([query for query, *_ in searches]) @ gallery.features.T
        product.append((time.perf_counter() - start) / _MANY)
    return {
        "rows": len(gallery), "dim": gallery.dim, "gigabytes": gallery.features.nbytes / 1e9, "repeats": repeats,
        "seconds": {"open": opened, "read_cameras": cameras_read, "first_query": seconds[0],
                    "query_median": float(np.median(seconds[1:])), "query_minimum": min(seconds[1:]),
                    "query_maximum": max(seconds[1:]), "filtered_query_median": float(np.median(filtered[1:])),
                    "floor_median": float(np.median(floor[1:])), "floor_minimum": min(floor[1:])},
        "of_many": {"queries": _MANY, "repeats": _MANY_REPEATS, "query_median": float(np.median(many[1:])),
                    "query_minimum": min(many[1:]), "query_maximum": max(many[1:]),
                    "product_median": float(np.median(product[1:])), "product_minimum": min(product[1:])},
        "floor_over_query_median": float(np.median(ratios)),
        "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = Parser("experiments.bench_search", __doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    fill(args.folder, args.rows, args.dim)
    result = bench(args.folder, args.repeats) | {"provenance": provenance.collect()}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
