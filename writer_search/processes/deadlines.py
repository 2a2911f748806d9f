"""What a batch system tells a job: when it will be ended."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

END_TIME = "SLURM_JOB_END_TIME"  # Unix seconds, from Slurm 23.02 on
SAVED_SECONDS = 60.0  # a trial's state is saved as often, at least
MARGIN_SECONDS = 60.0  # before the end: by then trials are told to save and stop


def stop_time(environment: Mapping[str, str]) -> float:
    """Give when trials must be told to stop, by time.monotonic(); infinity without a limit.

    A time that is no number, or has passed, was left by another job: it says nothing.
    """
    try:
        left = float(environment[END_TIME]) - time.time()
    except (KeyError, ValueError):
        return math.inf
    if not 0 < left < math.inf:
        return math.inf
    return time.monotonic() + max(0.0, left - MARGIN_SECONDS)


def longest_epoch(evidence: Sequence[tuple[float, float]]) -> float:
    """Estimate how long an epoch may take, with a trial's start: as long as the slowest trial's.

    evidence: (epochs, seconds) of trials; 0 without any.
    """
    return max((seconds / epochs for epochs, seconds in evidence if epochs >= 1), default=0.0)
