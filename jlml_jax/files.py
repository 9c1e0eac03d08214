"""Files and folders that a user names: written whole or not at all, by one process at a time."""

import contextlib
import errno
import fcntl
import functools
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, BinaryIO

from jlml_jax.errors import UserError


def user_path(path: str | Path) -> Path:
    """The path that a user has given, with ~ for their home: a shell leaves it as it is in --workdir=~/runs."""
    return Path(os.path.expanduser(path))  # which leaves the ~ of an unknown user, where pathlib's raises


def cached_realpath() -> Callable[[str | Path], str]:
    """A function that does as os.path.realpath, but looks each folder up once, and each file: for lists of many."""
    of_folder = functools.cache(os.path.realpath)

    @functools.cache
    def realpath(path: str | Path) -> str:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir):
            return of_folder(path)
        file = os.path.join(of_folder(folder), name)
        return os.path.realpath(file) if os.path.islink(file) else file

    return realpath


def refuse_address(what: str, path: str | Path | None) -> None:
    """A UserError if `path` is an address, such as gs://mine/data, of which pathlib would make a folder `gs:`."""
    if re.match("[a-z][a-z0-9]*:/", str(path or "")):
        raise UserError(f"{what}={path} is an address, not a folder: give one on a file system, such as a disk or a "
                        "share that is mounted here")


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a whole file or nothing: a reader never sees half of it, nor do two writers mix.

    Args:
        path: the file; one that is there is replaced.
        content: what to write, or a function that writes it into the open file.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def check_output(path: Path, option: str = "--output") -> None:
    """A UserError if the file that a command's `option` names cannot be written: told before the work, not after."""
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder; give a file in a folder that exists")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}={path} cannot be written: {path.parent} is not a folder that can be written to; "
                        "give a file in one that is")


def refuse_replacing(files: Mapping[str, str | None]) -> None:
    """A UserError if two options name one file, of which at least one is written."""
    options = {}
    for option, file in files.items():
        if file is not None:
            options.setdefault(os.path.realpath(user_path(file)), []).append(option)
    for file, named in options.items():
        if len(named) > 1 and named[-1] in ("--output", "--picture"):
            raise UserError(f"{' and '.join(named)} are one file, {file}, which would be replaced; give {named[-1]} "
                            "another name")


def refuse_replacing_images(option: str, path: str, images: Iterable[Path]) -> None:
    """A UserError if the file that is to be written is one of the images that are read."""
    realpath = cached_realpath()
    written = realpath(user_path(path))
    if any(realpath(image) == written for image in images):
        raise UserError(f"{option}={path} is one of the images, and would be replaced; give it another name")


def write_output(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """`write_atomically`, for the file of a command's --output; a UserError if it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write --output={path} ({error.strerror or error}), what was there is as it was; make "
                        "room or give another") from error


_PATIENCE = 1.0  # seconds that a lock is waited for before that is said: a batch of a gallery takes less


def lock(path: Path, what: str, otherwise: str | None) -> IO[str]:
    """Locks what the lock file `path` stands for, for this process, until what is returned is closed.

    By flock, which the kernel lets go when the process ends, however it ends: there are no stale locks, on one host or
    on several that share the folder by NFS. What is in the file is for the message alone. On a file system without
    locks it says so, and nothing is locked.

    Args:
        path: the lock file, made if it is not there.
        what: is locked, such as a folder, for messages.
        otherwise: what to do if another process has the lock, for the message; None: wait for it, and say so if that
            takes more than a moment.

    Raises:
        UserError: another process has it, which is named, and it is not to be waited for.
        OSError: the file cannot be written.
    """
    file = open(path, "a+")  # noqa: SIM115 - held by the caller
    try:
        if not _is_soon_locked(file, 0 if otherwise is not None else _PATIENCE):
            file.seek(0)
            holder = file.read() or "another process"
            if otherwise is not None:
                file.close()
                raise UserError(f"{what} is in use by {holder}; {otherwise}")
            print(f"{what} is in use by {holder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _tell_no_locks(what, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


@functools.cache  # not each time that it is locked
def _tell_no_locks(what: str, why: str) -> None:
    print(f"{what} is on a file system without locks ({why}): a second process that writes there would not be noticed",
          flush=True)


def _is_soon_locked(file: IO[str], seconds: float) -> bool:
    """Tries to lock `file` for so long; whether it is locked."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
