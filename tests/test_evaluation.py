"""The test split: intervals by hand, measured once, told apart from what was chosen by."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_search import Run, run

from data import LineSet
from train import train
from writer_search.config import TrialConfig
from writer_search.processes import test_measurement as evaluation
from writer_search.results.tested import describe, with_interval
from writer_search.training.batches import Lines, strip_on
from writer_search.training.bootstrap import Pages, count_pages, intervals, resample
from writer_search.training.checkpoints import load_model
from writer_search.training.evaluation import evaluate
from writer_search.training.test_split import _intervals, measure_test_split

__all__ = ["run"]  # the fixture


def counted(*pages: tuple[int, int, int, int]) -> Pages:
    """Build pages from (writer, lines, right lines, whether the page is right)."""
    labels, lines, right, page_right = np.array(pages).T
    return Pages(labels, lines, right, None, page_right)


def test_resamples_by_hand() -> None:
    """Writer 0 has a page with 1 of 1 line right and one with 0 of 3; writer 1 a page, 1 of 2.

    One of writer 0's two pages is drawn, and counts twice.
    """
    pages = counted((0, 1, 1, 1), (0, 3, 0, 0), (1, 2, 1, 1))
    found = resample(pages, 20_000)
    assert set(found) == {"macro_top1", "micro_top1", "page_macro_top1"}
    expected = {  # metric → value of each of the two draws
        "macro_top1": [(1 + 1 / 2) / 2, (0 + 1 / 2) / 2],
        "micro_top1": [(2 * 1 + 1) / (2 * 1 + 2), (2 * 0 + 1) / (2 * 3 + 2)],
        "page_macro_top1": [(1 + 1) / 2, (0 + 1) / 2],
    }
    for name, values in expected.items():
        shares = [np.isclose(found[name], value).mean() for value in values]
        # Four standard errors of a share of 20,000.
        assert shares == pytest.approx([1 / 2, 1 / 2], abs=4 * 0.5 / 20_000**0.5), name


@pytest.mark.parametrize("number", [2, 3, 6])
def test_resamples_vary_as_the_mean_of_few_pages_does(number: int) -> None:
    """By s² / n, with s² over n - 1: as many draws as pages would give (n - 1) / n of it."""
    right = np.arange(number) * 3 % 7
    pages = counted(*[(0, 10, hits, 1) for hits in right])
    found = resample(pages, 20_000)
    expected = (right / 10).var(ddof=1) / number
    for name in ("macro_top1", "micro_top1"):
        assert found[name].mean() == pytest.approx(right.mean() / 10, rel=0.02)
        assert found[name].var() == pytest.approx(expected, rel=0.05), name


def test_interval_is_the_middle_95_percent_and_repeats() -> None:
    """With the two draws above each end is one of them."""
    pages = counted((0, 1, 1, 1), (0, 3, 0, 0), (1, 2, 1, 1))
    found = intervals(pages)
    assert found["macro_top1"] == pytest.approx([1 / 4, 3 / 4])
    assert found["micro_top1"] == pytest.approx([1 / 8, 3 / 4])
    assert found["page_macro_top1"] == pytest.approx([1 / 2, 1])
    assert found["macro_top5"] is None
    assert intervals(pages) == found


def test_lines_of_a_page_stand_or_fall_together() -> None:
    """100 lines on 4 pages, of which one is all wrong: as uncertain as 4 draws, not as 100."""
    pages = counted(*[(w, 25, 25 * (p > 0), 1) for w in (0, 1) for p in range(4)])
    low, high = intervals(pages)["macro_top1"] or (0.0, 0.0)
    deviation = (0.75 * 0.25 / 3 / 2) ** 0.5  # of the mean of two writers with 4 pages each
    assert high - low == pytest.approx(2 * 1.96 * deviation, abs=0.17)  # pages come in sixths
    assert high - low > 0.4, "of 100 independent lines each it would be 0.12"


def test_pages_are_counted_and_averaged() -> None:
    """Page 0: two lines err by little and one is right by far. Its mean is right."""
    logits = np.array([[1.0, 1.5], [1.0, 1.5], [6.0, 0.0], [0.0, 1.0]])
    pages = count_pages(logits, np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]))
    assert pages.lines.tolist() == [3, 1]
    assert pages.right.tolist() == [1, 1]
    assert pages.page_right.tolist() == [1, 1]
    assert pages.labels.tolist() == [0, 1]
    six = np.tile(np.arange(6.0), (2, 1))  # the first five guesses are 5, 4, 3, 2, 1
    pages = count_pages(six, np.array([0, 1]), np.array([0, 1]))
    assert pages.top5 is not None
    assert pages.top5.tolist() == [0, 1]
    assert intervals(pages)["macro_top5"] == [0.5, 0.5], "one page a writer cannot vary"


def read(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary" / "test_metrics.json").read_text())
    return found


def test_chosen_model_is_measured_once(
    run: Run,
    data: LineSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "c"
    assert run(n_trials="1") == 0
    assert not (directory / "summary" / "test_metrics.json").exists()
    assert run("--evaluate_test", n_trials="1") == 0
    printed, problems = capfd.readouterr()
    assert problems == ""
    found = read(directory)
    model, config, writers = load_model(directory / "summary" / "best_model.pth")
    lines = Lines.of(data, "test", strip_on(data, torch.device("cpu")))
    expected = evaluate(model, config, lines, writers)
    for name in ("macro_top1", "micro_top1", "macro_top5", "page_macro_top1", "loss"):
        assert found[name] == pytest.approx(getattr(expected, name)), name
    assert {w: of["top1"] for w, of in found["per_writer"].items()} == expected.per_writer
    assert (found["trial"], found["directory"]) == (0, "trial_000")
    assert (found["config_hash"], found["data_fingerprint"]) == (config.hash(), data.fingerprint)
    assert (found["lines"], found["pages"], found["writers_with_one_page"]) == (12, 4, 4)
    assert found["earlier"] == []
    low, high = found["intervals"]["macro_top1"]
    assert low <= found["macro_top1"] <= high
    assert found["interval_unit"] == "lines", "with one page a writer, pages cannot vary"
    assert found["intervals"]["page_macro_top1"] is None
    assert "never used for choosing" in printed
    assert f"macro top-1 {with_interval(expected.macro_top1, [low, high])}, pages" in printed
    assert found["lines_not_counted"] == 0

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "ChildProcess", forbidden)
        assert run("--evaluate_test", n_trials="1") == 0
    assert "macro top-1 " in capfd.readouterr().out
    assert read(directory) == found


def test_pages_that_do_not_differ_give_the_interval_to_lines() -> None:
    """A writer with one page makes all mistakes: by pages there would be none, or no width."""
    labels = np.repeat([0, 1, 2], [4, 4, 8])
    pages = np.repeat([0, 1, 2, 3], 4)
    logits = np.eye(3)[labels]
    logits[0] = [0.0, 1.0, 0.0]
    found = _intervals(count_pages(logits, labels, pages), logits, labels, pages, True)
    low, high = found["intervals"]["macro_top1"]
    assert (found["interval_unit"], low < 11 / 12 < high) == ("lines", True)
    logits[8] = [0.0, 1.0, 0.0]  # one of the two pages of a writer
    found = _intervals(count_pages(logits, labels, pages), logits, labels, pages, True)
    assert found["interval_unit"] == "pages"
    low, high = found["intervals"]["macro_top1"]
    alone = intervals(count_pages(logits, labels, pages))["macro_top1"]
    assert alone is not None
    assert high - low > alone[1] - alone[0], "lines of a single page vary too"
    by_page = intervals(count_pages(logits, labels, pages))["page_macro_top1"]
    assert found["intervals"]["page_macro_top1"] == by_page


def test_pages_that_are_not_known_are_not_measured(
    data: LineSet, config: TrialConfig, tmp_path: Path
) -> None:
    """Lines in the writers' directories themselves: each may be from another page."""
    unpaged = replace(data, pages=np.full_like(data.pages, -1))
    metrics = train(config, unpaged, tmp_path)
    assert metrics is not None
    assert metrics.page_macro_top1 is None
    assert metrics.macro_top1 == train(config, data, tmp_path / "paged").macro_top1  # type: ignore[union-attr]
    found = measure_test_split(tmp_path / "best_model.pth", unpaged, torch.device("cpu"))
    assert found["page_macro_top1"] is found["pages"] is found["writers_with_one_page"] is None
    assert all(of["page_top1"] is None for of in found["per_writer"].values())
    assert found["interval_unit"] == "lines"
    found |= {
        "trial": 0,
        "directory": "trial_000",
        "earlier": [],
        "intervals": dict.fromkeys(found["intervals"], (0.2, 0.4)),
    }
    told = "\n".join(describe(found))
    assert "pages not known" in told
    assert "[95 % intervals by resampling lines]" in told
    assert "pages are not known: lines were resampled" in told
    assert "no writer's test pages differ in accuracy: lines" in "\n".join(
        describe({**found, "pages": 4})
    )
    single = {**found, "pages": 4, "writers_with_one_page": len(found["per_writer"])}
    assert "each writer has one test page: lines were resampled" in "\n".join(describe(single))
    assert "five writers or fewer" not in told.splitlines()[1]
    assert "no test lines" not in told
    some = {**found, "writers_without_test_lines": ["a", "b"]}
    of = len(found["per_writer"]) + 2
    assert f"2 of {of} writers have no test lines, not included in the means" in "\n".join(
        describe(some)
    )
    certain = dict.fromkeys(found["intervals"], (1.0, 1.0))
    told = "\n".join(describe({**found, "intervals": certain}))
    assert "[" not in told, "nor how intervals were made"
    assert "resampled" not in told


