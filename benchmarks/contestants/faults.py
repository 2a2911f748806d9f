"""What is done to a contestant's command while it runs."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
FULL_SECONDS = 20.0  # that the disk is full
DISK_BYTES = 600 * 2**20
BALLAST = "ballast"
CACHESTAT = 451  # the system call, since Linux 6.5
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Target:
    """The running command, and where it writes.   records: see `Contestant`

    everything: the processes that the command has started and that live, escaped ones too
    """

    process: subprocess.Popen[bytes]
    directory: Path
    records: tuple[str, ...]
    everything: Callable[[], Iterable[int]]


@dataclass(frozen=True)
class Fault:
    """A fault.   seconds: between two of it, or until the one (`once`)

    inflict: returns the files that it damaged.   needs_disk: the directory is a small disk of its
    own, which `inflict` fills, and `FULL_SECONDS` later there is room again.
    """

    name: str
    seconds: float
    inflict: Callable[[Target], list[Path]]
    once: bool = False
    needs_disk: bool = False


def kill(target: Target) -> list[Path]:
    """Kill the main process."""
    target.process.kill()
    target.process.wait()
    return []


def kill_group(target: Target) -> list[Path]:
    """Kill all that a terminal or a batch system would: the process group."""
    os.killpg(target.process.pid, signal.SIGKILL)
    target.process.wait()
    return []


def terminate(target: Target) -> list[Path]:
    """Ask the main process to end; kill its group when it does not within the grace."""
    target.process.terminate()
    try:
        target.process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(target)
    return []


def cut_power(target: Target) -> list[Path]:
    """Kill all at once, and throw away of the file written last the end that is not on the disk.

    The kernel tells which pages those are: a file that was synced loses nothing. Names that were
    given and not synced, and older files, stay as they are: it is a miniature. Raises OSError
    where files are in memory alone, and no page is ever unsynced.
    """
    kind = subprocess.run(["stat", "-f", "-c", "%T", target.directory], capture_output=True).stdout
    if kind.strip() in (b"tmpfs", b"ramfs"):
        raise OSError(f"{target.directory} is in memory: give --keep a directory on a disk")
    for pid in (target.process.pid, *target.everything()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    target.process.wait()
    files = [path for path in target.directory.rglob("*") if path.is_file()]
    if not files:
        return []
    last = max(files, key=lambda path: path.stat().st_mtime_ns)
    synced = synced_bytes(last)
    if synced == last.stat().st_size:
        return []
    os.truncate(last, synced)
    return [last]


def synced_bytes(path: Path) -> int:
    """Give the size that is left of a file without the dirty pages at its end. Raises OSError."""
    system = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with path.open("rb") as file:
        kept = size
        for start in range((size - 1) // PAGE * PAGE, -1, -PAGE):
            place, found = struct.pack("QQ", start, PAGE), ctypes.create_string_buffer(40)
            if system.syscall(CACHESTAT, file.fileno(), place, found, 0):
                raise OSError(ctypes.get_errno(), "cachestat")
            _, dirty, writing, *_ = struct.unpack("5Q", found.raw)
            if not dirty + writing:
                break
            kept = start
    return kept


def cut_records(target: Target) -> list[Path]:
    """Kill the group, and cut the newest file that holds the list of trials in half."""
    kill_group(target)
    found = [path for pattern in target.records for path in target.directory.glob(pattern)]
    if not found:
        return []
    last = max(found, key=lambda path: path.stat().st_mtime_ns)
    os.truncate(last, last.stat().st_size // 2)
    return [last]


def fill_disk(target: Target) -> list[Path]:
    """Leave no byte on the directory's small disk."""
    with (target.directory / BALLAST).open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**20)):
                pass
        except OSError:
            return []
    return []


def make_room(directory: Path) -> None:
    (directory / BALLAST).unlink(missing_ok=True)


def mount_disk(directory: Path) -> None:
    """Make the directory a small disk. Raises OSError where that is not allowed."""
    size = f"size={DISK_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", size, "goodput", str(directory)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        raise OSError("a small disk cannot be mounted: that takes root")


def unmount_disk(directory: Path) -> None:
    subprocess.run(["umount", "-l", str(directory)], check=True)


KINDS: dict[str, tuple[Callable[[Target], list[Path]], dict[str, bool]]] = {
    "kill": (kill, {}),
    "kill_group": (kill_group, {}),
    "terminate": (terminate, {}),
    "power_cut": (cut_power, {}),
    "cut_records": (cut_records, {"once": True}),
    "full_disk": (fill_disk, {"once": True, "needs_disk": True}),
}
NONE = "none"
DEFAULT = (
    *(NONE, "kill_60", "kill_30", "kill_15", "kill_group_60", "kill_group_30", "kill_group_15"),
    *("terminate_60", "power_cut_30", "cut_records_30", "full_disk_30"),
)


def fault_named(name: str) -> Fault | None:
    """Give the fault of a name like kill_30; None for "none". Raises ValueError."""
    if name == NONE:
        return None
    kind, _, seconds = name.rpartition("_")
    if kind not in KINDS or not seconds.isdecimal() or not int(seconds):
        raise ValueError(f"{name} is no fault: {', '.join(DEFAULT)}, or with other seconds")
    inflict, more = KINDS[kind]
    return Fault(name, float(seconds), inflict, **more)
