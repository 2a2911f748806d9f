"""Claim: the default search finds more in as many epochs than one with Optuna's defaults.

    python -m benchmarks.search_efficiency [--seeds 30]

Reads the table of real trials that `benchmarks.record_trials` wrote. Prints what the recorded
searches had reached after how many epochs. Then simulates searches on a surrogate: a ridge
regression of each epoch's logit on the hyperparameters (squares of the continuous ones included),
plus the whole residual curve of a recorded trial drawn at random, as noise. The figure of merit is
the surrogate's own value, without noise, of the trial that the search would call its best.

JSON: default, unpruned, optuna, random: that figure at the whole budget, mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from benchmarks import common
from benchmarks.record_trials import TABLE
from writer_search.config import Choice, Range
from writer_search.space import Space, default_space, narrow, suggest
from writer_search.study.draws import Drawer, make_pruner

Floats = NDArray[np.float64]
RIDGE = 1.0
REACHED = (0.9, 0.95, 0.97, 0.98)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser_for(__doc__)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=30, help="simulated searches of each kind")
    parser.add_argument("--trials", type=int, default=16, help="the budget, in whole trials")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(common.describe_machine())
    table = json.loads(args.table.read_text())
    print_recorded(table)
    surrogate = Surrogate(table)
    budgets = [args.trials * surrogate.epochs * part // 4 for part in (1, 2, 3, 4)]
    rows, result = [], {}
    for name, kind in KINDS.items():
        runs = np.array([simulate(kind, surrogate, seed, budgets) for seed in range(args.seeds)])
        error = runs[:, -1].std(ddof=1) / math.sqrt(args.seeds)
        means = [f"{100 * mean:.2f}" for mean in runs.mean(0)]
        rows.append([name, *means, f"{100 * error:.2f}"])
        result[name] = float(runs[:, -1].mean())
    header = ["", *(f"{budget} epochs" for budget in budgets), "s.e. of the last"]
    common.print_table(f"surrogate, {args.seeds} seeds: value of the best found, %", header, rows)
    common.print_result(
        default=result["default"],
        unpruned=result["default, no pruning"],
        optuna=result["Optuna's defaults"],
        random=result["random, no pruning"],
    )
    return 0


# ------------------------------------------------------------------------------- what was recorded


def print_recorded(table: Mapping[str, Any]) -> None:
    """Print after how many epochs each recorded search had reached given values."""
    rows = []
    for name, trials in table["searches"].items():
        best, spent, reached = 0.0, 0, dict.fromkeys(REACHED, "-")
        for trial in trials:
            for value in trial["values"]:
                spent += 1
                best = max(best, value)
                for wanted in REACHED:
                    if best >= wanted and reached[wanted] == "-":
                        reached[wanted] = str(spent)
        pruned = sum(trial["pruned"] for trial in trials)
        rows.append([name, len(trials), pruned, spent, 100 * best, *reached.values()])
    header = ["", "trials", "pruned", "epochs", "best, %", *(f"{100 * r:g} %" for r in REACHED)]
    common.print_table("recorded searches, epochs to reach a validation value", header, rows)


class Surrogate:
    """Learning curves of the space, learnt from recorded trials."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        settings = table["settings"]
        self.epochs = int(settings["epochs"])
        self.space: Space = narrow(
            default_space("cpu", pretrained=False), {"backbone": settings["backbone"]}, {}
        )
        # Each once: searches with one seed begin with the same trials.
        whole = {
            json.dumps(trial): trial
            for trials in table["searches"].values()
            for trial in trials
            if len(trial["values"]) == self.epochs
        }.values()
        inputs = np.array([self.features(trial["params"]) for trial in whole])
        outputs = logit(np.array([trial["values"] for trial in whole]))
        penalty = RIDGE * np.eye(inputs.shape[1])
        penalty[0, 0] = 0.0  # the mean is not shrunk
        self.weights: Floats = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ outputs)
        self.residuals: Floats = outputs - inputs @ self.weights

    def features(self, params: Mapping[str, Any]) -> list[float]:
        """Give 1, each hyperparameter scaled to -1..1, and the squares of the continuous ones."""
        found = [1.0]
        for name, rule in self.space.searched.items():
            if isinstance(rule, Choice):
                found.append(2.0 * rule.choices.index(params[name]) / (len(rule.choices) - 1) - 1)
            else:
                scaled = self.scaled(rule, params[name]) if name in params else 0.0
                found += [scaled, scaled**2]
        return found

    @staticmethod
    def scaled(rule: Range, value: float) -> float:
        low, high = rule.low, rule.high
        if rule.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 2 * (value - low) / (high - low) - 1

    def curve(self, params: Mapping[str, Any]) -> Floats:
        """Give the curve without noise, as logits: (epochs,)."""
        expected: Floats = np.array(self.features(params)) @ self.weights
        return expected

    def noisy(self, params: Mapping[str, Any], rng: np.random.Generator) -> Floats:
        """Give a curve as a trial would report it: (epochs,)."""
        return expit(self.curve(params) + self.residuals[rng.integers(len(self.residuals))])


