"""What ran where: command, commit, machine, versions."""

from __future__ import annotations

import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(data_root: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Say what ran where: for config.json."""
    packages = ("optuna", "numpy", "pillow")
    return {
        "data_root": str(data_root),
        "command": sys.argv,
        "interpreter": sys.executable,
        **git_state(Path(__file__).parents[2]),
        "host": socket.gethostname(),
        "device_names": machine["device_names"] or [processor()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            **machine["versions"],
        },
    }


def pasted(command: Sequence[str]) -> str:
    """Give a command of this program (its script first) as it can be pasted into a shell."""
    return shlex.join([sys.executable, *command])


def git_state(directory: Path) -> dict[str, Any]:
    """Name a program's commit, and whether files differ from it; None outside of a checkout.

    A program that was unpacked within the checkout of something else is none of its files.
    """
    try:
        _git(directory, "ls-files", "--error-unmatch", "train.py")
        commit = _git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit.removesuffix("-dirty"), "git_dirty": commit.endswith("-dirty")}


def _git(directory: Path, *arguments: str) -> str:
    # The files may be another user's, as where a group shares them: this one runs them anyway.
    command = ["git", "-C", str(directory), "-c", "safe.directory=*", *arguments]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return asked.stdout.strip()


def processor() -> str:
    """Name the processor; on Linux a file alone tells its model."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
