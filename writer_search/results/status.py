"""The state of a search, from its files alone: as a table, as JSON, or watched.

Works while the search runs, after it, and on a copy of the directory elsewhere, also one that
cannot be written. It imports no torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from writer_search.common.clock import seconds_since
from writer_search.common.files import read_dict
from writer_search.common.locks import is_locked, is_without_locks
from writer_search.common.text import duration, one_line, percent
from writer_search.results.chosen import CONFIRM
from writer_search.results.estimate import Range, range_text, recorded_left
from writer_search.results.rows import (
    STARTED_BY_CLOCK,
    Row,
    best_row,
    count_states,
    read_history,
    read_recorded,
    state_of,
    trained_seconds,
    trial_dir,
)
from writer_search.results.tables import closing_lines
from writer_search.space import fixed_of

STALLED_SECONDS = 300.0  # a running trial shows a sign of life at every batch
SHOWN_TRIALS = 12  # finished ones in the table
REFRESH_SECONDS = 2.0
LOOKS_BETWEEN_TRIALS = 5  # of a shared search, of which a trial that runs is the only sign


@dataclass(frozen=True)
class RunningStatus:
    """A trial that the study calls running. Values are fractions; None before the first epoch."""

    number: int
    epoch: int  # epochs done
    value: float | None
    best: float | None
    best_epoch: int | None
    seconds: float | None  # since its start; of the epochs done, where no search runs any more
    epoch_seconds: float  # what the epochs done took
    silent_seconds: float | None  # since its last sign of life
    stalled: bool
    host: str | None = None  # where it runs, if searches of several machines share the study
    note: str = ""  # what there is to say about it


@dataclass(frozen=True)
class Status:
    """How a search stands."""

    heading: str
    checkpoint_dir: Path
    active: bool  # whether a search runs: on this machine, or any that shares the study
    holder: str | None  # pid, host and start of the one on this machine
    n_trials: int | None  # None where no run has begun since the study was made, or rebuilt
    epochs: int
    rows: Sequence[Row]
    running: Sequence[RunningStatus]
    left: Range | None  # seconds; None when it cannot be known, or nothing runs
    space: Mapping[str, Any]  # the study's, as its settings have it
    exhausted: bool  # the last run has found no other configuration


def read_status(checkpoint_dir: Path) -> Status:
    """Read how a search stands; changes nothing. Raises UserError."""
    rows, recorded = read_recorded(checkpoint_dir)
    has_no_locks = is_without_locks(checkpoint_dir)
    active = is_locked(checkpoint_dir) or has_no_locks
    confirms = is_locked(checkpoint_dir / CONFIRM)
    run = recorded.get("run", {})
    settings = recorded.get("settings", {})
    running = [_running(checkpoint_dir, row, active) for row in rows if row.state == "RUNNING"]
    left = None
    if active and not confirms:
        timed = {trial.number: (float(trial.epoch), trial.epoch_seconds) for trial in running}
        left = recorded_left(rows, timed, _to_start(run, rows), run.get("n_jobs", 1), settings)
    holder = _holder(checkpoint_dir) if active else None
    runs = f"running ({holder})" if holder else "running" if active else "not running"
    if has_no_locks:
        runs = "it cannot be told whether it runs, on a file system without locks"
    if confirms:
        runs += f", confirms: see --checkpoint_dir {checkpoint_dir / CONFIRM} --status"
    return Status(
        heading=f"{checkpoint_dir}: {runs}",
        checkpoint_dir=checkpoint_dir,
        active=active,
        holder=holder,
        n_trials=run.get("n_trials"),
        epochs=int(settings.get("epochs", 0)),
        rows=rows,
        running=running,
        left=left,
        space=settings.get("space", {}),
        exhausted=bool(run.get("exhausted")),
    )


def _to_start(run: dict[str, Any], rows: Sequence[Row]) -> int:
    """Count the trials that the present run may still start."""
    began = run.get("first_trial", 0)
    started = sum(row.number >= began and row.state != "WAITING" for row in rows)
    return max(0, int(run.get("to_start", 0)) - int(started))


def _holder(checkpoint_dir: Path) -> str | None:
    try:
        return one_line((checkpoint_dir / "search.lock").read_text(errors="replace")) or None
    except OSError:
        return None


def _running(checkpoint_dir: Path, row: Row, active: bool) -> RunningStatus:
    directory = trial_dir(checkpoint_dir, row.number)
    history = read_history(directory)
    values = [float(epoch["macro_top1"]) for epoch in history]
    best = max(values, default=None)
    took = trained_seconds(history)
    silent = _seconds_silent(directory) if active else None
    quiet = silence(silent)
    return RunningStatus(
        number=row.number,
        epoch=len(history),
        value=values[-1] if values else None,
        best=best,
        best_epoch=None if best is None else values.index(best) + 1,
        seconds=_seconds_since_start(directory, row) if active else took,
        epoch_seconds=took,
        silent_seconds=silent,
        stalled=bool(quiet),
        note=quiet if active else "cut off: the next start records it as interrupted",
    )


def _seconds_since_start(directory: Path, row: Row) -> float | None:
    """Ask the clock that the search itself has asked, if this is its machine."""
    measured = seconds_since(read_dict(directory / "config.json").get(STARTED_BY_CLOCK))
    return row.seconds if measured is None else measured


def silence(seconds: float | None) -> str:
    """Say that a trial has shown no sign of life for long; nothing where it has."""
    if seconds is None or seconds <= STALLED_SECONDS:
        return ""
    return f"stalled: no sign of life for {duration(seconds)}"


def _seconds_silent(directory: Path) -> float | None:
    """Tell how long ago a trial's process last did anything: it touches its log while it works."""
    signs = [directory / name for name in ("config.json", "train.log", "history.jsonl")]
    times = [sign.stat().st_mtime for sign in signs if sign.exists()]
    return max(0.0, time.time() - max(times)) if times else None


