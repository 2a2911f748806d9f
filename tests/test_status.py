"""How a search stands: as a table, as JSON, watched; and how long it still takes."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState
from searches import leave_journal, make_search
from test_search import Run, run

from hyperparameter_search import main
from writer_search.common import locks
from writer_search.results import status as status_module
from writer_search.results.chosen import Chosen, best_copy, chosen_model, publish
from writer_search.results.estimate import (
    T80,
    Range,
    finished_epochs,
    range_text,
    seconds_left,
    unbroken,
)
from writer_search.results.rows import Row, trial_dir
from writer_search.results.status import read_status, status_json, status_text, watch
from writer_search.results.tables import (
    SummaryFiles,
    closing_lines,
    floor_lines,
    was_cut_short,
)
from writer_search.study.store import open_study

__all__ = ["run"]  # the fixture


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty trials: complete, pruned, failed."""
    directory = tmp_path_factory.mktemp("search") / "c"
    make_search(directory, 20)
    return directory


def add_running(directory: Path, epochs: int) -> int:
    study = open_study(directory)
    number = int(study.ask().number)
    own = trial_dir(directory, number)
    own.mkdir()
    rows = [{"epoch": e, "macro_top1": 0.5 - 0.1 * e, "seconds": 2.0} for e in range(1, epochs + 1)]
    (own / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return number


# ------------------------------------------------------------------------------- table and program


def test_table_has_the_best_first_and_the_rest_by_count(finished: Path) -> None:
    printed = status_text(read_status(finished))
    lines = printed.splitlines()
    assert lines[0] == f"{finished}: not running"
    rows = [line.split() for line in lines[3 : 3 + status_module.SHOWN_TRIALS]]
    values = [float(words[3].rstrip("%")) for words in rows]
    assert values == sorted(values, reverse=True)
    assert f"and {20 - status_module.SHOWN_TRIALS} more" in printed
    assert max(len(line) for line in lines[2:16]) <= 80
    assert "Completed trials: 14 | pruned: 3 | failed: 3" in printed
    assert "Time left" not in printed


def test_json_tells_every_trial(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--status", "--json", "--checkpoint_dir", str(finished)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["states"] == {"COMPLETE": 14, "FAIL": 3, "PRUNED": 3}
    assert (found["active"], found["seconds_left"], found["running"]) == (False, None, [])
    trials = open_study(finished).get_trials(deepcopy=False)
    assert [t["params"] for t in found["trials"]] == [t.params for t in trials]
    assert [t["state"] for t in found["trials"]] == [t.state.name for t in trials]
    complete = {t.number: t.value for t in trials if t.state == TrialState.COMPLETE}
    assert {t["number"]: t["value"] for t in found["trials"] if t["value"] is not None} == complete
    assert found["best"]["value"] == max(v for v in complete.values() if v is not None)
    assert found["trials"][3]["failure"] == "loss is nan in epoch 6"


def test_running_and_cut_off_trials_are_told_apart(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(finished, directory)
    number = add_running(directory, 3)
    with locks.DirectoryLock(directory):
        found = json.loads(status_json(read_status(directory)))
    (running,) = found["running"]
    assert (running["number"], running["epoch"], running["best_epoch"]) == (number, 3, 1)
    assert (running["value"], running["best"]) == (pytest.approx(0.2), pytest.approx(0.4))
    assert not running["stalled"]
    assert found["holder"].startswith("pid ")
    assert found["seconds_left"]["high"] > 0
    own = trial_dir(directory, number)
    (own / "config.json").write_text("{}")
    (own / "train.log").touch()
    for name, is_stalled in (("config.json", False), ("history.jsonl", False), ("train.log", True)):
        os.utime(own / name, (1, 1))
        with locks.DirectoryLock(directory):
            (seen,) = read_status(directory).running
        assert seen.stalled == is_stalled, "the newest of its files tells"
    assert seen.note.startswith("stalled: no sign of life for")

    copied = tmp_path / "copy"  # on another machine: nobody holds its lock
    shutil.copytree(directory, copied)
    found = json.loads(status_json(read_status(copied)))
    assert (found["active"], found["holder"], found["seconds_left"]) == (False, None, None)
    (running,) = found["running"]
    assert running["seconds"] == 6.0, "not since its start: nobody knows when it was cut off"
    assert "cut off" in running["note"]


def test_status_of_a_search_that_was_killed_within_a_transaction(
    finished: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(finished, directory)
    states = [row.state for row in read_status(directory).rows]
    leave_journal(directory / "optuna_study.db")
    before = {path: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert [row.state for row in read_status(directory).rows] == states
    assert {path: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before


def test_reading_changes_nothing_and_needs_no_permission(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    finished.chmod(0o555)
    try:
        read_status(finished)
    finally:
        finished.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--json"], "--json needs --status"),
        (["--watch"], "--watch needs --status"),
        (["--status", "--json", "--watch"], "cannot be combined"),
        (["--compare", "a", "--json"], "--json needs --status"),
        (["--data_root", "a", "--confirm_seeds", "2"], "--confirm_seeds needs --confirm_top"),
        (["--demo", "--space", "a"], "leave out --space"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--checkpoint_dir", str(tmp_path)]) == 2
    assert told in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- watch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen_on(terminal: io.StringIO) -> list[str]:
    """Play the two control sequences that are used: up n lines, erase to the end."""
    lines: list[str] = []
    for piece in terminal.getvalue().split("\x1b[J"):
        text, _, up = piece.partition("\x1b[")
        lines += text.splitlines()
        if up:
            lines = lines[: len(lines) - int(up.rstrip("F"))]
    return lines


def test_watch_refreshes_in_place_until_the_search_ends(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(finished, directory)
    number = add_running(directory, 3)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: (60, 60))
    terminal, lock, times = Terminal(), locks.DirectoryLock(directory), []

    def sleep(seconds: float) -> None:
        times.append(seconds)
        if len(times) == 2:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(status_module.time, "sleep", sleep)
    lock.__enter__()
    watch(lambda: read_status(directory), terminal)
    assert len(times) == 2
    seen = seen_on(terminal)
    assert seen[0].startswith(f"{directory}"[:59])
    assert len([line for line in seen if line.startswith(f"{number:5d}  ")]) == 1
    assert max(map(len, seen)) < 60, "a line that wraps could not be overwritten"


def test_watch_of_a_shared_search_outlasts_the_moment_between_two_trials(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a running trial tells that it runs."""
    stopped, pauses = read_status(finished), []
    assert not stopped.active
    states = iter([True, False, True, False, False, True, False, False, False])
    monkeypatch.setattr(status_module.time, "sleep", pauses.append)
    watch(lambda: replace(stopped, active=next(states)), Terminal(), looks=3)
    assert len(pauses) == 8


def test_interrupt_of_a_look_is_no_traceback(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperparameter_search.read_status", interrupted)
    assert main(["--status", "--checkpoint_dir", str(finished)]) == 130


def test_watch_ends_with_ctrl_c(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(status_module.time, "sleep", interrupted)
    with locks.DirectoryLock(finished):
        watch(lambda: read_status(finished), Terminal())


def test_watch_prints_once_where_nobody_watches(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with locks.DirectoryLock(finished):
        assert main(["--status", "--watch", "--checkpoint_dir", str(finished)]) == 0
    printed = capfd.readouterr().out
    assert printed.count(str(finished)) == 2  # heading, model
    assert "\x1b" not in printed


# ---------------------------------------------------------------------------------------- estimate


def test_nothing_is_estimated_from_nothing() -> None:
    assert seconds_left([], [(0.0, 100.0)], 3, 10, 1, 30) is None
    assert range_text(None) == "not known yet"


def test_one_running_trial_gives_what_its_limits_allow() -> None:
    low, high = seconds_left([], [(2.0, 20.0)], 1, 10, 1, 30) or (0, 0)
    assert (low, high) == (10.0 + 3 * 10.0, 8 * 10.0 + 100.0)


def test_no_trial_ends_before_its_patience_or_the_pruner_s() -> None:
    assert (seconds_left([], [(3.0, 30.0)], 0, 100, 1, 20) or (0, 0))[0] == (21 - 3) * 10.0
    assert (seconds_left([], [(3.0, 30.0)], 0, 100, 1, 8) or (0, 0))[0] == (9 - 3) * 10.0


def test_what_was_trained_before_a_break_did_not_take_the_seconds_after_it() -> None:
    assert unbroken(60.0, 50.0, 100.0) == (60.0, 600.0)
    assert unbroken(50.0, 50.0, 7.0) == (0.0, 0.0), "it tells nothing yet"
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    row = Row(0, "COMPLETE", 0.5, {}, ended - timedelta(seconds=100), ended)
    row.attributes.update(epochs=60, epochs_before=50)
    assert finished_epochs([row]) == [(60.0, 600.0)]


def test_what_is_fitted_at_once_says_nothing_of_epochs() -> None:
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    started = ended - timedelta(seconds=9)
    row = Row(0, "COMPLETE", 0.9, {"backbone": "cohog"}, started, ended, {"epochs": 1})
    assert finished_epochs([row]) == []


def test_search_of_descriptors_alone_is_foreseen_by_them(
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A backbone that is fixed is no trial's own hyperparameter."""
    assert run("--fix", "backbone=cohog", n_trials="3", epochs="100") == 0
    assert "\nCoHOG + LDA, no training: " in capfd.readouterr().out
    directory = tmp_path / "c"
    rows = read_status(directory).rows
    assert all(row.is_fitted for row in rows)
    assert re.search(r"complete +1/1 ", status_text(read_status(directory)))
    assert not floor_lines(rows[1:], read_status(directory).space), "of the first draw alone"
    took = [row.seconds or 0.0 for row in rows]
    study = open_study(directory)
    study.set_user_attr("run", {"n_trials": 5, "n_jobs": 1, "to_start": 5, "first_trial": 0})
    with locks.DirectoryLock(directory):
        left = read_status(directory).left
    assert left is not None
    assert min(took) <= left[0] <= 2 * sum(took) / 3 <= left[1] <= 2 * max(took) + 1e-3


def test_command_that_fails_again_ends_an_interruption() -> None:
    rows = [
        Row(0, "COMPLETE", 0.5, {"pooling": "gem"}, None, None),
        Row(1, "FAIL", None, {"pooling": "avg"}, None, None, {"interrupted": True}),
    ]
    assert was_cut_short(rows)
    assert not was_cut_short([*rows, Row(2, "FAIL", None, {"pooling": "avg"}, None, None)])


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_space_with_an_interrupted_configuration_is_not_exhausted(
    is_interrupted: bool, tmp_path: Path
) -> None:
    rows = [
        Row(0, "COMPLETE", 0.5, {"pooling": "gem"}, None, None),
        Row(1, "FAIL", None, {"pooling": "avg"}, None, None, {"interrupted": is_interrupted}),
    ]
    assert was_cut_short(rows) is is_interrupted
    *_, last = closing_lines(tmp_path, rows, 3, {}, exhausted=True)
    assert last == "2 of 3 trials still missing: the same command runs them."
    rows.append(Row(2, "COMPLETE", 0.4, {"pooling": "avg"}, None, None))
    assert not was_cut_short(rows)
    *_, last = closing_lines(tmp_path, rows, 3, {}, exhausted=True)
    assert "the space has no other configuration" in last


def test_best_trial_of_another_machine_is_named_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    own = Path("own")
    itself = {"owner": {"checkpoint_dir": str(own.absolute())}}
    owner = {"owner": {"checkpoint_dir": str(other)}}
    (own / "summary").mkdir(parents=True)
    for attributes, directory in ((itself, "trial_003"), (owner, str(other / "trial_003"))):
        row = Row(3, "COMPLETE", 0.5, {}, None, None, attributes)
        SummaryFiles(own, {}).write([row])
        best = json.loads((own / "summary" / "best_trial.json").read_text())
        assert (best["directory"], best["model"]) == (directory, f"{directory}/best_model.pth")
    model = other / "trial_003" / "best_model.pth"
    assert f"Model: {model} (it is not there)" in closing_lines(own, [row], 1, {})
    stale = own / "summary" / "best_model.pth"
    stale.write_text("of a trial that was best")
    said = f"Model: {model} (it is not there; {stale} may be another trial's)"
    assert said in closing_lines(own, [row], 1, {})


def test_trials_whose_directories_were_brought_together_are_at_home_there(tmp_path: Path) -> None:
    """As `--recover` and a local confirmation of a shared study want them."""
    old, here = tmp_path / "old", tmp_path / "here"
    row = Row(3, "COMPLETE", 0.5, {}, None, None, {"owner": {"checkpoint_dir": str(old)}})
    for home in (old, here):
        directory = home / "trial_003"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        (directory / "best_model.pth").write_text("weights")
    (here / "summary").mkdir()
    assert chosen_model(here, [row]) == Chosen(3, old / "trial_003", False)
    shutil.rmtree(old)
    chosen = chosen_model(here, [row])
    assert chosen == Chosen(3, here / "trial_003", False)
    assert publish(here, chosen) == best_copy(here)
    (here / "trial_003" / "config.json").unlink()  # only what another search said of its end
    assert chosen_model(here, [row]) == Chosen(3, old / "trial_003", False)


def test_floor_is_told_where_its_head_is_fixed() -> None:
    first = {"draw": 0}
    row = Row(0, "COMPLETE", 0.9, {"backbone": "cohog"}, None, None, first)
    space = {"cohog_head": "lda", "backbone": {"choices": ["cohog", "tiny"]}}
    assert floor_lines([row], space) == ["CoHOG + LDA, no training: 90.00% (trial 0)"]
    assert floor_lines([row], {**space, "cohog_head": "softmax"}) == []


def test_nothing_left_takes_no_time() -> None:
    assert seconds_left([(10.0, 100.0)] * 3, [], 0, 10, 1, 30) == (0.0, 0.0)


def test_equal_trials_are_foreseen_exactly() -> None:
    assert seconds_left([(10.0, 100.0)] * 4, [], 3, 10, 1, 30) == (300.0, 300.0)
    assert seconds_left([(10.0, 100.0)] * 4, [(4.0, 40.0)], 0, 10, 1, 30) == (60.0, 60.0)


def test_trials_at_once_divide_the_work_but_not_the_last_trial() -> None:
    low, high = seconds_left([(10.0, 100.0)] * 4, [], 3, 10, 3, 30) or (0, 0)
    assert low <= 100.0 <= high <= 200.0


def draw_trials(generator: random.Random, count: int) -> list[tuple[float, float]]:
    """Draw trials of 30 epochs, a third of them pruned, of backbones that differ in speed."""
    trials = []
    for _ in range(count):
        epochs = generator.randint(6, 15) if generator.random() < 0.35 else 30
        trials.append((float(epochs), epochs * generator.choice([2.0, 3.0, 5.0])))
    return trials


@pytest.mark.parametrize(("known", "to_start"), [(2, 10), (3, 10), (4, 20), (10, 10), (30, 5)])
def test_range_holds_the_truth_as_often_as_it_says(known: int, to_start: int) -> None:
    generator = random.Random(known)
    held, widths = [], []
    for _ in range(400):
        took = sum(seconds for _, seconds in draw_trials(generator, to_start))
        left = seconds_left(draw_trials(generator, known), [], to_start, 30, 1, 30)
        assert left is not None
        held.append(left[0] <= took <= left[1])
        widths.append((left[1] - left[0]) / took)
    assert statistics.mean(held) > 0.68  # it says four in five; few trials are no normal sample
    if known >= 10:
        assert statistics.median(widths) < 1.0, "a range that holds everything says nothing"


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.7])
def test_range_holds_the_truth_where_some_trials_are_descriptors(share: float) -> None:
    generator = random.Random(3)

    def network() -> tuple[float, float]:
        epochs = generator.randint(45, 90)
        return float(epochs), epochs * generator.uniform(2.3, 2.7)

    held = []
    for _ in range(400):
        networks, descriptors = [network()], [generator.uniform(15, 30)]  # a search's first two
        for _ in range(3):
            if generator.random() < share:
                descriptors.append(generator.uniform(15, 30))
            else:
                networks.append(network())
        is_fitted = [generator.random() < share for _ in range(7)]
        took = sum(generator.uniform(15, 30) if one else network()[1] for one in is_fitted)
        left = seconds_left(networks, [], len(is_fitted), 100, 1, 20, descriptors)
        assert left is not None
        held.append(left[0] <= took <= left[1])
    assert statistics.mean(held) > 0.75


def test_descriptors_alone_do_not_foretell_networks() -> None:
    limits = seconds_left([], [(2.0, 50.0)], 10, 100, 1, 20)
    assert seconds_left([], [(2.0, 50.0)], 10, 100, 1, 20, []) == limits
    left = seconds_left([], [(2.0, 50.0)], 10, 100, 1, 20, [20.0, 21.0, 22.0])
    assert left is not None
    assert limits is not None
    assert left[1] == limits[1] > 10 * 100 * 25


def test_quantiles_are_student_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(T80, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.9, degrees), abs=5e-4)


@pytest.mark.parametrize(
    ("left", "text"),
    [((30.0, 90.0), "30.0 s to 1 min 30 s"), ((60.0, 60.0), "about 1 min 0 s")],
)
def test_range_for_people(left: Range, text: str) -> None:
    assert range_text(left) == text


def test_run_that_has_pruned_has_so_many_trials_less_to_start(finished: Path) -> None:
    """Of a run that may start five trials from number 10 on, ten are gone: none is left."""
    rows = read_status(finished).rows
    count: Callable[..., int] = status_module._to_start
    assert count({"to_start": 12, "first_trial": 10}, rows) == 2
    assert count({"to_start": 5, "first_trial": 10}, rows) == 0
    assert count({}, rows) == 0
