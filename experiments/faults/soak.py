"""Soak: python -m experiments.faults.soak --minutes=20 [--json=FILE]

One process extracts features and searches for --minutes without a pause, with the network of configs/synthetic.py, its
weights random: by turns `extract` of a folder of 256 crops, `search` in a features file, and `search` in a gallery
folder to which crops are added and which is made anew every tenth time. After a tenth of the time, its resident memory
must stay within 5 %.
"""

import contextlib
import io
import json
import mmap
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from PIL import Image

from configs import synthetic
from jlml_jax import extract, parallel, provenance, search
from jlml_jax.arguments import Parser
from jlml_jax.checkpoints import SavedRun
from jlml_jax.extractor import Extractor
from jlml_jax.models import build_model

ALLOWED, CROPS = 0.05, 256


def random_extractor() -> Extractor:
    """The network of configs/synthetic.py with random weights."""
    config = synthetic.get_config()
    model = build_model(config, num_identities=2)
    pixels = np.zeros((1, config.data.height, config.data.width, 3), np.float32)
    variables = jax.device_get(jax.jit(model.init, static_argnames="train")(jax.random.key(0), pixels, train=False))
    return Extractor(SavedRun(Path(), config, {}, 0, variables), parallel.make_mesh(jax.local_devices()))


def resident() -> int:
    """Bytes of this process that are in memory (VmRSS)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def soak(minutes: float, folder: Path) -> dict:
    """Works for so long in `folder`; counts of what was done, and the memory over time."""
    rng = np.random.default_rng(0)
    crops = folder / "crops"
    crops.mkdir()
    for number in range(CROPS):
        pixels = rng.integers(0, 256, (rng.integers(60, 200), rng.integers(30, 100), 3), np.uint8)
        Image.fromarray(pixels).save(crops / f"{number % 20:04d}_c{number // 10 % 5 + 1}s1_{number:06d}_00.jpg")
    files = sorted(map(str, crops.iterdir()))
    features, index = str(folder / "features.npz"), folder / "gallery"
    done = {"extracts": 0, "searches": 0, "images_embedded": 0}
    samples = []
    start = time.monotonic()
    while (passed := time.monotonic() - start) < 60 * minutes:
        with contextlib.redirect_stdout(io.StringIO()):
            extract.extract("", str(crops), features)
            for _ in range(4):
                search.search("", features, files[rng.integers(CROPS)])
            if done["extracts"] % 10 == 0:
                shutil.rmtree(index, ignore_errors=True)
            part = str(crops / f"*{done['extracts'] % 10}_00.jpg")  # a tenth of the crops
            for options in ({}, {"exclude_own_camera": True}, {"camera": ["1", "2"]}):
                search.search("", part, files[rng.integers(CROPS)], index=str(index), **options)
        done["extracts"] += 1
        done["searches"] += 7
        done["images_embedded"] += CROPS + CROPS // 10 + 7
        samples.append((passed, resident()))
    warm = [memory for at, memory in samples if at >= 6 * minutes]
    middle = statistics.median(warm)
    return done | {
        "minutes": minutes, "mib_median": middle / 2**20, "mib_minimum": min(warm) / 2**20,
        "mib_maximum": max(warm) / 2**20, "largest_deviation": max(max(warm) / middle - 1, 1 - min(warm) / middle),
        "mib_each_tenth": [statistics.median(memory for _, memory in samples[i * len(samples) // 10:
                                                                            (i + 1) * len(samples) // 10]) / 2**20
                           for i in range(10)] if len(samples) >= 10 else None,
    }


def main() -> int:
    parser = Parser("experiments.faults.soak", __doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    extractor = random_extractor()
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(extract, "load_extractor", lambda _: extractor),
          mock.patch.object(search, "load_extractor", lambda _: extractor)):
        result = soak(options.minutes, Path(folder))
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result | {"provenance": provenance.collect()}, indent=1) + "\n")
    return int(result["largest_deviation"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
