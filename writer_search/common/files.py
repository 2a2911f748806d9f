"""Files that appear whole or not at all, the lock on a directory, and the user's mistakes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


class UserError(Exception):
    """A mistake that the user can mend, in one line: what is wrong, the value, what to do."""


# What a path, a disk or its permissions are at fault for, and no program.
OF_THE_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
}


@contextmanager
def place_errors_told() -> Iterator[None]:
    """Turn errors of a path, a disk or its permissions into the user's mistake."""
    try:
        yield
    except OSError as error:
        if "AF_UNIX path too long" in str(error):  # it has no number, and names no path
            raise UserError("the path in TMPDIR is too long: set TMPDIR to a shorter one") from None
        if error.errno not in OF_THE_PLACE:
            raise
        raise UserError(f"{one_line(error)}; mend it, and the same command goes on") from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A reader sees the old file or the new one, also after a power cut: the contents reach the disk
    before the name does, and the name before this returns.
    """
    # Several hosts may write to one directory, and have processes of the same number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text whole; undecodable file names survive as their escaped bytes."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError or ValueError."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def read_dict(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is not there, or holds none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def content_hash(value: Any) -> str:
    """Hash a JSON-able value independently of the order of its keys: 16 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def one_line(text: object, limit: int = 300) -> str:
    """Squeeze any text (an error, a hostile file name) into one printable line."""
    flat = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


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
        started = datetime.now().astimezone().isoformat(timespec="seconds")
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

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


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
