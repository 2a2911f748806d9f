"""What samplers and pruners do, as the search makes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from writer_search.space import default_space, narrow
from writer_search.study import draws
from writer_search.study.draws import Drawer


def is_pruned(name: str, epochs: int, values: Sequence[float], own: Sequence[float]) -> bool:
    """Judge a trial of these values, one an epoch, beside complete ones of one value each."""
    study = optuna.create_study(direction="maximize", pruner=draws.make_pruner(name, epochs))
    for reported in (*([value] * len(own) for value in values), own):
        trial, judged = study.ask(), []
        for epoch, value in enumerate(reported, 1):
            trial.report(value, epoch)
            judged.append(trial.should_prune())
        study.tell(trial, reported[-1])
    return any(judged)


def test_pruners_judge_as_they_are_described() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [is_pruned("percentile", 5, values, [v]) for v in (0.15, 0.25)] == [True, False]
    assert [is_pruned("median", 5, values, [v]) for v in (0.25, 0.35)] == [True, False]
    assert not is_pruned("median", 5, values[1:], [0.0]), "of four too little is known"
    assert not is_pruned("median", 20, values, [0.0] * 3), "nor within a fifth of the epochs"
    assert is_pruned("median", 20, values, [0.0] * 4)
    assert not is_pruned("halving", 20, [0.9] * 5, [0.1] * 3)
    assert is_pruned("halving", 20, [0.9] * 5, [0.1] * 4)
    assert not is_pruned("none", 5, values, [0.0] * 5)


@pytest.mark.parametrize("name", ["median", "percentile", "halving"])
def test_pruners_compare_like_with_like(name: str) -> None:
    """A network alone may climb above where those beside a descriptor, or descriptors, begin."""
    study = optuna.create_study(direction="maximize", pruner=draws.make_pruner(name, 5))

    def judge(value: float, backbone: str = "tiny", with_cohog: bool | None = False) -> bool:
        choices = {"backbone": backbone} | (
            {} if with_cohog is None else {"with_cohog": with_cohog}
        )
        study.enqueue_trial(dict(choices))
        trial = study.ask()
        trial.suggest_categorical("backbone", ["cohog", "tiny"])
        if with_cohog is not None:
            trial.suggest_categorical("with_cohog", [False, True])
            trial.report(value, 1)
        is_pruned = trial.should_prune()
        study.tell(trial, value)
        return is_pruned

    for value in (0.91, 0.92, 0.93, 0.94, 0.95):
        judge(value, with_cohog=True)
        judge(value, "cohog", None)
    assert judge(0.8, with_cohog=True)
    assert not judge(0.5)
    for value in (0.51, 0.52, 0.53, 0.54):
        judge(value)
    assert judge(0.4), "there are five of its kind now"


def test_sampler_learns_once_it_knows_five_trials() -> None:
    space = narrow(default_space("cpu", False), {"backbone": "tiny", "mixup": False}, {})

    def drawn_after(
        sampler: str, finished: int, beside: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Draw after trials of which a learning rate of 0.001 was the best, and a running one."""
        drawer, study = Drawer(space, "random", 0), optuna.create_study(direction="maximize")
        for _ in range(finished):
            trial = drawer.ask(study)
            study.tell(trial, -abs(math.log(trial.params["learning_rate"] / 1e-3)))
        trials = study.get_trials(deepcopy=False)
        if beside is not None:
            ranges = trials[-1].distributions
            running = create_trial(state=TrialState.RUNNING, params=beside, distributions=ranges)
            running.number = finished
            trials.append(running)
        return Drawer(space, sampler, 0).new_draw(trials).params

    assert drawn_after("tpe", 4) == drawn_after("random", 4), "it knows too little"
    learned = drawn_after("tpe", 20)
    assert learned != drawn_after("random", 20)
    near = {n: v * 1.001 if isinstance(v, float) else v for n, v in learned.items()}
    assert drawn_after("tpe", 20, beside=near) != learned, "it keeps away from what runs"
