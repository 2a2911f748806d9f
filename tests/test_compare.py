"""--compare: the table, the ranking, and when there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searches import make_search

from data import find_lines, load_lines
from hyperparameter_search import main
from writer_search.results.compare import ranks, read_search, why_not_ranked
from writer_search.study.store import open_study

PROGRAM = Path(__file__).parents[1] / "hyperparameter_search.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two searches on the same lines, of 7 and of 3 trials."""
    directory = tmp_path_factory.mktemp("searches")
    for name, trials in (("a", 7), ("b", 3)):
        study = make_search(directory / name, trials, 6)
        settings = study.user_attrs["settings"]
        data = {"fingerprint": "1234", "writers": 6, "lines": {"train": 360, "val": 120}}
        study.set_user_attr("settings", {**settings, "metric": "macro top-1", "data": data})
    return directory


@pytest.fixture
def searches(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rows_of(text: str) -> dict[str, list[str]]:
    """Read the table back: label → cells, split where two spaces stand."""
    rows = {}
    for line in text.splitlines():
        label, *cells = [part.strip() for part in line.strip().split("  ") if part.strip()]
        rows[label] = cells
    return rows


def compared(searches: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    assert main(["--compare", str(searches / "a"), str(searches / "b")]) == 0
    printed, problems = capfd.readouterr()
    assert problems == ""
    return rows_of(printed)


def test_table(
    searches: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    table = compared(searches, capfd)
    assert table["search"] == [str(searches / "a"), str(searches / "b")]
    assert table["writers"] == ["6", "6"]
    assert table["trials complete"] == ["5", "3"]
    assert (table["pruned"], table["failed"]) == (["1", "0"], ["1", "0"])
    best = [open_study(searches / name).best_trial for name in "ab"]
    shown = [f"{100 * (trial.value or 0):.2f}% (trial {trial.number})" for trial in best]
    assert table["best value"] == shown
    assert table["learning_rate"] == [f"{trial.params['learning_rate']:.4g}" for trial in best]
    assert table["confirmed mean"] == table["test macro top-1"] == ["-", "-"]
    first_wins = (best[0].value or 0) > (best[1].value or 0)
    assert table["rank by best value"] == (["1", "2"] if first_wins else ["2", "1"])


def test_confirmed_means_decide_where_all_have_one(
    searches: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for name, mean in (("a", 0.5), ("b", 0.6)):
        complete = [t.number for t in open_study(searches / name).get_trials() if t.value]
        winner = {"trial": 0, "directory": "confirm/trial_001", "mean": mean, "deviation": 0.01}
        found: dict[str, Any] = {"of_trials": complete, "winner": winner}
        (searches / name / "summary" / "confirmation.json").write_text(json.dumps(found))
    test = {"trial": 0, "macro_top1": 0.7, "intervals": {"macro_top1": [0.6, 0.85]}}
    (searches / "b" / "summary" / "test_metrics.json").write_text(json.dumps(test))
    table = compared(searches, capfd)
    assert table["confirmed mean"] == ["50.00 ± 1.00 % (trial 0)", "60.00 ± 1.00 % (trial 0)"]
    assert table["test macro top-1"] == ["-", "70.00% [60.0 to 85.0] (trial 0)"]
    assert table["rank by confirmed mean"] == ["2", "1"]
    (searches / "a" / "summary" / "confirmation.json").unlink()
    assert "rank by best value" in compared(searches, capfd)


def test_equals_share_a_rank_and_nothing_has_none(searches: Path) -> None:
    a, b = read_search(searches / "a"), read_search(searches / "b")
    make_search(searches / "none", 0, 6)
    assert ranks([a, a, b])[1] in (["1", "1", "3"], ["2", "2", "1"])
    assert ranks([a, read_search(searches / "none")])[1] == ["1", "-"]


@pytest.mark.parametrize("difference", ["lines", "metric"])
def test_what_cannot_be_compared_is_not_ranked(
    difference: str, searches: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = open_study(searches / "b")
    settings = study.user_attrs["settings"]
    if difference == "lines":
        settings["data"]["fingerprint"] = "5678"
    else:
        settings["metric"] = "micro top-1"
    study.set_user_attr("settings", settings)
    assert main(["--compare", str(searches / "a"), str(searches / "b")]) == 0
    printed = capfd.readouterr().out
    assert "rank by" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"not ranked: {searches / 'b'} has ")
    assert ("fingerprint 5678, not 1234" in last) == (difference == "lines")
    assert ("another metric" in last) == (difference == "metric")


def test_line_height_makes_no_other_lines(
    lines_root: Path, cache_dir: Path, searches: Path
) -> None:
    """The same images at two heights: other fingerprints of the search, the same of the lines."""
    lines = find_lines(lines_root)
    sets = [load_lines(lines_root, lines, height, cache_dir) for height in (16, 24)]
    fewer = load_lines(lines_root, lines[:-1], 16, cache_dir)
    for name, data in zip("ab", sets, strict=True):
        study = open_study(searches / name)
        settings = study.user_attrs["settings"]
        settings["data"]["fingerprint"] = data.fingerprint
        study.set_user_attr("settings", settings)
        report = searches / name / "summary" / "data_report.json"
        report.write_text(json.dumps(data.report))
    a, b = read_search(searches / "a"), read_search(searches / "b")
    assert a.data["fingerprint"] != b.data["fingerprint"]
    assert why_not_ranked([a, b]) == []
    (searches / "b" / "summary" / "data_report.json").write_text(json.dumps(fewer.report))
    assert len(why_not_ranked([a, read_search(searches / "b")])) == 1
    unknown = replace(a, settings={}, lines=None)
    assert len(why_not_ranked([unknown, unknown])) == 1, "they may be other ones"


def test_wide_table_is_broken_into_blocks(
    searches: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["--compare", *(str(searches / name) for name in "aba")]) == 0
    blocks = capfd.readouterr().out.split("\n\n")
    assert len(blocks) == 3
    assert all("best value" in block and "rank by" in block for block in blocks)


@pytest.mark.parametrize("names", [("a",), ("a", "nowhere"), ("a", "damaged")])
def test_mistakes(
    names: tuple[str, ...], searches: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (searches / "damaged").mkdir()
    (searches / "damaged" / "optuna_study.db").write_text("not a database at all, but text")
    assert main(["--compare", *(str(searches / name) for name in names)]) == 2
    printed, problems = capfd.readouterr()
    assert printed == ""
    assert problems.startswith("error: --compare: ")
    assert problems.count("\n") == 1


@pytest.mark.slow
def test_needs_no_torch(searches: Path) -> None:
    code = (
        "import sys, hyperparameter_search as h;"
        f"code = h.main(['--compare', {str(searches / 'a')!r}, {str(searches / 'b')!r}]);"
        "assert not {'torch', 'torchvision'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "best value" in run.stdout
