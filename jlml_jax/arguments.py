"""The command line of every command but `main`, whose fields are flags of absl's."""

import argparse
from typing import NoReturn

from jlml_jax.errors import told


class Parser(argparse.ArgumentParser):
    """Shows the help's texts as they are written, and tells of what is wrong in one line, as of a UserError."""

    def __init__(self, module: str, description: str, epilog: str | None = None):
        super().__init__(f"python -m {module}", description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{told(message)}; see --help\n")
