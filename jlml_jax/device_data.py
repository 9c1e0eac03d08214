"""A whole data set as one uint8 array on the devices, its batches drawn inside the step. Needs no TensorFlow."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jlml_jax import parallel, sampling
from jlml_jax.datasets.split import Split


@flax.struct.dataclass
class DeviceData:
    """Training images and labels, replicated on the devices."""

    images: jax.Array  # uint8 [N, H, W, 3]
    labels: jax.Array  # int32 [N]
    groups: sampling.IdentityGroups | None = None  # which batches are put together from; None: of images in any order
    cameras: jax.Array | None = None  # float32 [N, cameras], one-hot; None: batch normalisation does not ask


def place(split: Split, labels: np.ndarray, height: int, width: int, mesh: Mesh,
          groups: sampling.IdentityGroups | None = None, cameras: np.ndarray | None = None) -> DeviceData:
    """Decodes `split` once and puts it on every device of the mesh; labels int [N], cameras float32 [N, cameras].

    Each of several processes decodes all of it, for its own devices: nothing travels between them.
    """
    return parallel.replicate(
        DeviceData(split.decode(height, width), labels.astype(np.int32), groups, cameras), mesh)


def draw(data: DeviceData, seed: int, step: jax.Array, batch_size: int, axis_name: str, micro_batches: int = 1
         ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """This device's rows (images, labels, cameras) of the global batch at `step`; called inside the per-device step.

    Its rows of the first of the `micro_batches` come first, then those of the second, and so on.
    """
    indices = sampling.batch_indices(seed, step, len(data.labels), batch_size, data.groups)
    indices = sampling.device_rows(indices, jax.lax.axis_size(axis_name), micro_batches)[jax.lax.axis_index(axis_name)]
    return jax.tree.map(lambda rows: jnp.take(rows, indices, axis=0), (data.images, data.labels, data.cameras))


def decode_batches(split: Split, batches: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [b, height, width, 3] for every array of indices [b], decoded one batch ahead."""
    with ThreadPoolExecutor(1) as ahead:
        pending = None
        for indices in batches:
            following = ahead.submit(split.select(indices).decode, height, width)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
