"""The one exception class for what a user can mend, and its exit status."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong, where, and what to do."""


def exit_status(command: Callable[[], None]) -> int:
    """Runs `command` and returns the process's exit status: 0 done, 2 after a UserError, 130 after Ctrl-C.

    A UserError is told in one line on stderr; any other exception passes through, because it is a bug. SIGTERM ends the
    process with status 143 by way of an exception, so that what is half done is cleaned up.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        command()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
