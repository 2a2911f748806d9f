"""The real command in a process of its own: killed, signalled, asked from elsewhere."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from writer_search.common.locks import is_locked

PROGRAM = Path(__file__).parents[1] / "hyperparameter_search.py"


class Command:
    """A running search whose printed lines can be waited for."""

    def __init__(
        self,
        argv: list[str],
        ignore_interrupt: bool = False,
        limit_file_size: tuple[int, int] | None = None,
        umask: int | None = None,
    ) -> None:
        def prepare() -> None:
            if umask is not None:
                os.umask(umask)
            if ignore_interrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            if limit_file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit_file_size)

        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"{text!r} was never printed: {self.process.communicate()[1]}")

    def finish(self) -> tuple[int, str, str]:
        printed, problems = self.process.communicate(timeout=120)
        return self.process.returncode, printed, problems

    def descendants(self) -> set[int]:
        """Find all processes below this one, by /proc."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
        found = {self.process.pid}
        while new := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= new
        return found - {self.process.pid}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone_within(pids: set[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def start(lines_root: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def command(*more: str, directory: str = "c", **limits: Any) -> Command:
        argv = ["--data_root", str(lines_root), "--checkpoint_dir", str(tmp_path / directory)]
        small = ["backbone=tiny", "line_height=16", "crop_width=32", "batch_size=8"]
        for value in [*small, "precision=float32"]:  # not measured: seconds for each command
            argv += ["--fix", value]
        argv += ["--use_all_writers", "--weights", "none", "--device", "cpu", *more]
        argv += ["--patience", "9999", "--n_trials", "2"]
        argv += [] if "--epochs" in more else ["--epochs", "9999"]  # longer than any test
        started.append(Command(argv, **limits))
        return started[-1]

    yield command
    for one in started:
        below = one.descendants()
        one.process.kill()
        assert gone_within(below, 5)
        one.process.communicate(timeout=10)


def states_of(directory: Path) -> list[str]:
    connection = sqlite3.connect(directory / "optuna_study.db")
    states = [row[0] for row in connection.execute("SELECT state FROM trials ORDER BY number")]
    connection.close()
    return states


def test_kill_9_in_a_trial_loses_that_trial_alone(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    first = start("--epochs", "15")
    first.wait_for("trial   1 | epoch  3/15")
    below = first.descendants()
    assert len(below) >= 2, "the fork server and a trial"
    for pid in below:  # stopped, so that they are alive when the lock is looked at
        os.kill(pid, signal.SIGSTOP)
    first.process.kill()
    first.process.wait()
    children = {pid for pid in below if is_alive(pid)}
    assert children, "the death signal ends the fork server alone"
    assert not is_locked(tmp_path / "c"), "the lock does not outlive the search in its children"
    for pid in children:
        os.kill(pid, signal.SIGCONT)
    assert gone_within(below, 5), "no process outlives the search by 5 s"
    assert states_of(tmp_path / "c") == ["COMPLETE", "RUNNING"]
    weights = (tmp_path / "c" / "trial_000" / "final_model.pth").read_bytes()

    again = start("--epochs", "15")
    code, printed, problems = again.finish()
    assert (code, problems) == (0, "")
    assert "trial 1 was cut off at epoch " in printed
    assert "trial   0 |" not in printed, "a finished trial is not trained again"
    assert states_of(tmp_path / "c") == ["COMPLETE", "FAIL", "COMPLETE"]
    assert (tmp_path / "c" / "trial_000" / "final_model.pth").read_bytes() == weights
    assert "cut off without a word" in (tmp_path / "c" / "trial_001" / "error.log").read_text()


def fork_servers(command: Command) -> set[int]:
    """Find the fork server, which is the search's own child."""
    return {
        pid
        for pid in command.descendants()
        if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        == str(command.process.pid)
    }


@pytest.mark.slow
def test_fork_server_that_imports_torch_ends_with_the_search(
    start: Callable[..., Command],
) -> None:
    """Stopped, it stands for an import that takes long: nothing in it can notice."""
    command = start()
    deadline = time.monotonic() + 30
    servers: set[int] = set()
    while not servers and time.monotonic() < deadline:
        servers = {pid for pid in fork_servers(command) if os.getsid(pid) == pid}
    (server,) = servers
    os.kill(server, signal.SIGSTOP)
    command.process.kill()
    assert gone_within({server}, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [
        (signal.SIGTERM, True, 143),
        (signal.SIGINT, True, 130),
        (signal.SIGHUP, True, 129),
        (signal.SIGUSR1, False, 138),
        (signal.SIGUSR2, False, 140),
    ],
)
def test_signal_saves_and_ends(
    number: signal.Signals,
    to_group: bool,
    code: int,
    start: Callable[..., Command],
    tmp_path: Path,
) -> None:
    """Also SIGINT where a script started the search in the background, with SIGINT ignored."""
    command = start(ignore_interrupt=True)
    command.wait_for("trial   0 | epoch  2/9999")
    below = command.descendants()
    (os.killpg if to_group else os.kill)(command.process.pid, number)
    returned, printed, problems = command.finish()
    assert returned == code
    assert problems.startswith(f"stopped by {number.name}: everything is saved")
    assert "Traceback" not in printed + problems
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert f"interrupted by {number.name} at epoch " in log
    assert (tmp_path / "c" / "trial_000" / "latest_checkpoint.pth").exists()
    assert states_of(tmp_path / "c") == ["FAIL"]
    assert gone_within(below, 5)


def _as_from_a_terminal() -> None:
    """A script that runs these tests in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("program", ["hyperparameter_search.py", "train.py"])
def test_interrupt_during_imports_ends_without_a_traceback(program: str) -> None:
    command = [sys.executable, "-X", "importtime", str(PROGRAM.with_name(program))]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=_as_from_a_terminal
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "argparse" in line:
                break
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" not in told


@pytest.mark.slow
def test_second_interrupt_ends_at_once(start: Callable[..., Command]) -> None:
    command = start()
    command.wait_for("trial   0 | epoch  2/9999")
    below = command.descendants()
    # Stopped children cannot answer: without the second Ctrl-C this would take long.
    for pid in below:
        os.kill(pid, signal.SIGSTOP)
    os.kill(command.process.pid, signal.SIGINT)
    time.sleep(1.3)
    os.kill(command.process.pid, signal.SIGINT)
    code = command.process.wait(10)
    for pid in below:  # also lets go of the pipe that they hold
        os.kill(pid, signal.SIGCONT)
    assert code == -signal.SIGINT
    assert gone_within(below, 5)


@pytest.mark.slow
def test_status_while_it_runs_needs_no_torch(start: Callable[..., Command], tmp_path: Path) -> None:
    command = start()
    command.wait_for("trial   0 | epoch  2/9999")
    code = (
        "import sys, hyperparameter_search as h;"
        f"code = h.main(['--status', '--checkpoint_dir', {str(tmp_path / 'c')!r}, *sys.argv[1:]]);"
        "assert not {'torch', 'torchvision'} & set(sys.modules); sys.exit(code)"
    )

    def ask(*more: str) -> str:
        status = subprocess.run(
            [sys.executable, "-c", code, *more], cwd=PROGRAM.parent, capture_output=True, text=True
        )
        assert status.returncode == 0, status.stderr
        return status.stdout

    assert "c: running (pid " in ask()
    found = json.loads(ask("--json"))
    assert found["active"]
    (running,) = found["running"]
    assert running["number"] == 0
    assert running["epoch"] >= 2
    assert 0 <= running["value"] <= running["best"] <= 1
    assert found["seconds_left"]["low"] <= found["seconds_left"]["high"]
    # No terminal: once.
    assert ask("--watch").count("c: running") == 1
    command.process.send_signal(signal.SIGTERM)
    assert command.finish()[0] == 143


@pytest.mark.slow
def test_second_start_is_refused_while_the_first_runs(start: Callable[..., Command]) -> None:
    command = start()
    command.wait_for("trial   0 | epoch  1/9999")
    code, printed, problems = start().finish()
    assert (code, printed) == (2, "")
    assert f"is in use by another search (pid {command.process.pid} on " in problems


@pytest.mark.slow
def test_killed_fork_server_costs_no_trial(start: Callable[..., Command], tmp_path: Path) -> None:
    command = start("--epochs", "15")
    command.wait_for("trial   0 | epoch  1/15")
    servers = fork_servers(command)
    assert len(servers) == 1
    os.kill(servers.pop(), signal.SIGKILL)
    code, _, problems = command.finish()
    assert (code, problems) == (0, "")
    assert states_of(tmp_path / "c") == ["COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_full_disk_fails_the_trial_and_spares_the_rest(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    """No file may grow beyond a megabyte: a checkpoint of resnet_thin has ten, the study less."""
    limit = (2**20, resource.RLIM_INFINITY)
    command = start(
        *("--epochs", "1", "--fix", "backbone=resnet_thin", "--max_consecutive_failed_trials", "2"),
        directory="full",
        limit_file_size=limit,
    )
    code, printed, problems = command.finish()
    assert code == 3, printed + problems
    assert "common cause: OSError: [Errno 27] File too large" in problems
    assert states_of(tmp_path / "full") == ["FAIL", "FAIL"]
    for number in (0, 1):
        directory = tmp_path / "full" / f"trial_{number:03d}"
        assert "File too large" in (directory / "error.log").read_text()
        assert not list(directory.glob("*.pth"))
        assert not list(directory.glob(".*.tmp"))
    after = start("--epochs", "1", "--fix", "backbone=resnet_thin", directory="full")
    assert after.finish()[0] == 0
    assert states_of(tmp_path / "full") == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_study_that_cannot_be_written_ends_the_search_in_one_line(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    """The disk fills up in a trial: not even its end can be recorded."""
    command = start("--epochs", "15")
    command.wait_for("trial   1 | epoch  1/15")
    for pid in (command.process.pid, *command.descendants()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, 100))
    code, printed, problems = command.finish()
    assert code == 2, printed + problems
    last = problems.splitlines()[-1]
    start_of_it = f"error: {tmp_path / 'c'} cannot be written: "
    assert last.startswith(start_of_it)
    assert "[SQL" not in last
    assert "what was recorded is safe" in last
    assert "Traceback" not in problems
    code, printed, problems = start("--epochs", "15").finish()
    assert (code, problems) == (0, "")
    assert states_of(tmp_path / "c") == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.slow
def test_two_starts_at_the_same_moment_make_one_search(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    """In a directory that is not there yet; the later one may also find all done."""
    outcomes = [command.finish() for command in (start("--epochs", "9"), start("--epochs", "9"))]
    for code, printed, problems in outcomes:
        assert (code, problems) == (0, "") or (code == 2 and "is in use by" in problems), printed
    assert 0 in [code for code, _, _ in outcomes]
    assert states_of(tmp_path / "c") == ["COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_reader_that_goes_away_does_not_end_the_search(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    """As in `... | head -3`: the output ends, the search does not. Files have the user's umask."""
    search = start("--epochs", "3", umask=0o027)
    assert search.process.stdout is not None
    search.process.stdout.readline()
    search.process.stdout.close()
    assert search.process.wait(60) == 0
    assert states_of(tmp_path / "c") == ["COMPLETE", "COMPLETE"]
    for path in [tmp_path / "c", *(tmp_path / "c").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.slow
def test_kill_9_leaves_no_rank_behind(start: Callable[..., Command], tmp_path: Path) -> None:
    search = start("--gpus_per_trial", "2")
    search.wait_for("trial   0 | epoch  2/")
    below = search.descendants()
    assert len(below) >= 3, "the fork server and two ranks"
    search.process.kill()
    assert gone_within(below, 5)
    again = start("--gpus_per_trial", "2", "--continue_interrupted")
    again.wait_for("trial   1 | epoch ")
