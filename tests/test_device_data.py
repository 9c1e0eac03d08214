import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from splits import BATCHES

from jlml_jax import device_data, parallel, sampling

ROWS, WHOLE = PartitionSpec("batch"), PartitionSpec()


def test_four_devices_draw_the_global_batch(jpegs):
    mesh = parallel.make_mesh()
    labels = np.arange(100, 100 + len(jpegs))
    data = device_data.place(jpegs, labels, 16, 8, mesh)
    draw = functools.partial(device_data.draw, seed=5, batch_size=4, axis_name="batch")
    sharded = jax.jit(jax.shard_map(lambda data, step: draw(data, step=step), mesh=mesh, in_specs=(WHOLE, WHOLE),
                                    out_specs=(ROWS, ROWS, ROWS), check_vma=False))
    pixels = jpegs.decode(16, 8)
    for step in (0, 1, 7):
        images, drawn, _ = sharded(data, jnp.int32(step))
        indices = np.asarray(sampling.batch_indices(5, step, len(jpegs), 4))
        np.testing.assert_array_equal(drawn, labels[indices])
        np.testing.assert_array_equal(images, pixels[indices])


def test_batches_decoded_on_the_host(jpegs):
    decoded = list(device_data.decode_batches(jpegs, iter(BATCHES), 64, 32))
    pixels = jpegs.decode(64, 32)
    assert pixels.shape == (6, 64, 32, 3) and pixels.dtype == np.uint8
    for batch, indices in zip(decoded, BATCHES, strict=True):
        np.testing.assert_array_equal(batch, pixels[indices])
    assert list(device_data.decode_batches(jpegs, iter([]), 64, 32)) == []
