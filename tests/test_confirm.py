"""The confirmation: fresh seeds, breaks, failures, and the winner that comes out."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from faults import RealChild, faulty
from optuna.trial import TrialState, create_trial
from test_search import Run, run, snapshot, trials_of
from test_train import assert_same_weights

from writer_search.common.files import write_json
from writer_search.common.locks import DirectoryLock
from writer_search.processes import runner as runner_module
from writer_search.processes.deadlines import END_TIME, MARGIN_SECONDS
from writer_search.results.chosen import chosen_model, read_confirmation
from writer_search.results.confirmed import Candidate, describe, remove_other_weights, summarise
from writer_search.results.page import standing
from writer_search.results.page.snapshot import FINISHED, Snapshot, Standing, TrialFiles
from writer_search.results.rows import DATABASE, Row, read_database
from writer_search.results.status import read_status
from writer_search.study import loop as loop_module
from writer_search.study import outlook
from writer_search.study.confirm import Repeater, candidates_of, seeds_of
from writer_search.study.store import open_study
from writer_search.study.unfinished import continue_interrupted
from writer_search.training.checkpoints import load_model

__all__ = ["run"]  # the fixture
BASE = {"n_trials": "3"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A place for a finished search, made by the first test that needs it."""
    return {"directory": tmp_path_factory.mktemp("finished") / "c"}


@pytest.fixture
def confirm(run: Run, finished: dict[str, Path], tmp_path: Path) -> Run:
    """Run the command with --confirm_top 2 --confirm_seeds 2 on a copy of a finished search."""
    if not finished["directory"].exists():
        assert run(**BASE, checkpoint_dir=str(finished["directory"])) == 0
    shutil.copytree(finished["directory"], tmp_path / "c")

    def command(*more: str, **replaced: str) -> int:
        return run("--confirm_top", "2", "--confirm_seeds", "2", *more, **BASE, **replaced)

    return command


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(runner_module, "ChildProcess", RealChild)


