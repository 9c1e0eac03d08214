import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jlml_jax import sampling
from jlml_jax.errors import UserError


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
    assert sampling.steps_per_epoch(len(PERSONS), 8, sampling.identity_groups(PERSONS, 4)) == 3  # 6 groups, 24 images


def test_the_groups_of_an_epoch_come_in_any_order():
    batches = sampling.training_batches(0, 0, 4 * 300, len(PERSONS), 4, sampling.identity_groups(PERSONS, 2))
    persons = PERSONS[np.concatenate(list(batches)).reshape(300, 8, 2)[:, :, 0]]  # eight of the nine groups
    for person, number in ((0, 3), (2, 3), (3, 2), (5, 1)):
        assert np.abs((persons == person).mean(0) - number / 9).max() < 0.12


def test_a_seed_is_not_another_one_an_epoch_later():
    assert not np.array_equal(sampling.epoch_order(0, 1, 24), sampling.epoch_order(1, 0, 24))


def test_every_device_has_its_rows_of_every_micro_batch():
    np.testing.assert_array_equal(sampling.device_rows(np.arange(8), 2), [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(sampling.device_rows(np.arange(8), 2, 2), [[0, 1, 4, 5], [2, 3, 6, 7]])
    np.testing.assert_array_equal(sampling.device_rows(np.arange(8), 1, 2), [np.arange(8)])
    images = np.arange(8 * 6).reshape(8, 2, 3)
    np.testing.assert_array_equal(sampling.device_rows(images, 4, 2)[1], images[[1, 5]])


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
