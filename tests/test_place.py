"""The place that a command is started in: closed streams, no home, no directory, another system."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import Run, arguments, run, trials_of

from data import LineSet
from writer_search import flags
from writer_search.common import files, place
from writer_search.common.errors import UserError, place_errors_told
from writer_search.common.provenance import git_state
from writer_search.config import TrialConfig
from writer_search.processes import causes, fork_server, messages, parent
from writer_search.processes import runner as runner_module
from writer_search.processes.devices import refuse_other_kind
from writer_search.results.rows import read_database
from writer_search.study import preparation
from writer_search.study.damage import find_damage
from writer_search.study.store import open_study
from writer_search.training import optimisation

__all__ = ["run"]  # the fixture

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_system_that_syncs_no_directory_will_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


def test_disk_that_is_full_at_the_sync_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "a.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_quota_that_is_used_up_is_a_full_disk() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT):
        assert causes.of_error(OSError(code, "full"), "").is_resumable
    assert not causes.of_error(OSError(errno.EIO, "broken"), "").is_resumable


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_cost_no_trial(
    closed: tuple[int, ...], lines_root: Path, cache_dir: Path, tmp_path: Path
) -> None:
    words = arguments(lines_root, tmp_path / "c", "--cache_dir", str(cache_dir), n_trials="1")
    command = [sys.executable, "hyperparameter_search.py", *words]

    def close() -> None:
        for number in closed:
            os.close(number)

    done = subprocess.run(command, cwd=HERE, preexec_fn=close, timeout=100)
    assert done.returncode == 0
    assert trials_of(tmp_path / "c")[0][1] == "COMPLETE"


SEARCH = ["hyperparameter_search.py", "--data_root", "/proc", "--checkpoint_dir", "c"]
TRAIN = ["train.py", "--config", "c", "--data_root", "/proc", "--output_dir", "o"]
GONE = "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')"
NO_TEMPORARIES = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']"


@pytest.mark.parametrize(
    ("command", "wrapped", "words"),
    [
        (SEARCH, GONE, "working directory"),
        (TRAIN, GONE, "working directory"),
        (SEARCH, NO_TEMPORARIES, "set TMPDIR"),
        (TRAIN, NO_TEMPORARIES, "set TMPDIR"),
        (SEARCH, "import sys; sys.platform = 'darwin'", "runs on Linux only"),
    ],
)
def test_place_that_is_missing_is_told_in_a_line(
    command: list[str], wrapped: str, words: str, tmp_path: Path
) -> None:
    script, *options = command
    code = (
        f"{wrapped}\nimport sys, runpy\nsys.path.insert(0, {str(HERE)!r})\n"
        f"sys.argv = [{script!r}, *{options!r}]\n"
        f"runpy.run_path({str(HERE / script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_user_without_a_home_is_told_what_to_give(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from data import default_cache_dir

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(UserError, match="give --cache_dir, or set HOME"):
        default_cache_dir()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.EMFILE])
def test_cause_of_a_process_that_does_not_start_is_the_real_one(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        Pipe = staticmethod(parent._context.Pipe)

        class Process:
            def __init__(self, **_: Any) -> None: ...

            def start(self) -> None:
                raise OSError(number, os.strerror(number))

    monkeypatch.setattr(parent, "_context", Broken)
    monkeypatch.setattr(parent, "start_fork_server", lambda: None)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        parent.ChildProcess("a:b", None)
    assert raised.value.errno == number


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (fork_server.FORK_FAILED + errno.EAGAIN, "Resource temporarily .* ulimit -u"),
        (1, "the server that starts them: ended with exit code 1"),
        (120, "the server that starts them: ended with exit code 120"),
    ],
)
def test_cause_that_the_fork_server_died_of_is_told(
    code: int, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = subprocess.Popen(["sh", "-c", f"exit {code}"])

    def lose(*_: object) -> None:
        raise EOFError

    monkeypatch.setattr(parent, "start_fork_server", lambda: None)
    monkeypatch.setattr(fork_server.forkserver._forkserver, "_forkserver_pid", server.pid)  # type: ignore[attr-defined]
    monkeypatch.setattr(parent.ChildProcess, "_start", lose)
    with pytest.raises(OSError, match=f"no process can be started: .*{cause}"):
        parent.ChildProcess("a:b", None)
    server.wait()


FORK_THAT_FAILS = """
import errno, os, sys, types
def fail():
    raise BlockingIOError(errno.EAGAIN, "no")
os.fork = fail
sys.modules["writer_search.processes.child"] = types.ModuleType("child")  # torch takes seconds
os.environ["SEARCH_PID"] = str(os.getppid())
import writer_search.processes.preload
os.fork()
"""


def test_fork_server_that_cannot_fork_ends_with_the_error() -> None:
    done = subprocess.run([sys.executable, "-c", FORK_THAT_FAILS], cwd=HERE, capture_output=True)
    assert (done.returncode, done.stderr) == (fork_server.FORK_FAILED + errno.EAGAIN, b"")


SEARCH_THAT_DIED = """
import os, sys, types
sys.modules["writer_search.processes.child"] = types.ModuleType("child")  # torch takes seconds
os.environ["SEARCH_PID"] = str(os.getppid())
import writer_search.processes.preload
from multiprocessing import spawn
for begun in (b"", b"\\x80\\x04\\x95"):
    reading, writing = os.pipe()
    os.write(writing, begun)
    os.close(writing)
    try:
        spawn._main(reading, os.dup(reading))  # as the server's new child does
    except Exception:
        sys.excepthook(*sys.exc_info())
