"""The report in a real browser: Debian's Chromium and its driver, by Selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import make_search

from data import LineSet
from writer_search.lines.predictions import write_predictions
from writer_search.results.page.lines import LinePictures
from writer_search.results.page.snapshot import (
    FINISHED,
    RUNNING,
    Snapshot,
    Standing,
    TrialFiles,
)
from writer_search.results.report import report_html
from writer_search.results.rows import DATABASE, best_row, read_database, trial_dir

WIDE, PHONE = 1400, 390
ARABIC = ["أحمد بن محمد", "فاطمة", "\udcff\udce9", "anna", "<b>bold</b>"]


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    """One browser for all tests in here."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("Chromium and its driver are not installed here (apt install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


Open = Callable[..., Path]


@pytest.fixture
def open_page(chrome: Any, tmp_path: Path) -> Open:
    """Give what writes a search's page and opens it, at a width, in the light or in the dark."""

    def opened(
        directory: Path,
        data: LineSet | None = None,
        state: str = FINISHED,
        width: int = WIDE,
        dark: bool = False,
    ) -> Path:
        reading = read_database(directory / DATABASE)
        shown = Snapshot(TrialFiles(directory), reading.rows, reading.recorded, Standing(state))
        page = tmp_path / "report.html"
        page.write_text(report_html(shown, LinePictures(data)), "utf-8")
        look(chrome, width, dark)
        chrome.get(page.as_uri())
        return page

    return opened


def look(chrome: Any, width: int, dark: bool) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve trials; names of all kinds."""
    directory = tmp_path_factory.mktemp("browser") / "c"
    make_search(directory, 12, ARABIC, predictions=True)
    return directory


def sideways(chrome: Any) -> int:
    """Give by how much the page is wider than the screen."""
    script = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    return int(chrome.execute_script(script))


def column(chrome: Any, table: str, number: int) -> list[str]:
    script = (
        f'return [...document.querySelector("table[data-keep={table}]").tBodies[0].rows]'
        f".map((row) => row.cells[{number}].textContent)"
    )
    return list(chrome.execute_script(script))


def click(chrome: Any, selector: str) -> None:
    chrome.execute_script(f"document.querySelector({selector!r}).click()")


def click_head(chrome: Any, table: str, number: int) -> None:
    click(chrome, f"table[data-keep={table}] th:nth-child({number + 1}) button")


def shown_lines(chrome: Any) -> list[str]:
    script = 'return [...document.querySelectorAll("#lines li:not([hidden]) p")]'
    return list(chrome.execute_script(f"{script}.map((line) => line.textContent)"))[::2]


def test_tables_sort_by_a_click_and_back_by_another(
    chrome: Any, open_page: Open, search: Path
) -> None:
    open_page(search)
    rows = {row.number: row.value for row in read_database(search / DATABASE).rows}
    numbers = [int(number) for number in column(chrome, "trials", 0)]
    assert numbers == sorted(rows)
    complete = sorted((n for n in rows if rows[n] is not None), key=lambda n: rows[n] or 0.0)
    for order in (complete, complete[::-1]):
        click_head(chrome, "trials", 2)
        seen = [int(number) for number in column(chrome, "trials", 0)]
        assert seen[: len(order)] == order
        assert set(seen) == set(rows), "trials without a value stay last"
    click_head(chrome, "writers", 0)
    names = column(chrome, "writers", 0)
    assert set(names) == {"أحمد بن محمد", "فاطمة", r"\udcff\udce9", "anna", "<b>bold</b>"}
    assert chrome.execute_script("return document.querySelectorAll('b').length") == 0


def test_names_run_the_way_of_their_letters(chrome: Any, open_page: Open, search: Path) -> None:
    open_page(search)
    directions = dict(
        chrome.execute_script(
            'return [...document.querySelectorAll("table[data-keep=writers] td:first-child bdi")]'
            ".map((name) => [name.textContent, getComputedStyle(name).direction])"
        )
    )
    assert directions["فاطمة"] == "rtl"
    assert directions["anna"] == "ltr"


def test_one_click_shows_a_writer_s_lines_alone(chrome: Any, open_page: Open, search: Path) -> None:
    open_page(search)
    every = shown_lines(chrome)
    for name in ("فاطمة", r"\udcff\udce9"):
        chrome.execute_script(
            'for (const pick of document.querySelectorAll("table[data-keep=writers] .pick"))'
            " if (pick.textContent === arguments[0]) pick.click()",
            name,
        )
        here = shown_lines(chrome)
        assert 0 < len(here) < len(every)
        assert all(name in line for line in here)
    assert "Only" in chrome.execute_script("return document.querySelector('.filter').innerText")
    click(chrome, ".filter button")
    assert shown_lines(chrome) == every


@pytest.mark.slow
def test_refreshing_keeps_place_order_filter_and_what_is_unfolded(
    chrome: Any, open_page: Open, search: Path
) -> None:
    page = open_page(search, state=RUNNING)
    text = page.read_text()
    assert 'data-every="10"' in text
    page.write_text(text.replace('data-every="10"', 'data-every="3"'))
    chrome.get(page.as_uri())
    click_head(chrome, "trials", 2)
    click(chrome, "#lines .pick")
    click(chrome, "[data-keep=data] summary")
    chrome.execute_script("scrollTo(0, 1234); window.old = true")
    order, lines = column(chrome, "trials", 0), shown_lines(chrome)
    page.write_text(page.read_text().replace("The search runs.", "Newer."))
    deadline = time.monotonic() + 20
    while chrome.execute_script("return window.old || document.readyState !== 'complete'"):
        assert time.monotonic() < deadline, "it was not loaded anew"
        time.sleep(0.1)
    assert "Newer." in chrome.execute_script("return document.body.innerText")
    assert abs(chrome.execute_script("return scrollY") - 1234) <= 1
    assert column(chrome, "trials", 0) == order
    assert shown_lines(chrome) == lines
    assert chrome.execute_script("return document.querySelector('[data-keep=data]').open")
    finished = open_page(search)  # in the place of the other
    assert finished == page
    chrome.execute_script("window.old = true")
    time.sleep(3.5)
    assert chrome.execute_script("return window.old"), "a finished search's page stays"


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory, data: LineSet) -> tuple[Path, LineSet]:
    """A search of a hundred writers, and their lines."""
    directory = tmp_path_factory.mktemp("browser") / "hundred"
    writers = [f"كاتب {number:03d} of the scriptorium" for number in range(100)]
    make_search(directory, 6, writers, predictions=True)
    many = replace(data, writers=tuple(writers), labels=np.arange(len(data.labels)) % 100)
    best = best_row(read_database(directory / DATABASE).rows)
    assert best is not None
    lines = data.select("val")
    found = [(float((many.labels[line] + 1) % 100), 0.5, 0.1, 0.0) for line in lines]
    write_predictions(
        trial_dir(directory, best.number),
        [data.paths[line] for line in lines],
        many.labels[lines],
        writers,
        found,
    )
    return directory, many


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_page_fits_and_pictures_are_there(
    width: int, dark: bool, chrome: Any, open_page: Open, hundred: tuple[Path, LineSet]
) -> None:
    open_page(hundred[0], hundred[1], width=width, dark=dark)
    assert sideways(chrome) == 0, "nothing but tables and charts scrolls sideways"
    pictures = chrome.execute_script(
        "return [...document.images].filter((i) => i.naturalWidth === 0 && i.checkVisibility())"
    )
    assert pictures == []
    assert chrome.execute_script("return document.images.length") > 10
    paper = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, paper[4:-1].split(","))) < 60) == dark
    clipped = chrome.execute_script(
        "return [...document.querySelectorAll('svg')].flatMap((svg) => {"
        " const box = svg.getBoundingClientRect();"
        " return [...svg.querySelectorAll('text')].filter((text) => {"
        "  const own = text.getBoundingClientRect();"
        "  return own.left < box.left - 1 || own.right > box.right + 1; })"
        " .map((text) => text.textContent); })"
    )
    assert clipped == [], "no label of a chart is cut off"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_hinders_who_sees_little_or_nothing(
    dark: bool, chrome: Any, open_page: Open, search: Path, data: LineSet
) -> None:
    """Contrast, alternative texts, names of what can be clicked: axe-core finds nothing."""
    found = find_spec("axe_selenium_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not installed here (pip install axe-selenium-python)")
    open_page(search, data, width=PHONE, dark=dark)
    chrome.execute_script("for (const fold of document.querySelectorAll('details')) fold.open = 1")
    axe = Path(found.origin).parent / "node_modules" / "axe-core" / "axe.min.js"
    chrome.execute_script(axe.read_text())
    chrome.set_script_timeout(60)
    result = chrome.execute_async_script("axe.run(document, {}).then(arguments[0])")
    broken = [(one["id"], one["nodes"][0]["html"][:200]) for one in result["violations"]]
    assert broken == []
    assert "color-contrast" in {one["id"] for one in result["passes"]}


@pytest.mark.slow
def test_page_of_300_trials_opens_within_two_seconds(
    chrome: Any, search: Path, tmp_path: Path
) -> None:
    twelve = read_database(search / DATABASE)
    rows = [replace(twelve.rows[n % 12], number=n) for n in range(300)]
    for row in rows:
        trial_dir(tmp_path, row.number).symlink_to(trial_dir(search, row.number % 12))
    shown = Snapshot(TrialFiles(tmp_path), rows, twelve.recorded, Standing(FINISHED))
    page = tmp_path / "report.html"
    page.write_text(report_html(shown, LinePictures(None)), "utf-8")
    look(chrome, WIDE, dark=False)
    chrome.get(page.as_uri())
    milliseconds, deadline = 0, time.monotonic() + 20
    while not milliseconds and time.monotonic() < deadline:  # the event itself may not have ended
        milliseconds = chrome.execute_script(
            "const [entry] = performance.getEntriesByType('navigation'); return entry.loadEventEnd"
        )
    assert len(column(chrome, "trials", 0)) == 300
    assert 0 < milliseconds < 2000
