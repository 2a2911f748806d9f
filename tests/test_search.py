"""The search, by its command line: what it prints, stores and refuses, in one process."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from faults import RealChild, faulty
from optuna.trial import TrialState, create_trial

from data import find_lines
from hyperparameter_search import main
from writer_search.common import locks
from writer_search.common.errors import UserError
from writer_search.config import TrialConfig
from writer_search.processes import child as child_module
from writer_search.processes import runner as runner_module
from writer_search.processes import running as running_module
from writer_search.processes.causes import by_signal
from writer_search.processes.messages import CONTINUE, PRUNE, STOP, Job
from writer_search.processes.running import Report, RunningTrial
from writer_search.results.rows import read_history
from writer_search.results.status import read_status, status_text
from writer_search.space import default_space, every_draw, narrow
from writer_search.study import draws
from writer_search.study import loop as loop_module
from writer_search.study.draws import Drawer, SpaceExhaustedError
from writer_search.study.loop import Search
from writer_search.study.store import open_study
from writer_search.training.outcomes import Pruned, Stopped

Run = Callable[..., int]


def arguments(lines_root: Path, checkpoint_dir: Path, /, *more: str, **replaced: str) -> list[str]:
    """Give the command's arguments for a search on small lines with a small model."""
    flags = {
        "data_root": str(lines_root),
        "checkpoint_dir": str(checkpoint_dir),
        "n_trials": "2",
        "epochs": "2",
        **replaced,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    fixed = ["backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8"]
    # Measured, it may differ between two searches that a test compares.
    fixed.append("precision=float32")
    argv += [word for value in fixed for word in ("--fix", value)]
    return [*argv, "--use_all_writers", "--weights", "none", "--device", "cpu", *more]


@pytest.fixture
def run(lines_root: Path, tmp_path: Path) -> Run:
    """Run the command of `arguments`, in `tmp_path / "c"` unless it says otherwise."""

    def command(*more: str, **replaced: str) -> int:
        return main(arguments(lines_root, tmp_path / "c", *more, **replaced))

    return command


class PruneTrial(optuna.pruners.BasePruner):
    """Prunes one trial, at its first epoch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number == self.number


def trials_of(directory: Path) -> list[tuple[int, str, float | None]]:
    """Read the trials by the query that docs/results.md gives."""
    connection = sqlite3.connect(directory / "optuna_study.db")
    rows = connection.execute(
        "SELECT t.number, t.state, v.value FROM trials t LEFT JOIN trial_values v USING (trial_id)"
        " ORDER BY t.number"
    ).fetchall()
    connection.close()
    return rows


def params_of(directory: Path) -> list[dict[str, Any]]:
    return [trial.params for trial in open_study(directory).get_trials(deepcopy=False)]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "search.lock"
    }


# --------------------------------------------------------------------------------- the whole story


def test_new_resumed_and_extended(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "c"
    assert run() == 0
    printed, problems = capfd.readouterr()
    assert problems == ""
    rule = "=" * 70
    assert (
        f"{rule}\nSTARTING NEW HYPERPARAMETER SEARCH\n{rule}\n"
        f"Study database: {directory}/optuna_study.db\n"
        "Number of trials: 2\n"
        "Optimization metric: Validation Macro Top-1 Accuracy\n"
        "Note: This search is resumable. You can safely stop and restart.\n"
        f"{rule}\n"
    ) in printed
    assert re.search(r"^trial   0 \| epoch  1/2 \| loss \d", printed, re.MULTILINE)
    assert re.search(r"^trial   1 \| complete \| val macro top-1 ", printed, re.MULTILINE)
    first = trials_of(directory)
    assert [(number, state) for number, state, _ in first] == [(0, "COMPLETE"), (1, "COMPLETE")]

    before = snapshot(directory)
    assert run() == 0
    assert "Remaining trials: 0" in capfd.readouterr().out
    assert trials_of(directory) == first, "the same command runs nothing again"
    kept = {name: content for name, content in before.items() if name.startswith("trial_")}
    assert kept.items() <= snapshot(directory).items()

    assert run(n_trials="4") == 0
    best = 100 * max(value for _, _, value in first if value is not None)
    printed = capfd.readouterr().out
    assert (
        f"{rule}\nRESUMING EXISTING STUDY\n{rule}\n"
        f"Study loaded from: {directory}/optuna_study.db\n"
        "Completed trials: 2\nPruned trials: 0\nFailed trials: 0\nRemaining trials: 2\n"
        f"Best value so far: {best:.2f}%\n{rule}\n"
    ) in printed
    assert trials_of(directory)[:2] == first
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE"] * 4
    params = params_of(directory)
    assert params[0]["learning_rate"] == 0.002, "the known-good values come first"
    assert len({json.dumps(p, sort_keys=True) for p in params}) == 4, "no draw repeats"


def test_files_of_a_search(run: Run, lines_root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    assert run() == 0
    names = {path.name for path in (directory / "trial_001").iterdir()}
    assert names == {
        "best_model.pth",
        "config.json",
        "curves.svg",
        "final_model.pth",
        "history.jsonl",
        "metrics.json",
        "predictions.csv",
        "train.log",
        "trial.json",
    }
    study = open_study(directory)
    record = json.loads((directory / "trial_001" / "trial.json").read_text())
    trial = study.get_trials()[1]
    assert record["params"] == trial.params
    assert record["value"] == trial.value
    assert {int(k): v for k, v in record["intermediate_values"].items()} == (
        trial.intermediate_values
    )
    restored = {
        name: optuna.distributions.json_to_distribution(text)
        for name, text in record["distributions"].items()
    }
    assert restored == trial.distributions
    config = json.loads((directory / "trial_001" / "config.json").read_text())
    assert config["config"]["learning_rate"] == trial.params["learning_rate"]
    assert {"versions", "git_commit", "command", "data_fingerprint", "config_hash"} <= set(config)
    text = (directory / "summary" / "trials.csv").read_text()
    table = list(csv.DictReader(text.splitlines()))
    assert [row["state"] for row in table] == ["COMPLETE", "COMPLETE"]
    best = json.loads((directory / "summary" / "best_trial.json").read_text())
    assert best["value"] == study.best_value
    assert best["number"] == study.best_trial.number
    source = directory / f"trial_{best['number']:03d}" / "best_model.pth"
    assert (directory / "summary" / "best_model.pth").read_bytes() == source.read_bytes()
    assert json.loads((directory / "summary" / "data_report.json").read_text())["broken"] == {}
    with (directory / "summary" / "split.csv").open(newline="") as file:
        split = [tuple(line.values()) for line in csv.DictReader(file)]
    lines = find_lines(lines_root)
    assert sorted(split) == sorted((n.path, n.writer, n.page, n.split) for n in lines)


def test_same_seed_gives_the_same_search_whatever_the_breaks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three trials in one run, or in three: the same draws and the same values."""
    assert run(n_trials="3") == 0
    whole = [(t.params, t.value) for t in open_study(tmp_path / "c").get_trials()]
    for n_trials in "123":
        assert run(n_trials=n_trials, checkpoint_dir=str(tmp_path / "broken")) == 0
    assert [(t.params, t.value) for t in open_study(tmp_path / "broken").get_trials()] == whole


def test_two_trials_at_once_give_the_same_as_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A trial's result does not depend on its neighbour, bit for bit; lines are not torn."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert run("--n_jobs", "2", "--sampler", "random", n_trials="4") == 0
    lines = capfd.readouterr().out.splitlines()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one thread each here too
    assert (
        run(
            "--n_jobs",
            "1",
            "--sampler",
            "random",
            checkpoint_dir=str(tmp_path / "one"),
            n_trials="4",
        )
        == 0
    )
    parallel = {json.dumps(t.params): t.value for t in open_study(tmp_path / "c").get_trials()}
    alone = {json.dumps(t.params): t.value for t in open_study(tmp_path / "one").get_trials()}
    assert parallel == alone
    for number in range(4):
        weights = [
            torch.load(tmp_path / name / f"trial_{number:03d}/final_model.pth", weights_only=True)
            for name in ("c", "one")
        ]
        assert weights[0]["config"] == weights[1]["config"]
        pairs = zip(weights[0]["model"].values(), weights[1]["model"].values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    trial_lines = [line for line in lines if line.startswith("trial ")]
    assert len(trial_lines) == 4 * 3
    assert all(re.match(r"trial +\d+ \| ", line) for line in trial_lines)


def test_the_last_of_a_finite_space_is_drawn() -> None:
    """One of 351, which a random draw is once in thousands."""
    descriptor = {"cohog_smoothing": 1.0, "cohog_edge": 0.6, "cohog_variation": 1.0}
    numbers = ("learning_rate", "weight_decay", "label_smoothing", "dropout")
    fix = dict.fromkeys(numbers, 0.01) | {"augment_geometry": 1.0, "augment_photometry": 1.0}
    ranges = {
        "backbone": {"choices": ["cohog", "tiny"]},
        "cohog_reach": {"low": 2, "high": 4},
        "cohog_head": {"choices": ["lda", "softmax"]},
        "cohog_penalty": {"choices": [0.01, 0.1]},
        "with_cohog": {"choices": [False, True]},
        "cohog_weight": {"choices": [1.0, 2.0]},
        "pooling": {"choices": ["avg", "gem", "attention"]},
        "batch_size": {"choices": [8, 16]},
        "mixup": {"choices": [False, True]},
        "mixup_alpha": {"choices": [0.1, 0.2]},
    }
    space = narrow(default_space("cpu", False), {**fix, **descriptor}, ranges)
    alone = 3 * (1 + 2)
    networks = (1 + 2 * alone) * 3 * 2 * (1 + 2)
    every = {draws.params_key(draw): draw for draw in every_draw(space)}
    assert len(every) == len(list(every_draw(space))) == alone + networks

    study = optuna.create_study()
    left = next(draw for draw in every.values() if draw.get("with_cohog"))
    drawer = Drawer(space, "random", 0)
    for number, draw in enumerate(every.values()):
        if draw is not left:
            drawn = drawer._draw(number, 1, draw)
            assert drawn.params == draw
            study.add_trial(create_trial(value=0.5, params=draw, distributions=drawn.distributions))
    trials = study.get_trials()
    last = drawer.new_draw(trials)
    assert last.params == left
    with pytest.raises(SpaceExhaustedError, match=f"all of its {len(every)} configurations have"):
        drawer.new_draw([*trials, last])


def test_finite_space_is_drawn_once_and_then_ends(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three configurations, five wanted. What failed is drawn again by the next command only."""
    space = tmp_path / "space.json"
    space.write_text('{"pooling": {"choices": ["avg", "gem", "attention"]}}')
    numbers = ("learning_rate", "weight_decay", "label_smoothing", "dropout")
    pinned = [f"{name}=0.01" for name in numbers]
    pinned += ["augment_geometry=1", "augment_photometry=1", "mixup=false"]
    flags = [word for value in pinned for word in ("--fix", value)]
    directory = tmp_path / "c"
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "raise_error"}))
    assert run("--space", str(space), *flags, n_trials="5") == 0
    drawn = [p["pooling"] for p in params_of(directory)]
    assert sorted(drawn) == ["attention", "avg", "gem"]
    printed = capfd.readouterr().out
    assert "the space is exhausted: all of its 3 configurations have been drawn" in printed
    assert "3 of 5 trials still missing: the same command runs them." in printed

    monkeypatch.setattr(runner_module, "ChildProcess", RealChild)
    assert run("--space", str(space), *flags, n_trials="5") == 0
    assert [p["pooling"] for p in params_of(directory)] == [*drawn, drawn[1]]
    assert [state for _, state, _ in trials_of(directory)][1:] == ["FAIL", "COMPLETE", "COMPLETE"]
    printed = capfd.readouterr().out
    assert "the space is exhausted" in printed
    said = "2 of 5 trials still missing, but the space has no other configuration"
    assert said in printed
    assert said in status_text(read_status(directory)), "it is remembered"
    report = (directory / "summary" / "report.html").read_text()
    assert "The space has no other configuration." in report


@pytest.mark.parametrize(
    ("choices", "ranks", "told"),
    [
        (["tiny", "cohog"], 1, []),
        (["tiny", "resnet18"], 1, ["it trains"]),
        (["tiny", "cohog"], 2, ["early"]),
    ],
)
def test_torchvision_is_imported_for_later_trials_once_the_first_one_trains(
    lines_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choices: list[str],
    ranks: int,
    told: list[str],
) -> None:
    """Once, at its first batch, or before for ranks; the program's own backbones do without."""
    space = tmp_path / "space.json"
    space.write_text(json.dumps({"backbone": {"choices": choices}}))
    noted: list[str] = []
    directory = tmp_path / "c"

    def note() -> None:
        noted.append("it trains" if (directory / "trial_000" / "train.log").exists() else "early")

    monkeypatch.setattr(loop_module, "preload_torchvision", note)
    flags = ["--space", str(space), "--gpus_per_trial", str(ranks)]
    argv = arguments(lines_root, directory, *flags, n_trials="1")
    place = argv.index("backbone=tiny")
    assert main(argv[: place - 1] + argv[place + 1 :]) == 0
    assert noted == told


# ------------------------------------------------------------------------------- faults in a trial


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("raise_error", "RuntimeError: the cat is on the keyboard"),
        ("segfault", "killed by SIGSEGV"),
        ("kill_itself", "killed by SIGKILL (by hand, or by the system's out-of-memory killer)"),
        ("exit_silently", "ended with exit code 7 without a word (train.log ends: libgomp: no)"),
        ("diverge", "the training loss is not finite in epoch 3"),
    ],
)
def test_bad_trial_fails_and_the_search_goes_on(
    fault: str,
    cause: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "c"
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: fault}))
    assert run(n_trials="3") == 0
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE", "FAIL", "COMPLETE"]
    log = (directory / "trial_001" / "error.log").read_text()
    assert f"cause:  {cause}" in log
    assert "try:    " in log
    if fault == "raise_error":
        assert "Traceback" in log
    if fault == "segfault":
        assert "last words" in log, "the end of train.log is quoted"
    printed = capfd.readouterr().out
    assert f"trial   1 | failed: {cause}" in printed
    assert "1 of 3 trials still missing: the same command runs it." in printed
    if fault == "raise_error":
        monkeypatch.setattr(runner_module, "ChildProcess", RealChild)
        assert run(n_trials="3") == 0
        states = [state for _, state, _ in trials_of(directory)]
        assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_trial_that_was_done_when_it_died_is_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "die_when_done"}))
    assert run(n_trials="1") == 0
    directory = tmp_path / "c"
    metrics = json.loads((directory / "trial_000" / "metrics.json").read_text())
    assert trials_of(directory) == [(0, "COMPLETE", metrics["value"])]
    assert not (directory / "trial_000" / "error.log").exists()
    assert (directory / "summary" / "best_model.pth").exists()


