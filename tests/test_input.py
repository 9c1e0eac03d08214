import builtins
import contextlib
import dataclasses
import functools
import io
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from PIL import Image

from configs import default
from jlml_jax import device_data, input_pipeline, parallel, sampling
from jlml_jax.augment import augment, normalise
from jlml_jax.datasets.base import Split
from jlml_jax.datasets.images import decode_image, resize
from jlml_jax.datasets.stored import StoredImages
from jlml_jax.errors import UserError

ROWS, WHOLE = PartitionSpec("batch"), PartitionSpec()


def encode(pixels, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def drawing(height, width, seed=0):
    """Smooth, with noise: as a photograph is, and unlike its mirror image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 3, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def split_of(images):
    count = len(images)
    return Split("test", images, np.arange(1, count + 1), np.ones(count, np.int64),
                 np.array([f"{i:03d}.png" for i in range(count)]))


SIZES = [(64, 32), (128, 64), (71, 37), (40, 20), (150, 33), (64, 64)]


@pytest.fixture(scope="module")
def jpegs():
    return split_of([encode(drawing(*size, seed), "JPEG", quality=90) for seed, size in enumerate(SIZES)])


@pytest.fixture(scope="module")
def mixed():
    return split_of([encode(drawing(*size, seed), kind) for seed, size in enumerate(SIZES)
                     for kind in ("PNG", "JPEG")]
                    + [encode(drawing(70, 36), "PNG", mode) for mode in ("L", "RGBA", "P")]
                    + [encode(drawing(70, 36), "JPEG", "CMYK")])


# --- sampling

def epoch(number, num_images=24, batch_size=8, seed=0):
    steps = num_images // batch_size
    batches = sampling.training_batches(seed, number * steps, (number + 1) * steps, num_images, batch_size)
    return np.concatenate(list(batches))


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    epochs = [epoch(number) for number in range(4)]
    for indices in epochs:
        np.testing.assert_array_equal(np.sort(indices), np.arange(24))
    for one, other in itertools.combinations(epochs, 2):
        assert not np.array_equal(one, other)


def test_images_left_over_are_not_always_the_same():
    left_out = [set(range(26)) - set(epoch(number, 26).tolist()) for number in range(6)]
    assert all(len(images) == 2 for images in left_out)
    assert len(set.union(*left_out)) > 2


def test_batches_are_a_function_of_seed_and_step():
    whole = list(sampling.training_batches(0, 0, 10, 26, 8))
    for first in (1, 3, 7):  # within an epoch and at its end
        for ours, theirs in zip(sampling.training_batches(0, first, 10, 26, 8), whole[first:], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(np.stack(whole), np.stack(list(sampling.training_batches(1, 0, 10, 26, 8))))
    traced = jax.jit(lambda step: sampling.batch_indices(0, step, 26, 8))
    for step, indices in enumerate(whole):
        np.testing.assert_array_equal(traced(jnp.int32(step)), indices)


PERSONS = np.array([3, 0, 0, 2, 0, 3, 0, 2, 2, 0, 3, 2, 2, 3, 0, 5])  # 6, 4, 5 and 1 images; nobody is 1 or 4


@pytest.mark.parametrize("size", [2, 3, 4])
def test_batches_of_groups_of_a_person(size):
    """Of every epoch: groups of one person, every image in one, and no more groups than that takes."""
    groups = sampling.identity_groups(PERSONS, size)
    numbers = [-(-np.count_nonzero(person == PERSONS) // size) for person in (0, 2, 3, 5)]
    assert groups.places.shape == (sum(numbers), size)
    epochs = []
    for number in range(4):
        order = np.asarray(sampling.epoch_order(0, number, len(PERSONS), groups)).reshape(-1, size)
        labels = PERSONS[order]
        assert (labels == labels[:, :1]).all()
        assert dict(zip(*np.unique(labels[:, 0], return_counts=True), strict=True)) == dict(
            zip((0, 2, 3, 5), numbers, strict=True))
        assert set(order.ravel()) == set(range(len(PERSONS)))
        epochs.append(order)
    for one, other in itertools.combinations(epochs, 2):
        assert not np.array_equal(one, other)
        assert {frozenset(group) for group in one} != {frozenset(group) for group in other}


def test_batches_of_groups_are_a_function_of_seed_and_step():
    groups = sampling.identity_groups(PERSONS, 2)
    assert sampling.steps_per_epoch(len(PERSONS), 4, groups) == 4  # 9 groups of 2
    draw = functools.partial(sampling.training_batches, num_images=len(PERSONS), batch_size=4, groups=groups)
    whole = list(draw(0, 0, 10))
    for ours, theirs in zip(draw(0, 5, 10), whole[5:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    traced = jax.jit(lambda step, groups: sampling.batch_indices(0, step, len(PERSONS), 4, groups))
    for step, indices in enumerate(whole):
        np.testing.assert_array_equal(traced(jnp.int32(step), groups), indices)
    assert not np.array_equal(np.stack(whole), np.stack(list(draw(1, 0, 10))))


@pytest.mark.parametrize("batch, micro_batches, images, message", [
    (32, 1, 1, "must be 0.*or at least 2"),
    (32, 1, 3, "does not divide the 32 images of a batch; give such as 2"),
    (32, 2, 32, "does not divide the 16 images of a micro-batch; give such as 16"),
    (7, 1, 4, "give such as 7"), (4, 4, 2, "does not divide the 1 images of a micro-batch; give such as 0"),
    (32, 1, 0, ""), (32, 8, 4, ""),
])
def test_groups_that_the_batch_does_not_divide_into_are_refused(batch, micro_batches, images, message):
    train = default.get_config().train
    train.batch_size, train.accumulation_steps, train.images_per_identity = batch, micro_batches, images
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        sampling.check_fields(train)


def test_a_batch_larger_than_the_set_is_refused():
    assert sampling.steps_per_epoch(8, 8) == 1
    with pytest.raises(UserError, match=r"train\.batch_size=9.*8 images"):
        sampling.steps_per_epoch(8, 9)


@pytest.mark.parametrize("num_images, batch_size", [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_evaluation_holds_every_image_once(num_images, batch_size):
    batches = list(sampling.evaluation_batches(num_images, batch_size))
    assert len(batches) == -(-num_images // batch_size)
    assert all(indices.shape == mask.shape == (batch_size,) for indices, mask in batches)
    assert all((indices < num_images).all() for indices, _ in batches)
    seen = np.concatenate([indices[mask] for indices, mask in batches])
    np.testing.assert_array_equal(seen, np.arange(num_images))


# --- augmentation and normalisation

FILL = 0.2, 0.4, 0.6


def images_of(count=32, height=12, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@functools.cache
def augmentation(flip, crop_padding, axis_name=None, erasing_probability=0.0, size=None, color_jitter=0.0):
    """At an input size of `size`; that of the images if none is given."""
    settings = ConfigDict({"flip": flip, "crop_padding": crop_padding, "color_jitter": color_jitter,
                           "erasing_probability": erasing_probability})

    def changed(key, images):
        height, width = size or images.shape[1:3]
        return augment(key, images, settings, ConfigDict({"height": height, "width": width, "mean": FILL}), axis_name)

    return jax.jit(changed)


def test_without_augmentation_nothing_changes():
    images = images_of()
    np.testing.assert_array_equal(augmentation(False, 0)(jax.random.key(0), images), images)


def test_half_the_images_are_mirrored_left_to_right():
    images = images_of(256)
    flipped = np.asarray(augmentation(True, 0)(jax.random.key(0), images))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal((flipped == images).all((1, 2, 3)), ~mirrored)
    assert 0.4 < mirrored.mean() < 0.6
    assert flipped.dtype == np.uint8
    again = augmentation(True, 0)(jax.random.key(1), images)
    assert not np.array_equal(again, flipped)


def test_a_crop_is_the_image_shifted_by_at_most_the_padding():
    images, pad = images_of(256), 2
    cropped = np.asarray(augmentation(False, pad)(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    shifts = {}
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        window = padded[:, top:top + 12, left:left + 8]
        for i in np.flatnonzero((window == cropped).all((1, 2, 3))):
            shifts[i] = top, left
    assert len(shifts) == len(images)
    assert len(set(shifts.values())) == 25


@pytest.mark.parametrize(("height", "width"), [(64, 32), (48, 48)])
def test_a_rectangle_is_erased_as_in_the_paper(height, width):
    """Zhong et al. 2020: in a share of the images, 2 to 40 % of the area, sides in a ratio of 0.3 to 1 / 0.3."""
    images = np.full((4_000, height, width, 3), 255, np.uint8)
    erase = augmentation(False, 0, erasing_probability=0.5)
    erased = np.asarray(erase(jax.random.key(0), images))
    gone = (erased != 255).all(-1)
    np.testing.assert_array_equal(erased[gone], np.broadcast_to([51, 102, 153], (gone.sum(), 3)))
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    np.testing.assert_array_equal(gone.sum((1, 2)), rows * columns)  # a whole rectangle, or none
    chosen = rows > 0
    assert abs(chosen.mean() - 0.5) < 0.03
    rows, columns = rows[chosen], columns[chosen]
    assert (rows < height).all() and (columns < width).all()
    share = rows * columns / (height * width)
    assert 0.015 < share.min() < 0.04 and 0.36 < share.max() < 0.43
    ratio = rows / columns
    assert 0.25 < ratio.min() < 0.4 and 2.9 < ratio.max() < 4
    where = np.argwhere(gone)
    assert where[:, 1].max() == height - 1 and where[:, 2].max() == width - 1 and where.min() == 0


def test_erasing_leaves_flips_and_crops_as_they_were():
    images, key = images_of(64), jax.random.key(0)
    erased = np.asarray(augmentation(True, 2, erasing_probability=1.0)(key, images))
    kept = (erased != np.round(255 * np.array(FILL))).any(-1)
    np.testing.assert_array_equal(erased[kept], np.asarray(augmentation(True, 2)(key, images))[kept])
    assert 0.5 < kept.mean() < 0.98


def test_color_jitter_scales_brightness_contrast_and_saturation_within_bounds():
    strength, key = 0.3, jax.random.key(0)
    jitter = augmentation(False, 0, color_jitter=strength)
    grey = np.broadcast_to(np.arange(60, 156, dtype=np.uint8).reshape(12, 8, 1), (500, 12, 8, 3))
    changed = np.asarray(jitter(key, grey))
    assert np.ptp(changed, axis=3).max() < 1e-3  # what has no colour gets none
    brightness = changed.mean((1, 2, 3)) / grey[0].mean()
    contrast = changed.std((1, 2, 3)) / grey[0].std() / brightness
    for factors in (brightness, contrast):
        assert 1 - strength - 1e-3 < factors.min() < 1 - 0.9 * strength < 1 + 0.9 * strength < factors.max()
        assert factors.max() < 1 + strength + 1e-3
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.15
    plain = np.broadcast_to(np.array([120, 100, 90], np.uint8), (500, 12, 8, 3))
    colored = np.asarray(jitter(key, plain))[:, 0, 0]
    np.testing.assert_allclose(colored @ [0.299, 0.587, 0.114], 104.84 * brightness, rtol=1e-4)
    # Contrast is about the image's mean grey: in a plain one it scales colour, together with saturation.
    saturation = (colored[:, 0] - colored[:, 2]) / 30 / brightness / contrast
    assert 1 - strength - 1e-3 < saturation.min() < 0.75 and 1.25 < saturation.max() < 1 + strength + 1e-3


def test_color_jitter_stays_in_range_and_leaves_what_moves_as_it_was():
    images, key = images_of(64), jax.random.key(0)
    changed = np.asarray(augmentation(True, 2, color_jitter=1.0)(key, images))
    assert changed.min() == 0 and changed.max() == 255
    moved = np.asarray(augmentation(True, 2)(key, images)).astype(float)
    alike = [np.corrcoef(a.mean(-1).ravel(), b.mean(-1).ravel())[0, 1] for a, b in zip(changed, moved, strict=True)]
    assert np.median(alike) > 0.8


@pytest.mark.parametrize("size", [(24, 16), (12, 20), (31, 8), (21, 23)])
def test_smaller_crops_are_resized_as_pillow_does(size):
    images = np.stack([drawing(12, 8, seed) for seed in range(4)])
    resized = augmentation(False, 0, size=size)(jax.random.key(0), images)
    expected = np.stack([resize(Image.fromarray(image), *size) for image in images])
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, expected, atol=1.01)  # Pillow rounds twice


def test_resizing_comes_before_flips_crops_and_erasing():
    images, key, size = images_of(), jax.random.key(0), (30, 28)
    resized = np.asarray(augmentation(False, 0, size=size)(key, images))
    expected = augmentation(True, 2, None, 0.5)(key, resized)
    np.testing.assert_allclose(augmentation(True, 2, None, 0.5, size)(key, images), expected, atol=1e-4)


def test_crops_larger_than_the_input_are_not_resized_on_the_device():
    with pytest.raises(ValueError, match="larger than the network's input"):
        augmentation(True, 2, size=(12, 7))(jax.random.key(0), images_of())


def test_crops_of_one_size_are_decoded_to_it_where_the_input_is_larger(jpegs):
    one_size = split_of([encode(drawing(64, 32, seed), "JPEG") for seed in range(3)])
    assert one_size.training_size(64, 32) == one_size.training_size(224, 224) == (64, 32)
    assert one_size.training_size(64, 48) == (64, 32)
    assert one_size.training_size(128, 31) == (128, 31)
    assert on_disk(one_size).training_size(224, 224) == (224, 224)  # none is opened
    assert jpegs.training_size(224, 224) == (224, 224)
    broken = dataclasses.replace(one_size, images=[*one_size.images[:2], b"no image"])
    assert broken.training_size(224, 224) == (224, 224)
    with pytest.raises(UserError, match=r"test: 000\.png"):
        dataclasses.replace(one_size, images=[b"no image"] * 3).training_size(224, 224)


def test_four_devices_augment_as_one():
    assert len(jax.devices()) == 4
    images, key = images_of(16), jax.random.key(0)
    sharded = jax.jit(jax.shard_map(augmentation(True, 2, "batch", 0.5), mesh=parallel.make_mesh(),
                                    in_specs=(WHOLE, ROWS), out_specs=ROWS))
    np.testing.assert_array_equal(sharded(key, images), augmentation(True, 2, None, 0.5)(key, images))


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (1.0, 1.0, 1.0)), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))])
def test_normalise_against_numpy(mean, std):
    data = default.get_config().data
    data.mean, data.std = mean, std
    images = images_of()
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    actual = normalise(images, data)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=1e-5)


# --- device_data

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


BATCHES = [np.array([4, 0, 5]), np.array([1, 1, 2]), np.array([3, 5, 4])]


def test_batches_decoded_on_the_host(jpegs):
    decoded = list(device_data.decode_batches(jpegs, iter(BATCHES), 64, 32))
    pixels = jpegs.decode(64, 32)
    assert pixels.shape == (6, 64, 32, 3) and pixels.dtype == np.uint8
    for batch, indices in zip(decoded, BATCHES, strict=True):
        np.testing.assert_array_equal(batch, pixels[indices])
    assert list(device_data.decode_batches(jpegs, iter([]), 64, 32)) == []


# --- input_pipeline

class Examples(list):
    """As TFDS's data sources: reads many at once, too."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def on_disk(split):
    images = StoredImages(Examples({"image": image} for image in split.images), np.zeros((len(split), 32), np.uint8))
    return dataclasses.replace(split, images=images)


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


def test_sixteen_bits_a_channel_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 4), 4000, np.uint16)).save(file, "PNG")
    with pytest.raises(UserError, match="deep.png has more than 8 bits a channel"):
        decode_image(file.getvalue(), "deep.png")


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


