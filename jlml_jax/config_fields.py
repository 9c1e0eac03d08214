"""A field on the command line that no config has, told with those that its name is near to."""

import difflib
import re
from collections.abc import Sequence

from flax.traverse_util import flatten_dict

from configs import default
from jlml_jax.errors import UserError, printable

_LONGEST = 80  # letters that are compared and told: a flag may have thousands


def refuse_unknown_field(arguments: Sequence[str]) -> None:
    """A UserError for the first of a command's arguments that gives a field which configs/default.py does not have."""
    config = default.get_config()
    known = list(flatten_dict(config.to_dict(), sep="."))
    for argument in arguments:
        # As absl reads a flag: one dash or two, the value after = or on its own; an index is of a tuple.
        match = re.match(r"--?(?:no)?config\.([^=[]*)", argument)
        if match is None or match[1] in (*known, *config):
            continue
        field = match[1][:_LONGEST]
        near = difflib.get_close_matches(field, known, cutoff=0.5)
        raise UserError(f"there is no config field {printable(field)}; "
                        + (f"near it: {', '.join(near)}; " if near else "")
                        + "configs/default.py has every field")
