"""Splits lines into train, val and test by pages or books."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from writer_search.common.files import write_text
from writer_search.common.text import csv_text
from writer_search.lines.layout import SPLITS
from writer_search.lines.predictions import page_of
from writer_search.lines.report import LineFile


def split_by_page(lines: list[LineFile], seed: int) -> list[LineFile]:
    """Assign each line to train, val or test, about 70 / 15 / 15 % of each writer's lines.

    No page is split, and no book where a writer has two books or more. A writer with one unit (page
    or book) is in train alone, with two in train and val. A writer's split depends on the seed and
    his own pages, not on the other writers.
    """
    by_writer: dict[str, list[LineFile]] = defaultdict(list)
    for line in lines:
        by_writer[line.writer].append(line)
    split_lines = []
    for writer, own in by_writer.items():
        by_book = len({line.book for line in own}) > 1
        units = [(by_book and line.book) or line.page for line in own]
        assigned = _assign_units(Counter(units), f"{seed}/{writer}")
        split_lines += [
            replace(line, split=assigned[unit]) for line, unit in zip(own, units, strict=True)
        ]
    return split_lines


def _assign_units(units: Mapping[str, int], key: str) -> dict[str, str]:
    """Assign units (name → lines) to splits. The largest always trains."""

    def shuffled(unit: str) -> tuple[bool, bytes]:
        return unit == largest, hashlib.sha256(os.fsencode(f"{key}/{unit}")).digest()

    largest = max(sorted(units), key=lambda unit: units[unit])
    order = sorted(units, key=shuffled)
    share = 0.15 * sum(units.values())
    assigned = dict.fromkeys(order, "train")
    held_out = ["val", "test"][: len(order) - 1]
    for served, split in enumerate(held_out):
        keep = len(held_out) - served  # a unit for each later split, and one to train on
        taken = 0
        while len(order) > keep and (taken == 0 or taken + units[order[0]] <= share):
            unit = order.pop(0)
            assigned[unit] = split
            taken += units[unit]
    return assigned


def write_split(file: Path, lines: Iterable[tuple[str, str, int]]) -> None:
    """Write a table of all lines, which say in which split each is.

    lines: path below the data root, writer, index into SPLITS.
    """
    rows = ((path, writer, page_of(path, writer), SPLITS[split]) for path, writer, split in lines)
    write_text(file, csv_text([("path", "writer", "page", "split"), *rows]))
