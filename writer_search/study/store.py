"""The Optuna study: opening it, what it records about itself, drawing and recording trials.

Only the search process touches the study, and only under the directory's lock.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import OptunaError
from optuna.pruners import (
    BasePruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from writer_search.common.files import UserError, one_line, read_json, write_json, write_text
from writer_search.config import Space, TrialConfig, baseline, suggest
from writer_search.results.rows import DATABASE, STUDY_NAME, home_of, read_history, trial_dir

STARTUP_TRIALS = 5
REDRAWS = 100
# SQLite's codes for what the system keeps from being written; the database itself is whole.
UNWRITABLE = {
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY),
}
# In a row without one epoch more: what ends a trial so often is the trial itself.
MAX_CONTINUATIONS = 3


class SpaceExhaustedError(Exception):
    """Every configuration of a finite space has been drawn."""


# ---------------------------------------------------------------------------- opening and settings


def open_study(checkpoint_dir: Path) -> optuna.Study:
    """Open the study in the checkpoint directory, or create it there.

    Raises UserError when the file cannot be used: another version's, or damaged where only Optuna
    looks.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = checkpoint_dir / DATABASE
    try:
        storage = optuna.storages.RDBStorage(
            str(URL.create("sqlite", database=str(database))),
            # Others may read, and a dashboard may even hold the file for a moment.
            engine_kwargs={"connect_args": {"timeout": 60}},
        )
        study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=storage,
            direction=StudyDirection.MAXIMIZE,
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)
    except RuntimeError as error:  # Optuna's word on another version of its tables
        raise UserError(f"{database}: {one_line(error)}") from None
    except (OptunaError, SQLAlchemyError, LookupError, ValueError, TypeError) as error:
        way_out = (
            "mend that, and the same command goes on"
            if _is_unwritable(error)
            else "--recover rebuilds it from the trial directories"
        )
        raise UserError(
            f"{database} cannot be used ({one_line(error.__cause__ or error)}); {way_out}"
        ) from None
    return study


def _is_unwritable(error: BaseException | None) -> bool:
    """Tell a database that the system keeps from being written from a damaged one."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__
    return error is not None and getattr(error, "sqlite_errorcode", 0) & 0xFF in UNWRITABLE


def record_settings(study: optuna.Study, settings: Mapping[str, Any]) -> None:
    """Record what makes the study's trials comparable, or check it against what is recorded.

    Raises UserError with the differences: Optuna itself would accept most of them silently.
    """
    recorded = study.user_attrs.get("settings")
    if recorded is None:
        study.set_user_attr("settings", dict(settings))
        return
    refuse_changes(recorded, settings)


def refuse_changes(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming each difference, when settings differ from the recorded ones."""
    old, new = _flat(recorded), _flat(json.loads(json.dumps(wanted)))
    changes = [
        f"{name}: {old.get(name, 'absent')} in the study, {new.get(name, 'absent')} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise UserError(
            "this search was started with other settings, and its trials could not be compared "
            f"with new ones: {'; '.join(one_line(c, 200) for c in changes)}; "
            "give the old settings, or a fresh --checkpoint_dir"
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and prefix != "space.":  # a range is told as one
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Build a sampler. Raises UserError for gp without scipy."""
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "gp":
        try:
            import scipy  # type: ignore[import-untyped, import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            raise UserError("--sampler gp needs scipy: pip install scipy") from None
        return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def warm_up_epochs(epochs: int) -> int:
    """Give how many epochs a trial trains before a pruner judges it: a fifth of them."""
    return epochs // 5


def make_pruner(name: str, epochs: int) -> BasePruner:
    """Build a pruner, which judges no trial before `warm_up_epochs`."""
    warm_up = warm_up_epochs(epochs)
    if name == "median":
        return MedianPruner(STARTUP_TRIALS, warm_up)
    if name == "percentile":
        return PercentilePruner(75.0, STARTUP_TRIALS, warm_up)
    if name == "halving":
        return SuccessiveHalvingPruner(min_resource=max(1, warm_up))
    return NopPruner()


# ----------------------------------------------------------------------------------------- drawing


@dataclass
class Draws:
    """What was drawn so far: the last draw's number, and the hyperparameters, as text."""

    last: int = -1
    taken: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)  # of these, by trials that were not interrupted

    def add(self, trial: FrozenTrial) -> None:
        attributes = trial.user_attrs
        self.last = max(self.last, attributes.get("draw", -1))
        if attributes.get("surplus"):
            return
        key = params_key(trial.params)
        self.taken.add(key)
        if not attributes.get("interrupted"):
            self.tried.add(key)

    def copy(self) -> Draws:
        return Draws(self.last, set(self.taken), set(self.tried))