# --- Split and decode_image

def test_the_fingerprint_is_that_of_every_byte_label_and_name(jpegs):
    def changed(field, value):
        values = list(getattr(jpegs, field))
        values[2] = value
        return dataclasses.replace(jpegs, **{field: values if field == "images" else np.array(values)}).fingerprint()

    image = bytearray(jpegs.images[2])
    image[-1] ^= 1
    prints = [jpegs.fingerprint(), changed("images", bytes(image)), changed("identities", 99), changed("cameras", 99),
              changed("names", "other.png"), jpegs.select(np.arange(5)).fingerprint(),
              jpegs.select(np.array([1, 0, 2, 3, 4, 5])).fingerprint()]
    assert len(set(prints)) == len(prints)
    assert jpegs.select(np.arange(6)).fingerprint() == jpegs.fingerprint()


def test_select_keeps_what_belongs_together(jpegs):
    picked = jpegs.select(np.array([4, 1]))
    assert len(picked) == 2 and picked.dataset == "test"
    assert picked.images == [jpegs.images[4], jpegs.images[1]]
    assert picked.identities.tolist() == [5, 2] and picked.names.tolist() == ["004.png", "001.png"]


def test_every_mode_decodes_to_rgb():
    pixels = drawing(40, 20)
    np.testing.assert_array_equal(decode_image(encode(pixels), "x"), pixels)
    np.testing.assert_array_equal(decode_image(encode(pixels, mode="RGBA"), "x"), pixels)
    grey = decode_image(encode(pixels, mode="L"), "x")
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, 2))
    for other in (encode(pixels, mode="P"), encode(pixels, "JPEG", "CMYK", quality=95)):
        decoded = decode_image(other, "x")
        assert decoded.shape == (40, 20, 3) and decoded.dtype == np.uint8
        assert np.abs(decoded.astype(int) - pixels).mean() < 20


def test_resizing_is_antialiased():
    """Plain bilinear interpolation would take two of eight columns and make grey into stripes or one colour."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encode(stripes), "x", 8, 8)
    assert small.shape == (8, 8, 3)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 12
    assert decode_image(encode(stripes), "x", 16, 8).shape == (16, 8, 3)


@pytest.mark.parametrize("broken, message", [
    (b"", "not an image"), (b"hello", "not an image"), (encode(drawing(40, 20))[:300], "does not decode"),
    (encode(drawing(40, 20), "JPEG")[:300], "does not decode"),
])
def test_what_is_no_image_is_refused_by_name(broken, message):
    with pytest.raises(UserError, match=f"seen.png.*{message}"):
        decode_image(broken, "seen.png")
    split = split_of([encode(drawing(40, 20)), broken])
    with pytest.raises(UserError, match="test: 001.png"):
        split.decode(16, 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [700, 300])  # the image has 800 pixels; Pillow warns above the limit, fails at twice
def test_a_huge_image_is_refused_before_it_is_decoded(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match="huge.png"):
        decode_image(encode(drawing(40, 20)), "huge.png")
