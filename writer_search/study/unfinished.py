"""Trials that a search left unfinished: settling them, and going on with them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from writer_search.common.files import read_signed, remove_temporaries
from writer_search.common.text import counted
from writer_search.processes.causes import THE_SAME_COMMAND
from writer_search.results.estimate import BEFORE
from writer_search.results.rows import (
    SECONDS,
    directory_of,
    has_saved,
    is_fitted,
    is_interrupted,
    is_resumable,
    read_history,
    trained_seconds,
    trial_dir,
)
from writer_search.space import Space, first_trials
from writer_search.study.records import finished_value, tell, write_error_log, write_record

# In a row without one batch more: what ends a trial so often is the trial itself.
MAX_CONTINUATIONS = 3


def settle_unfinished(study: optuna.Study, checkpoint_dir: Path) -> list[str]:
    """Finish what a dead search left RUNNING; under the lock, RUNNING means dead.

    A trial whose metrics.json is there had finished, and is told so. Any other failed. Also writes
    records that are missing or damaged. Returns a line for each trial that was settled.
    """
    settled = []
    for directory in [*checkpoint_dir.glob("trial_*"), checkpoint_dir / "summary"]:
        remove_temporaries(directory)
    for trial in study.get_trials(deepcopy=False):
        directory = trial_dir(checkpoint_dir, trial.number)
        if trial.state == TrialState.RUNNING:
            settled.append(settle(study, checkpoint_dir, trial))
        elif trial.state.is_finished() and not read_signed(directory / "trial.json"):
            if is_interrupted(trial.user_attrs) and not (directory / "error.log").exists():
                # Cut off, and its database damaged or lost besides.
                epochs = trial.user_attrs.get("epochs") or None
                write_error_log(directory, trial.user_attrs["failure"], epoch=epochs)
            write_record(checkpoint_dir, trial)
    return settled


CUT_OFF = "kill -9, power loss or out-of-memory kill of the search"


def settle(
    study: optuna.Study,
    checkpoint_dir: Path,
    trial: FrozenTrial,
    why: str = CUT_OFF,
    written: Path | None = None,
) -> str:
    """Finish a trial whose search is dead; returns what became of it, in a line.

    written: the checkpoint directory to write to, where the trial's own can only be read.
    """
    directory = trial_dir(checkpoint_dir, trial.number)
    if written is None:
        written = checkpoint_dir
        remove_temporaries(directory)
    epochs = len(trial.intermediate_values)
    most = study.user_attrs.get("settings", {}).get("epochs", epochs + 1)
    handle = Trial(study, trial._trial_id)  # Optuna has no public way to a trial that runs
    reported = set(trial.intermediate_values)
    history = read_history(directory)
    for row in history:  # epochs that were saved, but not told any more
        if row["epoch"] not in reported:
            epochs = max(epochs, row["epoch"])
            if not is_fitted(trial.params, trial.user_attrs):  # which has no curve
                handle.report(row["macro_top1"], row["epoch"])
    is_here = (directory / "config.json").exists()  # and not on another machine, out of reach
    if is_here:  # its end is not now: it has been dead for a while
        before = epochs_before(study.get_trials(deepcopy=False), trial)
        handle.set_user_attr(SECONDS, trained_seconds(history, before))
        if before:
            handle.set_user_attr(BEFORE, before)
    value = finished_value(directory)
    if value is not None:
        handle.set_user_attr("epochs", epochs)
        tell(study, written, trial.number, TrialState.COMPLETE, value)
        return f"trial {trial.number} had finished with {100 * value:.2f}%: recorded"
    cause = f"cut off without a word at epoch {min(epochs + 1, most)}: {why}"
    write_error_log(
        trial_dir(written, trial.number),
        cause,
        epoch=epochs or None,
        advice=THE_SAME_COMMAND,
    )
    handle.set_user_attr("epochs", epochs)
    handle.set_user_attr("failure", cause)
    handle.set_user_attr("interrupted", True)
    if is_here:
        handle.set_user_attr("advanced", has_saved(directory))
    tell(study, written, trial.number, TrialState.FAIL)
    epoch = min(epochs + 1, most)
    return f"trial {trial.number} was cut off at epoch {epoch}: recorded as interrupted"


def epochs_before(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """Give the epochs that a trial has only reported again, of the one that it continues."""
    earlier = trial.user_attrs.get("continues")
    return 0 if earlier is None else int(trials[earlier].user_attrs.get("epochs", 0))


def continued(all_of_them: bool, space: Space) -> dict[str, Container[int]]:
    """Say which interrupted trials a search goes on with, as `continuations` wants it.

    all_of_them: otherwise the known-good ones that it begins with, so that none ends below them.
    """
    return {} if all_of_them else {"draw": range(len(first_trials(space)))}


def continue_interrupted(study: optuna.Study, only: Mapping[str, Container[int]]) -> list[str]:
    """Let a waiting trial follow each one that was broken off, with its hyperparameters and seed.

    only: see `continuations`. Returns a line for each such trial.
    """
    lines = []
    trials = study.get_trials(deepcopy=False)
    for trial in continuations(trials, only):
        study.add_trial(trial)
        number = trial.user_attrs["continues"]
        how = "was interrupted" if is_interrupted(trials[number].user_attrs) else "had failed"
        lines.append(f"trial {number} {how}: a new trial goes on with it")
    return lines


def told_of_checkpoints(study: optuna.Study, checkpoint_dir: Path) -> list[str]:
    """Say in a line how many epochs trials have saved that nobody goes on with."""
    saved = []
    for trial in continuations(study.get_trials(deepcopy=False), {}):
        number = trial.user_attrs["continues"]
        directory = trial_dir(checkpoint_dir, number)
        if has_saved(directory):
            saved.append(len(read_history(directory)))
    if not sum(saved):
        return []
    return [
        f"{counted(len(saved), 'unfinished trial')} saved {counted(sum(saved), 'epoch')}: "
        f"--continue_interrupted goes on with {'it' if len(saved) == 1 else 'them'}"
    ]


def continuations(
    trials: Sequence[FrozenTrial],
    only: Mapping[str, Container[int]],
    state: TrialState = TrialState.WAITING,
) -> Iterator[FrozenTrial]:
    """Give a trial to follow each one that was broken off, with its hyperparameters and seed.

    That is: interrupted, killed, or without room on the disk; a trial that failed by itself is not
    followed. Once for each break, but not after MAX_CONTINUATIONS in a row that brought it no
    further.   only: attribute → its values in the trials that are followed; empty: all of them
    """
    # A fleet, whose trials run at once, starts no waiting one: it came with a copied study.
    waits = state == TrialState.WAITING
    followed = {
        t.user_attrs.get("continues")
        for t in trials
        if (waits or t.state != TrialState.WAITING) and not t.user_attrs.get("surplus")
    }
    for trial in trials:
        attributes = trial.user_attrs
        if trial.state != TrialState.FAIL or not is_resumable(attributes):
            continue
        if trial.number in followed or "seed" not in attributes:
            continue
        if any(attributes.get(name) not in values for name, values in only.items()):
            continue
        if _in_vain(trials, trial) >= MAX_CONTINUATIONS:
            continue
        yield create_trial(
            state=state,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={
                **{n: attributes[n] for n in ("draw", "seed", "backbone") if n in attributes},
                "continues": trial.number,
                "continued": attributes.get("continued", 0) + 1,
            },
        )


def _in_vain(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """Count the continuations in a row, up to this trial, that brought it no further."""
    chain = [trial, *continued_by(trials, trial)]
    epochs = [link.user_attrs.get("epochs", 0) for link in chain]
    for number, link in enumerate(chain[:-1]):
        # Earlier versions noted whole epochs alone, as does who cannot see a trial's files.
        if link.user_attrs.get("advanced", epochs[number] > max(epochs[number + 1 :])):
            return number
    return len(chain) - 1


def continued_by(
    trials: Sequence[FrozenTrial], trial: FrozenTrial | Trial
) -> Iterator[FrozenTrial]:
    """Give the trials that a trial goes on with, the last of them first."""
    number = trial.user_attrs.get("continues")
    while number is not None:
        yield trials[number]
        number = trials[number].user_attrs.get("continues")


def checkpoint_to_continue(study: optuna.Study, checkpoint_dir: Path, trial: Trial) -> Path | None:
    """Give the directory of the newest checkpoint among the trials that this one continues."""
    if "continues" not in trial.user_attrs:
        return None  # most are new draws: no need to read all trials
    for earlier in continued_by(study.get_trials(deepcopy=False), trial):
        directory = directory_of(earlier.number, earlier.user_attrs, checkpoint_dir)
        if has_saved(directory):
            return directory
    return None
