"""From a journal to the figures of `benchmarks.goodput`, and what writes the journal."""

from __future__ import annotations

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import goodput
from benchmarks.contestants import CONTESTANTS, Contestant, accounting, runs
from benchmarks.contestants.accounting import Figures, Launch, Mark, account, read_marks
from benchmarks.contestants.faults import Fault, fault_named, kill_group, synced_bytes
from benchmarks.contestants.job import Job
from benchmarks.goodput import earlier_runs, measure, parse, run_all

RATES, EPOCHS, STEPS = (0.1, 0.2), 2, 2  # a job of two configurations, and 2 steps in an epoch
RECORDED = [(0.1, 0.5), (0.2, 0.6)]


# A command that trains on paper, and goes on after a kill. Given a third word it tells its results.
ON_PAPER = """
import json, os, pathlib, sys, time
job, state = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2], "state")
done = json.loads(state.read_text()) if state.exists() else []
if len(sys.argv) > 3:
    sys.exit(print([[number, 0.5] for number in (0, 1) if done.count(number) == job["epochs"]]))
journal = open(os.environ["GOODPUT_JOURNAL"], "a")
for number, rate in enumerate(job["learning_rates"]):
    for epoch in range(done.count(number), job["epochs"]):
        for kind in ("begin", "step", "validation"):
            time.sleep(0.03)
            words = time.monotonic(), os.environ["GOODPUT_LAUNCH"], os.getpid(), rate, kind, epoch
            print(*words, 1.0, file=journal, flush=True)
        done.append(number)
        state.with_suffix(".tmp").write_text(json.dumps(done))
        state.with_suffix(".tmp").replace(state)
"""


class Journal:
    """Trains on paper: a second a step, a second a validation."""

    def __init__(self) -> None:
        self.now, self.marks, self.launches = 0.0, list[Mark](), list[Launch]()

    def launch(self, *work: tuple[float, int, int], loss: float = 1.0) -> None:
        """Start the command: a second to the first batch, then of configurations the steps from,
        to; at its end, or where the kill comes, half a second goes without a mark."""
        begin, name = self.now, str(len(self.launches))
        self.now += 1.0
        for configuration, first, last in work:
            for step in range(first, last):
                if step == first or step % STEPS == 0:
                    self._mark(name, configuration, "begin", step)
                self.now += 1.0
                self._mark(name, configuration, "step", step)
                if (step + 1) % STEPS == 0:
                    self.now += 1.0
                    self._mark(name, configuration, "validation", step // STEPS, loss)
        self.now += 0.5
        self.launches.append(Launch(name, begin, self.now))

    def _mark(self, name: str, of: float, kind: str, number: int, loss: float = 0.0) -> None:
        self.marks.append(Mark(self.now, name, 1, of, kind, number, loss))

    def figures(self, recorded: list[tuple[float, float]], **named: Any) -> Figures:
        return account(self.marks, self.launches, recorded, RATES, EPOCHS, STEPS, **named)


def test_a_run_without_a_fault() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    found = journal.figures(RECORDED)
    assert found.wall == 13.5
    assert found.counted == 12.0
    assert (found.epochs_again, found.lost, found.twice, found.never) == (0, 0, 0, 0)
    assert (found.first_batch, found.ending) == (1.0, 0.5)
    assert found.changed is None


def test_a_step_counts_once_the_last_time() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 3))  # 3 steps and a validation; the third step is lost
    journal.launch((0.1, 2, 4), (0.2, 0, 4))
    found = journal.figures(RECORDED)
    assert found.counted == 12.0
    assert found.goodput == pytest.approx(12 / 16)
    assert found.epochs_again == 0.5
    assert (found.lost, found.twice, found.never) == (0, 0, 0)


def test_lost_never_and_twice() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 1))
    found = journal.figures([])  # the first had come to its end
    assert (found.lost, found.twice, found.never) == (1, 0, 1)
    assert found.goodput == 0.0
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    found = journal.figures(RECORDED)
    assert (found.lost, found.twice, found.never) == (0, 1, 0)
    found = journal.figures([*RECORDED, (0.2, 0.6)])
    assert found.twice == 2


def test_saving_is_no_training() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    counted, last = journal.figures(RECORDED).counted, journal.marks[-2]
    journal.marks.insert(-1, replace(last, time=last.time + 0.5, kind="saved", loss=0.25))
    assert journal.figures(RECORDED).counted == counted - 0.25


def test_a_command_that_finds_all_done_ends_by_itself() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    journal.now += 100.0  # somebody came back
    journal.launch()
    assert journal.figures(RECORDED).ending == 1.5


def test_a_validation_done_again_is_no_second_training() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    end = Mark(journal.now, "0", 1, 0.2, "validation", EPOCHS - 1, 1.0)
    assert account([*journal.marks, end], journal.launches, RECORDED, RATES, 2, 2).twice == 0


def test_changed_results() -> None:
    journal = Journal()
    journal.launch((0.1, 0, 4), (0.2, 0, 4))
    undisturbed = accounting.outcome(accounting.work_done(journal.marks), RECORDED, EPOCHS)
    found = journal.figures(RECORDED, undisturbed=(6.75, undisturbed))
    assert (found.changed, found.slowdown) == (0, 2.0)
    assert journal.figures([(0.1, 0.5), (0.2, 0.7)], undisturbed=(1, undisturbed)).changed == 1
    other = Journal()
    other.launch((0.1, 0, 4), (0.2, 0, 4), loss=2.0)  # the same values, by other weights
    assert other.figures(RECORDED, undisturbed=(1, undisturbed)).changed == 2


