"""Locks on a search's directory, which the kernel drops with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import IO

from writer_search.common.errors import UserError
from writer_search.common.text import one_line

WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # file systems that have none


class DirectoryLock:
    """An exclusive lock on a directory, held while the `with` block runs.

    Its file says who holds it (pid, host, start). The kernel drops the lock with the process,
    however that ends, so that a lock found free means that the last holder is dead. The descriptors
    are not inherited by programs that this process starts.
    Raises UserError, naming the holder, when another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: list[int] = []

    def __enter__(self) -> DirectoryLock:
        self._descriptors = _take(self._directory, fcntl.LOCK_EX)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n"
        _write(self._descriptors[0], holder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


class SharedLock:
    """A place among several searches in one directory, held while the `with` block runs.

    Each has a lock file of its own, by which others on the same host see at once that it is dead;
    `path` is None where the file system has no locks. Together they keep out a search that wants
    the directory for itself, and are kept out by it. Raises UserError for the latter.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        name = f"search-{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}.lock"
        self.path: Path | None = directory / name
        self._descriptors: list[int] = []

    def __enter__(self) -> SharedLock:
        assert self.path is not None
        self._descriptors = _take(self._directory, fcntl.LOCK_SH)
        _write(self._descriptors[0], "searches with --storage\n")
        own = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptors.append(own)
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.path = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # After an error it stays: it tells others that this search's unrecorded trials are dead.
        if kind is None and self.path is not None:
            self.path.unlink(missing_ok=True)
        for descriptor in self._descriptors:
            os.close(descriptor)


@contextmanager
def builder_lock(path: Path) -> Iterator[None]:
    """Let one process build something while others wait; a dead one's lock is free at once.

    On a file system without locks several may build the same. Raises OSError.
    """
    while True:
        with open(path, "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                is_alone = True
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                is_alone = False
            if is_alone and not _has_name(file, path):
                continue  # whoever held it has removed it meanwhile
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _has_name(file: IO[bytes], path: Path) -> bool:
    """Tell whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder_is_dead(lock: Path) -> bool:
    """Tell whether the process that made a lock file on this host has ended; changes nothing."""
    return _is_held(lock) is False


def remove_dead_locks(directory: Path) -> None:
    """Remove the lock files of shared searches on this host that have ended."""
    for path in directory.glob(f"search-{escape(socket.gethostname())}-*.lock"):
        if holder_is_dead(path):
            path.unlink(missing_ok=True)


def refuse_if_in_use(directory: Path) -> None:
    """Raise UserError when another process holds the directory's lock; changes nothing."""
    if is_locked(directory):
        raise _in_use(directory)


def is_locked(directory: Path) -> bool:
    """Tell whether some process holds the directory's lock; changes nothing."""
    return any(map(_is_held, _what_is_locked(directory)))


def _in_use(directory: Path) -> UserError:
    lock = directory / "search.lock"
    holder = one_line(lock.read_text(errors="replace")) if lock.exists() else ""
    return UserError(
        f"{directory} is in use by another search ({holder or 'its search.lock was removed'}); "
        "wait for it, stop it, or give another directory"
    )


def _what_is_locked(directory: Path) -> tuple[Path, Path]:
    """Give the file that a directory's lock is on, and what holds where somebody removes that.

    On a network file system a lock on a directory reaches no other host.
    """
    return directory / "search.lock", directory


def _take(directory: Path, kind: int) -> list[int]:
    """Lock a directory; gives the descriptors that hold the lock, that of its file first."""
    file, itself = _what_is_locked(directory)
    descriptors = [os.open(file, os.O_RDWR | os.O_CREAT, 0o666)]
    try:
        descriptors.append(os.open(itself, os.O_RDONLY))
        if all(_try_lock(descriptor, kind) for descriptor in descriptors):
            return descriptors
        raise _in_use(directory)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _write(descriptor: int, holder: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(), 0)


def _try_lock(descriptor: int, kind: int, seconds: float = 0.5) -> bool:
    """Try for a moment: `is_locked` of another process may hold the lock for microseconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError as error:  # some network file systems have no locks
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                print(
                    f"warning: this file system has no locks ({one_line(error)}): "
                    "make sure that one search alone uses the directory",
                    file=sys.stderr,
                )
            return True


def is_without_locks(directory: Path) -> bool:
    """Tell whether a directory's file system refuses the locks that databases use.

    By its search.lock, of which nothing is changed; False where there is none.
    """
    question = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # a struct flock
    try:
        with open(directory / "search.lock", "rb") as file:
            fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError as error:
        return error.errno in WITHOUT_LOCKS
    return False


def _is_held(path: Path) -> bool | None:
    """Tell whether some process holds a lock; None where nobody can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # there is none, or it is another host's or container's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system
        return None
    finally:
        os.close(descriptor)
    return False
