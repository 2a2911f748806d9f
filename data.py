"""Finds line images, checks them, and decodes each of them once into a cache.

The cache is one long strip: all lines side by side, `uint8`, ink positive on a background of 0,
stored column by column as `(total_width, line_height)` so that a crop is one contiguous read. It
is mapped into memory and shared by every trial, every process and every later search.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from writer_search.common.cores import usable_cores
from writer_search.common.errors import UserError
from writer_search.common.files import sync_directory, write_whole
from writer_search.common.text import one_line

SPLITS = ("train", "val", "test")
MISNAMED_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
# Where a search's database or lock lies, it writes pictures into these directories.
OF_A_SEARCH, WRITTEN = {"optuna_study.db", "search.lock"}, r"summary|confirm|trial_\d+"
INK_DEVIATION = 40.0  # grey levels that one deviation of a line's ink takes in the strip
BROKEN_SHARE = 0.01  # more broken lines than this are an error, not a warning
MAX_ASPECT = 200.0  # longer side / shorter side; a real line stays below 60
EXIF_ORIENTATION = 0x0112
CACHE_FORMAT = 1
# What `decode_line` makes of an image: a model is used with what it was trained on.
PREPROCESSING = {"version": CACHE_FORMAT, "ink_deviation": INK_DEVIATION}


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


@dataclass(frozen=True)
class LineSet:
    """All lines of a search, ready for use: the strip and, per line, where it is and whose.

    strip (total_width + 1, line_height), uint8, memory-mapped; column 0 is empty background. It is
    opened where it is first used; a LineSet that was sent to another process opens it there.
    starts, widths (lines,), int64: a line's columns are strip[start : start + width].
    labels (lines,), int64: index into `writers`.   splits (lines,), int64: index into SPLITS.
    pages (lines,), int64: the same number for lines of the same page.
    """

    strip_file: Path
    line_height: int
    starts: NDArray[np.int64]
    widths: NDArray[np.int64]
    labels: NDArray[np.int64]
    splits: NDArray[np.int64]
    pages: NDArray[np.int64]
    writers: tuple[str, ...]
    paths: tuple[str, ...]
    fingerprint: str
    report: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "strip"}

    @cached_property
    def strip(self) -> NDArray[np.uint8]:
        # Mode c: torch wants memory that it may write to; nothing reaches the file.
        return np.memmap(self.strip_file, np.uint8, mode="c").reshape(-1, self.line_height)

    def select(self, split: str) -> NDArray[np.int64]:
        """Give the indices of a split's lines, in a fixed order."""
        return np.flatnonzero(self.splits == SPLITS.index(split))


# ------------------------------------------------------------------------------------ finding


def find_lines(data_root: Path, num_writers: int | None = None, seed: int = 0) -> list[LineFile]:
    """Find all line images of the first `num_writers` writers by name (None: of all).

    Reads directories only. The order does not depend on the file system's. Without split
    directories the lines are split by `seed`. Raises UserError when no search is possible.
    """
    try:
        if not data_root.is_dir():
            problem = "is not a directory" if data_root.exists() else "does not exist"
            raise UserError(
                f"--data_root {data_root} {problem}; give the directory of the line images"
            )
        lines = _scan(data_root)
    except OSError as error:
        raise UserError(f"--data_root {data_root} cannot be read: {one_line(error)}") from None
    if not lines:
        raise UserError(
            f"--data_root {data_root} holds no line images; expected "
            "{train,val,test}/<writer>/[<book>/]<page>/line_001.png or the same without splits"
        )
    if not any(line.split for line in lines):
        lines = split_by_page(lines, seed)
    return _check_writers(data_root, lines, num_writers)