def test_hanging_trial_is_ended(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "hang"}))
    monkeypatch.setattr(running_module, "STOP_SECONDS", 0.2)
    assert run("--trial_timeout", "3", n_trials="2") == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["FAIL", "COMPLETE"]
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "ran longer than --trial_timeout 3 s at epoch 1" in log


@pytest.mark.parametrize("loop_fails", [False, True])
def test_trial_that_even_sigkill_does_not_end_is_left_behind(
    loop_fails: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs in a driver: it is recorded, and meanwhile nobody waits at full speed."""
    left_behind, looks = [], []
    seconds = 1 if loop_fails else 4  # no other trial is to end within, or one

    class Undying(RealChild):
        def kill(self) -> None:
            pass

        def end(self, seconds: float = 10.0) -> None:
            left_behind.append(self)
            self.connection.close()

    def start(work: str, job: Any) -> RealChild:
        is_first = isinstance(job, Job) and job.trial_dir.name == "trial_000"
        return Undying("faults:hang", job) if is_first else RealChild(work, job)

    look = runner_module.Runner.watch_the_clock
    monkeypatch.setattr(
        runner_module.Runner, "watch_the_clock", lambda self: looks.append(0) or look(self)
    )
    monkeypatch.setattr(runner_module, "ChildProcess", start)
    monkeypatch.setattr(running_module, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(running_module, "UNKILLABLE_SECONDS", 0.5)
    if loop_fails:
        monkeypatch.setattr(loop_module.Search, "watch_the_clock", lambda _: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError) if loop_fails else nullcontext():
            assert run("--trial_timeout", str(seconds), n_trials="2") == 0
    finally:
        for child in left_behind:
            RealChild.kill(child)
    assert len(left_behind) == 1
    states = [state for _, state, _ in trials_of(tmp_path / "c")]
    assert states == (["FAIL"] if loop_fails else ["FAIL", "COMPLETE"])
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert (
        "the search failed" if loop_fails else f"longer than --trial_timeout {seconds} s"
    ) in log
    assert "did not end, even after SIGKILL: it probably hangs in a driver" in log
    assert len(looks) < 100


def test_slow_batches_have_their_time_to_save() -> None:
    """At least 20 s, three times the slowest batch, or three times what this one has taken."""
    child, job = SimpleNamespace(order=lambda _: None), SimpleNamespace(ranks=1)
    for seen, seconds in (
        ({"slowest": 0.1}, 20),
        ({"slowest": 100.0}, 300),
        ({"heard": time.monotonic() - 50}, 150),
    ):
        trial = SimpleNamespace(number=0)
        running = RunningTrial(trial, job, child, 0, 0.0, **seen)  # type: ignore[arg-type]
        running.stop(by_signal("SIGTERM"))
        assert running.kill_at - time.monotonic() == pytest.approx(seconds, abs=1)


def test_search_knows_a_trial_s_last_epoch_as_the_trial_does() -> None:
    """Also where only the network beside a descriptor has become better."""
    config = TrialConfig(seed=0, epochs=9, patience=2, backbone="tiny", with_cohog=True)
    job = SimpleNamespace(config=config)
    running = RunningTrial(SimpleNamespace(number=0), job, None, 0, 0.0)  # type: ignore[arg-type]
    last = []
    for epoch, (both, network) in enumerate([(0.6, 0.1), (0.5, 0.2), (0.6, 0.2), (0.6, 0.2)], 1):
        metrics = {"macro_top1": both, "network_macro_top1": network}
        running.note_epoch(Report(epoch, metrics, again=False))
        last.append(running.is_last_epoch)
    assert last == [False, False, False, True]
    assert running.best == 0.6


def test_runner_wakes_for_what_is_due_first() -> None:
    """The end of a batch system's job, a trial's own limit, or the end of its time to save."""
    runner = object.__new__(runner_module.Runner)
    going = SimpleNamespace(stop_cause=None, started=100.0)
    stopping = SimpleNamespace(stop_cause=by_signal("SIGTERM"), kill_at=130.0)
    for running, stop_at, limit, due in (
        ({}, 120.0, 50.0, math.inf),  # there is nothing to stop
        ({0: going}, math.inf, None, math.inf),
        ({0: going}, 120.0, None, 120.0),
        ({0: going}, 200.0, 50.0, 150.0),
        ({0: going, 1: stopping}, 200.0, 50.0, 130.0),
        ({1: stopping}, 120.0, 20.0, 130.0),
    ):
        runner.running = running  # type: ignore[assignment]
        runner._plan = SimpleNamespace(stop_at=stop_at, trial_timeout=limit)  # type: ignore[assignment]
        assert runner.next_deadline() == due


def test_what_a_stop_did_not_save_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "signal_search_and_hang"}))
    monkeypatch.setattr(running_module, "STOP_SECONDS", 0.5)
    assert run(n_trials="1") == 143
    problems = capfd.readouterr().err
    assert "stopped by SIGTERM: trial 0 did not stop in time: only its last saved" in problems
    assert "everything is saved" not in problems
    assert "did not save" in (tmp_path / "c" / "trial_000" / "error.log").read_text()


def test_an_error_in_the_loop_saves_and_records_what_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 1's report is what the loop fails over; trial 0 is a healthy neighbour."""
    real = loop_module.Search.hear_report

    def hear_report(search: Search, running: RunningTrial, report: Report) -> None:
        if running.number == 1 and report.epoch == 2:
            raise ZeroDivisionError("a bug")
        real(search, running, report)

    monkeypatch.setattr(loop_module.Search, "hear_report", hear_report)
    with pytest.raises(ZeroDivisionError):
        run("--n_jobs", "2", n_trials="2", epochs="60")
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["FAIL", "FAIL"]
    for name in ("trial_000", "trial_001"):
        directory = tmp_path / "c" / name
        assert (directory / "latest_checkpoint.pth").exists()
        error = (directory / "error.log").read_text()
        assert "interrupted: the search failed (a bug)" in error


def test_too_many_failures_in_a_row_stop_the_search(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {**dict.fromkeys(range(1, 9), "raise_error"), 3: "segfault"}
    monkeypatch.setattr(runner_module, "ChildProcess", faulty(broken))
    assert run("--max_consecutive_failed_trials", "3", n_trials="9") == 3
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE", *["FAIL"] * 3]
    printed, problems = capfd.readouterr()
    assert "common cause: RuntimeError: the cat" in problems
    assert "trial   3 | failed: killed by SIGSEGV" in printed, "its own cause"


def test_giving_up_is_for_good_while_others_end_well(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A trial that began before the failures completes after them."""
    faults = {0: "outlast_failures", **dict.fromkeys(range(1, 9), "raise_error")}
    monkeypatch.setattr(runner_module, "ChildProcess", faulty(faults))
    flags = ("--n_jobs", "2", "--max_consecutive_failed_trials", "2")
    assert run(*flags, n_trials="9") == 3
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE", "FAIL", "FAIL"]
    problems = capfd.readouterr().err
    assert "stopped after 2 failed trials in a row; common cause: RuntimeError: the cat" in problems
    assert "Traceback" not in problems


def test_nothing_complete_is_exit_1(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "raise_error"}))
    assert run(n_trials="1") == 1
    assert not (tmp_path / "c" / "summary" / "best_model.pth").exists()


def test_signal_saves_the_trial_and_ends_the_search(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "signal_search"}))
    assert run(n_trials="3") == 143
    directory = tmp_path / "c"
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE", "FAIL"]
    assert "interrupted by SIGTERM at epoch 1" in (directory / "trial_001/error.log").read_text()
    assert (directory / "trial_001" / "latest_checkpoint.pth").exists()
    printed, problems = capfd.readouterr()
    assert "2 of 3 trials still missing" in printed
    assert problems.startswith("stopped by SIGTERM: everything is saved")
    assert "Traceback" not in printed + problems


def test_pruned_trials_do_not_count_as_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(1))
    assert run(n_trials="3") == 0
    directory = tmp_path / "c"
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert (directory / "trial_001" / "latest_checkpoint.pth").exists()
    assert json.loads((directory / "trial_001" / "trial.json").read_text())["state"] == "PRUNED"
    printed = capfd.readouterr().out
    assert "trial   1 | pruned at epoch 1" in printed
    assert "1 of 3 trials still missing" in printed


@pytest.mark.parametrize("is_pruned", [False, True])
def test_training_goes_on_before_its_report_is_answered(
    run: Run, tmp_path: Path, is_pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search stores a value first, or may be busy; a GPU would have nothing to do."""
    monkeypatch.setattr(
        draws, "make_pruner", lambda name, epochs: PruneTrial(0 if is_pruned else 9)
    )
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "report_without_an_answer"}))
    going_on, hear_report, waited = tmp_path / "c" / "going_on", loop_module.Search.hear_report, []

    def hear(search: loop_module.Search, running: Any, report: Any) -> None:
        ends = time.monotonic() + 30.0
        while running.number == 0 and not going_on.exists() and time.monotonic() < ends:
            time.sleep(0.01)
        waited.append(going_on.exists())
        hear_report(search, running, report)

    monkeypatch.setattr(loop_module.Search, "hear_report", hear)
    assert run(n_trials="1") == is_pruned
    assert waited[0], "it has trained on"
    directory = tmp_path / "c" / "trial_000"
    assert trials_of(tmp_path / "c")[0][1] == ("PRUNED" if is_pruned else "COMPLETE")
    assert (directory / "metrics.json").exists() == (not is_pruned)
    recorded = json.loads((directory / "trial.json").read_text())
    assert recorded["user_attrs"]["epochs"] == (1 if is_pruned else 2), "what was reported"


