"""A field that no config has, on the command line or in a config, told with those that its name is near to."""

import difflib
import re
from collections.abc import Sequence

import ml_collections
from flax.traverse_util import flatten_dict

from configs import default
from jlml_jax.errors import UserError, printable

_LONGEST = 80  # letters that are compared and told: a flag may have thousands


def refuse_unknown_field(arguments: Sequence[str]) -> None:
    """A UserError for the first of a command's arguments that gives a field which configs/default.py does not have."""
    config = default.get_config()
    for argument in arguments:
        # As absl reads a flag: one dash or two, the value after = or on its own; an index is of a tuple.
        match = re.match(r"--?(?:no)?config\.([^=[]*)", argument)
        if match is not None and match[1] not in (*_fields_of(config), *config):
            raise _unknown(match[1])


def refuse_unknown_fields(config: ml_collections.ConfigDict) -> None:
    """A UserError for the first field of `config` that configs/default.py does not have: nothing would read it."""
    known = _fields_of(default.get_config())
    for field in _fields_of(config):
        if field not in known:
            raise _unknown(field)


def _fields_of(config: ml_collections.ConfigDict) -> list[str]:
    return list(flatten_dict(config.to_dict(), sep="."))


def _unknown(field: str) -> UserError:
    field = field[:_LONGEST]
    near = difflib.get_close_matches(field, _fields_of(default.get_config()), cutoff=0.5)
    return UserError(f"there is no config field {printable(field)}; "
                     + (f"near it: {', '.join(near)}; " if near else "") + "configs/default.py has every field")
