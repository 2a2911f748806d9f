"""The place that a command is started in: closed streams, no home, no directory, another system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_search import Run, arguments, run, trials_of

from writer_search.common import files
from writer_search.processes import parent

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


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        ("import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", "working directory"),
        (
            "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']",
            "set TMPDIR",
        ),
        ("import sys; sys.platform = 'darwin'", "runs on Linux only"),
    ],
)
def test_place_that_is_missing_is_told_in_a_line(wrapped: str, words: str, tmp_path: Path) -> None:
    script = "hyperparameter_search.py"
    options = ["--data_root", "/proc", "--checkpoint_dir", str(tmp_path)]
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
    from writer_search.common.errors import UserError

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