def test_answers_are_heard_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also again: ranks meet at some checks only. What is saved is reported before a stop."""

    class Pipe:
        def __init__(self) -> None:
            self.sent: list[tuple[str, dict[str, Any]]] = []

        def send(self, message: tuple[str, dict[str, Any]]) -> None:
            self.sent.append(message)

    monkeypatch.setattr(child_module, "obey_in_thread", lambda *_: None)
    for order, outcome in ((PRUNE, Pruned), (STOP, Stopped)):
        pipe: Any = Pipe()
        line = child_module.SearchLine(pipe, tmp_path / "train.log")
        line.report(1, {})
        line.check(1.2)
        line._obey(CONTINUE)
        line.report(2, {})
        line.check(2.2)
        line._obey(order)
        for _ in range(2):
            with pytest.raises(outcome):
                line.check(2.4)
        with pytest.raises(outcome):
            line.report(3, {})
        kinds = [kind for kind, _ in pipe.sent]
        assert kinds.count("report") == 3, "the search knows all that is in the history"
        assert ("progress", {"progress": 2.4}) in pipe.sent or order == PRUNE


def test_trial_that_has_trained_to_its_end_is_not_pruned(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(0))
    assert run(n_trials="1", epochs="1") == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE"]


def test_failures_around_a_pruned_trial_are_not_in_a_row(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(1))
    broken = faulty({0: "raise_error", 2: "raise_error"})
    monkeypatch.setattr(runner_module, "ChildProcess", broken)
    assert run("--max_consecutive_failed_trials", "2", n_trials="4") == 0
    states = [state for _, state, _ in trials_of(tmp_path / "c")]
    assert states == ["FAIL", "PRUNED", "FAIL", "COMPLETE"]


def test_weights_of_a_pruned_trial_go_when_its_process_has(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be writing a checkpoint while it is told."""
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(0))
    hear_end = loop_module.Search.hear_end
    seen = []

    def end(search: loop_module.Search, running: Any, news: Any) -> None:
        (running.job.trial_dir / "best_model.pth").touch()  # the last that its process wrote
        hear_end(search, running, news)
        seen.append(sorted(path.name for path in running.job.trial_dir.glob("*.pth")))

    monkeypatch.setattr(loop_module.Search, "hear_end", end)
    assert run("--keep_checkpoints", "1", n_trials="2") == 0
    assert seen == [[], ["best_model.pth", "final_model.pth"]]


