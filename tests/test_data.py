"""Finding, splitting, decoding and caching line images."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import subprocess
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import data as data_module
from data import (
    SPLITS,
    LineFile,
    LineSet,
    find_lines,
    load_lines,
    split_by_page,
)
from writer_search.common.errors import UserError
from writer_search.common.locks import builder_lock
from writer_search.lines import parallel
from writer_search.lines.decoding import INK_DEVIATION, BrokenImageError, decode_line
from writer_search.lines.kinds import SUFFIXES
from writer_search.lines.report import describe_report
from writer_search.lines.walk import LeftOut
from writer_search.training.batches import Lines

HEIGHT = 16


def draw_line(seed: int, width: int = 96, height: int = 24) -> NDArray[np.uint8]:
    """Dark smooth blots on light paper: (height, width), grey."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray((rng.random((4, width // 6)) > 0.7).astype(np.float32))
    ink = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return (220 - 160 * ink).astype(np.uint8)


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ink_of(content: bytes, line_height: int) -> NDArray[np.uint8]:
    return decode_line(content, line_height).ink


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_lines(root: Path, paths: Iterable[str], first_seed: int = 0) -> None:
    """Write a different line image to each path."""
    for seed, path in enumerate(paths, first_seed):
        write_file(root / path, encoded(draw_line(seed, width=60 + seed % 40)))


def two_writers(lines: int = 2) -> list[str]:
    """Paths of two writers, a page of so many lines each in train and in val."""
    return [
        f"{split}/{writer}/{split}_page/line_{line:03d}.png"
        for split in ("train", "val")
        for writer in ("anna", "bruno")
        for line in range(1, lines + 1)
    ]


def load(root: Path, cache: Path, **options: Any) -> LineSet:
    return load_lines(root, find_lines(root, **options), HEIGHT, cache)


