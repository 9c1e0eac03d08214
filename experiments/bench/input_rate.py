"""The host's part of the input: JPEG crops to batches ready for the network, against a PyTorch DataLoader.

Both decode, resize from 128x64 to the input size, flip, crop with padding and normalise, on the same cores. Ours
does all but the decoding on the device, here a CPU, as in training.
"""

import collections

import jax
import numpy as np

from configs import default
from experiments.bench import torch_peer
from experiments.bench.crops import crops
from experiments.bench.timing import ratio_of, time_in_turn
from jlml_jax import augment, input_pipeline
from jlml_jax.datasets.split import Split

_CROP_PADDING, _WORKERS = 10, 2


def bench_input(height: int, width: int, batch_size: int, repeats: int) -> dict:
    """Images a second of tf.data with our augmentation, of the DataLoader, and their ratio, in turn."""
    config = default.get_config()
    config.data.height, config.data.width, config.augment.crop_padding = height, width, _CROP_PADDING
    encoded = crops()
    numbers = np.arange(len(encoded))
    split = Split("made up", encoded, numbers, numbers, numbers.astype(str))
    size = split.training_size(height, width)
    batches = len(encoded) // batch_size

    @jax.jit
    def prepare(key, images):
        return augment.normalise(augment.augment(key, images, config.augment, config.data), config.data)

    def ours():
        order = np.random.default_rng(0).permutation(len(encoded))
        indices = (order[batch * batch_size:(batch + 1) * batch_size] for batch in range(batches))
        for number, images in enumerate(input_pipeline.decode_batches(split, indices, *size)):
            batch = prepare(jax.random.key(number), images)
        jax.block_until_ready(batch)

    loader = torch_peer.loader(encoded, height, width, batch_size, _CROP_PADDING, config.data, _WORKERS)

    def theirs():
        return collections.deque(loader, maxlen=1)

    seconds = time_in_turn({"ours": ours, "torch": theirs}, repeats)
    images = batches * batch_size
    return {
        "height": height, "width": width, "batch_size": batch_size, "repeats": repeats, "workers": _WORKERS,
        "images": len(encoded), "bytes_an_image": float(np.mean([len(image) for image in encoded])),
        "images_per_second": {name: float(images / np.median(values)) for name, values in seconds.items()},
        "over_torch": ratio_of(seconds["torch"], seconds["ours"]),
    }
