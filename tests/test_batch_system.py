"""The end of a batch system's job, and the example scripts under a stand-in for Slurm."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import faulty
from test_search import PruneTrial, Run, run, trials_of

from writer_search.processes import deadlines as batch_system
from writer_search.processes import runner as runner_module
from writer_search.processes.deadlines import END_TIME, MARGIN_SECONDS, longest_epoch, stop_time
from writer_search.results.rows import Row, read_history
from writer_search.results.tables import keep_failing
from writer_search.study import draws, outlook
from writer_search.study import loop as loop_module

__all__ = ["run"]  # the fixture
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("text", [None, "", "soon", "nan", "inf", "1700000000"])
def test_no_limit_is_told(text: str | None) -> None:
    assert stop_time({} if text is None else {END_TIME: text}) == math.inf


def test_limit_leaves_a_margin() -> None:
    left = stop_time({END_TIME: str(time.time() + 1000)}) - time.monotonic()
    assert left == pytest.approx(1000 - MARGIN_SECONDS, abs=1)
    assert stop_time({END_TIME: str(time.time() + 5)}) <= time.monotonic()


def test_longest_epoch_is_the_slowest_trial_s() -> None:
    assert longest_epoch([]) == 0
    assert longest_epoch([(4, 40), (1, 30), (0, 99)]) == 30


def test_no_trial_starts_that_cannot_finish_an_epoch(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(n_trials="1") == 0
    monkeypatch.setenv(END_TIME, str(time.time() + MARGIN_SECONDS + 100))
    monkeypatch.setattr(outlook, "longest_epoch", lambda evidence: 101.0)
    assert run("--requeue_exit_code", "99", n_trials="2") == 99
    assert "stopped before the end of the batch system's job" in capfd.readouterr().err
    assert len(trials_of(tmp_path / "c")) == 1
    assert run(n_trials="2") == 0, "without a code for requeueing it is no failure"
    assert run("--requeue_exit_code", "99", n_trials="1") == 0, "nothing is missing"
    monkeypatch.setattr(outlook, "longest_epoch", lambda evidence: 9.0)
    assert run("--requeue_exit_code", "99", n_trials="2") == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE"] * 2


def test_a_trial_whose_epoch_outlasts_several_jobs_gets_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each job trains one batch, or validates one epoch, before it is ended."""
    monkeypatch.setattr(outlook, "longest_epoch", lambda evidence: 7200.0)
    flags = ("--requeue_exit_code", "99", "--continue_interrupted")
    codes = []
    while not codes or codes[-1] == 99:
        monkeypatch.setenv(END_TIME, str(time.time() + MARGIN_SECONDS + 3600))
        monkeypatch.setattr(
            runner_module, "ChildProcess", faulty({len(codes): "signal_search_next"})
        )
        codes.append(run(*flags, n_trials="1", epochs="2", patience="2"))
    assert codes[-1] == 0
    assert len(codes) >= 7, "more than are continued in vain"
    *broken, (_, state, _) = trials_of(tmp_path / "c")
    assert state == "COMPLETE"
    assert {state for _, state, _ in broken} == {"FAIL"}
    assert len(broken) == len(codes) - 1
    told = [line for line in capfd.readouterr().out.splitlines() if "| epoch" in line]
    assert len(told) == 2, "no epoch was trained twice"
    history = read_history(tmp_path / "c" / f"trial_{len(broken):03d}")
    assert [row["epoch"] for row in history] == [1, 2]


def test_part_of_an_epoch_is_worth_its_start_where_trials_are_continued(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlook, "longest_epoch", lambda evidence: 7200.0)
    monkeypatch.setenv(END_TIME, str(time.time() + MARGIN_SECONDS + 100))
    assert run("--requeue_exit_code", "99", n_trials="1") == 99
    assert run("--requeue_exit_code", "99", "--continue_interrupted", n_trials="1") == 0
    assert len(trials_of(tmp_path / "c")) == 1