def _scan(data_root: Path) -> list[LineFile]:
    _refuse_misnamed_splits(data_root)
    has_splits = (data_root / "train").is_dir()
    if not has_splits and any((data_root / split).is_dir() for split in SPLITS[1:]):
        raise UserError(f"--data_root {data_root} has val or test but no train directory")
    lines = []
    for split in SPLITS if has_splits else ("",):
        top = data_root / split
        if top.is_dir():
            writers = _directories_of_lines(list(os.scandir(top)))
            for writer in sorted(entry.name for entry in writers):
                lines += list(_scan_writer(data_root, split, writer))
    return lines


def _refuse_misnamed_splits(data_root: Path) -> None:
    """Raise UserError for directories that mean a split but would be taken for writers."""
    for entry in os.scandir(data_root):
        meant = MISNAMED_SPLITS.get(entry.name.casefold())
        if meant and entry.name != meant and entry.is_dir() and not (data_root / meant).is_dir():
            raise UserError(f"--data_root {data_root}: rename {entry.name} to {meant}")


def _is_visible_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:  # a link to itself
        return False


def _scan_writer(data_root: Path, split: str, writer: str) -> Iterator[LineFile]:
    top = data_root / split / writer
    # A link back up would give this writer the lines of all.
    above = frozenset(_identity(data_root / part) for part in ("", split))
    for directory, entries in _walk(top, above):
        page = directory.relative_to(top).as_posix()
        for entry in entries:
            status = entry.stat()
            path = os.path.relpath(entry.path, data_root)
            yield LineFile(path, split, writer, page, status.st_size, status.st_mtime_ns)