def read(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary" / "confirmation.json").read_text())
    return found


def values_by_seed(directory: Path) -> dict[int, float | None]:
    trials = open_study(directory / "confirm").get_trials()
    return {t.user_attrs["seed"]: t.value for t in trials if t.state == TrialState.COMPLETE}


def check_status_meanwhile(directory: Path) -> None:
    """What --status has to go on, and says, while four runs are to confirm a search."""
    run = open_study(directory / "confirm").user_attrs["run"]
    assert run == {"n_trials": 4, "n_jobs": 1, "to_start": 4, "first_trial": 0}
    with DirectoryLock(directory), DirectoryLock(directory / "confirm"):
        status = read_status(directory)
    assert status.heading.endswith(f", confirms: see --checkpoint_dir {directory}/confirm --status")
    assert status.left is None, "the trials of this directory are complete"


def check_page(directory: Path, winner: dict[str, Any]) -> None:
    """It says whose the model is, and whose what was measured."""
    page = (directory / "summary" / "report.html").read_text()
    where = f"of trial {winner['trial']} ({winner['directory']});"
    assert f"After the confirmation <code>summary/best_model.pth</code> is {where}" in page
    assert "not measured yet" not in page
    assert f"Test split, trial {winner['trial']} ({winner['directory']}), measured" in page
    rows = read_database(directory / DATABASE).rows
    shown = Snapshot(TrialFiles(directory), rows, {}, Standing(FINISHED))
    measured = directory / "summary" / "test_metrics.json"
    now = measured.read_text()
    write_json(measured, json.loads(now) | {"directory": f"trial_{winner['trial']:03d}"})
    assert "now it is trial" in standing._test(shown), "the model is another seed's"
    measured.write_text(now)


def test_best_are_trained_again_and_the_winner_is_published(
    confirm: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "c"
    before = snapshot(directory)
    for kind in (optuna.pruners.MedianPruner, optuna.pruners.PercentilePruner):
        monkeypatch.setattr(kind, "prune", lambda *_: True)  # is not asked
    deadlines, loop = [], loop_module.Search.loop

    def noted(search: loop_module.Search) -> None:
        deadlines.append(search.deadline)
        loop(search)

    monkeypatch.setattr(loop_module.Search, "loop", noted)
    assert confirm("--evaluate_test", "--timeout", "1000") == 0
    assert deadlines[0] == deadlines[1] < math.inf, "the search's own"
    printed, problems = capfd.readouterr()
    assert problems == ""
    assert "CONFIRMING THE BEST 2 TRIALS WITH 2 NEW SEEDS EACH\n" in printed
    assert "Completed runs: 0 of 4\n" in printed
    found = read(directory)
    ranked = sorted(
        (row for row in read_database(directory / "optuna_study.db").rows if row.value is not None),
        key=lambda row: (-(row.value or 0), row.number),
    )
    assert [entry["trial"] for entry in found["candidates"]] == [r.number for r in ranked[:2]]
    trials = open_study(directory / "confirm").get_trials()
    check_status_meanwhile(directory)
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    originals = open_study(directory).get_trials()
    seeds = [t.user_attrs["seed"] for t in trials]
    assert len({*seeds, *(t.user_attrs["seed"] for t in originals)}) == 4 + 3, "seeds are fresh"
    for entry in found["candidates"]:
        own = [t for t in trials if t.user_attrs["draw"] == entry["trial"]]
        assert [t.params for t in own] == [originals[entry["trial"]].params] * 2
        values = [t.value for t in own if t.value is not None]
        assert entry["mean"] == pytest.approx(statistics.fmean(values))
        assert entry["deviation"] == pytest.approx(statistics.stdev(values))
        assert entry["search_value"] == originals[entry["trial"]].value
    winner = found["winner"]
    best = max(found["candidates"], key=lambda e: (e["mean"], -e["search_rank"]))
    assert winner["trial"] == best["trial"]
    assert winner["value"] == max(run["value"] for run in best["runs"])
    model = directory / "summary" / "best_model.pth"
    assert model.read_bytes() == (directory / winner["directory"] / "best_model.pth").read_bytes()
    assert load_model(model)[1].seed == winner["seed"]
    test = json.loads((directory / "summary" / "test_metrics.json").read_text())
    assert (test["trial"], test["directory"]) == (winner["trial"], winner["directory"])
    check_page(directory, winner)
    assert f"Winner: trial {winner['trial']}; " in printed
    assert "The ranking " in printed
    after = snapshot(directory)
    assert all(after[n] == content for n, content in before.items() if n.startswith("trial_"))

    (directory / winner["directory"] / "best_model.pth").rename(tmp_path / "away")
    (directory / "summary" / "test_metrics.json").unlink()
    assert confirm("--evaluate_test") == 0
    told = f"\nNot measured on the test lines: the model of trial {winner['trial']} (confirm/"
    assert told in capfd.readouterr().out
    (tmp_path / "away").rename(directory / winner["directory"] / "best_model.pth")

    assert confirm("--evaluate_test") == 0
    printed = capfd.readouterr().out
    assert f"\nModel of the confirmed winner, trial {winner['trial']} (confirm/" in printed
    assert "Completed runs: 4 of 4\n" in printed
    assert "| epoch " not in printed, "nothing is trained again"
    assert f"Winner: trial {winner['trial']}; " in printed
    assert read(directory) == found
    assert len(open_study(directory / "confirm").get_trials()) == 4


def test_broken_confirmation_goes_on_and_equals_an_unbroken_one(
    confirm: Run,
    finished: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put_back: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory, whole = tmp_path / "c", tmp_path / "whole"
    shutil.copytree(finished["directory"], whole)
    assert confirm("--keep_checkpoints", "1", checkpoint_dir=str(whole)) == 0
    for entry in read(whole)["candidates"]:
        best = max(entry["runs"], key=lambda found: found["value"])
        assert (whole / best["directory"] / "best_model.pth").exists()
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({3: "signal_search_late"}))
    assert confirm() == 143
    put_back()
    assert not (directory / "summary" / "confirmation.json").exists(), "the last run is missing"
    states = [state for _, state, _ in trials_of(directory / "confirm")]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    before = snapshot(directory / "confirm")
    capfd.readouterr()
    assert confirm() == 0
    printed = capfd.readouterr().out
    assert "Completed runs: 3 of 4\n" in printed
    assert "trial 3 was interrupted: a new trial goes on with it" in printed
    assert "trial   2 | epoch" not in printed
    assert "trial   4 | epoch  1/2" not in printed, "no epoch is trained twice"
    states = [state for _, state, _ in trials_of(directory / "confirm")]
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    after = snapshot(directory / "confirm")
    assert all(after[n] == content for n, content in before.items() if "trial_002" in n)
    assert values_by_seed(directory) == values_by_seed(whole)
    found, expected = read(directory), read(whole)
    assert [e["mean"] for e in found["candidates"]] == [e["mean"] for e in expected["candidates"]]
    assert_same_weights(
        directory / "summary" / "best_model.pth", whole / "summary" / "best_model.pth"
    )


@pytest.mark.parametrize("method", ["start_next", "hear_end"])
def test_confirmation_that_was_killed_goes_on(
    method: str, confirm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search process ends in the second run's middle, as by kill -9: nothing is told."""

    class Killed(BaseException):
        pass

    real = getattr(loop_module.Search, method)

    def killed(search: Any, *arguments: Any) -> Any:
        source = getattr(search.supply, "source", None)
        if isinstance(source, Repeater) and search.complete == 1:
            if method == "start_next":
                search.supply.next()  # asked for, and not started
            raise Killed
        return real(search, *arguments)

    monkeypatch.setattr(loop_module.Search, method, killed)
    with pytest.raises(Killed):
        confirm()
    monkeypatch.setattr(loop_module.Search, method, real)
    directory = tmp_path / "c"
    states = [state for _, state, _ in trials_of(directory / "confirm")]
    assert states == ["COMPLETE", "RUNNING"]
    page = (directory / "summary" / "report.html").read_text()
    assert "3 trials: 3 complete of 3 wanted" in page, (
        "the report is of the search that is confirmed"
    )
    assert re.search("trained again with new seeds. [34] runs to go", page)
    assert confirm() == 0
    trials = open_study(directory / "confirm").get_trials()
    complete = [t.user_attrs["seed"] for t in trials if t.state == TrialState.COMPLETE]
    assert len(complete) == len(set(complete)) == 4, "none is lost, none is repeated"
    assert all(t.state.is_finished() for t in trials)
    if method == "hear_end":
        assert len(trials) == 4, "what had finished is not trained again"


def test_failed_run_counts_and_is_tried_again_by_the_same_command(
    confirm: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put_back: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "raise_error"}))
    assert confirm() == 0
    put_back()
    found = read(tmp_path / "c")
    assert [entry["failed"] for entry in found["candidates"]] == [1, 0]
    assert found["winner"]["trial"] == found["candidates"][1]["trial"]
    assert "1 failed" in capfd.readouterr().out
    # Their epochs may outlast the job: they go on in the next one.
    monkeypatch.setattr(outlook, "longest_epoch", lambda _: 7200.0)
    monkeypatch.setenv(END_TIME, str(time.time() + MARGIN_SECONDS + 3000))
    assert confirm() == 0
    assert [entry["failed"] for entry in read(tmp_path / "c")["candidates"]] == [0, 0]


def test_time_that_is_up_leaves_the_rest_to_the_same_command(
    confirm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = ("--requeue_exit_code", "99")
    assert confirm("--timeout", "0.000001", "--evaluate_test", *again) == 99
    printed = capfd.readouterr().out
    assert "Confirmation: 4 of 4 runs still missing: the same command goes on.\n" in printed
    assert trials_of(tmp_path / "c" / "confirm") == []
    assert not (tmp_path / "c" / "summary" / "confirmation.json").exists()
    assert not (tmp_path / "c" / "summary" / "test_metrics.json").exists()


def test_bounded_disk_keeps_the_best_run_of_each(tmp_path: Path) -> None:
    values = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.4}
    for number in values:
        directory = tmp_path / "confirm" / f"trial_{number:03d}"
        directory.mkdir(parents=True)
        for name in ("best_model.pth", "final_model.pth", "metrics.json"):
            (directory / name).touch()
    candidates = [Candidate(row(4, 0.9), (10, 11)), Candidate(row(7, 0.8), (12, 13))]
    runs = [row(number, value, 10 + number) for number, value in values.items()]
    found = summarise(candidates, runs, [row(4, 0.9), row(7, 0.8)])
    assert found is not None
    remove_other_weights(tmp_path, found)
    with_weights = {path.parent.name for path in tmp_path.rglob("*.pth")}
    assert with_weights == {"trial_001", "trial_002"}
    assert len(list(tmp_path.rglob("metrics.json"))) == 4


def test_waits_for_the_trials(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "raise_error"}))
    assert run("--confirm_top", "1", "--evaluate_test") == 0
    assert "Not confirmed yet: that begins when all trials are complete.\n" in (
        capfd.readouterr().out
    )
    assert not (tmp_path / "c" / "confirm").exists()
    assert not (tmp_path / "c" / "summary" / "test_metrics.json").exists()


