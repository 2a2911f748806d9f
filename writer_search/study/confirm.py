"""Trains a search's best configurations again with fresh seeds, and takes the winner from that.

The best of many noisy trials is too good to be true: it was the best by its luck as well. The
confirmation is a search of its own under `confirm/`, in the same loop, with its own study; what it
trains is not drawn but given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.pruners import NopPruner
from optuna.trial import Trial, TrialState, create_trial

from writer_search.common.locks import DirectoryLock
from writer_search.results.chosen import CONFIRM
from writer_search.results.confirmed import Candidate
from writer_search.results.rows import DATABASE, Row, best_first, count_complete, rows_of, state_of
from writer_search.study.banner import RULE, describe_run
from writer_search.study.draws import seed_of
from writer_search.study.loop import Search
from writer_search.study.store import open_study, record_settings
from writer_search.study.supplies import LocalSupply
from writer_search.study.unfinished import continue_interrupted, settle_unfinished

SEED_WORD = 2**30  # keeps these seeds apart from those of draws


def candidates_of(rows: Sequence[Row], top: int, seeds: int, seed: int) -> list[Candidate]:
    """Give the best configurations, best first. A seed depends on the trial and its number only."""
    return [
        Candidate(row, tuple(seed_of(seed, SEED_WORD, row.number, i) for i in range(seeds)))
        for row in best_first(rows)[:top]
    ]


class Repeater:
    """Gives a confirmation's trials: each candidate with each of its seeds."""

    def __init__(self, search: optuna.Study, candidates: Sequence[Candidate]) -> None:
        self._originals = {trial.number: trial for trial in search.get_trials(deepcopy=False)}
        # Seed by seed: a confirmation that is cut short has seen all candidates.
        rounds = range(len(candidates[0].seeds))
        self.wanted = [(c.seeds[i], c.row.number) for i in rounds for c in candidates]
        self.seeds = {seed for seed, _ in self.wanted}
        self._tried: set[int] = set()  # in this run: what fails is not tried again at once

    def missing(self, rows: Sequence[Row]) -> int:
        """Count what no trial has completed."""
        return len(self.seeds - seeds_of(rows, "COMPLETE"))

    def ask(self, study: optuna.Study) -> Trial | None:
        """Start the next trial: one that waits, or the next that no trial has completed.

        None when this run has tried all.
        """
        while (trial := self._next(study)) is not None:
            if trial.user_attrs["seed"] in self.seeds:
                self._tried.add(trial.user_attrs["seed"])
                return trial
            # It waited to go on, and the search has been extended since.
            trial.set_user_attr("interrupted", True)  # should it be wanted again
            trial.set_user_attr("failure", "its configuration is not among the best any more")
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _next(self, study: optuna.Study) -> Trial | None:
        trials = study.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials):
            under_way = (TrialState.COMPLETE, TrialState.RUNNING)
            done = {t.user_attrs.get("seed") for t in trials if t.state in under_way}
            left = [pair for pair in self.wanted if pair[0] not in done | self._tried]
            if not left:
                return None
            seed, number = left[0]
            original = self._originals[number]
            study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    params=original.params,
                    distributions=original.distributions,
                    user_attrs={
                        **{"draw": number, "seed": seed},
                        **{n: v for n, v in original.user_attrs.items() if n == "backbone"},
                    },
                )
            )
        return study.ask()


def seeds_of(rows: Sequence[Row], *states: str) -> set[int]:
    """Give the seeds of the trials in these states; a failure counts unless it was interrupted."""
    return {
        row.attributes["seed"]
        for row in rows
        if row.state in states
        and "seed" in row.attributes  # a database that was recovered has placeholders in its gaps
        and state_of(row) != "interrupted"
    }


# ---------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Confirmation:
    """A confirmation after a run of it: its own search, and what it was to confirm."""

    search: Search
    candidates: list[Candidate]
    runs_left: int  # neither complete nor failed by themselves

    @property
    def runs(self) -> int:
        return sum(len(candidate.seeds) for candidate in self.candidates)


def confirm(finished: Search, top: int, seeds: int) -> Confirmation:
    """Train what is missing of a confirmation of a finished search, in the same loop.

    Each run of an interrupted one goes on from its checkpoint; nothing complete is trained again.
    """
    directory = finished.plan.checkpoint_dir / CONFIRM
    directory.mkdir(exist_ok=True)
    with DirectoryLock(directory):  # also what tells --status that it runs
        return _confirm(finished, directory, top, seeds)


def _confirm(finished: Search, directory: Path, top: int, seeds: int) -> Confirmation:
    plan = finished.plan
    study = open_study(directory)
    record_settings(study, plan.settings, plan.checkpoint_dir)
    study.pruner = NopPruner()  # a mean over the runs that looked good would be no mean
    candidates = candidates_of(finished.rows, top, seeds, plan.seed)
    repeater = Repeater(finished.supply.study, candidates)
    settled = settle_unfinished(study, directory)
    settled += continue_interrupted(study, {"seed": repeater.seeds})
    rows = rows_of(study.get_trials(deepcopy=False))
    missing = repeater.missing(rows)
    n_trials = count_complete(rows) + missing
    study.set_user_attr("run", describe_run(n_trials, len(plan.slots), rows))
    own = replace(
        plan,
        checkpoint_dir=directory,
        n_trials=n_trials,
        kept_models=None,
        continues=True,
    )
    print("\n".join(banner(directory, candidates, missing)), flush=True)
    for line in settled:
        print(line, flush=True)
    supply = LocalSupply(study, own, repeater)
    search = Search(own, finished.stop, supply, finished)
    search.run()
    runs_left = len(repeater.seeds - seeds_of(search.rows, "COMPLETE", "FAIL"))
    return Confirmation(search, candidates, runs_left)


def banner(directory: Path, candidates: Sequence[Candidate], missing: int) -> list[str]:
    """Say what is about to be confirmed."""
    seeds = len(candidates[0].seeds)
    runs = len(candidates) * seeds
    return [
        RULE,
        f"CONFIRMING THE BEST {len(candidates)} TRIALS WITH {seeds} NEW SEEDS EACH",
        RULE,
        f"Study database: {directory / DATABASE}",
        "Configurations of trials: " + ", ".join(str(c.row.number) for c in candidates),
        f"Completed runs: {runs - missing} of {runs}",
        "Note: Nothing is drawn or pruned here; the trials below are numbered anew.",
        RULE,
    ]
