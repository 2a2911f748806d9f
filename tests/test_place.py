"""The place that a command is started in: closed streams, no home, no directory, another system."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search import Run, arguments, run, trials_of

from writer_search.common import files, place
from writer_search.common.errors import UserError
from writer_search.config import TrialConfig
from writer_search.processes import parent
from writer_search.processes.devices import refuse_other_kind
from writer_search.study import preparation
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


HOUR_THAT_COMES_TWICE = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from optuna.trial import TrialState, create_trial
from writer_search.study.rebuilding import rebuild
from writer_search.study.records import write_record
from writer_search.study.store import open_study
directory, moment = Path(sys.argv[1]), datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
study = open_study(directory)
trial = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs={"draw": 0, "seed": 1})
trial.datetime_start = trial.datetime_complete = datetime.fromtimestamp(moment.timestamp())
study.add_trial(trial)
write_record(directory, study.trials[0])
print(rebuild(directory).trials[0].datetime_start == study.trials[0].datetime_start)
"""


def test_hour_that_comes_twice_is_recorded_right(tmp_path: Path) -> None:
    """02:30 in Berlin for the second time: 01:30 UTC, and not 00:30."""
    done = subprocess.run(
        [sys.executable, "-c", HOUR_THAT_COMES_TWICE, str(tmp_path)],
        cwd=HERE,
        env=os.environ | {"TZ": "Europe/Berlin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr
    record = files.read_json(tmp_path / "trial_000" / "trial.json")
    assert record["datetime_start"] == "2026-10-25T01:30:00+00:00"
    with closing(sqlite3.connect(tmp_path / "optuna_study.db")) as connection:
        (stored,) = connection.execute("SELECT datetime_start FROM trials").fetchone()
    assert stored.startswith("2026-10-25 01:30:00")


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
    assert "begun on a GPU, and none is visible here" in capfd.readouterr().err


@pytest.mark.parametrize("is_native", [False, True])
def test_model_of_bfloat16_predicts_in_what_the_device_has(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimisation, "has_bfloat16", lambda _: is_native)
    config = TrialConfig(precision="bfloat16", seed=0, epochs=1, patience=1, backbone="tiny")
    used = optimisation.for_use_on(config, torch.device("cpu"))
    assert used.precision == ("bfloat16" if is_native else "float32")
    assert replace(used, precision="bfloat16") == config
