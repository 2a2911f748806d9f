"""summary/report.html: the result first, all trials, nothing of the search's texts as markup."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from PIL import Image
from searches import make_search

from writer_search.common.files import read_json, write_json
from writer_search.common.text import percent
from writer_search.results.confusion import confusion_of
from writer_search.results.report import ranges, report_html, standard_error, write_report
from writer_search.results.rows import DATABASE, best_row, read_database, trial_dir
from writer_search.study.store import open_study

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&b", "فارسی", "\udcff"]
VOID = {"meta", "img", "br"}


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


def page_of(directory: Path, notes: tuple[str, ...] = ()) -> str:
    database = directory / DATABASE
    reading = read_database(database)
    return report_html(directory, reading.rows, reading.recorded, notes)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine trials of hostile names, one of them failed with a hostile text, one picture."""
    directory = tmp_path_factory.mktemp("search") / "<b>c"
    study = make_search(directory, 9, HOSTILE)
    Image.new("RGB", (4, 4)).save(directory / "summary" / "history.png")
    trial = study.ask()
    trial.set_user_attr("failure", "<img src=//evil.example/x> in\nepoch 3")
    study.tell(trial, state=TrialState.FAIL)
    return directory


def test_result_comes_first_and_every_trial_follows(search: Path) -> None:
    text = page_of(search, ("slices.png: needs 3 complete trials",))
    page = Page(text)
    rows = read_database(search / DATABASE).rows
    best = best_row(rows)
    assert best is not None
    assert page.tags[0] == ("html", {"lang": "en"})
    assert percent(best.value) in text[text.index("<h1>") : text.index("</h1>")]
    assert text.index("<h1>") < text.index("<h2>")
    table = text[text.index('class="sortable"') : text.index("<h2>Failures")]
    cells = re.findall(r'<tr(?: class="best")?><td class="number" data-key="(\d+)">', table)
    assert list(map(int, cells)) == [row.number for row in rows]
    assert table.count('<tr class="best">') == 1
    for row in rows:
        for value in row.params.values():
            assert f'data-key="{value}"' in table or f">{value}<" in table
    assert "loss is nan" in text
    assert "trial_003/error.log" in text
    assert "slices.png: needs 3 complete trials" in text
    assert "hyperparameter_search.py --data_root &#x27;my lines&#x27; --n_trials 12" in text


def test_page_needs_no_network_and_no_script(search: Path) -> None:
    page = Page(page_of(search))
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "form", "a", "base")
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
    assert {"<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&b"} <= set(cells)
    assert any("<img src=//evil.example/x> in epoch 3" in cell for cell in cells)


def test_report_is_written_whole_and_over_the_last(search: Path) -> None:
    database = search / DATABASE
    for _ in range(2):
        reading = read_database(database)
        write_report(search, reading.rows, reading.recorded)
    assert (search / "summary" / "report.html").read_text().rstrip().endswith("</html>")
    assert not list((search / "summary").glob(".*"))


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


def test_standard_error_is_that_of_a_mean_of_shares() -> None:
    """Compared with the deviation of many draws; a writer without lines counts for nothing."""
    lines, shares = [10, 20, 40, 0], [0.5, 0.9, 0.8, 0.0]
    right = [round(n * share) for n, share in zip(lines, shares, strict=True)]
    rows = [[0] * 4 for _ in lines]
    for writer, (n, k) in enumerate(zip(lines, right, strict=True)):
        rows[writer][writer], rows[writer][(writer + 1) % 4] = k, n - k
    count, error = standard_error(confusion(rows))
    generator = random.Random(0)
    values = []
    for _ in range(4000):
        means = [
            sum(generator.random() < share for _ in range(n)) / n
            for n, share in zip(lines[:3], shares[:3], strict=True)
        ]
        values.append(sum(means) / 3)
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    assert count == 70
    assert error == pytest.approx(deviation, rel=0.05)


def test_confusion_is_read_as_pairs_and_as_an_earlier_version_s_table() -> None:
    table = confusion([[3, 0, 1], [0, 2, 0], [0, 0, 0]])
    pairs = {"confusion": {"writers": ["0", "1", "2"], "pairs": [[0, 0, 3], [0, 2, 1], [1, 1, 2]]}}
    assert confusion_of(table) == confusion_of(pairs)
    assert standard_error(table) == standard_error(pairs) == (6, pytest.approx(0.10825, abs=1e-5))


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
    assert standard_error(metrics) == (0, 0.0)


def test_all_right_is_not_certain(tmp_path: Path) -> None:
    make_search(tmp_path, 1)
    path = trial_dir(tmp_path, 0) / "metrics.json"
    metrics = read_json(path)
    metrics["best"] |= confusion([[15, 0], [0, 15]])
    write_json(path, metrics)
    text = page_of(tmp_path)
    assert "30 validation lines, all recognised" in text
    assert "up to 10.0 points" in text  # 3 / 30


def test_numbers_are_written_shortly() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


# --------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium is installed here")


PROBE = """<!DOCTYPE html><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:2000px"></iframe>
<script>
const frame = document.getElementById("frame");
frame.srcdoc = {page};
frame.onload = () => {{
  const page = frame.contentDocument, table = page.querySelector("table.sortable");
  const numbers = () => [...table.tBodies[0].rows].map((row) => +row.cells[0].textContent);
  const heads = [...table.tHead.rows[0].cells];
  const value = heads.find((head) => head.textContent === "value");
  const result = {{
    sideways: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    images: [...page.images].map((image) => image.naturalWidth),
    before: numbers(),
  }};
  value.click();
  result.up = numbers();
  value.click();
  result.down = numbers();
  result.alerted = window.alerted || frame.contentWindow.alerted || false;
  document.body.textContent = "RESULT" + JSON.stringify(result) + "END";
}};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser(width: int, search: Path, browser: str, tmp_path: Path) -> None:
    """Fits both widths; the table sorts; no text of the search is run."""
    text = page_of(search)
    # The page's own policy holds in the frame too: its script runs, because its hash is in there.
    probe = tmp_path / "probe.html"
    embedded = json.dumps(text).replace("</", "<\\/")
    probe.write_text(PROBE.format(width=width, page=embedded), "utf-8", "backslashreplace")
    result = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"),
            *("--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search("RESULT(.*)END", result.stdout)
    assert found, result.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["sideways"] == 0, "nothing but tables and pictures scrolls sideways"
    assert seen["images"] == [4]
    assert not seen["alerted"]
    rows = {row.number: row.value for row in read_database(search / DATABASE).rows}
    assert seen["before"] == sorted(rows)
    complete = sorted((n for n in rows if rows[n] is not None), key=lambda n: rows[n] or 0.0)
    assert seen["up"][: len(complete)] == complete
    assert seen["down"][: len(complete)] == complete[::-1]
    assert set(seen["down"]) == set(rows), "trials without a value stay last"
