"""The tables in summary/ and a search's last lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from writer_search.common.files import is_there, read_dict, write_json, write_text
from writer_search.common.output import wrapped
from writer_search.common.text import counted, csv_text, one_line, percent, shown_value
from writer_search.results.chosen import best_copy, chosen_model
from writer_search.results.rows import (
    UNFINISHED,
    Row,
    best_row,
    count_complete,
    count_states,
    directory_of,
    is_interrupted,
    state_of,
)
from writer_search.space import fixed_of


class SummaryFiles:
    """Keeps summary/trials.csv and summary/best_trial.json up to date.

    A row is formatted when it is new or another one than before, and best_trial.json is written
    when the best trial is: a search of thousands of trials spends no longer on it than one of ten.
    """

    def __init__(self, checkpoint_dir: Path, fixed: Mapping[str, Any]) -> None:
        """fixed: hyperparameters that are the same in all trials; their columns say so."""
        self._checkpoint_dir, self._fixed = checkpoint_dir, dict(fixed)
        self._names: set[str] = set()  # of hyperparameters: the columns
        self._lines: dict[int, tuple[Row, str]] = {}  # by the trial's number
        self._best: Row | None = None

    def write(self, rows: Sequence[Row]) -> None:
        """Write what the rows change. Raises OSError."""
        directory = self._checkpoint_dir / "summary"
        directory.mkdir(exist_ok=True)
        write_text(directory / "trials.csv", self._table(rows))
        best = best_row(rows)
        if best is not None and best != self._best:
            write_json(directory / "best_trial.json", _described(best, self._checkpoint_dir))
            self._best = best

    def _is_known(self, row: Row) -> bool:
        known = self._lines.get(row.number)
        return known is not None and (known[0] is row or known[0] == row)

    def _table(self, rows: Sequence[Row]) -> str:
        changed = [row for row in rows if not self._is_known(row)]
        names = self._names.union(*(row.params for row in changed))
        if names != self._names:
            self._names, changed = names, list(rows)
        columns = sorted(self._names)
        for row in changed:
            cells = [*_cells(row, columns), *self._fixed.values()]
            self._lines[row.number] = (row, csv_text([[*cells, row.attributes.get("failure", "")]]))
        fixed = [f"{name} (fixed)" for name in self._fixed]
        header = ["number", "state", "value", "epochs", "seconds", *columns, *fixed, "failure"]
        return csv_text([header]) + "".join(self._lines[row.number][1] for row in rows)


def _described(best: Row, checkpoint_dir: Path) -> dict[str, Any]:
    found = directory_of(best.number, best.attributes, checkpoint_dir)
    is_own = found.parent.absolute() == checkpoint_dir.absolute()
    directory = Path(found.name) if is_own else found
    return {
        "number": best.number,
        "value": best.value,
        "metric": "validation macro top-1 accuracy",
        "params": best.params,
        "config": read_dict(found / "config.json").get("config"),
        "seconds": best.seconds,
        "directory": str(directory),
        "model": str(directory / "best_model.pth"),
    }


def _cells(row: Row, columns: Sequence[str]) -> list[Any]:
    return [
        row.number,
        row.state,
        "" if row.value is None else row.value,
        row.attributes.get("epochs", ""),
        f"{row.seconds:.1f}" if row.ended and row.seconds is not None else "",
        *(row.params.get(name, "") for name in columns),
    ]


def floor_lines(rows: Sequence[Row], space: Mapping[str, Any]) -> list[str]:
    """Say what the descriptor alone reaches, which a network has to beat; nothing without it.

    It is the value of the first draw, whose hyperparameters were known beforehand: not the best of
    many.   space: the study's, as its settings have it.
    """
    for row in rows:
        is_first = row.is_fitted and row.attributes.get("draw") == 0
        is_lda = row.params.get("cohog_head", space.get("cohog_head")) == "lda"
        if is_first and is_lda and row.state == "COMPLETE" and row.value is not None:
            return [f"CoHOG + LDA, no training: {percent(row.value)} (trial {row.number})"]
    return []


def keep_failing(rows: Sequence[Row], most: int) -> bool:
    """Tell whether the last trials, `most` of them, all failed by themselves, over all runs."""
    ended = [row for row in rows if row.state not in UNFINISHED]
    last = [row for row in ended if not is_interrupted(row.attributes)][-most:]
    return len(last) == most and all(row.state == "FAIL" for row in last)


def hyperparameter_lines(params: Mapping[str, Any], space: Mapping[str, Any]) -> list[str]:
    """List a trial's hyperparameters: those that were drawn, then those that were fixed.

    space: the study's, as its settings have it.
    """
    width = max((len(name) for name in params), default=0)
    lines = [f"  {name:<{width}}  {shown_value(value)}" for name, value in params.items()]
    fixed = fixed_of(space, params)
    if fixed:
        parts = [f"{name} {shown_value(value)}" for name, value in fixed.items()]
        first, *more = wrapped(parts, ", ", indent=len("  fixed: "))
        lines += [f"  fixed: {first}", *(f"         {line}" for line in more)]
    return lines


def count_line(rows: Sequence[Row]) -> str:
    """Count the trials by state; what was interrupted has not failed by itself."""
    states = count_states(rows)
    line = (
        f"Completed trials: {states['complete']} | pruned: {states['pruned']} | "
        f"failed: {states['failed']}"
    )
    return line + (f" | interrupted: {states['interrupted']}" if states["interrupted"] else "")


def closing_lines(
    checkpoint_dir: Path,
    rows: Sequence[Row],
    n_trials: int | None,
    space: Mapping[str, Any],
    *,
    model: Path | None = None,
    exhausted: bool = False,
    active: bool = False,
) -> list[str]:
    """Say how the search stands: counts, the best trial, where things are, what comes next.

    n_trials: None where nobody knows any more how many are wanted.   space: the study's, as its
    settings have it.   model: summary/best_model.pth, where it is of these trials.   exhausted: the
    space has no other configuration.   active: the search runs.
    """
    lines = [count_line(rows)]
    best = best_row(rows)
    if best is None:
        lines.append("No trial is complete yet.")
    else:
        lines.append(f"Best trial: {best.number}, validation macro top-1 {percent(best.value)}")
        lines += hyperparameter_lines(best.params, space)
        lines += floor_lines(rows, space)
        lines.append(_model_line(checkpoint_dir, rows, model))
    report = checkpoint_dir / "summary" / "report.html"
    if model is not None or report.exists():
        lines.append(f"Report: {report}")
    failed = [row for row in rows if state_of(row) == "failed" and "failure" in row.attributes]
    lines += [
        f"  trial {row.number} failed: {one_line(row.attributes['failure'], 160)}"
        for row in failed[-3:]
    ]
    exhausted = exhausted and not any(is_worth_a_new_start(row, rows) for row in rows)
    return [*lines, next_line(count_complete(rows), n_trials, exhausted, active)]


def _model_line(checkpoint_dir: Path, rows: Sequence[Row], copy: Path | None) -> str:
    """Say where the model to use is, and whose it is where it is not the best trial's."""
    chosen = chosen_model(checkpoint_dir, rows)
    assert chosen is not None, "there is a best trial"
    path = copy or chosen.directory / "best_model.pth"
    whose = f" of the confirmed winner, {chosen.name}" if chosen.is_confirmed else ""
    if is_there(path):
        return f"Model{whose}: {path}"
    stale = best_copy(checkpoint_dir)
    other = f"; {stale} may be another trial's" if stale.exists() else ""
    return f"Model{whose}: {path} (it is not there{other})"


