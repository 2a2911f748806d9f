"""Mistakes that the user can fix, told in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from writer_search.common.text import one_line


class UserError(Exception):
    """A mistake that the user can fix, in one line: what is wrong, the value, what to do.

    details: further lines, printable as they are, where there is a list to be told.
    passes: by itself, so that it is worth while to run the same command again later.
    """

    passes = False

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def told(error: UserError) -> str:
    """Give an error as it is printed: one line, and its details below."""
    details = (f"  {line}" for line in error.details)
    return "\n".join([f"error: {one_line(error, 1000)}", *details])


def root_of(error: BaseException) -> BaseException:
    """Give the database's own word: Optuna wraps it in one that says less, SQLAlchemy in SQL."""
    cause = error.__cause__ or error
    original = getattr(cause, "orig", None)
    return original if isinstance(original, BaseException) and str(original) else cause


# What a path, a disk or its permissions are at fault for, and no program.
OF_THE_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE),  # ulimit
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
}


def require_working_directory() -> None:
    """Raise UserError where there is none."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory is gone: change to one that exists") from None


LIMITS = {
    errno.EAGAIN: "no more processes are allowed: see ulimit -u, or the container's limit",
    errno.EMFILE: "no more open files are allowed: see ulimit -n",
    errno.ENFILE: "no more open files are allowed on this system: see fs.file-max",
}


def why(error: OSError) -> str:
    """Say what the system refused, and the limit that was reached."""
    where = "" if error.filename is None else f": {error.filename!r}"
    limit = f" ({LIMITS[error.errno]})" if error.errno in LIMITS else ""
    return one_line(f"{error.strerror or error}{where}{limit}")


def said_by(error: BaseException) -> str:
    """Give in one line what the system, or the database, has said."""
    return why(error) if isinstance(error, OSError) else one_line(root_of(error))


@contextmanager
def place_errors_told() -> Iterator[None]:
    """Turn errors of a path, a disk, its permissions or a limit into the user's mistake."""
    try:
        yield
    except RuntimeError as error:
        if "can't start new thread" not in str(error):  # Python's word, without a number
            raise
        limit = why(BlockingIOError(errno.EAGAIN, str(error)))
        raise UserError(f"{limit}; fix it, then run the same command") from None
    except OSError as error:
        if "AF_UNIX path too long" in str(error):  # it has no number, and names no path
            raise UserError("the path in TMPDIR is too long: set TMPDIR to a shorter one") from None
        require_working_directory()
        if error.errno not in OF_THE_PLACE:
            raise
        raise UserError(f"{why(error)}; fix it, then run the same command") from None
