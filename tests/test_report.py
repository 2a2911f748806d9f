"""summary/report.html: the result first, all trials, nothing of the search's texts as markup."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import random
import re
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from PIL import Image
from searches import make_search

from data import LineSet
from writer_search.common.errors import UserError
from writer_search.common.files import read_json, write_json
from writer_search.common.text import percent
from writer_search.lines.predictions import Prediction, write_predictions
from writer_search.results.confusion import confusion_of
from writer_search.results.page.lines import LinePictures, seen_lines
from writer_search.results.page.snapshot import (
    CONFIRMING,
    FINISHED,
    RUNNING,
    STOPPED,
    Snapshot,
    Standing,
    TrialFiles,
    TrialProgress,
)
from writer_search.results.page.standing import best_trial, shares_of, standard_error
from writer_search.results.page.trials import charts_of, ranges
from writer_search.results.report import SIGN_OF_LIFE, SOON, ReportPage, report_html
from writer_search.results.rows import DATABASE, Row, best_row, read_database, trial_dir
from writer_search.study.store import open_study

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&b", "فارسی", "\udcff"]
VOID = {"meta", "img", "br"}
ENDED = Standing(FINISHED)


class Page(HTMLParser):
    """A page taken apart: its tags, the text of each, and that all are closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


def page_of(directory: Path, standing: Standing = ENDED, data: LineSet | None = None) -> str:
    reading = read_database(directory / DATABASE)
    shown = Snapshot(TrialFiles(directory), reading.rows, reading.recorded, standing)
    return report_html(shown, LinePictures(data))


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine trials of hostile names, and one that failed with a hostile text."""
    directory = tmp_path_factory.mktemp("search") / "<b>c"
    study = make_search(directory, 9, HOSTILE, predictions=True)
    trial = study.ask()
    trial.set_user_attr("failure", "<img src=//evil.example/x> in\nepoch 3")
    study.tell(trial, state=TrialState.FAIL)
    return directory


def test_result_comes_first_and_every_trial_follows(search: Path) -> None:
    text = page_of(search)
    assert "Cannot be shown" not in text
    page = Page(text)
    rows = read_database(search / DATABASE).rows
    best = best_row(rows)
    assert best is not None
    assert page.tags[0] == ("html", {"lang": "en"})
    assert percent(best.value) in text[text.index("<h1>") : text.index("</h1>")]
    order = ["<h1>", "Lines it gets wrong", "Writers</h2>", "Pages</h2>", "The search</h2>"]
    places = [text.index(title) for title in [*order, "Settings</h2>"]]
    assert places == sorted(places)
    table = text[text.index('data-keep="trials"') : text.index("Failures and interruptions")]
    cells = re.findall(r'<tr(?: class="best")?><td class="number" data-key="(\d+)">', table)
    assert list(map(int, cells)) == [row.number for row in rows]
    assert table.count('<tr class="best">') == 1
    for row in rows:
        for value in row.params.values():
            assert f'data-key="{value}"' in table or f">{value}<" in table
    assert "loss is nan" in text
    assert 'href="../trial_003/error.log"' in text
    assert 'href="../trial_000/config.json"' in text
    assert "a lower learning rate" in text, "what the error.log says to try"
    assert "Fixed, the same in all trials: line_height 64." in text
    assert "64 (fixed)" in text
    assert "hyperparameter_search.py --data_root &#x27;my lines&#x27; --n_trials 12" in text


def test_page_needs_no_network_and_no_script(search: Path) -> None:
    page = Page(page_of(search))
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "form", "base")
        if tag == "a":
            assert str(attributes["href"]).startswith("../trial_"), "beside the page, or nowhere"
        assert not any(name.startswith("on") for name in attributes), attributes
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/png;base64,")
            assert attributes["alt"]
        else:
            assert "src" not in attributes
    assert "default-src 'none'" in str([attributes for _, attributes in page.tags][:4])


def test_hostile_texts_are_shown_as_they_are(search: Path) -> None:
    page = Page(page_of(search))
    cells = page.texts["td"]
    names = set(page.texts["bdi"])
    assert {"<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&b"} <= names
    assert "\\udcff" in names
    assert any("<img src=//evil.example/x> in epoch 3" in cell for cell in cells)


def test_hardest_writers_and_pages_come_first_and_names_are_whole(tmp_path: Path) -> None:
    names = ["a" * 120, "b", "c"]
    make_search(tmp_path, 1, names, predictions=True)
    path = trial_dir(tmp_path, 0) / "metrics.json"
    metrics = read_json(path)
    counts = [[9, 1, 0], [0, 4, 6], [0, 0, 10]]
    metrics["best"]["confusion"] = {"writers": names, "counts": counts}
    metrics["best"] |= {"per_writer": {names[0]: 0.9, "b": 0.4, "c": 1.0}, "page_macro_top1": 0.917}
    write_json(path, metrics)
    text = page_of(tmp_path)
    writers = text[text.index('data-keep="writers"') : text.index("Confusion</h3>")]
    firsts = [writers.index(f'<td data-key="{name}">') for name in ("b", names[0], "c")]
    assert firsts == sorted(firsts), "the hardest first"
    assert "6 of 10" in writers
    assert "91.70%" in text[text.index("Pages</h2>") :]


def test_confusion_is_a_matrix_below_thirty_writers_and_pairs_from_there(tmp_path: Path) -> None:
    for writers, kind in ((29, 'class="confusion"'), (30, 'data-keep="pairs"')):
        directory = tmp_path / str(writers)
        make_search(directory, 1, writers)
        assert [kind in page_of(directory)] == [True]
        assert ('class="confusion"' in page_of(directory)) == (writers == 29)


def test_wrong_lines_come_surest_first_with_their_pictures(data: LineSet, tmp_path: Path) -> None:
    make_search(tmp_path, 1, list(data.writers))
    lines = data.select("val")[:4]
    guesses = [(data.labels[line] + 1) % 4 for line in lines[:3]] + [data.labels[lines[3]]]
    shares = [0.5, 0.9, 0.7, 0.41]
    found = [(float(g), p, 0.1, 0.0) for g, p in zip(guesses, shares, strict=True)]
    paths = [data.paths[line] for line in lines]
    write_predictions(trial_dir(tmp_path, 0), paths, data.labels[lines], data.writers, found)
    text = page_of(tmp_path, data=data)
    assert "3 of 4 validation lines wrong" in text
    places = [text.index(f"<strong>{100 * p:.1f}&nbsp;%") for p in sorted(shares)[::-1]]
    assert places == sorted(places), "the line that is right is last"
    pictures = re.findall('<img class="strip" alt="Line ([^ ]*) by', text)
    assert pictures == [paths[1], paths[2], paths[0], paths[3]]
    assert text.count('alt="Training line') == 3 * len(data.writers)
    assert all(f"Training line {path}" not in text for path in paths)


def test_pictures_are_those_of_the_strip(data: LineSet) -> None:
    line = int(data.select("val")[0])
    found = re.search('base64,([^"]*)', LinePictures(data).of(line, 1000, ""))
    assert found
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        shown = np.asarray(image.convert("L"))
    ink = data.strip[data.starts[line] :][: data.widths[line]].T
    assert np.abs(shown.astype(int) - (255 - ink.astype(int))).max() <= 17, "16 greys"


def test_without_the_strip_lines_are_named_without_pictures(
    data: LineSet, tmp_path: Path, search: Path
) -> None:
    gone = replace(data, strip_file=tmp_path / "gone")
    assert LinePictures(gone).of(0, 100, "") == ""
    assert 'class="strip"' not in page_of(search, data=gone)


def test_interrupted_is_a_state_of_its_own(tmp_path: Path) -> None:
    study = make_search(tmp_path, 3, states=False)
    trial = study.ask()
    trial.set_user_attr("failure", "interrupted by SIGTERM")
    trial.set_user_attr("interrupted", True)
    study.tell(trial, state=TrialState.FAIL)
    text = page_of(tmp_path, Standing(STOPPED))
    assert "4 trials: 3 complete of 3 wanted, 1 interrupted." in text
    assert "<td>interrupted</td>" in text
    assert "failed" not in text[: text.index("<h1>")]


def test_a_running_search_says_what_runs_and_how_long(search: Path) -> None:
    text = page_of(search, Standing(RUNNING, (60.0, 120.0), [TrialProgress(10, 3, 20, 0.5)]))
    assert "Time left: 1 min 0 s to 2 min 0 s." in text
    assert "Trial 10 runs: epoch 3 of 20, best so far 50.00%." in text
    assert "data-written=" in text
    confirming = Standing(CONFIRMING, None, [TrialProgress(2, 1, 20, None)], runs_left=4)
    text = page_of(search, confirming)
    assert "trained again with new seeds. 4 runs to go. Time left: not known yet." in text
    assert "Run 2 of the confirmation: epoch 1 of 20." in text
    assert "data-written=" in text
    assert 'data-every="60"' in page_of(search, Standing(STOPPED)), "it may be started again"
    assert "data-written=" not in page_of(search, Standing(FINISHED)), "it is not loaded again"


def test_page_is_written_within_a_second_of_an_end_and_not_too_often(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "c"
    shutil.copytree(search, directory)
    reading, now = read_database(directory / DATABASE), [1000.0]
    written = directory / "summary" / "report.html"
    study = open_study(directory)
    page = ReportPage(directory)
    monkeypatch.setattr("writer_search.results.report.monotonic", lambda: now[0])

    def write_if_due() -> bool:
        written.unlink(missing_ok=True)
        page.write_if_due(reading.rows, study, lambda: Standing(RUNNING))
        return written.exists()

    assert write_if_due(), "at once"
    assert page.seconds_to_next() == SIGN_OF_LIFE
    now[0] += SOON / 2
    page.trial_has_ended()
    assert page.seconds_to_next() == SOON / 2
    assert not write_if_due()
    now[0] += SOON / 2
    assert write_if_due()
    now[0] += SIGN_OF_LIFE - 0.1
    assert not write_if_due()
    now[0] += 0.1
    assert write_if_due()


def test_charts_are_files_when_the_search_has_ended(search: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(search, directory)
    rows, study = read_database(directory / DATABASE).rows, open_study(directory)
    page = ReportPage(directory)
    for standing in (Standing(RUNNING), Standing(FINISHED)):
        assert not list((directory / "summary").glob("*.svg"))
        page.write(rows, study, lambda of=standing: of)
    assert (directory / "summary" / "report.html").read_text().rstrip().endswith("</html>")
    names = {path.name for path in (directory / "summary").glob("*.svg")}
    assert names == {"history.svg", "learning_curves.svg", "hyperparameters.svg"}
    assert not list((directory / "summary").glob(".*"))
    curves = directory / "trial_000" / "curves.svg"
    drawn = curves.stat().st_mtime_ns
    ReportPage(directory).write(rows, study, lambda: Standing(FINISHED))
    assert curves.stat().st_mtime_ns == drawn, "drawn once"


def test_a_page_that_cannot_be_written_is_one_warning(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, study = read_database(search / DATABASE).rows, open_study(search)
    (tmp_path / "summary").write_text("no directory")
    page = ReportPage(tmp_path)
    for _ in range(2):
        page.write(rows, study, lambda: Standing(RUNNING))
    assert capsys.readouterr().err.count("warning: writing the report: ") == 1


class LostStudy:
    """A study whose storage answers with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def user_attrs(self) -> dict[str, Any]:
        raise self._error