def test_shared_search_is_refused_at_once(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--confirm_top", "1", "--storage", "postgresql://nowhere/x") == 2
    assert capfd.readouterr().err.startswith("error: --confirm_top does not work with --storage")
    assert not (tmp_path / "c").exists()


def test_database_of_a_confirmation_heals(
    confirm: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert confirm() == 0
    found = read(tmp_path / "c")
    (tmp_path / "c" / "confirm" / "optuna_study.db").write_bytes(b"not a database")
    capfd.readouterr()
    assert confirm() == 0
    printed, warned = capfd.readouterr()
    assert "confirm/optuna_study.db is damaged" in warned
    assert "rebuilt with 4 trials from their directories: 4 COMPLETE" in warned
    assert "| epoch " not in printed
    assert read(tmp_path / "c") == found


def row(number: int, value: float | None, seed: int | None = None, state: str = "COMPLETE") -> Row:
    return Row(number, state, value, {}, None, None, {} if seed is None else {"seed": seed})


def test_result_by_hand() -> None:
    """Trial 4 was best in the search and is second with new seeds; trial 9 failed once."""
    search = [row(4, 0.9), row(7, 0.8), row(9, 0.7), row(5, None, state="PRUNED")]
    candidates = [
        Candidate(search[0], (1, 2)),
        Candidate(search[1], (3, 4)),
        Candidate(search[2], (5, 6)),
    ]
    runs = [
        *(row(0, 0.80, 1), row(1, 0.84, 2), row(2, 0.85, 3), row(3, 0.83, 4), row(4, 0.99, 5)),
        row(5, None, 6, "FAIL"),
        row(6, 1.0, 77),  # of an earlier confirmation, with other candidates
    ]
    found = summarise(candidates, runs, search)
    assert found is not None
    assert [e["mean"] for e in found["candidates"]] == pytest.approx([0.82, 0.84, 0.99])
    deviations = [e["deviation"] for e in found["candidates"]]
    assert deviations[:2] == pytest.approx([0.02 * 2**0.5, 0.01 * 2**0.5])
    assert deviations[2] is None
    assert [e["confirmed_rank"] for e in found["candidates"]] == [2, 1, 3]
    assert found["ranking_held"] is False
    assert found["optimism"] == pytest.approx(0.08)
    assert found["of_trials"] == [4, 7, 9]
    winner = found["winner"]
    assert (winner["trial"], winner["seed"], winner["value"]) == (7, 3, 0.85)
    assert winner["directory"] == "confirm/trial_002"
    text = describe(found)
    assert text[2].split() == ["4", "90.00%", "82.00", "±", "2.83", "%", "1", "->", "2"]
    assert text[5] == (
        "The ranking did not hold. The search's best value was 8.00 points too high."
    )
    # (0.02² · 2 + 0.01² · 2) / 2, its root twice: 4.47 points, and the lead is 2.
    assert "2.00 points, is less than twice its standard error (2.24)" in text[-1]
    assert summarise(candidates, [], search) is None


def test_what_no_seed_changes_is_no_evidence() -> None:
    """A descriptor that has the search's value again: that says nothing about luck in it."""
    descriptor, network = replace(row(0, 0.9), params={"backbone": "cohog"}), row(1, 0.8)
    both = [Candidate(descriptor, (1, 2)), Candidate(network, (3, 4))]
    runs = [row(0, 0.9, 1), row(1, 0.8, 3), row(2, 0.9, 2), row(3, 0.8, 4)]
    found = summarise(both, runs, [descriptor, network])
    assert found is not None
    text = "\n".join(describe(found))
    assert "The ranking held.\n" in text
    assert "nothing about how much of it is luck" in text
    found = summarise(both[1:], runs, [network])
    assert found is not None
    text = "\n".join(describe(found))
    assert "neither too high nor too low" in text
    assert "luck" not in text


def test_second_that_failed_once_may_have_the_higher_mean() -> None:
    search = [row(0, 0.9), row(1, 0.8)]
    candidates = [Candidate(search[0], (1, 2)), Candidate(search[1], (3, 4, 5))]
    runs = [row(0, 0.90, 1), row(1, 0.91, 2), row(2, 0.95, 3), row(3, 0.96, 4)]
    found = summarise(candidates, [*runs, row(4, None, 5, "FAIL")], search)
    assert found is not None
    assert found["winner"]["trial"] == 0
    assert describe(found)[-1] == "  trial 1 has a higher mean, but failed with some of its seeds"


def test_candidates_keep_their_seeds_when_more_are_asked_for() -> None:
    rows = [row(0, 0.5), row(1, 0.7), row(2, 0.7), row(3, None, state="FAIL")]
    two = candidates_of(rows, 2, 2, seed=0)
    assert [c.row.number for c in two] == [1, 2]
    more = candidates_of(rows, 5, 3, seed=0)
    assert [c.row.number for c in more] == [1, 2, 0]
    assert [c.seeds[:2] for c in more[:2]] == [c.seeds for c in two]
    assert len({seed for c in more for seed in c.seeds}) == 9
    assert two != candidates_of(rows, 2, 2, seed=1)


def test_run_that_is_not_wanted_any_more_takes_no_place() -> None:
    """One of trial 0 waits to be gone on with when the search has found better ones."""
    search = optuna.create_study(direction="maximize")
    for value in (0.5, 0.6, 0.9):
        search.add_trial(create_trial(value=value, params={}, distributions={}))
    rows = [row(number, value) for number, value in enumerate((0.5, 0.6, 0.9))]
    study = optuna.create_study(direction="maximize")
    for candidate in candidates_of(rows[:2], 2, 1, seed=0):
        (seed,) = candidate.seeds
        study.add_trial(
            create_trial(
                state=TrialState.FAIL,
                user_attrs={"draw": candidate.row.number, "seed": seed, "interrupted": True},
            )
        )
    assert [t.user_attrs["draw"] for t in study.trials] == [1, 0]
    repeater = Repeater(search, candidates_of(rows, 2, 1, seed=0))
    lines = continue_interrupted(study, {"seed": repeater.seeds})
    assert lines == ["trial 0 was interrupted: a new trial goes on with it"]
    continue_interrupted(study, {})  # as an earlier run did, when all were wanted
    drawn = [repeater.ask(study) for _ in range(repeater.missing([]))]
    assert [t and t.user_attrs["draw"] for t in drawn] == [1, 2]
    assert repeater.ask(study) is None
    assert [t.state for t in study.trials].count(TrialState.RUNNING) == 2
    # Wanted again, it goes on.
    again = Repeater(search, candidates_of(rows, 3, 1, seed=0))
    assert continue_interrupted(study, {"seed": again.seeds}) == [
        "trial 3 was interrupted: a new trial goes on with it"
    ]


def test_placeholder_of_a_recovered_database_has_no_seed() -> None:
    rows = [row(0, 0.5, seed=7), row(1, None, state="FAIL")]
    assert seeds_of(rows, "COMPLETE", "FAIL") == {7}


def test_interrupted_run_is_still_to_be_done() -> None:
    interrupted, failed = row(1, None, 8, "FAIL"), row(2, None, 9, "FAIL")
    interrupted.attributes["interrupted"] = True
    assert seeds_of([row(0, 0.5, 7), interrupted, failed], "COMPLETE", "FAIL") == {7, 9}


def test_confirmation_of_fewer_trials_is_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "summary").mkdir()
    winner = {"trial": 0, "directory": "confirm/trial_002"}
    (tmp_path / "summary" / "confirmation.json").write_text(
        json.dumps({"of_trials": [0, 1], "winner": winner})
    )
    rows = [row(0, 0.5), row(1, 0.7), row(2, None, state="FAIL")]
    assert read_confirmation(tmp_path, rows) is not None
    chosen = chosen_model(tmp_path, rows)
    assert chosen is not None
    assert (chosen.trial, chosen.directory) == (0, tmp_path / "confirm" / "trial_002")
    extended = [*rows, replace(rows[0], number=3)]
    assert read_confirmation(tmp_path, extended) is None
    chosen = chosen_model(tmp_path, extended)
    assert chosen is not None
    assert (chosen.trial, chosen.directory) == (1, tmp_path / "trial_001")
    # The runs of a confirmation, looked at by themselves, are not confirmed by anything.
    chosen = chosen_model(tmp_path / "confirm", rows)
    assert chosen is not None
    assert not chosen.is_confirmed
