"""Draws hyperparameters: samplers, pruners, and no draw twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import optuna
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

from writer_search.common.errors import UserError
from writer_search.common.text import counted
from writer_search.config import COHOG, TrialConfig
from writer_search.results.rows import is_fitted, is_interrupted
from writer_search.space import Space, every_draw, first_trials, suggest

STARTUP_TRIALS = 5
REDRAWS = 100  # at random, before what is left of a finite space is looked for


class SpaceExhaustedError(Exception):
    """Every configuration of a finite space has been drawn.

    others_train: some of them, of which the draw knew, and which may be interrupted.
    """

    others_train = False


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


class _Alike:
    """Stands for a study of which a pruner sees the trials of one kind alone."""

    def __init__(self, study: optuna.Study, kind: tuple[bool, bool]) -> None:
        self._study, self._kind = study, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *args: Any, **options: Any) -> list[FrozenTrial]:
        return [t for t in self._study.get_trials(*args, **options) if kind_of(t) == self._kind]


class AmongAlike(BasePruner):
    """Lets a pruner compare a network alone with such, and one beside a descriptor with such.

    With a descriptor it begins where the other kind ends: below it says nothing about the end.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return self._pruner.prune(cast(optuna.Study, _Alike(study, kind_of(trial))), trial)


def kind_of(trial: FrozenTrial) -> tuple[bool, bool]:
    """Tell the descriptor alone, a network alone, and both; False where that is fixed."""
    return is_fitted(trial.params, trial.user_attrs), bool(trial.params.get("with_cohog"))


def make_pruner(name: str, epochs: int) -> BasePruner:
    """Build a pruner, which judges no trial before `warm_up_epochs`, each beside its like."""
    warm_up = warm_up_epochs(epochs)
    if name == "median":
        return AmongAlike(MedianPruner(STARTUP_TRIALS, warm_up))
    if name == "percentile":
        return AmongAlike(PercentilePruner(75.0, STARTUP_TRIALS, warm_up))
    if name == "halving":
        return AmongAlike(SuccessiveHalvingPruner(min_resource=max(1, warm_up)))
    return NopPruner()


@dataclass
class Draws:
    """What was drawn so far: the last draw's number, and the hyperparameters, as text."""

    last: int = -1
    taken: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)  # of these, what is not worth a new start

    def add(self, trial: FrozenTrial, first: int) -> None:
        """Add a trial.   first: number of the first trial of this run"""
        attributes = trial.user_attrs
        self.last = max(self.last, attributes.get("draw", -1))
        if attributes.get("surplus"):
            return
        key = params_key(trial.params)
        self.taken.add(key)
        # An end takes two steps: one that is noted as interrupted may still be running. And what
        # failed in an earlier run may have been fixed since: a full disk, a broken GPU.
        interrupted = is_interrupted(attributes) and trial.state.is_finished()
        if not (interrupted or (trial.state == TrialState.FAIL and trial.number < first)):
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
        self.first = 0  # trials from this number on are of this run; its supply says so

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
            draws.add(trial, self.first)
        number = draws.last + 1
        running = [trial for trial in unfinished if trial.state == TrialState.RUNNING]
        placeholders = self._add_to_memory(running)  # TPE keeps away from them
        try:
            drawn = self._draw_anew(number, draws)
        finally:
            for placeholder in placeholders:
                self._memory.tell(placeholder, state=TrialState.FAIL)  # samplers pass over these
        return create_trial(
            state=state,
            params=drawn.params,
            distributions=drawn.distributions,
            user_attrs={
                **{"draw": number, "seed": seed_of(self._seed, number, 0, *self._salt)},
                # For who knows a trial by its parameters alone, which has none that is fixed.
                **{n: v for n, v in self._space.fixed.items() if n == "backbone"},
            },
        )

    def _draw_anew(self, number: int, draws: Draws) -> FrozenTrial:
        """Draw what has not been drawn. Raises SpaceExhaustedError."""
        for attempt in range(REDRAWS):
            drawn = self._draw(number, attempt)
            if params_key(drawn.params) not in draws.taken:
                return drawn
        # Where a finite space has nothing else, what has no value may get a new start.
        for passed_over in (draws.taken, draws.tried):
            for params in every_draw(self._space):
                if params_key(params) not in passed_over:
                    return self._draw(number, REDRAWS, params)
        raise SpaceExhaustedError(
            f"all of its {counted(len(draws.taken), 'configuration')} have been drawn"
        )

    def _learn(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take in the trials that have finished since the last draw; returns the unfinished ones.

        trials: all of the study, by number.
        """
        later = trials[self._settled :]
        finished = [t for t in later if t.state.is_finished() and t.number not in self._finished]
        self._add_to_memory(finished)
        self._finished.update(trial.number for trial in finished)
        for trial in finished:
            self._draws.add(trial, self.first)
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

    def _draw(
        self, number: int, attempt: int, given: Mapping[str, Any] | None = None
    ) -> FrozenTrial:
        """Draw what the sampler gives, or what is given."""
        name = self._sampler if attempt < 5 else "random"  # a learning sampler may insist
        sampler = make_sampler(name, seed_of(self._seed, number, attempt, *self._salt))
        if isinstance(sampler, TPESampler):
            # It remembers which trials it has seen; a new one would go through all at each draw.
            sampler._search_space = self._intersection
        self._memory.sampler = sampler
        if attempt == 0 and number < len(first := first_trials(self._space)):
            given = first[number]
        if given is not None:
            self._memory.enqueue_trial(dict(given))
        trial = self._memory.ask()
        suggest(trial, self._space)
        return self._memory.tell(trial, state=TrialState.FAIL)


def params_key(params: Mapping[str, Any]) -> str:
    """Give equal hyperparameters equal text."""
    return json.dumps(params, sort_keys=True)


def seed_of(*words: int) -> int:
    """Derive a seed of 32 bits from numbers."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def config_of(trial: Trial, space: Space, settings: Mapping[str, Any], seed: int) -> TrialConfig:
    """Give a trial's configuration. Raises UserError when it breaks a limit."""
    values: dict[str, Any] = suggest(trial, space)
    is_network = values["backbone"] != COHOG
    return TrialConfig(
        # A trial that was enqueued by hand has no draw number.
        seed=trial.user_attrs.get("seed", seed_of(seed, 2**31 + trial.number)),
        epochs=settings["epochs"] if is_network else 1,
        patience=settings["patience"] if is_network else 1,
        pretrained=settings["weights"] == "imagenet" and is_network,
        precision=settings["precision"].get(values["backbone"], "float32"),
        **values,
    )