raise ValueError("to be told")
"""


def test_search_that_is_killed_as_a_process_starts_leaves_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEARCH_THAT_DIED], cwd=HERE, capture_output=True, text=True
    )
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("ValueError: to be told\n")


LATER_IMPORT = """
import os, sys, types
sys.modules["writer_search.processes.child"] = types.ModuleType("child")  # torch takes seconds
os.environ["SEARCH_PID"] = str(os.getppid())
import writer_search.processes.preload
sys.path.insert(0, sys.argv[1])  # with a torchvision that takes none
assert "torchvision" not in sys.modules
from writer_search.processes import fork_server
fork_server.forkserver._forkserver._forkserver_pid = os.getpid()
fork_server.preload_torchvision()
print("torchvision" in sys.modules)
"""


@pytest.mark.parametrize("content", ["", "raise OSError('it needs another torch')"])
def test_fork_server_imports_torchvision_when_it_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "torchvision.py").write_text(content)
    command = [sys.executable, "-c", LATER_IMPORT, str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(not content), "")


def test_interpreter_that_may_not_be_executed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiprocessing would say: connection refused."""
    parent.start_fork_server()
    interpreter = tmp_path / "python"
    interpreter.touch(mode=0o644)
    monkeypatch.setattr(fork_server, "get_executable", lambda: str(interpreter))
    child = parent.ChildProcess("writer_search.processes.machine:say_ready", None)
    assert child.receive() is not None, "the server that runs is as good as before"
    child.end()
    monkeypatch.setattr(fork_server.forkserver._forkserver, "_forkserver_pid", None)  # type: ignore[attr-defined]
    with pytest.raises(PermissionError, match=f"Permission denied: '{interpreter}'"):
        parent.ChildProcess("a:b", None)


def test_working_directory_that_is_deleted_keeps_no_process_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent.start_fork_server()  # from somewhere else
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    child = parent.ChildProcess("writer_search.processes.machine:say_ready", None)
    assert child.receive() is not None
    assert child.end() == 0
    with pytest.raises(FileNotFoundError):  # what is relative leads nowhere else meanwhile
        os.getcwd()


def test_fork_server_whose_socket_is_no_file_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python 3.11.0 has it: a new server for each process would import torch each time."""
    server = fork_server.forkserver._forkserver  # type: ignore[attr-defined]
    monkeypatch.setattr(server, "_forkserver_pid", 1)
    monkeypatch.setattr(server, "_forkserver_alive_fd", 2)
    monkeypatch.setattr(server, "_forkserver_address", "\0listener-1-0")
    fork_server._leave_unreachable_server()
    assert server._forkserver_pid == 1


def test_fork_server_whose_socket_is_removed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by what tidies /tmp; what runs goes on, and its end is known."""
    server = fork_server.forkserver._forkserver  # type: ignore[attr-defined]
    for name in ("pid", "address", "alive_fd"):  # one of its own, without torch
        monkeypatch.setattr(server, f"_forkserver_{name}", None)
    monkeypatch.setattr(parent._context, "set_forkserver_preload", lambda _: None)
    monkeypatch.setattr(server, "_preload_modules", [])
    monkeypatch.setattr(fork_server.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(fork_server.current_process()._config, "tempdir", str(tmp_path / "t"))  # type: ignore[attr-defined]
    (tmp_path / "t").mkdir()
    ends_when_told = "multiprocessing.connection:answer_challenge", b""  # by an error: 1
    first = parent.ChildProcess(*ends_when_told)
    before, alive = server._forkserver_pid, server._forkserver_alive_fd
    shutil.rmtree(tmp_path / "t")
    second = parent.ChildProcess(*ends_when_told)
    assert server._forkserver_pid != before
    for child in (first, second):
        child.connection.send("go")
        assert child.end() == 1
    for descriptor in (alive, server._forkserver_alive_fd):
        os.close(descriptor)


def test_thread_that_cannot_be_started_is_a_trial_s_cause(
    config: TrialConfig, data: LineSet, tmp_path: Path
) -> None:
    job = messages.Job(config, data.for_trial(), tmp_path, 1)
    child = parent.ChildProcess("faults:without_threads", job)
    message = child.receive()
    assert child.end() == 0
    assert message is not None
    assert str(message[1]["cause"]) == "BlockingIOError: [Errno 11] can't start new thread"


def test_thread_that_cannot_be_started_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match="ulimit -u"), place_errors_told():
        raise RuntimeError("can't start new thread")


