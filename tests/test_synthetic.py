import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from writer_search import demo
from writer_search.demo import make_lines
from writer_search.flags import parse_args
from writer_search.study.preparation import wanted_lines


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_layout_with_splits(tmp_path: Path) -> None:
    pages = {"train": 2, "test": 1}
    make_lines(tmp_path / "lines", num_writers=2, pages_per_split=pages, lines_per_page=2)
    assert set(contents(tmp_path / "lines")) == {
        f"{page}/line_00{line}.png"
        for writer in ("writer_01", "writer_02")
        for page in (
            f"train/{writer}/page_01",
            f"train/{writer}/page_02",
            f"test/{writer}/page_03",
        )
        for line in (1, 2)
    }


def test_layout_with_books_and_no_splits(tmp_path: Path) -> None:
    make_lines(
        tmp_path / "lines", num_writers=1, pages_per_split={"": 3}, lines_per_page=1, books=2
    )
    assert list(contents(tmp_path / "lines")) == [
        "writer_01/book_1/page_01/line_001.png",
        "writer_01/book_1/page_03/line_001.png",
        "writer_01/book_2/page_02/line_001.png",
    ]


def test_only_root_is_left_in_its_parent(tmp_path: Path) -> None:
    make_lines(tmp_path / "new" / "lines", num_writers=1, pages_per_split={"": 1}, lines_per_page=1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lines"]


def test_nothing_is_left_of_a_failed_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("writer_search.demo.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_lines(tmp_path / "lines", num_writers=1, pages_per_split={"": 1}, lines_per_page=1)
    assert not list(tmp_path.iterdir())


def test_existing_root_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    make_lines(tmp_path, num_writers=1, pages_per_split={"": 1}, lines_per_page=1)
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_two_commands_at_once_make_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds what it was about to put there."""
    few: Any = {"num_writers": 1, "pages_per_split": {"": 1}, "lines_per_page": 1}
    make_lines(tmp_path / "own", **few)
    rename = os.replace

    def late(source: Path, target: Path) -> None:
        shutil.copytree(tmp_path / "own", target)
        rename(source, target)

    monkeypatch.setattr(demo.os, "replace", late)
    make_lines(tmp_path / "lines", **few)
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["lines", "own"]


def test_seed_decides_every_pixel(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        make_lines(
            tmp_path / name, num_writers=2, pages_per_split={"": 2}, lines_per_page=2, seed=seed
        )
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert contents(tmp_path / "same") == one
    assert len({*one.values(), *two.values()}) == len(one) + len(two) == 16


def test_a_writer_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    make_lines(tmp_path / "few", num_writers=1, pages_per_split={"": 1}, lines_per_page=1)
    make_lines(tmp_path / "many", num_writers=2, pages_per_split={"": 2}, lines_per_page=2)
    assert contents(tmp_path / "few").items() <= contents(tmp_path / "many").items()


def test_paper_differs_between_pages_and_not_within_one(tmp_path: Path) -> None:
    make_lines(tmp_path / "lines", num_writers=1, pages_per_split={"": 4}, lines_per_page=3)
    paper = np.array(
        [
            [np.median(Image.open(line)) for line in sorted(page.iterdir())]
            for page in sorted((tmp_path / "lines" / "writer_01").iterdir())
        ]
    )
    assert np.ptp(paper.mean(axis=1)) > 3 * np.ptp(paper, axis=1).max()


@pytest.mark.parametrize("line_height", [32, 64])
def test_lines_are_grey_images_of_about_the_asked_height(tmp_path: Path, line_height: int) -> None:
    make_lines(
        tmp_path / "lines",
        num_writers=2,
        pages_per_split={"": 1},
        lines_per_page=4,
        line_height=line_height,
    )
    for path in (tmp_path / "lines").rglob("*.png"):
        image = Image.open(path)
        assert image.mode == "L"
        assert 0.9 * line_height < image.height < 1.1 * line_height
        assert 350 < image.width * 64 / line_height < 700
        ink_share = np.mean(np.asarray(image) < np.median(image) - 30)
        assert 0.03 < ink_share < 0.4


@pytest.mark.parametrize(("flags", "writers"), [((), 3), (("--num_writers_subset", "2"), 2)])
def test_the_demo_takes_all_of_its_writers_or_the_first(
    flags: tuple[str, ...], writers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def few_lines(root: Path) -> None:
        make_lines(root, num_writers=3, pages_per_split={"train": 1, "val": 1}, lines_per_page=1)

    monkeypatch.setattr(demo, "make_lines", few_lines)
    lines, _ = wanted_lines(parse_args(["--demo", "--checkpoint_dir", str(tmp_path), *flags]))
    assert len({line.writer for line in lines}) == writers