def test_a_database_that_cannot_be_read_costs_a_page(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop that writes the page goes on, whatever becomes of it."""

    rows, page = read_database(search / DATABASE).rows, ReportPage(tmp_path)
    lost: Any = LostStudy(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    page.write(rows, lost, lambda: Standing(RUNNING))
    page.write(rows, open_study(search), lambda: lost.user_attrs)
    assert capsys.readouterr().err.count("warning: writing the report: ") == 1


def test_a_storage_that_was_waited_for_in_vain_ends_the_search(tmp_path: Path) -> None:
    lost: Any = LostStudy(UserError("the storage cannot be reached"))
    with pytest.raises(UserError):
        ReportPage(tmp_path).write([], lost, lambda: Standing(RUNNING))


def test_a_damaged_file_costs_its_part_of_the_page(search: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(search, directory)
    rows = read_database(directory / DATABASE).rows
    for path in directory.glob("trial_*/metrics.json"):
        metrics = read_json(path)
        metrics["best"]["per_writer"] = dict.fromkeys(metrics["best"]["per_writer"])
        write_json(path, metrics)
    for curves in directory.glob("trial_*/curves.svg"):
        curves.unlink()
        curves.mkdir()  # they cannot be drawn
    ReportPage(directory).write(rows, open_study(directory), lambda: Standing(FINISHED))
    page = (directory / "summary" / "report.html").read_text()
    assert page.count("Cannot be shown: TypeError") == 1
    assert "<h2>The search</h2>" in page


def test_pictures_of_a_cache_that_is_gone_are_left_out(data: LineSet, tmp_path: Path) -> None:
    """Reading them from the map would end the search process: SIGBUS."""
    assert np.array_equal(data.ink(1, 10), data.strip[data.starts[1] : data.starts[1] + 10])
    cut = tmp_path / "strip.u8"
    cut.write_bytes(data.strip_file.read_bytes()[: data.line_height])
    for file in (cut, tmp_path / "none"):
        pictures = LinePictures(replace(data, strip_file=file))
        assert "<img" not in seen_lines(pictures)
    assert "<img" in seen_lines(LinePictures(data))


@pytest.mark.parametrize("lost", ["nothing yet", "files"])
def test_report_of_little(lost: str, tmp_path: Path) -> None:
    if lost == "files":  # directories that somebody has emptied
        make_search(tmp_path, 2)
        for path in [*tmp_path.glob("trial_*/*"), *tmp_path.glob("summary/*")]:
            path.write_text("[]") if path.name != "config.json" else path.unlink()
    else:
        open_study(tmp_path)
    page = Page(page_of(tmp_path))
    heading = page.texts["h1"][0]
    assert heading.startswith("No trial is complete yet" if lost == "nothing yet" else "Best: ")


def test_trials_of_different_origin_are_told_apart(search: Path, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    shutil.copytree(search, directory)
    for number in (7, 8):
        path = trial_dir(directory, number) / "config.json"
        write_json(path, read_json(path) | {"git_commit": "f" * 16, "git_dirty": True})
    cells = Page(page_of(directory)).texts["td"]
    assert "0123456789abcdef (trials 0-6)" in cells
    assert f"{'f' * 16} (trials 7-8)" in cells
    assert "True (trials 7-8)" in cells
    assert "fedcba9876543210" in cells, "the fingerprint of the data, the same for all"


# ----------------------------------------------------------------------------------- how sure it is


def confusion(rows: list[list[int]]) -> dict[str, Any]:
    return {"confusion": {"writers": [str(i) for i in range(len(rows))], "counts": rows}}


def shown_with(metrics: dict[str, Any], lines: Sequence[Prediction] = ()) -> Snapshot:
    files = TrialFiles(Path("c"))
    files._of_best = Path("c/trial_000"), metrics, list(lines)
    row = Row(0, "COMPLETE", 0.5, {}, None, None)
    return Snapshot(files, [row], {}, Standing(FINISHED))


def test_standard_error_is_that_of_a_mean_of_shares() -> None:
    """Compared with the deviation of many draws; a writer without lines counts for nothing."""
    lines, shares = [10, 20, 40, 0], [0.5, 0.9, 0.8, 0.0]
    right = [round(n * share) for n, share in zip(lines, shares, strict=True)]
    rows = [[0] * 4 for _ in lines]
    for writer, (n, k) in enumerate(zip(lines, right, strict=True)):
        rows[writer][writer], rows[writer][(writer + 1) % 4] = k, n - k
    found, has_pages = shares_of(shown_with(confusion(rows)))
    generator = random.Random(0)
    values = []
    for _ in range(4000):
        means = [
            sum(generator.random() < share for _ in range(n)) / n
            for n, share in zip(lines[:3], shares[:3], strict=True)
        ]
        values.append(sum(means) / 3)
    assert found == [[(n, k)] for n, k in zip(lines[:3], right[:3], strict=True)]
    assert not has_pages
    assert standard_error(found) == pytest.approx(statistics.pstdev(values), rel=0.05)


def test_standard_error_is_by_pages_where_they_are_known() -> None:
    """Each page all right or all wrong, five a writer: as uncertain as five draws, not as 50."""
    pages = [(10, 10 * (page > 1)) for page in range(5)]
    lines = [
        Prediction(f"val/{w}/{p}/{i}.png", w, str(p), w if i < right else "z", 0.5, 0.5, w)
        for w in ("a", "b")
        for p, (number, right) in enumerate(pages)
        for i in range(number)
    ]
    found, has_pages = shares_of(shown_with({}, lines))
    assert (found, has_pages) == ([pages, pages], True)
    assert standard_error(found) == pytest.approx(math.sqrt(0.6 * 0.4 / 4 / 2))
    generator = random.Random(0)
    means = [  # of the mean of two writers with five pages of which 0.6 are right
        statistics.fmean(generator.random() < 0.6 for _ in range(10)) for _ in range(4000)
    ]
    assert standard_error(found) == pytest.approx(statistics.pstdev(means), rel=0.15)
    alike = [[(10, 5), (20, 10)]]
    assert standard_error(alike) == pytest.approx(math.sqrt(0.25 / 30)), "alike by chance"
    without = [replace(line, page="") for line in lines]
    assert shares_of(shown_with(confusion([[3, 1], [0, 2]]), without)) == (
        [[(4, 3)], [(2, 2)]],
        False,
    )


def test_writers_with_a_single_page_are_told() -> None:
    lines = [
        Prediction(f"val/{w}/{p}/{i}.png", w, p, "a", 0.5, 0.5, "a")
        for w, p in (("a", "1"), ("a", "2"), ("b", "1"))
        for i in range(2)
    ] + [Prediction("val/b/1/x.png", "b", "1", "b", 0.5, 0.5, "b")]
    shown = shown_with({}, lines)
    assert "points or more (1 writer has a single page" in best_trial(shown)
    without = [replace(line, page="") for line in lines]
    assert "or more" not in best_trial(shown_with(confusion([[4, 0], [2, 1]]), without))


def test_confusion_is_read_as_pairs_and_as_an_earlier_version_s_table() -> None:
    table = confusion([[3, 0, 1], [0, 2, 0], [0, 0, 0]])
    pairs = {"confusion": {"writers": ["0", "1", "2"], "pairs": [[0, 0, 3], [0, 2, 1], [1, 1, 2]]}}
    assert confusion_of(table) == confusion_of(pairs)
    found = shares_of(shown_with(table))[0]
    assert found == shares_of(shown_with(pairs))[0] == [[(4, 3)], [(2, 2)]]
    assert standard_error(found) == pytest.approx(0.10825, abs=1e-5)


@pytest.mark.parametrize(
    "recorded",
    [
        *({}, [], None, 3, {"writers": ["a"]}, {"writers": ["a"], "counts": [[1, 2]]}),
        *({"writers": ["a"], "pairs": [[0, 1, 1]]}, {"writers": ["a"], "pairs": [[0, 0]]}),
        *({"writers": ["a"], "pairs": [[0, 0, -1]]}, {"writers": 3, "pairs": []}),
    ],
)
def test_confusion_that_makes_no_sense_is_none(recorded: Any) -> None:
    with pytest.raises(ValueError, match="no confusion of writers"):
        confusion_of({"confusion": recorded})


@pytest.mark.parametrize("metrics", [{}, {"confusion": 3}, {"confusion": {"counts": [[0]]}}])
def test_no_confusion_no_standard_error(metrics: dict[str, Any]) -> None:
    assert shares_of(shown_with(metrics)) == ([], False)
    assert standard_error([]) == 0.0


def test_all_right_is_not_certain(tmp_path: Path) -> None:
    make_search(tmp_path, 1)
    path = trial_dir(tmp_path, 0) / "metrics.json"
    metrics = read_json(path)
    metrics["best"] |= confusion([[15, 0], [0, 15]])
    write_json(path, metrics)
    text = page_of(tmp_path)
    assert "30 validation lines, all recognised" in text
    assert "up to 10.0 points" in text  # 3 / 30
    assert "did as well" not in text
    snapshot = Snapshot(TrialFiles(tmp_path), read_database(tmp_path / DATABASE).rows, {}, ENDED)
    twice = replace(snapshot, rows=[*snapshot.rows, replace(snapshot.rows[0], number=1)])
    assert "1 other trial did as well; the earliest is named best" in best_trial(twice)
    metrics["best"] |= confusion([[15, 0], [15, 0]])
    write_json(path, metrics)
    text = page_of(tmp_path)
    assert "Its standard error is not known" in text
    assert "all recognised" not in text


def test_pruned_trial_stands_where_it_was_pruned(tmp_path: Path) -> None:
    """It may have trained an epoch more before it heard of it."""
    (tmp_path / "trial_000").mkdir()
    rows = [{"epoch": e, "macro_top1": e / 10, "seconds": 1.0} for e in (1, 2, 3)]
    (tmp_path / "trial_000" / "history.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    (tmp_path / "trial_001").mkdir()
    ended = datetime.now(UTC)
    trials = [
        Row(0, "PRUNED", 0.2, {}, ended, ended, {"epochs": 2}),
        *(Row(n, "COMPLETE", 0.5, {}, ended, ended, {"epochs": 3}) for n in (1, 2)),
    ]
    charts = charts_of(Snapshot(TrialFiles(tmp_path), trials, {}, Standing(FINISHED)))
    drawn = "".join(panel for chart in charts for panel in chart.panels)
    assert "trial 0, pruned at 20.00 %" in drawn
    assert "30.00" not in drawn


def test_numbers_are_written_shortly() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