def _walk(
    directory: Path, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Walk in sorted order, into linked directories too, but never into a loop of links."""
    identity = _identity(directory)
    if identity in above:
        return
    entries = sorted(os.scandir(directory), key=lambda entry: os.fsencode(entry.name))
    images = [entry for entry in entries if _is_image(entry)]
    if images and not any(entry.name == "history.jsonl" for entry in entries):  # a trial's pictures
        yield directory, images
    for entry in _directories_of_lines(entries):
        yield from _walk(Path(entry.path), above | {identity})


def _directories_of_lines(entries: Sequence[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    """Leave out what is hidden, and what a search wrote whose checkpoint directory this is."""
    of_a_search = any(entry.name in OF_A_SEARCH for entry in entries)
    return [
        entry
        for entry in entries
        if _is_visible_dir(entry) and not (of_a_search and re.fullmatch(WRITTEN, entry.name))
    ]


def find_images(directory: Path) -> list[Path]:
    """Find the images in a directory and below it, in a fixed order. Raises OSError."""
    return [Path(e.path) for _, entries in _walk(directory, frozenset()) for e in entries]


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
        return False
    try:
        return entry.is_file()
    except OSError:
        return False


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
        assigned = _assign_units(Counter(_unit(line, own) for line in own), f"{seed}/{writer}")
        split_lines += [replace(line, split=assigned[_unit(line, own)]) for line in own]
    return split_lines


def _unit(line: LineFile, own: list[LineFile]) -> str:
    by_book = len({other.book for other in own}) > 1
    return (line.book or line.page) if by_book else line.page


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


def _check_writers(
    data_root: Path, lines: list[LineFile], num_writers: int | None
) -> list[LineFile]:
    """Keep the lines of the chosen writers; raise UserError where no fair search is possible."""
    writers = sorted({line.writer for line in lines if line.split == "train"})
    if len(writers) < 2:
        raise UserError(
            f"--data_root {data_root} has {len(writers)} writer(s) with training lines; "
            "telling writers apart needs two or more"
        )
    strangers = sorted({line.writer for line in lines if line.split == "val"} - set(writers))
    if strangers:
        raise UserError(
            f"{data_root}/val has {len(strangers)} writer(s) without training lines, first "
            f"{one_line(strangers[0])}; move some of their pages to train, or remove them"
        )
    chosen = set(writers[:num_writers])
    kept = [line for line in lines if line.writer in chosen]
    if not any(line.split == "val" for line in kept):
        raise UserError(
            f"--data_root {data_root} has no validation lines for the chosen writers; "
            "add a val directory, or pages to split (a writer needs two pages or more)"
        )
    return kept


# ----------------------------------------------------------------------------------- decoding


class BrokenImageError(Exception):
    """An image that cannot be used, and why."""


def decode_line(content: bytes, line_height: int) -> NDArray[np.uint8]:
    """Decode an image file into ink: (width, line_height), uint8, 0 is paper.

    Grey, resized to the height with its aspect kept. The paper is the median grey; ink is the
    distance from it towards the darker side (towards the lighter one where that has more contrast),
    divided by its own deviation, so that neither paper nor ink colour is a label.
    Raises BrokenImageError.
    """
    try:
        grey = _read_grey(content, line_height)
    except BrokenImageError:
        raise
    except Exception as error:  # decoders of hostile files raise nearly anything
        raise BrokenImageError(one_line(f"{type(error).__name__}: {error}", 150)) from None
    paper = int(np.searchsorted(np.cumsum(np.bincount(grey.ravel(), minlength=256)), grey.size / 2))
    ink = paper - grey.astype(np.float32)
    if (ink.clip(max=0) ** 2).sum() > 1.5 * (ink.clip(min=0) ** 2).sum():
        ink = -ink
    ink = ink.clip(min=0)
    deviation = float(ink.std())
    if deviation < 1.0:
        raise BrokenImageError("blank: no ink")
    return (ink * (INK_DEVIATION / deviation)).clip(max=255).round().astype(np.uint8).T


def _read_grey(content: bytes, line_height: int) -> NDArray[np.uint8]:
    if not content:
        raise BrokenImageError("empty file")
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise BrokenImageError(f"decompression bomb: {width} x {height} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BrokenImageError(f"{width} x {height} pixels is no line of text")
        turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # by a quarter, as cameras note
        if turned:
            width, height = height, width
        wanted = (max(1, width * line_height // height), line_height)
        image.draft("L", wanted[::-1] if turned else wanted)  # JPEG: decodes no more than needed
        grey = _to_grey(ImageOps.exif_transpose(image))
        width = max(1, round(width * line_height / height))
        return np.asarray(grey.resize((width, line_height), Image.Resampling.BILINEAR))


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow would clip 16 bits at 255: spread the image's own range instead.
        values = np.asarray(image, dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        return Image.fromarray(((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


# -------------------------------------------------------------------------------------- cache


def default_cache_dir() -> Path:
    """Give the user's cache directory for decoded lines."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a name, as containers have it
        raise UserError(
            "there is no home directory to keep decoded lines in: give --cache_dir, or set HOME"
        ) from None
    return Path(base) / "writer_lines"


def load_lines(
    data_root: Path, lines: list[LineFile], line_height: int, cache_dir: Path
) -> LineSet:
    """Open the decoded lines, decoding them first where no search has done so.

    Raises UserError when too many images are broken, or the cache cannot be written.
    """
    entry = cache_dir / _cache_key(data_root, lines, line_height)
    try:
        if not _is_whole(entry):
            _decode_into(entry, data_root, lines, line_height)
    except OSError as error:
        raise UserError(
            f"the decoded lines cannot be written to {cache_dir}: {one_line(error)}; "
            "make room there or give another --cache_dir"
        ) from None
    return open_lines(entry, lines)


def _is_whole(entry: Path) -> bool:
    """Tell whether a cache entry has all its files; a disk's purge may take them one by one."""
    return all((entry / name).exists() for name in ("strip.u8", "broken.json", "index.npz"))


def _cache_key(data_root: Path, lines: list[LineFile], line_height: int) -> str:
    """Name a cache entry by what can be seen of the files without reading them."""
    files = [(line.path, line.size, line.mtime_ns) for line in lines]
    key = json.dumps([CACHE_FORMAT, line_height, INK_DEVIATION, str(data_root.resolve()), files])
    return f"{line_height}px-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _decode_into(entry: Path, data_root: Path, lines: list[LineFile], line_height: int) -> None:
    """Fill a temporary directory beside `entry`, then put it in place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _one_builder(entry):
        if _is_whole(entry):  # another process built it while this one waited
            return
        temporary = entry.with_name(f".{entry.name}.tmp")
        rmtree(temporary, ignore_errors=True)  # of a builder that died
        temporary.mkdir()
        try:
            _write_entry(temporary, data_root, lines, line_height)
            rmtree(entry, ignore_errors=True)  # what a purge left; who reads it has it open
            os.replace(temporary, entry)
            sync_directory(entry.parent)
        finally:
            rmtree(temporary, ignore_errors=True)


@contextmanager
def _one_builder(entry: Path) -> Iterator[None]:
    """Let one process decode an entry while others wait; a dead one's lock is free at once."""
    with open(entry.with_name(f".{entry.name}.lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_entry(directory: Path, data_root: Path, lines: list[LineFile], line_height: int) -> None:
    widths = np.zeros(len(lines), np.int64)
    digests = np.zeros((len(lines), 16), np.uint8)
    broken: dict[str, str] = {}

    def read(line: LineFile) -> tuple[bytes, NDArray[np.uint8] | str]:
        try:
            content = (data_root / line.path).read_bytes()
        except OSError as error:
            return b"", one_line(error, 150)
        try:
            return content, decode_line(content, line_height)
        except BrokenImageError as error:
            return content, str(error)

    def write_strip(file: Any) -> None:
        file.write(bytes(line_height))  # column 0: empty background
        # Threads: Pillow decodes and resizes without the interpreter's lock.
        with warnings.catch_warnings(), _threads() as pool:
            # `decode_line` refuses what is too large; filters are the process's, not a thread's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            decoded = tqdm(
                pool.map(read, lines), "decoding lines", len(lines), unit="line", disable=None
            )
            for index, (content, ink) in enumerate(decoded):
                digest = hashlib.sha256(content).digest()[:16]
                digests[index] = np.frombuffer(digest, np.uint8)
                if isinstance(ink, str):
                    broken[lines[index].path] = ink
                else:
                    widths[index] = len(ink)
                    file.write(np.ascontiguousarray(ink).data)

    write_whole(directory / "strip.u8", write_strip)
    _refuse_broken(lines, broken)
    text = json.dumps(broken, indent=1)
    write_whole(directory / "broken.json", lambda file: file.write(text.encode()))
    write_whole(
        directory / "index.npz",
        lambda file: np.savez(file, widths=widths, digests=digests, line_height=line_height),
    )


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool that does not finish its work when an error or a signal ends its use."""
    pool = ThreadPoolExecutor(usable_cores())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _refuse_broken(lines: list[LineFile], broken: Mapping[str, str]) -> None:
    """Raise UserError when more than 1 % of the lines are broken, or all that a split needs."""
    if not broken:
        return
    first, cause = next(iter(broken.items()))
    sound = [line for line in lines if line.path not in broken]
    able = {line.writer for line in sound if line.split == "train"}
    lost = sorted({line.writer for line in lines} - able)
    which = ""
    if lost:
        which = f", all training lines of writer {one_line(lost[0])} among them"
    elif not any(line.split == "val" for line in sound):
        which = ", all validation lines among them"
    if which or len(broken) > BROKEN_SHARE * len(lines):
        raise UserError(
            f"{len(broken)} of {len(lines)} line images are broken{which}, first {one_line(first)} "
            f"({cause}); mend or remove them"
        )


def open_lines(entry: Path, lines: Iterable[LineFile]) -> LineSet:
    """Open a cache entry for these lines (the ones that it was made from, in the same order)."""
    lines = list(lines)
    with np.load(entry / "index.npz") as index:
        widths, digests = index["widths"], index["digests"]
        line_height = int(index["line_height"])
    broken = json.loads((entry / "broken.json").read_bytes())
    _refuse_broken(lines, broken)  # another split of the same files may need what is broken
    starts = 1 + np.concatenate([[0], np.cumsum(widths)[:-1]])
    usable = np.flatnonzero(widths)
    kept = [lines[i] for i in usable]
    writers = tuple(sorted({line.writer for line in kept if line.split == "train"}))
    label = {writer: number for number, writer in enumerate(writers)}
    page_number: dict[tuple[str, str, str], int] = {}
    pages = [
        page_number.setdefault((line.split, line.writer, line.page), len(page_number))
        for line in kept
    ]
    return LineSet(
        strip_file=entry / "strip.u8",
        line_height=line_height,
        starts=starts[usable],
        widths=widths[usable],
        labels=np.array([label[line.writer] for line in kept], np.int64),
        splits=np.array([SPLITS.index(line.split) for line in kept], np.int64),
        pages=np.array(pages, np.int64),
        writers=writers,
        paths=tuple(line.path for line in kept),
        fingerprint=_fingerprint(kept, digests[usable], line_height),
        report=_report(lines, kept, digests[usable], broken),
    )


def _fingerprint(kept: list[LineFile], digests: NDArray[np.uint8], line_height: int) -> str:
    """Hash what was learned from: contents, names and splits, but no dates and no data root."""
    return _hash_lines(f"{CACHE_FORMAT} {line_height} {INK_DEVIATION}", kept, digests)


def _hash_lines(head: str, kept: list[LineFile], digests: NDArray[np.uint8]) -> str:
    whole = hashlib.sha256(f"{head}\n".encode())
    for line, digest in zip(kept, digests, strict=True):
        whole.update(os.fsencode(f"{line.split}\0{line.writer}\0{line.page}\0{line.path}\0"))
        whole.update(digest.tobytes())
    return whole.hexdigest()[:16]


# ------------------------------------------------------------------------------------- report


def _report(
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
        "fingerprint": _hash_lines("lines", kept, digests),
        "lines": {split: sum(line.split == split for line in kept) for split in SPLITS},
        "pages": len({(line.split, line.writer, line.page) for line in kept}),
        "writers": counts,
        "writers_without_validation": [w for w, own in counts.items() if not own["val"]],
        "broken": broken,
        "pages_in_two_splits": _in_two_splits(kept, lambda i: (kept[i].writer, kept[i].page)),
        "books_in_two_splits": _in_two_splits(
            kept, lambda i: (kept[i].writer, kept[i].book) if kept[i].book else None
        ),
        "images_in_two_splits": _in_two_splits(kept, lambda i: contents[i]),
        "identical_images": len(kept) - len(set(contents)),
    }


def _in_two_splits(kept: list[LineFile], key: Callable[[int], Any]) -> int:
    """Count what stands in two splits or more: pages, books, contents."""
    splits: dict[Any, set[str]] = defaultdict(set)
    for index, line in enumerate(kept):
        if (name := key(index)) is not None:
            splits[name].add(line.split)
    return sum(len(found) > 1 for found in splits.values())


def describe_report(report: Mapping[str, Any]) -> list[str]:
    """Put a data report's warnings into lines for people; empty when all is well."""
    warned = []
    if report["broken"]:
        first, cause = next(iter(report["broken"].items()))
        warned.append(
            f"{len(report['broken'])} broken image(s) left out, first {one_line(first)} ({cause}); "
            "all are named in summary/data_report.json"
        )
    if without := report["writers_without_validation"]:
        names = one_line(", ".join(without))
        warned.append(
            f"{len(without)} writer(s) without validation lines, not in the mean: {names}"
        )
    for name, counted in (
        ("page(s)", "pages_in_two_splits"),
        ("book(s)", "books_in_two_splits"),
        ("identical image(s)", "images_in_two_splits"),
    ):
        if report[counted]:
            warned.append(
                f"{report[counted]} {name} stand in two splits: validation will look better than "
                "it is"
            )
    return warned
