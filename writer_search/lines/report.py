"""What one should know of the lines: counts, and what makes a validation value worth less."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from writer_search.common.errors import UserError
from writer_search.common.text import counted, one_line
from writer_search.lines.decoding import INK_DEVIATION, DecodedLine
from writer_search.lines.layout import SPLITS
from writer_search.lines.walk import describe_left_out

MEASURED = ("sizes", "is_light", "ink_share")  # of each line, when it is decoded
LEAST_INK, MOST_INK = 0.005, 0.6  # shares of a line; real ones have 0.03 to 0.3
TENFOLD = 10
FEW = 3  # validation lines of a writer, of which each moves the macro average by much
TALL = "images taller than wide (whole pages, or turned?)"
EMPTY, FULL = "lines with almost no ink", "lines that are almost only ink"
STRANGERS = "test lines of writers without training lines"


# What other keyboards write in place of the same letter or digit of Arabic script: the Persian yeh
# and kaf, the stroke that makes a word longer, Persian digits.
ALIKE = {0x06CC: 0x064A, 0x06A9: 0x0643, 0x0640: None} | {
    0x06F0 + digit: 0x0660 + digit for digit in range(10)
}
PRESENTATION_FORMS = {chr(code) for code in (*range(0xFB50, 0xFE00), *range(0xFE70, 0xFEFF))}
NO_PAGE = "."  # the page of lines that lie in the writer's directory itself: it is not known


@dataclass(frozen=True)
class LineFile:
    """One line image: where it is, and whose it is. Paths are relative to the data root."""

    path: str
    split: str
    writer: str
    page: str  # the directory's path below the writer
    size: int
    mtime_ns: int

    @property
    def book(self) -> str | None:
        """The first directory below the writer, where pages lie two levels deep or more."""
        first, slash, _ = self.page.partition("/")
        return first if slash else None


def hash_lines(head: str, kept: list[LineFile], digests: NDArray[np.uint8]) -> str:
    """Hash contents, names and splits, but no dates and no data root."""
    whole = hashlib.sha256(f"{head}\n".encode())
    for line, digest in zip(kept, digests, strict=True):
        whole.update(os.fsencode(f"{line.split}\0{line.writer}\0{line.page}\0{line.path}\0"))
        whole.update(digest.tobytes())
    return whole.hexdigest()[:16]


def _nfc(name: str) -> str:
    """Give a name's composed form: macOS and others write é differently."""
    return unicodedata.normalize("NFC", name)


def _visible(name: str) -> str:
    """Give a name's composed form without characters that nobody sees."""
    return "".join(c for c in _nfc(name) if unicodedata.category(c) != "Cf")


def as_seen(name: str) -> str:
    """Give a name as people tell it from others, whatever keyboard has written it."""
    letters = (
        unicodedata.normalize("NFKC", c) if c in PRESENTATION_FORMS else c for c in _visible(name)
    )
    return " ".join("".join(letters).translate(ALIKE).casefold().split())


def _of_one_form(writers: Iterable[str], form: Callable[[str], str]) -> list[tuple[str, str]]:
    """Give the pairs of writers whose names have the same form, the first of each form first."""
    forms: dict[str, str] = {}
    pairs = [(forms.setdefault(form(writer), writer), writer) for writer in sorted(writers)]
    return [(one, other) for one, other in pairs if one != other]


def refuse_two_forms(writers: Iterable[str]) -> None:
    """Raise UserError for one name in two forms: of Unicode, or by characters that nobody sees."""
    for other, writer in _of_one_form(set(writers), _visible):
        one, two = os.fsencode(other), os.fsencode(writer)
        place = next(i for i in range(len(two)) if one[i : i + 1] != two[i : i + 1])
        first, second = (name[place : place + 4].hex(" ") or "nothing" for name in (one, two))
        raise UserError(
            f"two writers have one name, {one_line(writer)}, in two forms: "
            f"from byte {place + 1} on {first} and {second}; give their directories the same "
            "name"
        )


def data_report(
    lines: list[LineFile], kept: list[LineFile], digests: NDArray[np.uint8], broken: dict[str, str]
) -> dict[str, Any]:
    """Count lines, pages and books, and all that makes a validation value less worth."""
    counts: dict[str, dict[str, int]] = {}
    for line in kept:
        own = counts.setdefault(line.writer, dict.fromkeys(SPLITS, 0))
        own[line.split] += 1
    contents = [digest.tobytes() for digest in digests]
    return {
        # Unlike the LineSet's it does not depend on the height: for comparing searches.
        "fingerprint": hash_lines("lines", kept, digests),
        "lines": {split: sum(line.split == split for line in kept) for split in SPLITS},
        "pages": len(
            {(line.split, line.writer, line.page) for line in kept if line.page != NO_PAGE}
        ),
        "writers": counts,
        "writers_alike": _of_one_form(counts, as_seen),
        "writers_without_validation": [w for w, own in counts.items() if not own["val"]],
        "broken": broken,
        "pages_in_two_splits": _in_two_splits(
            kept,
            lambda i: (kept[i].writer, _nfc(kept[i].page)) if kept[i].page != NO_PAGE else None,
        ),
        "writers_without_pages": sorted({line.writer for line in kept if line.page == NO_PAGE}),
        "books_in_two_splits": _in_two_splits(
            kept, lambda i: (kept[i].writer, _nfc(book)) if (book := kept[i].book) else None
        ),
        "images_in_two_splits": _in_two_splits(kept, lambda i: contents[i]),
        "identical_images": len(kept) - len(set(contents)),
    }