def is_worth_a_new_start(failed: Row, rows: Sequence[Row]) -> bool:
    """Tell a trial that failed, or was interrupted, and has no other of its hyperparameters."""
    if failed.state != "FAIL":
        return False
    ended = (row for row in rows if row.state in ("COMPLETE", "PRUNED"))
    return all(row.params != failed.params for row in ended)


def was_cut_short(rows: Sequence[Row]) -> bool:
    """Tell whether an interrupted trial has hyperparameters with which none has ended by itself."""
    ended = [row.params for row in rows if state_of(row) in ("complete", "pruned", "failed")]
    return any(state_of(row) == "interrupted" and row.params not in ended for row in rows)


def saved_text(unsaved: Sequence[int]) -> str:
    """Say whether all running trials saved their state when they were stopped."""
    if not unsaved:
        return "everything is saved"
    trials = ", ".join(map(str, unsaved))
    return f"trial {trials} did not stop in time: only its last saved state, if any, is there"


def next_line(complete: int, n_trials: int | None, exhausted: bool, active: bool) -> str:
    """Say what comes next: by itself, or by the same command."""
    if n_trials is None:
        return "The same command goes on."
    missing = n_trials - complete
    if missing > 0 and exhausted:
        return (
            f"{missing} of {counted(n_trials, 'trial')} still missing, but the space has no other "
            "configuration: widen it in a fresh --checkpoint_dir"
        )
    if missing > 0 and active:
        return f"{missing} of {counted(n_trials, 'trial')} still to run."
    if missing > 0:
        return (
            f"{missing} of {counted(n_trials, 'trial')} still missing: the same command runs "
            f"{'it' if missing == 1 else 'them'}."
        )
    if missing < 0:
        return (
            f"{counted(complete, 'trial')} complete, more than --n_trials {n_trials} asks for: "
            f"a number above {complete} extends the search."
        )
    return "All trials are complete: the same command with a higher --n_trials extends."
