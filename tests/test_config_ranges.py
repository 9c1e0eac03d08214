import json
import math

import pytest
from flax.traverse_util import flatten_dict

from configs import default
from jlml_jax.config_ranges import RANGES, check_ranges
from jlml_jax.errors import UserError


def with_field(name, value):
    config = default.get_config()
    config.update_from_flattened_dict({name: value})
    return config


def test_every_number_of_the_config_has_a_range():
    numbers = {name for name, value in flatten_dict(json.loads(default.get_config().to_json()), sep=".").items()
               if not isinstance(value, (bool, str))}
    assert RANGES.keys() == numbers


def test_what_configs_have_is_taken():
    check_ranges(default.get_config())


@pytest.mark.parametrize("name, value", [
    ("seed", 2**32 - 1), ("optim.momentum", 0.0), ("optim.momentum", 0.999), ("train.steps", 0),
    ("data.mean", (-1.0, 0.0, 1.0)), ("augment.color_jitter", 1.0), ("model.global_widths", (1,)),
    ("loss.lambda_global", 1e30),
])
def test_the_ends_of_a_range(name, value):
    check_ranges(with_field(name, value))


@pytest.mark.parametrize("name, value, range_told", [
    ("seed", 2**32, "[0, 4294967295]"), ("seed", -1, "[0, 4294967295]"),
    ("log_every", 0, "[1, 2147483647]"), ("checkpoint_every", -1, "[1, 2147483647]"),
    ("keep_checkpoints", 0, "[1, inf)"),
    ("optim.momentum", 1.0, "[0, 1)"), ("optim.momentum", -0.1, "[0, 1)"), ("optim.decay_every", 0, "[1, 2147483647]"),
    ("optim.learning_rate", math.nan, "[0, inf)"), ("optim.learning_rate", math.inf, "[0, inf)"),
    ("optim.learning_rate", -0.01, "[0, inf)"), ("augment.erasing_probability", 1.5, "[0, 1]"),
    ("model.norm_epsilon", 0.0, "(0, inf)"), ("data.std", (1.0, 1.0, 0.0), "(0, inf)"),
    ("data.mean", (0.5, 0.5, math.nan), "(-inf, inf)"), ("model.local_widths", (16, 0), "[1, inf)"),
    ("train.steps", -1, "[0, 2147483647]"), ("optim.warmup_steps", 10**10, "[0, 2147483647]"),
    ("data.mean", ("a", "b", "c"), "(-inf, inf)"), ("model.local_feature_dim", 0, "[1, inf)"),
    ("evaluate.every", -1, "[0, 2147483647]"),
])
def test_what_is_out_of_a_range_is_told(name, value, range_told):
    with pytest.raises(UserError) as raised:
        check_ranges(with_field(name, value))
    shown = list(value) if isinstance(value, tuple) else value
    assert str(raised.value) == f"{name}={shown} must be in {range_told}"


@pytest.mark.parametrize("name, value, told", [
    ("data.mean", (0.5,), "data.mean=[0.5] must have 3 numbers"),
    ("model.global_widths", (), "model.global_widths=[] must have a number"),
    ("model.global_widths", (4.5,), "model.global_widths=[4.5] must be whole numbers"),
    ("model.global_widths", ((4,),), "model.global_widths=[[4]] must be in [1, inf)"),
])
def test_how_many_numbers(name, value, told):
    with pytest.raises(UserError) as raised:
        check_ranges(with_field(name, value))
    assert str(raised.value) == told


@pytest.mark.parametrize("name, told", [
    ("data.name", "data.name=None must be a text"),
    ("evaluate.datasets", "evaluate.datasets=None must be a text"),
    ("augment.flip", "augment.flip=None must be True or False"),
    ("train.steps", "train.steps=None must be in [0, 2147483647]"),
])
def test_none_is_told(name, told):
    with pytest.raises(UserError) as raised:
        check_ranges(with_field(name, None))
    assert str(raised.value) == told
