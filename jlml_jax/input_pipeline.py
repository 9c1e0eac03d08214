"""tf.data over encoded images, for what does not fit on the devices: from indices to decoded batches.

Every batch is named by its indices, so that any step can be the first, and its images are read, from memory or from
disk, when it is due. TensorFlow is imported inside the functions only.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jlml_jax.datasets.images import decode_image
from jlml_jax.datasets.split import Split, StoredImages
from jlml_jax.errors import UserError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_BATCHES_AHEAD = 2  # read, and as many decoded


def decode_batches(split: Split, batches: Iterator[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 [b, height, width, 3] for every array of indices [b]; the same pixels as `device_data` to a few levels.

    All arrays must be of one length. Reading and decoding run in parallel and ahead of the consumer, in order.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError("data.loader=tf_data needs TensorFlow, which is not installed: "
                        "pip install tensorflow-cpu, or use --config.data.loader=device") from error

    tf.config.set_visible_devices([], "GPU")  # its allocator would take the memory that JAX needs
    if not isinstance(split.images, StoredImages):  # those are checked batch by batch, as they are read
        _check_formats(split, range(len(split)), split.images)

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    pending = collections.deque()  # batches that are read and not yet given to the consumer
    failures = []  # what went wrong in encoded_batches; tf.data passes on its text alone

    def encoded_batches():
        try:
            for indices in itertools.chain([first], batches):
                images = split.read(indices)
                _check_formats(split, indices, images)
                pending.append(indices)
                yield np.array(images, object)
        except Exception as error:
            failures.append(error)
            raise

    def decode(encoded):
        # Of a PNG, too, whatever its name; as exact as Pillow's.
        image = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
        size = tf.shape(image)[:2]
        image = tf.cond(
            tf.reduce_all(size == (height, width)), lambda: image,
            # Nothing is averaged where no side shrinks: TensorFlow's plain filter gives the same in half the time.
            lambda: tf.cond(tf.reduce_all(size <= (height, width)), lambda: resized(image, antialias=False),
                            lambda: resized(image, antialias=True)))
        return tf.ensure_shape(image, (height, width, 3))

    def resized(image, antialias):
        image = tf.image.resize(image, (height, width), antialias=antialias)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    def decode_batch(encoded):
        return tf.map_fn(decode, encoded, fn_output_signature=tf.uint8, parallel_iterations=1)

    dataset = (
        tf.data.Dataset.from_generator(encoded_batches, output_signature=tf.TensorSpec((len(first),), tf.string))
        .prefetch(_BATCHES_AHEAD)
        # Batches are decoded at once, and each by one thread: an image alone is too little for tf.data's own overhead.
        .map(decode_batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(_BATCHES_AHEAD)
    )
    try:
        for images in dataset.as_numpy_iterator():
            pending.popleft()
            yield images
    except tf.errors.OpError as error:
        for index in itertools.chain(*pending):
            decode_image(split.images[index], f"{split.dataset}: {split.names[index]}")  # names what does not decode
        if failures:
            raise failures[0] from None
        raise UserError(f"TensorFlow does not decode an image of {split.dataset} that Pillow does ({error.message}); "
                        "use --config.data.loader=device") from error


def _check_formats(split: Split, indices: Sequence[int], images: Sequence[bytes]) -> None:
    """A UserError if one of `images`, those of `split` at `indices`, is of a format that TensorFlow may misread."""
    for index, image in zip(indices, images, strict=True):
        if not image.startswith((_JPEG, _PNG)):
            raise UserError(f"{split.dataset}: {split.names[index]} is neither JPEG nor PNG, which is all that "
                            "data.loader=tf_data reads; use --config.data.loader=device")
