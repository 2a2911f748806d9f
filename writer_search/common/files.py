"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# A file system's word that it cannot do this at all, as CIFS and shared folders of virtual machines
# have it for directories.
NOT_POSSIBLE = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR}


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], previous: Path | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    previous: where to keep the file that was in its place, if any.

    A reader sees the old file or the new one, also after a power cut: the contents reach the disk
    before the name does, and the name before this returns.
    """
    # Several hosts may write to one directory, and have processes of the same number.
    own = f"{socket.gethostname()}.{os.getpid()}.{os.urandom(3).hex()}"  # containers share both
    temporary = path.with_name(f".{path.name}.{own}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            _sync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Remove half-written files of processes that were killed; no other may write there now."""
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk, where its file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NOT_POSSIBLE:
            raise
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Bring a file to the disk: safety from power cuts is no precondition of a search."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_POSSIBLE:
            raise


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


def is_there(path: Path) -> bool:
    """Tell whether a file is seen from here; no error where nobody may look, or a mount is gone."""
    return os.path.exists(path)


def read_dict(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is not there, or holds none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_signed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object whole, with a checksum of its contents, for `read_signed`."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys as they will be read
    write_json(path, {**plain, "checksum": content_hash(plain)})


def read_signed(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none, or one that its checksum does not fit.

    One without a checksum, an older version's, is believed.
    """
    value = read_dict(path)
    checksum = value.pop("checksum", None)
    try:
        is_whole = checksum in (None, content_hash(value))
    except (ValueError, RecursionError):
        return {}
    return value if is_whole else {}


def content_hash(value: Any) -> str:
    """Hash a JSON-able value independently of the order of its keys: 16 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
