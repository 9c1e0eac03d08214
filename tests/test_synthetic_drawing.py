import dataclasses
import hashlib

import numpy as np
import pytest

from jlml_jax.datasets import synthetic_drawing, synthetic_people
from jlml_jax.datasets.synthetic_drawing import NUM_CAMERAS, draw_image
from jlml_jax.datasets.synthetic_people import CUT, FAMILY_SIZE, PART, WHOLE, draw_identity

CAMERAS = range(1, NUM_CAMERAS + 1)
CHECKSUM = "fd4d11325c41378b213a1c8d4a4003c60dbe821c5edde871dc8d72c9e7334bae"


def differing(one, other):
    """The names of the attributes in which two identities differ."""
    return [field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)]


def family(seed, number):
    return [draw_identity(seed, FAMILY_SIZE * number + member) for member in range(1, FAMILY_SIZE + 1)]


def test_pixels_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for identity in (1, 2, 3, 17, 42, 43, 64, 201, 320, 100_000):
        for camera in CAMERAS:
            digest.update(draw_image(0, identity, camera, identity % 3).tobytes())
    digest.update(draw_image(2**40, 5, 1, 0).tobytes())
    assert digest.hexdigest() == CHECKSUM


def test_an_image_is_a_pure_function_of_its_arguments():
    first = draw_image(0, 7, 3, 1)
    np.random.seed(1)
    for identity in range(20, 0, -1):
        draw_image(1, identity, 3, 1)
    again = draw_image(0, 7, 3, 1)
    assert first.shape == (128, 64, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    np.testing.assert_array_equal(first, again)
    first[:] = 0  # no image is kept and handed out twice
    np.testing.assert_array_equal(draw_image(0, 7, 3, 1), again)


@pytest.mark.parametrize("changed", [(1, 5, 2, 0), (0, 6, 2, 0), (0, 5, 3, 0), (0, 5, 2, 1)])
def test_every_argument_counts(changed):
    difference = np.abs(draw_image(0, 5, 2, 0).astype(int) - draw_image(*changed))
    assert (difference.max(axis=-1) > 30).mean() > 0.1  # more than noise, and not in a corner


def test_pictures_are_well_exposed():
    images = np.stack([draw_image(0, identity, 1 + identity % NUM_CAMERAS, 0) for identity in range(1, 121)])
    assert (images.std(axis=(1, 2, 3)) > 20).all()
    assert ((images == 0) | (images == 255)).mean() < 0.1


def test_members_of_a_family_differ_from_its_founder_in_one_attribute_of_one_kind():
    for number in range(60):
        founder, *others = family(0, number)
        names = [differing(founder, other) for other in others]
        assert all(len(name) == 1 for name in names)
        assert any({name[0] for name in names} <= set(kind) for kind in (PART, WHOLE, CUT))
        assert len(set(family(0, number))) == FAMILY_SIZE


def test_families_share_colors_with_other_families():
    clothes = [(member.upper, member.lower) for number in range(120) for member in family(0, number)[:1]]
    assert len(set(clothes)) <= 40 < len(clothes)


def test_the_largest_family_has_no_doubles(monkeypatch):
    monkeypatch.setattr(synthetic_people, "FAMILY_SIZE", 11)
    assert len({draw_identity(3, identity) for identity in range(1, 11 * 20 + 1)}) == 11 * 20


def test_every_difference_in_a_family_shows_in_every_camera(monkeypatch):
    monkeypatch.setattr(synthetic_drawing, "OCCLUSION_PROBABILITY", 0)
    shown = set()
    for number in range(36):
        people = family(0, number)
        for camera in CAMERAS:
            founder, *others = (synthetic_drawing.draw_person(person, camera, (9, number)).astype(int)
                                for person in people)
            for person, image in zip(people[1:], others, strict=True):
                (name,) = differing(people[0], person)
                changed = (np.abs(image - founder).max(axis=-1) > 25).sum()
                assert changed >= 24, (name, number, camera, changed)
                shown.add(name)
    assert shown == set(PART | WHOLE | CUT)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("CAST_STRENGTH", 0), ("CAST_JITTER", 0), ("NOISE", 0), ("BLUR", 0), ("MISALIGNMENT", 0), ("POSE_JITTER", 0),
     ("OCCLUSION_PROBABILITY", 1), ("CLUTTER", 0), ("FAMILY_SIZE", 3)],
)
def test_every_difficulty_counts(monkeypatch, knob, value):
    before = draw_image(0, 6, 2, 0)
    module = synthetic_people if knob == "FAMILY_SIZE" else synthetic_drawing
    monkeypatch.setattr(module, knob, value)
    assert (draw_image(0, 6, 2, 0) != before).any()


def test_misnumbered_people_and_cameras_are_refused():
    with pytest.raises(ValueError, match="identities are 1 and up"):
        draw_image(0, 0, 1, 0)
    for camera in (0, 7):
        with pytest.raises(ValueError, match="cameras are 1 to 6"):
            draw_image(0, 1, camera, 0)
