"""What survives: interrupted trials, memory, the database, the disk, and crashes at any step."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from faults import RealChild, faulty
from optuna.trial import TrialState
from searches import leave_journal
from test_crashes import Crash, crash_before
from test_search import PruneTrial, Run, arguments, params_of, run, snapshot, trials_of
from torch import nn

from data import LineSet
from hyperparameter_search import main
from train import training_step
from writer_search.common import environment, locks
from writer_search.config import TrialConfig
from writer_search.processes import child as child_module
from writer_search.processes import fork_server, messages
from writer_search.processes import parent as processes
from writer_search.processes import runner as runner_module
from writer_search.processes.causes import Kind
from writer_search.processes.running import RunningTrial
from writer_search.results.rows import DATABASE, Row, count_states, read_database, read_history
from writer_search.study import draws, preparation, rebuilding, recorder, recovery
from writer_search.study.damage import find_damage
from writer_search.study.store import open_study
from writer_search.study.unfinished import continue_interrupted, settle_unfinished
from writer_search.study.weights import remove_weights
from writer_search.training.device_errors import is_device_fault, is_out_of_memory
from writer_search.training.state import TrainingState

__all__ = ["run"]  # the fixture

QUESTION = messages.MachineQuestion((), "none", ("tiny",), False, 1)


@pytest.fixture
def put_back(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """End a test's faults, and nothing else that is patched."""
    return lambda: monkeypatch.setattr(runner_module, "ChildProcess", RealChild)


def complete(directory: Path) -> list[tuple[dict[str, Any], float]]:
    trials = open_study(directory).get_trials()
    return [(t.params, t.value) for t in trials if t.state == TrialState.COMPLETE]


def epochs_of(directory: Path) -> list[int]:
    lines = (directory / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


# ----------------------------------------------------------------------------- interrupted trials


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, lines_root: Path) -> Path:
    """A search of three trials that nothing breaks off."""
    directory = tmp_path_factory.mktemp("whole") / "c"
    assert main(arguments(lines_root, directory, n_trials="3")) == 0
    return directory


@pytest.mark.parametrize(("fault", "breaks"), [("signal_search", 2), ("signal_search_late", 1)])
def test_continued_search_equals_an_unbroken_one(
    fault: str,
    breaks: int,
    run: Run,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put_back: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    faults = dict.fromkeys(range(1, 1 + breaks), fault)
    monkeypatch.setattr(runner_module, "ChildProcess", faulty(faults))
    for _ in range(breaks):
        assert run("--continue_interrupted", n_trials="3") == 143
    put_back()
    capfd.readouterr()
    assert run("--continue_interrupted", n_trials="3") == 0
    printed = capfd.readouterr().out
    directory = tmp_path / "c"
    states = [state for _, state, _ in trials_of(directory)]
    assert states == ["COMPLETE", *["FAIL"] * breaks, "COMPLETE", "COMPLETE"]
    assert complete(directory) == complete(whole)
    continued = directory / f"trial_{1 + breaks:03d}"
    final = [
        torch.load(path / "final_model.pth", weights_only=True)["model"]
        for path in (continued, whole / "trial_001")
    ]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[1])
    assert epochs_of(continued) == [1, 2]
    if fault == "signal_search_late":
        assert "trial   2 | epoch  1/2" not in printed, "no epoch is trained twice"
    reported = [
        open_study(path).trials[number].intermediate_values
        for path, number in ((directory, 1 + breaks), (whole, 1))
    ]
    assert reported[0] == reported[1]


def test_saved_epochs_that_nobody_goes_on_with_are_told(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    put_back: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "signal_search_late"}))
    assert run(n_trials="2") == 143
    put_back()
    told = "1 unfinished trial saved 1 epoch: --continue_interrupted goes on with it"
    capfd.readouterr()
    assert run(n_trials="1") == 0
    assert told in capfd.readouterr().out
    assert run("--continue_interrupted", n_trials="1") == 0
    assert told not in capfd.readouterr().out


def test_trial_is_continued_three_times_at_most(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_back: Callable[[], None]
) -> None:
    killers = dict.fromkeys(range(9), "signal_search_first")
    monkeypatch.setattr(runner_module, "ChildProcess", faulty(killers))
    for _ in range(5):
        assert run("--continue_interrupted", n_trials="1") == 143
    params = params_of(tmp_path / "c")
    assert params[0] == params[1] == params[2] == params[3] != params[4]
    continues = [t.user_attrs.get("continues") for t in open_study(tmp_path / "c").get_trials()]
    assert continues == [None, 0, 1, 2, None]


@pytest.mark.parametrize(
    ("epochs", "breaks"),
    [
        ([20, 40, 60, 80, 90, 91], 6),  # a long trial of short jobs: each brought it on
        ([0, 0, 0, 0, 0], 4),
        ([5, 0, 5, 6, 0, 6, 6, 6], 7),  # one that ended before it told what was done brought none
    ],
)
def test_trial_is_continued_while_each_break_has_an_epoch_more(
    epochs: list[int], breaks: int
) -> None:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({}, user_attrs={"draw": 0, "seed": 1})
    for number, done in enumerate(epochs):
        if not any(trial.state == TrialState.WAITING for trial in study.trials):
            break
        trial = study.ask()
        for name, value in {"interrupted": True, "epochs": done}.items():
            trial.set_user_attr(name, value)
        study.tell(trial, state=TrialState.FAIL)
        assert len(continue_interrupted(study, {})) == (
            number + 1 < breaks or breaks == len(epochs)
        )
    assert len([t for t in study.trials if t.state == TrialState.FAIL]) == breaks


