"""The evaluation forward, uint8 crops to features, against the same network in PyTorch.

On an accelerator several batches at a time, the last waited for: the next ones are given to it while it computes.
"""

import jax
import numpy as np

from configs import default
from experiments.bench import floor, torch_peer
from experiments.bench.timing import NUM_IDENTITIES, ratio_of, time_in_turn
from jlml_jax import evaluate, models, parallel, train_step


def bench_forward(height: int, width: int, batch_size: int, dtype: str, repeats: int) -> dict:
    """Images a second of ours and of PyTorch's ways, the ratio to the best of these, pair by pair, and the floor."""
    config = default.get_config()
    config.data.height, config.data.width = height, width
    mesh = parallel.make_mesh(jax.devices()[:1])
    model = models.build_model(config, NUM_IDENTITIES).clone(dtype=train_step.compute_dtype(dtype))
    variables = models.init_variables(model, config.seed, height, width)
    images = np.random.default_rng(0).integers(0, 256, (batch_size, height, width, 3), np.uint8)
    forward = evaluate.make_forward(model, config, mesh)
    placed = parallel.replicate(variables, mesh), parallel.shard_batch(images, mesh)
    at_once = train_step.most_steps_per_dispatch()

    def ours():
        for _ in range(at_once):
            features = forward(*placed)
        return jax.block_until_ready(features)

    peers = torch_peer.forwards(model, variables, images, config.data, dtype, at_once)
    for name, peer in peers.items():
        torch_peer.check_agreement(jax.device_get(ours()), peer(), dtype, name)
    seconds = {name: [value / at_once for value in values]
               for name, values in time_in_turn({"ours": ours} | peers, repeats).items()}
    best = min(peers, key=lambda name: np.median(seconds[name]))
    work = floor.count_work(evaluate.make_forward(model.clone(native=True), config, mesh), *placed)
    return {
        "height": height, "width": width, "batch_size": batch_size, "dtype": dtype, "repeats": repeats,
        "batches_at_once": at_once,
        "images_per_second": {name: float(batch_size / np.median(values)) for name, values in seconds.items()},
        "best_of_torch": best, "over_torch": ratio_of(seconds[best], seconds["ours"]),
        "floor": floor.floor_of(work, dtype, float(np.median(seconds["ours"]))),
    }
