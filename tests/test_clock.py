"""Clocks that are set, and hours that come twice: what people are told of times stays true."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from test_search import Run, run

from writer_search.common import clock, environment
from writer_search.common.files import read_json, write_json
from writer_search.results.estimate import finished_epochs
from writer_search.results.events import Events
from writer_search.results.rows import NONSENSE_SECONDS, Row, rows_of
from writer_search.results.status import read_status
from writer_search.study.store import open_study
from writer_search.study.unfinished import settle_unfinished

__all__ = ["run"]  # the fixture

NOW = datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


@pytest.fixture
def _own_zone() -> Iterator[None]:
    """Leave this process's time zone as it was."""
    before, replaced = os.environ.get("TZ"), dict(environment._replaced)
    yield
    environment._replaced.clear()
    environment._replaced.update(replaced)
    os.environ.pop("TZ", None) if before is None else os.environ.update(TZ=before)
    time.tzset()


@pytest.mark.parametrize(
    ("took", "measured", "seconds"),
    [
        (9.0, None, 9.0),
        (-3600.0, None, None),
        (NONSENSE_SECONDS, None, None),
        (-3600.0, 9.5, 9.5),
        (3600.0, 9.5, 9.5),
    ],
)
def test_seconds_are_those_of_a_clock_that_nobody_sets(
    took: float, measured: float | None, seconds: float | None
) -> None:
    attributes = {"epochs": 2} | ({} if measured is None else {"seconds": measured})
    row = Row(0, "COMPLETE", 0.5, {}, NOW, NOW + timedelta(seconds=took), attributes)
    assert row.seconds == seconds
    assert finished_epochs([row]) == ([] if seconds is None else [(2.0, seconds)])


def test_clock_that_is_set_back_in_mid_trial_makes_no_trial_shorter(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()

    class SetBack(datetime):
        """It shows an hour less once the trial has begun."""

        @classmethod
        def now(cls, *zone: Any) -> datetime:
            has_begun = (tmp_path / "c" / "trial_000" / "config.json").exists()
            return datetime.now(*zone) - timedelta(hours=has_begun)

    monkeypatch.setattr(optuna.storages._rdb.storage, "datetime", SetBack)
    assert run(n_trials="1") == 0
    most = time.monotonic() - began
    record = read_json(tmp_path / "c" / "trial_000" / "trial.json")
    assert record["datetime_complete"] < record["datetime_start"], "what the clock had shown"
    table = (tmp_path / "c" / "summary" / "trials.csv").read_text()
    (trial,) = csv.DictReader(table.splitlines())
    history = (tmp_path / "c" / "trial_000" / "history.jsonl").read_text().splitlines()
    trained = sum(json.loads(line)["seconds"] for line in history)
    assert trained - 0.1 <= float(trial["seconds"]) <= most


def test_trial_that_was_cut_off_took_what_its_epochs_took(tmp_path: Path) -> None:
    """And not the time until somebody has started the search again."""
    study = open_study(tmp_path)
    for continues in (None, 0):
        attributes = {} if continues is None else {"continues": continues}
        study.enqueue_trial({}, user_attrs=attributes)
        directory = tmp_path / f"trial_{study.ask().number:03d}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        epochs = range(1, 3 if continues is None else 4)
        lines = [{"epoch": epoch, "macro_top1": 0.5, "seconds": 10.0 * epoch} for epoch in epochs]
        (directory / "history.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        settle_unfinished(study, tmp_path)
    assert [row.seconds for row in rows_of(study.trials)] == [30.0, 30.0]
    assert study.trials[1].user_attrs["epochs_before"] == 2
    assert study.trials[0].intermediate_values == {1: 0.5, 2: 0.5}, "none had been told"


def test_descriptor_that_was_cut_off_has_no_curve(tmp_path: Path) -> None:
    """It stands beside no network's first epoch, for a pruner to compare."""
    study = open_study(tmp_path)
    study.enqueue_trial({}, user_attrs={"backbone": "cohog"})
    directory = tmp_path / f"trial_{study.ask().number:03d}"
    directory.mkdir()
    (directory / "history.jsonl").write_text('{"epoch": 1, "macro_top1": 0.5, "seconds": 10}\n')
    settle_unfinished(study, tmp_path)
    assert study.trials[0].intermediate_values == {}
    assert study.trials[0].user_attrs["epochs"] == 1


def test_status_of_a_running_trial_asks_the_clock_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(tmp_path)
    study.ask()
    (tmp_path / "trial_000").mkdir()
    reading = clock.now()
    monkeypatch.setattr("writer_search.results.status.is_locked", lambda _: True)
    monkeypatch.setattr("writer_search.results.rows.UTC", None)  # no time of the day is asked for
    for told in (reading | {"seconds": reading["seconds"] - 50.0}, reading | {"seconds": 1e12}):
        write_json(tmp_path / "trial_000" / "config.json", {"started_by_clock": told})
        (trial,) = read_status(tmp_path).running
        assert trial.seconds is not None
        assert (50.0 if told["seconds"] < 1e12 else 0.0) <= trial.seconds < 60.0


@pytest.mark.parametrize("reading", [None, 5, {"boot": "other", "seconds": 1.0}, {}])
def test_reading_of_another_machine_s_clock_tells_nothing(reading: Any) -> None:
    assert clock.seconds_since(reading) is None


@pytest.mark.usefixtures("_own_zone")
@pytest.mark.parametrize("zone", ["Europe/Berlin", None])
def test_user_s_command_has_the_user_s_time_zone(
    zone: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ.pop("TZ", None) if zone is None else os.environ.update(TZ=zone)
    environment.count_in_utc()
    assert time.localtime(0).tm_hour == 0, "UTC"
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.environ.get('TZ')))"
    command = [sys.executable, "-S", "-c", code, str(tmp_path / "zone")]
    events = Events(command)
    events.send({"event": "trial"})
    events.close()
    assert (tmp_path / "zone").read_text() == str(zone)


@pytest.mark.usefixtures("_own_zone")
@pytest.mark.parametrize("zone", ["Asia/Riyadh", "America/New_York"])
def test_times_are_read_right_in_any_zone(zone: str, tmp_path: Path) -> None:
    """--status runs in the user's zone, and the search has counted in UTC."""
    study = open_study(tmp_path)
    began = datetime.now(UTC)
    study.ask()
    os.environ["TZ"] = zone
    time.tzset()
    (row,) = read_status(tmp_path).rows
    assert row.started is not None
    assert abs(row.started - began) < timedelta(seconds=10)


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


@pytest.mark.usefixtures("_own_zone")
def test_hour_that_comes_twice_is_recorded_right(tmp_path: Path) -> None:
    """02:30 in Berlin for the second time: 01:30 UTC, and not 00:30."""
    done = subprocess.run(
        [sys.executable, "-c", HOUR_THAT_COMES_TWICE, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TZ": "Europe/Berlin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    (row,) = read_status(tmp_path).rows
    assert row.started == datetime(2026, 10, 25, 1, 30, tzinfo=UTC), "as --status reads it"
    record = read_json(tmp_path / "trial_000" / "trial.json")
    assert record["datetime_start"] == "2026-10-25T01:30:00+00:00"
    with closing(sqlite3.connect(tmp_path / "optuna_study.db")) as connection:
        (stored,) = connection.execute("SELECT datetime_start FROM trials").fetchone()
    assert stored.startswith("2026-10-25 01:30:00")
