"""The command line of every command but `main`, whose fields are flags of absl's."""

import argparse
import collections
import sys
from collections.abc import Sequence
from typing import NoReturn

from jlml_jax.errors import told


class Parser(argparse.ArgumentParser):
    """Shows the help's texts as they are written, and tells of what is wrong in one line, as of a UserError."""

    def __init__(self, module: str, description: str, epilog: str | None = None):
        super().__init__(f"python -m {module}", description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
                   ) -> argparse.Namespace:
        """As argparse has it, which would take the last of an option that is given several times, such as --gallery."""
        words = sys.argv[1:] if args is None else args
        given = collections.Counter(word.partition("=")[0] for word in words if word.startswith("--"))
        if twice := [option for option, count in given.items() if count > 1]:
            self.error(f"{twice[0]} is given {given[twice[0]]} times, and takes one value")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{told(message)}; see --help\n")
