"""What ran where: command, commit, machine, versions."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(data_root: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Say what ran where: for config.json."""
    packages = ("optuna", "numpy", "pillow")
    return {
        "data_root": str(data_root),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "device_names": machine["device_names"],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            **machine["versions"],
        },
    }


def _git_commit() -> str | None:
    """Name the program's commit, "-dirty" when files differ from it; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
