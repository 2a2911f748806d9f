"""Finds line images, checks them, and decodes each of them once into a cache.

The cache is one long strip: all lines side by side, `uint8`, ink positive on a background of 0,
stored column by column as `(total_width, line_height)` so that a crop is one contiguous read. It
is mapped into memory and shared by every trial, every process and every later search.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from glob import escape
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from writer_search.common.errors import UserError
from writer_search.common.files import sync_directory, write_whole
from writer_search.common.locks import builder_lock
from writer_search.common.text import counted, one_line
from writer_search.lines.decoding import (
    INK_DEVIATION,
    BrokenImageError,
    DecodedLine,
    decode_line,
)
from writer_search.lines.layout import (
    SPLITS,
    hint_of_one_writer,
    refuse_no_images,
    refuse_other_layouts,
)
from writer_search.lines.parallel import in_order
from writer_search.lines.report import (
    MEASURED,
    NO_PAGE,
    STRANGERS,
    LineFile,
    as_seen,
    data_report,
    hash_lines,
    odd_lines,
    refuse_two_forms,
)
from writer_search.lines.split import split_by_page
from writer_search.lines.walk import (
    OTHERS,
    LeftOut,
    describe_left_out,
    directories_of_lines,
    identity_of,
    images_among,
    walk,
)

BROKEN_SHARE = 0.01  # more broken lines than this are an error, not a warning
CACHE_FORMAT = 6
INDEX = ("widths", "digests", "versions", "line_height", "checksum", "broken", *MEASURED)


@dataclass(frozen=True)
class LineSet:
    """All lines of a search, ready for use: the strip and, per line, where it is and whose.

    strip (total_width + 1, line_height), uint8, memory-mapped; column 0 is empty background. It is
    opened where it is first used; a LineSet that was sent to another process opens it there.
    starts, widths (lines,), int64: a line's columns are strip[start : start + width].
    labels (lines,), int64: index into `writers`.   splits (lines,), int64: index into SPLITS.
    pages (lines,), int64: the same number for lines of the same page; -1 where it is not known.
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

    def described(self, data_root: Path, seed: int) -> dict[str, Any]:
        """Describe the lines for a study's settings.   seed: of a split that is not given."""
        return {
            "fingerprint": self.fingerprint,
            "writers": len(self.writers),
            "lines": {split: len(self.select(split)) for split in SPLITS},
            "split": "given" if (data_root / "train").is_dir() else f"by seed {seed}",
        }

    @cached_property
    def strip(self) -> NDArray[np.uint8]:
        # Mode c: torch wants memory that it may write to; nothing reaches the file.
        return np.memmap(self.strip_file, np.uint8, mode="c").reshape(-1, self.line_height)

    def ink(self, line: int, most: int) -> NDArray[np.uint8]:
        """Read a line's first columns from the file, (columns, line_height). Raises OSError.

        Not from the map, where a part that is gone, as on a network disk, ends the process.
        """
        columns, height = min(int(self.widths[line]), most), self.line_height
        with open(self.strip_file, "rb") as file:
            file.seek(int(self.starts[line]) * height)
            read = file.read(columns * height)
        if len(read) < columns * height:
            raise OSError(f"{self.strip_file} is not whole")
        return np.frombuffer(read, np.uint8).reshape(columns, height)

    def select(self, split: str) -> NDArray[np.int64]:
        """Give the indices of a split's lines, in a fixed order."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def for_trial(self) -> LineSet:
        """Leave out what is large and no trial reads: the report, paths of no validation line."""
        held_out = set(self.select("val").tolist())
        paths = tuple(path if i in held_out else "" for i, path in enumerate(self.paths))
        return replace(self, paths=paths, report={})


# ------------------------------------------------------------------------------------ finding


def find_lines(
    data_root: Path,
    num_writers: int | None = None,
    seed: int = 0,
    left_out: LeftOut | None = None,
) -> list[LineFile]:
    """Find all line images of the first `num_writers` writers by name (None: of all).

    Reads directories only. The order does not depend on the file system's. Without split
    directories the lines are split by `seed`. What is not looked at is noted in `left_out`.
    Raises UserError when no search is possible.
    """
    left_out = LeftOut() if left_out is None else left_out
    try:
        if not data_root.is_dir():
            problem = "is not a directory" if data_root.exists() else "does not exist"
            raise UserError(
                f"--data_root {data_root} {problem}; give the directory of the line images"
            )
        refuse_other_layouts(data_root)
        lines = _scan(data_root, left_out)
    except OSError as error:
        raise UserError(f"--data_root {data_root} cannot be read: {one_line(error)}") from None
    if not lines:
        refuse_no_images(data_root, describe_left_out(left_out.report(), all_kinds=True))
    refuse_two_forms(line.writer for line in lines)
    if not any(line.split for line in lines):
        lines = split_by_page(lines, seed)
    return _check_writers(data_root, lines, num_writers, left_out)


def _scan(data_root: Path, left_out: LeftOut) -> list[LineFile]:
    has_splits = (data_root / "train").is_dir()
    if not has_splits and any((data_root / split).is_dir() for split in SPLITS[1:]):
        raise UserError(f"--data_root {data_root} has val or test but no train directory")
    lines: list[LineFile] = []
    for split in SPLITS if has_splits else ("",):
        top = data_root / split
        if top.is_dir():
            lines += _scan_split(data_root, split, left_out)
    if has_splits:
        entries = list(os.scandir(data_root))
        _note_images(entries, left_out)
        for entry in directories_of_lines(entries, left_out):
            if entry.name not in SPLITS:
                left_out.add("directories beside train", entry.path)
    return lines


def _scan_split(data_root: Path, split: str, left_out: LeftOut) -> Iterator[LineFile]:
    top = data_root / split
    entries = sorted(os.scandir(top), key=lambda entry: entry.name)
    _note_images(entries, left_out)
    # A link back up would give a writer the lines of all.
    above = [identity_of(data_root / part) for part in ("", split)]
    for writer in directories_of_lines(entries, left_out):
        for directory, images in walk(Path(writer.path), left_out, above):
            page = directory.relative_to(writer.path).as_posix()
            for image in images:
                status = image.stat()
                path = os.path.relpath(image.path, data_root)
                yield LineFile(path, split, writer.name, page, status.st_size, status.st_mtime_ns)


def _note_images(entries: Sequence[os.DirEntry[str]], left_out: LeftOut) -> None:
    for image in images_among(entries, left_out):
        left_out.add("images beside the writers' directories", image.path)


def _check_writers(
    data_root: Path, lines: list[LineFile], num_writers: int | None, left_out: LeftOut
) -> list[LineFile]:
    """Keep the lines of the chosen writers; raise UserError where no fair search is possible."""
    writers = sorted({line.writer for line in lines if line.split == "train"})
    if len(writers) < 2:
        raise UserError(
            f"--data_root {data_root} has {counted(len(writers), 'writer')} with training lines; "
            "telling writers apart needs two or more" + hint_of_one_writer(data_root, writers)
        )
    strangers = sorted({line.writer for line in lines if line.split == "val"} - set(writers))
    if strangers:
        alike = {as_seen(writer): writer for writer in writers}.get(as_seen(strangers[0]))
        raise UserError(
            f"{data_root}/val has {counted(len(strangers), 'writer')} without training lines, "
            f"first {one_line(strangers[0])}"
            + (
                f"; train has {one_line(alike)}: if they are one, give their directories one name"
                if alike
                else "; move some of their pages to train, or remove them"
            )
        )
    for line in lines:
        if line.split == "test" and line.writer not in writers:
            left_out.add(STRANGERS, line.path)
    chosen = set(writers[:num_writers])
    for writer in writers[len(chosen) :]:
        left_out.add(OTHERS, writer)
    kept = [line for line in lines if line.writer in chosen]
    if not any(line.split == "val" for line in kept):
        way = "add a val directory, or pages to split (a writer needs two pages or more)"
        if all(line.page == NO_PAGE for line in kept):
            way = "their images lie in no page's directory: make a directory for each page"
        raise UserError(
            f"--data_root {data_root} has no validation lines for the chosen writers; {way}"
        )
    return kept


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
    data_root: Path,
    lines: list[LineFile],
    line_height: int,
    cache_dir: Path,
    left_out: LeftOut | None = None,
) -> LineSet:
    """Open the decoded lines, decoding them first where no search has done so.

    left_out: what `find_lines` did not look at, for the report.

    Raises UserError when too many images are broken, or the cache cannot be written.
    """
    entry = cache_dir / _cache_key(data_root, lines, line_height)
    try:
        problem = _damage_of(entry)
        if problem:
            if entry.exists():
                print(f"warning: {entry} {problem}: decoding anew", file=sys.stderr)
            _decode_into(entry, data_root, lines, line_height)
    except OSError as error:
        raise UserError(
            f"the decoded lines cannot be written to {cache_dir}: {one_line(error)}; "
            "make room there or give another --cache_dir"
        ) from None
    return open_lines(entry, lines, left_out or LeftOut())


def _damage_of(entry: Path) -> str:
    """Say what is wrong with a cache entry; nothing where it is whole, to the last byte."""
    try:
        index = read_index(entry)
    except FileNotFoundError:
        return "is not complete"  # a disk's purge may take files one by one
    except Exception as error:  # what zip and numpy raise for damaged files
        return f"has a damaged index ({one_line(error, 100)})"
    strip = entry / "strip.u8"
    if not strip.exists():
        return "is not complete"
    if strip.stat().st_size != (1 + int(index["widths"].sum())) * int(index["line_height"]):
        return "has a strip of another length"
    return "" if _checksum(strip) == int(index["checksum"]) else "has a damaged strip"


def read_index(entry: Path) -> dict[str, NDArray[Any]]:
    """Read what a cache entry tells of its lines. Raises nearly anything where it is damaged."""
    # A zip: each part has a checksum.
    with open(entry / "index.npz", "rb") as file, np.load(file) as index:
        return {name: index[name] for name in INDEX}


def _checksum(strip: Path) -> int:
    """Sum up a file: about a second for each GB that is in memory."""
    checksum = 0
    with open(strip, "rb") as file:
        while part := file.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _cache_key(data_root: Path, lines: list[LineFile], line_height: int) -> str:
    """Name a cache entry by what can be seen of the files without reading them."""
    files = [(line.path, line.size, line.mtime_ns) for line in lines]
    key = json.dumps([CACHE_FORMAT, line_height, INK_DEVIATION, str(data_root.resolve()), files])
    return f"{line_height}px-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _decode_into(entry: Path, data_root: Path, lines: list[LineFile], line_height: int) -> None:
    """Fill a temporary directory beside `entry`, then put it in place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with builder_lock(entry.with_name(f".{entry.name}.lock")):
        if not _damage_of(entry):  # another process built it while this one waited
            return
        # By host and process: where locks do not reach other hosts, several may build it at once.
        own = f".{entry.name}.{socket.gethostname()}"
        temporary = entry.with_name(f"{own}.{os.getpid()}.tmp")
        for left in entry.parent.glob(f"{escape(own)}.*.tmp"):
            if left == temporary or not _is_alive(left.name.split(".")[-2]):
                rmtree(left, ignore_errors=True)  # of a builder that died
        temporary.mkdir()
        try:
            _write_entry(temporary, data_root, lines, line_height)
            if _damage_of(entry):
                rmtree(entry, ignore_errors=True)  # what a purge left; who reads it has it open
                os.replace(temporary, entry)
            sync_directory(entry.parent)
        finally:
            rmtree(temporary, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    return not pid.isdigit() or Path("/proc", pid).exists()


def _write_entry(directory: Path, data_root: Path, lines: list[LineFile], line_height: int) -> None:
    index: dict[str, NDArray[Any]] = {
        "line_height": np.array(line_height),
        "widths": np.zeros(len(lines), np.int64),
        "digests": np.zeros((len(lines), 16), np.uint8),
        "sizes": np.zeros((len(lines), 2), np.int64),
        "is_light": np.zeros(len(lines), bool),
        "ink_share": np.zeros(len(lines)),
        "versions": np.ones(len(lines), np.int64),
    }
    broken: dict[str, str] = {}
    checksum = 0

    def write_strip(file: Any) -> None:
        nonlocal checksum
        file.write(bytes(line_height))  # column 0: empty background
        checksum = zlib.crc32(bytes(line_height))
        # Threads: Pillow decodes and resizes without the interpreter's lock.
        read = partial(_read_line, line_height)
        paths = (data_root / line.path for line in lines)
        with in_order(read, paths) as results:
            decoded = tqdm(
                results,
                "decoding lines",
                len(lines),
                leave=False,
                unit="line",
                disable=None,
            )
            for number, (digest, line) in enumerate(decoded):
                index["digests"][number] = np.frombuffer(digest, np.uint8)
                if isinstance(line, str):
                    broken[lines[number].path] = line
                    continue
                ink = np.ascontiguousarray(line.ink).data
                file.write(ink)
                checksum = zlib.crc32(ink, checksum)
                index["widths"][number] = len(line.ink)
                index["sizes"][number] = line.size
                index["is_light"][number] = line.is_light
                index["ink_share"][number] = (line.ink > INK_DEVIATION).mean()
                index["versions"][number] = line.version

    write_whole(directory / "strip.u8", write_strip)
    _refuse_broken(lines, broken)
    index["checksum"] = np.array(checksum)
    index["broken"] = np.frombuffer(json.dumps(broken).encode(), np.uint8)
    arrays: dict[str, Any] = index
    write_whole(directory / "index.npz", lambda file: np.savez(file, **arrays))


def _read_line(line_height: int, path: Path) -> tuple[bytes, DecodedLine | str]:
    """Give a file's digest, and what it shows or what is wrong with it.

    A failure to read it is no property of the image, so it is not remembered: UserError.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{one_line(path)} cannot be read ({one_line(error.strerror or error)}); make it "
            "readable or remove it, and run the same command again"
        ) from None
    digest = hashlib.sha256(content).digest()[:16]
    try:
        return digest, decode_line(content, line_height)
    except BrokenImageError as error:
        return digest, str(error)
    except MemoryError:
        raise UserError(
            f"{one_line(path)} cannot be decoded: out of memory; end other programs, and run the "
            "same command again"
        ) from None


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
            f"({cause}); fix or remove them"
        )


def open_lines(entry: Path, lines: list[LineFile], left_out: LeftOut) -> LineSet:
    """Open a cache entry for these lines (the ones that it was made from, in the same order)."""
    index = read_index(entry)
    widths, digests, line_height = index["widths"], index["digests"], int(index["line_height"])
    broken = json.loads(index["broken"].tobytes())
    _refuse_broken(lines, broken)  # another split of the same files may need what is broken
    starts = 1 + np.concatenate([[0], np.cumsum(widths)[:-1]])
    usable = np.flatnonzero(widths)
    kept = [lines[i] for i in usable]
    writers = tuple(sorted({line.writer for line in kept if line.split == "train"}))
    label = {writer: number for number, writer in enumerate(writers)}
    page_number: dict[tuple[str, str, str], int] = {}
    pages = [
        page_number.setdefault((line.split, line.writer, line.page), len(page_number))
        if line.page != NO_PAGE
        else -1
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
        fingerprint=_fingerprint(kept, digests[usable], line_height, index["versions"][usable]),
        report={
            **data_report(lines, kept, digests[usable], broken),
            "odd": odd_lines(
                kept, {name: index[name][usable] for name in MEASURED}, digests[usable]
            ),
            "left_out": left_out.report(),
        },
    )


def _fingerprint(
    kept: list[LineFile],
    digests: NDArray[np.uint8],
    line_height: int,
    versions: NDArray[np.int64],
) -> str:
    """Hash what was learned from: contents, names and splits, but no dates and no data root.

    Lines that every version of the decoding reads alike have the hash that the first one gave.
    """
    return hash_lines(f"{versions.max()} {line_height} {INK_DEVIATION}", kept, digests)
