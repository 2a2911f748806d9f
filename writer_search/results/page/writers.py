"""Writers, whom they are taken for, and pages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from writer_search.common.text import percent
from writer_search.results.confusion import Pairs
from writer_search.results.page.html import (
    Column,
    cell,
    count,
    name,
    share_bar,
    soft,
    table,
    text,
    wide,
)
from writer_search.results.page.lines import pick
from writer_search.results.page.snapshot import Snapshot

MOST_IN_A_MATRIX = 29  # writers; more are a table of pairs
MOST_PAIRS, MOST_PAGES = 40, 60


def writers_table(shown: Snapshot) -> str:
    """Make the table of writers, the hardest first."""
    shares = shown.metrics.get("per_writer")
    if not isinstance(shares, dict) or not shares:
        return ""
    names, pairs = shown.confusion
    lines, mistakes = _by_writer(names, pairs)
    pages = Counter(page.writer for page in _pages(shown))
    order = sorted(shares.items(), key=lambda item: (item[1], item[0]))
    columns = [Column("writer"), Column("lines", True), Column("accuracy", True)]
    columns += [
        Column("pages", True),
        Column("most often taken for"),
        Column("share of lines", True),
    ]
    rows = []
    for writer, share in order:
        other, times = next(iter(mistakes[writer].most_common(1)), ("", 0))
        number = lines.get(writer)
        rows.append(
            "<tr>"
            + cell(pick(writer) if shown.predictions else name(writer), writer)
            + cell(str(number or ""), number, number=True)
            + cell(percent(share) + share_bar(share), share, number=True)
            + cell(str(pages[_escaped(writer)] or ""), pages[_escaped(writer)] or "", number=True)
            + cell(name(other) if times else "")
            + cell(
                f"{times} of {number}" if times and number else "",
                times / number if times and number else "",
                number=True,
            )
            + "</tr>"
        )
    return table("writers", "Writers", columns, rows)


def _escaped(writer: str) -> str:
    """Give a name as predictions.csv has it."""
    return writer.encode("utf-8", "backslashreplace").decode()


def _by_writer(names: list[str], pairs: Pairs) -> tuple[dict[str, int], Mapping[str, Counter[str]]]:
    """Count each writer's lines, and whom they are wrongly taken for."""
    lines: dict[str, int] = Counter()
    mistakes: dict[str, Counter[str]] = defaultdict(Counter)
    for true, guessed, number in pairs:
        lines[names[true]] += number
        if true != guessed:
            mistakes[names[true]][names[guessed]] += number
    return lines, mistakes


def confusion(shown: Snapshot) -> str:
    """Show who is taken for whom: a matrix of few writers, a table of pairs of many."""
    names, pairs = shown.confusion
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    if not names:
        return ""
    if not wrong:
        return soft("No mistakes.")
    told = f"{count(sum(n for *_, n in wrong), 'line')} wrong, in {count(len(wrong), 'pair')}."
    lines = _by_writer(names, pairs)[0]
    if len(names) > MOST_IN_A_MATRIX:
        return soft(told) + _pairs_table(names, wrong, lines)
    return soft(
        f"{told} Each row is a true writer; the numbers above the columns are those of the rows. "
        "Mistakes are coloured by their share of the writer's lines; what is right is grey."
    ) + _matrix(names, pairs, lines)


def _pairs_table(names: list[str], wrong: Pairs, lines: Mapping[str, int]) -> str:
    columns = [Column("writer"), Column("taken for"), Column("lines", True)]
    columns.append(Column("share of lines", True))
    rows = []
    for true, guessed, number in sorted(wrong, key=lambda pair: (-pair[2], pair))[:MOST_PAIRS]:
        share = number / lines[names[true]]
        rows.append(
            "<tr>"
            + cell(name(names[true]))
            + cell(name(names[guessed]))
            + cell(str(number), number, number=True)
            + cell(percent(share) + share_bar(share), share, number=True)
            + "</tr>"
        )
    left = len(wrong) - len(rows)
    more = soft(f"{count(left, 'rarer pair')} not shown.") if left else ""
    return table("pairs", "Most confused pairs of writers", columns, rows) + more


def _matrix(names: list[str], pairs: Pairs, lines: Mapping[str, int]) -> str:
    counts = {(true, guessed): number for true, guessed, number in pairs}
    heads = "".join(
        f'<th scope="col" title="{text(writer)}">{column}</th>'
        for column, writer in enumerate(names, 1)
    )
    body = []
    for true, writer in enumerate(names):
        cells = []
        for guessed, other in enumerate(names):
            number = counts.get((true, guessed), 0)
            if not number:
                cells.append("<td></td>")
            elif true == guessed:
                cells.append(f'<td class="right">{number}</td>')
            else:
                depth = 0.15 + 0.3 * min(1.0, 2 * number / max(1, lines.get(writer, 1)))
                cells.append(
                    f'<td style="background:rgba(var(--wrong),{depth:.2f})" '
                    f'title="{text(writer)} taken for {text(other)}">{number}</td>'
                )
        body.append(f'<tr><th scope="row">{true + 1}&nbsp;{name(writer)}</th>{"".join(cells)}</tr>')
    return wide(
        '<table class="confusion">\n<thead><tr><th scope="col">true writer</th>'
        f"{heads}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>",
        "Confusion of writers",
    )


@dataclass
class Page:
    """A validation page: its lines, how many of them are right, and whom all together name."""

    writer: str
    name: str
    guess: str
    lines: int = 0
    right: int = 0

    @property
    def share(self) -> float:
        return self.right / self.lines

    @property
    def is_right(self) -> bool:
        return self.guess == self.writer


def _pages(shown: Snapshot) -> list[Page]:
    """Count by page, the hardest first."""
    found: dict[tuple[str, str], Page] = {}
    for line in shown.predictions:
        if not line.page:
            continue  # it is not known
        new = Page(line.writer, line.page, line.page_guess)
        page = found.setdefault((line.writer, line.page), new)
        page.lines += 1
        page.right += line.is_right
    return sorted(found.values(), key=lambda page: (page.is_right, page.share))


def pages_table(shown: Snapshot) -> str:
    """Make the table of validation pages, the hardest first."""
    pages = _pages(shown)
    if not pages:
        return ""
    wrong = sum(not page.is_right for page in pages)
    rows = []
    for page in pages[:MOST_PAGES]:
        verdict = "right" if page.is_right else f"taken for {name(page.guess)}"
        rows.append(
            "<tr>"
            + cell(name(page.name))
            + cell(pick(page.writer))
            + cell(str(page.lines), page.lines, number=True)
            + cell(percent(page.share) + share_bar(page.share), page.share, number=True)
            + cell(verdict)
            + "</tr>"
        )
    macro = shown.metrics.get("page_macro_top1")
    told = f"{wrong} of {count(len(pages), 'page')} taken for another writer"
    if isinstance(macro, float):
        told += f"; page accuracy {percent(macro)} (mean of writers)"
    left = len(pages) - len(rows)
    more = soft(f"{count(left, 'easier page')} not shown.") if left else ""
    columns = [Column("page"), Column("writer"), Column("lines", True)]
    columns += [Column("lines right", True), Column("by all lines together")]
    return soft(f"{told}.") + table("pages", "Pages", columns, rows) + more