def refused(call: Callable[[], object]) -> str:
    """Return the message of the UserError that a call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def entries(cache: Path) -> list[str]:
    """List all that a cache holds."""
    return [path.name for path in cache.iterdir()] if cache.exists() else []


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("book", ["", "book_a/"])
def test_directories_say_split_writer_book_and_page(tmp_path: Path, book: str) -> None:
    paths = [
        f"{split}/{writer}/{book}{split}_page/line_001.png"
        for split in SPLITS
        for writer in ("anna", "bruno")
    ]
    write_lines(tmp_path, paths)
    lines = find_lines(tmp_path)
    assert [line.path for line in lines] == paths
    for line in lines:
        split, writer, *page, _ = line.path.split("/")
        assert (line.split, line.writer, line.page) == (split, writer, "/".join(page))
        assert line.book == (book.rstrip("/") or None)
        assert line.size == (tmp_path / line.path).stat().st_size


@pytest.mark.parametrize("book", ["", "book_a/"])
def test_without_split_directories_writers_are_at_the_top(tmp_path: Path, book: str) -> None:
    paths = [
        f"{writer}/{book}page_{page}/line_{line}.png"
        for writer in ("anna", "bruno")
        for page in range(4)
        for line in range(2)
    ]
    write_lines(tmp_path, paths)
    lines = find_lines(tmp_path)
    assert [line.path for line in lines] == paths
    assert {line.writer for line in lines} == {"anna", "bruno"}
    for writer in ("anna", "bruno"):
        assert {line.split for line in lines if line.writer == writer} == set(SPLITS)


def test_suffixes_count_in_any_case_and_other_files_do_not(tmp_path: Path) -> None:
    names = [f"line{suffix}" for suffix in sorted(SUFFIXES)]
    names += [f"LINE{suffix.upper()}" for suffix in sorted(SUFFIXES)] + ["mixed.JpEg"]
    write_lines(tmp_path, two_writers())
    for name in [*names, "notes.txt", "png", "line.png.part", "Thumbs.db"]:
        write_file(tmp_path / "train" / "anna" / "mixed" / name, b"content")
    found = [Path(line.path).name for line in find_lines(tmp_path) if line.page == "mixed"]
    assert sorted(found) == sorted(names)


def test_hidden_files_and_directories_are_skipped(tmp_path: Path) -> None:
    write_lines(tmp_path, two_writers())
    before = find_lines(tmp_path)
    for hidden in (
        "train/anna/train_page/._line_001.png",
        "train/anna/.thumbnails/line_001.png",
        "train/.trash/page/line_001.png",
        ".cache/writer/page/line_001.png",
    ):
        write_lines(tmp_path, [hidden])
    (tmp_path / "train" / "anna" / "directory.png").mkdir()
    assert find_lines(tmp_path) == before


@pytest.mark.parametrize("place", ["", "runs/a", "anna"])
@pytest.mark.parametrize("mark", ["optuna_study.db", "search.lock"])
def test_pictures_of_a_search_among_the_lines_are_nobody_s(
    tmp_path: Path, place: str, mark: str
) -> None:
    pages = [f"{writer}/page_{n}/line_001.png" for writer in ("anna", "bert") for n in range(4)]
    write_lines(tmp_path, pages)
    before = find_lines(tmp_path)
    written = ("summary/history.png", "trial_000/curves.png", "confirm/trial_001/curves.png")
    write_lines(tmp_path, [os.path.join(place, name) for name in written])
    assert find_lines(tmp_path) != before
    write_file(tmp_path / place / mark, b"")
    assert find_lines(tmp_path) == before
    (tmp_path / place / mark).rename(tmp_path / place / "trial_000" / "history.jsonl")
    assert not any("trial_000" in line.path for line in find_lines(tmp_path))


def test_images_beside_page_directories_are_a_page_of_their_own(tmp_path: Path) -> None:
    write_lines(tmp_path, [*two_writers(), "train/anna/line_001.png"])
    assert {line.page for line in find_lines(tmp_path) if line.writer == "anna"} == {
        ".",
        "train_page",
        "val_page",
    }


def test_order_does_not_depend_on_creation(tmp_path: Path) -> None:
    paths = [f"w{w}/p{p}/line_{n}.png" for w in range(3) for p in range(3) for n in range(2)]
    orders = []
    for attempt in range(3):
        root = tmp_path / str(attempt)
        created = paths.copy()
        random.Random(attempt).shuffle(created)
        for path in created:
            write_file(root / path, path.encode())
        orders.append([(line.path, line.split) for line in find_lines(root)])
    assert orders[0] == orders[1] == orders[2]
    assert [path for path, _ in orders[0]] == paths


def test_a_subset_is_the_first_writers_by_name(tmp_path: Path) -> None:
    names = ["delta", "alpha", "charlie", "bravo"]
    write_lines(tmp_path, [f"{split}/{n}/{split}/l.png" for split in SPLITS for n in names])
    lines = find_lines(tmp_path, num_writers=2)
    assert {line.writer for line in lines} == {"alpha", "bravo"}
    assert {line.split for line in lines} == set(SPLITS)
    assert find_lines(tmp_path, num_writers=9) == find_lines(tmp_path)


# ------------------------------------------------------------------------------ automatic split


def pages_of(writer: str, pages: dict[str, int]) -> list[LineFile]:
    """Make lines without files: page → number of lines."""
    return [
        LineFile(f"{writer}/{page}/{number}.png", "", writer, page, 1, 1)
        for page, count in pages.items()
        for number in range(count)
    ]


def random_writer(writer: str, rng: random.Random) -> list[LineFile]:
    books = rng.choice([[""], [""], ["b1/", "b2/"], ["b1/", "b2/", "b3/", ""]])
    pages = {
        f"{book}p{number}": rng.randint(1, 12)
        for book in books
        for number in range(rng.randint(1, 9))
    }
    return pages_of(writer, pages)


def splits_by(lines: list[LineFile], unit: Callable[[LineFile], str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lines:
        found.setdefault(unit(line), set()).add(line.split)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_automatic_split_divides_no_page_and_no_book(seed: int) -> None:
    before = random_writer("w", random.Random(seed))
    lines = split_by_page(before, seed)
    assert [replace(line, split="") for line in lines] == before
    by_book = len({line.book for line in lines}) > 1
    units = splits_by(lines, lambda line: (by_book and line.book) or line.page)
    assert all(len(splits) == 1 for splits in units.values())
    wanted = {1: {"train"}, 2: {"train", "val"}}.get(len(units), set(SPLITS))
    assert {line.split for line in lines} == wanted


@pytest.mark.parametrize("seed", range(40))
def test_largest_unit_trains_and_held_out_splits_are_about_a_seventh(seed: int) -> None:
    before = pages_of("w", {f"p{n}": random.Random(seed * 99 + n).randint(1, 9) for n in range(12)})
    lines = split_by_page(before, seed)
    size = Counter(line.page for line in lines)
    largest = max(size.values())
    trained = {line.page for line in lines if line.split == "train"}
    assert any(size[page] == largest for page in trained)
    for split in ("val", "test"):
        own = [size[page] for page in {line.page for line in lines if line.split == split}]
        assert sum(own) <= max(0.15 * len(lines), own[0] if len(own) == 1 else 0)
    assert sum(size[page] for page in trained) >= 0.5 * len(lines)


def test_a_single_large_unit_always_trains() -> None:
    for seed in range(30):
        lines = split_by_page(pages_of("w", {"small": 1, "large": 9, "other": 2}), seed)
        assert {line.split for line in lines if line.page == "large"} == {"train"}


def test_small_pages_are_shared_out_between_the_held_out_splits() -> None:
    for seed in range(20):
        lines = split_by_page(pages_of("w", {"small": 1, "other": 1, "large": 20}), seed)
        assert {line.split for line in lines} == set(SPLITS)


def test_split_depends_on_the_seed() -> None:
    lines = pages_of("w", {f"p{number}": 2 for number in range(8)})
    drawn = {tuple(line.split for line in split_by_page(lines, seed)) for seed in range(10)}
    assert len(drawn) > 4
    assert split_by_page(lines, 3) == split_by_page(lines, 3)


def test_split_does_not_depend_on_other_writers() -> None:
    rng = random.Random(5)
    writers = [random_writer(name, rng) for name in ("anna", "bruno", "clara")]
    together = split_by_page([line for own in writers for line in own], 1)
    for own in writers:
        assert split_by_page(own, 1) == [line for line in together if line.writer == own[0].writer]


def test_writers_with_equal_page_names_are_split_apart() -> None:
    pages = {f"p{number}": 2 for number in range(8)}
    drawn = {
        tuple(line.split for line in split_by_page(pages_of(name, pages), 0))
        for name in ("anna", "bruno", "clara", "dora", "emil")
    }
    assert len(drawn) > 1


# --------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], "no line images"),
        (["train/anna/page/notes.txt"], "no line images"),
        (["train/anna/page/1.png", "val/anna/other/1.png"], "1 writer"),
        (["anna/one/1.png", "anna/two/1.png"], "1 writer"),
        (["train/anna/p/1.png", "train/bruno/p/1.png"], "no validation lines"),
        (
            ["anna/p/1.png", "bruno/p/1.png"],
            "no validation lines for the chosen writers; add a val directory, or pages to split",
        ),
        (
            ["anna/1.png", "bruno/1.png"],
            "no validation lines for the chosen writers; their images lie in no page's directory",
        ),
        ([*two_writers(), "val/stranger/p/1.png"], "stranger"),
        (["val/anna/p/1.png", "val/bruno/p/1.png"], "no train directory"),
        (["test/anna/p/1.png", "test/bruno/p/1.png"], "no train directory"),
    ],
)
def test_sets_without_a_fair_search_are_refused(
    tmp_path: Path, paths: list[str], names: str
) -> None:
    for path in paths:
        write_file(tmp_path / path, b"content")
    message = refused(lambda: find_lines(tmp_path))
    assert names in message
    assert str(tmp_path) in message


def test_a_missing_root_and_a_file_as_root_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "lines.zip"
    file.write_bytes(b"content")
    assert f"{file} is not a directory" in refused(lambda: find_lines(file))
    missing = tmp_path / "missing"
    assert f"{missing} does not exist" in refused(lambda: find_lines(missing))


def test_validation_lines_must_be_of_chosen_writers(tmp_path: Path) -> None:
    write_lines(tmp_path, [f"train/{name}/p/1.png" for name in "abc"] + ["val/c/q/1.png"])
    assert "chosen writers" in refused(lambda: find_lines(tmp_path, num_writers=2))
    assert len(find_lines(tmp_path, num_writers=3)) == 4


# ----------------------------------------------------------------------------- links and odd names


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_loop_of_links_is_survived(tmp_path: Path, target: str) -> None:
    """The link leads to the page, the writer, the split or the data root."""
    write_lines(tmp_path, two_writers())
    before = find_lines(tmp_path)
    (tmp_path / "train" / "anna" / "train_page" / "loop").symlink_to(target)
    assert find_lines(tmp_path) == before


def test_pages_that_link_to_each_other_stand_once(tmp_path: Path) -> None:
    """And under their own names, whatever link is met first."""
    write_lines(tmp_path, two_writers())
    write_lines(tmp_path, ["train/anna/another/line_001.png"])
    before = find_lines(tmp_path)
    (tmp_path / "train" / "anna" / "another" / "next").symlink_to("../train_page")
    (tmp_path / "train" / "anna" / "train_page" / "next").symlink_to("../another")
    left_out = LeftOut()
    assert find_lines(tmp_path, left_out=left_out) == before
    assert left_out.report()["links to directories that were read already"]["count"] == 2


def test_a_link_to_itself_is_survived_or_named(tmp_path: Path) -> None:
    write_lines(tmp_path, two_writers())
    before = find_lines(tmp_path)
    (tmp_path / "train" / "anna" / "loop").symlink_to("loop")
    try:
        survived = find_lines(tmp_path) == before
    except UserError as error:
        survived = "train/anna/loop" in str(error)
    assert survived


def test_a_linked_page_counts(tmp_path: Path) -> None:
    write_lines(tmp_path / "root", two_writers())
    write_lines(tmp_path / "elsewhere", ["line_001.png"])
    (tmp_path / "root" / "train" / "anna" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "train" / "anna" / "dangling").symlink_to(tmp_path / "nowhere")
    pages = {line.page for line in find_lines(tmp_path / "root") if line.writer == "anna"}
    assert pages == {"train_page", "val_page", "linked"}


@pytest.mark.parametrize("odd", ["new\nline", os.fsdecode(b"latin\xe9\xff"), "خط", "a b'\"\\", "é"])
def test_odd_names_survive(tmp_path: Path, odd: str) -> None:
    root = tmp_path / "root"
    paths = [
        f"{split}/{writer}/{odd}_{split}/{odd}.png"
        for split in ("train", "val")
        for writer in ("anna", f"w{odd}")
    ]
    write_lines(root, paths)
    write_file(root / f"train/w{odd}/{odd}_train/broken\n.png", b"")
    write_lines(root, [f"train/anna/many/{n}.png" for n in range(120)], first_seed=50)
    data = load(root, tmp_path / "cache")
    assert set(paths) <= set(data.paths)
    assert f"w{odd}" in data.writers
    assert len(data.report["broken"]) == 1
    for line in describe_report(data.report):
        assert line.isprintable()
        line.encode()
    json.dumps(data.report).encode()


# ------------------------------------------------------------------------------------- decoding


GREY = draw_line(7, width=300, height=40)
INK = ink_of(encoded(GREY), HEIGHT)


def assert_alike(ink: NDArray[np.uint8], like: NDArray[np.uint8] = INK, mean: float = 1.5) -> None:
    """Assert that two decoded lines show the same ink, in grey levels of 255."""
    assert ink.shape == like.shape
    assert ink.dtype == np.uint8
    difference = np.abs(ink.astype(float) - like.astype(float))
    assert difference.mean() < mean
    assert difference.max() < 20


def test_ink_is_positive_on_a_background_of_zero() -> None:
    assert INK.shape == (round(300 * HEIGHT / 40), HEIGHT)
    assert (INK == 0).mean() > 0.2
    small = np.asarray(Image.fromarray(GREY).resize(INK.shape, Image.Resampling.BILINEAR)).T
    assert np.corrcoef(INK.ravel(), 255 - small.ravel())[0, 1] > 0.97
    assert INK.std() == pytest.approx(INK_DEVIATION, rel=0.05)


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0), (0.4, 90), (1, -50), (0.3, 10), (-1, 255)])
def test_neither_paper_nor_ink_grey_is_seen(scale: float, shift: float) -> None:
    changed = GREY.astype(float) * scale + shift
    assert_alike(ink_of(encoded(changed.astype(np.uint8)), HEIGHT))


def test_two_different_lines_do_not_look_alike() -> None:
    """The tolerance of the comparison would notice another line."""
    other = ink_of(encoded(draw_line(8, width=300, height=40)), HEIGHT)
    with pytest.raises(AssertionError):
        assert_alike(other)


def ink_on_transparency(grey: NDArray[np.uint8]) -> Image.Image:
    """Black of varying opacity on nothing, as vector programs save it."""
    image = Image.new("RGBA", grey.shape[::-1], "black")
    image.putalpha(Image.fromarray(255 - grey))
    return image


KINDS = {
    "16 bits": encoded(GREY.astype(np.uint16) * 200),
    "16 bits, TIFF": encoded(GREY.astype(np.uint16) * 16 + 3000, "TIFF"),
    "float, TIFF": encoded(GREY.astype(np.float32) / 255, "TIFF"),
    "palette": encoded(Image.fromarray(GREY).convert("P")),
    "quantized": encoded(Image.fromarray(GREY).convert("RGB").quantize(64)),
    "colour": encoded(Image.fromarray(GREY).convert("RGB")),
    "opaque": encoded(Image.fromarray(GREY).convert("RGBA")),
    "opaque grey": encoded(Image.fromarray(GREY).convert("LA")),
    "transparent": encoded(ink_on_transparency(GREY)),
    "four inks, TIFF": encoded(Image.fromarray(GREY).convert("CMYK"), "TIFF"),
    "BMP": encoded(GREY, "BMP"),
    "WebP": encoded(GREY, "WEBP", lossless=True),
    "JPEG": encoded(GREY, "JPEG", quality=95),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same_ink(kind: str) -> None:
    assert_alike(ink_of(KINDS[kind], HEIGHT))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_camera_orientation_is_undone(kind: str, orientation: int) -> None:
    """A photograph's own downscaling must not cost more of a turned line than of an upright one."""
    page = Image.new("L", (1190, 150), 220)
    rng = np.random.default_rng(0)
    for x, y in rng.uniform([20, 20], [1170, 130], (200, 2)):
        ImageDraw.Draw(page).line((x, y, x + 15, y - 20), fill=60, width=4)
    grey = np.asarray(page)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = Image.fromarray(grey)
    stored = stored if undo is None else stored.transpose(undo)
    tag = Image.Exif()
    tag[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    upright = ink_of(encoded(grey, kind, **options), 64)
    assert_alike(ink_of(encoded(stored, kind, exif=tag, **options), 64), like=upright)


@pytest.mark.parametrize("noted", [0, 9, 77, 65535])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_orientation_that_is_none_is_ignored(kind: str, noted: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = noted
    assert np.array_equal(
        ink_of(encoded(GREY, kind, exif=tag), 64), ink_of(encoded(GREY, kind), 64)
    )


def test_damaged_camera_notes_are_ignored() -> None:
    whole = ink_of(encoded(GREY, "PNG"), HEIGHT)
    assert np.array_equal(
        ink_of(encoded(GREY, "PNG", exif=b"Exif\0\0no notes at all"), HEIGHT), whole
    )


@pytest.mark.parametrize("kind", ["JPEG2000", "GIF", "PPM"])
def test_kinds_that_archives_deliver_are_read(kind: str) -> None:
    assert_alike(ink_of(encoded(GREY, kind), HEIGHT), mean=3)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_a_file_of_several_pictures_is_refused_with_the_way_out(kind: str) -> None:
    pages = [Image.fromarray(draw_line(seed)) for seed in range(3)]
    several = encoded(pages[0], kind, save_all=True, append_images=pages[1:])
    with pytest.raises(BrokenImageError, match="holds 3 pictures: save each in a file of its own"):
        decode_line(several, HEIGHT)


CONTENTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "Git LFS pointer",
    b"this is a note\nof two lines": "text",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1": "HEIC",
    b"%PDF-1.7 ...": "PDF",
    b"<!DOCTYPE html><html>404": "web page",
    b"\0" * 900: "zeros",
    b"\x01\x02\x03\xfe": "not an image",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_no_image_is_called_by_its_name(content: bytes) -> None:
    with pytest.raises(BrokenImageError) as caught:
        decode_line(content, HEIGHT)
    assert CONTENTS[content] in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "I;16", "F"])
