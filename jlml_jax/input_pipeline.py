"""tf.data over TFDS examples, for what does not fit on the devices: from indices to decoded batches.

The encoded images stay in memory and every batch is named by its indices, so that any step can be the first. TensorFlow
is imported inside the functions only.
"""

from collections.abc import Iterator

import numpy as np

from jlml_jax.datasets.base import Split, decode_image
from jlml_jax.errors import UserError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode_batches(split: Split, batches: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [b, height, width, 3] for every array of indices [b]; the same pixels as `device_data` to a few levels.

    All arrays must be of one length. Decoding runs in parallel and ahead of the consumer, in order.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError("data.loader=tf_data needs TensorFlow, which is not installed: "
                        "pip install tensorflow-cpu, or use --config.data.loader=device") from error

    tf.config.set_visible_devices([], "GPU")  # its allocator would take the memory that JAX needs
    encoded = tf.constant(list(split.images))

    for image, name in zip(split.images, split.names, strict=True):
        if not image.startswith((_JPEG, _PNG)):  # TensorFlow refuses some other formats and misreads some
            raise UserError(f"{split.dataset}: {name} is neither JPEG nor PNG, which is all that data.loader=tf_data "
                            "reads; use --config.data.loader=device")

    def read(image):
        return tf.cond(
            tf.io.is_jpeg(image),
            lambda: tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE"),  # as Pillow does
            lambda: tf.io.decode_png(image, channels=3))

    def decode(index):
        image = tf.image.resize(read(encoded[index]), (height, width), antialias=True)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return

    def indices():
        yield first
        yield from batches

    dataset = (
        tf.data.Dataset.from_generator(indices, output_signature=tf.TensorSpec((len(first),), tf.int64))
        .unbatch()
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .batch(len(first), drop_remainder=True, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(2)
    )
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.InvalidArgumentError as error:
        for image, name in zip(split.images, split.names, strict=True):
            decode_image(image, f"{split.dataset}: {name}")  # names the one that does not decode
        raise UserError(f"TensorFlow does not decode an image of {split.dataset} that Pillow does ({error.message}); "
                        "use --config.data.loader=device") from error
