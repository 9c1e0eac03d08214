"""Training as `main` runs it on one device, input, augmentation and logs included, against its bare step.

The bare step is given images of the network's size that lie on the device, and changes nothing in them.
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from configs import default
from experiments.bench import crops
from experiments.bench.timing import NUM_IDENTITIES, bare_step, time_in_turn
from jlml_jax import parallel, train, train_step
from jlml_jax.datasets.split import Split
from jlml_jax.protocols import Protocol, Trial

_DISPATCHES_A_LINE = 4  # of the log


def bench_end_to_end(height: int, width: int, batch_size: int, dtype: str, repeats: int) -> dict:
    """Images a second of both, and the share of the bare step's rate that is reached.

    The images are JPEG crops of 128x64, decoded once, then drawn, resized, flipped and cropped within the step. A line
    of the log is a sample; the bare step is timed before and after.
    """
    config = default.get_config()
    config.data.height, config.data.width, config.data.loader = height, width, "device"
    config.train.batch_size, config.train.dtype = batch_size, dtype
    at_once = train_step.most_steps_per_dispatch()
    config.log_every = _DISPATCHES_A_LINE * at_once
    config.train.steps = config.checkpoint_every = config.log_every * (repeats + 1)

    encoded = crops.crops(max(crops.NUM_IMAGES, batch_size))
    labels = np.arange(len(encoded)) % NUM_IDENTITIES
    split = Split("made up", encoded, labels, np.zeros_like(labels), labels.astype(str))
    protocol = Protocol(1, lambda number: Trial("made up", "none", number, train=split))

    of_bare = config.copy_and_resolve_references()
    of_bare.augment.flip = False
    config.augment.crop_padding = height // 20
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, height, width, 3), np.uint8)
    bare, compile_seconds = bare_step(of_bare, images, labels[:batch_size].astype(np.int32), at_once)

    def bare_rates():
        return [at_once * batch_size / seconds for seconds in time_in_turn({"bare": bare}, repeats)["bare"]]

    rates = {"bare": bare_rates()}
    one_device = parallel.make_mesh(jax.devices()[:1])
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(train.protocols, "load", lambda *_: protocol),
          mock.patch.object(train.parallel, "make_mesh", lambda: one_device)):
        train.train_and_evaluate(config, folder, "train")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates["end to end"] = [line["images_per_second"] for line in lines[1:]]
    rates["bare"] += bare_rates()
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    return {
        "height": height, "width": width, "batch_size": batch_size, "dtype": dtype, "repeats": repeats,
        "steps_at_once": at_once, "images": len(encoded), "compile_seconds": compile_seconds,
        "images_per_second": medians,
        "spread": {name: [min(values), max(values)] for name, values in rates.items()},
        "of_bare": medians["end to end"] / medians["bare"],
    }
