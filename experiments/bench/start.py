"""From the command to its first training step, with an empty compilation cache and with a warm one."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_FIRST_STEP = "step 1/"  # how the log's first line begins, with log_every=1
_COMMAND = (sys.executable, "-u", "-m", "jlml_jax.main", "--mode=train", "--config.train.steps=1",
            "--config.log_every=1")


def bench_start(repeats: int) -> dict:
    """Seconds from the start of `python -m jlml_jax.main` to the first step of the synthetic job.

    The first of all runs, which may draw the images, is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        def seconds(cache: str) -> float:
            workdir = tempfile.mkdtemp(dir=folder)
            start = time.perf_counter()
            with subprocess.Popen(
                    [*_COMMAND, f"--workdir={workdir}/run", f"--config.compilation_cache={cache}"], text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
                for line in process.stdout:
                    if line.startswith(_FIRST_STEP):
                        return time.perf_counter() - start
            raise RuntimeError(f"{' '.join(_COMMAND)} ended without a step, status {process.returncode}")

        warm_cache = f"{folder}/cache"
        seconds(warm_cache)
        cold = seconds(f"{folder}/another")
        warm = sorted(seconds(warm_cache) for _ in range(repeats))
        cache_bytes = sum(path.stat().st_size for path in Path(warm_cache).iterdir())
    return {"repeats": repeats, "cold_seconds": cold, "warm_seconds": {
        "median": warm[len(warm) // 2], "minimum": warm[0], "maximum": warm[-1]}, "cache_bytes": cache_bytes}