@pytest.mark.parametrize(
    ("advanced", "breaks"),
    [
        ([False, True, True, True, True, True], 6),  # within one epoch
        ([False, False, True, False, False, False, True], 6),
        ([False, False, False, False, True], 4),
    ],
)
def test_trial_is_continued_while_each_break_has_a_batch_more(
    advanced: list[bool], breaks: int, tmp_path: Path
) -> None:
    """The search is killed each time: what the trial has saved is all there is to tell."""
    study = open_study(tmp_path)
    study.enqueue_trial({}, user_attrs={"draw": 0, "seed": 1})
    for number, has_saved in enumerate(advanced):
        if not any(trial.state == TrialState.WAITING for trial in study.trials):
            break
        trial = study.ask()
        directory = tmp_path / f"trial_{trial.number:03d}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        if has_saved:
            (directory / "latest_checkpoint.pth").touch()
        settle_unfinished(study, tmp_path)
        assert len(continue_interrupted(study, {})) == (
            number + 1 < breaks or breaks == len(advanced)
        )
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.FAIL) == breaks


@pytest.mark.parametrize("fault", ["killed_late", "full_disk_late"])
def test_trial_that_was_killed_or_had_no_room_is_continued(
    fault: str,
    run: Run,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    put_back: Callable[[], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It has failed, and counts as that; what it has saved is not lost."""
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: fault}))
    flags = ("--keep_checkpoints", "best")
    assert run(*flags, n_trials="2") == 0
    directory = tmp_path / "c"
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE", "FAIL"]
    assert count_states(read_database(directory / DATABASE).rows)["failed"] == 1
    advice = (directory / "trial_001" / "error.log").read_text()
    assert "--continue_interrupted" in advice
    put_back()
    capfd.readouterr()
    assert run(n_trials="1") == 0
    told = "1 unfinished trial saved 1 epoch: --continue_interrupted goes on with it"
    assert told in capfd.readouterr().out
    assert run(*flags, "--continue_interrupted", n_trials="2") == 0
    printed = capfd.readouterr().out
    assert "trial 1 had failed: a new trial goes on with it" in printed
    assert "trial   2 | epoch  1/2" not in printed, "no epoch is trained twice"
    assert complete(directory) == complete(whole)[:2]


def test_trial_that_failed_by_itself_is_not_continued(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_back: Callable[[], None]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "raise_error"}))
    assert run("--continue_interrupted", n_trials="1") == 1
    put_back()
    assert run("--continue_interrupted", n_trials="1") == 0
    params = params_of(tmp_path / "c")
    assert len(params) == 2
    assert params[0] != params[1]


def test_exit_code_of_a_batch_system(
    run: Run, monkeypatch: pytest.MonkeyPatch, put_back: Callable[[], None]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "signal_search"}))
    assert run("--requeue_exit_code", "99", n_trials="1") == 99
    put_back()
    assert run("--requeue_exit_code", "99", n_trials="1") == 0


def test_fork_server_that_is_killed_over_a_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it takes the order for a child and does not carry it out.

    A user's own data.py, train.py and so on in the working directory are no part of the new one.
    """
    for name in ("config", "data", "model", "train", "worker", "signal", "writer_search"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a stranger was imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    processes.start_fork_server()
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
    killer.start()
    child = RealChild("writer_search.processes.machine:answer_question", QUESTION)
    killer.join()
    message = child.receive()
    assert message is not None
    assert message[0] == "machine"
    assert child.end() == 0


def test_children_have_the_environment_that_trains_faster() -> None:
    child = RealChild("faults:tell_environment", QUESTION)
    message = child.receive()
    assert child.end() == 0
    assert message is not None
    assert "MALLOC_MMAP_MAX_" in message[1]
    assert environment.training_environment(os.environ).items() <= message[1].items()


def test_environment_of_the_user_stands() -> None:
    assert environment.training_environment({})
    assert environment.training_environment({"MALLOC_TRIM_THRESHOLD_": "131072"}) == {}


def test_question_ends_with_the_search() -> None:
    """A measurement or a download is of no use to a search that is gone."""
    child = RealChild("faults:slow_answer", QUESTION)
    assert not connection.wait([child._process.sentinel], 0.5)
    child.connection.close()
    assert connection.wait([child._process.sentinel], 5)


# ----------------------------------------------------------------------------------------- memory


def test_out_of_memory_starts_the_same_trial_with_smaller_batches(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    went_on, start_again = [], runner_module.Runner._start_again

    def noted(runner: runner_module.Runner, running: RunningTrial) -> None:
        went_on.append(running.job.continue_from)
        start_again(runner, running)

    monkeypatch.setattr(runner_module.Runner, "_start_again", noted)
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "out_of_memory"}))
    assert run(n_trials="1") == 0
    directory = tmp_path / "c"
    assert went_on == [directory / "trial_000"], "from its last state"
    (trial,) = open_study(directory).get_trials()
    assert trial.state == TrialState.COMPLETE
    assert trial.user_attrs["micro_batch"] == 4
    config = json.loads((directory / "trial_000" / "config.json").read_text())
    assert config["micro_batch"] == 4
    assert config["config"]["batch_size"] == 8, "the sampler's configuration is untouched"
    assert "out of memory: started again with 4 images at once" in capfd.readouterr().out


@pytest.mark.parametrize(("micro_batch", "half"), [(None, 4), (32, 4), (8, 4), (4, None)])
def test_what_was_at_once_is_halved(
    micro_batch: int | None,
    half: int | None,
    config: TrialConfig,
    data: LineSet,
    tmp_path: Path,
) -> None:
    job = processes.Job(config, data, tmp_path, 1, micro_batch=micro_batch)
    assert runner_module.smaller_batch(job) == half


@pytest.mark.parametrize(
    ("error", "is_memory", "is_fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (MemoryError(), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            True,
            False,
        ),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True, False),
        (
            RuntimeError("FIND was unable to find an engine to execute this"),
            True,
            False,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True, False),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), False, True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("the cat is on the keyboard"), False, False),
        (ValueError("out of memory"), False, False),
    ],
)
def test_errors_of_devices_are_told_apart(
    error: Exception, is_memory: bool, is_fault: bool, config: TrialConfig, data: LineSet
) -> None:
    assert is_out_of_memory(error) == is_memory
    assert is_device_fault(error) == is_fault
    job = messages.Job(config, data, Path("trial_000"), 1)
    kind, content = child_module._outcome(error, job)
    assert (kind == "failed" and content["cause"].kind is Kind.OUT_OF_MEMORY) == is_memory


