"""The study loop at scale: what it keeps between trials is what it would read anew."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.study_scale import SPACE, fill, instant_trials, search_side
from writer_search.common.signals import StopSignals
from writer_search.results.rows import DATABASE, Row, best_row, read_database
from writer_search.results.tables import SummaryFiles
from writer_search.study.weights import remove_weights

FIXED = {"line_height": 64}
START = datetime(2026, 1, 1, tzinfo=UTC)


def complete_row(number: int, value: float, **params: float) -> Row:
    return Row(number, "COMPLETE", value, params, START, START, {"epochs": 3})


def summary_of(directory: Path) -> tuple[str, str]:
    summary = directory / "summary"
    return (summary / "trials.csv").read_text(), (summary / "best_trial.json").read_text()


def test_summary_kept_up_to_date_is_the_summary_written_anew(tmp_path: Path) -> None:
    kept, anew = tmp_path / "kept", tmp_path / "anew"
    kept.mkdir()
    anew.mkdir()
    files = SummaryFiles(kept, FIXED)
    rows = [complete_row(0, 0.5, dropout=0.1)]
    changes = [
        rows,
        [*rows, complete_row(1, 0.4, dropout=0.2)],
        [*rows, replace(complete_row(1, 0.4), state="FAIL", value=None)],  # a changed row
        [*rows, complete_row(1, 0.6, learning_rate=0.3)],  # a new column, a new best trial
    ]
    for rows_now in changes:
        files.write(rows_now)
        SummaryFiles(anew, FIXED).write(rows_now)
        assert summary_of(kept) == summary_of(anew)
    header, first = summary_of(kept)[0].splitlines()[:2]
    assert header.endswith(",line_height (fixed),failure")
    assert first.endswith(",64,")


def test_best_trial_is_written_only_when_it_changes(tmp_path: Path) -> None:
    files, best = SummaryFiles(tmp_path, FIXED), complete_row(0, 0.5)
    files.write([best])
    written = tmp_path / "summary" / "best_trial.json"
    before = written.stat().st_ino
    files.write([best, complete_row(1, 0.4)])
    assert written.stat().st_ino == before
    files.write([best, complete_row(1, 0.6)])
    assert written.stat().st_ino != before


def test_removed_weights_are_not_looked_for_again(tmp_path: Path) -> None:
    rows = [complete_row(number, number / 10) for number in range(3)]
    removed: set[int] = set()
    for number in range(3):
        (tmp_path / f"trial_{number:03d}").mkdir()
        (tmp_path / f"trial_{number:03d}" / "best_model.pth").touch()
    remove_weights(tmp_path, rows, 1, (), removed)
    assert removed == {0, 1}
    assert [path.parent.name for path in tmp_path.glob("*/*.pth")] == ["trial_002"]


def test_search_knows_its_rows_without_reading_all(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    with StopSignals() as stop, instant_trials():
        search, trial = search_side(tmp_path, stop, reports=3)
        trial()
        trial()
    rows = read_database(tmp_path / DATABASE).rows
    assert [row.number for row in rows] == list(range(8))
    assert search.rows == rows
    assert search.outlook.finished()[0] == best_row(rows)
    kept = (tmp_path / "summary" / "trials.csv").read_text()
    SummaryFiles(tmp_path, SPACE.fixed).write(rows)
    assert (tmp_path / "summary" / "trials.csv").read_text() == kept