def test_another_choice_is_measured_and_the_earlier_one_remembered(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "c"
    assert run("--evaluate_test", n_trials="1") == 0
    first = read(directory)
    # As if the search had gone on and another trial had been better, which it no longer is.
    first["earlier"] = [{name: value for name, value in first.items() if name != "earlier"}]
    first["trial"] = 7
    (directory / "summary" / "test_metrics.json").write_text(json.dumps(first))
    capfd.readouterr()
    assert run("--evaluate_test", n_trials="1") == 0
    again = read(directory)
    assert again["trial"] == 0
    assert [(e["trial"], e["macro_top1"]) for e in again["earlier"]] == [(7, first["macro_top1"])]
    assert "had been looked at 1 time before" in capfd.readouterr().out


def test_failure_to_measure_spares_the_search(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = evaluation.ChildProcess
    monkeypatch.setattr(
        evaluation, "ChildProcess", lambda _, question: real("faults:exit_silently", question)
    )
    assert run("--evaluate_test", n_trials="1") == 0
    assert "could not be evaluated: ended with exit code 7" in capfd.readouterr().out
    assert not (tmp_path / "c" / "summary" / "test_metrics.json").exists()


def test_no_test_lines_is_told_before_the_search(
    run: Run, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lines_root, tmp_path / "lines", ignore=shutil.ignore_patterns("test"))
    assert run("--evaluate_test", data_root=str(tmp_path / "lines")) == 2
    printed, problems = capfd.readouterr()
    assert "=" not in printed, "no banner"
    assert problems.startswith("error: --evaluate_test: there are no test lines")
    assert problems.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_an_interval_without_width_is_not_shown() -> None:
    assert with_interval(0.8014, [0.801, 0.8014]) == "80.14% [80.1 to 80.1]"
    assert with_interval(0.8014, [0.8014, 0.8014]) == "80.14%"
    assert with_interval(0.8014, None) == "80.14%"


def test_test_lines_that_cannot_be_counted_are_told(
    run: Run, lines_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(lines_root, tmp_path / "lines"))
    some_writer = next((root / "test").iterdir())
    shutil.copytree(some_writer, root / "test" / "stranger")
    assert run("--evaluate_test", "--data_root", str(root), n_trials="1") == 0
    printed, problems = capfd.readouterr()
    assert "3 test lines of writers without training lines (first " in problems
    assert "3 test lines of writers without training lines could not be counted" in printed