def logit(share: Floats) -> Floats:
    clipped = share.clip(0.005, 0.995)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


def expit(logits: Floats) -> Floats:
    share: Floats = 1 / (1 + np.exp(-logits))
    return share


# ------------------------------------------------------------------------------------ simulations

Kind = Callable[[Surrogate, int], tuple[optuna.Study, Callable[[], Trial]]]


def ours(sampler: str, pruner: str) -> Kind:
    """Search as the program does: known-good first trial, fresh sampler for each draw."""

    def make(surrogate: Surrogate, seed: int) -> tuple[optuna.Study, Callable[[], Trial]]:
        study = optuna.create_study(
            direction=StudyDirection.MAXIMIZE, pruner=make_pruner(pruner, surrogate.epochs)
        )
        drawer = Drawer(surrogate.space, sampler, seed)
        return study, lambda: drawer.ask(study)

    return make


def plain(sampler: Callable[[int], BaseSampler], pruner: Callable[[], BasePruner]) -> Kind:
    """Search with Optuna alone."""

    def make(surrogate: Surrogate, seed: int) -> tuple[optuna.Study, Callable[[], Trial]]:
        study = optuna.create_study(
            direction=StudyDirection.MAXIMIZE, sampler=sampler(seed), pruner=pruner()
        )
        return study, study.ask

    return make


KINDS: dict[str, Kind] = {
    "default": ours("tpe", "median"),
    "default, no pruning": ours("tpe", "none"),
    "default, percentile": ours("tpe", "percentile"),
    "default, halving": ours("tpe", "halving"),
    "random draws, median": ours("random", "median"),
    "random, no pruning": ours("random", "none"),
    "Optuna's defaults": plain(lambda seed: TPESampler(seed=seed), MedianPruner),
    "random, no pruning, no baseline": plain(lambda seed: RandomSampler(seed=seed), NopPruner),
}


def simulate(kind: Kind, surrogate: Surrogate, seed: int, budgets: Sequence[int]) -> list[float]:
    """Give the true value of the best trial found after each budget of epochs."""
    rng = np.random.default_rng([seed, 7])
    study, ask = kind(surrogate, seed)
    spent, best, true_value = 0, -1.0, 0.0
    found: list[float] = []
    while len(found) < len(budgets):
        trial = ask()
        suggest(trial, surrogate.space)
        curve = surrogate.noisy(trial.params, rng)
        epochs, pruned = run_trial(trial, curve)
        spent += epochs
        while len(found) < len(budgets) and spent > budgets[len(found)]:
            found.append(true_value)  # the trial that overran a budget does not count for it
        value = float(curve.max())
        study.tell(
            trial,
            None if pruned else value,
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
        )
        if not pruned and value > best:
            best, true_value = value, float(expit(surrogate.curve(trial.params))[-1])
    return found


def run_trial(trial: Trial, curve: Floats) -> tuple[int, bool]:
    """Report a curve; give the epochs that were spent and whether the trial was pruned."""
    for epoch, value in enumerate(curve, 1):
        trial.report(float(value), epoch)
        if epoch < len(curve) and trial.should_prune():
            return epoch, True
    return len(curve), False


if __name__ == "__main__":
    raise SystemExit(main())
