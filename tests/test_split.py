"""Split, the images of a data set's part with their labels."""

import dataclasses

import numpy as np
import pytest
from splits import drawing, encode, on_disk, split_of

from jlml_jax.errors import UserError


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