SICK = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("error", "query", "free", "is_memory", "is_fault"),
    [
        # A GPU that has failed says it to each call; libraries say it in their own words.
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", SICK, 0.9, False, True),
        ("GET was unable to find an engine to execute this computation", SICK, 0.0, False, True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", SICK, 0.9, False, True),
        ("NCCL error: unhandled cuda error", SICK, 0.9, False, True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", None, 0.9, False, False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "out of memory", 0.9, False, False),
        # They have no memory for themselves, or cannot do what is asked.
        (
            "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
            None,
            0.02,
            True,
            False,
        ),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", None, 0.02, True, False),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", None, 0.02, True, False),
        ("GET was unable to find an engine to execute this computation", None, 0.02, True, False),
        ("GET was unable to find an engine to execute this computation", None, 0.9, False, False),
        ("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", None, 0.9, True, False),
    ],
)
def test_a_gpu_is_asked_what_an_error_means(
    error: str,
    query: str | None,
    free: float,
    is_memory: bool,
    is_fault: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def query(self) -> bool:
            if query is not None:
                raise torch.AcceleratorError(query)
            return False

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1000), 1000))
    assert is_out_of_memory(RuntimeError(error)) == is_memory
    assert is_device_fault(RuntimeError(error)) == is_fault
    assert not is_device_fault(ValueError(error))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_out_of_memory_with_four_images_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "always_out_of_memory"}))
    assert run(n_trials="2") == 0
    assert [state for _, state, _ in trials_of(tmp_path / "c")] == ["FAIL", "COMPLETE"]
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "cause:  out of memory" in log
    assert "smaller batch" in log


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.3])
def test_accumulated_gradients_agree_with_plain_ones(
    mixup_alpha: float, config: TrialConfig
) -> None:
    """Without batch norm's statistics, which are of the images at once, nothing differs."""
    from dataclasses import replace

    config = replace(config, dropout=0.0, mixup_alpha=mixup_alpha)
    images, labels = torch.randn(8, 1, 16, 32), torch.arange(8) % 4
    gradients, losses = [], []
    for micro_batch in (None, 4, 3):
        state = TrainingState.start(config, 4, torch.device("cpu"))
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        losses.append(training_step(state, config, images, labels, micro_batch))
        gradients.append([p.grad for p in state.model.parameters()])
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0])
        torch.testing.assert_close(gradients[other], gradients[0])


# ------------------------------------------------------------------------------------------- disk


