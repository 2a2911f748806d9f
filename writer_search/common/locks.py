"""Locks on a search's directory, which the kernel drops with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
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
    however that ends, so that a lock found free means that the last holder is dead. The descriptor
    is not inherited by programs that this process starts.
    Raises UserError, naming the holder, when another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "search.lock"
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(descriptor):
            os.close(descriptor)
            raise _in_use(self.path)
        os.ftruncate(descriptor, 0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n"
        os.pwrite(descriptor, holder.encode(), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


class SharedLock:
    """A place among several searches in one directory, held while the `with` block runs.

    Each has a lock file of its own, by which others on the same host see at once that it is dead;
    `path` is None where the file system has no locks. Together they keep out a search that wants
    the directory for itself, and are kept out by it. Raises UserError for the latter.
    """

    def __init__(self, directory: Path) -> None:
        self._common = directory / "search.lock"
        name = f"search-{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}.lock"
        self.path: Path | None = directory / name
        self._descriptors: list[int] = []

    def __enter__(self) -> SharedLock:
        assert self.path is not None
        common = os.open(self._common, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptors.append(common)
        if not _try_lock(common, fcntl.LOCK_SH):
            os.close(self._descriptors.pop())
            raise _in_use(self._common)
        os.pwrite(common, b"searches with --storage\n", 0)
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
def builder_lock(path: Path) -> Iterator[bool]:
    """Let one process build something while others wait; a dead one's lock is free at once.

    Gives False on a file system without locks: then several may build the same. Raises OSError.
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
                yield is_alone
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
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False  # another host's, or another container's: nobody can tell
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def remove_dead_locks(directory: Path) -> None:
    """Remove the lock files of shared searches on this host that have ended."""
    for path in directory.glob(f"search-{escape(socket.gethostname())}-*.lock"):
        if holder_is_dead(path):
            path.unlink(missing_ok=True)


def refuse_if_in_use(directory: Path) -> None:
    """Raise UserError when another process holds the directory's lock; changes nothing."""
    if is_locked(directory):
        raise _in_use(directory / "search.lock")


def _in_use(path: Path) -> UserError:
    holder = one_line(path.read_text(errors="replace"))
    return UserError(
        f"{path.parent} is in use by another search ({holder}); "
        "wait for it, stop it, or give another --checkpoint_dir"
    )


def _try_lock(descriptor: int, kind: int = fcntl.LOCK_EX, seconds: float = 0.5) -> bool:
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
            print(
                f"warning: this file system has no locks ({one_line(error)}): "
                "make sure that one search alone uses the directory",
                file=sys.stderr,
            )
            return True


def is_locked(directory: Path) -> bool:
    """Tell whether some process holds the directory's lock; changes nothing."""
    try:
        descriptor = os.open(directory / "search.lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system: nobody can tell
        return False
    finally:
        os.close(descriptor)
    return False
