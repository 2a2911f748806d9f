"""Several searches, one study: who may start which trial, and who is still alive.

Optuna numbers trials in the order in which the storage stores them, under a lock of its own, and
who has stored number n sees every smaller number. All that must not happen twice is decided by that
order: a search stores a trial as running, whole, in one step; looks at the smaller numbers; and
withdraws its own before it begins when those leave no room for it, or have the same parameters.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from writer_search.common.files import is_there
from writer_search.common.locks import SharedLock, holder_is_dead
from writer_search.results.rows import directory_of, home_of, is_interrupted, is_surplus
from writer_search.study.draws import Drawer, SpaceExhaustedError, params_key
from writer_search.study.unfinished import continuations, continued_by, settle

SIGN_SECONDS = 60.0  # between two signs of life of a running trial
# A trial without a new sign for so long is dead: longer than an outage that its search waits out.
SILENT_SECONDS = 480.0
# Where its directory is out of reach nobody can tell whether it had finished, nor go on with it.
SILENT_FAR_SECONDS = 1800.0


@dataclass
class Fleet:
    """One search's view of the study that it shares with others.

    n_trials: the total of complete trials wanted.   lock: this search's, for others on its host.
    continued: the interrupted trials that are gone on with; see `continuations`.
    """

    study: optuna.Study
    drawer: Drawer
    n_trials: int
    checkpoint_dir: Path
    lock: SharedLock | None = None
    continued: Mapping[str, Container[int]] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    first: int = 0  # trials from this number on were started during this run, by whomever
    allowed: int = 0  # of which there may be so many
    claims: set[str] = field(default_factory=set)  # this search's
    seen: dict[int, tuple[Any, float]] = field(default_factory=dict)  # last sign, and since when
    looked: float | None = None  # when this search last looked for signs

    def __post_init__(self) -> None:
        trials = self.trials()
        self.first, self.allowed = len(trials), max(0, self.n_trials - count_complete(trials))
        self.drawer.first = self.first

    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    # ----------------------------------------------------------------------------------- starting

    def room(self, trials: Sequence[FrozenTrial]) -> int:
        """Tell how many trials may be started beside these.

        Complete and running ones never exceed the total. And one run starts at most as many as were
        missing when it began, also where others start them; interrupted ones do not count, because
        somebody has to take their place.
        """
        live = sum(_is_live(trial) for trial in trials)
        started = sum(
            trial.number >= self.first
            and not is_surplus(trial)
            and not is_interrupted(trial.user_attrs)
            for trial in trials
        )
        return max(0, min(self.n_trials - live, self.allowed - started))

    def claim(self) -> Trial | None:
        """Start a trial that nobody else has started; None when there is no room for it.

        Raises SpaceExhaustedError.
        """
        while True:
            trials = self.trials()
            if not self.room(trials):
                return None
            known = len(trials)
            try:
                template = self._next(trials)
            except SpaceExhaustedError as error:
                error.others_train = bool(self.others_running(trials))
                raise
            mine, trials = self._store(template)
            smaller = [trial for trial in trials if trial.number < mine.number]
            # An interruption meanwhile has made room: for what it broke off, not for a new draw
            # that was on its way, after which there is none.
            is_new = "continues" not in mine.user_attrs
            passes_over = is_new and self._to_continue(smaller) is not None
            is_taken = _is_taken(mine, smaller[known:])
            if self.room(smaller) and not is_taken and not passes_over:
                return Trial(self.study, mine._trial_id)  # no public way to a trial that runs
            self._withdraw(mine)

    def _next(self, trials: Sequence[FrozenTrial]) -> FrozenTrial:
        """Give the trial to be started: one that goes on with an interrupted one, or a new draw."""
        return self._to_continue(trials) or self.drawer.new_draw(trials, TrialState.RUNNING)

    def _to_continue(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """Give a trial that goes on with an interrupted one; None where none waits for it.

        What was killed, or had no room on the disk, is for a later run: here it may end so again.
        """
        for trial in continuations(trials, self.continued, TrialState.RUNNING):
            earlier = trials[trial.user_attrs["continues"]]
            is_due = is_interrupted(earlier.user_attrs) or earlier.number < self.first
            chain = [earlier, *continued_by(trials, earlier)]
            if is_due and any(self._is_within_reach(link) for link in chain):
                return trial
        return None

    def _store(self, template: FrozenTrial) -> tuple[FrozenTrial, list[FrozenTrial]]:
        """Store a running trial of this search; give it as stored, and all trials."""
        claim = uuid.uuid4().hex
        self.claims.add(claim)
        lock = self.lock.path if self.lock is not None else None
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "checkpoint_dir": str(self.checkpoint_dir.absolute()),
            "lock": str(lock.absolute()) if lock is not None else None,
        }
        template.set_user_attr("claim", claim)
        template.set_user_attr("owner", owner)
        template.set_user_attr("alive", _now())
        self.study.add_trial(template)
        trials = self.trials()
        # More than one where the answer to the first was lost in an outage.
        mine, *copies = [t for t in trials if t.user_attrs.get("claim") == claim]
        for copy in copies:
            self._withdraw(copy)
        return mine, trials

    def _withdraw(self, trial: FrozenTrial) -> None:
        """Take back a trial that has not begun: it is no failure, and nobody counts it."""
        with suppress(UpdateFinishedTrialError):  # another search has taken it for dead
            Trial(self.study, trial._trial_id).set_user_attr("surplus", True)
            self.study.tell(trial.number, state=TrialState.FAIL)

    # --------------------------------------------------------------------------------- being alive

    def sign(self, trial: Trial) -> None:
        """Write a running trial's sign of life. Raises UpdateFinishedTrialError when buried."""
        trial.set_user_attr("alive", _now())

    def others_running(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Give the running trials of other searches."""
        return [
            trial
            for trial in trials
            if trial.state == TrialState.RUNNING
            and trial.user_attrs.get("claim") not in self.claims
            and not is_surplus(trial)
        ]

    def dead(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Give the running trials whose search has died.

        On this host a lock that is free tells at once. Elsewhere it is silence: clocks differ
        between hosts, so that not the time in a sign counts, but since when, by this process's own
        clock, it has seen no other sign. A process that did not look for a while (it was stopped,
        or the storage was away) has no right to judge, and begins anew.
        """
        now = self.clock()
        if self.looked is not None and now - self.looked > SILENT_SECONDS / 2:
            self.seen.clear()
        self.looked = now
        running = self.others_running(trials)
        numbers = {trial.number for trial in running}
        self.seen = {number: seen for number, seen in self.seen.items() if number in numbers}
        found = []
        for trial in running:
            sign = trial.user_attrs.get("alive")
            known, since = self.seen.get(trial.number, (None, now))
            if trial.number not in self.seen or known != sign:
                self.seen[trial.number] = sign, now
                since = now
            patience = SILENT_SECONDS if self._is_within_reach(trial) else SILENT_FAR_SECONDS
            if now - since > patience or _died_here(trial):
                found.append(trial)
        return found

    def bury(self, trial: FrozenTrial) -> str | None:
        """Record a dead search's trial: failed, or complete where it had finished.

        Returns a line for people; None when another search was first.
        """
        owner = trial.user_attrs.get("owner", {})
        where = f"its search (pid {owner.get('pid')} on {owner.get('host')}) shows no sign of life"
        own = self.checkpoint_dir
        home = home_of(trial.number, trial.user_attrs, own)
        read = home if self._is_within_reach(trial) else own
        try:
            try:
                return settle(self.study, read, trial, where)
            except OSError:  # its directory may be read, and not written
                if read == own:
                    raise
                return settle(self.study, read, trial, where, written=own)
        except (UpdateFinishedTrialError, ValueError):
            if self.trials()[trial.number].state == TrialState.RUNNING:
                raise
            return None

    def _is_within_reach(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial's directory, with its checkpoint, can be read from here."""
        directory = directory_of(trial.number, trial.user_attrs, self.checkpoint_dir)
        return is_there(directory / "config.json")


def count_complete(trials: Sequence[FrozenTrial]) -> int:
    """Count the trials that are complete."""
    return sum(trial.state == TrialState.COMPLETE for trial in trials)


def _is_live(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.RUNNING) and not is_surplus(trial)


def _is_taken(mine: FrozenTrial, meanwhile: Sequence[FrozenTrial]) -> bool:
    """Tell whether another search has started the same since the choice of this one.

    meanwhile: the trials that the choice could not take into account.
    """
    continued = mine.user_attrs.get("continues")
    others = [t for t in meanwhile if not is_surplus(t) and t.state != TrialState.WAITING]
    if continued is not None:
        return any(trial.user_attrs.get("continues") == continued for trial in others)
    key = params_key(mine.params)
    return any(params_key(trial.params) == key for trial in others)


def _died_here(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get("owner", {})
    lock = owner.get("lock")
    return bool(lock) and owner["host"] == socket.gethostname() and holder_is_dead(Path(lock))


def _now() -> str:
    return datetime.now(UTC).isoformat()
