"""What each field of a config may be: told before anything is written, and not by what goes wrong later."""

import json
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from configs import default
from jlml_jax.errors import UserError

# Intervals: [ and ] include the end, ( and ) do not. Of a field that has several numbers, each lies in it. Steps are
# counted in int32.
RANGES = {
    "seed": "[0, 4294967295]",
    "data.cuhk03_train_identities": "[1, inf)",
    "data.held_out_identities": "[0, inf)",
    "data.height": "[1, inf)",
    "data.width": "[1, inf)",
    "data.mean": "(-inf, inf)",
    "data.std": "(0, inf)",
    "augment.crop_padding": "[0, inf)",
    "augment.color_jitter": "[0, 1]",
    "augment.white_balance": "[0, 1]",
    "augment.erasing_probability": "[0, 1]",
    "model.num_strips": "[1, inf)",
    "model.stem_features": "[1, inf)",
    "model.global_widths": "[1, inf)",
    "model.local_widths": "[1, inf)",
    "model.depth": "[1, inf)",
    "model.global_feature_dim": "[1, inf)",
    "model.local_feature_dim": "[1, inf)",
    "model.cosine_scale": "[0, inf)",
    "model.norm_momentum": "[0, 1)",
    "model.norm_epsilon": "(0, inf)",
    "loss.lambda_global": "[0, inf)",
    "loss.lambda_local": "[0, inf)",
    "loss.label_smoothing": "[0, 1)",
    "loss.margin": "[0, inf)",
    "loss.triplet_weight": "[0, inf)",
    "loss.triplet_margin": "[0, inf)",
    "optim.learning_rate": "[0, inf)",
    "optim.decay_every": "[1, 2147483647]",
    "optim.decay_factor": "[0, inf)",
    "optim.warmup_steps": "[0, 2147483647]",
    "optim.momentum": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "train.steps": "[0, 2147483647]",
    "train.batch_size": "[1, inf)",
    "train.images_per_identity": "[0, inf)",
    "train.accumulation_steps": "[1, inf)",
    "train.steps_per_dispatch": "[0, inf)",
    "evaluate.every": "[0, 2147483647]",
    "evaluate.batch_size": "[1, inf)",
    "evaluate.max_rank": "[1, inf)",
    "log_every": "[1, 2147483647]",
    "checkpoint_every": "[1, 2147483647]",
    "keep_checkpoints": "[1, inf)",
}
_COLORS = ("data.mean", "data.std")  # a number a channel


def check_ranges(config: ml_collections.ConfigDict) -> None:
    """A UserError for the first field of `config` that is of another type than its default, or out of its range."""
    fields, defaults = (flatten_dict(json.loads(one.to_json()), sep=".") for one in (config, default.get_config()))
    for name, usual in defaults.items():  # a config of the user's own may have None anywhere
        if name not in RANGES and type(fields[name]) is not type(usual):
            raise UserError(f"{name}={fields[name]} must be {'True or False' if isinstance(usual, bool) else 'a text'}")
    for name, interval in RANGES.items():
        values, usual = (one[name] if isinstance(one[name], list) else [one[name]] for one in (fields, defaults))
        if name in _COLORS and len(values) != 3 or not values:
            raise UserError(f"{name}={fields[name]} must have {'3 numbers' if name in _COLORS else 'a number'}")
        if not all(_within(value, interval) for value in values):
            raise UserError(f"{name}={fields[name]} must be in {interval}")
        if isinstance(usual[0], int) and not all(isinstance(value, int) for value in values):
            raise UserError(f"{name}={fields[name]} must be {'whole numbers' if len(usual) > 1 else 'a whole number'}")


def _within(value: Any, interval: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    least, most = (float(end) for end in interval[1:-1].split(","))
    # Written so that NaN is in none.
    return (value >= least if interval[0] == "[" else value > least) and (
        value <= most if interval[-1] == "]" else value < most)