def test_the_journal_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setenv("GOODPUT_JOURNAL", str(journal))
    monkeypatch.setenv("GOODPUT_LAUNCH", "7.0")
    monkeypatch.setattr("sys.meta_path", [])
    hook = Path(accounting.__file__).parent / "journal" / "sitecustomize.py"
    state, config = SimpleNamespace(step=0, epoch=0), SimpleNamespace(learning_rate=0.002)
    train = SimpleNamespace(
        train_epoch=lambda state, config: [train.training_step(state, config)],
        training_step=lambda state, config: "the loss",
        validate=lambda state, config: SimpleNamespace(loss=0.1 + 0.2),
        Checkpoints=type("Checkpoints", (), {"_config": config, "save": lambda *_: None}),
    )
    runpy.run_path(str(hook))["_watch"](train)
    assert train.train_epoch(state, config) == ["the loss"]
    train.Checkpoints().save()
    train.validate(state, config)
    with journal.open("a") as file:
        file.write("12.5 7.0 1 0.002 st")  # a kill
    marks = read_marks(journal.read_text())
    assert [mark.kind for mark in marks] == ["begin", "step", "saved", "validation"]
    assert {(mark.launch, mark.pid, mark.configuration) for mark in marks} == {
        ("7.0", os.getpid(), 0.002)
    }
    assert marks[-1].loss == 0.1 + 0.2


@pytest.mark.slow
def test_a_killed_command_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LEFT_SECONDS", 0.1)

    def words(*more: str) -> Any:
        return lambda job, own: [sys.executable, "-c", ON_PAPER, str(job), str(own), *more]

    contestant = Contestant("on paper", words(), words("results"), ("state",))
    Job(3, "", "", learning_rates=RATES).write(tmp_path / "job.json")
    fault = Fault("killed once", 0.3, kill_group, once=True)
    run = runs.Run(contestant, fault, tmp_path / "job.json", tmp_path, 60)
    run.go()
    found = measure(run, 1, None)
    assert run.results == [(0, 0.5), (1, 0.5)]
    assert (run.kills, len(run.launches), run.left, run.person) == (1, 2, 0, [])
    assert 0 < found["goodput"] < 1
    assert (found["lost"], found["twice"], found["never"]) == (0, 0, 0)


def test_a_run_that_is_given_up_has_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Job(3, "", "", learning_rates=RATES).write(tmp_path / "job.json")
    run = runs.Run(CONTESTANTS["default"], None, tmp_path / "job.json", tmp_path, 60)

    def launch() -> bool:
        run.results, run.gave_up = [(0, 0.5)], "not done after 60 s"  # those of an earlier look
        return False

    monkeypatch.setattr(run, "_launch", launch)
    monkeypatch.setattr(run, "_read_results", lambda: run.results.append((1, 0.5)))
    run.go()
    assert run.results == [(0, 0.5), (1, 0.5)]


def test_the_same_command_repeats_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later runs compare with the undisturbed one of the file. What is kept stays in one place."""
    begun: list[str] = []

    class OnPaper:
        left, kills, person, gave_up, results = 0, 0, (), "", [(0, 0.5), (1, 0.6)]

        def __init__(self, _: Any, __: Any, file: Path, own: Path, limit: float) -> None:
            self.job = Job.read(file)
            begun.append(own.name)
            journal = Journal()
            journal.launch((0.1, 0, 4), (0.2, 0, 4))
            self.launches, self.marks = journal.launches, lambda: journal.marks

        def go(self) -> None:
            if len(begun) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(goodput, "Run", OnPaper)
    output = tmp_path / "runs.json"
    job = Job(EPOCHS, "", "", learning_rates=RATES)

    def run(place: str, *flags: str, machine: str = "this") -> list[dict[str, Any]]:
        args = parse(["--output", str(output), "--contestants", "default,optuna", *flags])
        about = {"machine": machine, "versions": {"optuna": "5"}, "settings": {"steps": STEPS}}
        (tmp_path / place).mkdir(exist_ok=True)
        able = [CONTESTANTS[name] for name in args.contestants.split(",")]
        rows = earlier_runs(args.output, about)
        run_all(args, able, job, tmp_path / place, about, rows)
        return rows

    with pytest.raises(KeyboardInterrupt):
        run("kept", "--faults", "none", "--repetitions", "1")
    run("kept", "--faults", "none", "--repetitions", "1")
    rows = run("kept", "--faults", "none,kill_60", "--repetitions", "1")
    undisturbed = ["0_none_default", "0_none_optuna", "0_none_optuna"]
    assert begun == [*undisturbed, "0_kill_60_optuna", "0_kill_60_default"]
    assert [row["changed"] for row in rows] == [None, None, 0, 0]
    assert [row["slowdown"] for row in rows] == [None, None, 1.0, 1.0]
    assert json.loads(output.read_text())["runs"] == rows
    with pytest.raises(ValueError, match="another machine"):
        run("elsewhere", "--faults", "none", machine="another")


def test_faults_are_named_with_their_seconds() -> None:
    fault = fault_named("kill_group_15")
    assert fault is not None
    assert (fault.seconds, fault.once, fault_named("none")) == (15.0, False, None)
    for wrong in ("kill", "kill_0", "flood_30"):
        with pytest.raises(ValueError, match="is no fault"):
            fault_named(wrong)


def test_what_was_synced_survives_a_power_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(10_000))
        file.flush()
        os.fdatasync(file.fileno())
        try:
            synced = synced_bytes(path)
        except OSError:
            pytest.skip("this kernel does not tell which pages are dirty")
        if synced != 10_000:
            pytest.skip("this file system keeps its files in memory")
        file.write(bytes(100_000))
        file.flush()
        assert 10_000 - 4096 < synced_bytes(path) <= 10_000
