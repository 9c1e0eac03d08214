import builtins
import dataclasses
import time

import numpy as np
import pytest
from splits import BATCHES, SIZES, drawing, encode, on_disk, split_of

from jlml_jax import device_data, input_pipeline
from jlml_jax.errors import UserError


@pytest.fixture(scope="module")
def mixed():
    return split_of([encode(drawing(*size, seed), kind) for seed, size in enumerate(SIZES)
                     for kind in ("PNG", "JPEG")]
                    + [encode(drawing(70, 36), "PNG", mode) for mode in ("L", "RGBA", "P")]
                    + [encode(drawing(70, 36), "JPEG", "CMYK")])


def unchanged(split):
    return split


@pytest.mark.parametrize("where", [unchanged, on_disk])
@pytest.mark.parametrize("name", ["jpegs", "mixed"])
def test_tf_data_decodes_what_pillow_does_in_order(name, where, request):
    split = where(request.getfixturevalue(name))
    batches = [*BATCHES, *np.arange(len(split) // 3 * 3).reshape(-1, 3), np.arange(len(split))[-3:]]
    expected = device_data.decode_batches(split, iter(batches), 64, 32)
    for ours, theirs in zip(input_pipeline.decode_batches(split, iter(batches), 64, 32), expected, strict=True):
        assert ours.shape == (3, 64, 32, 3) and ours.dtype == np.uint8
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.mean() < 0.5 and difference.max() <= 3
    larger = zip(input_pipeline.decode_batches(split, iter(BATCHES), 160, 70),  # where sides grow
                 device_data.decode_batches(split, iter(BATCHES), 160, 70), strict=True)
    assert max(np.abs(ours.astype(int) - theirs).max() for ours, theirs in larger) <= 3
    assert list(input_pipeline.decode_batches(split, iter([]), 64, 32)) == []


def test_tf_data_refuses_formats_that_tensorflow_reads_otherwise(jpegs):
    for kind in ("BMP", "TIFF"):
        other = dataclasses.replace(jpegs, images=[*jpegs.images[:-1], encode(drawing(70, 36), kind)])
        message = r"test: 005.png is neither JPEG nor PNG.*data.loader=device"
        with pytest.raises(UserError, match=message):  # before the first step
            list(input_pipeline.decode_batches(other, iter([np.arange(3)]), 64, 32))
        decoded = input_pipeline.decode_batches(on_disk(other), iter([np.arange(3), np.arange(3, 6)]), 64, 32)
        assert next(decoded).shape == (3, 64, 32, 3)
        with pytest.raises(UserError, match=message):  # once it is read
            next(decoded)


@pytest.mark.parametrize("where", [unchanged, on_disk])
def test_tf_data_names_the_image_that_does_not_decode(jpegs, where):
    for broken in (b"\xff\xd8\xff no image", jpegs.images[1][:200]):
        split = where(dataclasses.replace(jpegs, images=[jpegs.images[0], broken, *jpegs.images[2:]]))
        decoded = input_pipeline.decode_batches(split, iter([*[np.array([0, 4, 3])] * 9, np.arange(3)]), 64, 32)
        for _ in range(9):
            assert next(decoded).shape == (3, 64, 32, 3)
        with pytest.raises(UserError, match="test: 001.png"):
            next(decoded)


def test_tf_data_passes_on_what_fails_while_reading(jpegs):
    def batches():
        yield np.arange(3)
        raise LookupError("no more")

    decoded = input_pipeline.decode_batches(jpegs, batches(), 64, 32)
    assert next(decoded).shape == (3, 64, 32, 3)
    with pytest.raises(LookupError, match="no more"):
        next(decoded)


def test_tf_data_reads_a_few_batches_ahead_and_no_more(jpegs):
    read = []

    def batches():
        for number in range(2000):
            read.append(number)
            yield np.arange(3)

    decoded = input_pipeline.decode_batches(on_disk(jpegs), batches(), 64, 32)
    for _ in range(5):
        next(decoded)
    time.sleep(0.3)  # a reader without a bound would have come far
    assert 5 < len(read) < 50
    decoded.close()


def test_tf_data_without_tensorflow_says_what_to_do(jpegs, monkeypatch):
    def without(name, *args, real=builtins.__import__, **kwargs):
        if name.split(".")[0] == "tensorflow":
            raise ImportError("No module named 'tensorflow'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"data\.loader=tf_data needs TensorFlow.*data\.loader=device"):
        list(input_pipeline.decode_batches(jpegs, iter(BATCHES), 64, 32))