def test_big_pictures_are_made_smaller_before_they_become_grey(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a sixth of the pixels they give nearly the same ink, and are marked as read anew."""
    rough = np.asarray(Image.fromarray(GREY).resize((1760, 200), Image.Resampling.BICUBIC))
    rough = np.pad(rough, 20, constant_values=220)
    if mode == "1":
        big = Image.fromarray(np.where(rough < 140, 0, 255).astype(np.uint8)).convert("1")
    elif mode in ("I;16", "F"):
        big = Image.fromarray(rough.astype({"I;16": np.uint16, "F": np.float32}[mode]) * 200)
    else:
        big = Image.fromarray(rough).convert(mode)
    content = encoded(big, "TIFF")
    whole = decode_line(content, HEIGHT)
    monkeypatch.setattr("writer_search.lines.decoding.BIG", 100_000)
    smaller = decode_line(content, HEIGHT)
    assert (whole.version, smaller.version) == (1, 2)
    assert smaller.size == whole.size == (1800, 240)
    assert_alike(smaller.ink, like=whole.ink, mean=2.5)


def test_big_jpegs_are_made_smaller_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their decoder: made smaller again they would be blown up."""
    rough = Image.fromarray(GREY).resize((1800, 240), Image.Resampling.BICUBIC)
    content = encoded(rough, "JPEG")
    whole = decode_line(content, HEIGHT)
    monkeypatch.setattr("writer_search.lines.decoding.BIG", 100_000)
    again = decode_line(content, HEIGHT)
    assert np.array_equal(again.ink, whole.ink)
    assert (again.size, again.version) == (whole.size, 4), "an earlier version read it otherwise"
    ImageDraw.Draw(rough).polygon([(1800, 0), (1800, 240), (1740, 240)], fill=0)
    assert decode_line(encoded(rough, "JPEG"), HEIGHT).version == 5, "of two changes the later one"


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


BROKEN = {
    "no bytes": b"",
    "truncated": encoded(GREY)[: len(encoded(GREY)) // 2],
    "truncated JPEG": encoded(GREY, "JPEG")[: len(encoded(GREY, "JPEG")) // 2],
    "text": b"this is no image\n" * 9,
    "blank": encoded(np.full((40, 300), 230, np.uint8)),
    "bomb": huge_png(60_000, 60_000),
    "bomb that Pillow only warns of": huge_png(12_000, 12_000),
    "absurd aspect": encoded(np.tile(GREY[:4], (1, 4))),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_told_in_one_line(kind: str) -> None:
    with pytest.raises(BrokenImageError) as caught:
        ink_of(BROKEN[kind], HEIGHT)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 150


def test_a_bomb_is_refused_while_another_thread_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters of warnings belong to the whole process: threads may undo each other's."""
    read, first_is_in, second_is_in = Image.open, threading.Event(), threading.Event()

    def open_in_turn(file: io.BytesIO) -> Image.Image:
        if threading.current_thread() is first:
            first_is_in.set()
            second_is_in.wait(10)
        else:
            second_is_in.set()
            first.join(10)
        return read(file)

    monkeypatch.setattr(Image, "open", open_in_turn)
    first = threading.Thread(target=decode_line, args=(encoded(GREY[:20, :99]), HEIGHT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
        first.start()
        first_is_in.wait(10)
        with pytest.raises(BrokenImageError):
            ink_of(encoded(GREY), HEIGHT)
        assert list(warnings.filters) == before


def test_real_lines_decode(real_lines: Path) -> None:
    lines = find_lines(real_lines)
    for line in lines[:: max(1, len(lines) // 5)]:
        ink = ink_of((real_lines / line.path).read_bytes(), HEIGHT)
        assert ink.shape[1] == HEIGHT
        assert 0.02 < (ink > INK_DEVIATION).mean() < 0.5


# --------------------------------------------------------------------------------- broken images


@pytest.fixture(scope="module")
def many_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two writers with 100 sound lines in all."""
    root = tmp_path_factory.mktemp("many")
    write_lines(root, two_writers(lines=25))
    return root


@pytest.fixture
def own_many_lines(many_lines: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(many_lines, tmp_path / "own"))


def test_few_broken_images_are_skipped_counted_and_named(
    own_many_lines: Path, tmp_path: Path
) -> None:
    """Each kind in a set of its own would cost a copy each: all kinds are one line of many."""
    sound = load(own_many_lines, tmp_path / "cache")
    cause = {}
    for kind, content in BROKEN.items():
        path = "train/anna/train_page/line_999.png"
        write_file(own_many_lines / path, content)
        data = load(own_many_lines, tmp_path / "cache")
        assert list(data.report["broken"]) == [path], kind
        assert data.paths == sound.paths
        assert data.fingerprint == sound.fingerprint
        (line,) = describe_report(data.report)
        assert "1 broken" in line
        assert path in line
        cause[kind] = data.report["broken"][path]
        assert cause[kind] in line
    assert "empty" in cause["no bytes"]
    assert "blank" in cause["blank"]
    assert "Bomb" in cause["bomb"]
    assert "bomb" in cause["bomb that Pillow only warns of"]


def test_many_broken_images_are_an_error_that_leaves_nothing(
    own_many_lines: Path, tmp_path: Path
) -> None:
    for number, content in enumerate(list(BROKEN.values())[:2]):
        write_file(own_many_lines / f"train/anna/spoilt/{number}.png", content)
    message = refused(lambda: load(own_many_lines, tmp_path / "cache"))
    assert "2 of 102" in message
    assert "train/anna/spoilt/0.png" in message
    assert entries(tmp_path / "cache") == []


def test_exactly_one_percent_broken_is_not_an_error(own_many_lines: Path, tmp_path: Path) -> None:
    write_file(own_many_lines / "train/anna/train_page/line_001.png", b"")
    data = load(own_many_lines, tmp_path / "cache")
    assert (len(data.paths), len(data.report["broken"])) == (99, 1)


def test_a_writer_whose_lines_are_all_broken_is_an_error(
    own_many_lines: Path, tmp_path: Path
) -> None:
    write_file(own_many_lines / "train/zoe/p/1.png", b"")
    message = refused(lambda: load(own_many_lines, tmp_path / "cache"))
    assert "all training lines of writer zoe" in message
    assert entries(tmp_path / "cache") == []


def test_another_split_of_cached_lines_is_checked_as_well(
    own_many_lines: Path, tmp_path: Path
) -> None:
    """The cache knows the broken files; with another --seed they may be all that a split has."""
    write_lines(own_many_lines, ["train/zoe/p/1.png"])
    write_file(own_many_lines / "train/zoe/p/2.png", b"")
    lines = find_lines(own_many_lines, None, 0)
    entry = load_lines(own_many_lines, lines, HEIGHT, tmp_path / "cache")
    assert len(entry.report["broken"]) == 1
    sound = next(n for n, line in enumerate(lines) if line.path.endswith("zoe/p/1.png"))
    lines[sound] = replace(lines[sound], split="val")
    message = refused(lambda: load_lines(own_many_lines, lines, HEIGHT, tmp_path / "cache"))
    assert "all training lines of writer zoe" in message


def test_a_writer_whose_training_lines_are_all_broken_is_an_error(
    own_many_lines: Path, tmp_path: Path
) -> None:
    write_file(own_many_lines / "train/zoe/p/1.png", b"")
    write_lines(own_many_lines, ["val/zoe/q/1.png"])
    assert "zoe" in refused(lambda: load(own_many_lines, tmp_path / "cache"))


def test_validation_lines_that_are_all_broken_are_an_error(
    own_many_lines: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_many_lines / "val")
    write_lines(own_many_lines, [f"train/anna/more/{n}.png" for n in range(60)])
    write_file(own_many_lines / "val/anna/q/1.png", b"")
    refused(lambda: load(own_many_lines, tmp_path / "cache"))


def test_only_broken_images_are_an_error(tmp_path: Path) -> None:
    for path in two_writers():
        write_file(tmp_path / "root" / path, b"no image")
    message = refused(lambda: load(tmp_path / "root", tmp_path / "cache"))
    assert "8 of 8" in message
    assert "train/anna/train_page/line_001.png" in message
    assert entries(tmp_path / "cache") == []


# ----------------------------------------------------------------------------------------- cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two writers, eight lines in all."""
    root = tmp_path / "root"
    write_lines(root, two_writers())
    return root


def test_a_line_of_the_strip_is_its_decoded_image(root: Path, tmp_path: Path) -> None:
    data = load(root, tmp_path / "cache")
    assert data.paths == tuple(line.path for line in find_lines(root))
    assert data.writers == ("anna", "bruno")
    assert data.strip.shape == (1 + data.widths.sum(), HEIGHT)
    assert not data.strip[0].any()
    for index, path in enumerate(data.paths):
        split, writer, *_ = path.split("/")
        columns = slice(data.starts[index], data.starts[index] + data.widths[index])
        decoded = ink_of((root / path).read_bytes(), HEIGHT)
        assert np.array_equal(data.strip[columns], decoded)
        assert data.writers[data.labels[index]] == writer
        assert index in data.select(split)
    assert sorted(np.concatenate([data.select(split) for split in SPLITS])) == list(range(8))


def test_pages_are_numbered_apart_by_writer_and_split(tmp_path: Path) -> None:
    paths = [f"{s}/{w}/page/{n}.png" for s in ("train", "val") for w in "ab" for n in range(2)]
    write_lines(tmp_path / "root", paths)
    pages = load(tmp_path / "root", tmp_path / "cache").pages
    assert np.array_equal(pages, [0, 0, 1, 1, 2, 2, 3, 3])


def spoil(root: Path, path: str) -> None:
    """Replace an image's content in a way that neither size nor date tells."""
    status = (root / path).stat()
    (root / path).write_bytes(b"x" * status.st_size)
    os.utime(root / path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_load_reads_no_image(root: Path, tmp_path: Path) -> None:
    first = load(root, tmp_path / "cache")
    for path in first.paths:
        spoil(root, path)
    second = load(root, tmp_path / "cache")
    assert np.array_equal(first.strip, second.strip)
    assert first.fingerprint == second.fingerprint
    assert first.report == second.report
    assert len(entries(tmp_path / "cache")) == 1


def test_a_changed_image_of_the_same_size_is_decoded_again(root: Path, tmp_path: Path) -> None:
    path = root / "train/anna/train_page/line_001.png"
    path.write_bytes(encoded(draw_line(1), "BMP"))
    old = path.stat()
    before = load(root, tmp_path / "cache")
    path.write_bytes(encoded(draw_line(2), "BMP"))
    assert path.stat().st_size == old.st_size
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    after = load(root, tmp_path / "cache")
    own = after.strip[after.starts[0] : after.starts[0] + after.widths[0]]
    assert np.array_equal(own, ink_of(path.read_bytes(), HEIGHT))
    assert after.fingerprint != before.fingerprint


def test_line_heights_do_not_share_an_entry(root: Path, tmp_path: Path) -> None:
    lines = find_lines(root)
    low = load_lines(root, lines, 16, tmp_path / "cache")
    high = load_lines(root, lines, 24, tmp_path / "cache")
    assert (low.strip.shape[1], high.strip.shape[1]) == (16, 24)
    assert low.fingerprint != high.fingerprint


def test_fingerprint_is_of_contents_and_not_of_place_or_date(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, copy_function=shutil.copyfile)
    for number, path in enumerate(sorted(moved.rglob("*.png"))):
        os.utime(path, (number, number))
    one = load(root, tmp_path / "cache")
    two = load(moved, tmp_path / "other_cache")
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.strip, two.strip)


@pytest.mark.parametrize("change", ["content", "page", "writer", "split", "one line more"])
def test_fingerprint_changes_with_the_data(root: Path, tmp_path: Path, change: str) -> None:
    before = load(root, tmp_path / "cache").fingerprint
    if change == "content":
        write_file(root / "val/anna/val_page/line_001.png", encoded(draw_line(99)))
    elif change == "page":
        (root / "train/anna/train_page").rename(root / "train/anna/renamed")
    elif change == "writer":
        for split in ("train", "val"):
            (root / split / "anna").rename(root / split / "alma")
    elif change == "split":
        (root / "train/anna/moved").mkdir()
        os.replace(root / "val/anna/val_page/line_001.png", root / "train/anna/moved/1.png")
    else:
        write_lines(root, ["train/anna/train_page/line_003.png"], first_seed=77)
    assert load(root, tmp_path / "cache").fingerprint != before


def test_seeds_split_one_cache_entry_differently(tmp_path: Path) -> None:
    write_lines(tmp_path / "root", [f"{w}/p{n}/1.png" for w in "ab" for n in range(6)])
    found = [load(tmp_path / "root", tmp_path / "cache", seed=seed) for seed in (0, 0, 1, 2)]
    assert found[0].fingerprint == found[1].fingerprint
    assert len({data.fingerprint for data in found}) == 3
    assert len(entries(tmp_path / "cache")) == 1


def test_a_failed_build_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: bytes, line_height: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data_module, "decode_line", fail)
        with pytest.raises(KeyboardInterrupt):
            load(root, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert len(load(root, tmp_path / "cache").paths) == 8


@pytest.mark.parametrize("failing_write", [0, 1])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_write: int
) -> None:
    whole, written = data_module.write_whole, []

    def fail(path: Path, write: Callable[[Any], object]) -> None:
        if len(written) == failing_write:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, write)

    with monkeypatch.context() as patched:
        patched.setattr(data_module, "write_whole", fail)
        message = refused(lambda: load(root, tmp_path / "cache"))
    assert "No space left" in message
    assert str(tmp_path / "cache") in message
    assert entries(tmp_path / "cache") == []
    assert len(load(root, tmp_path / "cache").paths) == 8


def test_builder_that_waited_for_a_removed_lock_takes_a_new_one(tmp_path: Path) -> None:
    """Whoever built the entry has removed the file on whose lock another one waited."""
    lock, entered = tmp_path / ".entry.lock", []

    def wait() -> None:
        with builder_lock(lock):
            entered.append(lock.exists())

    with builder_lock(lock):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        assert not entered
    waiting.join(10)
    assert entered == [True]
    assert not lock.exists()


def test_what_a_dead_builder_left_does_not_matter(root: Path, tmp_path: Path) -> None:
    load(root, tmp_path / "cache")
    (name,) = entries(tmp_path / "cache")
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = tmp_path / "cache" / f".{name}.{socket.gethostname()}.{ended.pid}.tmp"
    os.replace(tmp_path / "cache" / name, half)
    (half / "strip.u8").write_bytes(b"half")
    other = tmp_path / "cache" / f".{name}.another_host.{ended.pid}.tmp"
    other.mkdir()
    data = load(root, tmp_path / "cache")
    assert {*entries(tmp_path / "cache")} == {name, other.name}, "who knows whether that one lives"
    assert len(data.strip) == 1 + data.widths.sum()


def test_builders_that_no_lock_keeps_apart_both_end_well(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host, whose locks do not reach this one, builds the same meanwhile."""
    monkeypatch.setattr("writer_search.common.locks.fcntl.flock", lambda *_: None)
    write, others = data_module._write_entry, []

    def also_elsewhere(directory: Path, *args: Any) -> None:
        write(directory, *args)
        monkeypatch.setattr(data_module, "_write_entry", write)
        monkeypatch.setattr(socket, "gethostname", lambda: "another_host")
        others.append(load(root, tmp_path / "cache"))

    monkeypatch.setattr(data_module, "_write_entry", also_elsewhere)
    data = load(root, tmp_path / "cache")
    assert data.fingerprint == others[0].fingerprint
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("gone", ["index.npz", "strip.u8"])
def test_what_a_purge_left_is_decoded_anew(
    root: Path, tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root, tmp_path / "cache")
    strip = np.array(first.strip)
    (name,) = entries(tmp_path / "cache")
    (tmp_path / "cache" / name / gone).unlink()

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(data_module, "_write_entry", fail)
        refused(lambda: load(root, tmp_path / "cache"))
    left = {"index.npz", "strip.u8"} - {gone}
    assert {file.name for file in (tmp_path / "cache" / name).iterdir()} == left, "trials read it"
    again = load(root, tmp_path / "cache")
    assert np.array_equal(again.strip, strip)
    assert again.fingerprint == first.fingerprint
    assert entries(tmp_path / "cache") == [name]


def zero_the_end(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [empty, cut_in_half, zero_the_end, change_a_byte])
@pytest.mark.parametrize("name", ["index.npz", "strip.u8"])
def test_a_damaged_cache_is_decoded_anew_with_a_warning(
    root: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = load(root, tmp_path / "cache")
    strip = np.array(first.strip)
    (entry,) = entries(tmp_path / "cache")
    damage(tmp_path / "cache" / entry / name)
    capsys.readouterr()
    again = load(root, tmp_path / "cache")
    assert np.array_equal(again.strip, strip)
    assert (again.fingerprint, again.report) == (first.fingerprint, first.report)
    assert "decoding anew" in capsys.readouterr().err


def test_a_read_error_names_the_file_and_is_not_remembered(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def fail_once(path: Path) -> bytes:
        if path.name == "line_002.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail_once)
        message = refused(lambda: load(root, tmp_path / "cache"))
    assert "line_002.png" in message
    assert os.strerror(errno.EIO) in message
    assert entries(tmp_path / "cache") == []
    assert load(root, tmp_path / "cache").report["broken"] == {}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_cache_without_locks_is_built_all_the_same(
    root: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(file: Any, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", without_locks)
    assert len(load(root, tmp_path / "cache").paths) == 8
    assert len(entries(tmp_path / "cache")) == 1


def test_a_cache_that_cannot_be_made_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in refused(lambda: load(root, tmp_path / "file" / "cache"))


def test_a_line_set_travels_without_its_strip(root: Path, tmp_path: Path) -> None:
    write_lines(root, [f"train/anna/long/{n}.png" for n in range(20)], first_seed=300)
    data = load(root, tmp_path / "cache")
    unused = len(pickle.dumps(data))
    assert data.strip.nbytes > 10_000
    sent = pickle.dumps(data)
    assert len(sent) < unused + 1000
    received = pickle.loads(sent)
    assert isinstance(received.strip, np.memmap)
    assert np.array_equal(received.strip, data.strip)


def test_writing_to_the_strip_reaches_no_file(root: Path, tmp_path: Path) -> None:
    data = load(root, tmp_path / "cache")
    before = data.strip_file.read_bytes()
    data.strip[:] = 255
    assert data.strip_file.read_bytes() == before


# ---------------------------------------------------------------------------------------- report


def test_report_counts_lines_pages_and_writers(lines_root: Path, data: LineSet) -> None:
    report = data.report
    assert report["lines"] == {"train": 24, "val": 12, "test": 12}
    assert report["pages"] == 16
    assert report["writers"] == {name: {"train": 6, "val": 3, "test": 3} for name in data.writers}
    assert report["writers_without_validation"] == []
    assert report["broken"] == {}
    assert describe_report(report) == []


def test_report_counts_what_stands_in_two_splits(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_lines(root, two_writers())
    write_lines(root, [f"{s}/anna/same_page/1.png" for s in ("train", "val")], first_seed=20)
    write_lines(root, [f"{s}/anna/book/{s}/1.png" for s in SPLITS], first_seed=30)
    write_lines(root, ["train/clara/p/1.png", "train/clara/p/2.png"], first_seed=40)
    # An image of the training set in val, and one twice in train.
    shutil.copy(root / "train/anna/train_page/line_001.png", root / "val/bruno/val_page/copy.png")
    shutil.copy(root / "train/clara/p/1.png", root / "train/clara/p/copy.png")
    report = load(root, tmp_path / "cache").report
    assert report["pages_in_two_splits"] == 1
    assert report["books_in_two_splits"] == 1
    assert report["images_in_two_splits"] == 1
    assert report["identical_images"] == 2
    assert report["writers_without_validation"] == ["clara"]
    without, pages, books, images, shared = describe_report(report)
    assert "1 writer without validation lines" in without
    assert "clara" in without
    assert pages.startswith("1 page stands")
    assert books.startswith("1 book stands")
    assert images.startswith("1 identical image stands")
    assert shared.startswith("1 images that stand under two writers, first val/bruno/val_page/copy")


def test_writers_with_few_validation_lines_are_named() -> None:
    report = dict.fromkeys(
        ("broken", "pages_in_two_splits", "books_in_two_splits", "images_in_two_splits"), 0
    )
    val = {"anna": 3, "bruno": 2, "clara": 1, "dora": 0}
    writers = {name: {"train": 5, "val": lines, "test": 0} for name, lines in val.items()}
    described = {**report, "writers_without_validation": [], "writers": writers}
    assert describe_report(described) == [
        "2 writers have fewer than 3 validation lines, first clara with 1: one such line moves the "
        "mean by 33.3 points"
    ]


def test_pages_of_the_same_name_of_two_writers_are_two(tmp_path: Path) -> None:
    paths = ["train/anna/p1/1.png", "train/bruno/p2/1.png", "val/anna/p2/1.png"]
    write_lines(tmp_path / "root", paths)
    assert load(tmp_path / "root", tmp_path / "cache").report["pages_in_two_splits"] == 0


def test_report_is_plain_json(data: LineSet) -> None:
    assert json.loads(json.dumps(data.report)) == data.report


@pytest.mark.parametrize("name", ["line_001.jp2", "line_001.GIF", "line_001.pgm"])
def test_kinds_of_archives_are_found(tmp_path: Path, name: str) -> None:
    kind = {".jp2": "JPEG2000", ".gif": "GIF", ".pgm": "PPM"}[Path(name).suffix.lower()]
    for number, path in enumerate(two_writers()):
        write_file(
            (tmp_path / path).with_name(f"{number}_{name}"), encoded(draw_line(number), kind)
        )
    assert len(load(tmp_path, tmp_path / "cache").paths) == 8


def test_what_is_not_looked_at_is_counted_with_an_example(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_lines(root, [*two_writers(lines=30), "test/stranger/p/1.png", "test/stranger/p/2.png"])
    for path in (
        "train/anna/train_page/a.heic",
        "train/anna/train_page/b.HEIC",
        "train/anna/train_page/line_001.gt.txt",
        "train/anna/train_page/@eaDir/line_001.png",
        "train/#recycle/anna/p/1.png",
        "train/anna/._line_001.png",
        "train/loose.png",
        "loose.png",
        "more/anna/p/1.png",
    ):
        write_lines(root, [path])
    (root / "train/anna/train_page/gone.png").symlink_to("nowhere.png")
    left_out = LeftOut()
    lines = find_lines(root, left_out=left_out)
    report = load_lines(root, lines, HEIGHT, tmp_path / "cache", left_out).report
    counts = {kind: found["count"] for kind, found in report["left_out"].items()}
    assert counts == {
        ".heic files": 2,
        ".txt files": 1,
        "system folders": 2,
        "hidden": 1,
        "images beside the writers' directories": 2,
        "directories beside train": 1,
        "links to nothing": 1,
        "test lines of writers without training lines": 2,
    }
    assert report["left_out"][".heic files"]["first"].endswith("train_page/a.heic")
    (warning,) = describe_report(report)
    assert warning.startswith("not looked at: ")
    assert "2 .heic files (first " in warning
    assert "test/stranger/p/1.png" in warning
    assert ".txt" not in warning, "texts lie beside lines in all exports"
    assert "system" not in warning
    assert {line.writer for line in lines} == {"anna", "bruno"}
    assert not any("@eaDir" in line.path for line in lines)


def test_lack_of_memory_is_no_property_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not remembered: the next command decodes the line."""
    root = tmp_path / "root"
    write_lines(root, two_writers())
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", Mock(side_effect=MemoryError))
        assert "cannot be decoded: out of memory" in refused(lambda: load(root, tmp_path / "cache"))
    assert load(root, tmp_path / "cache").report["broken"] == {}


def test_results_that_nobody_takes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "AHEAD", 10)
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return -number

    with parallel.in_order(work, range(1000)) as results:
        assert [next(results) for _ in range(3)] == [0, -1, -2]
        assert len(begun) <= 12
        assert list(results) == [-number for number in range(3, 1000)]


def test_no_line_images_says_what_is_there_instead(tmp_path: Path) -> None:
    for number in range(4):
        write_file(tmp_path / f"train/anna/p/{number}.pdf", b"%PDF")
    message = refused(lambda: find_lines(tmp_path))
    assert "no line images" in message
    assert "4 .pdf files (first " in message
    write_file(tmp_path / "train/loose.png", b"")
    assert "1 images beside the writers' directories" in refused(lambda: find_lines(tmp_path))


LAYOUTS = {
    "names of splits": (
        ["training_set/{w}/p/1.png", "validation_set/{w}/q/1.png"],
        "rename training_set to train, validation_set to val",
    ),
    "names run together": (
        ["trainset/{w}/p/1.png", "val1/{w}/q/1.png"],
        "trainset to train, val1 to",
    ),
    "a split beside train": (["train/{w}/p/1.png", "val_set/{w}/q/1.png"], "rename val_set to val"),
    "no val below writers": (["{w}/train/1.png", "{w}/test/1.png"], "put the split above"),
    "short names": (["tr/{w}/p/1.png", "va/{w}/q/1.png"], "rename tr to train, va to val"),
    "splits below writers": (["{w}/train/1.png", "{w}/val/1.png"], "anna/train; if anna is a data"),
    "two sets": (
        [f"{hand}/{split}/{{w}}/p/1.png" for hand in ("arabic", "latin") for split in SPLITS],
        "give --data_root",
    ),
    "too high": (["dataset/train/{w}/p/1.png", "dataset/val/{w}/q/1.png"], "give --data_root"),
    "much too high": (["a/b/train/{w}/p/1.png", "a/b/val/{w}/q/1.png"], "/a/b"),
    "a writer called Dev": (["Dev/{w}/1.png", "Omar/{w}/1.png"], "there is no train beside it; if"),
    "capitals": (["Train/{w}/1.png", "Test/{w}/1.png"], "rename Test to test"),
    "other words": (["training/{w}/1.png", "dev/{w}/1.png"], "rename dev to val"),
    "eval": (["train/{w}/p/1.png", "eval/{w}/q/1.png"], "rename eval to val"),
    "writers too deep": (["all/{w}/p/1.png", "all/{w}/q/1.png"], "are the writers, give"),
    "writers too deep, split": (["train/all/{w}/p/1.png", "val/all/{w}/q/1.png"], "up a level"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_mean_something_else_are_named(tmp_path: Path, layout: str) -> None:
    paths, wanted = LAYOUTS[layout]
    write_lines(tmp_path, [path.format(w=w) for path in paths for w in ("anna", "bruno")])
    assert wanted in refused(lambda: find_lines(tmp_path))


@pytest.mark.parametrize("directory", ["", "images/"], ids=["beside it", "in a directory"])
def test_a_table_of_writers_beside_flat_images_is_named(tmp_path: Path, directory: str) -> None:
    write_lines(tmp_path, [f"{directory}{n}.png" for n in range(3)])
    (tmp_path / "labels.csv").write_text("file,writer\n0.png,anna\n")
    told = refused(lambda: find_lines(tmp_path))
    assert "if labels.csv says who wrote each line: tables are not read, move" in told


def test_a_split_given_as_data_root_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path, two_writers())
    assert f"give --data_root {tmp_path}" in refused(lambda: find_lines(tmp_path / "train"))


def test_writers_may_be_called_like_splits(tmp_path: Path) -> None:
    writers = ("test_writer", "ts", "train_conductor")
    write_lines(tmp_path, [f"train/{w}/p/1.png" for w in writers] + ["val/ts/q/1.png"])
    assert {line.writer for line in find_lines(tmp_path)} == set(writers)


def test_lines_without_page_directories_are_no_page_in_two_splits(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_lines(root, [f"{s}/{w}/{s}_{n}.png" for s in SPLITS for w in "ab" for n in range(2)])
    data = load(root, tmp_path / "cache")
    assert set(data.pages) == {-1}, "no page is known"
    lines = Lines.of(data, "val", torch.from_numpy(data.strip))
    assert (lines.pages.tolist(), lines.has_pages) == ([0, 1, 2, 3], False)
    report = data.report
    assert (report["pages"], report["pages_in_two_splits"]) == (0, 0)
    assert report["writers_without_pages"] == ["a", "b"]
    assert "2 writers have lines without page directories" in describe_report(report)[-1]


def test_a_single_line_beside_page_directories_is_told(tmp_path: Path) -> None:
    """It keeps all pages from being measured."""
    root = tmp_path / "root"
    write_lines(root, [f"{s}/{w}/{s}_p/{n}.png" for s in SPLITS for w in "ab" for n in range(2)])
    write_lines(root, ["val/a/loose.png"])
    data = load(root, tmp_path / "cache")
    assert not Lines.of(data, "val", torch.from_numpy(data.strip)).has_pages
    assert data.report["writers_without_pages"] == ["a"]
    assert "1 writer has lines without page directories" in describe_report(data.report)[-1]


def test_one_name_in_two_unicode_forms_is_an_error(tmp_path: Path) -> None:
    composed, decomposed = "Ren\u00e9", "Rene\u0301"
    write_lines(tmp_path, ["train/anna/p/1.png", f"train/{composed}/p/1.png"])
    write_lines(tmp_path, [f"val/{decomposed}/q/1.png"])
    message = refused(lambda: find_lines(tmp_path))
    assert "in two forms: from byte 4 on 65 cc 81 and c3 a9" in message


def test_name_with_a_character_that_nobody_sees_is_no_other_name(tmp_path: Path) -> None:
    name = "\u0643\u0627\u062a\u0628"
    write_lines(tmp_path, [f"train/{name}/p/1.png", f"train/{name}\u200f/p/1.png"])
    assert "in two forms: from byte 9 on nothing and e2 80 8f" in refused(
        lambda: find_lines(tmp_path)
    )


@pytest.mark.parametrize(
    ("other", "is_alike"),
    [
        ("\u0639\u0644\u06cc", True),
        ("\u0639\u0640\u0644\u064a", True),
        ("\u0639\u0644\u064a ", True),
        ("\ufecb\ufee0\ufef2", True),
        ("\u0639\u0644\u0649", False),
    ],
)
def test_name_as_another_keyboard_writes_it_is_warned_of(
    other: str, is_alike: bool, tmp_path: Path
) -> None:
    name, root = "\u0639\u0644\u064a", tmp_path / "root"
    write_lines(root, [f"{s}/{w}/p/{s}.png" for s in ("train", "val") for w in ("a", name, other)])
    data = load(root, tmp_path / "cache")
    assert any("look alike" in line for line in describe_report(data.report)) == is_alike
    shutil.rmtree(root / "train" / other)
    message = refused(lambda: find_lines(root))
    assert (f"train has {name}: if they are one" in message) == is_alike


def test_one_page_in_two_unicode_forms_is_one_page(tmp_path: Path) -> None:
    root = tmp_path / "root"
    forms = {"train": "Psaume\u00e9", "val": "Psaumee\u0301"}
    write_lines(root, [f"{s}/{w}/{page}/1.png" for s, page in forms.items() for w in "ab"])
    assert load(root, tmp_path / "cache").report["pages_in_two_splits"] == 2


def test_writers_that_differ_in_case_alone_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path, [f"train/{w}/p/1.png" for w in ("Anna", "bruno")] + ["val/anna/q/1.png"])
    assert "first anna; train has Anna: if they are one" in refused(lambda: find_lines(tmp_path))


def test_odd_lines_are_counted_and_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_lines(root, two_writers(lines=9))
    page = root / "train/anna/train_page"
    write_file(page / "turned.png", encoded(draw_line(50).T.copy()))
    write_file(page / "wide.png", encoded(draw_line(51, width=900)))
    write_file(page / "negative.png", encoded(255 - draw_line(52)))
    empty = np.full((24, 400), 220, np.uint8)
    empty[9:12, 100:104] = 60
    write_file(root / "val/bruno/val_page/empty.png", encoded(empty))
    write_file(page / "catchword.png", encoded(draw_line(53, width=30)))  # short is not odd
    odd = load(root, tmp_path / "cache").report["odd"]
    assert {kind.split("(")[0].strip(): found["count"] for kind, found in odd.items()} == {
        "images taller than wide": 1,
        "lines with almost no ink": 1,
        "lines read as light ink on dark paper, unlike others of their writer": 1,
        "lines ten times as high or as wide as others of their writer": 1,
    }
    firsts = [found["first"] for found in odd.values()]
    assert [Path(first).stem for first in firsts] == ["turned", "empty", "negative", "wide"]


def test_splitting_takes_time_in_proportion_to_the_lines() -> None:
    """Counted, not timed: how often a line's book is asked for."""
    asked = 0

    class Counted(LineFile):
        @property
        def book(self) -> str | None:
            nonlocal asked
            asked += 1
            return None

    lines = [Counted(f"w/p{n % 9}/{n}.png", "", "w", f"p{n % 9}", 1, 1) for n in range(400)]
    split_by_page(lines, 0)
    assert asked <= 2 * len(lines)
