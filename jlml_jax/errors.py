"""The one exception class for what a user can mend, and the exit status of a command."""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong, where, and what to do."""


def first_few(items: Sequence[str], separator: str = ", ") -> str:
    """The first three of `items`, as a part of a one-line message."""
    return separator.join([*items[:3], *["..."] * (len(items) > 3)])


def told(message: object) -> str:
    """How a command tells of what is wrong: one line, whatever `message` holds."""
    return f"error: {' '.join(str(message).split())}"


def printable(text: str) -> str:
    """`text` if a terminal shows all of it as it is, else with escapes: names of files may hold anything."""
    return text if text.isprintable() else ascii(text)


# What a full or broken disk, a quota, a read-only file system or a lost permission raises.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                   errno.ESTALE)


@contextlib.contextmanager
def storage_errors_told(folder: Path) -> Iterator[None]:
    """While entered, what the storage of `folder` cannot do is a UserError; other errors pass through.

    They are told by their text, as TensorStore and array_record raise no OSError, but ValueError and RuntimeError.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        told = next((os.strerror(code) for code in _STORAGE_ERRORS if os.strerror(code) in str(error)), None)
        if told is None:
            raise
        raise UserError(f"cannot use {getattr(error, 'filename', None) or folder} ({told}); what was saved before is "
                        "whole: mend that and run the same command again") from error


def exit_status(command: Callable[[], None]) -> int:
    """Runs `command` and returns the process's exit status: 0 done, 2 after a UserError, 130 after Ctrl-C, 141
    when nobody reads the output any more, such as `head`.

    A UserError is told in one line on stderr; any other exception passes through, because it is a bug. SIGINT and
    SIGTERM end the process with status 130 and 143 by way of an exception, so that what is half done is cleaned up; the
    second of them, or one that comes when the command is done, ends it at once.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and the like ask for
            signal.signal(number, _leave)
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print(told(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it on its way out
        return 128 + signal.SIGPIPE
    finally:
        _end_at_once_from_now_on()  # Python, on its way out, would tell of an exception, and go on
    return 0


def _nobody_reads() -> bool:
    """Whether the output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # what is wrong with it, and no more
    return bool(poll.poll(0))


def _end_at_once_from_now_on() -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) == _leave:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    if _is_ignored_in(frame):
        threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number)).start()
        return
    _end_at_once_from_now_on()
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _is_ignored_in(frame: FrameType | None) -> bool:
    """Whether Python prints what is raised there, and goes on: in finalisers, and where garbage is collected.

    JAX is called back by every collection, before which Python looks at no signals: long ones meet many.
    """
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_xla_gc_callback"):
            return True
        frame = frame.f_back
    return False
