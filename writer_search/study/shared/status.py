"""The state of a search that several machines share, from its storage alone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from writer_search.common.text import counted
from writer_search.results.estimate import recorded_left, unbroken
from writer_search.results.rows import count_complete, is_surplus, rows_of
from writer_search.results.status import RunningStatus, Status, silence
from writer_search.study.unfinished import epochs_before


def shared_status(study: optuna.Study, where: str, checkpoint_dir: Path | None) -> Status:
    """Describe a search from its storage alone."""
    trials = study.get_trials(deepcopy=False)
    recorded = study.user_attrs
    run = recorded.get("run", {})
    n_trials = run.get("n_trials")
    settings = recorded.get("settings", {})
    rows = rows_of(trials)
    times = {row.number: row.seconds for row in rows}
    running = [
        _running(trial, times[trial.number])
        for trial in trials
        if trial.state == TrialState.RUNNING and not is_surplus(trial)
    ]
    left = None
    if running:
        timed = {
            one.number: unbroken(
                one.epoch, epochs_before(trials, trials[one.number]), one.epoch_seconds
            )
            for one in running
        }
        to_start = max(0, (n_trials or 0) - len(running) - count_complete(rows))
        left = recorded_left(rows, timed, to_start, len(running), settings)
    return Status(
        heading=f"{where}: {counted(len(running), 'trial')} running",
        checkpoint_dir=checkpoint_dir or Path(run.get("checkpoint_dir", ".")),
        active=bool(running),
        holder=None,
        n_trials=n_trials,
        epochs=int(settings.get("epochs", 0)),
        rows=rows,
        running=running,
        left=left,
        space=settings.get("space", {}),
        exhausted=bool(run.get("exhausted")),
    )


def _running(trial: FrozenTrial, seconds: float | None) -> RunningStatus:
    values = trial.intermediate_values
    best = max(values.values(), default=None)
    owner = trial.user_attrs.get("owner")
    silent = None if owner is None else _seconds_silent(trial)  # by its host's clock and ours
    return RunningStatus(
        number=trial.number,
        epoch=max(values, default=0),
        value=values[max(values)] if values else None,
        best=best,
        best_epoch=min((e for e, value in values.items() if value == best), default=None),
        seconds=seconds,
        epoch_seconds=seconds or 0.0,
        silent_seconds=silent,
        stalled=bool(silence(silent)),
        host=None if owner is None else str(owner["host"]),
        note="its search is no longer running" if owner is None else silence(silent),
    )


def _seconds_silent(trial: FrozenTrial) -> float:
    sign = datetime.fromisoformat(trial.user_attrs["alive"])
    return max(0.0, (datetime.now(UTC) - sign).total_seconds())