def test_running_trial_saves_before_the_job_s_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = loop_module.Search.start_next

    def late(self: loop_module.Search) -> None:
        begin(self)
        object.__setattr__(self.plan, "stop_at", time.monotonic() + 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Search, "start_next", late)
        assert run("--requeue_exit_code", "99", n_trials="1", epochs="500", patience="500") == 99
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "cause:  interrupted before the end of the batch system's job (SLURM_JOB_END" in log
    done = len((tmp_path / "c" / "trial_000" / "history.jsonl").read_text().splitlines())
    assert 0 < done < 500
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Search, "start_next", late)
        flags = ("--requeue_exit_code", "99", "--continue_interrupted")
        assert run(*flags, n_trials="1", epochs="500", patience="500") == 99
    assert "trial 0 was interrupted: a new trial goes on with it" in capfd.readouterr().out
    history = (tmp_path / "c" / "trial_001" / "history.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in history]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) > done, "it went on"


def stand_in(program: Path, does: str) -> None:
    """Write a program of one line of shell."""
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("preemption", [signal.SIGUSR1, signal.SIGTERM], ids=str)
def test_example_script_under_a_stand_in_for_slurm(
    preemption: signal.Signals, lines_root: Path, tmp_path: Path
) -> None:
    """Preempted with a grace time, then killed without one, then left alone, until it is done.

    Preemption may signal the script alone, or all of the job at once: then the script passes on
    what the search has already.
    """
    requeued, output = tmp_path / "requeued", tmp_path / "output"
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin" / "scontrol", f'echo "$@" >> {requeued}')
    fixed = ("backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8")
    more = " ".join(f"--fix {value}" for value in (*fixed, "precision=float32"))
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "4711",
        "DATA_ROOT": str(lines_root),
        "CHECKPOINT_DIR": str(tmp_path / "c"),
        "N_TRIALS": "2",
        "MORE_FLAGS": f"--epochs 60 --patience 60 --weights none --device cpu {more}",
        "OMP_NUM_THREADS": "1",
    }

    def job(disturb: signal.Signals | None) -> int:
        before = output.stat().st_size if output.exists() else 0
        with (
            open(output, "a") as log,
            subprocess.Popen(
                ["bash", str(ROOT / "examples" / "slurm.sbatch")],
                cwd=ROOT,
                env={**environment, END_TIME: str(time.time() + 3600)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ) as batch,
        ):
            while disturb and "| epoch" not in output.read_text()[before:]:
                assert batch.poll() is None, output.read_text()
                time.sleep(0.01)
            if disturb == signal.SIGUSR1:
                batch.send_signal(disturb)  # B: the batch script alone
            elif disturb is not None:
                os.killpg(batch.pid, disturb)
            return batch.wait()

    asked = "requeue 4711\n" if preemption == signal.SIGUSR1 else ""  # else Slurm does by itself
    requeued.touch()
    assert job(preemption) == (0 if asked else 99), output.read_text()
    assert requeued.read_text() == asked
    assert f"stopped by {preemption.name}: everything is saved" in output.read_text()
    assert job(signal.SIGKILL) == -9
    assert job(None) == 0, output.read_text()
    assert requeued.read_text() == asked, "once done it is not queued again"
    trials = trials_of(tmp_path / "c")
    states = [state for _, state, _ in trials]
    assert states == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    history = (tmp_path / "c" / "trial_002" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == list(range(1, 61))
    said = output.read_text()
    told: dict[str, list[int]] = {}
    for line in said.splitlines():
        if "| epoch" in line:
            trial, _, rest = line.partition("| epoch")
            told.setdefault(trial.strip(), []).append(int(rest.split("/")[0]))
    preempted, killed, last = (told[f"trial   {number}"] for number in range(3))
    assert killed[0] == preempted[-1] + 1, "no epoch was trained twice"
    # What was done in the last second or so had not been saved when the job was killed.
    assert killed[0] <= last[0] <= killed[-1] + 1
    for epochs in (preempted, killed, last):
        assert epochs == list(range(epochs[0], epochs[-1] + 1))


@pytest.mark.parametrize(
    ("array", "name"),
    [
        ({}, "4711"),
        ({"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "7"}, "4711_7"),
    ],
)
def test_of_an_array_one_task_is_queued_again(
    array: dict[str, str], name: str, tmp_path: Path
) -> None:
    """Slurm takes the number of an array's first task for the array, and would end all tasks."""
    stand_in(tmp_path / "scontrol", 'echo "$@"')
    stand_in(tmp_path / "search", "exit 99")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "search")}
    paths = {"DATA_ROOT": "d", "CHECKPOINT_DIR": "c", "STORAGE": "s", "SLURM_JOB_ID": "4711"}
    script = ROOT / "examples" / ("slurm_array.sbatch" if array else "slurm.sbatch")
    ran = subprocess.run(
        ["bash", str(script)],
        cwd=ROOT,
        env={**environment, **paths, **array},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"requeue {name}\n"


def test_examples_are_scripts_that_bash_can_read() -> None:
    for script in (ROOT / "examples").glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "#SBATCH --signal=B:USR1@120" in script.read_text()
    assert batch_system.MARGIN_SECONDS < 120


def test_pruned_trials_leave_more_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the test lines are measured then nor the job is done; 0 means that all is."""
    monkeypatch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(1))
    flags = ("--requeue_exit_code", "99", "--evaluate_test")
    assert run(*flags, n_trials="2") == 99
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["COMPLETE", "PRUNED"]
    assert not (tmp_path / "c" / "summary" / "test_metrics.json").exists()
    assert "\nNot measured on the test lines yet: " in capfd.readouterr().out
    assert run(*flags, n_trials="2") == 0
    assert "Not measured" not in capfd.readouterr().out
    assert (tmp_path / "c" / "summary" / "test_metrics.json").exists()


@pytest.mark.parametrize(
    ("states", "is_in_vain"),
    [("CFF", False), ("CFFF", True), ("CFFIF", True), ("CFPF", False), ("FF", False)],
)
def test_job_that_keeps_failing_is_not_queued_again(states: str, is_in_vain: bool) -> None:
    names = {"C": "COMPLETE", "P": "PRUNED", "F": "FAIL", "I": "FAIL"}
    rows = [
        Row(number, names[letter], None, {}, None, None, {"interrupted": letter == "I"})
        for number, letter in enumerate(states)
    ]
    assert keep_failing(rows, 3) is is_in_vain