def test_directory_that_is_no_trial_s_own_rewrites_no_database(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy of a trial, an empty one, notes: none is a trial that the database has lost.

    They are moved out of the way of the trials to come, and told.
    """
    assert run(n_trials="2") == 0
    directory = tmp_path / "c"
    before = trials_of(directory)
    shutil.copytree(directory / "trial_001", directory / "trial_007")
    (directory / "trial_002").mkdir()
    (directory / "trial_009").mkdir()
    (directory / "trial_009" / "notes.txt").write_text("to be looked at")
    assert run(n_trials="3") == 0
    assert trials_of(directory)[:2] == before
    assert [state for _, state, _ in trials_of(directory)] == ["COMPLETE"] * 3
    told = capfd.readouterr().err
    assert "damaged" not in told
    for number in (2, 7, 9):
        (aside,) = directory.glob(f"trial_{number:03d}.stray-*")
        assert (
            f"trial_{number:03d} is no trial of this search: it was renamed to {aside.name}" in told
        )
    assert (aside / "notes.txt").exists()
    shutil.copytree(directory / "trial_001", directory / "trial_007")
    # Nor does a copy count where the database has to be rebuilt.
    (directory / DATABASE).unlink()
    assert run(n_trials="3") == 0
    states = [state for _, state, _ in trials_of(directory)]
    assert states.count("COMPLETE") == 3


def test_weights_of_the_best_trials_alone_are_kept(run: Run, tmp_path: Path) -> None:
    assert run("--keep_checkpoints", "2", n_trials="4") == 0
    directory = tmp_path / "c"
    values = {number: value or 0.0 for number, _, value in trials_of(directory)}
    best = sorted(values, key=lambda number: (-values[number], number))[:2]
    having = [n for n in values if list((directory / f"trial_{n:03d}").glob("*.pth"))]
    assert having == sorted(best)
    assert (directory / "summary" / "best_model.pth").exists()
    assert run("--keep_checkpoints", "best", n_trials="5") == 0
    assert len(list(directory.glob("trial_*/best_model.pth"))) == 1


def test_weights_to_go_on_from_are_kept(tmp_path: Path) -> None:
    """0 is best; 1 was interrupted, so were 2 and 3 that continued it; 4 waits to be continued."""
    attributes: list[dict[str, Any]] = [
        {},
        {"interrupted": True},
        {"interrupted": True, "continues": 1},
        {"interrupted": True, "continues": 2},
        {"interrupted": True},
        {},
    ]
    states = ["COMPLETE", *["FAIL"] * 4, "COMPLETE"]
    rows = [
        Row(number, state, 0.9 if number == 0 else 0.1, {}, None, None, attributes[number])
        for number, state in enumerate(states)
    ]
    for row in rows:
        (tmp_path / f"trial_{row.number:03d}").mkdir()
        (tmp_path / f"trial_{row.number:03d}" / "latest_checkpoint.pth").touch()

    removed: set[int] = set()

    def kept(running: set[int]) -> list[int]:
        remove_weights(tmp_path, rows, 1, running, removed)
        return sorted(int(path.parent.name[6:]) for path in tmp_path.glob("trial_*/*.pth"))

    assert kept({5}) == [0, 1, 2, 3, 4, 5]
    assert kept(set()) == [0, 1, 2, 3, 4]
    rows.append(Row(6, "PRUNED", None, {}, None, None, {"continues": 3}))
    assert kept(set()) == [0, 4]


class FullDisk(io.StringIO):
    """A file that nothing can be written to."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_how_a_trial_ended_is_said_when_its_log_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: LineSet, config: TrialConfig
) -> None:
    @contextlib.contextmanager
    def output_to_full_disk(path: Path) -> Iterator[None]:
        yield
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = messages.Job(config, data, tmp_path, 1)
    ours, theirs = connection.Pipe()
    monkeypatch.setattr(child_module, "_output_to", output_to_full_disk)
    monkeypatch.setattr(child_module, "_run", lambda connection, job: ("stopped", {}))
    child_module.run_trial(theirs, job)
    assert ours.recv() == ("stopped", {}), "its state is saved: it is no failure"
    monkeypatch.setattr(sys, "stderr", FullDisk())
    kind, content = child_module._outcome(ValueError("the true cause"), job)
    assert (kind, content["cause"].text) == ("failed", "ValueError: the true cause")


def test_log_that_cannot_be_opened_is_told_once(
    tmp_path: Path, data: LineSet, config: TrialConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = connection.Pipe()
    child_module.run_trial(theirs, messages.Job(config, data, tmp_path / "missing", 1))
    kind, content = ours.recv()
    assert (kind, content["cause"].kind) == ("failed", Kind.OTHER)
    assert "No such file" in str(content["cause"])
    assert "Traceback" in content["cause"].traceback
    assert capfd.readouterr().err == "", "nothing of it on the search's own screen"


@pytest.mark.parametrize("rows", [0, 1])
def test_database_whose_making_was_cut_off_is_made_anew(rows: int, tmp_path: Path) -> None:
    """Optuna would leave out the index that keeps a name unique. What has rows is left alone."""
    database = tmp_path / "optuna_study.db"
    with contextlib.closing(sqlite3.connect(database)) as begun, begun:
        begun.execute("CREATE TABLE studies (study_id INTEGER PRIMARY KEY, study_name VARCHAR)")
        for row in range(rows):
            begun.execute("INSERT INTO studies VALUES (?, 'another')", (row,))
    open_study(tmp_path)
    with contextlib.closing(sqlite3.connect(database)) as made:
        (indexes,) = made.execute(
            "SELECT count(*) FROM sqlite_master WHERE name = 'ix_studies_study_name'"
        ).fetchone()
    assert indexes == (rows == 0)


def test_records_that_a_full_disk_kept_back_are_written_later(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "write_record", full)
        assert run(n_trials="1") == 0
    assert "warning: [Errno 28] No space left on device" in capfd.readouterr().err
    assert not (tmp_path / "c" / "trial_000" / "trial.json").exists()
    assert run(n_trials="1") == 0
    assert (tmp_path / "c" / "trial_000" / "trial.json").exists()


# --------------------------------------------------------------------------------------- database


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, lines_root: Path, cache_dir: Path) -> Path:
    """A search of complete, pruned, failed and interrupted trials."""
    directory = tmp_path_factory.mktemp("searched") / "c"
    argv = arguments(lines_root, directory, "--cache_dir", str(cache_dir), n_trials="5")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "make_pruner", lambda name, epochs: PruneTrial(2))
        patch.setattr(runner_module, "ChildProcess", faulty({1: "raise_error", 4: "signal_search"}))
        assert main(argv) == 143
    assert [s for _, s, _ in trials_of(directory)] == [
        "COMPLETE",
        "FAIL",
        "PRUNED",
        "COMPLETE",
        "FAIL",
    ]
    return directory