class FakeCores:
    """Cores of which other programs take one while the second trial starts."""

    def __init__(self) -> None:
        self.taken, self.looks = 0.0, 0

    def left(self) -> int:
        self.looks += 1
        self.taken = 1.2 if self.looks == 3 else 0.0  # the first is before the search
        return 5 if self.looks == 3 else 6

    def left_lately(self) -> int:
        return 0


@pytest.mark.parametrize(("asked", "threads"), [(None, [3, 2, 3]), ("1", [1, 1, 1])])
def test_threads_leave_the_cores_that_other_programs_use(
    asked: str | None,
    threads: list[int],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("writer_search.study.preparation.SharedCores", FakeCores)
    monkeypatch.setattr("writer_search.study.preparation.usable_cores", lambda: 7)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert run("--n_jobs", "2", n_trials="3") == 0
    directories = [tmp_path / "c" / f"trial_{number:03d}" for number in range(3)]
    recorded = [json.loads((d / "config.json").read_text())["threads"] for d in directories]
    assert recorded == threads
    told = [line for line in capfd.readouterr().out.splitlines() if "other programs" in line]
    expected = [
        "other programs keep 1.2 cores busy: 2 threads for each new trial",
        "other programs keep 0.0 cores busy: 3 threads for each new trial",
    ]
    assert told == (expected if asked is None else [])


def test_trial_beside_programs_that_came_up_goes_on_with_fewer_threads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "kept_waiting"}))
    assert run() == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "threads from" in line]
    assert told == ["trial   1 | its threads wait for cores: 2 threads from now on"]
    for number, threads in ((0, 1), (1, 2)):
        rows = read_history(tmp_path / "c" / f"trial_{number:03d}")
        assert {row["threads"] for row in rows} == {threads}


