"""What all tests share: one thread, and small synthetic lines."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import alembic.util
import faults
import pytest
import sqlalchemy
import torch

from data import LineSet, find_lines, load_lines
from writer_search.common.output import live
from writer_search.config import TrialConfig
from writer_search.demo import make_lines
from writer_search.study import store

LINE_HEIGHT = 16
REAL_LINES = Path(__file__).parents[2] / "shared" / "data" / "latin_hands"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Also of searches' trials: results are compared, and others may keep cores busy."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _storages_are_imported_once() -> None:
    """Optuna loads twenty files of migrations for each storage: half of a small search's time."""
    alembic.util.load_python_file = cache(alembic.util.load_python_file)
    store.warm_up_storages = cache(store.warm_up_storages)


@pytest.fixture(autouse=True, scope="session")
def _no_disk_is_waited_for() -> None:
    """What this process writes need not outlive the machine; a seventh of a small search's time."""
    os.fsync = lambda _: None

    def connected(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    """No test touches the user's cache; tests share one, as searches do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))


@pytest.fixture(autouse=True)
def _no_open_line() -> Iterator[None]:
    """A step that a test leaves under way would begin the next one's output with a line's end."""
    yield
    live.drop()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def lines_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four writers, two training pages each and one in val and test, three lines a page."""
    root = tmp_path_factory.mktemp("data") / "lines"
    make_lines(
        root,
        num_writers=4,
        pages_per_split={"train": 2, "val": 1, "test": 1},
        lines_per_page=3,
        line_height=LINE_HEIGHT,
    )
    return root


@pytest.fixture(scope="session")
def data(lines_root: Path, cache_dir: Path) -> LineSet:
    """The lines of `lines_root`, decoded."""
    return load_lines(lines_root, find_lines(lines_root), LINE_HEIGHT, cache_dir)


@pytest.fixture
def config() -> TrialConfig:
    """A trial of two short epochs."""
    return TrialConfig(
        seed=1,
        epochs=2,
        patience=2,
        backbone="tiny",
        line_height=LINE_HEIGHT,
        crop_width=32,
        batch_size=8,
    )


@pytest.fixture
def save_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials in this process save before each batch, and wait until that is on the disk."""
    faults.save_each_batch(monkeypatch.setattr)


@pytest.fixture(scope="session")
def real_lines() -> Path:
    """Real handwriting; a test that asks for it is skipped where it is not."""
    if not REAL_LINES.is_dir():
        pytest.skip("the real line images are not beside this checkout")
    return REAL_LINES