@pytest.fixture
def copied(searched: Path, tmp_path: Path) -> Path:
    """A copy of that search, where `run` goes on with it."""
    return Path(shutil.copytree(searched, tmp_path / "c"))


def facts(directory: Path) -> list[tuple[Any, ...]]:
    return [
        (
            t.number,
            t.state,
            t.value,
            t.params,
            t.distributions,
            t.intermediate_values,
            t.user_attrs,
            t.datetime_start,
            t.datetime_complete,
        )
        for t in open_study(directory).get_trials()
    ]


def damage(database: Path, kind: str) -> None:
    content = bytearray(database.read_bytes())
    if kind == "deleted":
        database.unlink()
        return
    if kind == "middle":
        content[4096 * 3 : 4096 * 6] = random.Random(0).randbytes(4096 * 3)
    damaged = {
        "empty": b"",
        "text": b"this is not a database\n" * 100,
        "truncated": bytes(content[: len(content) // 2]),
        "cut page": bytes(content[:-1000]),
        "header": b"x" * 100 + bytes(content[100:]),
        "middle": bytes(content),
        "byte": bytes(content).replace(b'"attributes"', b'"attri\xffutes"'),
    }
    database.write_bytes(damaged[kind])


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "cut page", "header", "middle", "byte", "deleted"]
)
def test_damaged_database_heals_under_the_same_command(
    kind: str,
    copied: Path,
    run: Run,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = facts(copied)
    damage(copied / "optuna_study.db", kind)
    capfd.readouterr()
    n_trials = "3" if kind == "text" else "2"  # with another one, or with nothing left to train
    said: list[Any] = []
    optunas = logging.getLogger("optuna.storages._rdb.storage")
    monkeypatch.setattr(optunas, "callHandlers", said.append)
    assert run(n_trials=n_trials) == 0
    printed, problem = capfd.readouterr()
    assert said == [], "this program tells what is damaged, not Optuna"
    assert "RESUMING EXISTING STUDY" in printed
    assert problem.count("\n") == 1
    assert "rebuilt with 5 trials from their directories: 2 COMPLETE, 2 FAIL, 1 PRUNED" in problem
    assert facts(copied)[:5] == before
    assert len(list(copied.glob("optuna_study.db.damaged-*"))) == (kind != "deleted")
    assert [state for _, state, _ in trials_of(copied)][5:] == ["COMPLETE"] * (n_trials == "3")
    params = [json.dumps(p, sort_keys=True) for p in params_of(copied)]
    assert len(set(params)) == len(params), "no draw repeats"
    assert find_damage(copied) is None, "it is whole now"


def test_settings_that_are_not_as_recorded_heal(copied: Path) -> None:
    study = open_study(copied)
    settings = study.user_attrs["settings"]
    study.set_user_attr("settings", {**settings, "patience": settings["patience"] + 1})
    (warning,) = recovery.heal(copied, settings)
    assert "its settings are not as they were recorded" in warning
    assert open_study(copied).user_attrs["settings"] == settings


def damaged_somewhere(whole: bytes, rng: random.Random) -> bytes:
    """Damage a file at a random place, in a random way."""
    content = bytearray(whole)
    at, length = rng.randrange(len(content)), rng.choice([1, 16, 512, 4096, 20000])
    way = rng.choice(["flip", "flip", "bit", "zero", "noise", "cut", "remove", "shift", "header"])
    if way == "cut":
        return bytes(content[:at])
    if way == "remove":
        return bytes(content[:at] + content[at + length :])
    if way == "shift":
        return bytes(content[:at] + rng.randbytes(length) + content[at:])
    if way == "header":
        content[rng.randrange(100)] = rng.randrange(256)
    elif way == "flip":
        for _ in range(rng.choice([1, 20, 400])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif way == "bit":
        content[at] ^= 1 << rng.randrange(8)
    else:
        part = slice(at, min(at + length, len(content)))
        size = part.stop - part.start
        content[part] = bytes(size) if way == "zero" else rng.randbytes(size)
    return bytes(content)


@pytest.mark.parametrize(
    ("seed", "damages"),
    [
        (0, 10),
        *(pytest.param(seed, 40, marks=pytest.mark.slow) for seed in range(10, 15)),
    ],
)
def test_damage_anywhere_heals(seed: int, damages: int, copied: Path) -> None:
    """Also where SQLite's own check finds nothing: inside of a value."""
    before = facts(copied)
    settings = open_study(copied).user_attrs["settings"]
    database = copied / "optuna_study.db"
    whole = database.read_bytes()
    rng = random.Random(seed)
    healed = 0
    for number in range(damages):
        database.write_bytes(damaged_somewhere(whole, rng))
        assert preparation.standing_settings(copied) == settings, number
        healed += len(recovery.heal(copied, settings))
        assert facts(copied) == before, number
        assert open_study(copied).user_attrs["settings"] == settings, number
        for aside in copied.glob("optuna_study.db.damaged-*"):
            aside.unlink()
    assert healed > 0.5 * (number + 1), "the others hit unused bytes"


def test_healing_that_is_cut_off_at_each_step_is_begun_again(
    copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = facts(copied)
    leave_journal(copied / "optuna_study.db")
    damage(copied / "optuna_study.db", "text")
    settings = preparation.standing_settings(copied)
    assert settings is not None
    for step in range(1000):
        with monkeypatch.context() as patch:
            made = crash_before(patch, step)
            try:
                assert len(recovery.heal(copied, settings)) == 1
                break
            except Crash:
                assert len(made) == step + 1
    assert step > 5
    assert facts(copied) == before, "which the journal of the damaged file would undo"
    assert run(n_trials="3") == 0
    assert not (copied / ".recovery").exists()
    asides = sorted(path.name for path in copied.glob("optuna_study.db.damaged-*"))
    assert [name.endswith("-journal") for name in asides] in ([False, True], [True])
    assert not (copied / "optuna_study.db-journal").exists()


@pytest.mark.slow
def test_kill_during_the_healing(copied: Path, lines_root: Path, cache_dir: Path) -> None:
    """A real SIGKILL at random moments; the last start heals, and all trials are there."""
    before = facts(copied)
    rng = random.Random(0)
    words = arguments(lines_root, copied, "--cache_dir", str(cache_dir), n_trials="2")
    command = [sys.executable, "hyperparameter_search.py", *words]
    for _ in range(10):
        damage(copied / "optuna_study.db", "text")
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (copied / ".recovery").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        started.kill()
        started.wait()
    assert subprocess.run(command).returncode == 0
    assert facts(copied) == before


def test_what_cannot_heal_is_refused_and_untouched(
    copied: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trials of other settings, of two searches, or nothing that tells of any trial."""
    damage(copied / "optuna_study.db", "text")
    (copied / "search.lock").unlink()

    def refused(words: str, *changed: str, **options: str) -> None:
        left = snapshot(copied)
        capfd.readouterr()
        assert run(*changed, **options) == 2
        printed, problem = capfd.readouterr()
        assert "=" not in printed, "no banner"
        assert words in problem
        assert problem.startswith("error: ")
        after = snapshot(copied)
        after.pop("search.lock", None)
        assert after == left

    refused("epochs: 2 in the study, 3 now", epochs="3")
    (copied / "search.lock").unlink(missing_ok=True)
    config = copied / "trial_002" / "config.json"
    kept = config.read_text()
    changed = json.loads(kept)
    del changed["checksum"]
    changed["settings"]["patience"] = 77
    config.write_text(json.dumps(changed))
    refused("trial_002 is a trial of other settings")
    config.write_text(kept)
    for number in range(5):
        for name in ("trial.json", "config.json"):
            (copied / f"trial_{number:03d}" / name).unlink()
    refused("its trial directories hold nothing to rebuild from")
    for number in range(5):
        shutil.rmtree(copied / f"trial_{number:03d}")
    refused("has no trial directories to rebuild a study from")


@pytest.mark.parametrize("name", ["trial.json", "config.json"])
def test_damaged_record_beside_a_whole_database_changes_nothing(
    name: str, copied: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = facts(copied)
    for path in copied.glob(f"trial_*/{name}"):
        text = path.read_text()
        path.write_text(text.replace('"value": 0.', '"value": 0.9').replace("epochs", "epoxhs"))
    assert run(n_trials="2") == 0
    assert "rebuilt" not in capfd.readouterr().err
    assert facts(copied) == before


def test_what_a_file_cannot_be_read_for_is_no_damage(
    copied: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error

    left = snapshot(copied)
    with monkeypatch.context() as patch:
        patch.setattr("writer_search.study.damage._check", busy)
        assert run(n_trials="3") == 2
    assert "cannot be read: database is locked" in capfd.readouterr().err
    assert snapshot(copied) == left


def test_recovery_of_what_had_not_been_told(copied: Path, run: Run) -> None:
    """Killed between a trial's end and its record: complete; without metrics: cut off."""
    before = facts(copied)
    (copied / "optuna_study.db").unlink()
    (copied / "trial_000" / "trial.json").unlink()
    (copied / "trial_003" / "trial.json").write_text('{"state": "COMPLETE", "params": ')
    (copied / "trial_003" / "metrics.json").unlink()
    shutil.rmtree(copied / "trial_001")
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 0
    after = facts(copied)
    assert [row[0] for row in after] == [0, 1, 2, 3, 4]
    assert after[0][1:6] == before[0][1:6]
    assert after[1][1] == TrialState.FAIL
    assert after[2] == before[2]
    assert after[3][1] == TrialState.FAIL
    assert "cut off" in after[3][6]["failure"]
    (copied / "trial_003" / "error.log").unlink(missing_ok=True)
    assert run(n_trials="3") == 0
    assert "cut off" in (copied / "trial_003" / "error.log").read_text()


def test_recovery_keeps_numbers_equal_to_directories(copied: Path, run: Run) -> None:
    """Killed between asking and config.json, its database lost: a directory all the same."""
    (copied / "optuna_study.db").unlink()
    (copied / "trial_005").mkdir()
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 0
    assert trials_of(copied)[5] == (5, "FAIL", None)
    assert run(n_trials="3") == 0
    assert trials_of(copied)[6][:2] == (6, "COMPLETE")


def test_recovery_believes_no_number(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copied / "optuna_study.db").unlink()
    (copied / "trial_999999999").mkdir()
    left = snapshot(copied)
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 2
    assert "trial_999999999: only 5 trials before it" in capfd.readouterr().err
    assert snapshot(copied) == left


def test_recovery_without_settings(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = facts(copied)
    (copied / "optuna_study.db").unlink()
    for config in copied.glob("trial_*/config.json"):
        config.unlink()
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 0
    assert "no config.json tells the settings" in capfd.readouterr().out
    assert facts(copied) == before


@pytest.mark.parametrize(
    "change",
    [
        {"user_attrs": []},
        {"user_attrs": {"draw": "x"}},
        {"user_attrs": {"draw": 0, "seconds": "x"}},
        {"user_attrs": {"draw": 0, "continues": 0, "interrupted": True}},
        {"value": "0.5"},
        {"value": float("nan")},
        {"state": "RUNNING"},
        {"number": 3},
        {"intermediate_values": {"1": "x"}},
        {"intermediate_values": {"x": 0.5}},
        {"params": {"learning_rate": 1e9}},
        {"distributions": {"learning_rate": '{"name": "os.system", "attributes": {}}'}},
        {"datetime_start": None},
    ],
    ids=lambda change: json.dumps(change)[1:-1],
)
def test_record_that_makes_no_sense_is_not_believed(
    change: dict[str, Any], searched: Path, tmp_path: Path
) -> None:
    """The trial comes back from its config.json and metrics.json."""
    before = open_study(searched).get_trials()[0]
    for kind in ("trial.json", "config.json", "metrics.json", "history.jsonl"):
        (tmp_path / "trial_000").mkdir(exist_ok=True)
        shutil.copy(searched / "trial_000" / kind, tmp_path / "trial_000")
    record = json.loads((tmp_path / "trial_000" / "trial.json").read_text())
    record = {k: v for k, v in record.items() if k != "checksum"} | change
    (tmp_path / "trial_000" / "trial.json").write_text(json.dumps(record))
    recorded: set[int] = set()
    trial = rebuilding._rebuild(tmp_path, 0, recorded)
    assert not recorded
    assert trial is not None
    assert (trial.state, trial.value, trial.params) == (before.state, before.value, before.params)
    assert trial.intermediate_values == before.intermediate_values
    seconds = {"seconds": trial.user_attrs["seconds"]}  # of its epochs alone, now
    assert 0 <= seconds["seconds"] <= before.user_attrs["seconds"]
    assert trial.user_attrs == before.user_attrs | seconds


@pytest.mark.parametrize(
    "hostile",
    ["1", '{"epoch": 1}', '{"epoch": 7, "macro_top1": 0.5}', "\xff", '{"a":' * 5000],
)
def test_hostile_history_is_as_good_as_none(hostile: str, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(hostile.encode("latin-1"))
    assert read_history(tmp_path) == []


@pytest.mark.parametrize(
    "hostile",
    ["[]", '{"number": 0}', '{"number": 0, "state": "__class__"}', "\x00", '{"a":' * 5000],
)
def test_hostile_records_do_no_harm(hostile: str, copied: Path) -> None:
    (copied / "optuna_study.db").unlink()
    (copied / "trial_000" / "trial.json").write_text(hostile)
    (copied / "trial_000" / "config.json").write_text(hostile)
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 0
    assert trials_of(copied)[0][1] == "FAIL"


class Hostile:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_hostile_checkpoint_executes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_back: Callable[[], None]
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({1: "signal_search"}))
    assert run() == 143
    put_back()
    touched = tmp_path / "executed"
    checkpoint = tmp_path / "c" / "trial_001" / "latest_checkpoint.pth"
    torch.save({"model": Hostile(touched)}, checkpoint)
    assert run("--continue_interrupted", "--timeout", "600") == 0
    assert not touched.exists()
    error_log = (tmp_path / "c" / "trial_002" / "error.log").read_text()
    assert "cause:  UnpicklingError: Weights only load failed" in error_log
    torch.load(checkpoint, weights_only=False)
    assert touched.exists(), "the checkpoint was hostile indeed"


def test_whole_database_is_left_as_it_is(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(copied)
    assert main(["--recover", "--checkpoint_dir", str(copied)]) == 0
    assert "left as it is" in capfd.readouterr().out
    assert snapshot(copied) == before


@pytest.mark.parametrize("name", ["a b%20c?mode=ro#d&e", "ü كتاب", "new\nline"])
def test_any_name_of_a_directory_will_do(name: str, copied: Path) -> None:
    before = facts(copied)
    directory = copied.rename(copied.with_name(name))
    assert facts(directory) == before
    assert main(["--status", "--checkpoint_dir", str(directory)]) == 0
    (directory / "optuna_study.db").unlink()
    assert main(["--recover", "--checkpoint_dir", str(directory)]) == 0
    assert facts(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == [name], "no file beside it"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_params SET param_value = 99 WHERE distribution_json LIKE '%Categorical%'",
        "UPDATE trial_user_attributes SET value_json = '{' WHERE key = 'draw'",
        "UPDATE trials SET datetime_start = 'yesterday'",
    ],
)
def test_contents_that_make_no_sense_are_damage(
    statement: str, copied: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = facts(copied)
    with sqlite3.connect(copied / "optuna_study.db") as connection:
        assert connection.execute(statement).rowcount > 0
    connection.close()
    capfd.readouterr()
    assert main(["--status", "--checkpoint_dir", str(copied)]) == 2
    problem = capfd.readouterr().err
    assert problem.count("\n") == 1
    assert "its contents make no sense" in problem
    assert run(n_trials="2") == 0
    assert "its contents make no sense" in capfd.readouterr().err
    assert facts(copied) == before


@pytest.mark.parametrize("name", ["precision", None])
def test_settings_of_another_version_are_refused(
    name: str | None, copied: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    study = open_study(copied)
    settings = study.user_attrs["settings"]
    old = {k: v for k, v in settings.items() if k != name and name}
    study.set_user_attr("settings", old)
    for path in copied.glob("trial_*/config.json"):
        config = json.loads(path.read_text()) | {"settings": old}
        path.write_text(json.dumps({k: v for k, v in config.items() if k != "checksum"}))
    assert run() == 2
    assert "was begun by another version of this program" in capfd.readouterr().err


def test_study_without_settings_takes_those_of_the_next_start(copied: Path, run: Run) -> None:
    """Killed between the study's creation and its settings."""
    recorded = open_study(copied).user_attrs["settings"]
    with sqlite3.connect(copied / "optuna_study.db") as connection:
        connection.execute("DELETE FROM study_user_attributes")
    connection.close()
    assert run() == 0
    assert open_study(copied).user_attrs["settings"] == recorded


@pytest.mark.parametrize("version", ["v0.9.0.z", "v99.0.0.a"])
def test_database_of_another_version_is_refused(
    version: str, copied: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(copied / "optuna_study.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.close()
    assert run() == 2
    problem = capfd.readouterr().err
    assert problem.count("\n") == 1
    assert "version" in problem or "upgrade" in problem


# ------------------------------------------------------------------------------------------- lock


def test_file_system_without_locks_is_warned_of(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = locks.fcntl.flock

    def no_locks(descriptor: int, operation: int) -> None:
        path = Path(f"/proc/self/fd/{getattr(descriptor, 'fileno', lambda: descriptor)()}")
        if path.resolve().name == "search.lock":
            raise OSError(errno.ENOLCK, "No locks available")
        real(descriptor, operation)

    def no_records(file: Any, command: int, argument: bytes) -> None:
        assert (command, Path(file.name).name) == (locks.fcntl.F_GETLK, "search.lock")
        raise OSError(errno.ENOLCK, "No locks available")

    opened = []
    connect = sqlite3.connect

    def noted(database: Any, **options: Any) -> sqlite3.Connection:
        opened.append(str(database))
        return connect(database, **options)

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    monkeypatch.setattr(locks.fcntl, "fcntl", no_records)
    monkeypatch.setattr(sqlite3, "connect", noted)
    assert run(n_trials="1") == 0
    assert "this file system has no locks" in capfd.readouterr().err
    files = [database for database in opened if database != ":memory:"]
    assert files
    assert all("vfs=unix-none" in database for database in files), "SQLite would see a broken disk"
    assert main(["--status", "--checkpoint_dir", str(tmp_path / "c")]) == 0
    assert "it cannot be told whether it runs" in capfd.readouterr().out


# ------------------------------------------------------------------- signals to every process


def test_sigterm_to_a_trial_itself_lets_it_save(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Batch systems send it to each process of a job: what is done must reach the disk."""
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "signal_itself"}))
    directory = tmp_path / "c"
    more = ("--epochs", "3", "--max_consecutive_failed_trials", "1", "--continue_interrupted")
    assert run(*more, n_trials="2") == 0
    assert [state for _, state, _ in trials_of(directory)] == ["FAIL", "COMPLETE"], (
        "it is no failure"
    )
    log = (directory / "trial_000" / "error.log").read_text()
    assert "interrupted by SIGTERM to the trial's own process at epoch 2" in log
    saved = torch.load(directory / "trial_000" / "latest_checkpoint.pth", weights_only=True)
    assert saved["epoch"] == 1
    assert saved["step"] > 0
    assert run(*more, n_trials="2") == 0
    assert [state for _, state, _ in trials_of(directory)] == ["FAIL", "COMPLETE", "COMPLETE"]
    continued = open_study(directory).get_trials()[2]
    assert continued.user_attrs["continues"] == 0
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------- politeness


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this Linux does not group by session"
)
def test_a_search_that_is_nice_has_nice_trials() -> None:
    """Each child has a session, and the kernel shares the processor between sessions first."""
    seen = "import os; from writer_search.processes import parent; os.nice(7 - os.nice(0))"
    seen += "; parent._work('builtins:print', 'a', 'b')"
    seen += "; print(open('/proc/self/autogroup').read())"
    result = subprocess.run(
        [sys.executable, "-c", seen],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split()[-2:] == ["nice", "7"]


def test_session_is_weighed_once_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not root is refused a second change within a tenth of a second."""
    answers = iter([BlockingIOError(), BlockingIOError(), None])
    written = []

    def write_text(path: Path, text: str) -> None:
        if (answer := next(answers)) is not None:
            raise answer
        written.append((str(path), text))

    monkeypatch.setattr(Path, "write_text", write_text)
    fork_server.weigh_session(7)
    assert written == [("/proc/self/autogroup", "7")]