class EmptiedCores(FakeCores):
    """Cores that other programs leave to the search again."""

    def left_lately(self) -> int:
        return 3


@pytest.mark.parametrize(("calm", "epochs", "threads"), [(0.0, "60", {3}), (100.0, "9", {2})])
def test_trial_gets_its_threads_back(
    calm: float,
    epochs: str,
    threads: set[int],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "kept_waiting"}))
    monkeypatch.setattr("writer_search.study.preparation.SharedCores", EmptiedCores)
    monkeypatch.setattr("writer_search.study.preparation.usable_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(
        runner_module, "RunningTrial", partial(runner_module.RunningTrial, calm=calm)
    )
    assert run(n_trials="1", epochs=epochs) == 0
    printed = capfd.readouterr().out
    assert "trial   0 | its threads wait for cores: 2 threads from now on" in printed
    free = "trial   0 | cores are free again: 3 threads from now on"
    assert (free in printed) == (threads == {3})
    assert read_history(tmp_path / "c" / "trial_000")[-1]["threads"] in threads


# ------------------------------------------------------------------------------ what a kill leaves


def test_unfinished_trials_are_settled_at_the_next_start(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """RUNNING in the study: one had finished but was not told, one was cut off in its work."""
    directory = tmp_path / "c"
    assert run() == 0
    value = trials_of(directory)[1][2]
    with sqlite3.connect(directory / "optuna_study.db") as connection:
        connection.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL")
        connection.execute("DELETE FROM trial_values")
    connection.close()
    for number in (0, 1):
        (directory / f"trial_00{number}" / "trial.json").unlink()
    (directory / "trial_000" / "metrics.json").unlink()
    assert run() == 0
    states = trials_of(directory)
    assert states[:2] == [(0, "FAIL", None), (1, "COMPLETE", value)]
    assert len(states) == 3, "one more, for the one that was cut off"
    log = (directory / "trial_000" / "error.log").read_text()
    assert "cut off without a word at epoch 2" in log
    assert "trial 0 was cut off at epoch 2: recorded as interrupted" in capfd.readouterr().out
    cut_off, complete, latest = params_of(directory)
    assert latest == cut_off, "a search's known-good first trial is gone on with"
    assert complete != cut_off
    assert (directory / "trial_001" / "trial.json").exists(), "a missing record is written again"


def test_metrics_of_another_configuration_finish_no_trial(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    assert run(n_trials="1") == 0
    with sqlite3.connect(directory / "optuna_study.db") as connection:
        connection.execute("UPDATE trials SET state = 'RUNNING', datetime_complete = NULL")
        connection.execute("DELETE FROM trial_values")
    connection.close()
    (directory / "trial_000" / "trial.json").unlink()
    metrics = directory / "trial_000" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"config_hash": "', '"config_hash": "0'))
    assert run(n_trials="1") == 0
    assert [state for _, state, _ in trials_of(directory)] == ["FAIL", "COMPLETE"]


# --------------------------------------------------------------------------------------- refusals


def test_changed_settings_are_refused_with_the_difference(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(n_trials="1") == 0
    before = snapshot(tmp_path / "c")
    capfd.readouterr()
    assert run(epochs="3") == 2
    assert "epochs: 2 in the study, 3 now" in capfd.readouterr().err
    assert run("--fix", "dropout=0.1") == 2
    assert "--fix or --space dropout: 0 to 0.5 in the study, 0.1 now" in capfd.readouterr().err
    assert run("--num_writers_subset", "3") == 2  # not with --use_all_writers
    assert snapshot(tmp_path / "c") == before, "nothing was touched"


def test_second_search_in_one_directory_is_refused(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c").mkdir()
    with locks.DirectoryLock(tmp_path / "c"):
        assert run() == 2
        assert f"in use by another search (pid {os.getpid()} on " in capfd.readouterr().err
        (tmp_path / "c" / "search.lock").unlink()  # somebody tidied up
        assert run() == 2
        assert "in use by another search (its search.lock was removed)" in capfd.readouterr().err
        with pytest.raises(UserError, match="in use by another search"):
            locks.DirectoryLock(tmp_path / "c").__enter__()
        with pytest.raises(UserError, match="in use by another search"):
            locks.SharedLock(tmp_path / "c").__enter__()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["search.lock"]
    assert run(n_trials="1") == 0


@pytest.mark.parametrize(
    ("more", "replaced", "said"),
    [
        ([], {"n_trials": "0"}, "'0' is not a whole number of 1 or more"),
        ([], {"checkpoint_dir": ""}, "the path is empty: is a variable not set?"),
        ([], {"n_trials": "-1"}, "n_trials"),
        ([], {"n_trials": "x"}, "'x' is not a whole number"),
        (["--fix", "nonsense=1"], {}, "--fix nonsense: unknown hyperparameter"),
        (["--fix", "dropout=3"], {}, "--fix dropout: 3 is out of range"),
        (["--fix", "dropout"], {}, "expected NAME=VALUE"),
        (["--device", "cuda"], {}, "sees no CUDA device"),
        (["--device", "tpu"], {}, "'tpu' is not auto, cpu, cuda or cuda:N"),
        (["--timeout", "-3"], {}, "is not a time above 0"),
        ([], {"data_root": "/nowhere"}, "/nowhere does not exist"),
        ([], {"data_root": "x" * 300}, "File name too long"),
        ([], {"checkpoint_dir": "x" * 300}, "File name too long"),
        (["--cache_dir", "x" * 300], {}, "give another --cache_dir"),
        (["--no_such_flag"], {}, "unrecognized arguments"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(
    more: list[str],
    replaced: dict[str, str],
    said: str,
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if more == ["--device", "cuda"]:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    assert run(*more, **replaced) == 2
    printed, problem = capfd.readouterr()
    assert "=" not in printed, "no banner"
    assert problem.startswith("error: ")
    assert problem.count("\n") == 1
    assert said in problem
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"dropout": 3}', '{"dropout": {"low": 1}}', '{"x": {"choices": [1]}}'],
)
def test_malformed_space_is_one_line(
    content: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.json").write_text(content)
    assert run("--space", str(tmp_path / "space.json")) == 2
    problem = capfd.readouterr().err
    assert problem.count("\n") == 1
    assert "--space" in problem
    assert not (tmp_path / "c").exists()


def test_unusable_checkpoint_directory(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert run(checkpoint_dir=str(tmp_path / "file")) == 2
    assert "is a file, not a directory" in capfd.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert run() == 2
    assert "cannot be written" in capfd.readouterr().err


def test_trials_without_their_database_are_not_overwritten(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(n_trials="1") == 0
    before = trials_of(tmp_path / "c")
    (tmp_path / "c" / "optuna_study.db").unlink()
    assert run(n_trials="1") == 0
    assert "is missing beside trial directories" in capfd.readouterr().err
    assert trials_of(tmp_path / "c") == before


# ----------------------------------------------------------------------------------------- status


def test_status_tells_the_same_and_changes_nothing(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--status", "--checkpoint_dir", str(tmp_path / "c")]) == 2
    assert run() == 0
    closing = capfd.readouterr().out.split("=" * 70)[-2].strip()
    before = snapshot(tmp_path / "c")
    assert main(["--status", "--checkpoint-dir", str(tmp_path / "c")]) == 0
    status = capfd.readouterr().out.strip()
    assert status.startswith(f"{tmp_path / 'c'}: not running\n")
    model = tmp_path / "c" / "summary" / "best_model.pth"
    best = re.search(r"Best trial: (\d)", closing)
    assert best is not None
    own = tmp_path / "c" / f"trial_00{best[1]}" / "best_model.pth"
    assert status.endswith(closing.replace(str(model), str(own))), "summary's may be older"
    assert snapshot(tmp_path / "c") == before


def test_status_of_a_running_trial(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "c"
    assert run(n_trials="1") == 0
    study = open_study(directory)
    study.ask()
    (directory / "trial_001").mkdir()
    (directory / "trial_001" / "history.jsonl").write_text('{"epoch": 1, "macro_top1": 0.25}\n')
    capfd.readouterr()
    with locks.DirectoryLock(directory):
        main(["--status", "--checkpoint_dir", str(directory)])
    printed = capfd.readouterr().out
    assert f"{directory}: running (pid {os.getpid()} on " in printed
    assert re.search(
        r"^    1  running         1/2   25.00%   25.00%  [\d.]+ s$", printed, re.MULTILINE
    )
    assert "Time left: " in printed
    assert "stalled" not in printed
    long_ago = time.time() - 600
    for path in (directory / "trial_001", *(directory / "trial_001").iterdir()):
        os.utime(path, (long_ago, long_ago))
    with locks.DirectoryLock(directory):
        main(["--status", "--checkpoint_dir", str(directory)])
    assert "stalled: no sign of life for 10 min" in capfd.readouterr().out
    main(["--status", "--checkpoint_dir", str(directory)])
    assert "| cut off: the next start records it as interrupted" in capfd.readouterr().out


def test_waiting_trial_of_a_killed_search_is_run_next(run: Run, tmp_path: Path) -> None:
    """Killed between a draw's storing and its start: it is neither lost nor drawn again."""
    assert run(n_trials="1") == 0
    study = open_study(tmp_path / "c")
    waiting = study.get_trials()[0]
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params={**waiting.params, "dropout": 0.123},
            distributions=waiting.distributions,
            user_attrs={"draw": 1, "seed": 5},
        )
    )
    assert run(n_trials="2") == 0
    trials = open_study(tmp_path / "c").get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[1].params["dropout"] == 0.123