def doubt_of(line: DecodedLine) -> str:
    """Say what is odd about a line by itself; empty where nothing is."""
    share = (line.ink > INK_DEVIATION).mean()
    doubts = {
        TALL: line.size[1] > line.size[0],
        EMPTY: share < LEAST_INK,
        FULL: share > MOST_INK,
    }
    return ", ".join(f"one of the {doubt}" for doubt, is_there in doubts.items() if is_there)


def odd_lines(
    kept: list[LineFile], measured: Mapping[str, NDArray[Any]], digests: NDArray[np.uint8]
) -> dict[str, dict[str, Any]]:
    """Count what is a sign of an error, with an example each: kind → count, first.

    measured: of each line its size (width, height) in pixels, whether its ink is lighter than its
    paper, and the share of it that is ink.
    """
    (width, height), is_light = measured["sizes"].T, measured["is_light"]
    writers = np.array([line.writer for line in kept])
    writer_of: dict[bytes, str] = {}
    shared = [
        writer_of.setdefault(digest.tobytes(), line.writer) != line.writer
        for line, digest in zip(kept, digests, strict=True)
    ]
    found = {
        TALL: height > width,
        EMPTY: measured["ink_share"] < LEAST_INK,
        FULL: measured["ink_share"] > MOST_INK,
        "images that stand under two writers": np.array(shared, bool),
        "lines read as light ink on dark paper, unlike others of their writer": np.zeros(
            len(kept), bool
        ),
        "lines ten times as high or as wide as others of their writer": np.zeros(len(kept), bool),
    }
    *_, inverted, tenfold = found.values()
    for writer in np.unique(writers):
        own = np.flatnonzero(writers == writer)
        light = is_light[own]
        inverted[own] = light != (2 * np.count_nonzero(light) > len(own))
        for sizes in (width[own], height[own]):
            tenfold[own] |= sizes >= TENFOLD * np.median(sizes)
    return {
        kind: {"count": int(odd.sum()), "first": kept[int(odd.argmax())].path}
        for kind, odd in found.items()
        if odd.any()
    }


def _in_two_splits(kept: list[LineFile], key: Callable[[int], Any]) -> int:
    """Count what stands in two splits or more: pages, books, contents."""
    splits: dict[Any, set[str]] = defaultdict(set)
    for index, line in enumerate(kept):
        if (name := key(index)) is not None:
            splits[name].add(line.split)
    return sum(len(found) > 1 for found in splits.values())


def describe_report(report: Mapping[str, Any], file: str = "summary/data_report.json") -> list[str]:
    """Put a data report's warnings into lines for people; empty when all is well.

    file: where the report is.
    """
    warned = []
    if report["broken"]:
        first, cause = next(iter(report["broken"].items()))
        warned.append(
            f"{counted(len(report['broken']), 'broken image')} left out, first {one_line(first)} "
            f"({cause}); all are named in {file}"
        )
    if without := report["writers_without_validation"]:
        names = one_line(", ".join(without))
        warned.append(
            f"{counted(len(without), 'writer')} without validation lines, not included in the "
            f"mean: {names}"
        )
    warned += [
        f"the names of writers {one_line(one)} and {one_line(other)} look alike: if they are one, "
        "give their directories one name"
        for one, other in report.get("writers_alike", [])
    ]
    measured = {writer: n for writer, own in report["writers"].items() if (n := own["val"])}
    if few := {writer: n for writer, n in measured.items() if n < FEW}:
        first = min(few, key=lambda writer: few[writer])
        warned.append(
            f"{counted(len(few), 'writer has', 'writers have')} fewer than {FEW} validation lines, "
            f"first {one_line(first)} with {few[first]}: one such line moves the mean by "
            f"{100 / len(measured) / few[first]:.1f} points"
        )
    for one, several, name in (
        ("page stands", "pages stand", "pages_in_two_splits"),
        ("book stands", "books stand", "books_in_two_splits"),
        ("identical image stands", "identical images stand", "images_in_two_splits"),
    ):
        if report[name]:
            warned.append(
                f"{counted(report[name], one, several)} in two splits: validation will look better "
                "than it is"
            )
    if without := report.get("writers_without_pages"):
        warned.append(
            f"{counted(len(without), 'writer has', 'writers have')} lines without page "
            f"directories, first {one_line(without[0])}: their pages are not known, so a page in "
            "two splits would not be noticed, and page accuracy is not measured in such splits"
        )
    warned += [
        f"{found['count']} {kind}, first {one_line(found['first'])}"
        for kind, found in report.get("odd", {}).items()
    ]
    if not_looked_at := describe_left_out(report.get("left_out", {})):
        warned.append(f"not looked at: {not_looked_at}")
    return warned
