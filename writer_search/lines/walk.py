"""Walks directories of line images, and keeps account of what is not looked at."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from writer_search.common.text import one_line
from writer_search.lines.kinds import SUFFIXES

# Where a search's database or lock lies, it writes pictures into these directories.
OF_A_SEARCH, WRITTEN = {"optuna_study.db", "search.lock"}, r"summary|confirm|trial_\d+"
# Thumbnails, recycle bins and snapshots of network drives, archives and desktops; in lower case.
SYSTEM_FOLDERS = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
    *("lost+found", "$recycle.bin", "recycler", "system volume information", "__macosx"),
    *("network trash folder", "temporary items", "thumbnails", "thumbs", "_thumbs"),
    "__pycache__",
}
# Texts and tables lie beside lines in all exports: they are counted, but nobody is warned of them.
BESIDE_LINES = {".txt", ".xml", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml"}
HIDDEN, SYSTEM, DANGLING = "hidden", "system folders", "links to nothing"
REPEATED = "links to directories that were read already"
OTHERS = "writers beyond the chosen number"  # the first ones by name
UNREMARKABLE = {HIDDEN, SYSTEM, OTHERS, *(f"{suffix} files" for suffix in BESIDE_LINES)}


Identity = tuple[int, int]  # of a directory, whatever its name


class LeftOut:
    """What was found and not looked at: for each kind a count, and the first by name."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, path: str | os.PathLike[str]) -> None:
        before, first = self.kinds.get(kind, (0, os.fspath(path)))
        self.kinds[kind] = (before + 1, first)

    def report(self) -> dict[str, dict[str, Any]]:
        return {
            kind: {"count": count, "first": first}
            for kind, (count, first) in sorted(self.kinds.items())
        }


def describe_left_out(left_out: dict[str, dict[str, Any]], all_kinds: bool = False) -> str:
    """Say what was not looked at, in one line; empty where that is nothing remarkable."""
    return ", ".join(
        f"{found['count']} {kind} (first {one_line(found['first'], 100)})"
        for kind, found in left_out.items()
        if all_kinds or kind not in UNREMARKABLE
    )


def walk(
    directory: Path,
    left_out: LeftOut,
    known: Iterable[Identity] = (),
    onerror: Callable[[Path, OSError], None] | None = None,
) -> list[tuple[Path, list[os.DirEntry[str]]]]:
    """Find each directory that holds images, with its images, in sorted order.

    Goes into linked directories too, after all that is really there, and into each one once: links
    in a loop, or from page to page, make no line stand twice. known: directories not to go into.
    Calls `onerror` for a directory that cannot be read; raises OSError without.
    """
    seen, found = set(known), []
    waiting, links = [directory], list[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            identity = identity_of(here)
            entries = sorted(os.scandir(here), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if onerror is None:
                raise
            onerror(here, error)
            continue
        if identity in seen:
            left_out.add(REPEATED, here)
            continue
        seen.add(identity)
        if not any(entry.name == "history.jsonl" for entry in entries):  # else a trial's pictures
            images = images_among(entries, left_out)
            if images:
                found.append((here, images))
        below = directories_of_lines(entries, left_out)
        links += [Path(entry.path) for entry in below if entry.is_symlink()]
        waiting += [Path(entry.path) for entry in reversed(below) if not entry.is_symlink()]
    return sorted(found, key=lambda one: [os.fsencode(part) for part in one[0].parts])


def images_among(entries: Sequence[os.DirEntry[str]], left_out: LeftOut) -> list[os.DirEntry[str]]:
    """Give the images among a directory's entries, and note its other files."""
    images = []
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        try:
            is_file, is_dir = entry.is_file(), entry.is_dir()
        except OSError:  # a link to itself
            is_file = is_dir = False
        if is_dir:
            continue
        if entry.name.startswith(".") or entry.name.lower() in ("thumbs.db", "desktop.ini"):
            left_out.add(HIDDEN, entry.path)
        elif not is_file:
            left_out.add(DANGLING, entry.path)
        elif suffix in SUFFIXES:
            images.append(entry)
        else:
            left_out.add(f"{suffix or 'nameless'} files", entry.path)
    return images


def directories_of_lines(
    entries: Sequence[os.DirEntry[str]], left_out: LeftOut
) -> list[os.DirEntry[str]]:
    """Leave out what is hidden or a system's, and what a search wrote whose directory this is."""
    of_a_search = any(entry.name in OF_A_SEARCH for entry in entries)
    directories = []
    for entry in entries:
        try:
            if not entry.is_dir():
                continue
        except OSError:
            continue
        if entry.name.startswith("."):
            left_out.add(HIDDEN, entry.path)
        elif entry.name.lower() in SYSTEM_FOLDERS:
            left_out.add(SYSTEM, entry.path)
        elif not (of_a_search and re.fullmatch(WRITTEN, entry.name)):
            directories.append(entry)
    return directories


def identity_of(directory: Path) -> Identity:
    status = directory.stat()
    return status.st_dev, status.st_ino
