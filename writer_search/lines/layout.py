"""Names layouts that would be taken for something else: splits as writers, a level too many."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from writer_search.common.errors import UserError
from writer_search.common.text import one_line
from writer_search.lines.walk import LeftOut, directories_of_lines

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev", "va", "vl"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "te", "ts"), "test"),
}
TABLES = (".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".txt", ".xml")


def refuse_other_layouts(data_root: Path) -> None:
    """Raise UserError where directories mean splits but would be writers or books, or the like."""
    names = _directories(data_root)
    _refuse_misnamed_splits(data_root, names)
    if "train" in names:
        return
    if data_root.name in SPLITS and len(set(SPLITS) & set(_directories(data_root.parent))) > 1:
        raise UserError(
            f"--data_root {data_root} is one split of {data_root.parent}, which has others beside "
            f"it: give --data_root {data_root.parent}"
        )
    with_splits = [
        name for name in names if {"train"} < _splits_among(_directories(data_root / name))
    ]
    if (below := _splits_below(data_root, names)) is not None:
        raise UserError(
            f"--data_root {data_root} is a level too high: give --data_root {one_line(below)}"
        )
    if with_splits and 2 * len(with_splits) >= len(names):
        first = one_line(with_splits[0])
        raise UserError(
            f"--data_root {data_root}: {len(with_splits)} of its directories hold the splits, "
            f"first {first}/train; if {first} is a data set, give --data_root {data_root}/{first}; "
            f"if it is a writer, put the split above: train/{first}"
        )


def _splits_below(directory: Path, names: Sequence[str]) -> Path | None:
    """Give the directory with the splits where only lone directories lead to it."""
    while len(names) == 1:
        directory /= names[0]
        names = _directories(directory)
        if {"train"} < _splits_among(names):
            return directory
    return None


def refuse_no_images(data_root: Path, instead: str) -> None:
    """Raise UserError for a directory without line images, saying what is there instead."""
    raise UserError(
        f"--data_root {data_root} holds no line images; expected "
        "{train,val,test}/<writer>/[<book>/]<page>/line_001.png or the same without splits"
        + (f"; there are {instead}" if instead else "")
        + _hint_of_table(data_root)
    )


def hint_of_one_writer(data_root: Path, writers: Sequence[str]) -> str:
    """Say what a single writer may really be: a level of directories too many."""
    if len(writers) != 1:
        return ""
    if table := _hint_of_table(data_root):
        return table
    split = "train" if (data_root / "train").is_dir() else ""
    top = data_root / split / writers[0]
    below = _directories(top)
    if len(below) < 2:
        return ""
    return (
        f"; if the {len(below)} directories in {one_line(os.path.join(split, writers[0]))} are the "
        + (
            "writers, move them up a level"
            if split
            else f"writers, give --data_root {one_line(top)}"
        )
    )


def _hint_of_table(data_root: Path) -> str:
    """Say what to do where a table, not directories, tells who wrote the lines."""
    tables = sorted(
        entry.name for entry in os.scandir(data_root) if Path(entry.name).suffix.lower() in TABLES
    )
    if not tables:
        return ""
    return (
        f"; if {one_line(tables[0])} says who wrote each line: tables are not read, move the "
        "images into a directory for each writer, and there one for each page"
    )


def _refuse_misnamed_splits(data_root: Path, names: Sequence[str]) -> None:
    for name in names:
        meant = SPLIT_WORDS.get(name.casefold()) if len(name) > 2 else None
        if meant and name != meant and meant not in names:
            raise UserError(
                f"--data_root {data_root}: "
                + (
                    f"rename {one_line(name)} to {meant}"
                    if "train" in map(_meaning, names)
                    else f"{one_line(name)} looks like a split, and there is no train beside it; "
                    "if it is a writer, give it another name"
                )
            )
    found = {
        name: meant
        for name in names
        if (meant := _meaning(name)) and (name == meant or meant not in names)
    }
    wrong = {name: meant for name, meant in found.items() if name != meant}
    if {"train"} < set(found.values()) and {"train", "val"} & set(wrong.values()):
        renamed = ", ".join(f"{one_line(name)} to {meant}" for name, meant in wrong.items())
        raise UserError(f"--data_root {data_root}: these look like splits: rename {renamed}")


def _meaning(name: str) -> str | None:
    """Say which split a name like training_set, valset or lines-val1 means, if any."""
    words = re.split(r"[\W_]+", name.casefold())
    bare = (re.sub(r"(?<=...)(set|data|lines|images)?\d*$", "", word) for word in words)
    found = {SPLIT_WORDS[word] for word in bare if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def _splits_among(names: Sequence[str]) -> set[str]:
    return {SPLIT_WORDS[name.casefold()] for name in names if name.casefold() in SPLIT_WORDS}


def _directories(directory: Path) -> list[str]:
    try:
        entries = directories_of_lines(list(os.scandir(directory)), LeftOut())
    except OSError:
        return []
    return sorted(entry.name for entry in entries)
