"""Several searches at once on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
from optuna.trial import FrozenTrial, TrialState
from servers import PASSWORD, QUOTED, PostgreSQL
from test_search import Run, run

from writer_search.flags import STUDY_NAME
from writer_search.results.rows import is_surplus
from writer_search.study.draws import params_key
from writer_search.study.shared.storage import (
    find_study,
    opened_storage,
)

pytestmark = pytest.mark.timeout(600)
__all__ = ["run"]  # the fixture
ROOT = Path(__file__).parents[1]
N_TRIALS = 6


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
        said = [claimer.communicate()[0] for claimer in claimers]
    codes = [claimer.returncode for claimer in claimers]
    assert codes == [-9 if fault == "die" else 0 for fault in faults]
    return [json.loads(text) for text in said if text]


def test_claims_at_once_keep_to_the_budget_and_never_draw_twice(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    """The tables are made, and the study created, by all at once too."""
    url = postgresql.make_database("claims")
    said = run_claimers(url, 16, tmp_path / "c", ["none", "interrupt", "die"])
    trials = trials_at(url)
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == 16
    assert TrialState.RUNNING not in states
    assert max(one["most"] for one in said) <= 16
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) == 2
    assert all(trial.user_attrs["interrupted"] for trial in failed)
    followed = {trial.user_attrs.get("continues") for trial in trials} - {None}
    assert followed == {trial.number for trial in failed}
    fresh = [params_key(t.params) for t in trials if "continues" not in t.user_attrs]
    assert len(set(fresh)) == len(fresh) == 16
    started = [number for one in said for number in one["started"]]
    assert len(set(started)) == len(started)


@pytest.mark.slow
def test_a_local_study_moves_to_postgresql_and_goes_on_there(
    run: Run, postgresql: PostgreSQL, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the line of docs/several_machines.md; the page shows what is in the storage."""
    url, directory = postgresql.make_database("moved"), tmp_path / "c"
    assert run(n_trials="1") == 0
    page = (ROOT / "docs" / "several_machines.md").read_text()
    (line,) = re.findall(r'`(python -c "import optuna; optuna.copy_study[^`]*)`', page)
    line = line.replace("sqlite:///runs/search_001", f"sqlite:///{directory}")
    line = line.replace("postgresql+psycopg://search@dbhost/lines", url)
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, stderr=PIPE)
    capfd.readouterr()

    assert run("--storage", url, n_trials="2") == 0
    out = capfd.readouterr().out
    assert "RESUMING EXISTING STUDY" in out
    assert PASSWORD not in out
    first, second = trials_at(url)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.COMPLETE)
    assert first.params != second.params
    assert second.user_attrs["draw"] == first.user_attrs["draw"] + 1
    assert (directory / "summary" / "history.svg").exists()
    assert (directory / "trial_001" / "curves.svg").exists()
    page = (directory / "summary" / "report.html").read_text()
    assert f"{100 * second.values[0]:.2f}%" in page
    assert QUOTED not in page


class Command:
    """The real command in a process of its own, its output in a file."""

    def __init__(self, url: str, lines: Path, directory: Path, log: Path) -> None:
        fixed = ("backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8")
        words = [word for value in (*fixed, "precision=float32") for word in ("--fix", value)]
        words += ["--storage", url, "--data_root", str(lines), "--checkpoint_dir", str(directory)]
        words += ["--n_trials", str(N_TRIALS), "--epochs", "2", "--use_all_writers"]
        words += ["--weights", "none", "--device", "cpu", "--continue_interrupted"]
        words += ["--pruner", "none"]  # which trials it ends depends on who is quicker
        self.log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "hyperparameter_search.py"), *words],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


def first_to_say(text: str, commands: list[Command]) -> int:
    """Wait until one of the commands has printed a text; give its number."""
    while True:
        for number, command in enumerate(commands):
            if text in command.log.read_text():
                return number
            assert command.process.poll() is None, command.log.read_text()
        time.sleep(0.01)


@contextmanager
def commands(url: str, lines: Path, directories: list[Path], logs: Path) -> Iterator[list[Command]]:
    started = [Command(url, lines, d, logs / f"{n}.log") for n, d in enumerate(directories)]
    try:
        yield started
    finally:
        for command in started:
            command.process.kill()
            command.process.wait()


def check_whole(url: str, directories: list[Path], logs: Path) -> list[FrozenTrial]:
    """Check budget, draws, directories and the password; gives the trials."""
    trials = trials_at(url)
    states = [trial.state for trial in trials]
    assert states.count(TrialState.COMPLETE) == N_TRIALS
    assert TrialState.RUNNING not in states
    fresh = [params_key(t.params) for t in trials if "continues" not in t.user_attrs]
    assert len(set(fresh)) == len(fresh)
    seeds = [t.user_attrs["seed"] for t in trials if "continues" not in t.user_attrs]
    assert len(set(seeds)) == len(seeds)
    numbers = [trial.number for trial in trials]
    homes = [path for d in dict.fromkeys(directories) for path in d.glob("trial_*")]
    assert sorted(int(path.name[6:]) for path in homes) == numbers
    for trial, home in zip(trials, sorted(homes, key=lambda path: path.name), strict=True):
        config = json.loads((home / "config.json").read_text())
        assert config["hyperparameters"] == trial.params
        assert json.loads((home / "trial.json").read_text())["state"] == trial.state.name
    for path in [*logs.iterdir(), *(p for d in directories for p in d.rglob("*"))]:
        if path.is_file():
            content = path.read_bytes()
            assert PASSWORD.encode() not in content, path
            assert QUOTED.encode() not in content, path
    return trials


@pytest.mark.slow
def test_four_searches_on_postgresql_one_of_them_killed_and_the_server_restarted(
    postgresql: PostgreSQL, lines_root: Path, tmp_path: Path
) -> None:
    url = postgresql.make_database("four")
    directories = [tmp_path / "c"] * 4  # on a shared file system
    logs = tmp_path / "logs"
    logs.mkdir()
    with commands(url, lines_root, directories, logs) as searches:
        victim = first_to_say("epoch  1/2", searches)
        searches[victim].process.kill()
        postgresql.stop()
        postgresql.start()
        codes = [search.process.wait() for search in searches]
    assert codes.pop(victim) == -9
    assert codes == [0, 0, 0], "".join(log.read_text() for log in logs.iterdir())
    trials = check_whole(url, directories, logs)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert [trial.user_attrs.get("interrupted") for trial in failed] == [True]
    (continued,) = [t for t in trials if t.user_attrs.get("continues") == failed[0].number]
    assert continued.params == failed[0].params
    assert continued.user_attrs["owner"]["pid"] != failed[0].user_attrs["owner"]["pid"]
    said = "".join(log.read_text() for log in logs.iterdir())
    assert f"trial {failed[0].number} was cut off at epoch" in said
