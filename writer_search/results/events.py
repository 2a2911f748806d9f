"""Tells a command of the user's own of every trial's end and of the search's: --on_event.

The command runs in the background, without a shell, and is given one line of JSON on its standard
input. Whatever becomes of it is no more than a warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from writer_search.common.environment import users_environment
from writer_search.common.text import one_line
from writer_search.results.rows import Row, best_row, count_states

LIMIT_SECONDS = 60.0  # a command that runs longer is ended
KILL_SECONDS = 1.0  # that a killed command has to be gone
LAST_SECONDS = 10.0  # so long the end of a search waits for what still runs
AT_ONCE = 8  # a command that hangs must not fill the machine
LAST = "search"  # the event at a search's end, which is always told


@dataclass(frozen=True)
class Call:
    """One run of the command, under way."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    event: str
    deadline: float


class Events:
    """Runs the command for each event, and never waits for it before the end."""

    def __init__(self, command: Sequence[str] | None) -> None:
        self._command = command
        self._calls: list[Call] = []

    def send(self, event: dict[str, Any]) -> None:
        """Start the command on an event."""
        if self._command is None:
            return
        self.look()
        if len(self._calls) >= AT_ONCE and event["event"] != LAST:
            self._warn(event["event"], f"not run: {AT_ONCE} of them are still running")
            return
        errors = None
        try:
            errors = tempfile.TemporaryFile()  # noqa: SIM115
            process = self._start(self._command, event, errors)
        except (OSError, ValueError) as error:
            if errors is not None:
                errors.close()
            self._warn(event["event"], f"cannot be run: {one_line(error)}")
            return
        deadline = time.monotonic() + LIMIT_SECONDS
        self._calls.append(Call(process, errors, event["event"], deadline))

    def _start(
        self, command: Sequence[str], event: dict[str, Any], errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        # A file, not a pipe: a command that does not read cannot hold the search up.
        with tempfile.TemporaryFile() as line:
            line.write(json.dumps(event).encode() + b"\n")
            line.seek(0)
            return subprocess.Popen(
                command,
                stdin=line,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=users_environment(),
                start_new_session=True,  # a Ctrl-C is not for it
            )

    def look(self, deadline: float = math.inf) -> None:
        """See what has ended, and end what runs beyond its deadline or this one."""
        for call in list(self._calls):
            code = call.process.poll()
            if code is None and time.monotonic() < min(call.deadline, deadline):
                continue
            self._calls.remove(call)
            with call.errors:
                if code is None:
                    # What it has started, too; another user's process cannot be ended.
                    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                        os.killpg(call.process.pid, signal.SIGKILL)
                        call.process.wait(KILL_SECONDS)
                    ended = call.process.poll() is not None
                    how = "was ended" if ended else "cannot be ended"
                    self._warn(call.event, f"took too long and {how}")
                elif code:
                    call.errors.seek(0)
                    said = call.errors.read()[-1000:].decode(errors="replace").strip()
                    last = said.splitlines()[-1] if said else "it said nothing"
                    self._warn(call.event, f"exit code {code}: {one_line(last)}")

    def seconds_to_next_deadline(self) -> float:
        soonest = min((call.deadline for call in self._calls), default=math.inf)
        return max(0.0, soonest - time.monotonic())

    def close(self) -> None:
        """Wait a little for what still runs, and end it then."""
        deadline = time.monotonic() + LAST_SECONDS
        for call in self._calls:
            with contextlib.suppress(subprocess.TimeoutExpired):
                call.process.wait(max(0.0, deadline - time.monotonic()))
        self.look(deadline=time.monotonic())

    def _warn(self, event: str, what: str) -> None:
        print(f"warning: --on_event at the end of a {event}: {what}", file=sys.stderr, flush=True)


def trial_event(
    checkpoint_dir: Path, number: int, rows: Sequence[Row], n_trials: int
) -> dict[str, Any]:
    """Describe the end of a trial."""
    row = next(row for row in rows if row.number == number)
    return {
        "event": "trial",
        **_common(checkpoint_dir, rows, n_trials),
        "number": number,
        "state": row.state,
        "value": row.value,
        "params": row.params,
        "epochs": row.attributes.get("epochs"),
        "seconds": row.seconds,
        "failure": row.attributes.get("failure"),
    }


def search_event(
    checkpoint_dir: Path, rows: Sequence[Row], n_trials: int, exit_code: int
) -> dict[str, Any]:
    """Describe the end of a search, or of this run of it."""
    return {
        "event": LAST,
        **_common(checkpoint_dir, rows, n_trials),
        "exit_code": exit_code,
    }


def _common(checkpoint_dir: Path, rows: Sequence[Row], n_trials: int) -> dict[str, Any]:
    best = best_row(rows)
    states = count_states(rows)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "n_trials": n_trials,
        "complete": states["complete"],
        "pruned": states["pruned"],
        "failed": states["failed"] + states["interrupted"],
        "interrupted": states["interrupted"],  # of those that failed
        "best": None
        if best is None
        else {"number": best.number, "value": best.value, "params": best.params},
    }
