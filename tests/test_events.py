"""--on_event: what the command is told, and that it never harms the search."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import faulty
from test_search import Run, run

from writer_search.processes import runner as runner_module
from writer_search.results import events as events_module
from writer_search.results.events import Events
from writer_search.study.loop import Search

__all__ = ["run"]  # the fixture
EVENT = {"event": "trial"}


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


@pytest.fixture
def appending(tmp_path: Path) -> list[str]:
    """Give a command that appends what it reads to `told`, with its arguments."""
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"
    return python(code, str(tmp_path / "told"))


@pytest.fixture
def told(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    def read() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
        return sorted(lines, key=lambda event: event.get("number", 99))

    return read


def test_ends_of_trials_and_search_are_told(
    run: Run,
    appending: list[str],
    told: Callable[[], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "raise_error"}))
    assert run("--on_event", shlex.join(appending)) == 0
    assert capfd.readouterr().err == ""
    failed, complete, end = told()
    assert (failed["event"], failed["number"], failed["state"]) == ("trial", 0, "FAIL")
    assert "the cat is on the keyboard" in failed["failure"]
    assert (failed["value"], failed["best"]) == (None, None)
    assert (complete["number"], complete["state"], complete["epochs"]) == (1, "COMPLETE", 2)
    assert complete["best"] == {
        "number": 1,
        "value": complete["value"],
        "params": complete["params"],
    }
    assert (complete["complete"], complete["failed"], complete["n_trials"]) == (1, 1, 2)
    assert complete["interrupted"] == 0
    assert complete["checkpoint_dir"] == str(tmp_path / "c")
    assert (end["event"], end["exit_code"], end["complete"]) == ("search", 0, 1)


def test_end_by_a_signal_is_told_with_its_exit_code(
    run: Run,
    appending: list[str],
    told: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "ChildProcess", faulty({0: "signal_search"}))
    assert run("--on_event", shlex.join(appending), "--requeue_exit_code", "99") == 99
    trial, end = told()
    assert (trial["state"], end["exit_code"]) == ("FAIL", 99)


def test_error_of_the_program_itself_is_told_with_its_exit_code(
    run: Run,
    appending: list[str],
    told: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Python ends with it; one of the system is the user's to mend."""
    with monkeypatch.context() as patch:
        patch.setattr(Search, "loop", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("--on_event", shlex.join(appending))
    assert told()[-1]["exit_code"] == 1

    def full(_: Search) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Search, "loop", full)
    assert run("--on_event", shlex.join(appending)) == 2
    assert told()[-1]["exit_code"] == 2


def test_command_that_fails_or_is_missing_is_a_warning(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--on_event", str(tmp_path / "missing"), n_trials="1") == 0
    printed, problems = capfd.readouterr()
    assert "trial   0 | complete" in printed
    assert len(problems.splitlines()) == 2
    for line, event in zip(problems.splitlines(), ("trial", "search"), strict=True):
        assert line.startswith(f"warning: --on_event at the end of a {event}: cannot be run: ")
        assert "No such file" in line


def test_what_a_failing_command_said_last_is_quoted(capfd: pytest.CaptureFixture[str]) -> None:
    failing = Events(python("import sys; print('a\\nb', file=sys.stderr); sys.exit(3)"))
    failing.send(EVENT)
    failing.close()
    assert capfd.readouterr().err == "warning: --on_event at the end of a trial: exit code 3: b\n"


def test_no_shell_runs_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    harmless = Events(python(code, str(tmp_path / "seen"), "$(touch x); echo > y"))
    harmless.send(EVENT)
    harmless.close()
    assert capfd.readouterr().err == ""
    assert (tmp_path / "seen").read_text() == "$(touch x); echo > y"


def test_command_that_hangs_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It neither reads nor ends: sending returns at once, also of more than a pipe holds."""
    monkeypatch.setattr(events_module, "AT_ONCE", 2)
    monkeypatch.setattr(events_module, "LAST_SECONDS", 0.2)
    hanging = Events(python("import time; time.sleep(600)"))
    started = time.monotonic()
    for _ in range(3):
        hanging.send({**EVENT, "params": "x" * 200_000})
        hanging.look()
    assert time.monotonic() - started < 5
    assert hanging.seconds_to_next_deadline() > 50
    assert len(hanging._calls) == 2
    hanging.send({**EVENT, "event": "search"})  # the end is told all the same
    processes = [call.process for call in hanging._calls]
    hanging.close()
    assert [process.poll() for process in processes] == [-9, -9, -9]
    *lines, last = capfd.readouterr().err.splitlines()
    assert last.endswith("search: took too long and was ended")
    assert lines[0].endswith("not run: 2 of them are still running")
    assert [line.partition("trial: ")[2] for line in lines[1:]] == [
        "took too long and was ended",
        "took too long and was ended",
    ]


def has_processes(group: int) -> bool:
    """Tell whether a process of the group lives."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_command_that_runs_too_long_is_ended_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(events_module, "LIMIT_SECONDS", 0.1)
    hanging = Events(("sh", "-c", "sleep 600; true"))
    hanging.send(EVENT)
    (call,) = hanging._calls
    time.sleep(hanging.seconds_to_next_deadline() + 0.01)
    hanging.look()
    assert call.process.poll() == -9
    deadline = time.monotonic() + 10
    while has_processes(call.process.pid):
        assert time.monotonic() < deadline, "what it has started is ended, too"
        time.sleep(0.01)
    assert "took too long and was ended" in capfd.readouterr().err


def test_command_of_another_user_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with sudo: it cannot be killed."""
    monkeypatch.setattr(events_module, "LIMIT_SECONDS", 0.1)

    def refused(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    hanging = Events(python("import time; time.sleep(600)"))
    hanging.send(EVENT)
    (call,) = hanging._calls
    time.sleep(hanging.seconds_to_next_deadline() + 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", refused)
        hanging.look()
    call.process.kill()
    call.process.wait()
    assert "took too long and cannot be ended" in capfd.readouterr().err


@pytest.mark.parametrize(("command", "problem"), [("", "empty"), ("a 'b", "No closing quotation")])
def test_command_that_is_none_is_refused(
    command: str, problem: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--on_event", command) == 2
    assert problem in capfd.readouterr().err
    assert not (tmp_path / "c").exists()
