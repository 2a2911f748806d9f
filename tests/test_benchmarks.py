"""Each benchmark runs, on next to nothing, and says what it is asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    cache,
    epoch,
    first_minutes,
    operations,
    outside,
    record_trials,
    search_efficiency,
    study_scale,
    trial_start,
    validation,
)
from data import find_lines
from writer_search.processes import machine

LINES = ("--threads", "1", "--writers", "2", "--pages", "3")


@pytest.fixture
def result(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:  # (module, flags) -> what its last line holds
    monkeypatch.setattr(machine, "_faster_precision", lambda *_: "float32")  # seconds each

    def run(benchmark: Any, *flags: str) -> dict[str, Any]:
        assert benchmark.main(flags) == 0
        found: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
        return found

    return run


def test_epoch(result: Any) -> None:
    found = result(
        epoch,
        *(*LINES, "--backbones", "tiny", "--batch_sizes", "4", "--rounds", "1", "--steps", "1"),
        *("--obvious_steps", "1", "--padded_steps", "0", "--workers", "0"),
    )
    assert found["ratio"] > 0
    assert found["cpu_ratio"] > 0
    assert "saving_ratio" in found
    assert found["squeezed_ratio"] > 0
    assert found["padded_ratio"] is None


def test_validation(result: Any) -> None:
    found = result(validation, *LINES, *("--backbones", "tiny", "--rounds", "1", "--workers", "0"))
    assert found["ratio"] > 0
    assert found["cpu_ratio"] > 0


def test_operations(result: Any) -> None:
    found = result(operations, *LINES, "--backbones", "tiny")
    assert found["step_tiny"] > found["validation_tiny"] > 10
    assert found["average_tiny"] == 1


@pytest.mark.slow
def test_trial_start(result: Any) -> None:
    found = result(trial_start, *LINES, "--trials", "2", "--spawned", "0")
    assert found["seconds"] > 0
    assert found["spawn_seconds"] is None


@pytest.mark.slow
def test_cache(result: Any) -> None:
    found = result(cache, *("--lines", "40", "--writers", "2", "--images", "4", "--rounds", "1"))
    assert 0 < found["open_seconds_20000"] < found["command_seconds"]
    assert found["lines_per_second"] > 0


@pytest.mark.slow
def test_record_trials_goes_on_where_it_was_stopped(
    result: Any, lines_root: Path, tmp_path: Path
) -> None:
    flags = [*("--data_root", str(lines_root), "--work", str(tmp_path / "work"))]
    flags += [*("--out", str(tmp_path / "table.json"), "--threads", "1", "--seeds", "0")]
    flags += [*("--trials", "1", "--epochs", "2", "--writers", "4", "--backbone", "tiny")]
    flags += [*("--line_height", "16", "--crop_width", "32")]
    assert result(record_trials, *flags, "--searches", "random-none")["trials"] == 1
    found = result(record_trials, *flags)
    assert found == {"trials": 3, "epochs": 6, "unfinished": 0}
    searches = json.loads((tmp_path / "table.json").read_text())["searches"]
    assert set(searches) == {"random-none-0", "tpe-none-0", "tpe-median-0"}
    assert all(len(trial["values"]) == 2 for trials in searches.values() for trial in trials)


def test_record_trials_may_train_on_fewer_pages(lines_root: Path, tmp_path: Path) -> None:
    for _ in range(2):  # also when it goes on
        fewer = record_trials.with_fewer_pages(lines_root, 1, tmp_path / "data")
    kept, everything = (
        Counter((line.split, line.writer) for line in find_lines(root))
        for root in (fewer, lines_root)
    )
    halved = {key: n // 2 if key[0] == "train" else n for key, n in everything.items()}
    assert kept == halved


@pytest.mark.slow
def test_study_scale(result: Any) -> None:
    found = result(
        study_scale, "--sizes", "2", "3", "--rounds", "1", "--reports", "3", "--memory_trials", "0"
    )
    assert {"added_ms_at_2", "added_ms_at_3", "added_cpu_ms_at_3"} <= set(found)


def test_search_efficiency(result: Any) -> None:
    found = result(search_efficiency, "--seeds", "2", "--trials", "1")
    assert set(found) == {"default", "unpruned", "optuna", "random"}
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.slow
def test_first_minutes(result: Any) -> None:
    found = result(
        first_minutes,
        *(*LINES, "--lines", "3", "--seconds", "60", "--n_trials", "1"),
        *("--fix", "line_height=16", "--fix", "precision=float32", "--fix", "crop_width=32"),
        *("--epochs", "1"),
    )
    assert 0 <= found["default_best"] <= 1
    assert 0 <= found["networks_best"] <= 1
    assert found["default_first_seconds"] > 0


def test_first_lines_are_taken_page_by_page_in_turn(lines_root: Path, tmp_path: Path) -> None:
    first_minutes.link_first_lines(lines_root, tmp_path / "few", 3)
    chosen = find_lines(tmp_path / "few")
    names = [f"{line.page}/{Path(line.path).name}" for line in chosen if line.split == "train"]
    own = ["page_01/line_001.png", "page_01/line_002.png", "page_02/line_001.png"]
    assert names == own * 4
    others = [line.path for line in chosen if line.split != "train"]
    assert others == [line.path for line in find_lines(lines_root) if line.split != "train"]


def test_outside(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "SETS", ("whole", "black 0.8"))
    found = result(outside, *LINES, "--epochs", "1", "--seeds", "1")
    assert found["macro_top1"].keys() == {"whole", "black 0.8"}
    assert all(0 <= value <= 100 for (value,) in found["macro_top1"].values())
