"""Several searches at once on a real PostgreSQL, and on Optuna's gRPC proxy before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState
from servers import PostgreSQL, grpc_proxy

from storage import find_study, is_surplus, opened_storage
from study import params_key
from summary import STUDY_NAME

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    yield server
    server.remove()


def trials_at(url: str) -> list[FrozenTrial]:
    with opened_storage(url) as storage:
        study = find_study(storage, STUDY_NAME)
        assert study is not None
        return [trial for trial in study.get_trials() if not is_surplus(trial)]


def run_claimers(url: str, n_trials: int, directory: Path, faults: list[str]) -> list[dict]:  # type: ignore[type-arg]
    """Run so many claimers at once, from the same moment on; gives what those that lived say."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    directory.mkdir()
    command = [sys.executable, str(ROOT / "tests" / "claimer.py"), url, str(n_trials)]
    with ExitStack() as stack:
        claimers = []
        for fault in faults:
            claimer = subprocess.Popen(
                [*command, str(directory), fault],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            claimers.append(stack.enter_context(claimer))
            stack.callback(claimer.kill)
        for claimer in claimers:
            assert claimer.stdout is not None
            assert claimer.stdout.readline() == "ready\n"
        for claimer in claimers:
            assert claimer.stdin is not None
            claimer.stdin.write("\n")
            claimer.stdin.flush()
        said = [claimer.communicate(timeout=90)[0] for claimer in claimers]
    codes = [claimer.returncode for claimer in claimers]
    assert codes == [-9 if fault == "die" else 0 for fault in faults]
    return [json.loads(text) for text in said if text]


@pytest.mark.parametrize("kind", ["postgresql", "grpc"])
def test_claims_at_once_keep_to_the_budget_and_never_draw_twice(
    kind: str, postgresql: PostgreSQL, tmp_path: Path
) -> None:
    """The tables are made, and the study created, by all at once too."""
    url = postgresql.make_database(f"claims_{kind}")
    faults = ["none", "none", "interrupt", "die"]
    if kind == "grpc":
        with grpc_proxy(url) as proxy:
            said = run_claimers(proxy, 24, tmp_path / "c", faults)
    else:
        said = run_claimers(url, 24, tmp_path / "c", faults)
    trials = trials_at(url)
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == 24
    assert TrialState.RUNNING not in states
    assert max(one["most"] for one in said) <= 24
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) == 2
    assert all(trial.user_attrs["interrupted"] for trial in failed)
    followed = {trial.user_attrs.get("continues") for trial in trials} - {None}
    assert followed == {trial.number for trial in failed}
    fresh = [params_key(t.params) for t in trials if "continues" not in t.user_attrs]
    assert len(set(fresh)) == len(fresh) == 24
    started = [number for one in said for number in one["started"]]
    assert len(set(started)) == len(started)