# ------------------------------------------------------------------------------------ for programs


def status_json(status: Status) -> str:
    """Describe a search as JSON: fractions, seconds, ISO times; null for what is not known."""
    best = best_row(status.rows)
    described = {
        "search": status.heading,
        "checkpoint_dir": str(status.checkpoint_dir),
        "active": status.active,
        "holder": status.holder,
        "n_trials": status.n_trials,
        "epochs": status.epochs,
        "states": dict(Counter(row.state for row in status.rows)),
        "interrupted": count_states(status.rows)["interrupted"],  # of those in state FAIL
        "best": None
        if best is None
        else {
            "number": best.number,
            "value": best.value,
            "params": best.params,
            "fixed": fixed_of(status.space, best.params),
        },
        "seconds_left": None
        if status.left is None
        else {"low": round(status.left[0], 1), "high": round(status.left[1], 1)},
        "running": [asdict(trial) for trial in status.running],
        "trials": [_trial(row) for row in status.rows],
    }
    return json.dumps(described, indent=2, allow_nan=False)


def _trial(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "state": row.state,
        "value": row.value,
        "epochs": row.attributes.get("epochs"),
        "seconds": row.seconds if row.ended else None,
        "started": row.started.isoformat() if row.started else None,
        "ended": row.ended.isoformat() if row.ended else None,
        "failure": row.attributes.get("failure"),
        "interrupted": state_of(row) == "interrupted",
        "params": row.params,
    }


# -------------------------------------------------------------------------------------- for people


def status_text(status: Status) -> str:
    """Describe a search as a table for a terminal."""
    lines = [status.heading]
    if status.rows:
        lines += ["", *_table(status), ""]
    if status.active:
        lines.append(f"Time left: {range_text(status.left)}")
    lines += closing_lines(
        *(status.checkpoint_dir, status.rows, status.n_trials, status.space),
        exhausted=status.exhausted,
        active=status.active,
    )
    return "\n".join(lines)


def _table(status: Status) -> list[str]:
    lines = ["trial  state        epochs    value     best  time"]
    most = {row.number: 1 if row.is_fitted else status.epochs for row in status.rows}
    for trial in status.running:
        lines.append(
            _line(
                trial.number,
                "running" if status.active else "cut off",
                f"{trial.epoch}/{most[trial.number]}",
                _value(trial.value),
                _value(trial.best),
                _running_time(trial),
            )
        )
    finished = sorted(
        (row for row in status.rows if row.ended is not None),
        key=lambda row: (-(row.value if row.value is not None else -1.0), row.number),
    )
    for row in finished[:SHOWN_TRIALS]:
        took = "" if row.seconds is None else duration(row.seconds)
        epochs = f"{row.attributes.get('epochs', 0)}/{most[row.number]}"
        lines.append(_line(row.number, state_of(row), epochs, "", _value(row.value), took))
    if len(finished) > SHOWN_TRIALS:
        lines.append(f"       and {len(finished) - SHOWN_TRIALS} more: summary/trials.csv has all")
    return lines


def _line(number: int, state: str, epochs: str, value: str, best: str, time: str) -> str:
    return f"{number:5d}  {state:<11}  {epochs:>6}  {value:>7}  {best:>7}  {time}".rstrip()


def _value(value: float | None) -> str:
    return "" if value is None else percent(value)


def _running_time(trial: RunningStatus) -> str:
    where = f" on {one_line(trial.host, 40)}" if trial.host else ""
    took = "" if trial.seconds is None else duration(trial.seconds)
    return took + where + (f" | {trial.note}" if trial.note else "")


def show(
    read: Callable[[], Status], as_json: bool, again: bool, stream: TextIO, looks: int = 1
) -> None:
    """Print how a search stands: as JSON, as a table, or again and again. Raises UserError.

    looks: so many in a row have to find nothing that runs before a search has ended.
    """
    if again:
        watch(read, stream, looks)
    else:
        print(status_json(read()) if as_json else status_text(read()), file=stream)


def watch(read: Callable[[], Status], stream: TextIO, looks: int = 1) -> None:
    """Print the table again and again in place, until the search ends or Ctrl-C.

    Prints it once where the output is no terminal. Raises UserError.
    """
    on_terminal, printed, idle = stream.isatty(), 0, 0
    try:
        while True:
            status = read()
            lines = status_text(status).splitlines()
            if on_terminal:
                columns, rows = shutil.get_terminal_size()
                # A line that wraps, or scrolls away, could not be overwritten.
                lines = [line[: columns - 1] for line in lines[: rows - 1]]
                if printed:
                    stream.write(f"\x1b[{printed}F\x1b[J")
            stream.write("\n".join(lines) + "\n")
            stream.flush()
            printed = len(lines)
            idle = 0 if status.active else idle + 1
            if not on_terminal or idle >= looks:
                return
            time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        return