class Drawer:
    """Draws hyperparameters in a study in memory, so that a repeated draw leaves no trace.

    The study in memory mirrors the finished trials of the real one; drawing there needs no queries.
    """

    def __init__(self, space: Space, sampler: str, seed: int, salt: Sequence[int] = ()) -> None:
        """salt: a number of its own for each of several searches that draw at once."""
        self._space, self._sampler, self._seed, self._salt = space, sampler, seed, tuple(salt)
        self._memory = optuna.create_study(direction=StudyDirection.MAXIMIZE)
        self._intersection = IntersectionSearchSpace(include_pruned=True)
        # Of the finished trials, which never change again; a draw looks at the other ones only.
        self._finished: set[int] = set()
        self._settled = 0  # so many of the first trials have finished
        self._draws = Draws()

    def ask(self, study: optuna.Study) -> Trial:
        """Start the next trial: one that waits in the study, or a new draw.

        A draw is stored in one step, whole, waiting; then started. Whatever kills the search in
        between, the draw is neither lost nor drawn again. Raises SpaceExhaustedError.
        """
        trials = study.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials[self._settled :]):
            study.add_trial(self.new_draw(trials))
        return study.ask()

    def new_draw(
        self, trials: Sequence[FrozenTrial], state: TrialState = TrialState.WAITING
    ) -> FrozenTrial:
        """Draw parameters that no trial has, as a trial that waits, or runs. Stores nothing.

        The sampler is made afresh from (seed, draws so far, attempt): one that was seeded once
        would repeat its draws after each restart.
        """
        unfinished = self._learn(trials)
        draws = self._draws.copy()
        for trial in unfinished:
            draws.add(trial)
        number, taken = draws.last + 1, draws.taken
        running = [trial for trial in unfinished if trial.state == TrialState.RUNNING]
        placeholders = self._add_to_memory(running)  # TPE keeps away from them
        try:
            for attempt in range(2 * REDRAWS):
                drawn = self._draw(number, attempt)
                # Where a finite space has nothing else, what was interrupted is worth a new start.
                if params_key(drawn.params) not in (taken if attempt < REDRAWS else draws.tried):
                    seed = _seed(self._seed, number, 0, *self._salt)
                    return create_trial(
                        state=state,
                        params=drawn.params,
                        distributions=drawn.distributions,
                        user_attrs={"draw": number, "seed": seed},
                    )
        finally:
            for placeholder in placeholders:
                self._memory.tell(placeholder, state=TrialState.FAIL)  # samplers pass over these
        raise SpaceExhaustedError(f"{len(taken)} different configurations were drawn")

    def _learn(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take in the trials that have finished since the last draw; returns the unfinished ones.

        trials: all of the study, by number.
        """
        later = trials[self._settled :]
        finished = [t for t in later if t.state.is_finished() and t.number not in self._finished]
        self._add_to_memory(finished)
        self._finished.update(trial.number for trial in finished)
        for trial in finished:
            self._draws.add(trial)
        unfinished = [trial for trial in later if not trial.state.is_finished()]
        self._settled = unfinished[0].number if unfinished else len(trials)
        return unfinished

    def _add_to_memory(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """Copy what samplers look at into the study in memory; returns the trials' numbers there.

        Optuna's own way, a deep copy of the whole, makes each later look at the originals slower:
        it reads their `__dict__`, and CPython then keeps their attributes apart from them.
        """
        first = len(self._memory.get_trials(deepcopy=False)) if trials else 0
        for trial in trials:
            self._memory.add_trial(
                create_trial(
                    state=trial.state,
                    value=trial.value,
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=trial.intermediate_values,
                )
            )
        return list(range(first, first + len(trials)))

    def _draw(self, number: int, attempt: int) -> FrozenTrial:
        name = self._sampler if attempt < 5 else "random"  # a learning sampler may insist
        sampler = make_sampler(name, _seed(self._seed, number, attempt, *self._salt))
        if isinstance(sampler, TPESampler):
            # It remembers which trials it has seen; a new one would go through all at each draw.
            sampler._search_space = self._intersection
        self._memory.sampler = sampler
        if number == 0 and attempt == 0:
            self._memory.enqueue_trial(baseline(self._space))
        trial = self._memory.ask()
        suggest(trial, self._space)
        return self._memory.tell(trial, state=TrialState.FAIL)


def params_key(params: Mapping[str, Any]) -> str:
    """Give equal hyperparameters equal text."""
    return json.dumps(params, sort_keys=True)


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def config_of(trial: Trial, space: Space, settings: Mapping[str, Any], seed: int) -> TrialConfig:
    """Give a trial's configuration. Raises UserError when it breaks a limit."""
    values: dict[str, Any] = suggest(trial, space)
    return TrialConfig(
        # A trial that was enqueued by hand has no draw number.
        seed=trial.user_attrs.get("seed", _seed(seed, 2**31 + trial.number)),
        epochs=settings["epochs"],
        patience=settings["patience"],
        pretrained=settings["weights"] == "imagenet",
        precision=settings["precision"].get(values["backbone"], "float32"),
        **values,
    )


# --------------------------------------------------------------------------------------- recording


def tell(
    study: optuna.Study,
    checkpoint_dir: Path,
    number: int,
    state: TrialState,
    value: float | None = None,
) -> None:
    """Finish a trial in the study, then write its trial.json."""
    write_record(checkpoint_dir, study.tell(number, value, state=state))


def write_record(checkpoint_dir: Path, trial: FrozenTrial) -> None:
    """Write a finished trial's trial.json: all that it takes to rebuild the study's row."""
    directory = trial_dir(checkpoint_dir, trial.number)
    directory.mkdir(exist_ok=True)
    write_json(
        directory / "trial.json",
        {
            "number": trial.number,
            "state": trial.state.name,
            "value": trial.value,
            "params": trial.params,
            "distributions": distributions_of(trial),
            "intermediate_values": trial.intermediate_values,
            "datetime_start": _iso(trial.datetime_start),
            "datetime_complete": _iso(trial.datetime_complete),
            "user_attrs": trial.user_attrs,
        },
    )


def distributions_of(trial: Trial | FrozenTrial) -> dict[str, str]:
    """Describe the distributions of a trial's hyperparameters, as Optuna stores them."""
    return {name: distribution_to_json(d) for name, d in trial.distributions.items()}


def _iso(naive_local: datetime | None) -> str | None:
    """Optuna's trials carry naive local times."""
    return naive_local.astimezone(UTC).isoformat() if naive_local else None


def write_error_log(
    directory: Path, cause: str, *, epoch: int | None, traceback: str = "", advice: str = ""
) -> None:
    """Write error.log: when, where, why in one line, the traceback, what to try."""
    lines = [
        f"when:   {datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"epochs: {epoch or 0} done",
        f"cause:  {cause}",
    ]
    if advice:
        lines.append(f"try:    {advice}")
    if traceback:
        lines += ["", traceback.rstrip()]
    directory.mkdir(exist_ok=True)
    write_text(directory / "error.log", "\n".join(lines) + "\n")


def settle_unfinished(study: optuna.Study, checkpoint_dir: Path) -> list[str]:
    """Finish what a dead search left RUNNING; under the lock, RUNNING means dead.

    A trial whose metrics.json is there had finished, and is told so. Any other failed. Also writes
    records that are missing. Returns a line for each trial that was settled.
    """
    settled = []
    for leftover in [
        *checkpoint_dir.glob("trial_*/.*.tmp"),
        *checkpoint_dir.glob("summary/.*.tmp"),
    ]:
        leftover.unlink(missing_ok=True)  # half-written by a process that was killed
    for trial in study.get_trials(deepcopy=False):
        directory = trial_dir(checkpoint_dir, trial.number)
        if trial.state == TrialState.RUNNING:
            settled.append(settle(study, checkpoint_dir, trial))
        elif trial.state.is_finished() and not (directory / "trial.json").exists():
            write_record(checkpoint_dir, trial)
    return settled


CUT_OFF = "kill -9, power loss or out-of-memory kill of the search"


def settle(
    study: optuna.Study, checkpoint_dir: Path, trial: FrozenTrial, why: str = CUT_OFF
) -> str:
    """Finish a trial whose search is dead; returns what became of it, in a line."""
    directory = trial_dir(checkpoint_dir, trial.number)
    epochs = len(trial.intermediate_values)
    most = study.user_attrs.get("settings", {}).get("epochs", epochs + 1)
    handle = Trial(study, trial._trial_id)  # Optuna has no public way to a trial that runs
    reported = set(trial.intermediate_values)
    for row in read_history(directory):  # epochs that were saved, but not told any more
        if row["epoch"] not in reported:
            handle.report(row["macro_top1"], row["epoch"])
            epochs = max(epochs, row["epoch"])
    value = finished_value(directory)
    if value is not None:
        handle.set_user_attr("epochs", epochs)
        tell(study, checkpoint_dir, trial.number, TrialState.COMPLETE, value)
        return f"trial {trial.number} had finished with {100 * value:.2f}%: recorded"
    cause = f"cut off without a word at epoch {min(epochs + 1, most)}: {why}"
    write_error_log(
        directory,
        cause,
        epoch=epochs or None,
        advice="nothing to do: the search goes on with new draws",
    )
    handle.set_user_attr("epochs", epochs)
    handle.set_user_attr("failure", cause)
    handle.set_user_attr("interrupted", True)
    tell(study, checkpoint_dir, trial.number, TrialState.FAIL)
    return f"trial {trial.number} was cut off at epoch {min(epochs + 1, most)}: recorded as failed"


def continue_interrupted(study: optuna.Study, seeds: Container[int] | None = None) -> list[str]:
    """Let a waiting trial follow each interrupted one, with its hyperparameters and seed.

    seeds: those of the trials to go on with; None: of all. Returns a line for each such trial.
    """
    lines = []
    for trial in continuations(study.get_trials(deepcopy=False)):
        if seeds is not None and trial.user_attrs["seed"] not in seeds:
            continue
        study.add_trial(trial)
        number = trial.user_attrs["continues"]
        lines.append(f"trial {number} was interrupted: a new trial goes on with it")
    return lines


def continuations(
    trials: Sequence[FrozenTrial], state: TrialState = TrialState.WAITING
) -> Iterator[FrozenTrial]:
    """Give a trial to follow each interrupted one, with its hyperparameters and seed.

    Once for each interruption, but not after MAX_CONTINUATIONS in a row that brought no epoch more.
    A trial that failed by itself is not followed.
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
        if trial.state != TrialState.FAIL or not attributes.get("interrupted"):
            continue
        if trial.number in followed or "seed" not in attributes:
            continue
        if _in_vain(trials, trial) >= MAX_CONTINUATIONS:
            continue
        yield create_trial(
            state=state,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={
                "draw": attributes["draw"],
                "seed": attributes["seed"],
                "continues": trial.number,
                "continued": attributes.get("continued", 0) + 1,
            },
        )


def _in_vain(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> int:
    """Count the continuations in a row, up to this trial, that brought no epoch more."""
    chain = [trial, *_continued_by(trials, trial)]
    done = [link.user_attrs.get("epochs", 0) for link in reversed(chain)]
    return len(done) - 1 - done.index(max(done))


def _continued_by(
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
    for earlier in _continued_by(study.get_trials(deepcopy=False), trial):
        directory = trial_dir(home_of(earlier.user_attrs, checkpoint_dir), earlier.number)
        if (directory / "latest_checkpoint.pth").exists():
            return directory
    return None


def finished_value(directory: Path) -> float | None:
    """Give the value of a trial that wrote its metrics for the configuration beside them."""
    try:
        metrics, config = (
            read_json(directory / "metrics.json"),
            read_json(directory / "config.json"),
        )
        value = metrics["value"]
        matches = metrics["config_hash"] == config["config_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if matches and isinstance(value, float) and math.isfinite(value) else None
