"""A clock that nobody sets, for durations between two processes of one machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def now() -> dict[str, Any]:
    """Read the clock: seconds since an unknown moment, and since which start of the machine."""
    return {"boot": _boot(), "seconds": round(time.monotonic(), 3)}


def seconds_since(reading: Any) -> float | None:
    """Give the seconds since a reading; None where it is none, or not of this machine's clock."""
    if not isinstance(reading, dict) or reading.get("boot") != _boot():
        return None
    began = reading.get("seconds")
    return max(0.0, time.monotonic() - began) if isinstance(began, float) else None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