def test_search_without_open_files_records_what_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The limit is a real one, reached while trial 0 runs and trial 1 is about to start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    real_write = runner_module.Runner.start

    def start(runner: Any, trial: Any, *more: Any) -> None:
        if trial.number == 1:
            with open(os.devnull) as lowest_free:
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno(), hard))
        real_write(runner, trial, *more)

    monkeypatch.setattr(runner_module.Runner, "start", start)
    try:
        assert run("--n_jobs", "2", "--epochs", "50", "--patience", "50") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "no more open files are allowed: see ulimit -n" in capfd.readouterr().err
    states = [state for _, state, _ in trials_of(tmp_path / "c")]
    assert states[0] == "FAIL"
    log = (tmp_path / "c" / "trial_000" / "error.log").read_text()
    assert "interrupted: the search failed" in log
    assert (tmp_path / "c" / "trial_000" / "latest_checkpoint.pth").exists()


def test_path_that_no_database_opens_is_refused_before_anything_is_made(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    longest = place.LONGEST_PATH - len(place.LONGEST_NAME)
    first = tmp_path / "a" / "b" / "c"
    missing = longest - len(str(first.resolve())) - 1
    fits = first / "/".join(["x" * (missing // 3), "y" * (missing // 3)])
    fits = fits / ("z" * (longest - len(str(fits)) - 1))
    place.require_short_path(fits)
    (fits / "confirm" / ".recovery").mkdir(parents=True)
    open_study(fits / "confirm" / ".recovery")  # what is not refused can be opened
    assert run(checkpoint_dir=str(tmp_path / "new" / fits.relative_to(tmp_path))) == 2
    assert "give a shorter one" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name",
    [os.fsdecode(b"caf\xe9"), "file:x", "a b?c#d%20"],
    ids=["not UTF-8", "like a URI", "to be quoted"],
)
def test_study_lives_in_a_directory_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Path(name)
    directory.mkdir()
    open_study(directory).enqueue_trial({"dropout": 0.5})
    open_study(directory)
    assert find_damage(directory) is None
    assert len(read_database(directory / "optuna_study.db").rows) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("recorded", "here", "device", "is_refused"),
    [
        ("gpu", "cpu", "auto", True),
        ("gpu", "cpu", "cpu", False),
        ("gpu", "gpu", "auto", False),
        ("cpu", "cpu", "auto", False),
        (None, "cpu", "auto", False),
    ],
)
def test_search_of_a_gpu_goes_on_without_one_only_on_demand(
    recorded: str | None, here: str, device: str, is_refused: bool
) -> None:
    settings = None if recorded is None else {"tier": recorded}
    with pytest.raises(UserError, match="--device cpu") if is_refused else nullcontext():
        refuse_other_kind(settings, {"tier": here}, device)


def test_writers_beyond_the_chosen_number_are_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parse = flags.parse_args

    def first_two(argv: list[str]) -> Any:
        words = [word for word in argv if word != "--use_all_writers"]
        return parse([*words, "--num_writers_subset", "2"])

    monkeypatch.setattr("hyperparameter_search.parse_args", first_two)
    assert run(n_trials="1") == 0
    assert "\n2 of 4 writers (--use_all_writers takes all) | lines: " in capfd.readouterr().out


@pytest.mark.parametrize("here", ["cpu", "gpu"])
def test_search_begun_without_a_gpu_says_that_it_goes_on_so(
    here: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_other_kind({"tier": "cpu"}, {"tier": here}, "auto")
    assert ("started without a GPU" in capsys.readouterr().err) == (here == "gpu")


def test_search_asks_for_the_kind_of_its_device(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(n_trials="1") == 0
    standing = preparation.standing_settings
    monkeypatch.setattr(
        preparation,
        "standing_settings",
        lambda d: settings | {"tier": "gpu"} if (settings := standing(d)) else None,
    )
    assert run("--device", "auto", n_trials="2") == 2
    assert "started on a GPU, and none is visible here" in capfd.readouterr().err


@pytest.mark.parametrize("is_native", [False, True])
def test_model_of_bfloat16_predicts_in_what_the_device_has(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimisation, "has_bfloat16", lambda _: is_native)
    config = TrialConfig(precision="bfloat16", seed=0, epochs=1, patience=1, backbone="tiny")
    used = optimisation.for_use_on(config, torch.device("cpu"))
    assert used.precision == ("bfloat16" if is_native else "float32")
    assert replace(used, precision="bfloat16") == config


def test_commit_is_that_of_the_program_s_own_files(tmp_path: Path) -> None:
    """Unpacked within the checkout of something else, it has none until it is added there."""

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    program = tmp_path / "program"
    program.mkdir()
    (program / "train.py").write_text("first")
    unknown = {"git_commit": None, "git_dirty": None}
    assert git_state(program) == unknown
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "something else")
    assert git_state(program) == unknown
    git("add", "program")
    git("commit", "--quiet", "--message", "the program")
    state = git_state(program)
    assert len(state["git_commit"]) == 40
    assert state["git_dirty"] is False
    (program / "train.py").write_text("second")
    assert git_state(program) == {**state, "git_dirty": True}
